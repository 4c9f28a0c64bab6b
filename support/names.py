"""Class names: readable ones for classes that are called otherwise, and a warning about names that mean nothing.

support/own.py calls read_classnames() and then readable_names() for a user's data, and support/benchmarks.py
imagenet_names(). A name without meaning spoils every text prompt, but only ImageNet's wnids are replaced, and only
where classnames.txt says nothing about them.
"""

import functools
import re

from clip_min import ASSETS, UserError
from support.files import read_text
from support.folders import shortened, warn

# Of three letters or more, or in a script like the Chinese, where one letter is a word.
WORD = re.compile(r"[^\W\d_]{3,}|[^\W\d_a-zA-Z]+")
FILLERS = {"class", "classe", "clase", "klasse", "cls", "label", "category", "cluster", "folder", "group", "index",
           "item", "type"}  # words that say nothing where a number or a letter follows them


@functools.cache
def imagenet_names():
    """-> {wnid: name} of ImageNet's 1000 classes in their order. The names are OpenAI's."""
    lines = (ASSETS / "imagenet_classes.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def readable_names(names, where):
    """-> the class names, where those that are wnids of ImageNet's classes get its names. A warning tells it.

    where: the file in which a user names the classes.
    """
    known = [f"{name} {imagenet_names()[name]}" for name in names if name in imagenet_names()]
    if known:
        warn(f"classes called by ImageNet's wnids get its names, {shortened(known)}: {where} may give others")
    names = [imagenet_names().get(name, name) for name in names]
    empty = [name for name in names if is_without_meaning(name)]
    if empty:
        warn(f"to CLIP, which reads class names as text, names such as {', '.join(empty[:3])} may say nothing: give "
             f"the classes others in {where}")
    return names


def read_classnames(file, classes):
    """-> the names that classnames.txt gives the classes; where it says nothing, their own."""
    names = {name: name for name in classes}
    for line in filter(str.strip, read_text(file).splitlines() if file.exists() else []):
        fitting = [name for name in names if line.startswith(name) and line[len(name) :].startswith((" ", "\t", ","))]
        if not fitting:
            raise UserError(f"{file} has the line {line!r}: begin it with the name of a class folder and a blank")
        name = max(fitting, key=len)  # a folder's name may have blanks of its own
        names[name] = line[len(name) + 1 :].strip()
    return list(names.values())


def is_without_meaning(name):
    """Whether a class name is a number or a code, such as 10, class_0 or A3-77. "boeing 737" has a word, "a" no digit.

    A word like "folder" alone may be what the pictures show.
    """
    words = WORD.findall(name)
    is_filler = bool(words) and not name.isalpha()
    return (is_filler or any(map(str.isdigit, name))) and all(word.lower() in FILLERS for word in words)
