"""Data sets: which pictures, under which names, in which split, and how they become tensors.

    benchmark = load("dtd", root="data", shots=4, seed=1)         # or load("path/to/my/folder")
    batches = DataLoader(Pictures(benchmark.train, augment(224)), batch_size=32, shuffle=True)

A name is one of BENCHMARKS, found under `root` in CoOp's or torchvision's layout or downloaded, or of WORLD, drawn on
first use. Anything else is a folder of your own pictures:

    folder/<class>/*.jpg                          split into 50 / 20 / 30 % train / val / test, always the same way
    folder/{train,val,test}/<class>/*.jpg         as it stands; val (valid, validation) may be absent
    folder/split.json                             {"train": [["cats/1.jpg", 0, "cat"], ...], "val": ..., "test": ...}
    folder/classnames.txt                         optional, beside the first two; a line: <class folder> <readable name>

The protocol is that of CoOp (arXiv:2109.01134, github.com/KaiyangZhou/CoOp), so that numbers compare:
- the splits are CoOp's lists, split_zhou_*.json; torchvision splits the same pictures differently. Aircraft has lists
  of its own; ImageNet and its shifts are class folders, sorted, where CoOp's picks follow the chance order of a disk;
- k shots: for each class, in the order in which the classes first appear in the list, random.sample(its pictures, k);
  then min(k, 4) per class of the val list from the same stream. The same seed gives CoOp's pictures, in CoOp's order;
- the whole test set, resized and centre-cropped as CLIP does (clip_min.preprocess); random crops and flips to train.
"""

import csv
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from clip_min import ASSETS, MEAN, STD, UserError, download, file_digest, preprocess


@dataclass(frozen=True)
class Source:
    """A row of assets/benchmarks.json."""
    name: str
    aliases: list[str]          # other names for it; upper case and "-", "_", " " do not matter
    images: list[str]           # image folder under root, CoOp's and torchvision's; the first step is the set's folder
    holds: str = ""             # a folder in the image folder, where that is the set's folder itself
    split: str = ""             # CoOp's list, in the set's folder
    blob: str = ""              # the list's git blob id
    archive: str = ""           # url of the pictures
    md5: str = ""
    nested: str = ""            # the archive in the archive
    inside: str = ""            # the folder in the archive that is put into the set's folder
    by_hand: str = ""           # where no link lives: layout and source
    template: str = "a photo of a {}."     # CoOp's


BENCHMARKS = {row["name"]: Source(**row) for row in json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))}
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"     # CoOp's are on a Drive
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
KEEP_BYTES = 2 * 2**30     # 16 shots of DTD decode to about 0.8 GB; leaves room for CLIP on a machine with 8 GB


@dataclass(frozen=True)
class Benchmark:
    name: str
    classnames: list[str]                    # by label; two classes may share a name, so nothing maps names to labels
    templates: tuple[str, ...]               # hand-written prompts, each with one {}
    train: list[tuple[str, int]]             # (path, label), after the choice of shots
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]
    folder: Path                             # every path begins with it
    own: bool = False                        # a user's own pictures, see read()
    class_ids: list[int] | None = None       # ImageNet's class numbers, where the classes are some of ImageNet's

    @property
    def picks(self):
        """sha256 of the training list: the same pictures in the same order give the same, on any machine."""
        lines = (f"{path[len(str(self.folder)) + 1 :]} {label}\n" for path, label in self.train)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def load(name_or_folder, root="data", shots=16, seed=1):
    """A Benchmark with `shots` training pictures per class, or all for 0. "dtd" is the benchmark, "./dtd" a folder."""
    if shots < 0:
        raise UserError(f"shots must be 0, for all pictures, or more, found {shots}")
    (name, path), class_ids = identify(name_or_folder), None
    root, folder = Path(root).expanduser(), Path(path)
    try:
        if path:
            split_file = folder / "split.json"
            split, classnames = read_split(split_file) if split_file.exists() else read_folders(folder)
        elif name in BENCHMARKS:
            home, folder = find_images(BENCHMARKS[name], root)
            if name.startswith("imagenet"):
                split, classnames, class_ids = read_imagenet(folder, name)
            elif name == "fgvc_aircraft":
                split, classnames = read_aircraft(folder)
            else:
                split, classnames = read_split(find_split(BENCHMARKS[name], home))
        else:
            folder = root / name
            if not folder.exists():
                root.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as temporary:
                    draw_world(name, Path(temporary, name))
                    put_in_place(Path(temporary, name), folder)
            split, classnames = read_folders(folder)
    except OSError as error:     # a folder that may not be read, a full disk, a root that is a file
        raise UserError(f"{error.filename or folder} cannot be used ({error.strerror}): give another folder") from error

    if shots:
        counts = Counter(label for _, label in split["train"]).items()
        if few := [f"{classnames[label]} ({count})" for label, count in counts if count < shots]:
            warn(f"all pictures taken of classes with fewer than {shots}: {', '.join(few)}")
        rng = random.Random(seed)     # the stream of CoOp's random.seed(seed), leaving the global one alone
        split["train"] = sample(split["train"], shots, rng)
        split["val"] = sample(split["val"], min(shots, 4), rng)
    templates = (BENCHMARKS[name].template if name in BENCHMARKS and not path else Source.template,)
    readable = [classname.replace("_", " ") for classname in classnames]
    found = find_files(folder, split)
    return Benchmark(name, readable, templates, **found, folder=folder, own=bool(path), class_ids=class_ids)


