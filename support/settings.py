"""From the command line and a method's recipe to the settings of one run.

train.py calls resolve_settings() for every run of a command; report.py reads Settings back. A flag that is not given
leaves the decision to the recipe, and an option that a method does not have is an error that lists those it has.
"""

import argparse
import hashlib
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clip_min import UserError
from support.benchmarks import identify, spell
from support.files import expanded
from support.hub import OPENAI_MODELS, dashes
from support.prompts import read_learned
from support.world import WORLD

RECIPE_FLAGS = ("epochs", "lr", "warmup_epochs", "batch_size")  # they override the recipe
# Flags that also change a run.
OTHER_FLAGS = dict(precision="auto", activation=None, template="", base_to_new=False, prompts=None)
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
    changed: dict  # what the user changed, spelled as in assets/published.csv; "set.lr" is an option called like --lr

    @property
    def folder(self):
        """DATA/METHOD/BACKBONE_SHOTSshot_seedS; METHOD tells what was changed, such as upt,mode=mlp."""
        def name(text, path=""):  # two paths that end alike stay apart
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:6]
            return text.replace("/", "-") + (f"-{digest}" if path else "")

        method = ",".join([self.method, *(f"{key}={value}" for key, value in self.changed.items())])
        refused = {*'<>:"|?*\\'} & {*method} if sys.platform == "win32" else set()
        if len(method) > 150 or refused:  # long templates: most systems allow a name 255 bytes
            method = name("".join("-" if sign in refused else sign for sign in method[:100]), method)
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
    name, data_path = identify(data_name)
    is_drawn = name in WORLD and not data_path
    backbone, backbone_path = identify_backbone(args.backbone or ("tiny" if is_drawn else "ViT-B/16"))
    defaults = methods[method].default_options()
    options = parse_options(method, defaults, args.set)
    learned = read_learned(args.prompts, method)
    if learned:
        options = learned.options(defaults) | options
    recipe, data_options = resolve_recipe(methods[method].recipe, options, "" if data_path else name, shots)
    templates = recipe.pop("templates", [])
    recipe = {} if learned else recipe  # nothing is trained
    flags = {flag: getattr(args, flag) for flag in RECIPE_FLAGS if flag in recipe and getattr(args, flag) is not None}
    others = {flag: getattr(args, flag) for flag in OTHER_FLAGS} | dict(template=" | ".join(args.template))
    others["prompts"] = learned and learned.name
    # Each is compared with its own default: a method may have an option that is called like a flag.
    changed = {}
    for option, value in differences(options, defaults | data_options).items():
        changed[f"set.{option}" if option in (*RECIPE_FLAGS, *OTHER_FLAGS) else option] = value
    changed |= differences(flags, recipe) | differences(others, OTHER_FLAGS)
    return Settings(
        method=method, options=defaults | data_options | options, data=name, data_path=data_path, backbone=backbone,
        backbone_path=backbone_path, shots=shots, seed=seed, activation=args.activation or "",
        precision=args.precision, templates=args.template or list(templates), recipe=override(recipe, flags),
        changed=changed)


def differences(chosen, defaults):
    """-> {key: the chosen value as assets/published.csv spells it} where it is not the default."""
    return {key: spell(value) for key, value in chosen.items() if spell(value) != spell(defaults[key])}


def identify_backbone(backbone):
    """-> its name and, of a user's own file or folder of weights, the absolute path, else ""."""
    names = {dashes(name): name for name in OPENAI_MODELS}  # ViT-B-16 is ViT-B/16
    backbone, path = names.get(backbone, backbone), expanded(backbone)
    if path.exists() and backbone not in ("tiny", *OPENAI_MODELS):
        return path.name.removesuffix(path.suffix), str(path.resolve())
    return backbone, ""


def resolve_recipe(recipe, options, data_name, shots):
    """-> what the paper does on this data set, with these shots and options; the method's options on this data set.

    In a method's recipe `epochs` may be a table by shots, `variants` has what differs with an option, `datasets` what
    differs on a data set, options of the method among it, and `parts` the rates of single tensors. A variant may have
    `datasets` of its own.
    """
    recipe = {"variants": {}, "datasets": {}, "options": {}} | recipe
    variants = recipe.pop("variants")
    for option, value in options.items():
        recipe |= variants.get(f"{option}={value}", {})
    datasets = recipe.pop("datasets")
    recipe |= datasets.get(data_name, {})
    data_options = recipe.pop("options")
    epochs = recipe.get("epochs")
    if data_name in WORLD and epochs:
        recipe["epochs"] = WORLD_EPOCHS
    elif isinstance(epochs, dict):  # the next lower count of shots decides, all pictures are the most
        in_table = [n for n in epochs if shots == 0 or n <= shots]
        recipe["epochs"] = epochs[max(in_table)]
    return recipe, data_options


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
