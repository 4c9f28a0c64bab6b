"""The pictures: charts of numbers by matplotlib, sheets of pictures by Pillow.

report.py calls the draw functions, which return a Figure or an Image, write nothing and need no display. matplotlib is
optional: where it is missing, every chart ends in MissingMatplotlib, which says what to install, and sheets are drawn.
"""

import math
import statistics
import textwrap

import torch
from PIL import Image, ImageDraw, ImageOps

from clip_min import UserError
from support.fonts import chart_text, fitting, give_fonts
from support.results import ZERO_SHOT
from support.summary import by_shots

# Okabe and Ito's colours for colour-blind readers, without their yellow, which is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X", "<"), ("-", "--", "-.", ":")
INCHES, DPI = 9, 150  # the width of a chart; on a page of 830 pixels a letter of 10 points is then 13 pixels high
LETTER, LINE = 0.085, 0.22  # inches: the mean width of a letter, and the height of a line of text

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # from dark to light
THUMBNAIL = 224  # pixels of a picture on a sheet
GAP, TEXT_LINE, FONT_SIZE = 20, 22, 18  # pixels between pictures, of a line of text, of its letters


class MissingMatplotlib(UserError):
    """The optional package that draws charts is not installed."""


def load_matplotlib():
    """-> matplotlib's class Figure, which needs no display and shares no state with other figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlib("Charts are drawn by matplotlib, which is missing: pip install matplotlib.") from error
    return Figure


# ---- Charts ----


def new_figure(titles, across, height, beside=0.8):
    """-> a Figure, and an empty panel for each title, up to `across` in a row.

    height: of a row; beside: what a panel leaves for the scale and the names at its side. Both in inches.
    """
    across = min(across, len(titles))
    down = math.ceil(len(titles) / across)
    titles = [wrapped(title, INCHES / across - beside) for title in titles]
    height += LINE * max(title.count("\n") for title in titles)
    figure = load_matplotlib()(figsize=(INCHES, down * height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches around each panel
    places = figure.subplots(down, across, squeeze=False).ravel()
    for panel, title in zip(places, titles, strict=False):
        panel.set_title(title, fontsize=10)
        panel.grid(color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for empty in places[len(titles):]:
        empty.remove()
    return figure, places[: len(titles)]


def add_legend(figure, handles, title=None):
    """One legend for all panels, below them. handles: {label: what was drawn}."""
    room = 0.7  # inches of a mark and of the space around it
    labels = [wrapped(label, INCHES - room) for label in handles]
    longest = max(len(line) for label in labels for line in label.splitlines())
    across = max(1, int(INCHES / (room + LETTER * longest)))
    n_lines = math.ceil(len(labels) / across) + sum(label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + LINE * (1 + n_lines))
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=across, title=title, frameon=False)


def wrapped(text, inches):
    """The text in lines of this width. A dollar sign is one, and no beginning of a formula."""
    return textwrap.fill(chart_text(text), max(10, int(inches / LETTER))).replace("$", r"\$")


def style(n):
    """The n-th colour with its marker: 7 and 8 of them, so that 56 can be told apart."""
    return dict(color=PALETTE[n % len(PALETTE)], marker=MARKERS[n % len(MARKERS)])


def draw_curves(curves):
    """{data set: {label: {shots: accuracies of the seeds}}} -> a panel for each set, as Fig. 4 of UPT, DPT, FG-VPL."""
    labels = sorted({label for panel in curves.values() for label in panel})
    all_shots = sorted({k for panel in curves.values() for curve in panel.values() for k in curve}, key=by_shots)
    figure, panels = new_figure(sorted(curves), across=3, height=2.5 if len(curves) > 1 else 3.2)
    handles, step = {}, min(0.06, 0.5 / len(labels))
    for name, panel in zip(sorted(curves), panels, strict=True):
        for label, curve in sorted(curves[name].items()):
            n, shots = labels.index(label), sorted(curve, key=by_shots)
            aside = step * (n - (len(labels) - 1) / 2)  # points and error bars that coincide stand side by side
            x = [all_shots.index(k) + (0 if k == ZERO_SHOT else aside) for k in shots]
            means = [statistics.mean(curve[k]) for k in shots]
            deviations = [statistics.pstdev(curve[k]) for k in shots]
            handles[label] = panel.errorbar(x, means, deviations, **style(n), linestyle=LINES[n % len(LINES)],
                                            markersize=5, linewidth=1.5, elinewidth=1, capsize=2)
            start = panel.plot(0, means[0], "*", color="black", markersize=11, zorder=3)
        panel.set_xticks(range(len(all_shots)), all_shots)
    for left in panels[::3]:
        left.set_ylabel("accuracy in %")
    for lowest in panels[-3:]:
        lowest.set_xlabel("labelled pictures per class")
    handles = dict(sorted(handles.items())) | {"zero-shot CLIP": start[0]}
    add_legend(figure, handles, "bars: standard deviation over the seeds")
    return give_fonts(figure)


def draw_gains(gains):
    """{label: {data set: gain}} -> a panel of bars for each label, as Fig. 3 of FG-VPL."""
    names = {name: wrapped(name, 2) for row in gains.values() for name in row}
    n_bars, n_lines = max(len(row) for row in gains.values()), 1 + max(name.count("\n") for name in names.values())
    figure, panels = new_figure(list(gains), across=2, height=0.9 + n_bars * max(0.25, LINE * n_lines), beside=2.2)
    values = [0, *(gain for row in gains.values() for gain in row.values())]
    room = 0.2 * (max(values) - min(values) or 1)  # for the numbers at the ends of the bars
    for n, (row, panel) in enumerate(zip(gains.values(), panels, strict=True)):
        ordered = sorted(row.items(), key=lambda item: -item[1])
        bars = panel.barh(range(len(row)), [gain for _, gain in ordered], color=style(n)["color"])
        panel.bar_label(bars, fmt="%+.1f", padding=3)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(row)), [names[name] for name, _ in ordered])
        left = min(values) - room if min(values) < 0 else 0
        panel.set(xlim=(left, max(values) + room), ylim=(n_bars - 0.5, -0.5))  # the largest gain on top
        panel.grid(False, axis="y")
    figure.supxlabel("gain over zero-shot CLIP in percentage points", fontsize=10)
    return give_fonts(figure)


def draw_variances(gains, variances):
    """Gain over zero-shot CLIP against the variance of its features, a point per data set, as Fig. 1 of UPT.

    gains: {label: {data set: gain}}; variances: {data set: {label: variances by name}}, where they were measured.
    """
    points = [(name, label, variances[name][label], gain) for label, row in gains.items() for name, gain in row.items()
              if label in variances.get(name, {})]
    points.sort(key=lambda point: -point[3])
    labels, handles = sorted({label for _, label, _, _ in points}), {}
    figure, panels = new_figure(["Var_t, between the classes' texts", "Var_v, within the classes' pictures"], 2, 3.6)
    for key, panel in zip(("text_between_classes", "image_within_classes"), panels, strict=True):
        places = {}  # of the names: each is written once, at its highest point
        for name, label, variance, gain in points:
            handles[label], = panel.plot(variance[key], gain, linestyle="none", **style(labels.index(label)))
            places.setdefault(name, (variance[key], gain))
        panel.axhline(0, color="black", linewidth=0.8)
        panel.margins(0.1)
        panel.set_xlabel("variance of zero-shot CLIP's features")
        name_points(panel, places)
    panels[0].set_ylabel("gain in percentage points")
    add_legend(figure, dict(sorted(handles.items())))
    for panel in panels:
        part_texts(figure, list(panel.texts))
    return give_fonts(figure)


def name_points(panel, places):
    """Write names beside their points (x, y), on the side that has more room."""
    middle = sum(panel.get_xlim()) / 2
    for name, (x, y) in places.items():
        side, alignment = (7, "left") if x < middle else (-7, "right")
        panel.annotate(wrapped(name, 2), (x, y), (side, 0), textcoords="offset points", ha=alignment, va="center",
                       bbox=dict(facecolor="white", alpha=0.6, edgecolor="none", pad=0))


def part_texts(figure, texts):
    """Move each text down until it lies on none of those before it. A line leads from where it is to its point."""
    figure.draw_without_rendering()  # from here on it is known how large they are
    placed = []
    for text in texts:
        side, below = text.xyann
        while any(text.get_window_extent().overlaps(other) for other in placed):
            below -= 2
            text.xyann = side, below
        placed.append(text.get_window_extent())
        if below:
            text.axes.annotate("", text.xy, text.xyann, textcoords="offset points",
                               arrowprops=dict(arrowstyle="-", color="grey", shrinkA=0, shrinkB=0))


def draw_features(features, classes, names):
    """Features in a plane, a panel for each of `features`, as Fig. 2 of UPT: points are pictures, lines the classifier.

    features: [(title, caption, unit image features (n, E), unit text features (K, E)), ...]; classes (n,): the numbers
    of the pictures' classes; names: of the K classes.
    """
    figure, panels = new_figure([title for title, *_ in features], across=2, height=INCHES / 2)
    handles = {}
    for panel, (_, caption, images, text) in zip(panels, features, strict=True):
        points, ends = project(images, text)
        for n in range(len(names)):
            panel.plot(*points[classes == n].T.tolist(), linestyle="none", markersize=3, **style(n))
        for n, (name, (x, y)) in enumerate(zip(names, ends.tolist(), strict=True)):
            panel.plot([0, x], [0, y], color="white", linewidth=4.5)  # a rim, so that it can be seen among the points
            handles[name], = panel.plot([0, x], [0, y], linewidth=2.5, markersize=9, markeredgecolor="black",
                                        markevery=[1], **style(n))
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal", xlabel=caption)
        panel.spines[:].set(visible=True, color="#dddddd")
    add_legend(figure, handles)
    return give_fonts(figure)


def project(images, text):
    """Features (n, E), (K, E) -> points (n, 2), vectors (K, 2) on the two principal components of the image features.

    From each kind its mean is taken, and each is scaled by itself to the unit circle. A class alone lies in the middle.
    """
    images, text = images - images.mean(dim=0), text - text.mean(dim=0)
    plane = torch.linalg.svd(images.T @ images).Vh[:2].T  # (E, 2), also of a single picture
    return [x / x.norm(dim=1).max().clamp(min=1e-9) for x in (images @ plane, text @ plane)]


# ---- Sheets ----


def draw_sheet(titles, rows):
    """Rows of (picture, lines of text below it) and titles of the columns -> Image. A picture is shown as a whole."""
    width, top = THUMBNAIL + GAP, GAP // 2 + (TEXT_LINE if titles else 0)
    height = width + TEXT_LINE * max(len(lines) for row in rows for _, lines in row)
    sheet = Image.new("RGB", (max(len(row) for row in rows) * width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        write(pen, i * width + GAP // 2, GAP, title)
    for j, row in enumerate(rows):
        for i, (picture, lines) in enumerate(row):
            x, y = i * width + GAP // 2, top + j * height
            sheet.paste(ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="white"), (x, y))
            for k, line in enumerate(lines):
                write(pen, x, y + THUMBNAIL + TEXT_LINE * k + 12, line)
    return sheet


def write(pen, x, y, text, room=THUMBNAIL + GAP - 4):
    """One line of text, its middle at the height y. See fonts.fitting() for what does not fit."""
    for font, part in fitting(text, FONT_SIZE, room):
        pen.text((x, y), part, "black", font, anchor="lm")
        x += font.getlength(part)


def overlay(picture, values):
    """A map (N,) of patches on its picture: True and False darken it, other values are coloured from dark to light."""
    side = math.isqrt(len(values))
    grid = values.float().nan_to_num(0).view(side, side).cpu()
    if values.dtype == torch.bool:
        light = Image.fromarray((55 + 200 * grid).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
        return Image.composite(picture, Image.new("RGB", picture.size), light)
    grid = (grid - grid.min()) / (grid.max() - grid.min()).clamp(min=1e-12)
    level = Image.fromarray((255 * grid).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    channels = []
    for stops in zip(*VIRIDIS, strict=True):  # five values of red, of green, of blue, 64 levels apart
        table = [stops[i] + (stops[i + 1] - stops[i]) * part / 64 for i in range(4) for part in range(64)]
        channels.append(level.point([round(value) for value in table]))
    return Image.blend(picture.convert("L").convert("RGB"), Image.merge("RGB", channels), 0.6)
