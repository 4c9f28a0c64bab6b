"""What finished runs show: tables, curves, predictions, attention. It reads the run folders that train.py writes.

    python report.py                                    # a table of all runs, the papers' numbers beside; pictures
    python report.py RUN                                # one run: classes, confusions, what its contexts learned
    python report.py RUN --mistakes                     # the most confident mistakes, as a picture
    python report.py RUN --predict cat.jpg photos/      # the five likeliest classes of new pictures; --csv FILE
    python report.py RUN --eval-on imagenetv2 folder/   # the trained run on other data, or again on its own
    python report.py RUN --export FILE.safetensors      # the classifier, to be used with any program for CLIP
    python report.py RUN RUN --attention cat.jpg        # what zero-shot CLIP and the runs look at, as a picture
    python report.py RUN --prompt-attention cat.jpg     # which patches respond to each visual prompt
    python report.py RUN --features                     # test features and classifier, before and after training

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
from support.benchmarks import BENCHMARKS, Source, published
from support.console import exit_status
from support.folders import SUFFIXES, shortened
from support.machine import Machine, choose_machine
from support.runs import read_prompts
from support.settings import Settings, above
from upt import inter_class_variance, intra_class_variance

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # colour-blind readers too
DASHES = (0, 8, 16, 28)  # pixels of a stroke, and of the gap behind it
CORNERS = (32, 4, 3)  # of a marker: a circle, a square, a triangle
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # from dark to light
SIDE = 336  # pixels of a picture on a sheet
WIDTH = 700  # pixels of a frame in a chart


def main(argv=None):
    args, unreadable = parse_arguments(argv), []  # pictures that cannot be read: the rest are predicted, status 1
    status = exit_status(lambda: report(args, unreadable))
    return 1 if unreadable and not status else status


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of finished runs (default: a table of all runs)")
    add("--out", default="runs", help="where the runs are (default: runs)")
    add("--root", default="data", help="where data sets are (default: data)")
    add("--mistakes", type=above(0, int), nargs="?", const=20, metavar="N", help="how many (default: 20)")
    add("--predict", nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    add("--csv", metavar="FILE", help="with --predict: write the predictions there, too")
    add("--threshold", type=float, default=0, metavar="P", help="with --predict: none if the best is less likely")
    add("--eval-on", nargs="+", default=[], metavar="DATA", help="data sets' names or folders of pictures")
    add("--export", metavar="FILE", help="a safetensors file to write")
    add("--attention", nargs="+", metavar="FILE", help="pictures")
    add("--prompt-attention", nargs="+", metavar="FILE", help="pictures")
    add("--features", nargs="*", metavar="CLASS", help="up to ten classes (default: the first ten)")
    add("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    return parser.parse_args(argv)


class Run(NamedTuple):
    folder: Path
    settings: Settings
    saved: dict  # what prompts.pt holds
    method: Method
    machine: Machine


def report(args, unreadable):
    """Do what the arguments ask for. Pictures that cannot be read are added to `unreadable`."""
    wants_features = args.features is not None  # without class names it is an empty list
    asked = [args.mistakes, args.predict, args.eval_on, args.export, args.attention, args.prompt_attention]
    if (args.csv or args.threshold) and not args.predict:
        raise UserError("--csv and --threshold are for --predict: give it, too.")
    if (args.csv or args.export) and len(args.runs) > 1:
        raise UserError("--csv and --export write one file: name one run.")
    if (any(asked) or wants_features) and not args.runs:
        raise UserError("Name the folder of a finished run first, such as runs/shapes/coop/tiny_16shot_seed1.")
    if not args.runs:
        summarise(Path(args.out))
    runs = [open_run(Path(folder), args.device) for folder in args.runs]
    if args.attention:
        draw_attention(runs, args.attention)
    for run in runs:
        if not any(asked) and not wants_features:
            describe(run)
        if args.mistakes:
            draw_mistakes(run, args.mistakes, args.root)
        if args.predict:
            unreadable += predict(run, args.predict, args.csv, args.threshold)
        for name in args.eval_on:
            evaluate_on(run, name, args.root)
        if args.export:
            export(run, Path(args.export))
        if args.prompt_attention:
            draw_prompt_attention(run, args.prompt_attention)
        if wants_features:
            draw_features(run, args.features, args.root)


def open_run(folder, device):
    saved, method = read_prompts(folder), train.load_run(folder, device)
    try:
        settings, machine = settings_of(saved), choose_machine(device, saved["precision"], workers=None)
        label_of(settings)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'prompts.pt'} has a setting that is none ({error!r}): train again.") from error
    return Run(folder, settings, saved, method, machine)


def settings_of(values):
    return Settings(**{field: values[field] for field in Settings.__dataclass_fields__})


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
        with suppress(OSError):  # where nothing can be written, nothing can be removed
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
    column: str  # a data set, "data set → shifted data", or "data set: base" and two more of --base-to-new
    accuracy: float
    papers: list  # [(accuracy, source), ...]


def read_result(path):
    """result.json -> the entries of zero-shot CLIP, of the run and of its shifts or new classes, and all that it holds.

    None if it is no result of train.py: it is then named.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
        settings = settings_of(result)
        column, _, name = settings.folder.parts  # they tell apart a user's data, and weights, that are called alike
        backbone = name.rsplit("_", 2)[0] if settings.backbone_path else settings.backbone
        row = label_of(settings), backbone, 0 if settings.method == "zeroshot" else int(settings.shots) or math.inf
        # What was changed beside the method's options and recipe, as the templates, changes zero-shot CLIP, too.
        of_method = settings.options.keys() | settings.recipe.keys()
        changed = {key: value for key, value in settings.changed.items() if key not in of_method}
        start = replace(settings, method="zeroshot", changed=changed,
                        options=train.METHODS["zeroshot"].default_options())
        label, papers = label_of(start), published(start, settings.data)
        source = BENCHMARKS.get("" if settings.data_path else settings.data, Source)
        if settings.templates not in ([], [source.template]) and "template" not in changed:
            label, papers = f"{label}, templates of {settings.method}", []  # those of its recipe
        halves = result.get("base_to_new", {})
        main = f"{column}: base" if halves else column
        entries = [Entry((label, backbone, 0), main, result["zero_shot"], papers),
                   Entry(row, main, result["accuracy"], published(settings, settings.data))]
        for shift, accuracy in result["shifts"].items():
            entries.append(Entry(row, f"{column} → {shift}", accuracy, published(settings, shift)))
        if halves:
            entries += [Entry(row, f"{column}: new", halves["new"], []),
                        Entry(row, f"{column}: harmonic mean", halves["harmonic_mean"], [])]
        variance = result.setdefault("variance", {}).get("before", {})
        is_finite = math.isfinite(sum(result["losses"]) + sum(variance.values()))
        if not is_finite or not all(0 <= entry.accuracy <= 100 for entry in entries):
            raise ValueError("an accuracy is not from 0 to 100, or a loss not finite")
        return entries, result
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # any file can have that name
        print(f"warning: {path} is left out, it is no result of train.py ({error!r})", file=sys.stderr)


