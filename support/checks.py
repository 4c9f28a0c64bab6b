"""What is checked of a data set before a run, and what else the run may be tested on.

data.load() calls warn_of_few(), warn_of_names() and warn_of_untested(). support/loading.py calls warn_of_copies(),
split_classes() for --base-to-new, and for --eval-on require_same_classes() and, as report.py does, without_trained().
train.py calls columns(). Data that would make a number meaningless end in one sentence, doubtful data in a warning.
"""

import math
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

from clip_min import UserError
from support.folders import shortened, warn
from support.identity import content, own_contents


def warn_of_few(items, classnames, shots, own):
    """Warn of classes with fewer training pictures (path, label) than `shots`."""
    counts = Counter(label for _, label in items)
    few = [f"{classnames[label]} ({count})" for label, count in counts.items() if count < shots]
    if few:
        warn(f"all training pictures are taken of classes with fewer than {shots}: {shortened(few)}"
             + ("; 30 % of a folder without folders train and test are tested" if own else ""))


def warn_of_names(bench):
    """Warn of one class alone, and of own classes whose names CLIP's tokenizer reads alike."""
    if len(bench.classnames) == 1:
        warn(f"{bench.folder} has one class alone, {bench.classnames[0]}: it is always right, 100 % means nothing")
    if not bench.own:
        return
    folders = {label: str(Path(path).parent) for path, label in bench.train + bench.test}
    have_folders = len(set(folders.values())) == len(bench.classnames)  # else a list says what is of which class
    alike = {}  # a name as the tokenizer reads it -> the folders of the classes, or their names
    for label, classname in enumerate(bench.classnames):
        place = folders[label] if have_folders else classname
        alike.setdefault(unicodedata.normalize("NFKC", classname).lower(), []).append(place)
    for places in alike.values():
        if len(places) > 1:
            warn(f"to CLIP {shortened(places)} have the same class name: give them different names")


def warn_of_untested(bench):
    """Warn of own classes that no test picture shows."""
    tested = {label for _, label in bench.test}
    untested = [name for label, name in enumerate(bench.classnames) if label not in tested]
    if bench.own and untested:
        warn(f"{bench.folder} has no test pictures of {shortened(untested)}, which no accuracy counts")


def warn_of_copies(bench):
    """Warn of own test pictures that are copies of training pictures."""
    if not bench.own:
        return
    contents = own_contents(bench)
    trained = {found: path for (subset, path), found in contents.items() if subset == "train"}
    trained |= {found: path for path, found in bench.fingerprints().items()}
    tested = [bench.relative(path) for path, _ in bench.test]
    copies = [path for path in tested if contents["test", path] in trained]
    if copies:
        warn(f"{len(copies)} of {len(tested)} test pictures of {bench.folder} are copies of training pictures, such as "
             f"{copies[0]} of {trained[contents['test', copies[0]]]}: the accuracy is too high, remove one of each two")


def split_classes(bench):
    """CoCoOp's protocol: -> the Benchmark of the first half of the classes, rounded up, and that of the others.

    The few shots are drawn before, as in CoCoOp's code: they are the pictures of a run on all classes.
    """
    def half(start, end):
        def chosen(items):
            return [(path, label - start) for path, label in items if start <= label < end]

        class_ids = bench.class_ids[start:end] if bench.class_ids else None
        return replace(bench, classnames=bench.classnames[start:end], class_ids=class_ids, train=chosen(bench.train),
                       val=chosen(bench.val), test=chosen(bench.test))

    n_base = math.ceil(len(bench.classnames) / 2)
    base, new = half(0, n_base), half(n_base, len(bench.classnames))
    if not base.test or not new.test:
        raise UserError(f"{bench.folder} has no test pictures for one half of its {len(bench.classnames)} classes: "
                        "--base-to-new tests both")
    return base, new


def columns(target, class_ids):
    """-> where the target's classes stand among those with these ImageNet numbers, or None if not all are there."""
    if class_ids and target.class_ids and set(target.class_ids) <= set(class_ids):
        return [class_ids.index(number) for number in target.class_ids]
    return None


def require_same_classes(bench, targets):
    """UserError unless every target has the classes of `bench` or some of them, and none is named twice."""
    for i, target in enumerate(targets):
        if target.folder in [other.folder for other in (bench, *targets[:i])]:
            raise UserError(f"--eval-on names {target.folder}, which is tested already: name each data set once")
        if target.classnames != bench.classnames and columns(target, bench.class_ids) is None:
            differing = sorted(set(bench.classnames) ^ set(target.classnames))
            raise UserError(f"the classes of {target.name} are not those of {bench.name}, they differ in "
                            f"{shortened(differing) or 'order'}: give --eval-on shifted data of the same classes")


def without_trained(bench, trained, trained_folder):
    """-> the Benchmark without those test pictures that a run was trained on; a warning tells how many.

    trained: the run's Benchmark.fingerprints(). A picture is recognised by its content and, in the folder that the run
    was trained on, also by its path. Benchmarks have a fixed split and stay as they are.
    """
    if not bench.own or not trained:
        return bench
    paths, contents = trained if bench.folder == Path(trained_folder) else {}, set(trained.values())
    test = [(path, label) for path, label in bench.test
            if bench.relative(path) not in paths and content(path) not in contents]
    if not test:
        raise UserError(f"the run was trained on all {len(bench.test)} test pictures of {bench.folder}: test others")
    if len(test) < len(bench.test):
        warn(f"{len(bench.test) - len(test)} of {len(bench.test)} test pictures of {bench.folder} are left out: the "
             "run was trained on them")
    return replace(bench, test=test)
