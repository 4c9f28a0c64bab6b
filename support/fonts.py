"""A font for every text of the pictures: one of this machine's that has its letters, and else something to read.

support/charts.py calls fitting() for the sheets, chart_text() and give_fonts() for the charts. Pillow's own font has
hardly more than the letters of English and matplotlib's no Chinese, and both draw a box for what they lack.
"""

import functools
import os
import re
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

from PIL import ImageFont

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# How the names begin of fonts that are easy to read when they are small, and what is in the names of hard ones.
GOOD = ("dejavusans", "notosans", "liberationsans", "arial", "segoeui", "helvetica", "msyh", "pingfang")
LESS_GOOD = ("bold", "italic", "oblique", "black", "light", "thin", "heavy", "condensed", "serif", "mono", "math")
NO_LETTERS = ("lastresort", "adobeblank")  # Apple's has one box for all letters of a script
NEVER_A_LETTER = "\U0010fffe"  # what a font draws for it, it draws for everything that it lacks
NOT_DRAWN = ("Cc", "Cf", "M", "Z")  # kinds of characters, as Unicode calls them
HEBREW_AND_ARABIC = r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+"
RIGHT_TO_LEFT = re.compile(rf"{HEBREW_AND_ARABIC}(\s+{HEBREW_AND_ARABIC})*")


# ---- For Pillow ----


def fitting(text, size, room):
    """-> [(font, part of the text), ...] as Pillow draws a text in one line, in letters of `size` pixels.

    A text longer than `room` pixels loses its end. Where Pillow's own font lacks letters, others of this machine come
    before it, and what none has is spelled out.
    """
    text = unicodedata.normalize("NFC", " ".join(text.splitlines()))[:room]  # macOS may keep accents apart
    drawn = choose_fonts(text + ".", size)
    parts = runs(text, drawn)
    while text and sum(font.getlength(part) for font, part in parts) > room:
        text = text[:-1]
        parts = runs(text + "...", drawn)
    return parts


def choose_fonts(text, size):
    """-> {letter: (its font, what is drawn for it)}, but for blanks and marks, and None: Pillow's own font."""
    own = ImageFont.load_default(size)
    fonts = [*(ImageFont.truetype(path, size) for path in find_fonts(lacking(text, own))), own]
    drawn = {None: own}
    for letter in filter(is_drawn, set(text)):
        font = next((font for font in fonts if has(font, letter)), None)
        drawn[letter] = (font, letter) if font else (own, spelled_out(letter))
    return drawn


def runs(text, drawn):
    """-> [(font, part of the text), ...], each part as long as it can be. drawn: what choose_fonts() gives."""
    parts = []
    for letter in text:  # a blank or an accent is drawn in the font of the letter before it
        font, shown = drawn.get(letter, (parts[-1][0] if parts else drawn[None], letter))
        if parts and parts[-1][0] is font:
            parts[-1][1] += shown
        else:
            parts.append([font, shown])
    return [(font, left_to_right(part, font)) for font, part in parts]


def left_to_right(text, font):
    """The text as Pillow has to be given it: without the library Raqm it draws Hebrew and Arabic back to front."""
    if font.layout_engine == ImageFont.Layout.RAQM:
        return text
    return RIGHT_TO_LEFT.sub(lambda run: run[0][::-1], text)


# ---- For matplotlib ----


def chart_text(text):
    """-> the text for a chart, with what no font has spelled out."""
    text = unicodedata.normalize("NFC", text)
    rest = beyond_ascii(text)
    for path in find_fonts(rest):
        rest = lacking(rest, open_font(path))
    return "".join(spelled_out(letter) if letter in rest else letter for letter in text)


def give_fonts(figure):
    """Name for each text of a chart the fonts of the letters that matplotlib's own may lack. -> the figure"""
    from matplotlib.font_manager import FontProperties, fontManager
    from matplotlib.text import Text
    for artist in figure.findobj(Text):
        names = []
        for path in find_fonts(beyond_ascii(artist.get_text())):
            fontManager.addfont(path)
            names.append(FontProperties(fname=path).get_name())
        artist.set_fontfamily([*artist.get_fontfamily(), *names])
    return figure


def beyond_ascii(text):
    return "".join(sorted(letter for letter in set(text) if not letter.isascii() and is_drawn(letter)))


# ---- Letters ----


def is_drawn(letter):
    """Whether it is neither a blank, nor a mark of another letter, nor one that only steers the text."""
    return not unicodedata.category(letter).startswith(NOT_DRAWN)


def lacking(text, font):
    """-> the letters of a text that a font does not have, each once and sorted, as a text."""
    return "".join(sorted(letter for letter in set(text) if is_drawn(letter) and not has(font, letter)))


def has(font, letter):
    if unicodedata.category(letter) == "Cs":  # half of a character, as the name of a file may have it
        return False
    try:
        drawn, unknown = font.getmask(letter), font.getmask(NEVER_A_LETTER)
    except OSError:  # a damaged font
        return False
    return drawn.getbbox() is not None and (drawn.size != unknown.size or bytes(drawn) != bytes(unknown))


def spelled_out(letter):
    """-> the letter without its accent or, where nothing would be left, its code such as \\u732b."""
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or letter.encode("ascii", "backslashreplace").decode()


# ---- The fonts of a machine ----


@functools.cache
def find_fonts(wanted):
    """-> the files of fonts that together have the letters of `wanted`, as far as this machine has them."""
    found = []
    while wanted:
        best, rest = None, wanted
        for path in installed_fonts():
            font = open_font(path)
            if font and len(lacking(wanted, font)) < len(rest):
                best, rest = path, lacking(wanted, font)
            if not rest:
                break
        if not best:
            break
        found.append(best)
        wanted = rest
    return found


def open_font(path):
    """-> the font of a file in a size that is large enough to tell letters apart, or None if Pillow cannot read it."""
    try:
        return ImageFont.truetype(path, 18)
    except (OSError, ValueError):  # broken, or with pictures of another size for its letters
        return None


@functools.cache
def installed_fonts():
    """-> the paths of all fonts, easy ones to read first, and before them matplotlib's, which has many scripts."""
    found = []
    for folder in font_folders():
        for place, _, files in os.walk(folder):
            found += [os.path.join(place, file) for file in files if file.lower().endswith(SUFFIXES)]

    def name(path):
        return os.path.basename(path).lower()

    def order(path):
        return sum(word in name(path) for word in LESS_GOOD), not name(path).startswith(GOOD), name(path), path

    found = [path for path in sorted(found, key=order) if not name(path).startswith(NO_LETTERS)]
    with suppress(ImportError):
        from matplotlib import get_data_path
        found.insert(0, os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return found


def font_folders():
    """-> where Windows, macOS and Linux keep fonts."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home)
        return [Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"), Path(local, "Microsoft", "Windows", "Fonts")]
    if sys.platform == "darwin":
        return ["/System/Library/Fonts", "/Library/Fonts", Path(home, "Library", "Fonts")]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or Path(home, ".local", "share")
    return [Path(home, ".fonts"), *(Path(place, "fonts") for place in (own, *shared.split(":")))]