def summarise(out):
    """Print the runs under `out` as a Markdown table. Write summary.csv and the pictures of accuracies and gains."""
    table = {}  # row -> column -> (accuracies of the seeds, the papers' numbers)
    starts = {}  # (label, backbone) -> column -> zero-shot accuracy, where the curve begins
    variances = {}  # column -> "label, backbone" -> variances of zero-shot CLIP
    for path in sorted(out.rglob("result.json")):
        is_in_the_making = any(part.startswith(".") for part in path.relative_to(out).parts)
        found = None if is_in_the_making else read_result(path)
        if not found:
            continue
        entries, result = found
        for entry in entries:
            values, _ = table.setdefault(entry.row, {}).setdefault(entry.column, ([], entry.papers))
            if entry.row[2] or not values:  # zero-shot CLIP is the same for all seeds
                values.append(entry.accuracy)
        label, backbone, _ = entries[1].row
        starts.setdefault((label, backbone), {})[entries[0].column] = entries[0].accuracy
        if result["variance"]:
            variances.setdefault(entries[0].column, {})[f"{label}, {backbone}"] = result["variance"]["before"]
    if not table:
        raise UserError(f"There is no result.json under {out}: train something first, or give its --out.")

    sets = {column for start in starts.values() for column in start if not column.endswith(": base")}
    columns = sorted(sets) + sorted({column for row in table.values() for column in row} - sets)  # shifts, new classes
    averaged = {name for name in sets if name in BENCHMARKS} or sets
    if len(averaged) > 1:
        columns.append(f"average of {len(averaged)}")
        for row in table.values():
            if row.keys() >= averaged:
                row[columns[-1]] = [statistics.mean(statistics.mean(row[name][0]) for name in averaged)], []
        for start in starts.values():
            if start.keys() >= averaged:
                start[columns[-1]] = statistics.mean(start[name] for name in averaged)
    rows, curves = [], {}  # curves: column -> "label, backbone" -> shots -> accuracies
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
    title = "Accuracy in percent; of several seeds: mean ± standard deviation (number of seeds)"
    print_table(title, ["method", "backbone", "shots", *columns], rows)
    save_csv(out / "summary.csv", lines)
    if curves:
        draw_curves(curves, out / "summary.png")
        gains = find_gains(curves)
        draw_gains(gains, out / "gains.png")
        if variances.keys() & curves.keys():
            draw_variances(gains, variances, out / "variances.png")


