"""Which files are pictures, and what to do with one that Pillow cannot open.

support/folders.py and report.py choose files by SUFFIXES; support/pictures.py calls remedy(). A phone's .heic is
read where pillow-heif is installed; where it is not, every sentence that leaves one out names the package.
"""

import logging
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image, TiffImagePlugin

ADVICE = "pip install pillow-heif to read .heic"
HEIF = (".heic", ".heif", ".hif")
SAMPLES_PER_PIXEL, BITS_PER_SAMPLE = 277, 258  # tags of a TIFF
logging.getLogger(TiffImagePlugin.__name__).addHandler(logging.NullHandler())  # else a line that names no picture


def read_by_pillow_heif():
    """-> HEIF where pillow-heif is installed, which from then on opens these files for Pillow; else ()."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return HEIF


SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SUFFIXES += (".avif",) if ".avif" in Image.registered_extensions() else ()  # not in every Pillow
SUFFIXES += read_by_pillow_heif()


def needs_pillow_heif(names):
    """Whether phones' pictures are among the files that are not read, which ADVICE helps."""
    unread = [name for name in names if not name.lower().endswith(SUFFIXES)]
    return any(name.lower().endswith(HEIF) for name in unread)


def remedy(path):
    """-> what to do with a file that Pillow could not open as a picture."""
    if needs_pillow_heif([str(path)]):
        return f"{ADVICE}, or save it as .jpg"
    bands, bits = tiff_bands(path)
    if bands > 1 and (bands, bits) not in ((3, 8), (4, 8)):
        return f"it has {bands} bands of {bits} bits, save three of them as red, green and blue with 8 bits each"
    return "replace it"


def tiff_bands(path):
    """-> how many bands a TIFF file says that it has, and the bits of one; of any other file (0, 0)."""
    with suppress(Exception), warnings.catch_warnings(), Path(path).open("rb") as file:  # any file can have the name
        warnings.simplefilter("ignore")
        head = file.read(8)
        if head[2] == 43:  # a BigTIFF, whose head is longer
            head += file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(SAMPLES_PER_PIXEL, 1)), int(tags.get(BITS_PER_SAMPLE, (1,))[0])
    return 0, 0
