"""Folders of pictures: a user's own, lists in CoOp's schema, and what any data set needs to be found and read.

    folder/<class>/*.jpg                 a hash of the path chooses 70 % of each class for training, the rest is tested
    folder/{train,test}/<class>/*.jpg    taken as it stands; a folder val beside them is never read
    folder/split.json                    {"train": [["cats/1.jpg", 0, "cat"], ...], "val": ..., "test": ...}
    folder/classnames.txt                optional beside class folders; a line: <class folder> <readable name>

data.load() calls read_folder() and find_files(), report.py pictures_below(); support/benchmarks.py and support/world.py
build on the rest. Every fault of a folder or a list ends in one sentence that names the file and what to do. A split is
{"train": [(path in the folder, label), ...], "val": ..., "test": ...}; each of the three is a subset.
"""

import functools
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from torch.utils.data import get_worker_info

from clip_min import UserError
from support.files import readable

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SUFFIXES += (".avif",) if ".avif" in Image.registered_extensions() else ()  # not in every Pillow
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


def read_folder(folder, whole=False):
    """A user's folder, in one of the four forms above -> split, class names.

    With `whole` it is only tested: all pictures of class folders are test pictures, and test needs no train beside it.
    """
    if (folder / "split.json").exists():
        return read_split(folder / "split.json")
    places = find_subsets(folder, whole)
    if places:
        split, classes = read_subsets(folder, places)
    else:
        split, classes = read_subsets(folder, {"test": ""})
        if not whole:
            split = divide(folder, split["test"])
    return split, read_classnames(folder / "classnames.txt", classes)


def find_subsets(folder, whole):
    """-> {"train": "Train/", "test": "testing/"}, or {} where the folders are classes, of which one may be "train"."""
    folders = contents(folder)[0]
    found = {subset: [name for name in folders if name.lower() in SPELLINGS[subset]] for subset in SPELLINGS}
    nothing_else = folders and sum(map(len, found.values())) == len(folders)
    if not (found["train"] and found["test"]) and not nothing_else:
        return {}
    needed = ("test",) if whole else ("train", "test")
    for subset, names in found.items():
        if len(names) > 1 or (subset in needed and not names):
            raise UserError(f"{folder} must have one folder {subset}, found {' and '.join(names) or 'none'}")
    return {subset: f"{found[subset][0]}/" for subset in needed}


def read_classnames(file, classes):
    """-> the names that classnames.txt gives the class folders; where it says nothing, their own."""
    names = {name: name for name in classes}
    content = file.read_bytes() if file.exists() else b""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # PowerShell's > and others
    for line in filter(str.strip, content.decode(encoding).splitlines()):
        fitting = [name for name in names if line.startswith(name) and line[len(name) :].startswith((" ", "\t", ","))]
        if not fitting:
            raise UserError(f"{file} has the line {line!r}: begin it with the name of a class folder and a blank")
        name = max(fitting, key=len)  # a folder's name may have blanks of its own
        names[name] = line[len(name) + 1 :].strip()
    return list(names.values())


def read_split(file):
    """A list in CoOp's schema, checked. -> split, class names."""
    split, names = {"train": [], "val": [], "test": []}, {}
    try:
        lists = json.loads(file.read_text("utf-8-sig"))
        rows = [(subset, *row) for subset in split for row in lists.get(subset, [])]
        for subset, path, label, name in rows:
            if not (isinstance(path, str) and type(label) is int and isinstance(name, str)):
                raise TypeError(f"found {[path, label, name]}")
            steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".")]
            if ".." in steps:
                raise ValueError(f"{path} leaves the image folder")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} has two names, {names[label]} and {name}")
            split[subset].append(("/".join(steps), label))
        trained, tests = {label for _, label in split["train"]}, len(split["test"])
        if not tests or trained != set(range(len(names))):
            raise ValueError(f"of {len(names)} labels {len(trained)} have training pictures, and {tests} test pictures "
                             "are there; labels count from 0 without a gap, and each has training pictures")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is no {{"train": [[path, label, name], ...], ...}} ({error}): mend it') from error
    return split, [names[label] for label in range(len(names))]


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


def read_subsets(folder, places, order=None):
    """places: {"train": "train/", "test": "val/"}, with the same class folders -> split, class folders by label."""
    found = {subset: class_folders(folder / place) for subset, place in places.items()}
    for subset, other in itertools.permutations(places, 2):
        lacking = [name for name in found[other] if name not in found[subset]]
        if lacking:
            raise UserError(f"{folder / places[subset]} lacks class folders that {folder / places[other]} has, "
                            f"{shortened(lacking)}: add them")
    names, split = sorted(found["test"], key=order), {"train": [], "val": [], "test": []}
    for subset, place in places.items():
        split[subset] = [(f"{place}{name}/{file}", label)
                         for label, name in enumerate(names) for file in found[subset][name]]
    return split, names


def class_folders(folder):
    """-> {class folder: its pictures}. What else lies in the folders is counted in one line."""
    folders, stray, _ = contents(folder)
    if not folders:
        raise UserError(f"{folder} has {len(stray)} pictures and no class folders: put the pictures of each class into "
                        f"a folder of its own or, if this is one of them, give {folder.parent}")
    classes, left_out = {}, Counter({"beside the class folders": len(stray)})
    for name in folders:
        inner, classes[name], others = contents(folder / name)
        if not classes[name]:
            advice = f"if {shortened(inner)} are classes, give {folder / name}" if inner else "add some or remove it"
            raise UserError(f"{folder / name} has no pictures ({' '.join(SUFFIXES)}): {advice}")
        left_out += Counter(["folders" for _ in inner] + [Path(other).suffix.lower() or "files" for other in others])
    if left_out:
        warn(f"left out in {folder}: {shortened([f'{count} {kind}' for kind, count in left_out.most_common()])}")
    return classes


def contents(folder):
    """-> the names of a folder's subfolders, of its pictures, and of its other files. Links are followed."""
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".") and entry.name not in OF_SYSTEMS]
    folders = sorted(entry.name for entry in seen if entry.is_dir())  # the order on a disk is chance
    files = sorted(entry.name for entry in seen if entry.is_file())
    pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
    return folders, pictures, [name for name in files if not name.lower().endswith(SUFFIXES)]


def pictures_below(folder, around=()):
    """-> the paths of the pictures in a folder and in its subfolders, sorted, by the same rule as for training.

    around: the folders in which this one lies. A link back to one of them is not followed: it would go on for ever.
    """
    folder, around = Path(folder), (*around, os.path.realpath(folder))
    with readable(folder):
        folders, pictures, _ = contents(folder)
    found = [folder / name for name in pictures]
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
