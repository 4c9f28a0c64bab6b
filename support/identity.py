"""What a run is made of: its classes, the pictures of its data set and its weights, each as a digest.

train.py records made_of() in result.json, and data.py and support/checks.py know a picture by content().
support/changes.py compares. Equal digests mean equal things, on any machine and in any form of a weights file.
"""

import functools
import hashlib
from pathlib import Path

import torch

from clip_min import UserError, load_clip
from support.downloads import file_digest
from support.hub import local_weights

FEW = 20_000  # own pictures: of more only those that are tested are read, since a few shots take less time than all


def content(path):
    """sha256 of a user's own picture, read once per command unless it is written to. UserError if it cannot be read."""
    try:
        return digest_of_picture(Path(path), stamp(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}: {error.strerror}): see to "
                        "permissions and memory") from error


def stamp(path):
    """-> what changes where a file is written to or another one takes its place."""
    state = Path(path).stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


@functools.cache
def digest_of_picture(path, stamp):
    return file_digest(path, "sha256")


def made_of(bench, trained_on, weights, targets=()):
    """-> {"classes", "pictures", "train", "weights", "shifts"}, the digests that result.json keeps.

    "pictures" are all that the shots of any seed may be drawn from and all that are tested, so it is the same for every
    seed; "train" are those that were drawn. trained_on: Benchmark.fingerprints(); weights: of_clip(); targets: the
    Benchmarks of --eval-on.
    """
    return dict(classes=digest(bench.classnames), pictures=of_pictures(bench), train=digest(trained_on),
                weights=weights, shifts={target.title: of_pictures(target) for target in targets})


def digest(value):
    return hashlib.sha256(ascii(value).encode()).hexdigest()


def of_pictures(bench):
    """-> the digest of a data set's division: paths, labels and, of a user's own pictures, what they show."""
    shown = "".join(own_contents(bench).values()) if bench.own else ""
    return hashlib.sha256((bench.division + shown).encode("utf-8", "surrogateescape")).hexdigest()


def own_contents(bench):
    """-> {("train" or "test", path in the folder): content()} of a user's own pictures, as far as that is cheap."""
    contents, division = {}, bench.division.split("\0")
    for line in division:
        subset, _, path = line.split(" ", 2)
        place = bench.folder / path
        # A list may name pictures that are not there. Those in use are.
        if (subset == "test" or len(division) <= FEW) and place.exists():
            contents[subset, path] = content(place)
    return contents


def of_clip(clip):
    """-> the digest of a CLIP as load_clip() gives it: its fp32 weights, its activation and its numbers of heads."""
    heads = [tower.blocks[0].attn.heads for tower in (clip.visual, clip.text)]
    found = hashlib.sha256(f"{clip.activation} {heads}".encode())
    for name, weights in clip.named_parameters():
        found.update(name.encode())
        found.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def of_backbone(name, activation):
    """-> of_clip() of the weights that a name or a path means, or None where they would have to be fetched."""
    file = local_weights(name)
    return file and digest_of_weights(file, stamp(file), activation)


@functools.cache  # a sweep reads them once
def digest_of_weights(file, stamp, activation):
    return of_clip(load_clip(file, activation=activation))