def columns(target, class_ids):
    """Which of the training classes, whose numbers in ImageNet are class_ids, are the target's; None if not all are."""
    if class_ids and target.class_ids and set(target.class_ids) <= set(class_ids):
        return [class_ids.index(i) for i in target.class_ids]
    return None


def require_same_classes(bench, targets):
    """The targets' classes are to be bench's or some of them, and each is another data set."""
    for i, target in enumerate(targets):
        if target.name in [bench.name, *(other.name for other in targets[:i])]:
            raise UserError(f"--eval-on names {target.name}, which is tested already: name each data set once")
        if target.classnames != bench.classnames and columns(target, bench.class_ids) is None:
            raise UserError(f"the classes of {target.name} are not those of {bench.name}: give --eval-on shifted data "
                            "of the same classes")


def published(run, data_name):
    """What the papers report for a run, or for its shifts: [(accuracy, "DPT, Table II"), ...], one, several or none."""
    shots = "0" if run.method == "zeroshot" else str(run.shots)
    with (ASSETS / "published.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not run.data_path
                and (row["method"], row["backbone"], row["shots"], row["dataset"])
                == (run.method, run.backbone, shots, data_name)]
    changed = {key: value for key, value in run.changed.items() if key != "precision"}
    return [(float(row["accuracy"]), f"{row['paper']}, {row['table']}") for row in rows
            if dict(pair.split("=", 1) for pair in row["options"].split(";") if pair) == changed]


def identify(name_or_folder):
    """-> the name of a data set and "", or a user's own folder's name and its path."""
    names = {alias: known for known, source in BENCHMARKS.items() for alias in (known, *source.aliases)}
    plain = {re.sub("[-_ ]", "", alias): known for alias, known in (names | {world: world for world in WORLD}).items()}
    folder = Path(name_or_folder).expanduser()
    if known := plain.get(re.sub("[-_ ]", "", str(name_or_folder).lower())):
        return known, ""
    if not folder.is_dir():
        known = ", ".join([*BENCHMARKS, *WORLD])
        raise UserError(f"no data set or folder is called {name_or_folder}: give a folder, or one of {known}")
    return folder.resolve().name, str(folder.resolve())


@functools.cache     # each message once, also when several seeds load the same data
def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def sample(items, k, rng):
    """k of the (path, label) per label, as Dassl draws them; a class with fewer is taken whole, without a draw."""
    groups = {}     # by label, in order of first appearance
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return [item for group in groups.values() for item in (rng.sample(group, k) if len(group) >= k else group)]


# ---- Splits: {"train": [(path in the image folder, label)], "val": ..., "test": ...} ----


