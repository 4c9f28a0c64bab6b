"""What finished runs show: tables, curves, predictions, attention. It reads the run folders that train.py writes.

    python report.py                                    # a table of all runs, the papers' numbers beside; curves
    python report.py RUN                                # one run: classes, confusions, what its contexts learned
    python report.py RUN --mistakes                     # the most confident mistakes, as a picture
    python report.py RUN --predict cat.jpg photos/      # the five likeliest classes of new pictures; --csv FILE
    python report.py RUN --eval-on imagenetv2 folder/   # the trained run on other data, or again on its own
    python report.py RUN RUN --attention cat.jpg        # what zero-shot CLIP and the runs look at, as a picture
    python report.py RUN --prompt-attention cat.jpg     # what the visual prompts of the last layer respond to
    python report.py RUN --features                     # features and classifier, before and after training
    python report.py RUN --export FILE.safetensors      # the classifier, for use with any CLIP

RUN is a folder such as runs/shapes/coop/tiny_16shot_seed1. Pictures are written into it, those of all runs into --out.
"""

import argparse
import csv
import io
import json
import math
import statistics
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import train
from clip_min import Method, UserError, preprocess, vocabulary
from upt import inter_class_variance, intra_class_variance

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # colour-blind readers too
DASHES = (0, 8, 16, 28)  # pixels of a stroke, and of the gap behind it
CORNERS = (32, 4, 3)  # of a marker: a circle, a square, a triangle
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # from dark to light
SIDE = 336  # pixels of a picture on a sheet


