"""What support/charts.py promises. Charts are read back from the Figure, sheets from their pixels."""

import math
import os
import sys

import pytest
import torch
from conftest import call
from PIL import Image, ImageDraw

from support import charts


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="matplotlib draws the charts: pip install matplotlib")


def laid_out(figure):
    """The figure as it is when it is saved."""
    figure.draw_without_rendering()
    return figure


def on_the_page(figure, artists):
    width, height = figure.bbox.size
    boxes = [artist.get_window_extent() for artist in artists]
    return all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)


def are_apart(artists):
    boxes = [artist.get_window_extent() for artist in artists]
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def shown(texts):
    return [text.get_text() for text in texts]


# ---- Curves ----


def test_a_curve_passes_through_its_accuracies_and_shows_the_spread_over_seeds(matplotlib):
    panel, = charts.draw_curves({"dtd": {"upt": {"0": [40.0], "16": [58.0, 62.0]}}}).axes
    (line, _, (bars,)), = panel.containers
    assert line.get_xydata().tolist() == [[0, 40], [1, 60]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[40, 40], [58, 62]]
    star = panel.lines[-1]
    assert star.get_marker() == "*" and star.get_xydata().tolist() == [[0, 40]]
    assert shown(panel.get_xticklabels()) == ["0", "16"] and panel.get_title() == "dtd"


def test_zero_shot_is_first_and_all_pictures_are_last_on_the_scale(matplotlib):
    curves = {"dtd": {"a": {"all": [90.0], "0": [40.0], "16": [60.0]}, "b": {"0": [40.0], "2": [50.0]}},
              "ucf101": {"a": {"0": [30.0], "all": [80.0]}}}
    for panel in charts.draw_curves(curves).axes:
        assert shown(panel.get_xticklabels()) == ["0", "2", "16", "all"]
    assert panel.containers[0].lines[0].get_xdata().tolist() == pytest.approx([0, 3], abs=0.1)


def test_curves_that_coincide_can_be_told_apart(matplotlib):
    curve = {"0": [40.0], "4": [50.0], "16": [60.0]}
    panel, = charts.draw_curves({"dtd": {"a": curve, "b": curve, "c": curve}}).axes
    lines = [container.lines[0] for container in panel.containers]
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 3
    places = [line.get_xdata()[1:].tolist() for line in lines]
    assert places[0] < places[1] < places[2] and places[1] == [1, 2]  # side by side, around the number of shots
    assert len({tuple(charts.style(n).values()) for n in range(56)}) == 56


@pytest.mark.parametrize("sets,rows", [("a", 1), ("abc", 1), ("abcde", 2), ("abcdefghijkl", 4)])
def test_curves_have_a_panel_for_each_data_set_and_one_legend(matplotlib, sets, rows):
    labels = [f"method {n}" for n in range(8)]
    curves = {name: {label: {"0": [40.0], "16": [60.0]} for label in labels} for name in sets}
    figure = laid_out(charts.draw_curves(curves))
    assert [panel.get_title() for panel in figure.axes] == list(sets)
    assert len({round(panel.get_window_extent().y0) for panel in figure.axes}) == rows
    legend, = figure.legends
    assert shown(legend.get_texts()) == [*labels, "zero-shot CLIP"]
    names = [panel.xaxis.label for panel in figure.axes]
    assert on_the_page(figure, [legend, *names])
    assert not any(legend.get_window_extent().overlaps(name.get_window_extent()) for name in names)
    assert min(panel.get_window_extent().height for panel in figure.axes) > 150  # the legend has room of its own


def test_long_names_stay_on_the_page_and_a_dollar_is_one(matplotlib):
    long = "upt template=a $drawing$ of a {} that somebody made in the summer of the year 1999, " + 60 * "x"
    curve = {"0": [40.0], "16": [60.0]}
    for figure in (charts.draw_curves({name: {long: curve} for name in (f"{long} {n}" for n in range(3))}),
                   charts.draw_gains({f"{long} {n}": {long: 3.0, f"{long} of 2": 20.0} for n in range(2)})):
        texts = [text for panel in laid_out(figure).axes for text in (panel.title, *panel.get_yticklabels())]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        assert on_the_page(figure, texts)
        assert all(r"\$drawing\$" in panel.get_title() for panel in figure.axes)  # as matplotlib spells a dollar
    assert all(are_apart(panel.get_yticklabels()) for panel in figure.axes)


