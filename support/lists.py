"""Lists that say of which class a picture is: split.json in CoOp's schema, and a plain labels.csv or labels.tsv.

support/own.py reads both in a user's folder, and support/benchmarks.py CoOp's own with read_split(). A list that cannot
be understood ends in one sentence that names it and the line. Whether the pictures are there is seen later, by
folders.find_files(), and only of those in use; pictures that a list does not name are not used.
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


def with_tests(split, place):
    """-> the split, where val stands for a test that is not there, as it does for many users of ImageFolder."""
    if split["val"] and not split["test"]:
        warn(f"{place} has no pictures for test: those of val are tested")
        split = split | {"val": [], "test": split["val"]}
    return split


# ---- labels.csv ----


def read_labels(file, whole=False):
    """A list with the columns picture and class and perhaps a third, train, val or test. -> split, sorted class names.

    Without a third column the classes are divided as class folders are. A list that is only tested is read `whole`: all
    of its pictures, or those of test, are test pictures.
    """
    rows, folder = read_rows(file), file.parent
    find = Finder(folder)
    has_header = not find.knows(rows[0][0]) and rows[0][1] not in [row[1] for row in rows[1:]]
    rows = rows[has_header:]
    if not any(map(find, {row[0] for row in rows})):
        raise UserError(f"{file} names no picture of {folder}: its columns are picture, a path as seen from the list "
                        f"and spelled as on the disk, then class, found {' and '.join(rows[0] if rows else ['none'])}")
    meaning = {}  # a picture's path -> its class and its subset
    for picture, name, *subset in rows:
        try:
            path = find(picture) or plain_path(picture)
            here = name, SUBSETS[subset[0].lower()] if subset else "test"
            if not name or meaning.setdefault(path, here) != here:
                raise ValueError(f"{picture} has {'two classes or is in two subsets' if name else 'no class'}")
        except KeyError:
            raise UserError(f"{file} has {subset[0]!r} in its third column, for {picture}: write train, val or test"
                            ) from None
        except ValueError as error:
            raise UserError(f"{file} cannot be used ({error}): mend it") from error
    classes, split = sorted({name for name, _ in meaning.values()}), {"train": [], "val": [], "test": []}
    for path, (name, subset) in meaning.items():
        split[subset].append((path, classes.index(name)))
    if whole:
        split = with_tests(split, file) | {"train": [], "val": []}
    elif len(rows[0]) == 2:
        return divide(folder, sorted(split["test"], key=lambda item: item[1])), classes
    else:
        split = with_tests(split, file)
        lacking = [name for label, name in enumerate(classes) if label not in {label for _, label in split["train"]}]
        if lacking:
            raise UserError(f"{file} has no training pictures of {shortened(lacking)}: add some, or remove the class")
    if not split["test"]:
        raise UserError(f"{file} has no pictures for test: write test into the third column of some")
    return split, classes


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
    longest = max(readings, key=lambda rows: len(rows[0]) if rows else 0)
    width = min(max(len(longest[0]), 2), 3) if longest else 2
    odd = next((row for row in longest if len(row) != width), [])
    raise UserError(f"{file} must have the columns picture and class, perhaps a third with train, val or test, in each "
                    f"line, separated by comma, semicolon or tab, found {','.join(odd)[:80] or 'nothing'}: mend it")


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
