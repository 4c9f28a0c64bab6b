"""The drawn data sets, which need no download: objects with textures and colours, drawn on first use.

data.load() calls find_world(). The same name gives the same pictures on any machine. tests/make_tiny_clip.py draws the
tiny CLIP's training pictures with draw_picture(), from another random stream.
"""

import itertools
import json
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from clip_min import ASSETS
from support.files import working_folder

RESOLUTION = 40  # pixels, the tiny CLIP's
SIZE = RESOLUTION, RESOLUTION
COLOURS = {"red": (205, 45, 45), "green": (45, 155, 60), "blue": (50, 80, 205), "yellow": (225, 205, 60),
           "purple": (140, 60, 165), "orange": (235, 135, 45), "white": (232, 232, 232), "black": (32, 32, 32)}
TEXTURES, FORMS = ("plain", "striped", "barred", "dotted", "checkered"), ("circle", "square", "triangle", "diamond")
CLASS_TEXTURES, CLASS_COLOURS, NEUTRAL_COLOURS = TEXTURES[1:], tuple(COLOURS)[:3], tuple(COLOURS)[3:]  # 12 classes


@dataclass(frozen=True)
class DrawnSet:
    """A data set of drawn objects. A class is a texture and a colour, which is the ground's or the object's own.

    The names of `shapes` are at odds with the tiny CLIP's captions: text prompts mend it. Those of `shapes_tint` fit,
    but its pictures lie under a colour cast: visual prompts mend it. The rest are shifts of `shapes`.
    """
    name: str
    coloured: str = "ground"  # what has the colour of the class: "ground" or "object"
    classname: str = "{colour} {texture} shape"  # to the tiny CLIP a colour in front of "shape" is the object's
    misleading: float = 0.45  # how often the other of the two has the colour of another class
    noise: tuple = (0.3, 0.8)  # share of random pixels, from a clear picture to a hopeless one
    zoom: float = 1.0
    cast: tuple = ()  # colour matrix, rows for red, green and blue


TABLE = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))["drawn"]
WORLD = {row["name"]: DrawnSet(**row) for row in TABLE}  # the drawn data sets by name


def find_world(name, root):
    """-> the folder of a drawn data set. Its pictures are drawn if they are not there yet."""
    folder = root / name
    if not folder.exists():
        with working_folder(folder, name) as temporary:
            draw_world(name, temporary / name)
    return folder


def draw_world(name, folder):
    """Draw folder/{train,test}/<class>/NNN.png."""
    drawn, rng = WORLD[name], random.Random(name)
    for subset, count in ("train", 48), ("test", 50):
        for texture, colour in itertools.product(CLASS_TEXTURES, CLASS_COLOURS):
            place = folder / subset / drawn.classname.format(texture=texture, colour=colour).replace(" ", "_")
            place.mkdir(parents=True)
            for i in range(count):
                pool = CLASS_COLOURS if rng.random() < drawn.misleading else NEUTRAL_COLOURS
                other = rng.choice([c for c in pool if c != colour])
                fill, ground = (colour, other) if drawn.coloured == "object" else (other, colour)
                noise = rng.uniform(*drawn.noise)
                picture = draw_picture(rng, texture, fill, rng.choice(FORMS), ground, noise, drawn.zoom)
                if drawn.cast:
                    picture = picture.convert("RGB", tuple(drawn.cast))
                picture.save(place / f"{i:03d}.png")


def draw_picture(rng, texture, colour, form, ground, noise, zoom):
    """One object on a plain ground -> RGB picture. rng decides place, size, shades and noise."""
    def shade(name):
        return tuple(min(255, max(0, c + rng.randint(-22, 22))) for c in COLOURS[name])

    fill, middle = shade(colour), RESOLUTION / 2
    dark = (120, 120, 120) if colour == "black" else tuple(c * 2 // 5 for c in fill)
    surface = Image.new("RGB", SIZE, fill)
    pen, step = ImageDraw.Draw(surface), zoom * rng.uniform(5.5, 7.5)
    start = rng.uniform(-step, 0)
    lines = [start + i * step for i in range(int(RESOLUTION / step) + 3)]
    for (i, y), (j, x) in itertools.product(enumerate(lines), repeat=2):
        if texture == "striped":
            pen.rectangle((0, y, RESOLUTION, y + step * 0.45), fill=dark)
        elif texture == "barred":
            pen.rectangle((x, 0, x + step * 0.45, RESOLUTION), fill=dark)
        elif texture == "dotted":
            pen.ellipse((x, y, x + step * 0.55, y + step * 0.55), fill=dark)
        elif texture == "checkered" and (i + j) % 2:
            pen.rectangle((x, y, x + step, y + step), fill=dark)

    r, x, y = zoom * rng.uniform(11, 16), middle + rng.uniform(-4, 4), middle + rng.uniform(-4, 4)
    outline = Image.new("L", SIZE)
    if form == "circle":
        ImageDraw.Draw(outline).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        corners = {"square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
                   "triangle": ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
                   "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))}[form]
        ImageDraw.Draw(outline).polygon([(x + r * u, y + r * v) for u, v in corners], fill=255)
    picture = Image.composite(surface, Image.new("RGB", SIZE, shade(ground)), outline)
    random_pixels = Image.frombytes("RGB", SIZE, rng.randbytes(3 * RESOLUTION**2))
    return Image.blend(picture, random_pixels, noise)
