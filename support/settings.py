"""From the command line and a method's recipe to the settings of one run.

train.py calls resolve_settings() for every run of a command; report.py reads Settings back. A flag that is not given
leaves the decision to the recipe, and an option that a method does not have is an error that lists those it has.
"""

import argparse
import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import data
from clip_min import UserError
from support.benchmarks import spell
from support.weights import OPENAI_MODELS, dashes
from support.world import WORLD

WORLD_EPOCHS = 50  # on the drawn data sets the recipes are the papers' but for this, so that a run takes seconds


@dataclass(frozen=True)
class Settings:
    """What a run is. result.json and prompts.pt hold these fields as they are."""

    method: str
    options: dict  # of the method, all of them
    data: str
    data_path: str  # of a user's own folder, else ""
    backbone: str
    backbone_path: str  # of a weights file, else ""
    shots: int  # per class, 0: all
    seed: int
    activation: str  # of the backbone's MLPs, "gelu" or "quickgelu"
    precision: str
    templates: list  # the user's, else those of the recipe, else the data set's
    recipe: dict  # for this data set, these shots and options, with the user's flags
    changed: dict  # what the user changed of options and recipe, spelled as in assets/published.csv

    @property
    def folder(self):
        """DATA/METHOD/BACKBONE_SHOTSshot_seedS; METHOD tells what was changed, such as upt,mode=mlp."""
        def name(text, path=""):  # two paths that end alike stay apart
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:6]
            return text.replace("/", "-") + (f"-{digest}" if path else "")

        method = ",".join([self.method, *(f"{key}={value}" for key, value in self.changed.items())])
        if len(method) > 150:  # long templates: most systems allow a name 255 bytes
            method = name(method[:100], method)
        run = f"{name(self.backbone, self.backbone_path)}_{self.shots}shot_seed{self.seed}"
        return Path(name(self.data, self.data_path), name(method), run)


def above(limit, kind, below=math.inf):
    """For argparse: a number between the limits."""
    def number(text):
        if not limit < kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not above {limit} and below {below}")
        return kind(text)
    return number


def template(text):
    """For argparse: a hand-written prompt."""
    with suppress(LookupError, ValueError):
        if text.format("") == text.replace("{}", "") != text:
            return text
    raise argparse.ArgumentTypeError(f"'{text}' needs one {{}} for the class name, and no other braces")


def resolve_settings(args, methods, data_name, method, shots, seed):
    """-> Settings of one run of the command: names settled, the recipe resolved, the user's flags on top."""
    name, data_path = data.identify(data_name)
    backbone = args.backbone or ("tiny" if name in WORLD and not data_path else "ViT-B/16")
    file, backbone_path = Path(backbone).expanduser(), ""
    backbone = {dashes(name): name for name in OPENAI_MODELS}.get(backbone, backbone)
    if file.exists() and backbone not in ("tiny", *OPENAI_MODELS):
        backbone, backbone_path = file.name.removesuffix(file.suffix), str(file.resolve())
    defaults = methods[method].default_options()
    options = parse_options(method, defaults, args.set)
    recipe, data_options = resolve_recipe(methods[method].recipe, options, "" if data_path else name, shots)
    templates = recipe.pop("templates", [])
    flags = {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    default = defaults | data_options | recipe | dict(precision="auto", activation=None, template="", base_to_new=False)
    chosen = options | flags | dict(precision=args.precision, activation=args.activation,
                                    template=" | ".join(args.template), base_to_new=args.base_to_new)
    changed = {key: spell(value) for key, value in chosen.items() if spell(value) != spell(default[key])}
    return Settings(method, defaults | data_options | options, name, data_path, backbone, backbone_path, shots, seed,
                    args.activation or "", args.precision, args.template or list(templates),
                    override(recipe, flags), changed)


def resolve_recipe(recipe, options, data_name, shots):
    """-> what the paper does on this data set, with these shots and options; the method's options on this data set.

    In a method's recipe `epochs` may be a table by shots, `variants` has what differs with an option, `datasets` what
    differs on a data set, options of the method among it, and `parts` the rates of single tensors.
    """
    recipe = dict(recipe)
    variants = recipe.pop("variants", {})
    for key, value in options.items():
        recipe |= variants.get(f"{key}={value}", {})
    recipe |= recipe.pop("datasets", {}).get(data_name, {})
    epochs = recipe.get("epochs")
    if data_name in WORLD and epochs:
        recipe["epochs"] = WORLD_EPOCHS
    elif isinstance(epochs, dict):  # the next lower count of shots decides, all pictures are the most
        recipe["epochs"] = epochs[max(n for n in epochs if n <= shots or not shots)]
    return recipe, recipe.pop("options", {})


def override(recipe, flags):
    """The recipe with the user's flags. The rates of single parts scale with the main one; a warm-up is for all."""
    parts = {}
    for name, part in recipe.get("parts", {}).items():
        rate = part["lr"] * flags.get("lr", recipe["lr"]) / recipe["lr"]
        parts[name] = dict(lr=rate, warmup_epochs=flags.get("warmup_epochs", part["warmup_epochs"]))
    return recipe | flags | ({"parts": parts} if parts else {})


def parse_options(method, defaults, pairs):
    """["n_ctx=4", ...] -> {"n_ctx": 4, ...}: options of the method, typed as their defaults are."""
    options, kinds = {}, {int: "whole number", float: "number", bool: "true or false", str: "text"}
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key not in defaults:
            known = ", ".join(f"{name}={default}" for name, default in defaults.items()) or "none"
            raise UserError(f"{method} has no option {key}; its options and their defaults: {known}.")
        kind = int if defaults[key] is None else type(defaults[key])
        try:
            options[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"--set {key}={value}: it takes a {kinds[kind]}, such as {defaults[key]}.") from None
    return options
