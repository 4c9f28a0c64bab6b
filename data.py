"""Data sets: their pictures and classes, what is trained on and what is tested, the k shots, and batches of tensors.

    bench = load("dtd", root="data", shots=4, seed=1)  # or load("path/to/my/folder")
    for images, labels in plain_batches(bench.test, clip, device, workers=0): ...  # (B, 3, R, R), (B,)

`load` knows BENCHMARKS, which lie under `root` in CoOp's or torchvision's layout or are downloaded, and WORLD, whose
pictures are drawn on first use. Anything else is a folder of your own pictures:

    folder/<class>/*.jpg                 a hash of the path chooses 70 % of each class for training, the rest is tested
    folder/{train,test}/<class>/*.jpg    taken as it stands; a folder val beside them is never read
    folder/split.json                    {"train": [["cats/1.jpg", 0, "cat"], ...], "val": ..., "test": ...}
    folder/classnames.txt                optional beside class folders; a line: <class folder> <readable name>

The protocol is CoOp's (arXiv:2109.01134, github.com/KaiyangZhou/CoOp), so that numbers can be compared:
- The splits are CoOp's lists, split_zhou_*.json; torchvision splits the same pictures differently. FGVC Aircraft has
  lists of its own. ImageNet and its shifts are class folders, sorted, where CoOp's picks follow the chance of a disk.
- For k shots every class gives random.sample(its pictures, k), in the order in which the classes first appear. Then
  every class of the val list gives min(k, 4) from the same stream. The same seed gives CoOp's pictures in CoOp's order.
- All test pictures are used, resized and centre-cropped as CLIP does it; those for training are cropped and flipped.
"""

import csv
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, get_worker_info
from torchvision import transforms as T

from clip_min import ASSETS, MEAN, STD, UserError, download, file_digest, preprocess


@dataclass(frozen=True)
class Source:
    """Where a benchmark comes from: a row of assets/benchmarks.json."""
    name: str
    aliases: list[str]  # upper case and "-", "_", " " do not matter
    images: list[str]  # image folders under root, CoOp's and torchvision's; the first step is the data set's folder
    holds: str = ""  # a folder in the image folder, where the image folder is the data set's folder itself
    split: str = ""  # the name of CoOp's list, which lies in the data set's folder
    blob: str = ""  # the list's git blob id
    archive: str = ""  # the address of the pictures
    md5: str = ""
    nested: str = ""  # a second archive inside the archive
    inside: str = ""  # the folder in the archive that is put into the data set's folder
    by_hand: str = ""  # layout and source, where no address works
    template: str = "a photo of a {}."  # CoOp's


TABLES = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))
BENCHMARKS = {row["name"]: Source(**row) for row in TABLES["benchmarks"]}
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"  # CoOp's are on a Drive
MOST_FILES, MOST_BYTES = 200_000, 10 * 2**30  # of an archive; the largest, Food-101, has 101,000 pictures in 5 GB
KEEP_BYTES = 2 * 2**30  # 16 shots of DTD decode to about 0.8 GB; leaves room for CLIP on a machine with 8 GB
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SUFFIXES += (".avif",) if ".avif" in Image.registered_extensions() else ()  # not in every Pillow
OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Benchmark:
    """A data set that is ready for use. Labels count from 0."""
    name: str
    classnames: list[str]  # by label; two classes may share a name, so nothing here maps names to labels
    templates: tuple[str, ...]  # hand-written prompts, each with one {}
    train: list[tuple[str, int]]  # (path, label) of the chosen shots
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]
    folder: Path  # every path begins with it
    own: bool = False  # these are a user's own pictures, see read()
    class_ids: list[int] | None = None  # by label, the numbers of ImageNet's classes, where these are some of them

    @property
    def picks(self):
        """sha256 of the training list: the same pictures in the same order give the same."""
        lines = (f"{self.relative(path)} {label}\n" for path, label in self.train)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def relative(self, path):
        """A picture's path in the folder, which is the same on any machine."""
        return path[len(str(self.folder)) + 1 :]

    def fingerprints(self):
        """-> {path in the folder: sha256} of the training pictures, by which a finished run remembers them.

        Benchmarks have a fixed division: their pictures, a million on ImageNet, are not read for it.
        """
        return {self.relative(path): file_digest(Path(path), "sha256") if self.own else "" for path, _ in self.train}


