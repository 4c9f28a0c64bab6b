"""Prompts that were learned before: by an earlier run, or by the official code of a paper.

For --prompts support/settings.py takes the options from what read_learned() gives, and train.py the method, instead of
training it. What does not fit ends in one sentence that names the tensor; what fits by its shape alone, in a warning.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from clip_min import START, UserError, encode
from support.checks import columns
from support.files import expanded, readable
from support.folders import shortened, warn
from support.foreign import EMBEDDINGS, read_file, read_official

AUXILIARY = "aux_classifier.weight"  # belongs to the classes that were trained on, and no evaluation reads it
OF_A_RUN = {"method", "options", "data_path", "backbone", "classnames", "class_ids", "train", "tensors"}


class Learned(NamedTuple):
    path: Path
    tensors: dict  # {our name: tensor}
    saved: dict  # all that the prompts.pt of a run of ours holds; of others nothing
    embeddings: dict  # EMBEDDINGS of others, where they are in the files

    @property
    def name(self):
        """For the name of the run's folder: the path's last part and six characters of what the tensors hold."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {size(tensor)}".encode() + tensor.numpy().tobytes())
        return f"{self.path.name}-{digest.hexdigest()[:6]}"

    def options(self, defaults):
        """-> the options that the tensors were learned with, as far as they tell. defaults: all of the method's."""
        if self.saved:
            return {name: value for name, value in self.saved["options"].items() if name in defaults}
        options, ctx, visual = {}, self.tensors.get("ctx"), self.tensors.get("visual_prompts")
        if ctx is not None:  # (M, D), or (K, M, D) with csc
            options |= dict(n_ctx=ctx.shape[-2], csc=ctx.dim() == 3)
            if len(encode(defaults.get("ctx_init", ""))) != ctx.shape[-2]:
                options["ctx_init"] = ""
        if visual is not None:  # (L, P, D)
            layers = len(visual)
            options |= dict(n_visual=visual.shape[1], deep=layers > 1)
            first = layers + 1 - sum(name.endswith("fc.weight") for name in self.tensors)
            if first < layers or layers > 12:  # the default, 12, is the last of up to 12 layers
                options["cavpt_layers"] = f"{first}-{layers}"
        return {name: value for name, value in options.items() if name in defaults}

    def trained_on(self, folder):
        """-> the Benchmark.fingerprints() of a run of ours, as without_trained() reads them for data in `folder`."""
        if self.saved and self.saved["data_path"] != str(folder):  # the same paths are other pictures there
            return {f"{self.saved['data_path']}/{path}": digest for path, digest in self.saved["train"].items()}
        return self.saved.get("train", {})

    def put_into(self, method, bench, settings):
        """Give these tensors to a new method for the classes of `bench`. UserError if they do not fit."""
        tensors, trained_for = self.tensors, self.saved.get("classnames", method.classnames)
        if trained_for != method.classnames:  # what belongs to the classes trained on is read in part, or refused
            trained = type(method)(method.clip, trained_for, settings.templates, **settings.options)
            trained = self.fill(trained.to(method.zero_shot.device), tensors)
            tensors = trained.for_classes(bench.classnames, columns(bench, self.saved["class_ids"])).learned()
        self.fill(method, tensors)
        for what, here in dict(backbone=settings.backbone, shots=settings.shots).items():
            if self.saved.get(what, here) != here:
                warn(f"{self.path} was learned with {what} {self.saved[what]}, and this run has {here}")
        if self.embeddings.keys() >= set(EMBEDDINGS):
            self.compare_embeddings(method)
        print(f"taken over  {sum(tensor.numel() for tensor in tensors.values()):,} numbers from {self.path}")

    def fill(self, method, tensors):
        """-> the method with the tensors. An auxiliary classifier that is missing or does not fit stays as it is."""
        for name, tensor in method.learned().items():
            if name.endswith(AUXILIARY) and size(tensors.get(name)) != size(tensor):
                tensors = tensors | {name: tensor}
        try:
            method.load_learned(tensors)
        except (UserError, LookupError, RuntimeError, TypeError) as error:
            here = method.learned()
            name = next((name for name in here | tensors if size(tensors.get(name)) != size(here.get(name))), None)
            detail = f"{name} is {size(tensors.get(name))} there and {size(here.get(name))} here" if name else error
            raise UserError(f"{self.path} does not fit this {type(method).__name__} ({detail}): give the --backbone, "
                            "--data and --set that it was learned with.") from error
        return method

    def compare_embeddings(self, method):
        """Warn of contexts that were learned with another CLIP, and of class-specific ones of other classes."""
        prefix, suffix = (self.embeddings[key] for key in EMBEDDINGS)  # (K, 1, D), (K, 76-M, D)
        clip, ctx = method.clip, self.tensors["ctx"]
        table, n_ctx = clip.text.token_embedding.weight.cpu(), ctx.shape[-2]
        if not alike(prefix[0, 0], table[START]):
            warn(f"{self.path} was learned with another CLIP, whose start token has another embedding: the accuracy "
                 "says nothing")
        elif ctx.dim() == 3:
            tokens = clip.tokenize([f"{'X ' * n_ctx}{name}." for name in method.classnames]).cpu()
            triples = zip(method.classnames, table[tokens[:, 1 + n_ctx :]], suffix, strict=True)
            others = [name for name, here, there in triples if not alike(here, there)]
            if others:
                warn(f"{self.path} has a context for each class, and {len(others)} of the {len(method.classnames)} "
                     f"classes were called otherwise where it was learned: {shortened(others)}")


def size(tensor):
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "one number"


def alike(here, there):
    """Whether embeddings are the same but for the rounding to half precision."""
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-2, atol=1e-5)


def read_learned(path, method):
    """A run's folder or prompts.pt, or output of the official code of this method -> Learned, or None for None.

    Anything else is a UserError.
    """
    if path is None:
        return None
    path = expanded(path).resolve()
    with readable(path):
        if not path.exists():
            raise UserError(f"{path} of --prompts does not exist: give a run's folder, or output of the official code.")
        file = path / "prompts.pt" if path.is_dir() else path
        saved = read_file(file) if file.is_file() else {}
        if isinstance(saved, dict) and "tensors" in saved:
            tensors, embeddings = saved["tensors"], {}
            is_whole = saved.keys() >= OF_A_RUN and isinstance(saved["options"], dict) and isinstance(tensors, dict)
            if not is_whole or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
                raise UserError(f"{file} is not a prompt file of train.py, something is missing: train again.")
            if saved["method"] != method:
                raise UserError(f"{path} is a run of {saved['method']}: give --method {saved['method']}.")
        else:
            saved, (tensors, embeddings) = {}, read_official(path, method)
    dimensions = dict(ctx=(2, 3), visual_prompts=(3,))
    for name, tensor in tensors.items():
        if not saved and tensor.dim() not in dimensions.get(name, (1, 2)):
            raise UserError(f"{path} has a {name} that is {size(tensor)}: {method} was not learned with it.")
        if not tensor.isfinite().all():
            raise UserError(f"{path} has numbers in {name} that are not finite: nothing can be computed with them.")
    return Learned(path, tensors, saved, embeddings)
