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
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

import data
import train
from clip_min import Method, UserError, preprocess
from support import attention, charts
from support.benchmarks import identify, published, quoted
from support.changes import find_moved, load_again
from support.checks import without_trained
from support.console import exit_status, show, start
from support.folders import SUFFIXES, pictures_below, shortened
from support.machine import Machine, choose_machine
from support.output import loss_bars, print_table, save_csv, save_picture, save_tensor
from support.results import label_of, nearest_words, read_finished, settings_of
from support.runs import read_prompts
from support.scores import HEAD, score
from support.settings import Settings, above
from support.summary import Summary
from upt import inter_class_variance, intra_class_variance


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
    add("--data", metavar="PATH", help="where the run's own pictures are now (default: where they were)")
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
    with_features = args.features is not None  # without class names it is an empty list
    asked = args.mistakes, args.predict, args.eval_on, args.export, args.attention, args.prompt_attention, with_features
    if (args.csv or args.threshold) and not args.predict:
        raise UserError("--csv and --threshold are for --predict: give it, too.")
    if (args.csv or args.export) and len(args.runs) > 1:
        raise UserError("--csv and --export write one file: name one run.")
    if (any(asked) or args.data) and not args.runs:
        raise UserError("Name the folder of a finished run first, such as runs/shapes/coop/tiny_16shot_seed1.")
    if not args.runs:
        summarise(Path(args.out))
    runs = [open_run(Path(folder), args.device, args.data) for folder in args.runs]
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
        if args.export:
            export(run, Path(args.export))
        if args.prompt_attention:
            draw_prompt_attention(run, args.prompt_attention)
        if with_features:
            draw_features(run, args.features, args.root)


def open_run(folder, device, moved_to=None):
    saved, method = read_prompts(folder), train.load_run(folder, device)
    saved["data_path"] = find_moved(folder, saved, moved_to)
    try:
        settings, machine = settings_of(saved), choose_machine(device, saved["precision"], workers=None)
        label_of(settings)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'prompts.pt'} has a setting that is none ({error!r}): train again.") from error
    return Run(folder, settings, saved, method, machine)


# ---- All runs ----


def summarise(out):
    """Print the runs under `out` as a Markdown table. Write summary.csv and the charts of accuracies and gains."""
    summary = Summary(out, train.METHODS["zeroshot"].default_options())
    print_table("Accuracy in percent; of several seeds: mean ± standard deviation (number of seeds)", *summary.table())
    save_csv(out / "summary.csv", summary.csv_lines())
    curves, gains = summary.curves(), summary.gains()
    if not curves:  # all are runs of zero-shot CLIP
        return
    try:
        save_picture(out / "summary.png", charts.draw_curves(curves).savefig)
        save_picture(out / "gains.png", charts.draw_gains(gains).savefig)
        if summary.variances.keys() & curves.keys():
            save_picture(out / "variances.png", charts.draw_variances(gains, summary.variances).savefig)
    except charts.MissingMatplotlib as missing:
        print(f"note: {missing}", file=sys.stderr)


# ---- One run ----


def read_run(run):
    return read_finished(run.folder, run.saved["classnames"], train.METHODS["zeroshot"].default_options())


def describe(run):
    """Print settings, accuracies, worst classes, confusions and the words near the contexts; write RUN/report.csv."""
    (zero_shot, *entries), result, predictions = read_run(run)
    for name, value in vars(run.settings).items():
        print(f"{name:13} {value}")
    is_zero_shot = zero_shot.row == entries[0].row  # then both say the same
    for entry in entries if is_zero_shot else [zero_shot, *entries]:
        print(f"accuracy      {entry.accuracy:.2f} % {entry.column}, {entry.row.method}{quoted(entry.papers)}")

    scores = score(predictions)
    print(f"balanced      {scores.balanced:.2f} %, the mean over the classes")
    print(f"macro F1      {scores.macro_f1:.2f} %, the mean of F1 over the classes")
    if result["losses"]:
        print(f"loss          {loss_bars(result['losses'])}")
    print_table("The worst classes", HEAD, scores.classes[:10])
    print_table("The most frequent confusions", ["class", "taken for", "times"], scores.confused[:10])

    lines = scores.csv_lines()
    for n, words in enumerate(nearest_words(run.method), 1):
        lines += [("context", n, word, distance) for word, distance in words]
        if n <= 16:  # with contexts for each class there are many
            print(f"context {n:<5} {', '.join(f'{word} ({distance:.3f})' for word, distance in words)}")
    save_csv(run.folder / "report.csv", lines)


