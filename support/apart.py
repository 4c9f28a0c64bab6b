"""Runs that must not be averaged: those of one data set or one backbone that were made of different things.

support/summary.py calls tell_apart() before it makes the table. Runs that were made before result.json had made_of are
one state of a user's own data or weights, and are taken to have what benchmarks and well-known weights have today.
"""

import sys

from support.identity import digest

EARLIER = "earlier"


def tell_apart(results):
    """[(folder, entries, result), ...] -> [(entries, result), ...], in which no row and column mean two things.

    Where runs of one data set were made of different classes or pictures, its column gets six characters more for each;
    where the weights of one name differ, the backbone does. A warning says so. The second value is the set of those
    columns.
    """
    columns, backbones = {}, {}  # what stands in the table -> {digest: the first run of it}
    for folder, entries, result in results:
        for entry in entries:
            columns.setdefault(entry.column, {}).setdefault(of_data(entry, result), folder)
            backbones.setdefault(entry.row.backbone, {}).setdefault(of_weights(result), folder)
    for what, names in ("classes or pictures", columns), ("weights", backbones):
        for name, runs in names.items():
            runs.pop(None, None)  # of before, of a benchmark or of well-known weights: they stay where they are
            if len(runs) > 1:
                shown = "; ".join(f"{found} such as {folder}" for found, folder in runs.items())
                print(f"warning: runs of {name} were made of different {what} and are shown apart ({shown}): repeat "
                      "the older ones with --again", file=sys.stderr)
    told, apart = [], set()
    for _, entries, result in results:
        of_run = []
        for entry in entries:
            column = with_digest(entry.column, of_data(entry, result), columns[entry.column])
            backbone = with_digest(entry.row.backbone, of_weights(result), backbones[entry.row.backbone])
            apart |= {column} - {entry.column}
            of_run.append(entry._replace(row=entry.row._replace(backbone=backbone), column=column))
        told.append((of_run, result))
    return told, apart


def of_data(entry, result):
    """-> six characters for the classes and pictures behind an entry; None for a benchmark's of a run of before."""
    made, shift = result["made_of"], entry.column.partition(" → ")[2]
    if "pictures" not in made:
        return EARLIER if result["data_path"] else None
    return digest([made.get("classes"), made["pictures"], made.get("shifts", {}).get(shift)])[:6]


def of_weights(result):
    """-> six characters for the weights of a run; None for those of a known name in a run of before."""
    if "weights" not in result["made_of"]:
        return EARLIER if result["backbone_path"] else None
    return str(result["made_of"]["weights"])[:6]


def with_digest(name, found, runs):
    return f"{name} ({found})" if found and len(runs) > 1 else name
