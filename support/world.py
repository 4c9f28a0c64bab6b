"""The drawn data sets, which need no download: objects with textures and colours, drawn on first use.

data.load() calls draw_world(). The same name gives the same pictures on any machine.
"""

import itertools
import json
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from clip_min import ASSETS

SIDE = 40  # pixels
COLOURS = {"red": (205, 45, 45), "green": (45, 155, 60), "blue": (50, 80, 205), "yellow": (225, 205, 60),
           "purple": (140, 60, 165), "orange": (235, 135, 45), "white": (232, 232, 232), "black": (32, 32, 32)}
TEXTURES, FORMS = ("plain", "striped", "barred", "dotted", "checkered"), ("circle", "square", "triangle", "diamond")
CLASS_TEXTURES, CLASS_COLOURS, NEUTRAL_COLOURS = TEXTURES[1:], tuple(COLOURS)[:3], tuple(COLOURS)[3:]  # 12 classes


@dataclass(frozen=True)
class World:
    """A data set of drawn objects. Its classes are a texture and a colour: of the ground, or of the object itself.

    The names of `shapes` are at odds with the tiny CLIP's captions: text prompts mend it. Those of `shapes_tint` fit,
    but its pictures lie under a colour cast: visual prompts mend it. The rest are shifts of `shapes`.
    """
    name: str
    coloured: str = "ground"
    classname: str = "{colour} {texture} shape"  # to the tiny CLIP a colour in front of "shape" is the object's
    misleading: float = 0.45  # how often the other of the two has the colour of another class
    noise: tuple = (0.3, 0.8)  # share of random pixels, from a clear picture to a hopeless one
    zoom: float = 1.0
    cast: tuple = ()  # colour matrix, rows for red, green and blue


WORLD = {row["name"]: World(**row) for row in json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))["drawn"]}


def draw_world(name, folder):
    """Draw folder/{train,test}/<class>/NNN.png, the same on any machine."""
    world, rng = WORLD[name], random.Random(name)
    for part, count in ("train", 48), ("test", 50):
        for texture, colour in itertools.product(CLASS_TEXTURES, CLASS_COLOURS):
            place = folder / part / world.classname.format(texture=texture, colour=colour).replace(" ", "_")
            place.mkdir(parents=True)
            for i in range(count):
                pool = CLASS_COLOURS if rng.random() < world.misleading else NEUTRAL_COLOURS
                other = rng.choice([c for c in pool if c != colour])
                fill, ground = (colour, other) if world.coloured == "colour" else (other, colour)
                noise = rng.uniform(*world.noise)
                picture = draw_picture(rng, texture, fill, rng.choice(FORMS), ground, noise, world.zoom)
                (picture.convert("RGB", tuple(world.cast)) if world.cast else picture).save(place / f"{i:03d}.png")


def draw_picture(rng, texture, colour, form, ground, noise, zoom):
    """One object on a plain ground -> (SIDE, SIDE) RGB picture. rng decides place, size, shades and noise."""
    def shade(name):
        return tuple(min(255, max(0, c + rng.randint(-22, 22))) for c in COLOURS[name])

    fill = shade(colour)
    dark = (120, 120, 120) if colour == "black" else tuple(c * 2 // 5 for c in fill)
    surface = Image.new("RGB", (SIDE, SIDE), fill)
    pen, step = ImageDraw.Draw(surface), zoom * rng.uniform(5.5, 7.5)
    start = rng.uniform(-step, 0)
    lines = [start + i * step for i in range(int(SIDE / step) + 3)]
    for (i, y), (j, x) in itertools.product(enumerate(lines), repeat=2):
        if texture == "striped":
            pen.rectangle((0, y, SIDE, y + step * 0.45), fill=dark)
        elif texture == "barred":
            pen.rectangle((x, 0, x + step * 0.45, SIDE), fill=dark)
        elif texture == "dotted":
            pen.ellipse((x, y, x + step * 0.55, y + step * 0.55), fill=dark)
        elif texture == "checkered" and (i + j) % 2:
            pen.rectangle((x, y, x + step, y + step), fill=dark)

    r, x, y = zoom * rng.uniform(11, 16), SIDE / 2 + rng.uniform(-4, 4), SIDE / 2 + rng.uniform(-4, 4)
    outline = Image.new("L", (SIDE, SIDE))
    if form == "circle":
        ImageDraw.Draw(outline).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        corners = {"square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
                   "triangle": ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
                   "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))}[form]
        ImageDraw.Draw(outline).polygon([(x + r * u, y + r * v) for u, v in corners], fill=255)
    picture = Image.composite(surface, Image.new("RGB", (SIDE, SIDE), shade(ground)), outline)
    return Image.blend(picture, Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)), noise)