def cell(values, papers):
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.pstdev(values):.2f} ({len(values)})"
    return "; ".join([text, *(f"{source}: {value:.2f}" for value, source in papers)])


def draw_curves(curves, path):
    """{data set: {label: {shots: accuracies of the seeds}}} -> a panel for each set, as Fig. 4 of UPT, DPT, FG-VPL."""
    labels = sorted({label for panel in curves.values() for label in panel})
    all_shots = sorted({shots for panel in curves.values() for curve in panel.values() for shots in curve})
    picture, panels = draw_panels(sorted(curves), labels)
    for name, panel in zip(sorted(curves), panels, strict=True):
        values = [value for curve in curves[name].values() for seeds in curve.values() for value in seeds]
        y = panel.draw_y_scale(values, "accuracy in % (upright bars: standard deviation over the seeds)")
        place = {shots: panel.left + WIDTH * (i + 0.5) / len(all_shots) for i, shots in enumerate(all_shots)}
        for shots in all_shots:
            panel.write_below(place[shots], "all" if shots == math.inf else str(shots))
        panel.write_below(panel.left + WIDTH / 2, "labelled pictures per class (0: zero-shot)", line=2)
        for label, curve in curves[name].items():
            n, points = labels.index(label), []
            for shots, seeds in sorted(curve.items()):
                x = place[shots] + 8 * (n - (len(labels) - 1) / 2)  # lines that coincide lie beside each other
                mean, deviation = statistics.mean(seeds), statistics.pstdev(seeds)
                panel.pen.line([(x, y(mean + deviation)), (x, y(mean - deviation))], COLOURS[n % 7], 2)
                points.append((x, y(mean)))
            draw_line(panel.pen, points, n)
    save_picture(path, picture)


def find_gains(curves):
    """-> {label: {data set: gain over zero-shot CLIP in percentage points}}, of the most shots that there are."""
    gains = {}
    for name, panel in sorted(curves.items()):
        for label, curve in sorted(panel.items()):
            gains.setdefault(label, {})[name] = statistics.mean(curve[max(curve)]) - curve[0][0]
    return gains