def load(name_or_folder, root="data", shots=16, seed=1, whole=False):
    """-> Benchmark with `shots` training pictures per class, or with all of them for 0.

    "dtd" is the benchmark and "./dtd" a folder. `whole` is for a folder that is only tested: all pictures of its class
    folders are test pictures, and a folder test needs no folder train beside it.
    """
    if shots < 0:
        raise UserError(f"shots must be 0, for all pictures, or more, found {shots}")
    name, path = identify(name_or_folder)
    root, folder, template, class_ids = Path(root).expanduser(), Path(path), Source.template, None
    try:
        if path:
            has_list = (folder / "split.json").exists()
            split, classnames = read_split(folder / "split.json") if has_list else read_folders(folder, whole)
        elif name in WORLD:
            folder = root / name
            if not folder.exists():
                with working_folder(folder, name) as temporary:
                    draw_world(name, temporary / name)
            split, classnames = read_folders(folder)
        else:
            source = BENCHMARKS[name]
            template, (home, folder) = source.template, find_images(source, root)
            if name.startswith("imagenet"):
                split, classnames, class_ids = read_imagenet(folder, name)
            elif name == "fgvc_aircraft":
                split, classnames = read_aircraft(folder)
            else:
                split, classnames = read_split(home / source.split)
    except OSError as error:  # a folder that may not be read, a full disk, a root that is a file
        raise UserError(f"{error.filename or folder} cannot be used ({error.strerror}): give another folder") from error
    except UnicodeDecodeError as error:
        raise UserError(f"a list or classnames.txt of {folder} is not in UTF-8 ({error}): save it as UTF-8") from error

    if shots:
        counts = Counter(label for _, label in split["train"])
        if few := [f"{classnames[label]} ({count})" for label, count in counts.items() if count < shots]:
            warn(f"all training pictures are taken of classes with fewer than {shots}: {shortened(few)}"
                 + ("; 30 % of a folder without folders train and test are tested" if path else ""))
        rng = random.Random(seed)  # the stream of CoOp's random.seed(seed); the global one is left alone
        split["train"] = sample(split["train"], shots, rng)
        split["val"] = sample(split["val"], min(shots, 4), rng)
    bench = Benchmark(name, [classname.replace("_", " ") for classname in classnames], (template,),
                      **find_files(folder, split), folder=folder, own=bool(path), class_ids=class_ids)
    warn_of_names(bench)
    return bench


def identify(name_or_folder):
    """-> (a data set's name, "") or (the name of a user's own folder, its absolute path)."""
    def plain(name):
        return re.sub("[-_ ]", "", name.lower())

    text, folder = str(name_or_folder), Path(name_or_folder).expanduser()
    names = {plain(name): name for name in (*BENCHMARKS, *WORLD)}
    aliases = {plain(alias): source.name for source in BENCHMARKS.values() for alias in source.aliases}
    if known := names.get(plain(text)) or aliases.get(plain(text)):
        if folder.is_dir() and plain(text) in aliases:
            raise UserError(f"{text} is short for {known} and also a folder here: give {known} or ./{text}")
        if folder.is_dir():
            warn(f"{text} is taken as the data set of this name: for the folder of this name give ./{text}")
        return known, ""
    if not folder.is_dir():
        raise UserError(f"no data set or folder is called {text}: give a folder, or one of {', '.join(names.values())}")
    return folder.resolve().name, str(folder.resolve())


