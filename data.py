"""Few-shot data: a data set, its k shots per class, a picture as a tensor, and batches of them.

    bench = load("dtd", root="data", shots=4, seed=1)  # or load("path/to/my/folder")
    for images, labels in plain_batches(bench.test, clip, device, workers=0): ...  # (B, 3, R, R), (B,)

The protocol is CoOp's (arXiv:2109.01134, github.com/KaiyangZhou/CoOp), so that numbers can be compared:
- The pictures of train, val and test are those of CoOp's lists; torchvision splits the same pictures differently.
- For k shots every class gives random.sample(its pictures, k), in the order in which the classes first appear. Then
  every class of val gives min(k, 4) from the same stream. The same seed gives CoOp's pictures in CoOp's order.
- Pictures for training are randomly cropped and flipped. All test pictures are used, resized and centre-cropped as
  CLIP does it.

Where pictures come from stands behind the door: support/benchmarks.py finds or downloads the eleven benchmarks and
ImageNet's four shifts, support/world.py draws data sets that need no download, and support/own.py reads your own.
"""

import hashlib
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms as T

from clip_min import MEAN, STD, UserError, preprocess
from support.benchmarks import BENCHMARKS, Source, identify, read_benchmark
from support.checks import warn_of_few, warn_of_names, warn_of_untested
from support.console import show
from support.files import expanded, readable
from support.folders import find_files
from support.identity import content
from support.own import read_folder
from support.pictures import as_its_owner_sees_it, is_grey_of_16_bits, opened, scale_grey
from support.world import WORLD, find_world

KEEP_BYTES = 2 * 2**30  # 16 shots of DTD decode to about 0.8 GB; leaves room for CLIP on a machine with 8 GB


# ---- A data set ----


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
    division: str = field(default="", compare=False, repr=False)  # the whole split as text, by which changes are seen

    @property
    def picks(self):
        """sha256 of the training list: the same pictures in the same order give the same."""
        lines = (f"{self.relative(path)} {label}\n" for path, label in self.train)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def title(self):
        """The name that no other data set has: of a user's own the folder."""
        return str(self.folder) if self.own else self.name

    def relative(self, path):
        """A picture's path in the folder, which is the same on any machine."""
        return path[len(str(self.folder)) + 1 :]

    def fingerprints(self):
        """-> {path in the folder: sha256} of the training pictures, by which a finished run remembers them.

        Benchmarks have a fixed split: their pictures, a million on ImageNet, are not read for it.
        """
        return {self.relative(path): content(path) if self.own else "" for path, _ in self.train}


def load(name_or_folder, root="data", shots=16, seed=1, whole=False):
    """-> Benchmark with `shots` training pictures per class, or with all of them for 0.

    "dtd" is the benchmark and "./dtd" a folder. `root` is where benchmarks lie or are put. A folder that is only tested
    is read `whole`: all pictures of its class folders are test pictures.
    """
    if shots < 0:
        raise UserError(f"shots must be 0, for all pictures, or more, found {shots}")
    name, own_path = identify(name_or_folder)
    root, template, class_ids = expanded(root), Source.template, None
    with readable(own_path or root):
        if own_path:
            folder = Path(own_path)
            split, classnames = read_folder(folder, whole)
        elif name in WORLD:
            folder = find_world(name, root)
            split, classnames = read_folder(folder)
        else:
            folder, split, classnames, class_ids = read_benchmark(name, root)
            template = BENCHMARKS[name].template

    division = "\0".join(f"{subset} {label} {path}" for subset, items in split.items() for path, label in items)
    if shots:
        warn_of_few(split["train"], classnames, shots, own=bool(own_path))
        rng = random.Random(seed)  # the stream of CoOp's random.seed(seed); the global one is left alone
        split["train"] = sample(split["train"], shots, rng)
        split["val"] = sample(split["val"], min(shots, 4), rng)
    bench = Benchmark(name, [classname.replace("_", " ") for classname in classnames], (template,),
                      **find_files(folder, split), folder=folder, own=bool(own_path), class_ids=class_ids,
                      division=division)
    warn_of_names(bench)
    warn_of_untested(bench)
    return bench


def sample(items, k, rng):
    """k of the (path, label) per label, as Dassl draws them; a class with fewer is taken whole, without a draw."""
    groups = {}  # by label, in order of first appearance
    for item in items:
        groups.setdefault(item[1], []).append(item)
    chosen = []
    for group in groups.values():
        chosen += rng.sample(group, k) if len(group) >= k else group
    return chosen


# ---- A picture ----


def read(path, own=False):
    """-> RGB picture, as CoOp's convert("RGB"), but 16-bit grey is scaled, where convert makes it white.

    A user's own pictures may be turned, transparent, or grey with any range: they are made as their owner sees them.
    """
    with opened(path) as image:
        if own:
            image = as_its_owner_sees_it(image, path)
        elif is_grey_of_16_bits(image):
            image = scale_grey(image)
        return image.convert("RGB")


