"""What finished runs hold: result.json and predictions.csv, read back and checked; the words near what was learned.

report.py calls this for its report of a run, support/summary.py for the table of all runs. A file that is no result of
train.py never ends in a traceback: read_result() names it and leaves it out, read_finished() ends in one sentence.
"""

import csv
import json
import math
import sys
from dataclasses import fields, replace
from typing import NamedTuple

import torch

from clip_min import END, START, UserError, vocabulary
from support.benchmarks import BENCHMARKS, Source, published
from support.settings import OTHER_FLAGS, Settings

ZERO_SHOT, ALL = "0", "all"  # what may stand for the shots of a row, beside "1", "2", ...


class Row(NamedTuple):
    """A row of the table: runs that differ in data and seed only."""

    method: str  # with what was changed of its defaults
    backbone: str
    shots: str  # labelled pictures per class: "0" is zero-shot CLIP, "all" is a run with all pictures

    @property
    def curve(self):
        """The name of the curve of which the row is a point."""
        return f"{self.method}, {self.backbone}"


class Entry(NamedTuple):
    """An accuracy, and its place in the table."""

    row: Row
    column: str  # a data set, "data set → shifted data", or "data set: base" and two more of --base-to-new
    accuracy: float
    papers: list  # [(accuracy, source), ...]


def settings_of(saved):
    """What result.json or prompts.pt holds -> Settings."""
    settings = Settings(**{field.name: saved[field.name] for field in fields(Settings)})
    for name in "options", "recipe", "changed":
        if not isinstance(getattr(settings, name), dict):
            raise TypeError(f"{name} is no dictionary")
    return settings


def label_of(settings):
    """The method and what was changed of its defaults, such as "upt mode=mlp"."""
    return " ".join([settings.method, *(f"{key}={value}" for key, value in settings.changed.items())])


def completed(result):
    """What a result.json holds -> with what those of earlier versions lack, or an error where it is another thing."""
    result = dict(variance={}, made_of={}) | result
    made_of = dict(shifts={}) | result["made_of"]
    return result | dict(shifts={**result["shifts"]}, made_of=made_of | dict(shifts={**made_of["shifts"]}))


def read_result(path, zero_shot_options):
    """A result.json -> its entries and all that it holds, or None, after a warning, if it is none of train.py.

    The first entry is zero-shot CLIP's, the second the run's, the others those of its shifts or new classes.
    zero_shot_options: the default options of the method zeroshot.
    """
    try:
        result = completed(json.loads(path.read_text("utf-8")))
        entries = entries_of(settings_of(result), result, zero_shot_options)
        is_finite = math.isfinite(sum(result["losses"]) + sum(result["variance"].get("before", {}).values()))
        if not is_finite or not all(0 <= entry.accuracy <= 100 for entry in entries):
            raise ValueError("an accuracy is not from 0 to 100, or a loss not finite")
        return entries, result
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:  # any file
        print(f"warning: {path} is left out, it is no result of train.py ({type(error).__name__}: {error})",
              file=sys.stderr)


def entries_of(settings, result, zero_shot_options):
    column, _, name = settings.folder.parts  # they tell apart a user's data, and weights, that are called alike
    backbone = name.rsplit("_", 2)[0] if settings.backbone_path else settings.backbone
    shots = ALL if settings.shots == 0 else str(int(settings.shots))
    row = Row(label_of(settings), backbone, ZERO_SHOT if settings.method == "zeroshot" else shots)
    label, papers = describe_zero_shot(settings, zero_shot_options)
    halves = result.get("base_to_new", {})
    main = f"{column}: base" if halves else column
    entries = [Entry(Row(label, backbone, ZERO_SHOT), main, result["zero_shot"], papers),
               Entry(row, main, result["accuracy"], published(settings, settings.data))]
    for shift, accuracy in result["shifts"].items():
        entries.append(Entry(row, f"{column} → {shift}", accuracy, published(settings, shift)))
    if halves:
        entries += [Entry(row, f"{column}: new", halves["new"], []),
                    Entry(row, f"{column}: harmonic mean", halves["harmonic_mean"], [])]
    return entries


def describe_zero_shot(settings, zero_shot_options):
    """-> the label of the zero-shot CLIP that a run begins with, and the papers' numbers for it."""
    # What was changed beside the method's options and recipe, such as the templates, changes zero-shot CLIP, too.
    changed = {key: value for key, value in settings.changed.items() if key in OTHER_FLAGS and key != "prompts"}
    start = replace(settings, method="zeroshot", options=zero_shot_options, changed=changed)
    is_benchmark = settings.data in BENCHMARKS and not settings.data_path
    usual = BENCHMARKS[settings.data].template if is_benchmark else Source.template
    if settings.templates in ([], [usual]) or "template" in changed:
        return label_of(start), published(start, settings.data)
    return f"{label_of(start)}, templates of {settings.method}", []  # those of its recipe


def read_finished(folder, classnames, zero_shot_options):
    """A run's folder -> what read_result() gives of it, and what read_predictions() gives, or UserError."""
    found = read_result(folder / "result.json", zero_shot_options)
    if not found:
        raise UserError(f"{folder} has no result.json of train.py: train again.")
    entries, result = found
    return entries, result, read_predictions(folder / "predictions.csv", classnames, result.get("test_images"))


def read_predictions(path, classnames, count):
    """A predictions.csv of `count` pictures -> a dictionary for each: picture, class, predicted class, probability."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [row | {"probability": float(row["probability"])} for row in csv.DictReader(file)]
        are_known = {row[column] for row in rows for column in ("class", "predicted class")} <= {*classnames}
        are_whole = all(row["picture"] and 0 <= row["probability"] <= 1 for row in rows)
        if len(rows) != count or not are_known or not are_whole:
            raise ValueError(f"{len(rows)} rows, or one without a known class or a probability")
        return rows
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the predictions of a run ({error}): train again.") from error


@torch.no_grad()
def nearest_words(method):
    """-> for each context vector the three nearest tokens and their Euclidean distances, as in CoOp's Table 4."""
    contexts = method.contexts()
    if contexts is None:
        return []
    byte_ids, merges = vocabulary()
    words = {START: b"<start>", END: b"<end>"}
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
