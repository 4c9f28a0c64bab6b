"""Picture files: opened with an error that names the file, and a user's own made as their owner sees them.

data.read() calls opened(), as_its_owner_sees_it() and scale_grey(). A file that cannot be read is called broken only
where the machine is not to blame, and Pillow's warnings, which name no picture, are not shown.
"""

import logging
import math
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

from clip_min import UserError
from support.folders import warn
from support.formats import remedy

OF_PILLOW = re.compile(r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs ends in an error, which names the picture


@contextmanager
def opened(path):
    """A picture file with its header read. Whatever breaks in the block is a UserError with the path."""
    if [rule[3] for rule in warnings.filters[:1]] != [OF_PILLOW]:  # catch_warnings() is not safe with several threads
        warnings.filterwarnings("ignore", module=OF_PILLOW.pattern)
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # on broken files Pillow raises OSError, SyntaxError, struct.error and others
        of_machine = isinstance(error, (PermissionError, MemoryError))
        advice = "see to permissions and memory" if of_machine else remedy(path)
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}): {advice}") from error


def as_its_owner_sees_it(image, path):
    """The picture turned upright as its EXIF says, and put on white where it is transparent.

    Grey values of more than 8 bits are scaled by the picture's own range, because cameras and microscopes use a part of
    what the file could hold. A warning says so once for each data set.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or is_grey_of_16_bits(image):
        image = scale_grey(image, by_own_range=True)
        warn(f"grey pictures of more than 8 bits in {Path(path).parent.parent} are scaled by their own range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def is_grey_of_16_bits(image):
    return image.mode.startswith("I")  # I;16, and I in older Pillows or with 32 bits


def scale_grey(image, by_own_range=False):
    """Grey values of more than 8 bits, from 0 to 65535 or from the picture's least to its largest -> 0 to 255."""
    if image.mode != "F":
        image = image.convert("I").convert("F")
    low, high = image.getextrema() if by_own_range else (0, 65535)
    if not math.isfinite(high - low):
        raise ValueError("it has values that are no finite numbers")
    scale = 255 / (high - low or 1)  # a picture of one grey has no range
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