def test_letters_are_readable_on_a_page(matplotlib):
    curve = {"0": [40.0], "16": [60.0]}
    figure = laid_out(charts.draw_curves({name: {"upt": curve} for name in "abcdefghijkl"}))
    panel, (legend,) = figure.axes[0], figure.legends
    for text in panel.title, panel.yaxis.label, *panel.get_xticklabels(), *legend.get_texts():
        assert text.get_fontsize() / 72 * 830 / figure.get_figwidth() >= 12  # pixels, on a page of 830


# ---- Gains and variances ----


def test_gains_are_bars_as_long_as_the_gain(matplotlib):
    figure = laid_out(charts.draw_gains({"upt": {"dtd": 10.0, "ucf101": 20.0}, "vpt": {"dtd": -10.0}}))
    upt, vpt = figure.axes
    assert [bar.get_width() for bar in upt.patches] == [20, 10] and [bar.get_width() for bar in vpt.patches] == [-10]
    assert shown(upt.get_yticklabels()) == ["ucf101", "dtd"]  # the largest comes first
    assert upt.patches[0].get_window_extent().y0 > upt.patches[1].get_window_extent().y0
    assert shown(upt.texts) == ["+20.0", "+10.0"] and vpt.texts[0].get_text() in ("-10.0", "\N{MINUS SIGN}10.0")
    assert upt.get_xlim() == vpt.get_xlim() and upt.get_ylim() == vpt.get_ylim()
    for panel in figure.axes:  # the numbers lie within the frame
        frame, numbers = panel.get_window_extent(), [text.get_window_extent() for text in panel.texts]
        assert all(frame.x0 <= number.x0 and number.x1 <= frame.x1 for number in numbers)


def test_points_stand_at_their_variance_and_gain(matplotlib):
    variances = {name: {"upt": {"text_between_classes": t, "image_within_classes": v}}
                 for name, t, v in (("a", 0.12, 0.28), ("b", 0.28, 0.12))}
    text, image = charts.draw_variances({"upt": {"a": 0.0, "b": 20.0, "c": 5.0}}, variances).axes
    for panel, expected in (text, [[0.28, 20], [0.12, 0]]), (image, [[0.12, 20], [0.28, 0]]):
        points = [line.get_xydata().tolist()[0] for line in panel.lines if line.get_marker() == "o"]
        assert points == expected  # of c there is no variance


def test_names_of_points_do_not_lie_on_each_other(matplotlib):
    variances = {name: {"upt": {"text_between_classes": variance, "image_within_classes": 0.4}}
                 for name, variance in (("a", 0.1), ("b", 0.1), ("c", 0.9))}
    figure = laid_out(charts.draw_variances({"upt": {"a": 10.0, "b": 10.0, "c": 10.0}}, variances))
    for panel, moved in zip(figure.axes, (1, 2), strict=True):
        names = [text for text in panel.texts if text.get_text()]
        assert shown(names) == ["a", "b", "c"] and are_apart(names)
        assert sum(text.xyann[1] < 0 for text in names) == moved == len(panel.texts) - 3  # a line leads to each of them


# ---- Features ----


def test_features_lie_in_the_plane_in_which_the_pictures_spread_most(matplotlib):
    images = torch.zeros(4, 5)
    images[:, 3], images[:, 1] = torch.tensor([5.0, 7.0, 9.0, 3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    text = torch.tensor([[0, 0, 0, 4.0, 0], [0, 0, 0, 2.0, 9.0]])
    points, ends = charts.project(images, text)
    radius = (images - images.mean(dim=0)).norm(dim=1).max()
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(images, images) / radius)
    torch.testing.assert_close(ends[0], -ends[1])  # less their mean, two vectors are opposite
    assert points.norm(dim=1).max().item() == pytest.approx(1) and ends.norm(dim=1).max().item() == pytest.approx(1)
    points, ends = charts.project(images[:1], text[:1])  # a picture and a class alone lie in the middle
    assert points.abs().max() == 0 and ends.abs().max() == 0


def test_features_are_points_and_lines_in_the_colours_of_the_legend(matplotlib):
    generator = torch.Generator().manual_seed(0)
    images, text = torch.randn(9, 8, generator=generator), torch.randn(3, 8, generator=generator)
    classes = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1, 2])
    panels = [("zero-shot", "Var_v 0.1", images, text), ("upt", "Var_v 0.2", images.flip(0), text)]
    figure = laid_out(charts.draw_features(panels, classes, ["red", "green", "blue"]))
    for panel, (title, caption, given_images, given_text) in zip(figure.axes, panels, strict=True):
        assert (panel.get_title(), panel.get_xlabel()) == (title, caption)
        points, ends = charts.project(given_images, given_text)
        for n in range(3):
            cloud, ray = (line for line in panel.lines if line.get_color() == charts.PALETTE[n])
            torch.testing.assert_close(torch.tensor(cloud.get_xydata()).float(), points[classes == n])
            torch.testing.assert_close(torch.tensor(ray.get_xydata()[1]).float(), ends[n])
            assert cloud.get_marker() == ray.get_marker() == charts.MARKERS[n]
    legend, = figure.legends
    assert shown(legend.get_texts()) == ["red", "green", "blue"] and on_the_page(figure, [legend])


