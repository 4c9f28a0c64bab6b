"""Folders of pictures: a user's own, lists in CoOp's schema, and what any data set needs to be found and read.

data.load() calls read_folders() and read_split(); support/benchmarks.py and support/world.py build on the rest. Every
fault of a folder or a list ends in one sentence that names the file and what to do.
"""

import functools
import glob
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from torch.utils.data import get_worker_info

from clip_min import UserError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SUFFIXES += (".avif",) if ".avif" in Image.registered_extensions() else ()  # not in every Pillow
OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini")


def shortened(names):
    """-> "a, b, c, d, e and 317 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@functools.cache  # each message once, also when several seeds load the same data
def warn(message):
    worker = get_worker_info()
    if (worker is None or worker.id == 0) and os.environ.get("RANK", "0") == "0":  # the first process speaks for all
        print(f"warning: {message}", file=sys.stderr)


def read_split(file):
    """A list in CoOp's schema, checked. -> split, class names."""
    split, names = {"train": [], "val": [], "test": []}, {}
    try:
        lists = json.loads(file.read_text("utf-8-sig"))
        rows = [(part, *row) for part in split for row in lists.get(part, [])]
        for part, path, label, name in rows:
            if not (isinstance(path, str) and type(label) is int and isinstance(name, str)):
                raise TypeError(f"found {[path, label, name]}")
            steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".")]
            if ".." in steps:
                raise ValueError(f"{path} leaves the image folder")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} has two names, {names[label]} and {name}")
            split[part].append(("/".join(steps), label))
        trained, tests = {label for _, label in split["train"]}, len(split["test"])
        if not tests or trained != set(range(len(names))):
            raise ValueError(f"of {len(names)} labels {len(trained)} have training pictures, and {tests} test pictures "
                             "are there; labels count from 0 without a gap, and each has training pictures")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is no {{"train": [[path, label, name], ...], ...}} ({error}): mend it') from error
    return split, [names[label] for label in range(len(names))]


def read_folders(folder, whole=False):
    """Class folders, or folders train and test of class folders; classnames.txt. -> split, class names."""
    folders = contents(folder)[0]
    spellings = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
    places = {part: [name for name in folders if name.lower() in spellings[part]] for part in spellings}
    if (places["train"] and places["test"]) or (folders and sum(map(len, places.values())) == len(folders)):
        needed = ("test",) if whole else ("train", "test")
        for part, names in places.items():
            if len(names) > 1 or (part in needed and not names):
                raise UserError(f"{folder} must have one folder {part}, found {' and '.join(names) or 'none'}")
        split, classes = read_parts(folder, {part: f"{places[part][0]}/" for part in needed})
    else:
        split, classes = read_parts(folder, {"test": ""})
        if not whole:
            split = divide(folder, split["test"])

    names, file = {name: name for name in classes}, folder / "classnames.txt"
    content = file.read_bytes() if file.exists() else b""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # PowerShell's > and others
    for line in filter(str.strip, content.decode(encoding).splitlines()):
        fitting = [name for name in names if line.startswith(name) and line[len(name) :].startswith((" ", "\t", ","))]
        if not fitting:
            raise UserError(f"{file} has the line {line!r}: begin it with the name of a class folder and a blank")
        name = max(fitting, key=len)  # a folder's name may have blanks of its own
        names[name] = line[len(name) + 1 :].strip()
    return split, list(names.values())


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


def read_parts(folder, places, order=None):
    """{"train": "train/", "test": "val/"}: folders of the same class folders. -> split, class folders by label."""
    found = {part: class_folders(folder / place) for part, place in places.items()}
    for part, other in itertools.permutations(places, 2):
        if lacking := [name for name in found[other] if name not in found[part]]:
            raise UserError(f"{folder / places[part]} lacks class folders that {folder / places[other]} has, "
                            f"{shortened(lacking)}: add them")
    names, split = sorted(found["test"], key=order), {"train": [], "val": [], "test": []}
    for part, place in places.items():
        split[part] = [(f"{place}{name}/{file}", label)
                       for label, name in enumerate(names) for file in found[part][name]]
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


def pictures_below(folder):
    """-> the paths of all pictures in a folder and in the folders inside it, by the same rule as in training."""
    folders, pictures, _ = contents(folder)
    inside = [path for name in folders for path in pictures_below(Path(folder, name))]
    return sorted(inside + [Path(folder, name) for name in pictures])


def find_files(folder, split):
    """The split with full paths, each file known to be there."""
    missing = [path for items in split.values() for path, _ in items if not os.path.exists(f"{folder}/{path}")]
    if missing:
        raise UserError(f"{len(missing)} of {sum(map(len, split.values()))} pictures are not in {folder}: "
                        f"{shortened(missing)}: add them, in the spelling of the list")
    return {part: [(f"{folder}/{path}", label) for path, label in items] for part, items in split.items()}


def clear_leftovers(folder):
    """Remove the temporary folders beside `folder` that a killed process left behind more than an hour ago."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        with suppress(FileNotFoundError):  # another process may remove it, too
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)


@contextmanager
def working_folder(folder, inside):
    """Make a folder whole or not at all: in a temporary one beside it, whose folder `inside` is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        yield Path(temporary)
        try:
            Path(temporary, inside).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
