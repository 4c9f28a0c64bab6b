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



import hashlib
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms as T

from clip_min import MEAN, STD, UserError, preprocess
from support import benchmarks
from support.benchmarks import BENCHMARKS
from support.downloads import file_digest
from support.folders import find_files, read_folders, read_split, shortened, warn, working_folder
from support.world import WORLD, draw_world

KEEP_BYTES = 2 * 2**30  # 16 shots of DTD decode to about 0.8 GB; leaves room for CLIP on a machine with 8 GB


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
    root, folder, template, class_ids = Path(root).expanduser(), Path(path), benchmarks.Source.template, None
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
            template = BENCHMARKS[name].template
            folder, split, classnames, class_ids = benchmarks.read_benchmark(name, root)
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