def draw_mistakes(run, count, root):
    """RUN/mistakes.png: the test pictures whose wrong class had the highest probability."""
    bench = load_again(run.folder, run.saved, root)
    _, _, predictions = read_run(run)
    wrong = [row for row in predictions if row["class"] != row["predicted class"]
             and (bench.folder / row["picture"]).exists()]  # those that are gone were named
    if not wrong:
        raise UserError(f"{run.folder} made no mistake on its test pictures.")
    shown = []
    for row in sorted(wrong, key=lambda row: -row["probability"])[:count]:
        picture = data.read(bench.folder / row["picture"], bench.own)
        answer = f"{row['probability']:.0%} {row['predicted class']}"
        shown.append((picture, [Path(row["picture"]).name, f"true: {row['class']}", answer]))
        print(f"{row['picture']}: {row['class']}, predicted: {answer}")
    sheet = charts.draw_sheet([], [shown[i : i + 5] for i in range(0, len(shown), 5)])
    save_picture(run.folder / "mistakes.png", sheet.save)


def predict(run, paths, csv_file, threshold):
    """Print the five likeliest classes of pictures and of folders of pictures. -> the pictures that cannot be read.

    Where the likeliest class is below the threshold, every class is called none.
    """
    files = []
    for path in map(Path, paths):
        inside = pictures_below(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"There is no picture in {path}: choose among files of {', '.join(SUFFIXES)}.")
        files += inside
    answers = likeliest_classes(run, files)
    show("", keep=True)  # the end of the live line
    rows = [["picture", *(f"{what} {n}" for n in range(1, 6) for what in ("class", "probability"))]]
    for file, answer in answers:
        is_sure = answer[0][1] >= threshold
        answer = [(name if is_sure else "none", f"{p:.4f}") for name, p in answer]
        print(f"{file}: {', '.join(f'{name} {p}' for name, p in answer)}")
        rows.append([file, *(cell for pair in answer for cell in pair)])
    if csv_file:
        save_csv(Path(csv_file), rows)
    return set(files) - {file for file, _ in answers}


class NewPictures(data.Pictures):
    """Pictures to predict, each with its number. One that cannot be read is named and gets the number -1."""

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return self.transform(Image.new("RGB", (1, 1))), -1


@torch.no_grad()
def likeliest_classes(run, files):
    """-> [(file, [(class, probability), ...]), ...], the five likeliest classes of every file that can be read."""
    method, machine, answers = run.method, run.machine, []
    transform = preprocess(method.clip.visual.resolution)
    pictures = NewPictures([(file, number) for number, file in enumerate(files)], transform, own=True)
    with machine.autocast():
        text = method.encode_text()
        for images, numbers in data.Batches(pictures, 100, machine.device, machine.workers):
            probability = method(images, text).float().softmax(dim=-1)  # (B, K)
            best, classes = probability.topk(min(5, len(method.classnames)))
            for number, values, found in zip(numbers.tolist(), best.tolist(), classes.tolist(), strict=True):
                if number >= 0:
                    answer = [(method.classnames[i], p) for i, p in zip(found, values, strict=True)]
                    answers.append((files[number], answer))
    return answers


def evaluate_on(run, name, root):
    """Print the accuracy of a trained run on a data set: on its own again, or on another one."""
    _, path = identify(name)
    is_other_folder = path not in ("", run.saved["data_path"])  # all of its pictures are tested
    target = data.load(name, root, shots=0, whole=is_other_folder)
    target = without_trained(target, run.saved["train"], run.saved["data_path"])
    evaluation = train.evaluate_on(run.method, target, run.saved["class_ids"], run.machine)
    papers = [] if target.own else published(run.settings, target.name)
    print(f"{target.name:13} {evaluation.accuracy:.2f} % of {len(target.test)} test pictures{quoted(papers)}")


@torch.no_grad()
def export(run, path):
    """Write the classifier (K, E), unit rows, and what else a program needs that has the same CLIP, as safetensors."""
    method, kind = run.method, type(run.method)
    if kind.encode_image is not Method.encode_image or kind.forward is not Method.forward:
        raise UserError(f"{run.settings.method} is more than CLIP with another classifier, so other programs cannot "
                        "use it: use --predict, or train.load_run in Python.")
    classifier = F.normalize(method.encode_text().float(), dim=-1)
    notes = {"classnames": json.dumps(method.classnames), "templates": json.dumps(method.templates),
             "logit_scale": str(method.clip.logit_scale.exp().item()), "backbone": run.settings.backbone}
    save_tensor(path, "classifier", classifier, notes)