def sample(items, k, rng):
    """k of the (path, label) per label, as Dassl draws them; a class with fewer is taken whole, without a draw."""
    groups = {}  # by label, in order of first appearance
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return [item for group in groups.values() for item in (rng.sample(group, k) if len(group) >= k else group)]


def split_classes(bench):
    """CoCoOp's protocol: -> the Benchmark of the first half of the classes, rounded up, and that of the others.

    The few shots are drawn before, as in CoCoOp's code: they are the pictures of a run on all classes.
    """
    def part(start, end):
        def chosen(items):
            return [(path, label - start) for path, label in items if start <= label < end]

        class_ids = bench.class_ids[start:end] if bench.class_ids else None
        return replace(bench, classnames=bench.classnames[start:end], class_ids=class_ids, train=chosen(bench.train),
                       val=chosen(bench.val), test=chosen(bench.test))

    half = math.ceil(len(bench.classnames) / 2)
    base, new = part(0, half), part(half, len(bench.classnames))
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
    was trained on, also by its path. Benchmarks have a fixed division and stay as they are.
    """
    if not bench.own or not trained:
        return bench
    paths, contents = trained if bench.folder == Path(trained_folder) else {}, set(trained.values())
    test = [(path, label) for path, label in bench.test
            if bench.relative(path) not in paths and file_digest(Path(path), "sha256") not in contents]
    if not test:
        raise UserError(f"the run was trained on all {len(bench.test)} test pictures of {bench.folder}: test others")
    if len(test) < len(bench.test):
        warn(f"{len(bench.test) - len(test)} of {len(bench.test)} test pictures of {bench.folder} are left out: the "
             "run was trained on them")
    return replace(bench, test=test)


def shortened(names):
    """-> "a, b, c, d, e and 317 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def warn_of_names(bench):
    """Warn of one class alone, and of own classes whose names CLIP's tokenizer reads alike."""
    if len(bench.classnames) == 1:
        warn(f"{bench.folder} has one class alone, {bench.classnames[0]}: it is always right, 100 % means nothing")
    folders, alike = {label: str(Path(path).parent) for path, label in bench.train + bench.test}, {}
    for label, classname in enumerate(bench.classnames if bench.own else []):
        alike.setdefault(unicodedata.normalize("NFKC", classname).lower(), []).append(folders[label])
    for places in alike.values():
        if len(places) > 1:
            warn(f"to CLIP {shortened(places)} have the same class name: give them different names")


@functools.cache  # each message once, also when several seeds load the same data
def warn(message):
    worker = get_worker_info()
    if (worker is None or worker.id == 0) and os.environ.get("RANK", "0") == "0":  # the first process speaks for all
        print(f"warning: {message}", file=sys.stderr)