def read_split(file):
    """A list in CoOp's schema, checked. -> split, class names."""
    names, split = {}, {"train": [], "val": [], "test": []}
    try:
        lists = json.loads(file.read_text(encoding="utf-8-sig"))
        rows = [(part, *row) for part in split for row in lists.get(part, [])]
        for _, path, label, name in rows:
            if not (isinstance(path, str) and type(label) is int and isinstance(name, str)):
                raise TypeError(f"found {[path, label, name]}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is no {{"train": [[path, label, name], ...], ...}} ({error}): mend it') from error
    for part, path, label, name in rows:
        steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".")]
        if ".." in steps:
            raise UserError(f"{file} lists {path}, which leaves the image folder: take the .. out")
        if names.setdefault(label, name) != name:
            raise UserError(f"{file} gives label {label} two names, {names[label]} and {name}: keep one")
        split[part].append(("/".join(steps), label))
    labels = {label for _, label in split["train"]}
    if not split["test"] or labels != set(range(len(names))):
        raise UserError(f"{file} has {len(names)} labels, {len(labels)} of them to train, and {len(split['test'])} test"
                        " pictures: number the labels from 0 without a gap, each with training pictures, and add tests")
    return split, [names[label] for label in range(len(names))]


def read_folders(folder):
    """Class folders, or train, val and test folders of class folders; classnames.txt. -> split, class names."""
    subfolders = visible(folder, os.DirEntry.is_dir)
    parts = {PARTS[name]: name for name in subfolders if name in PARTS}
    split = {"train": [], "val": [], "test": []}
    if {"train", "test"} <= parts.keys() or (parts and len(parts) == len(subfolders)):
        if absent := {"train", "test"} - parts.keys():
            raise UserError(f"{folder} has {' and '.join(parts.values())} but no folder {absent.pop()}: add it")
        found = {part: class_folders(folder / name) for part, name in parts.items()}
        classes = found["train"]
        for part, name in parts.items():
            if differing := sorted(found[part].keys() ^ classes.keys()):
                raise UserError(f"{differing[0]} is not in both {folder / 'train'} and {folder / name}: add it")
            split[part] = [(f"{name}/{class_name}/{file}", label)
                           for label, class_name in enumerate(classes) for file in found[part][class_name]]
    else:
        classes = class_folders(folder)
        rng = random.Random(1)     # CoOp's read_and_split_data; not the run's seed, so that the test set stays
        for label, (name, files) in enumerate(classes.items()):
            if len(files) < 2:
                raise UserError(f"{folder / name} has one picture: a class needs two, one to train and one to test")
            rng.shuffle(files)
            a = round(0.5 * len(files))
            b = min(a + round(0.2 * len(files)), len(files) - 1)     # of three pictures, one is left for the test
            for part, chosen in ("train", files[:a]), ("val", files[a:b]), ("test", files[b:]):
                split[part] += [(f"{name}/{file}", label) for file in chosen]

    names, file = {name: name for name in classes}, folder / "classnames.txt"
    for line in file.read_text(encoding="utf-8-sig").splitlines() if file.exists() else []:
        fitting = [name for name in names if line.startswith(f"{name} ")]
        if line.strip() and not fitting:
            raise UserError(f"{file} has the line {line!r}: begin it with the name of a class folder and a blank")
        if fitting:
            name = max(fitting, key=len)     # a folder's name may have blanks of its own
            names[name] = line[len(name) :].strip()
    return split, list(names.values())


def read_aircraft(folder):
    """FGVC Aircraft's own lists, beside the image folder. Names have slashes, F/A-18, and are never a path."""
    split, classnames = {}, list(filter(None, (folder.parent / "variants.txt").read_text("utf-8").splitlines()))
    for part in "train", "val", "test":
        file, split[part] = folder.parent / f"images_variant_{part}.txt", []
        for line in filter(None, file.read_text("utf-8").splitlines()):
            image, _, name = line.partition(" ")     # 1025794 707-320
            if name not in classnames:
                raise UserError(f"{file} has the line {line!r}, which ends with no line of variants.txt: mend it")
            split[part].append((f"{image}.jpg", classnames.index(name)))
    return split, classnames