# ---- The optional package ----


def test_every_chart_says_what_to_install_where_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: charts.draw_curves({"dtd": {"upt": {"0": [40.0], "16": [60.0]}}}),
                 lambda: charts.draw_gains({"upt": {"dtd": 1.0}})):
        with pytest.raises(charts.MissingMatplotlib, match="pip install matplotlib"):
            draw()
    charts.draw_sheet(["a"], [[(Image.new("RGB", (charts.THUMBNAIL, charts.THUMBNAIL)), ["b"])]])  # which is Pillow's


def draw_without_a_display(path):
    os.environ.pop("DISPLAY", None)
    os.environ["MPLBACKEND"] = "QtAgg"
    assert "matplotlib" not in sys.modules
    charts.draw_gains({"upt": {"dtd": 1.0}}).savefig(path, format="png")
    assert "matplotlib.pyplot" not in sys.modules


def test_charts_need_no_display_and_leave_pyplot_alone(matplotlib, tmp_path):
    assert call(draw_without_a_display, tmp_path / "gains.png") == 0
    assert (tmp_path / "gains.png").exists()


# ---- Sheets ----


def test_a_sheet_has_a_place_for_each_picture_and_its_lines():
    size = charts.THUMBNAIL
    red, blue = (Image.new("RGB", (size, size), colour) for colour in ("red", "blue"))
    sheet = charts.draw_sheet(["one", "two"], [[(red, ["a"]), (blue, ["b", "c"])], [(blue, []), (red, [])]])
    assert sheet.width == 2 * (size + charts.GAP)
    for x, colours in (50, ["red", "blue"]), (50 + sheet.width // 2, ["blue", "red"]):
        column = [sheet.getpixel((x, y)) for y in range(sheet.height)]
        seen = [{(255, 0, 0): "red", (0, 0, 255): "blue"}.get(pixel) for pixel in column]
        assert [colour for colour in seen if colour] == size * colours[:1] + size * colours[1:]


def test_an_overlay_is_light_where_the_map_is_high_and_smooth_between():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    shown = charts.overlay(grey, torch.tensor([0.0, 0.0, 0.0, 5.0])).convert("L")
    row = [shown.getpixel((x, 60)) for x in range(64)]
    assert row[-1] - row[0] > 80 and row == sorted(row) and len(set(row)) > 10
    mask = charts.overlay(grey, torch.tensor([False, True, False, False]))
    assert mask.getpixel((50, 10)) == (128, 128, 128) and max(mask.getpixel((10, 10))) < 40
    assert charts.overlay(grey, torch.ones(4, dtype=torch.bool)).getpixel((5, 5)) == (128, 128, 128)
    for value in 0.2, math.nan:  # a map without contrast is shown
        assert len(charts.overlay(grey, torch.full((4,), value)).getcolors()) == 1


def test_the_colour_scale_grows_lighter_all_the_way():
    ramp = charts.overlay(Image.new("RGB", (512, 512)), torch.arange(16.0).repeat(16))
    light = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (ramp.getpixel((x, 256)) for x in range(512))]
    assert all(after >= before - 0.5 for before, after in zip(light, light[1:], strict=False))


def test_a_text_that_is_too_long_loses_its_end():
    image = Image.new("RGB", (300, 40), "white")
    charts.write(ImageDraw.Draw(image), 0, 20, "a very long name of a class that nobody can read", room=200)
    box = image.convert("L").point(lambda v: 255 - v).getbbox()
    assert 150 < box[2] <= 202