def draw_gains(gains, path):
    """{label: {data set: gain}} -> a panel of bars for each label, as Fig. 3 of FG-VPL."""
    picture, panels = draw_panels(list(gains), [], height=40 * max(len(row) for row in gains.values()) + 20)
    values = [0, *(gain for row in gains.values() for gain in row.values())]
    for n, (row, panel) in enumerate(zip(gains.values(), panels, strict=True)):
        x = panel.draw_x_scale(values, "gain over zero-shot CLIP in percentage points", for_names=260)
        for i, (name, gain) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            y, left, right = panel.top + 40 * i + 30, *sorted([x(0), x(gain)])
            panel.pen.rectangle([left, y - 13, right, y + 13], COLOURS[n % 7])
            write(panel.pen, panel.left + 10, y, name, room=240)
            write(panel.pen, right + 10, y, f"{gain:+.1f}")
    save_picture(path, picture)


def draw_variances(gains, variances, path):
    """Gain over zero-shot CLIP against the variance of its features, a point per data set, as Fig. 1 of UPT.

    gains: {label: {data set: gain}}; variances: {data set: {label: variances by name}}, where they were measured.
    """
    points = [(name, label, variances[name][label], gain) for label, row in gains.items() for name, gain in row.items()
              if label in variances.get(name, {})]
    labels, heights = sorted({label for _, label, _, _ in points}), [0, *(gain for *_, gain in points)]
    titles = {"text_between_classes": "Var_t of zero-shot CLIP, between the classes' texts",
              "image_within_classes": "Var_v of zero-shot CLIP, within the classes' pictures"}
    picture, panels = draw_panels(["", ""], labels)
    for (key, title), panel in zip(titles.items(), panels, strict=True):
        y = panel.draw_y_scale(heights, "gain over zero-shot CLIP in percentage points")
        x = panel.draw_x_scale([variance[key] for _, _, variance, _ in points], title)
        written = {}  # name -> its place
        for name, label, variance, gain in sorted(points, key=lambda point: -point[3]):
            left, top = x(variance[key]), y(gain)
            draw_line(panel.pen, [(left, top)], labels.index(label))
            if name not in written:  # once, at its highest point, or below other names there
                while any(abs(left - u) < 300 and abs(top - v) < 28 for u, v in written.values()):
                    top += 4
                side, anchor = (16, "lm") if left < panel.left + WIDTH / 2 else (-16, "rm")
                write(panel.pen, left + side, top, name, anchor)
                written[name] = left, top
    save_picture(path, picture)


# ---- One run ----


def read_run(run):
    """-> what read_result gives, and a dictionary for each test picture: picture, class, predicted class, ..."""
    found, path = read_result(run.folder / "result.json"), run.folder / "predictions.csv"
    if not found:
        raise UserError(f"{run.folder} has no result.json of train.py: train again.")
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [row | {"probability": float(row["probability"])} for row in csv.DictReader(file)]
        known = {row[column] for row in rows for column in ("class", "predicted class")} <= {*run.saved["classnames"]}
        is_whole = known and all(row["picture"] and 0 <= row["probability"] <= 1 for row in rows)
        if len(rows) != found[1]["test_images"] or not is_whole:
            raise ValueError(f"{len(rows)} rows, or one without a known class or a probability")
        return *found, rows
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the predictions of a run ({error}): train again.") from error


def describe(run):
    """Print settings, accuracies, worst classes, confusions and the words near the contexts; write RUN/report.csv."""
    entries, result, rows = read_run(run)
    for name, value in vars(run.settings).items():
        print(f"{name:13} {value}")
    answers = Counter((row["class"], row["predicted class"]) for row in rows)
    pictures = Counter(row["class"] for row in rows)
    recalls = {name: 100 * answers[name, name] / count for name, count in pictures.items()}
    is_zero_shot = entries[0].row == entries[1].row  # then both say the same
    for entry in entries[1:] if is_zero_shot else entries:
        print(f"accuracy      {entry.accuracy:.2f} % {entry.column}, {entry.row[0]}{train.quoted(entry.papers)}")
    print(f"balanced      {statistics.mean(recalls.values()):.2f} %, the mean over the classes")
    if losses := result["losses"]:
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
    wrong = [row for row in read_run(run)[2] if row["class"] != row["predicted class"]]
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
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"There is no picture in {path}: choose among files of {', '.join(SUFFIXES)}.")
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
                        row += [names[i] if values[0] >= threshold else "none", f"{p:.4f}"]
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
    _, path = data.identify(name)  # of a folder that is not the run's own, all pictures are tested
    target = data.load(name, root, shots=0, whole=path not in ("", run.saved["data_path"]))
    target = data.without_trained(target, run.saved["train"], run.saved["data_path"])
    evaluation = train.evaluate_on(run.method, target, run.saved["class_ids"], run.machine)
    papers = [] if target.own else published(run.settings, target.name)
    print(f"{target.name:13} {evaluation.accuracy:.2f} % of {len(target.test)} test pictures{train.quoted(papers)}")