def read_imagenet(folder, name):
    """ImageNet, or one of its shifts, which is test pictures only. -> split, class names, ImageNet's class numbers.

    Class folders are called by wnid, in ImageNetV2 by number; sorted as text, 10 would come before 2. The names are
    OpenAI's: torchvision's cost accuracy.
    """
    rows = [line.split(" ", 1) for line in (ASSETS / "imagenet_classes.txt").read_text().splitlines()]
    number = {key: i for i, (wnid, _) in enumerate(rows) for key in (wnid, str(i))}
    split, keys = {"train": [], "val": [], "test": []}, None
    for part, place in {"train": "train/", "test": "val/"}.items() if name == "imagenet" else [("test", "")]:
        classes = class_folders(folder / place)
        if strangers := sorted(classes.keys() - number.keys()):
            raise UserError(f"{folder / place / strangers[0]} is not named like a class of ImageNet: move it away")
        if keys and classes.keys() != set(keys):
            raise UserError(f"{folder / 'train'} and {folder / 'val'} have different class folders: complete them")
        keys = sorted(classes, key=number.get)
        split[part] = [(f"{place}{key}/{file}", label) for label, key in enumerate(keys) for file in classes[key]]
    class_ids = [number[key] for key in keys]
    return split, [rows[i][1] for i in class_ids], class_ids


def class_folders(folder):
    """-> {class folder: its picture files}, both sorted, since what a disk lists first is chance."""
    def is_picture(entry):
        return entry.name.lower().endswith(SUFFIXES) and entry.is_file()

    classes = {name: visible(folder / name, is_picture) for name in visible(folder, os.DirEntry.is_dir)}
    if not classes:
        raise UserError(f"{folder} has no class folders: put the pictures of each class into a folder of its own")
    for name, files in classes.items():
        if not files:
            raise UserError(f"{folder / name} has no pictures ({' '.join(SUFFIXES)}): add some or remove the folder")
    return classes


def visible(folder, wanted):
    """Sorted names of the wanted entries, links followed; without hidden ones and what macOS adds to zip files."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith((".", "__MACOSX")) and wanted(entry))


def find_files(folder, split):
    """The split with full paths, each file known to be there. A listing per folder is faster than a look per file."""
    @functools.cache
    def names(path):     # as they are and, for lists made where case does not matter, in lower case
        listed = os.listdir(path) if os.path.isdir(path) else []
        return {name.casefold(): name for name in listed} | {name: name for name in listed}

    found, missing, respelled = {part: [] for part in split}, [], []
    for part, items in split.items():
        for relative, label in items:
            path = str(folder)
            for step in relative.split("/"):
                name = names(path).get(step) or names(path).get(step.casefold())
                if name is None:
                    missing.append(relative)
                    break
                path = f"{path}/{name}"
            if path != f"{folder}/{relative}":
                respelled.append(relative)
            found[part].append((path, label))
    if missing:
        total, first = sum(map(len, split.values())), ", ".join(missing[:3])
        raise UserError(f"{len(missing)} of {total} pictures are not in {folder}, the first are {first}: add them")
    if respelled:
        warn(f"{len(respelled)} pictures in {folder} differ from the list in upper and lower case, as {respelled[0]}")
    return found


# ---- Fetching what is not there ----


def find_images(source, root):
    """-> the set's folder, its image folder. What is absent is downloaded and then there whole or not at all."""
    places = [(root / home, images) for home, images in (path.split("/", 1) for path in source.images)]
    is_home = source.split and (root / source.split).exists()
    if is_home or {root.absolute().name, root.resolve().name} & {home.name for home, _ in places}:
        places = [(root, images) for _, images in places] + places     # root is the data set's own folder

    def found():
        return next(((home, home / images) for home, images in places if (home / images / source.holds).is_dir()), None)

    if found():
        return found()
    home = places[0][0]
    if not source.archive:
        raise UserError(f"{source.name} is not under {root} and cannot be downloaded: put its pictures into "
                        f"{Path(*places[0])}: {source.by_hand}")
    if source.split:
        find_split(source, home)     # first, since the archive is of no use without it
    archive = home / source.archive.rsplit("/")[-1]
    if not archive.exists():
        fetch(source.archive, archive, "md5", source.md5)
    elif file_digest(archive, "md5") != source.md5:     # put there by hand
        raise UserError(f"{archive} is not {source.archive} as it should be (md5): remove it, to download it again")
    with tempfile.TemporaryDirectory(dir=home, prefix=".unpack.") as temporary:
        try:     # tarfile's filter refuses members that leave the folder; of zip files shutil leaves such ones out
            for packed in [archive] + [Path(temporary, source.nested)] * bool(source.nested):
                if not packed.is_file():
                    raise shutil.ReadError(f"no {source.nested} in it")
                shutil.unpack_archive(packed, temporary, **{} if packed.suffix == ".zip" else {"filter": "data"})
            if not Path(temporary, source.inside).is_dir():
                raise shutil.ReadError(f"no folder {source.inside} in it")
        except Exception as error:     # of a broken archive, of many kinds; those of the disk have a number
            if getattr(error, "errno", None):
                raise
            raise UserError(f"{archive} cannot be unpacked ({error}): remove it, to download it again") from error
        put_in_place(Path(temporary, source.inside), home / Path(source.inside).name)
    return found()