# ---- Pictures of one run ----


def zero_shot_of(method):
    return Method(method.clip, method.classnames, method.templates)


@torch.no_grad()
def draw_attention(runs, files):
    """RUN/attention.png: for each picture the maps of zero-shot CLIP and of the runs."""
    titles, rows = ["picture"], attention.read_pictures(files, runs[0].method)[1]
    columns = [("zero-shot", zero_shot_of(runs[0].method), runs[0])]
    columns += [(label_of(run.settings), run.method, run) for run in runs]
    for title, method, run in columns:
        images, _ = attention.read_pictures(files, run.method)  # runs may have different backbones
        with run.machine.autocast():
            best, classes = method(images).float().softmax(dim=-1).max(dim=-1)
            maps = attention.maps(method, images)
        answers = [f"{p:.0%} {method.classnames[i]}" for i, p in zip(classes.tolist(), best.tolist(), strict=True)]
        for n, (name, values) in enumerate(maps.items()):
            titles.append(title if n == 0 else "")
            for i, row in enumerate(rows):
                row.append((charts.overlay(row[0][0], values[i]), [name if n else answers[i]]))
    save_picture(runs[0].folder / "attention.png", charts.draw_sheet(titles, rows).save)


@torch.no_grad()
def draw_prompt_attention(run, files):
    """RUN/prompt_attention.png: which patches respond to each visual prompt of the last layer, as UPT's Fig. 6.

    Deep prompts are keys and values and have no query, so they look at nothing themselves. What is shown is the share
    of its attention that each patch would give to the prompt, the mean of the heads.
    """
    images, rows = attention.read_pictures(files, run.method)
    with run.machine.autocast():
        weights = attention.weights(run.method, images)  # (B, H, T, T+P)
    n = len(run.method.clip.visual.positional_embedding)  # class token and patches; prompts stand behind them
    response = weights[:, :, 1:n, n:].mean(dim=1).mT  # (B, prompts, patches)
    if not response.shape[1]:
        raise UserError(f"{run.folder} has no visual prompts in its last layer.")
    for row, of_picture in zip(rows, response, strict=True):
        row += [(charts.overlay(row[0][0], values), []) for values in of_picture]
    titles = ["picture", *(f"prompt {number}" for number in range(1, len(rows[0])))]
    save_picture(run.folder / "prompt_attention.png", charts.draw_sheet(titles, rows).save)


@torch.no_grad()
def draw_features(run, names, root):
    """RUN/features.png: test features as points, the classifier's vectors as lines, for zero-shot CLIP and the run.

    As Fig. 2 of UPT, whose Var_v and Var_t, of these classes, stand below.
    """
    charts.load_matplotlib()  # where it is missing, that is said before anything is computed
    known = run.method.classnames
    if len(names) > 10 or not set(names) <= set(known):
        raise UserError(f"--features takes up to ten of the classes {shortened(known)}.")
    labels = [known.index(name) for name in names] or list(range(min(10, len(known))))
    bench = load_again(run.folder, run.saved, root)
    items = [(path, labels.index(label)) for path, label in bench.test if label in labels]
    if not items:
        raise UserError(f"{bench.name} has no test pictures of these classes: name others.")
    classes, panels = torch.tensor([n for _, n in items]), []
    batches = data.plain_batches(items, run.method.clip, run.machine.device, run.machine.workers, bench.own)
    for title, method in ("zero-shot", zero_shot_of(run.method)), (label_of(run.settings), run.method):
        with run.machine.autocast():
            text = method.encode_text()
            images = torch.cat([method.encode_image(images, text) for images, _ in batches])
        images, text = F.normalize(images.float(), dim=-1).cpu(), F.normalize(text[labels].float(), dim=-1).cpu()
        caption = f"Var_v {intra_class_variance(images, classes):.3f}, Var_t {inter_class_variance(text):.3f}"
        panels.append((title, caption, images, text))
    chart = charts.draw_features(panels, classes, [known[label] for label in labels])
    save_picture(run.folder / "features.png", chart.savefig)


if __name__ == "__main__":
    start(main)