@torch.no_grad()
def export(run, path):
    """Write the classifier (K, E), unit rows, as safetensors: eight bytes of length, a JSON header, the numbers."""
    method, kind = run.method, type(run.method)
    if kind.encode_image is not Method.encode_image or kind.forward is not Method.forward:
        raise UserError(f"{run.settings.method} is more than CLIP with another classifier, so other programs cannot "
                        "use it: use --predict, or train.load_run in Python.")
    text = F.normalize(method.encode_text().float(), dim=-1)
    notes = {"classnames": json.dumps(method.classnames), "templates": json.dumps(method.templates),
             "logit_scale": str(method.clip.logit_scale.exp().item()), "backbone": run.settings.backbone}
    tensor = {"dtype": "F32", "shape": list(text.shape), "data_offsets": [0, 4 * text.numel()]}
    header = json.dumps({"__metadata__": notes, "classifier": tensor}).encode()
    header += b" " * (-len(header) % 8)
    save(path, len(header).to_bytes(8, "little") + header + text.cpu().numpy().tobytes())


# ---- Pictures of one run ----


def read_pictures(files, run):
    """-> images (B, 3, R, R), and for each a row of a sheet, which begins with the square that CLIP sees."""
    pictures, transform = [data.read(file, own=True) for file in files], preprocess(run.method.clip.visual.resolution)
    images = torch.stack([transform(picture) for picture in pictures]).to(run.machine.device)
    seen = [ImageOps.fit(picture, (SIDE, SIDE)) for picture in pictures]
    return images, [[(picture, [Path(file).name])] for picture, file in zip(seen, files, strict=True)]


def zero_shot_of(method):
    return Method(method.clip, method.classnames, method.templates)


@torch.no_grad()
def draw_attention(runs, files):
    """RUN/attention.png: for each picture the maps of zero-shot CLIP and of the runs, see Method.attention."""
    titles, rows = ["picture"], read_pictures(files, runs[0])[1]
    columns = [("zero-shot", zero_shot_of(runs[0].method), runs[0])]
    columns += [(label_of(run.settings), run.method, run) for run in runs]
    for title, method, run in columns:
        images, _ = read_pictures(files, run)  # runs may have different backbones
        with run.machine.autocast():
            best, classes = method(images).float().softmax(dim=-1).max(dim=-1)
            maps = method.attention(images)
        answers = [f"{p:.0%} {method.classnames[i]}" for i, p in zip(classes.tolist(), best.tolist(), strict=True)]
        for n, (name, values) in enumerate(maps.items()):
            titles.append(title if n == 0 else "")
            for i, row in enumerate(rows):
                row.append((overlay(row[0][0], values[i]), [name if n else answers[i]]))
    draw_sheet(titles, rows, runs[0].folder / "attention.png")