def published(run, data_name):
    """What the papers report for a run's settings on a data set. -> [(accuracy, "DPT, Table II"), ...], often empty.

    A row of published.csv fits if the run has its options, and if the user changed nothing else.
    """
    if run.data_path:
        return []
    wanted = [run.method, run.backbone, "0" if run.method == "zeroshot" else str(run.shots), data_name]
    values, changed, found = run.options | run.recipe, run.changed.keys() - {"precision"}, []
    with (ASSETS / "published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            options = dict(pair.split("=", 1) for pair in row["options"].split(";") if pair)
            same_run = [row[key] for key in ("method", "backbone", "shots", "dataset")] == wanted
            if same_run and changed <= options.keys() and all(spell(values[k]) == v for k, v in options.items()):
                found.append((float(row["accuracy"]), f"{row['paper']}, {row['table']}"))
    return found


def spell(value):
    """A value of an option or of a recipe, as assets/published.csv writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


# ---- Splits: {"train": [(path in the image folder, label)], "val": ..., "test": ...} ----

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


def read_aircraft(folder):
    """FGVC Aircraft's own lists, beside the image folder. Its names have slashes, F/A-18, and are never a path."""
    split, classnames = {}, list(filter(None, (folder.parent / "variants.txt").read_text("utf-8").splitlines()))
    for part in "train", "val", "test":
        file, split[part] = folder.parent / f"images_variant_{part}.txt", []
        for line in filter(None, file.read_text("utf-8").splitlines()):
            image, _, name = line.partition(" ")  # 1025794 707-320
            if name not in classnames:
                raise UserError(f"{file} has the line {line!r}, which ends with no line of variants.txt: mend it")
            split[part].append((f"{image}.jpg", classnames.index(name)))
    return split, classnames


def read_imagenet(folder, name):
    """ImageNet, or one of its shifts, which is test pictures only. -> split, class names, ImageNet's class numbers.

    Class folders are called by wnid, in ImageNetV2 by number; sorted as text, 10 would come before 2. The names are
    OpenAI's; torchvision's cost accuracy.
    """
    rows = [line.split(" ", 1) for line in (ASSETS / "imagenet_classes.txt").read_text().splitlines()]
    number = {key: i for i, (wnid, _) in enumerate(rows) for key in (wnid, str(i))}
    places = {"train": "train/", "test": "val/"} if name == "imagenet" else {"test": ""}
    split, keys = read_parts(folder, places, order=lambda key: number.get(key, -1))
    if keys[0] not in number:
        raise UserError(f"{folder / places['test'] / keys[0]} is not named like a class of ImageNet: move it away")
    class_ids = [number[key] for key in keys]
    return split, [rows[i][1] for i in class_ids], class_ids


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


def find_files(folder, split):
    """The split with full paths, each file known to be there."""
    missing = [path for items in split.values() for path, _ in items if not os.path.exists(f"{folder}/{path}")]
    if missing:
        raise UserError(f"{len(missing)} of {sum(map(len, split.values()))} pictures are not in {folder}: "
                        f"{shortened(missing)}: add them, in the spelling of the list")
    return {part: [(f"{folder}/{path}", label) for path, label in items] for part, items in split.items()}


# ---- Fetching what is not there ----

def find_images(source, root):
    """-> the data set's folder and its image folder. Lists and pictures that are absent are downloaded."""
    layouts = [path.split("/", 1) for path in source.images]
    places = [(root / home, images) for home, images in layouts]
    has_list = source.split and (root / source.split).exists()
    if has_list or {root.absolute().name, root.resolve().name} & {home for home, _ in layouts}:
        places = [(root, images) for _, images in layouts] + places  # root is the data set's own folder

    def found():
        return next(((home, home / images) for home, images in places if (home / images / source.holds).is_dir()), None)

    home, images = found() or places[0]
    if not found() and not source.archive:
        raise UserError(f"{source.name} is not under {root} and cannot be downloaded: put its pictures into "
                        f"{home / images}: {source.by_hand}")
    if source.split and not (home / source.split).exists():  # first: the archive is of no use without the list
        download(SPLITS + source.split, home / source.split, "git", source.blob)
    if not found():
        archive = home / source.archive.rsplit("/")[-1]
        if not archive.exists():
            download(source.archive, archive, "md5", source.md5)
        elif file_digest(archive, "md5") != source.md5:  # put there by hand
            raise UserError(f"{archive} is not {source.archive} as it should be (md5): remove it, to download it again")
        unpack(source, archive, home)
    return found()


def unpack(source, archive, home):
    """Put the pictures of an archive into the data set's folder. An archive that is broken or a bomb is a UserError."""
    with working_folder(home / Path(source.inside).name, source.inside) as temporary:
        try:
            extract(archive, temporary)
            if source.nested:
                extract(temporary / source.nested, temporary)
            if not (temporary / source.inside).is_dir():
                raise ValueError(f"no folder {source.inside} in it")
        except Exception as error:  # of a broken archive, of many kinds; those of the disk have a number
            if getattr(error, "errno", None) or isinstance(error, MemoryError):
                raise
            detail = " ".join(str(error).split())
            raise UserError(f"{archive} cannot be unpacked ({detail}): remove it, to download it again") from error


def extract(archive, folder):
    """Extract a zip or tar file. Members that lead out of the folder are refused by tarfile, renamed by zipfile."""
    if not archive.is_file():
        raise ValueError(f"no {archive.name} in it")
    size, is_zip = 0, archive.suffix == ".zip"
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as file:
        for number, member in enumerate(file.infolist() if is_zip else file, 1):
            size += member.file_size if is_zip else member.size
            if number > MOST_FILES or size > MOST_BYTES:
                raise ValueError(f"more than {MOST_FILES} files or {MOST_BYTES} bytes in it")
            file.extract(member, folder, **{} if is_zip else {"filter": "data"})


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


# ---- Pictures ----

@contextmanager
def opened(path):
    """A picture file with its header read. Whatever breaks in the block is a UserError with the path."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # on broken files Pillow raises OSError, SyntaxError, struct.error and others
        of_machine = isinstance(error, (PermissionError, MemoryError))
        remedy = "see to permissions and memory" if of_machine else "replace it"
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}): {remedy}") from error


def read(path, own=False):
    """-> RGB picture, as CoOp's convert("RGB"), but 16-bit grey is scaled, where convert makes it white.

    A user's own picture is turned upright as its EXIF says, is put on white where it is transparent, and has grey
    values of more than 8 bits scaled by its own range. Benchmarks are read as CoOp reads them.
    """
    with opened(path) as image:
        if own:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or (own and image.mode == "F"):  # 16-bit grey is I;16, to older Pillows I
            image = image if image.mode == "F" else image.convert("I").convert("F")
            low, high = image.getextrema() if own else (0, 65535)
            if not math.isfinite(high - low):
                raise ValueError("it has values that are no finite numbers")
            scale = 255 / (high - low or 1)
            image = image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
            if own:
                warn(f"grey pictures of more than 8 bits in {Path(path).parent.parent} are scaled by their own range")
        if own and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def augment(resolution, scale=(0.08, 1.0)):
    """CoOp's training transform, RGB picture -> (3, R, R). Tip-Adapter's and FG-VPL's scale is (0.5, 1)."""
    crop = T.RandomResizedCrop(resolution, scale, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


# ---- Batches ----

class Pictures:
    """(number of a picture, seed) -> (tensor, label). The seed is that of a random transform, None for any other.

    A picture that cannot be read stops the run: skipping it would change the score.
    """

    def __init__(self, items, transform, own=False):
        self.items, self.transform, self.own, self.decoded = items, transform, own, None

    def __getitem__(self, key):
        number, seed = key
        path, label = self.items[number]
        picture = self.decoded[number] if self.decoded else read(path, self.own)
        if seed is None:
            return self.transform(picture), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's stream, which is not ours to use
            torch.default_generator.manual_seed(seed)
            return self.transform(picture), label

    def decode_all(self, limit_bytes=KEEP_BYTES):
        """Decode all pictures once, into memory, if they fit; transforms still run each time. -> whether they fit."""
        size = 0
        for path, _ in self.items:
            with opened(path) as image:
                size += image.width * image.height * 4  # Pillow's RGB takes 4 bytes
            if size > limit_bytes:
                return False
        with ThreadPoolExecutor() as pool:
            self.decoded = list(pool.map(lambda item: read(item[0], self.own), self.items))
        return True


class Batches:
    """Batches of images (B, 3, R, R) and labels (B,) on a device.

    `for images, labels in batches` walks through all pictures in their order. `epoch(number)` walks through them in a
    random order; with `drop_last` a last batch that is short is left out, unless it is the only one. With a `seed` the
    pictures are augmented, each walk and each epoch in its own way. What they look like depends on the seed, the number
    of the walk or epoch and the picture, and not on the number of workers.
    """

    def __init__(self, pictures, batch_size, device, workers=0, seed=None, drop_last=False):
        self.pictures, self.device, self.batch_size, self.seed = pictures, device, batch_size, seed
        self.drop_last = drop_last and len(pictures.items) >= batch_size
        self.walks, self.keys = 0, []  # the keys of Pictures in batches, which the loader reads anew for each walk
        fork = "fork" if workers and sys.platform == "linux" else None  # shares decoded pictures without a copy
        self.loader = DataLoader(pictures, batch_sampler=self.keys, num_workers=workers, persistent_workers=workers > 0,
                                 multiprocessing_context=fork, pin_memory=device.type == "cuda",
                                 generator=torch.Generator())  # of its own: a walk must not move PyTorch's stream

    def __len__(self):
        """Batches of an epoch."""
        batches = len(self.pictures.items) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self):
        return self.share()

    def share(self, rank=0, processes=1):
        """A walk in which each of several processes gets every `processes`-th batch."""
        self.walks += 1
        batches = self.plan(-self.walks, shuffled=False)[rank::processes]
        for n, batch in enumerate(self.load(batches), 1):
            show(f"pictures  walk {self.walks}, batch {n} of {len(batches)}")
            yield batch

    def epoch(self, number, first=0, rank=0, processes=1):
        """Batches in random order, the same for the same seed and number, from the batch `first` on.

        Each of several processes gets its share of every batch. Of fewer pictures than processes each gets all.
        """
        batches = self.plan(number, shuffled=True)[first:]
        return self.load([batch[rank::processes] if len(batch) >= processes else batch for batch in batches])

    def plan(self, number, shuffled):  # -> the keys of Pictures in batches
        rng, order = random.Random(f"{self.seed} {number}"), list(range(len(self.pictures.items)))
        if shuffled:
            rng.shuffle(order)
            del order[len(self) * self.batch_size :]
        keys = [(i, None if self.seed is None else rng.getrandbits(32)) for i in order]
        return [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]

    def load(self, batches):
        self.keys[:] = batches
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def few_shot_batches(bench, clip, recipe, seed, device, workers):
    """The training pictures, augmented as the recipe says; decoded once if they fit into memory."""
    resolution, scale = clip.visual.resolution, recipe["crop_scale"]
    transform = augment(resolution, scale) if scale else preprocess(resolution)  # no scale: as CLIP sees them
    pictures = Pictures(bench.train, transform, bench.own)
    pictures.decode_all()
    return Batches(pictures, recipe["batch_size"], device, workers, seed, recipe.get("drop_last", True))


def plain_batches(items, clip, device, workers, own=False):
    """Pictures as CLIP sees them, resized and centre-cropped: the test set, for example."""
    return Batches(Pictures(items, preprocess(clip.visual.resolution), own), 100, device, workers)


def show(line, keep=False, in_log=False):
    """One live line on a terminal, written over by the next unless kept. A log gets only the lines meant for it."""
    if sys.stdout.isatty():
        print("\r" + line.ljust(70), end="\n" if keep else "", flush=True)
    elif in_log:
        print(line, flush=True)


# ---- The embedded world ----

SIDE = 40  # pixels
COLOURS = {"red": (205, 45, 45), "green": (45, 155, 60), "blue": (50, 80, 205), "yellow": (225, 205, 60),
           "purple": (140, 60, 165), "orange": (235, 135, 45), "white": (232, 232, 232), "black": (32, 32, 32)}
TEXTURES, FORMS = ("plain", "striped", "barred", "dotted", "checkered"), ("circle", "square", "triangle", "diamond")
CLASS_TEXTURES, CLASS_COLOURS, NEUTRAL_COLOURS = TEXTURES[1:], tuple(COLOURS)[:3], tuple(COLOURS)[3:]  # 12 classes


@dataclass(frozen=True)
class World:
    """A data set of drawn objects. Its classes are a texture and a colour: of the ground, or of the object itself.

    The names of `shapes` are at odds with the tiny CLIP's captions: text prompts mend it. Those of `shapes_tint` fit,
    but its pictures lie under a colour cast: visual prompts mend it. The rest are shifts of `shapes`.
    """
    name: str
    coloured: str = "ground"
    classname: str = "{colour} {texture} shape"  # to the tiny CLIP a colour in front of "shape" is the object's
    misleading: float = 0.45  # how often the other of the two has the colour of another class
    noise: tuple = (0.3, 0.8)  # share of random pixels, from a clear picture to a hopeless one
    zoom: float = 1.0
    cast: tuple = ()  # colour matrix, rows for red, green and blue


WORLD = {row["name"]: World(**row) for row in TABLES["drawn"]}


def draw_world(name, folder):
    """Draw folder/{train,test}/<class>/NNN.png, the same on any machine."""
    world, rng = WORLD[name], random.Random(name)
    for part, count in ("train", 48), ("test", 50):
        for texture, colour in itertools.product(CLASS_TEXTURES, CLASS_COLOURS):
            place = folder / part / world.classname.format(texture=texture, colour=colour).replace(" ", "_")
            place.mkdir(parents=True)
            for i in range(count):
                pool = CLASS_COLOURS if rng.random() < world.misleading else NEUTRAL_COLOURS
                other = rng.choice([c for c in pool if c != colour])
                fill, ground = (colour, other) if world.coloured == "colour" else (other, colour)
                noise = rng.uniform(*world.noise)
                picture = draw_picture(rng, texture, fill, rng.choice(FORMS), ground, noise, world.zoom)
                (picture.convert("RGB", tuple(world.cast)) if world.cast else picture).save(place / f"{i:03d}.png")


def draw_picture(rng, texture, colour, form, ground, noise, zoom):
    """One object on a plain ground -> (SIDE, SIDE) RGB picture. rng decides place, size, shades and noise."""
    def shade(name):
        return tuple(min(255, max(0, c + rng.randint(-22, 22))) for c in COLOURS[name])

    fill = shade(colour)
    dark = (120, 120, 120) if colour == "black" else tuple(c * 2 // 5 for c in fill)
    surface = Image.new("RGB", (SIDE, SIDE), fill)
    pen, step = ImageDraw.Draw(surface), zoom * rng.uniform(5.5, 7.5)
    start = rng.uniform(-step, 0)
    lines = [start + i * step for i in range(int(SIDE / step) + 3)]
    for (i, y), (j, x) in itertools.product(enumerate(lines), repeat=2):
        if texture == "striped":
            pen.rectangle((0, y, SIDE, y + step * 0.45), fill=dark)
        elif texture == "barred":
            pen.rectangle((x, 0, x + step * 0.45, SIDE), fill=dark)
        elif texture == "dotted":
            pen.ellipse((x, y, x + step * 0.55, y + step * 0.55), fill=dark)
        elif texture == "checkered" and (i + j) % 2:
            pen.rectangle((x, y, x + step, y + step), fill=dark)

    r, x, y = zoom * rng.uniform(11, 16), SIDE / 2 + rng.uniform(-4, 4), SIDE / 2 + rng.uniform(-4, 4)
    outline = Image.new("L", (SIDE, SIDE))
    if form == "circle":
        ImageDraw.Draw(outline).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        corners = {"square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
                   "triangle": ((0, -1.1), (1.1, 0.9), (-1.1, 0.9)),
                   "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))}[form]
        ImageDraw.Draw(outline).polygon([(x + r * u, y + r * v) for u, v in corners], fill=255)
    picture = Image.composite(surface, Image.new("RGB", (SIDE, SIDE), shade(ground)), outline)
    return Image.blend(picture, Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)), noise)