def augment(resolution, scale=(0.08, 1.0)):
    """CoOp's training transform, RGB picture -> (3, R, R). Tip-Adapter's and FG-VPL's scale is (0.5, 1)."""
    crop = T.RandomResizedCrop(resolution, scale, interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


class Pictures:
    """A view of a picture -> (tensor, label). A view is the picture's number and a seed, None where nothing is random.

    A picture that cannot be read stops the run: skipping it would change the score.
    """

    def __init__(self, items, transform, own=False):
        self.items, self.transform, self.own, self.decoded = items, transform, own, None

    def __getitem__(self, view):
        number, seed = view
        path, label = self.items[number]
        picture = self.decoded[number] if self.decoded else read(path, self.own)
        if seed is None:
            return self.transform(picture), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's stream, which is not ours to use
            torch.default_generator.manual_seed(seed)
            return self.transform(picture), label


def decode_all(pictures, limit_bytes=KEEP_BYTES):
    """Decode all pictures once, into memory, if they fit; transforms still run each time. -> whether they fit."""
    size = 0
    for path, _ in pictures.items:
        with opened(path) as image:
            size += image.width * image.height * 4  # Pillow's RGB takes 4 bytes
        if size > limit_bytes:
            return False
    with ThreadPoolExecutor() as pool:
        pictures.decoded = list(pool.map(lambda item: read(item[0], pictures.own), pictures.items))
    return True


# ---- Batches ----


def few_shot_batches(bench, clip, recipe, seed, device, workers):
    """The training pictures, augmented as the recipe says; decoded once if they fit into memory."""
    resolution, scale = clip.visual.resolution, recipe["crop_scale"]
    transform = augment(resolution, scale) if scale else preprocess(resolution)  # no scale: as CLIP sees them
    pictures = Pictures(bench.train, transform, bench.own)
    decode_all(pictures)
    return Batches(pictures, recipe["batch_size"], device, workers, seed, recipe.get("drop_last", True))


def plain_batches(items, clip, device, workers, own=False):
    """Pictures as CLIP sees them, resized and centre-cropped: the test set, for example."""
    return Batches(Pictures(items, preprocess(clip.visual.resolution), own), 100, device, workers)


class Batches:
    """Batches of images (B, 3, R, R) and labels (B,) on a device.

    `for images, labels in batches` walks through all pictures in their order, `epoch(number)` in a random one, where
    `drop_last` leaves out a short last batch, unless it is the only one. With a `seed` they are augmented, by the seed,
    the number of the walk or epoch and the picture, whatever the workers. One walk has to end before the next begins.
    """

    def __init__(self, pictures, batch_size, device, workers=0, seed=None, drop_last=False):
        self.pictures, self.device, self.batch_size, self.seed = pictures, device, batch_size, seed
        self.drop_last = drop_last and len(pictures.items) >= batch_size
        self.walks, self.next_batches = 0, NextBatches()
        fork = "fork" if workers and sys.platform == "linux" else None  # shares decoded pictures without a copy
        self.loader = DataLoader(pictures, batch_sampler=self.next_batches, num_workers=workers,
                                 persistent_workers=workers > 0, multiprocessing_context=fork,
                                 pin_memory=device.type == "cuda", generator=torch.Generator())  # not PyTorch's stream

    def __len__(self):
        """Batches of an epoch."""
        batches = len(self.pictures.items) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def share(self, rank=0, processes=1):
        """A walk in which each of several processes gets every `processes`-th batch."""
        self.walks += 1
        rng = random.Random(f"{self.seed} -{self.walks}")  # the minus tells a walk from the epoch of this number
        batches = self.in_batches(range(len(self.pictures.items)), rng)[rank::processes]
        for n, batch in enumerate(self.tensors(batches), 1):
            show(f"pictures  walk {self.walks}, batch {n} of {len(batches)}")
            yield batch

    __iter__ = share

    def epoch(self, number, first=0, rank=0, processes=1):
        """Batches in random order, the same for the same seed and number, from the batch `first` on.

        Each of several processes gets its share of every batch. Of fewer pictures than processes each gets all.
        """
        rng = random.Random(f"{self.seed} {number}")
        numbers = list(range(len(self.pictures.items)))
        rng.shuffle(numbers)
        batches = self.in_batches(numbers[: len(self) * self.batch_size], rng)[first:]
        return self.tensors([batch[rank::processes] if len(batch) >= processes else batch for batch in batches])

    def in_batches(self, numbers, rng):
        """-> the views of these pictures in batches. Every view has a seed from rng, or None if nothing is random."""
        views = [(number, None if self.seed is None else rng.getrandbits(32)) for number in numbers]
        return [views[start : start + self.batch_size] for start in range(0, len(views), self.batch_size)]

    def tensors(self, batches):
        """Batches of views -> batches of images and labels."""
        self.next_batches.batches = batches
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class NextBatches:
    """What the DataLoader loads in the next walk or epoch. A new DataLoader for each would start its workers anew."""

    batches = ()  # of views

    def __iter__(self):
        return iter(self.batches)