@torch.no_grad()
def draw_prompt_attention(run, files):
    """RUN/prompt_attention.png: which patches respond to each visual prompt of the last layer, as UPT's Fig. 6.

    Deep prompts are keys and values and have no query, so they look at nothing themselves. What is shown is the share
    of its attention that each patch would give to the prompt: softmax of its query's products with all keys, the mean
    of the heads. It is computed for this picture alone, since CLIP reads nothing but the class token of that layer.
    """
    images, rows = read_pictures(files, run)
    method, inputs, last_block = run.method, [], run.method.clip.visual.blocks[-1]
    hook = last_block.register_forward_pre_hook(lambda block, args: inputs.append(args))
    with run.machine.autocast():
        method.encode_image(images, method.encode_text())
        hook.remove()
        weights = last_block.attention_weights(*inputs[-1])  # the last call's: DPT runs the tower without prompts first
    n = len(method.clip.visual.positional_embedding)  # class token and patches; prompts stand behind them
    response = weights[:, :, 1:n, n:].mean(dim=1).mT  # (B, P, N)
    if not response.shape[1]:
        raise UserError(f"{run.folder} has no visual prompts in its last layer.")
    for row, of_picture in zip(rows, response, strict=True):
        row += [(overlay(row[0][0], values), []) for values in of_picture]
    titles = ["picture", *(f"prompt {number}" for number in range(1, len(rows[0])))]
    draw_sheet(titles, rows, run.folder / "prompt_attention.png")


@torch.no_grad()
def draw_features(run, names, root):
    """RUN/features.png: test features as points, the classifier's vectors as lines, for zero-shot CLIP and the run.

    As Fig. 2 of UPT. All are unit vectors, less the mean of their kind, along the two principal components of the image
    features. Points and lines are scaled separately. Var_v and Var_t are UPT's, of these classes.
    """
    known = run.method.classnames
    if len(names) > 10 or not set(names) <= set(known):
        raise UserError(f"--features takes up to ten of the classes {shortened(known)}.")
    labels = [known.index(name) for name in names] or list(range(min(10, len(known))))
    bench = data.load(run.saved["data_path"] or run.saved["data"], root, shots=0)
    items = [(path, labels.index(label)) for path, label in bench.test if label in labels]
    if not items:
        raise UserError(f"{bench.name} has no test pictures of these classes: name others.")
    batches = data.plain_batches(items, run.method.clip, run.machine.device, run.machine.workers, bench.own)
    titles = ["zero-shot", label_of(run.settings)]
    picture, panels = draw_panels(titles, [known[label] for label in labels], height=WIDTH)
    for method, panel in zip((zero_shot_of(run.method), run.method), panels, strict=True):
        with run.machine.autocast():
            text = method.encode_text()
            images = torch.cat([method.encode_image(images, text) for images, _ in batches])
        images, text = F.normalize(images.float(), dim=-1), F.normalize(text[labels].float(), dim=-1)
        classes = torch.tensor([n for _, n in items], device=images.device)
        variances = f"Var_v {intra_class_variance(images, classes):.3f}, Var_t {inter_class_variance(text):.3f}"
        images, text = images - images.mean(dim=0), text - text.mean(dim=0)
        plane = torch.linalg.svd(images.T @ images).Vh[:2].T  # (E, 2), also of a single picture
        radius, middle = WIDTH / 2 - 20, torch.tensor([panel.left + WIDTH / 2, panel.top + WIDTH / 2])
        points, ends = ((radius * x / x.norm(dim=1).max().clamp(min=1e-9)).cpu() + middle
                        for x in (images @ plane, text @ plane))  # a class alone lies in the middle
        for point, (_, n) in zip(points.tolist(), items, strict=True):
            draw_line(panel.pen, [tuple(point)], n, size=5)
        for n, end in enumerate(ends.tolist()):
            line = [tuple(middle.tolist()), tuple(end)]
            panel.pen.line(line, "white", 12)  # a rim, so that it can be seen among the points
            panel.pen.line(line, COLOURS[n % 7], 6)
            panel.pen.regular_polygon((*end, 16), CORNERS[n % 3], fill=COLOURS[n % 7], outline="black")
        panel.write_below(panel.left + WIDTH / 2, variances)
    save_picture(run.folder / "features.png", picture)


# ---- Drawing ----


