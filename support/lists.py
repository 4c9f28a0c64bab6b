"""Lists that say of which class a picture is: split.json in CoOp's schema, and a plain labels.csv or labels.tsv.

support/own.py reads both in a user's folder, and support/benchmarks.py CoOp's own with read_split(). A list that cannot
be understood ends in one sentence that names it and the line; pictures that it does not name are not used.
"""

import csv
import io
import json

from clip_min import UserError
from support.files import read_text
from support.folders import SPELLINGS, SUFFIXES, divide, pictures_below, shortened, warn

LISTS = ("labels.csv", "labels.tsv")
SUBSETS = {spelling: subset for subset, spellings in SPELLINGS.items() for spelling in spellings}


def read_split(file):
    """A list in CoOp's schema, checked. -> split, class names."""
    split, names = {"train": [], "val": [], "test": []}, {}
    try:
        lists = json.loads(file.read_text("utf-8-sig"))
        rows = [(subset, *row) for subset in split for row in lists.get(subset, [])]
        for subset, path, label, name in rows:
            if not (isinstance(path, str) and type(label) is int and isinstance(name, str)):
                raise TypeError(f"found {[path, label, name]}")
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} has two names, {names[label]} and {name}")
            split[subset].append((plain_path(path), label))
        split = with_tests(split, file)
        trained, tests = {label for _, label in split["train"]}, len(split["test"])
        if not tests or trained != set(range(len(names))):
            raise ValueError(f"of {len(names)} labels {len(trained)} have training pictures, and {tests} test pictures "
                             "are there; labels count from 0 without a gap, and each has training pictures")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is no {{"train": [[path, label, name], ...], ...}} ({error}): mend it') from error
    return split, [names[label] for label in range(len(names))]


def plain_path(path):
    """-> a path of a list with forward slashes, seen from the list's folder. One that leads out is a ValueError."""
    steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".")]
    if ".." in steps:
        raise ValueError(f"{path} leaves the image folder")
    return "/".join(steps)


def with_tests(split, file):
    """-> the split, where val stands for a test that is not there, as it does for many users of ImageFolder."""
    if split["val"] and not split["test"]:
        warn(f"{file} has no pictures for test: those of val are tested")
        split = split | {"val": [], "test": split["val"]}
    return split


# ---- labels.csv ----


def read_labels(file, whole=False):
    """A list with the columns picture and class and perhaps a third, train, val or test. -> split, sorted class names.

    Without a third column the classes are divided as class folders are. A list that is only tested is read `whole`: all
    of its pictures, or those of test, are test pictures.
    """
    rows = read_rows(file)
    has_parts, meaning = len(rows[0]) == 3, read_meaning(file, rows)
    classes, split = sorted({name for name, _ in meaning.values()}), {"train": [], "val": [], "test": []}
    label = {name: number for number, name in enumerate(classes)}
    for path, (name, subset) in meaning.items():
        split[subset].append((path, label[name]))
    if not has_parts and not whole:
        return divide(file.parent, sorted(split["test"], key=lambda item: item[1])), classes
    split = with_tests(split, file)
    if not split["test"]:
        raise UserError(f"{file} has no pictures for test: write test into the third column of some")
    if whole:
        return split | {"train": [], "val": []}, classes
    trained = {number for _, number in split["train"]}
    lacking = [name for name in classes if label[name] not in trained]
    if lacking:
        raise UserError(f"{file} has no training pictures of {shortened(lacking)}: add some, or remove the class")
    return split, classes


def read_meaning(file, rows):
    """-> {a picture's path: (its class, its subset)}. Where the list has no third column, the subset is test."""
    find = Finder(file.parent)
    is_header = not find.knows(rows[0][0]) and rows[0][1] not in [name for _, name, *_ in rows[1:]]
    if is_header:
        rows = rows[1:]
    if not any(find(picture) for picture, *_ in rows):
        first = " and ".join(rows[0]) if rows else "none"
        raise UserError(f"{file} names no picture of {file.parent}: its columns are picture, a path as seen from the "
                        f"list and spelled as on the disk, then class, found {first}")
    meaning = {}
    for picture, name, *part in rows:
        subset = SUBSETS.get(part[0].lower()) if part else "test"
        if not subset:
            raise UserError(f"{file} has {part[0]!r} in its third column, for {picture}: write train, val or test")
        try:
            path = find(picture) or plain_path(picture)
            if not name:
                raise ValueError(f"{picture} has no class")
            if meaning.setdefault(path, (name, subset)) != (name, subset):
                raise ValueError(f"{picture} has two classes or is in two subsets")
        except ValueError as error:
            raise UserError(f"{file} cannot be used ({error}): mend it") from error
    return meaning


def read_rows(file):
    """-> the rows of a list, of two cells each or of three each, separated by comma, semicolon or tab."""
    text, readings = read_text(file), []
    for delimiter in "\t;,":
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter)]
        except csv.Error as error:
            raise UserError(f"{file} is no list of pictures and classes ({error}): mend it") from error
        readings.append([row for row in rows if any(row)])
        if {len(row) for row in readings[-1]} in ({2}, {3}):
            return readings[-1]
    widest = max(readings, key=lambda rows: max(map(len, rows), default=0))
    odd = [row for row in widest if len(row) != len(widest[0]) or len(row) not in (2, 3)]
    found = ",".join(odd[0])[:80] if odd else "nothing"
    raise UserError(f"{file} must have the columns picture and class, perhaps a third with train, val or test, in each "
                    f"line, separated by comma, semicolon or tab, found {found}: mend it")


class Finder:
    """Finds the pictures that a list names below a folder: find("images/1.jpg") -> their path in the folder, or "".

    A list may leave out the folders that lead to a picture and its suffix, as those of competitions do, as long as
    one picture fits.
    """

    def __init__(self, folder):
        self.folder, self.paths, self.fitting = folder, set(), {}
        for picture in pictures_below(folder):
            path = picture.relative_to(folder)
            self.paths.add(path.as_posix())
            for start in range(len(path.parts)):
                end = "/".join(path.parts[start:])
                for spelling in {end, end.removesuffix(path.suffix)}:
                    self.fitting.setdefault(spelling, []).append(path.as_posix())

    def __call__(self, picture):
        try:
            path = plain_path(picture.removeprefix(f"{self.folder}/"))
        except ValueError:
            return ""
        fitting = [path] if path in self.paths else self.fitting.get(path, [""])
        if len(fitting) > 1:
            raise UserError(f"{picture} in the list of {self.folder} may be {' or '.join(fitting[:2])}: write its path")
        return fitting[0]

    def knows(self, picture):
        """Whether this is the name of a picture, which may be missing, and no column's."""
        return picture.lower().endswith(SUFFIXES) or bool(self(picture))