def main(argv=None):
    args, unreadable = parse_arguments(argv), []  # pictures that cannot be read: the rest are predicted, status 1
    status = train.exit_status(lambda: report(args, unreadable))
    return 1 if unreadable and not status else status


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of finished runs (default: a table of all runs)")
    add("--out", default="runs", help="where the runs are (default: runs)")
    add("--root", default="data", help="where data sets are (default: data)")
    add("--mistakes", type=train.above(0, int), nargs="?", const=20, metavar="N", help="how many (default: 20)")
    add("--predict", nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    add("--csv", metavar="FILE", help="with --predict: write the predictions there, too")
    add("--threshold", type=float, default=0, metavar="P", help="with --predict: a less likely class is none")
    add("--eval-on", nargs="+", default=[], metavar="DATA", help="data sets' names or folders of pictures")
    add("--attention", nargs="+", metavar="FILE", help="pictures")
    add("--prompt-attention", nargs="+", metavar="FILE", help="pictures")
    add("--features", nargs="*", metavar="CLASS", help="of the test pictures of up to ten classes (default: the first)")
    add("--export", metavar="FILE", help="a safetensors file")
    add("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    return parser.parse_args(argv)


class Run(NamedTuple):
    folder: Path
    label: str
    saved: dict  # what prompts.pt holds
    method: Method
    machine: train.Machine


def report(args, unreadable):
    """Do what the arguments ask for. Pictures that cannot be read are added to `unreadable`."""
    asked = [args.mistakes, args.predict, args.eval_on, args.attention, args.prompt_attention, args.export,
             args.features is not None]
    if not args.runs:
        if any(asked):
            raise UserError("Name the folder of a finished run first, such as runs/shapes/coop/tiny_16shot_seed1.")
        summarise(Path(args.out))
    runs = [open_run(Path(folder), args) for folder in args.runs]
    if args.attention:
        draw_attention(runs, args.attention)
    for run in runs:
        if not any(asked):
            describe(run)
        if args.mistakes:
            draw_mistakes(run, args.mistakes, args.root)
        if args.predict:
            unreadable += predict(run, args.predict, args.csv, args.threshold)
        for name in args.eval_on:
            evaluate_on(run, name, args.root)
        if args.prompt_attention:
            draw_prompt_attention(run, args.prompt_attention)
        if args.features is not None:
            draw_features(run, args.features, args.root)
        if args.export:
            export(run, Path(args.export))


def open_run(folder, args):
    saved = train.read_prompts(folder)
    machine = train.choose_machine(args.device, saved["precision"], workers=None)
    return Run(folder, label_of(settings_of(saved)), saved, train.load_run(folder, str(machine.device)), machine)


def settings_of(values):
    return train.Settings(**{field: values[field] for field in train.Settings.__dataclass_fields__})


def label_of(settings):
    """The method and what was changed of its defaults, such as "upt mode=mlp"."""
    return " ".join([settings.method, *(f"{key}={value}" for key, value in settings.changed.items())])


def save(path, content):
    """Write bytes, whole or not at all: into a file beside `path`, which then takes its place."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}): make room or choose another place.") from error
    print(f"saved         {path}", file=sys.stderr)  # stdout may be a file for the tables


def save_csv(path, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    save(path, text.getvalue().encode("utf-8", "surrogateescape"))


def save_picture(path, picture):
    content = io.BytesIO()
    picture.save(content, "PNG")
    save(path, content.getvalue())


def print_table(title, head, rows):
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(map(str, row))} |")


# ---- All runs ----


class Entry(NamedTuple):  # an accuracy of the table
    row: tuple  # the method with what was changed, the backbone, the shots; 0: zero-shot CLIP, math.inf: all pictures
    column: str  # a data set, or "data set → shifted data"
    accuracy: float
    papers: list  # [(accuracy, source), ...]
    variance: dict  # of zero-shot CLIP, where train.py --variance measured it


def read_entries(path):
    """result.json -> its entries: zero-shot CLIP, the run, its shifts. None if it is no result: it is then named."""
    try:
        result = json.loads(path.read_text("utf-8"))
        settings = settings_of(result)
        column, _, name = settings.folder.parts  # they tell apart a user's data, and weights, that are called alike
        backbone = name.rsplit("_", 2)[0] if settings.backbone_path else settings.backbone
        # A recipe may have templates of its own: zero-shot CLIP with them is another.
        start = f"zeroshot, templates of {settings.method}" if "templates" in settings.recipe else "zeroshot"
        row = label_of(settings), backbone, 0 if settings.method == "zeroshot" else int(settings.shots) or math.inf
        papers = data.published(replace(settings, method="zeroshot", changed={}), settings.data)
        variance = {key: float(value) for key, value in dict(result.get("variance", {})).get("before", {}).items()}
        entries = [Entry((start, backbone, 0), column, result["zero_shot"], papers, variance),
                   Entry(row, column, result["accuracy"], data.published(settings, settings.data), variance)]
        for shift, accuracy in result["shifts"].items():
            entries.append(Entry(row, f"{column} → {shift}", accuracy, data.published(settings, shift), {}))
        if not all(0 <= entry.accuracy <= 100 for entry in entries) or not math.isfinite(sum(result["losses"])):
            raise ValueError("an accuracy is not from 0 to 100, or a loss not finite")
        return entries
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # any file can have that name
        print(f"warning: {path} is left out, it is no result of train.py ({error!r})", file=sys.stderr)


def summarise(out):
    """Print the runs under `out` as a Markdown table. Write summary.csv and, accuracy over shots, summary.png."""
    table = {}  # row -> column -> (accuracies of the seeds, the papers' numbers)
    starts = {}  # (label, backbone) -> column -> zero-shot accuracy, where the curve begins
    variances = {}  # (backbone, data set) -> of zero-shot CLIP
    for path in sorted(out.rglob("result.json")):
        is_in_the_making = any(part.startswith(".") for part in path.relative_to(out).parts)
        entries = None if is_in_the_making else read_entries(path)
        for entry in entries or []:
            values, _ = table.setdefault(entry.row, {}).setdefault(entry.column, ([], entry.papers))
            if entry.row[2] or not values:  # zero-shot CLIP is the same for all seeds
                values.append(entry.accuracy)
        if entries:
            if entries[0].variance:
                variances[entries[1].row[1], entries[1].column] = entries[0].variance
            starts.setdefault(entries[1].row[:2], {})[entries[1].column] = entries[0].accuracy
    if not table:
        raise UserError(f"There is no result.json under {out}: train something first, or give its --out.")

    sets = {column for start in starts.values() for column in start}
    columns = sorted(sets) + sorted({column for row in table.values() for column in row} - sets)  # then the shifts
    averaged = {name for name in sets if name in data.BENCHMARKS} or sets
    if len(averaged) > 1:
        columns.append(f"average of {len(averaged)}")
        for row in table.values():
            if row.keys() >= averaged:
                row[columns[-1]] = [statistics.mean(statistics.mean(row[name][0]) for name in averaged)], []
        for start in starts.values():
            if start.keys() >= averaged:
                start[columns[-1]] = statistics.mean(start[name] for name in averaged)
    rows, curves, gains = [], {}, {}  # curves: column -> label -> shots -> accuracies; gains: label -> column -> gain
    lines = [("method", "backbone", "shots", "data", "seeds", "mean", "standard deviation", "papers", "sources")]
    for key in sorted(table, key=lambda key: (key[1], key[2] > 0, key[0], key[2])):  # zero-shot first
        label, backbone, shots = key
        head = label, backbone, "all" if shots == math.inf else shots
        rows.append([*head, *(cell(*table[key][column]) if column in table[key] else "" for column in columns)])
        for column, (values, papers) in table[key].items():
            deviation = statistics.pstdev(values) if len(values) > 1 else ""
            lines.append((*head, column, len(values), statistics.mean(values), deviation,
                          "; ".join(str(value) for value, _ in papers), "; ".join(source for _, source in papers)))
            if shots and column in starts[label, backbone]:
                start = {0: [starts[label, backbone][column]]}
                curves.setdefault(column, {}).setdefault(f"{label}, {backbone}", start)[shots] = values
                gain = statistics.mean(values) - starts[label, backbone][column]  # the most shots are the last
                gains.setdefault((label, backbone), {})[column] = gain
    title = "Accuracy in percent; of several seeds: mean ± standard deviation (number of seeds)"
    print_table(title, ["method", "backbone", "shots", *columns], rows)
    save_csv(out / "summary.csv", lines)
    if curves:
        draw_curves(curves, out / "summary.png")
        draw_gains(gains, out / "gains.png")
    if variances:
        draw_variances(gains, variances, out / "variances.png")


def cell(values, papers):
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.pstdev(values):.2f} ({len(values)})"
    return "; ".join([text, *(f"{source}: {value:.2f}" for value, source in papers)])


def draw_curves(curves, path):
    """{data set: {label: {shots: accuracies of the seeds}}} -> a panel for each set, as Fig. 4 of UPT, DPT, FG-VPL."""
    labels = sorted({label for panel in curves.values() for label in panel})
    ticks = sorted({shots for panel in curves.values() for curve in panel.values() for shots in curve})
    across = min(len(curves), 4)
    bottom = math.ceil(len(curves) / across) * 640
    picture = Image.new("RGB", (max(across, 2) * 840, bottom + 40 * len(labels) + 80), "white")
    pen = ImageDraw.Draw(picture)
    for number, (name, panel) in enumerate(sorted(curves.items())):
        left, top = number % across * 840 + 100, number // across * 640 + 100  # of the frame, which is 700 by 440
        values = [value for curve in panel.values() for seeds in curve.values() for value in seeds]
        step = 5 if max(values) - min(values) < 40 else 10
        low, high = step * math.floor(min(values) / step), step * math.floor(max(values) / step) + step
        write(pen, left + 350, top - 68, name, "mm", 700)
        write(pen, left - 80, top - 28, "accuracy in %")
        write(pen, left + 350, top + 508, "labelled pictures per class (0: zero-shot)", "mm")
        for value in range(low, high + 1, step):
            y = top + 440 * (high - value) / (high - low)
            pen.line([(left, y), (left + 700, y)], "#dddddd", 2)
            write(pen, left - 12, y, str(value), "rm")
        for i, shots in enumerate(ticks):
            write(pen, left + 700 * (i + 0.5) / len(ticks), top + 468, "all" if shots == math.inf else str(shots), "mm")
        for label, curve in panel.items():
            n, points = labels.index(label), []
            for shots, seeds in sorted(curve.items()):
                x = left + 700 * (ticks.index(shots) + 0.5) / len(ticks)
                x += 8 * (n - (len(labels) - 1) / 2)  # lines that coincide lie beside each other
                y = top + 440 * (high - statistics.mean(seeds)) / (high - low)
                bar = 440 * statistics.pstdev(seeds) / (high - low)
                pen.line([(x, y - bar), (x, y + bar)], COLOURS[n % 7], 2)
                points.append((x, y))
            draw_line(pen, points, n)
    for n, label in enumerate(labels):
        draw_line(pen, [(100, bottom + 40 * n + 20), (200, bottom + 40 * n + 20)], n)
        write(pen, 224, bottom + 40 * n + 20, label)
    write(pen, 100, bottom + 40 * len(labels) + 24, "vertical bars: standard deviation over the seeds")
    save_picture(path, picture)


def draw_gains(gains, path):
    """{(method, backbone): {data set: gain over zero-shot}} -> bars, as Fig. 3 of FG-VPL. The most shots count."""
    height = 90 + sum(50 + 34 * len(row) for row in gains.values())
    picture = Image.new("RGB", (1680, height), "white")
    pen = ImageDraw.Draw(picture)
    values = [gain for row in gains.values() for gain in row.values()]
    scale = 860 / (max(1, *values) - min(0, *values))  # pixels of a percentage point
    zero = 640 - scale * min(0, *values)
    write(pen, zero, 30, "gain over zero-shot CLIP, in percentage points")
    y = 60
    for n, ((label, backbone), row) in enumerate(sorted(gains.items())):
        write(pen, 30, y + 24, f"{label}, {backbone}")
        y += 50
        for column, gain in sorted(row.items(), key=lambda item: -item[1]):
            left, right = sorted([zero, zero + scale * gain])
            pen.rectangle([(left, y), (right, y + 26)], COLOURS[n % 7])
            write(pen, 530, y + 13, column, "rm", 490)
            side, anchor = (10, "lm") if gain >= 0 else (-10, "rm")
            write(pen, zero + scale * gain + side, y + 13, f"{gain:+.1f}", anchor)
            y += 34
    pen.line([(zero, 60), (zero, y)], "black", 2)
    save_picture(path, picture)


def draw_variances(gains, variances, path):
    """Gain over zero-shot against the variance of its features, a point per data set, as Fig. 1 d and e of UPT."""
    picture = Image.new("RGB", (1680, 700 + 40 * len(gains)), "white")
    pen = ImageDraw.Draw(picture)
    heights = [gain for row in gains.values() for gain in row.values()] + [0]
    low, high = min(heights), max(heights) + 1e-6
    titles = {"text_between_classes": "Var_t, of the classifier", "image_within_classes": "Var_v, of the pictures"}
    for left, (key, title) in zip((120, 960), titles.items(), strict=True):
        values = [variance[key] for variance in variances.values()]
        least, extent = min(values), max(values) - min(values) or 0.1
        pen.rectangle([(left, 80), (left + 660, 560)], outline="black", width=2)
        write(pen, left, 40, "gain over zero-shot CLIP, in percentage points")
        write(pen, left + 330, 640, title, "mm")
        for part in (0, 0.5, 1):
            write(pen, left + 60 + 540 * part, 590, f"{least + extent * part:.3f}", "mm")
            write(pen, left - 10, 540 - 440 * part, f"{low + (high - low) * part:.1f}", "rm")
        for n, ((_, backbone), row) in enumerate(sorted(gains.items())):
            for column, gain in row.items():
                if (backbone, column) in variances:
                    x = left + 60 + 540 * (variances[backbone, column][key] - least) / extent
                    y = 540 - 440 * (gain - low) / (high - low)
                    draw_line(pen, [(x, y)], n)
                    side, anchor = (16, "lm") if x < left + 330 else (-16, "rm")
                    write(pen, x + side, y, column, anchor, 300)
    for n, (label, backbone) in enumerate(sorted(gains)):
        draw_line(pen, [(120, 700 + 40 * n)], n)
        write(pen, 150, 700 + 40 * n, f"{label}, {backbone}")
    save_picture(path, picture)


# ---- One run ----


def read_predictions(folder):
    """predictions.csv -> a dictionary for each test picture: picture, class, predicted class, probability."""
    path = folder / "predictions.csv"
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [row | {"probability": float(row["probability"])} for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("it is empty")
        return rows
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the predictions of a run ({error}): train again.") from error


def describe(run):
    """Print settings, accuracies, worst classes, confusions and the words near the contexts; write RUN/report.csv."""
    entries = read_entries(run.folder / "result.json")
    if entries is None:
        raise UserError(f"{run.folder} has no result.json of train.py: train again.")
    for name, value in vars(settings_of(run.saved)).items():
        print(f"{name:13} {value}")
    rows = read_predictions(run.folder)
    answers = Counter((row["class"], row["predicted class"]) for row in rows)
    pictures = Counter(row["class"] for row in rows)
    recalls = {name: 100 * answers[name, name] / count for name, count in pictures.items()}
    is_zero_shot = entries[0].row == entries[1].row  # then both say the same
    for entry in entries[1:] if is_zero_shot else entries:
        print(f"accuracy      {entry.accuracy:.2f} % {entry.column}, {entry.row[0]}{train.quoted(entry.papers)}")
    print(f"balanced      {statistics.mean(recalls.values()):.2f} %, the mean over the classes")
    losses = json.loads((run.folder / "result.json").read_text("utf-8"))["losses"]
    if losses:
        low, extent = min(losses), max(losses) - min(losses) or 1
        bars = ["▁▂▃▄▅▆▇█"[int(7 * (loss - low) / extent)] for loss in losses[:: math.ceil(len(losses) / 60)]]
        print(f"loss          {''.join(bars)} from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} epochs")
    classes = [(name, answers[name, name], pictures[name], f"{recalls[name]:.1f}") for name in pictures]
    classes.sort(key=lambda row: recalls[row[0]])
    confused = [(*pair, count) for pair, count in answers.most_common() if pair[0] != pair[1]]
    print_table("The worst classes", ["class", "right", "of", "%"], classes[:10])
    print_table("The most frequent confusions", ["class", "taken for", "times"], confused[:10])
    lines = [("table", "class or context", "right, taken for or word", "of, times or distance", "%")]
    lines += [("class", *row) for row in classes] + [("confusion", *row) for row in confused]
    for n, words in enumerate(nearest_words(run.method), 1):
        lines += [("context", n, word, distance) for word, distance in words]
        if n <= 16:  # with contexts for each class there are many
            print(f"context {n:<5} {', '.join(f'{word} ({distance:.3f})' for word, distance in words)}")
    save_csv(run.folder / "report.csv", lines)


@torch.no_grad()
def nearest_words(method):
    """-> for each context vector the three nearest tokens and their Euclidean distances, as in CoOp's Table 4."""
    contexts = method.contexts()
    if contexts is None:
        return []
    byte_ids, merges = vocabulary()
    words = {49406: b"<start>", 49407: b"<end>"}
    for byte, i in byte_ids.items():
        words[i] = words[i + 256] = bytes([byte])  # the second one ends a word
    for (left, right), i in merges.items():
        words[i] = words[left] + words[right]
    embeddings = method.clip.text.token_embedding.weight
    distances = torch.cdist(contexts.flatten(0, -2), embeddings)
    distances[:, (embeddings == 0).all(dim=1)] = math.inf  # the tiny CLIP has never seen these words
    values, nearest = (x.tolist() for x in distances.topk(3, largest=False))
    return [[(words[i].decode("utf-8", "replace"), value) for i, value in zip(*row, strict=True)]
            for row in zip(nearest, values, strict=True)]


def draw_mistakes(run, count, root):
    """RUN/mistakes.png: the test pictures whose wrong class had the highest probability."""
    bench = data.load(run.saved["data_path"] or run.saved["data"], root, shots=0)
    wrong = [row for row in read_predictions(run.folder) if row["class"] != row["predicted class"]]
    if not wrong:
        raise UserError(f"{run.folder} made no mistake on its test pictures.")
    cells = []
    for row in sorted(wrong, key=lambda row: -row["probability"])[:count]:
        picture = data.read(bench.folder / row["picture"], bench.own)
        answer = f"{row['probability']:.0%} {row['predicted class']}"
        cells.append((ImageOps.pad(picture, (SIDE, SIDE), color="white"),
                      [Path(row["picture"]).name, f"true: {row['class']}", answer]))
        print(f"{row['picture']}: {row['class']}, predicted: {answer}")
    draw_sheet([], [cells[i : i + 5] for i in range(0, len(cells), 5)], run.folder / "mistakes.png")


class NewPictures(data.Pictures):
    """Pictures to predict, each with its number. One that cannot be read is named and gets the number -1."""

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return self.transform(Image.new("RGB", (1, 1))), -1


@torch.no_grad()
def predict(run, paths, csv_file, threshold):
    """Print the five likeliest classes of pictures and of folders of pictures. -> the pictures that cannot be read."""
    files = []
    for path in map(Path, paths):
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in data.SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"There is no picture in {path}: choose among files of {', '.join(data.SUFFIXES)}.")
        files += inside if path.is_dir() else [path]
    transform, names = preprocess(run.method.clip.visual.resolution), run.method.classnames
    pictures = NewPictures([(file, number) for number, file in enumerate(files)], transform, own=True)
    rows = [("picture", *(f"{what} {n}" for n in range(1, 6) for what in ("class", "probability")))]
    with run.machine.autocast():
        text = run.method.encode_text()
        for images, numbers in data.Batches(pictures, 100, run.machine.device, run.machine.workers):
            best, classes = run.method(images, text).float().softmax(dim=-1).topk(min(5, len(names)))
            for number, values, found in zip(numbers.tolist(), best.tolist(), classes.tolist(), strict=True):
                if number >= 0:
                    row = [files[number]]
                    for i, p in zip(found, values, strict=True):
                        row += [names[i] if p >= threshold else "none", f"{p:.4f}"]
                    rows.append(row)
    data.show("", keep=True)
    for file, *answers in rows[1:]:
        print(f"{file}: {', '.join(map(' '.join, zip(answers[::2], answers[1::2], strict=True)))}")
    if csv_file:
        save_csv(Path(csv_file), rows)
    predicted = {row[0] for row in rows}
    return [file for file in files if file not in predicted]


def evaluate_on(run, name, root):
    """Print the accuracy of a trained run on a data set: on its own again, or on another one."""
    _, path = data.identify(name)
    is_new = path not in ("", run.saved["data_path"])  # then all pictures of its class folders are tested
    target = data.load(name, root, shots=0, whole=is_new)
    evaluation = train.evaluate_on(run.method, target, run.saved["class_ids"], run.machine)
    papers = [] if target.own else data.published(settings_of(run.saved), target.name)
    print(f"{target.name:13} {evaluation.accuracy:.2f} % of {len(target.test)} test pictures{train.quoted(papers)}")


@torch.no_grad()
def draw_attention(runs, files):
    """RUN/attention.png: for each picture the maps of zero-shot CLIP and of the runs, see Method.attention."""
    pictures = [data.read(file, own=True) for file in files]
    seen = [ImageOps.fit(picture, (SIDE, SIDE)) for picture in pictures]  # the square that CLIP sees
    titles, rows = ["picture"], [[(picture, [Path(file).name])] for picture, file in zip(seen, files, strict=True)]
    first = runs[0].method
    zero_shot = Method(first.clip, first.classnames, first.templates)
    for title, method, run in [("zero-shot", zero_shot, runs[0]), *((run.label, run.method, run) for run in runs)]:
        images = torch.stack([preprocess(method.clip.visual.resolution)(picture) for picture in pictures])
        with run.machine.autocast():
            best, classes = method(images.to(run.machine.device)).float().softmax(dim=-1).max(dim=-1)
            maps = method.attention(images.to(run.machine.device))
        answers = [f"{p:.0%} {method.classnames[i]}" for i, p in zip(classes.tolist(), best.tolist(), strict=True)]
        for n, (name, values) in enumerate(maps.items()):
            titles.append(title if n == 0 else "")
            for i, row in enumerate(rows):
                row.append((overlay(seen[i], values[i]), [name if n else answers[i]]))
    draw_sheet(titles, rows, runs[0].folder / "attention.png")


@torch.no_grad()
def draw_prompt_attention(run, files):
    """RUN/prompt_attention.png: what each visual prompt of the last layer responds to in each picture, UPT's Fig. 6.

    Deep prompts are keys and values and have no query. So the response of a prompt is the product of the patches'
    queries with its key, the mean of the heads: where it is high, patches would look at this prompt.
    """
    method, inputs, rows = run.method, [], []
    last = method.clip.visual.blocks[-1]
    n = len(method.clip.visual.positional_embedding)  # class token and patches
    for file in files:
        picture = data.read(file, own=True)
        hook = last.register_forward_pre_hook(lambda block, args: inputs.append(args))
        image = preprocess(method.clip.visual.resolution)(picture).unsqueeze(0).to(run.machine.device)
        method.encode_image(image, method.encode_text())
        hook.remove()
        x, prompts = [*inputs[-1], None][:2]  # shallow prompts have travelled on as tokens behind the patches
        h = last.ln_1(x)
        keys = last.keys_and_values(h, prompts)[0][:, :, n:]  # (1, H, P, 64)
        response = (last.attn.query(h)[:, :, 1:n] @ keys.mT).mean(dim=1)[0].T  # (P, N)
        if not len(response):
            raise UserError(f"{run.folder} has no visual prompts in its last layer.")
        seen = ImageOps.fit(picture, (SIDE, SIDE))
        rows.append([(seen, [Path(file).name]), *((overlay(seen, values), []) for values in response)])
    titles = ["picture", *(f"prompt {i}" for i in range(1, len(rows[0])))]
    draw_sheet(titles, rows, run.folder / "prompt_attention.png")


@torch.no_grad()
def draw_features(run, names, root):
    """RUN/features.png: test features as points, the classifier's vectors as lines, for zero-shot CLIP and the run.

    All are unit vectors, less the mean of their kind, seen along the two principal components of the image features.
    Points and lines are scaled separately. Var_v and Var_t are UPT's, of these classes.
    """
    bench, machine = data.load(run.saved["data_path"] or run.saved["data"], root, shots=0), run.machine
    names = names or bench.classnames[:10]
    if len(names) > 10 or not set(names) <= set(bench.classnames):
        raise UserError(f"--features takes up to ten of the classes {', '.join(bench.classnames)}.")
    labels = [bench.classnames.index(name) for name in names]
    items = [(path, labels.index(label)) for path, label in bench.test if label in labels]
    batches = data.plain_batches(items, run.method.clip, machine.device, machine.workers, bench.own)
    picture = Image.new("RGB", (1600, 880 + 40 * len(names)), "white")
    pen = ImageDraw.Draw(picture)
    zero_shot = Method(run.method.clip, bench.classnames, run.method.templates)
    for x, title, method in (400, "zero-shot", zero_shot), (1200, run.label, run.method):
        with machine.autocast():
            text = method.encode_text()
            images = torch.cat([method.encode_image(images, text) for images, _ in batches])
        images, text = F.normalize(images.float(), dim=-1), F.normalize(text[labels].float(), dim=-1)
        classes = torch.tensor([n for _, n in items], device=images.device)
        var_v, var_t = intra_class_variance(images, classes), inter_class_variance(text)
        images, text = images - images.mean(dim=0), text - text.mean(dim=0)
        plane = torch.linalg.svd(images, full_matrices=False).Vh[:2].T  # (E, 2)
        points, ends = images @ plane, text @ plane
        points, ends = 360 * points / points.norm(dim=1).max(), 360 * ends / ends.norm(dim=1).max()
        for (u, v), (_, n) in zip(points.tolist(), items, strict=True):
            draw_line(pen, [(x + u, 420 - v)], n)
        for n, (u, v) in enumerate(ends.tolist()):
            pen.line([(x, 420), (x + u, 420 - v)], "white", 10)
            pen.line([(x, 420), (x + u, 420 - v)], COLOURS[n % 7], 5)
            pen.regular_polygon((x + u, 420 - v, 16), CORNERS[n % 3], fill=COLOURS[n % 7], outline="black")
        write(pen, x, 30, title, "mm", 760)
        write(pen, x, 830, f"Var_v {var_v:.3f}, Var_t {var_t:.3f}", "mm")
    for n, name in enumerate(names):
        draw_line(pen, [(60, 890 + 40 * n)], n)
        write(pen, 90, 890 + 40 * n, name)
    save_picture(run.folder / "features.png", picture)


@torch.no_grad()
def export(run, path):
    """Write the classifier (K, E), unit rows, as safetensors: eight bytes of length, a JSON header, the numbers."""
    clip, method = run.method.clip, run.method
    images = torch.randn(4, 3, clip.visual.resolution, clip.visual.resolution, device=run.machine.device)
    text = F.normalize(method.encode_text().float(), dim=-1)
    if not torch.allclose(method(images), clip.logits(clip.encode_image(images), text), atol=0.01):
        raise UserError(f"{run.folder} changes more than the classifier, so that it cannot be used with another CLIP: "
                        "use --predict, or train.load_run in Python.")
    notes = dict(classnames=json.dumps(method.classnames), templates=json.dumps(method.templates),
                 logit_scale=str(clip.logit_scale.exp().item()), backbone=run.saved["backbone"])
    tensor = dict(dtype="F32", shape=[*text.shape], data_offsets=[0, 4 * text.numel()])
    header = json.dumps({"__metadata__": notes, "classifier": tensor}).encode()
    header += b" " * (-len(header) % 8)
    save(path, len(header).to_bytes(8, "little") + header + text.cpu().numpy().tobytes())


# ---- Drawing ----


def write(pen, x, y, text, anchor="lm", room=10**6):
    """A text longer than `room` pixels loses its end. The font that comes with Pillow knows no accents."""
    font = ImageFont.load_default(26)
    text = shown = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    while shown and font.getlength(shown) > room:
        text = text[:-1]
        shown = text + "..."
    pen.text((x, y), shown, "black", font, anchor=anchor)


def draw_line(pen, points, n):
    """The n-th line through points: it has a colour and, for print and colour-blind readers, dashes and markers."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / DASHES[n % 4])) if DASHES[n % 4] else 1
        for i in range(0, steps, 2):
            ends = [(x0 + (x1 - x0) * t / steps, y0 + (y1 - y0) * t / steps) for t in (i, i + 1)]
            pen.line(ends, COLOURS[n % 7], 4)
    for x, y in points:
        pen.regular_polygon((x, y, 8), CORNERS[n % 3], fill=COLOURS[n % 7])


def draw_sheet(titles, rows, path):
    """Pictures of SIDE by SIDE pixels in rows of (picture, lines of text below it); titles of the columns."""
    width, top = SIDE + 30, 50 if titles else 10
    height = SIDE + 30 + 32 * max(len(lines) for row in rows for _, lines in row)
    sheet = Image.new("RGB", (max(len(row) for row in rows) * width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        write(pen, i * width + 15, 25, title, room=SIDE)
    for j, row in enumerate(rows):
        for i, (picture, lines) in enumerate(row):
            sheet.paste(picture, (i * width + 15, top + j * height))
            for k, line in enumerate(lines):
                write(pen, i * width + 15, top + j * height + SIDE + 20 + 32 * k, line, room=SIDE)
    save_picture(path, sheet)


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


if __name__ == "__main__":
    sys.exit(main())