class Panel(NamedTuple):
    """A frame of WIDTH by `height` pixels in a drawing. It turns values into pixels."""

    pen: ImageDraw.ImageDraw
    left: int
    top: int
    height: int

    def draw_y_scale(self, values, name):
        """Lines and numbers that span these values. -> a function from a value to its y in pixels."""
        marks = round_numbers(values)

        def y(value):
            return self.top + self.height * (marks[-1] - value) / (marks[-1] - marks[0])

        for mark in marks:
            self.pen.line([(self.left, y(mark)), (self.left + WIDTH, y(mark))], "#dddddd", 2)
            write(self.pen, self.left - 12, y(mark), f"{mark:g}", "rm")
        write(self.pen, self.left - 80, self.top - 28, name)
        return y

    def draw_x_scale(self, values, name, for_names=0):
        """As draw_y_scale, from left to right. The first `for_names` pixels stay free for names."""
        marks = round_numbers(values)
        start, length = self.left + for_names, WIDTH - for_names - 60

        def x(value):
            return start + length * (value - marks[0]) / (marks[-1] - marks[0])

        for mark in marks:
            self.pen.line([(x(mark), self.top), (x(mark), self.top + self.height)], "#dddddd", 2)
            self.write_below(x(mark), f"{mark:g}")
        self.write_below(self.left + WIDTH / 2, name, line=2)
        return x

    def write_below(self, x, text, line=1):
        write(self.pen, x, self.top + self.height + 40 * line - 12, text, "mm")


def draw_panels(titles, legend, height=440):
    """-> a picture with an empty panel for each title, up to four in a row, and below them the lines of the legend."""
    across = min(len(titles), 4)
    bottom = math.ceil(len(titles) / across) * (height + 200)
    picture = Image.new("RGB", (max(across, 2) * (WIDTH + 140), bottom + 40 * len(legend) + 20), "white")
    pen, panels = ImageDraw.Draw(picture), []
    for i, title in enumerate(titles):
        panel = Panel(pen, i % across * (WIDTH + 140) + 100, i // across * (height + 200) + 100, height)
        pen.rectangle([panel.left, panel.top, panel.left + WIDTH, panel.top + height], outline="#dddddd", width=2)
        write(pen, panel.left + WIDTH / 2, panel.top - 68, title, "mm", WIDTH)
        panels.append(panel)
    for n, label in enumerate(legend):
        draw_line(pen, [(100, bottom + 40 * n + 20), (200, bottom + 40 * n + 20)], n)
        write(pen, 224, bottom + 40 * n + 20, label)
    return picture, panels


def round_numbers(values):
    """-> marks of a scale from below the smallest value to above the largest, at steps of 1, 2 or 5 times 10^n."""
    step = (max(values) - min(values) or 1) / 5
    power = 10 ** math.floor(math.log10(step))
    step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
    return [step * i for i in range(math.floor(min(values) / step), math.floor(max(values) / step) + 2)]


def write(pen, x, y, text, anchor="lm", room=10**6):
    """A text longer than `room` pixels loses its end. The font that comes with Pillow knows no accents."""
    font = ImageFont.load_default(26)
    text = shown = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    while shown and font.getlength(shown) > room:
        text = text[:-1]
        shown = text + "..."
    pen.text((x, y), shown, "black", font, anchor=anchor)


def draw_line(pen, points, n, size=8):
    """The n-th line through points: it has a colour and, for print and colour-blind readers, dashes and markers."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / DASHES[n % 4])) if DASHES[n % 4] else 1
        for i in range(0, steps, 2):
            ends = [(x0 + (x1 - x0) * t / steps, y0 + (y1 - y0) * t / steps) for t in (i, i + 1)]
            pen.line(ends, COLOURS[n % 7], 4)
    for x, y in points:
        pen.regular_polygon((x, y, size), CORNERS[n % 3], fill=COLOURS[n % 7])


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
                write(pen, i * width + 15, top + j * height + SIDE + 20 + 32 * k, line, room=SIDE + 25)
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
