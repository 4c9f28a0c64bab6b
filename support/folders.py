"""Folders of pictures: what any data set needs to be found, read and divided, and the warnings that go with it.

support/own.py, support/lists.py and support/benchmarks.py build on it; data.load() calls find_files(), and report.py
pictures_below(). Every fault of a folder ends in one sentence that names it and what to do.

    split    {"train": [(path in the folder, label), ...], "val": ..., "test": ...}; each of the three is a subset
"""

import functools
import hashlib
import itertools
import os
import sys
from collections import Counter
from pathlib import Path

from torch.utils.data import get_worker_info

from clip_min import UserError
from support.files import readable
from support.formats import ADVICE, SUFFIXES, needs_pillow_heif

OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini")
SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def shortened(names):
    """-> "a, b, c, d, e and 317 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@functools.cache  # each message once, also when several seeds load the same data
def warn(message):
    worker = get_worker_info()
    if (worker is None or worker.id == 0) and os.environ.get("RANK", "0") == "0":  # the first process speaks for all
        print(f"warning: {message}", file=sys.stderr)


def divide(folder, items):
    """Split each class: 70 % of its pictures, at least one, are for training; the rest, at least one, are tested.

    The pictures are ordered by a hash of their path. One that is added later moves at most one other across the border.
    """
    split = {"train": [], "val": [], "test": []}
    for _, group in itertools.groupby(items, key=lambda item: item[1]):
        group = sorted(group, key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())
        if len(group) < 2:
            raise UserError(f"{folder / group[0][0]} is the one picture of its class: add one, to train and to test")
        border = min(max(round(0.7 * len(group)), 1), len(group) - 1)
        split["train"] += group[:border]
        split["test"] += group[border:]
    return split


def read_subsets(folder, places, order=None, may_lack=()):
    """places: {"train": "train/", "test": "val/"}, with the same class folders -> split, class folders by label.

    Of the subsets in `may_lack` class folders may be missing or empty.
    """
    found = {subset: class_folders(folder / place, subset in may_lack) for subset, place in places.items()}
    return number_classes(folder, places, found, order, may_lack)


def number_classes(folder, places, found, order=None, may_lack=()):
    """found: for each place {class: paths in it} -> split, classes by label. Those that a place lacks are named."""
    for subset, other in itertools.permutations(places, 2):
        lacking = [name for name in found[other] if name not in found[subset]]
        if lacking and subset not in may_lack:
            raise UserError(f"{folder / places[subset]} lacks class folders that {folder / places[other]} has, "
                            f"{shortened(lacking)}: add them")
    names, split = sorted(set().union(*found.values()), key=order), {"train": [], "val": [], "test": []}
    for subset, place in places.items():
        split[subset] = [(f"{place}{path}", label)
                         for label, name in enumerate(names) for path in found[subset].get(name, [])]
    return split, names


def class_folders(folder, may_be_empty=False):
    """-> {class folder: its pictures' paths in `folder`}. What else lies in the folders is counted in one line."""
    folders, stray, _ = contents(folder)
    if not folders:
        raise UserError(f"{folder} has {len(stray)} pictures and no class folders: put the pictures of each class into "
                        f"a folder of its own, name their classes in {folder / 'labels.csv'} or, if this is one of the "
                        f"class folders, give {folder.parent}")
    classes, left_out, unread = {}, Counter({"beside the class folders": len(stray)}), False
    for name in folders:
        inner, pictures, others = contents(folder / name)
        if not pictures and (inner or not may_be_empty):
            advice = ADVICE if needs_pillow_heif(others) else "add some or remove it"
            if inner:
                advice = f"if {shortened(inner)} are classes, give {folder / name}, else move its pictures up into it"
            raise UserError(f"{folder / name} has no pictures ({' '.join(SUFFIXES)}): {advice}")
        classes[name] = [f"{name}/{picture}" for picture in pictures]
        left_out += Counter(["folders" for _ in inner] + [Path(other).suffix.lower() or "files" for other in others])
        unread = unread or needs_pillow_heif(others)
    if left_out:
        kinds = shortened([f"{count} {kind}" for kind, count in left_out.most_common()])
        warn(f"left out in {folder}: {kinds}" + (f" ({ADVICE})" if unread else ""))
    return classes


def contents(folder):
    """-> the names of a folder's subfolders, of its pictures, and of its other files. Links are followed.

    A link that leads nowhere stops the run: what it stands for, a class or a picture, would be missing without a word.
    """
    folders, files, broken = entries(folder)
    if broken:
        raise UserError(f"{folder / broken[0]} is a link to {os.readlink(folder / broken[0])}, where nothing is: mend "
                        "or remove it")
    pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
    return folders, pictures, [name for name in files if not name.lower().endswith(SUFFIXES)]


def entries(folder):
    """-> the names of a folder's subfolders, of its files, and of links that lead nowhere."""
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".") and entry.name not in OF_SYSTEMS]
    folders = sorted(entry.name for entry in seen if entry.is_dir())  # the order on a disk is chance
    files = sorted(entry.name for entry in seen if entry.is_file())
    others = [entry for entry in seen if not entry.is_dir() and not entry.is_file()]
    return folders, files, sorted(entry.name for entry in others if entry.is_symlink())


def pictures_below(folder, around=()):
    """-> the paths of the pictures in a folder and in its subfolders, sorted, by the same rule as for training.

    around: the folders in which this one lies. A link back to one of them is not followed: it would go on for ever.
    A link that leads nowhere is among the pictures, so that it is named as one that cannot be read.
    """
    folder, around = Path(folder), (*around, os.path.realpath(folder))
    with readable(folder):
        folders, files, broken = entries(folder)
    if needs_pillow_heif(files):
        warn(f"phones' pictures in {folder} are not read: {ADVICE}")
    found = [folder / name for name in files if name.lower().endswith(SUFFIXES)] + [folder / name for name in broken]
    for name in folders:
        if os.path.realpath(folder / name) not in around:
            found += pictures_below(folder / name, around)
    return sorted(found)


def find_files(folder, split):
    """The split with full paths, each file known to be there."""
    missing = [path for items in split.values() for path, _ in items if not os.path.exists(f"{folder}/{path}")]
    if missing:
        raise UserError(f"{len(missing)} of {sum(map(len, split.values()))} pictures are not in {folder}: "
                        f"{shortened(missing)}: add them, in the spelling of the list")
    return {subset: [(f"{folder}/{path}", label) for path, label in items] for subset, items in split.items()}
