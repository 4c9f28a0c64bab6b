"""Texts on pictures: what support/fonts.py promises, with fonts that are made here."""

import io
import sys
import warnings

import pytest
from PIL import Image, ImageFont

from support import charts, fonts

CHINESE = "猫狗"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the fonts of one folder, which a test fills, and without matplotlib's."""
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forget()
    yield tmp_path
    forget()


def forget():
    fonts.installed_fonts.cache_clear()
    fonts.find_fonts.cache_clear()


def make_font(path, letters):
    """Write a font that has these letters alone, each of them a square of another height."""
    builder = pytest.importorskip("fontTools.fontBuilder", reason="fontTools comes with matplotlib").FontBuilder(1000)
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    names, glyphs = [".notdef", *(f"letter{number}" for number in range(len(letters)))], {}
    for number, name in enumerate(names):
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in (100, 900 - 100 * number), (800, 900 - 100 * number), (800, 0):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(exist_ok=True)
    builder.save(path)


def drawn(text, room=1000):
    """-> [(name of the font, part of the text), ...]"""
    return [(font.getname()[0], part) for font, part in fonts.fitting(text, 18, room)]


def sheet(text):
    return charts.draw_sheet([], [[(Image.new("RGB", (9, 9)), [text])]])


def test_english_is_drawn_in_pillows_own_font_and_no_other_is_looked_for(monkeypatch):
    monkeypatch.setattr(fonts, "open_font", None)
    assert drawn("true: cat, 97%") == [(ImageFont.load_default(18).getname()[0], "true: cat, 97%")]


def test_a_font_that_has_the_letters_is_found_in_any_folder_and_by_any_name(machine):
    own, = {name for name, _ in drawn("a")}
    make_font(machine / "thai" / "other.ttf", "ก")
    make_font(machine / "chinese" / "Odd Name.TTF", CHINESE)
    (machine / "broken.ttf").write_bytes(b"no font")
    assert drawn("true: 猫 狗") == [(own, "true: "), ("Odd Name", "猫 狗")]
    assert drawn("กa猫") == [("other", "ก"), (own, "a"), ("Odd Name", "猫")]  # of two fonts, each what it has


def test_an_easy_font_comes_before_a_hard_one_and_one_of_boxes_never(machine):
    for name in "Aaa Bold.ttf", "LastResort.ttf", "Zzz.ttf":
        make_font(machine / name, CHINESE)
    assert drawn("猫") == [("Zzz", "猫")]
    make_font(machine / "NotoSansSC-Regular.ttf", CHINESE)
    forget()
    assert drawn("猫") == [("NotoSansSC-Regular", "猫")]


@pytest.mark.parametrize("text, shown", [
    ("猫", r"\u732b"), ("café", "cafe"), ("cafe\u0301", "cafe"), ("żółć", r"zo\u0142c"), ("חת", r"\u05d7\u05ea"),
    ("half \udcff", r"half \udcff"), ("two\nlines", "two lines")])
def test_what_no_font_has_is_spelled_out(machine, text, shown):
    assert "".join(part for _, part in drawn(text)) == shown
    assert sheet(text).tobytes() == sheet(shown).tobytes() != sheet("").tobytes()


def test_classes_whose_letters_no_font_has_are_told_apart(machine):
    assert len({sheet(name).tobytes() for name in ("猫", "狗", "חת", "תח", "")}) == 5


def test_accents_and_other_alphabets_are_drawn_in_matplotlibs_font():
    pytest.importorskip("matplotlib", reason="it brings the font DejaVu Sans")
    for text in "café", "cafe\u0301", "żółć", "кот", "חתול", "قطة":
        (font, part), = fonts.fitting(text, 18, 1000)
        assert len(part) == 4 - (text == "قطة") - (text == "кот") and not fonts.lacking(part, font)


def test_a_text_in_another_alphabet_loses_its_end_too(machine):
    make_font(machine / "chinese.ttf", CHINESE)
    parts = fonts.fitting("猫" * 50, 18, 200)
    assert 150 < sum(font.getlength(part) for font, part in parts) <= 200 and parts[-1][1].endswith("...")


def test_without_raqm_hebrew_is_still_read_from_right_to_left():
    basic = ImageFont.truetype(io.BytesIO(ImageFont.load_default(18).font_bytes), 18, layout_engine=0)
    assert fonts.left_to_right("true: אב גד (1)", basic) == "true: דג בא (1)"
    assert fonts.left_to_right("cat", basic) == "cat"


def test_charts_have_the_fonts_of_their_texts_and_warn_of_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib draws the charts: pip install matplotlib")
    make_font(tmp_path / "chinese.ttf", CHINESE)
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path])
    forget()
    figure = charts.draw_gains({"coop 狗": {"猫": 3.0, "é": 2.0, "鼠": 1.0, "\udcff": 0.0}, "vpt": {"猫": 3.0}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that it has no font for
        figure.savefig(io.BytesIO(), format="png")
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["猫", "é", r"\u9f20", r"\udcff"]
    assert labels[0].get_fontfamily()[-1] == figure.axes[0].title.get_fontfamily()[-1] == "chinese"
    forget()


@pytest.mark.parametrize("system, place", [
    ("win32", "Windows"), ("darwin", "/System/Library/Fonts"), ("linux", "/usr/share/fonts")])
def test_every_system_has_its_folders(monkeypatch, system, place):
    monkeypatch.setattr(fonts.sys, "platform", system)
    monkeypatch.delenv("XDG_DATA_DIRS", raising=False)
    assert any(place in str(folder) for folder in fonts.font_folders())