def find_split(source, home):
    """-> CoOp's list in the set's folder; one that is there is the user's choice, else it is downloaded."""
    path = home / source.split
    if not path.exists():
        fetch(SPLITS + source.split, path, "git", source.blob)
    return path


def fetch(url, path, algorithm, digest):
    """download(), with the way out for a machine that cannot reach the url."""
    try:
        download(url, path, algorithm, digest)
    except UserError as error:
        raise UserError(f"{path} is missing: put {url} there ({error})") from error


def put_in_place(made, folder):
    """Rename a finished folder. Where another process did it first, that one stays."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


# ---- Pictures ----


@contextmanager
def opened(path):
    """A picture file with its header read; whatever breaks in the block is a UserError with the path."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:     # on broken files Pillow raises OSError, SyntaxError, struct.error and others
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}): replace it") from error


def read(path, own=False):
    """-> RGB picture, as CoOp's convert("RGB"), but 16-bit grey is scaled, where convert makes it white.

    A user's own: upright as its EXIF says, and on white where it is transparent. Benchmarks: neither, as in CoOp.
    """
    with opened(path) as image:
        if own:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):     # 16-bit grey is I;16, to older Pillows I
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")     # 65535 -> 255
        if own and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def augment(resolution, scale=(0.08, 1.0)):
    """CoOp's training transform, RGB picture -> (3, R, R). Tip-Adapter's and FG-VPL's scale is (0.5, 1)."""
    crop = T.RandomResizedCrop(resolution, scale, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


# ---- Batches ----


class Pictures(Dataset):
    """(number of a picture, random seed of its transform or None) -> (tensor, label).

    A picture that cannot be read stops the run: skipping it would change the score.
    """

    def __init__(self, items, transform, own=False):
        self.items, self.transform, self.own = items, transform, own
        self.decoded = None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        number, seed = key
        path, label = self.items[number]
        picture = self.decoded[number] if self.decoded else read(path, self.own)
        if seed is None:
            return self.transform(picture), label
        with torch.random.fork_rng(devices=[]):     # torchvision draws from PyTorch's stream, which is not ours to use
            torch.default_generator.manual_seed(seed)
            return self.transform(picture), label

    def decode_all(self, limit_bytes=KEEP_BYTES):
        """Decode all pictures once, into memory, if they fit; transforms still run each time. -> whether they fit."""
        size = 0
        for path, _ in self.items:
            with opened(path) as image:
                size += image.width * image.height * 4     # Pillow's RGB takes 4 bytes
            if size > limit_bytes:
                return False
        with ThreadPoolExecutor() as pool:
            self.decoded = list(pool.map(lambda item: read(item[0], self.own), self.items))
        return True


class Batches:
    """Batches of images (B, 3, R, R) and labels (B,) on a device.

    `for images, labels in batches` walks through all pictures in their order. `epoch(number)` walks through them in a
    random order, without the last short batch if `drop_last`. With a `seed` each walk augments the pictures anew; order
    and augmentation depend on the seed, the epoch and the picture alone, not on how many workers there are.
    """

    def __init__(self, pictures, batch_size, device, workers=0, seed=None, drop_last=False):
        self.pictures, self.device, self.batch_size, self.seed = pictures, device, batch_size, seed
        self.drop_last = drop_last and len(pictures) >= batch_size     # a short batch stays if it is the only one
        self.walks, self.keys = 0, []
        fork = "fork" if workers and sys.platform == "linux" else None     # shares decoded pictures without a copy
        self.loader = DataLoader(pictures, batch_sampler=self.keys, num_workers=workers, persistent_workers=workers > 0,
                                 multiprocessing_context=fork, pin_memory=device.type == "cuda",
                                 generator=torch.Generator())     # of its own: a walk must not move PyTorch's stream

    def __len__(self):
        """Batches of an epoch."""
        return (len(self.pictures) if self.drop_last else len(self.pictures) + self.batch_size - 1) // self.batch_size

    def __iter__(self):
        self.walks += 1
        return self.walk(-self.walks, range(len(self.pictures)), random.Random(f"{self.seed} {-self.walks}"))

    def epoch(self, number):
        """Batches in random order, the same for the same seed and number."""
        rng, order = random.Random(f"{self.seed} {number}"), list(range(len(self.pictures)))
        rng.shuffle(order)
        return self.walk(number, order[: len(self) * self.batch_size], rng)

    def walk(self, number, order, rng):
        keys = [(i, None if self.seed is None else rng.getrandbits(32)) for i in order]
        self.keys[:] = [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]
        for n, (images, labels) in enumerate(self.loader, 1):
            if number < 0:     # an epoch has a line of its own
                show(f"pictures  walk {-number}, batch {n} of {len(self.keys)}")
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def few_shot_batches(bench, clip, recipe, seed, device, workers):
    """The training pictures, augmented; decoded once if they fit into memory."""
    pictures = Pictures(bench.train, augment(clip.visual.resolution, recipe["crop_scale"]), bench.own)
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

SIDE = 40     # pixels
COLOURS = {"red": (205, 45, 45), "green": (45, 155, 60), "blue": (50, 80, 205), "yellow": (225, 205, 60),
           "purple": (140, 60, 165), "orange": (235, 135, 45), "white": (232, 232, 232), "black": (32, 32, 32)}
TEXTURES, FORMS = ("plain", "striped", "barred", "dotted", "checkered"), ("circle", "square", "triangle", "diamond")
CLASS_TEXTURES, CLASS_COLOURS, NEUTRAL_COLOURS = TEXTURES[1:], tuple(COLOURS)[:3], tuple(COLOURS)[3:]     # 12 classes


@dataclass(frozen=True)
class World:
    """A dataset of drawn objects. Its classes are a texture and a colour: of the ground, or of the object itself."""
    coloured: str = "ground"
    classname: str = "{colour} {texture} shape"     # to the tiny CLIP a colour in front of "shape" is the object's
    misleading: float = 0.45                        # how often the other of the two has the colour of another class
    noise: tuple = (0.3, 0.8)                       # share of random pixels, from a clear picture to a hopeless one
    zoom: float = 1.0
    cast: tuple | None = None                       # colour matrix, rows for red, green and blue


# The names of `shapes` are at odds with the tiny CLIP's captions: text prompts mend it. Those of `shapes_tint` fit, but
# its pictures lie under a colour cast: visual prompts mend it. The rest are to `shapes` what ImageNet's four are to it.
WORLD = {
    "shapes": World(),
    "shapes_tint": World("colour", "{texture} {colour} shape", misleading=0.0, noise=(0.2, 0.6),
                         cast=(0.5, 0.1, 0.4, 0, 0.45, 0.45, 0.1, 0, 0.1, 0.5, 0.4, 0)),
    "shapes_v2": World(noise=(0.35, 0.8), zoom=1.1),
    "shapes_sketch": World(cast=(0.6, 0.2, 0.2, 30, 0.2, 0.6, 0.2, 30, 0.2, 0.2, 0.6, 30)),
    "shapes_a": World(misleading=1.0, noise=(0.5, 0.8)),
    "shapes_r": World(zoom=1.5, cast=(0.7, 0.3, 0, 20, 0, 0.9, 0, 10, 0, 0.2, 0.6, 0)),
}


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
                (picture.convert("RGB", world.cast) if world.cast else picture).save(place / f"{i:03d}.png")


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
