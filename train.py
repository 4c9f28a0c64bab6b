"""Train and evaluate any method on any dataset: one flat loop for all of them.

    python train.py                                                   # CoOp on drawn shapes, tiny CLIP: no download
    python train.py --method zeroshot --data dtd
    python train.py --method coop --data dtd --shots 4                # ViT-B/16, a CUDA GPU where there is one
    python train.py --method coop --data dtd --backbone ViT-B-16.pt   # a weights file of your own
    python train.py --data path/to/folder --shots 4 --seeds 1 2 3     # your own photographs, a folder per class
    python train.py --set n_ctx=4 class_token_position=middle         # a method's own options: see its file
    python train.py --load runs/shapes/coop/tiny_16shot_seed1         # evaluate a trained prompt again
    python train.py --load RUN --attention cat.jpg                    # what FG-VPL looks at, as a picture
    python train.py --method upt --data imagenet --eval-on imagenetv2 imagenet_sketch imagenet_a imagenet_r
    python train.py --summary                                         # all runs as a table and a picture

The papers' protocol: k pictures per class drawn with seeds 1, 2, 3, the model of the last epoch, top-1 on the full
test set. A run leaves runs/DATA/METHOD/BACKBONE_SHOTSshot_seedS/ with result.json and prompts.pt, the learned tensors.
"""

import argparse
import csv
import inspect
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import data
from clip_min import ASSETS, UserError, load_clip, preprocess
from coop import CoOp
from dpt import CAVPT, DPT, VLP
from fgvpl import FGVPL
from upt import UPT, inter_class_variance, intra_class_variance
from vpt import VPT


class ZeroShot(nn.Module):
    """CLIP as it is: the templates make the classifier. Nothing is learned. Radford et al., 2021, Section 3.1."""

    recipe = {}

    def __init__(self, clip, classnames, templates=("a photo of a {}.",)):
        super().__init__()
        self.clip = clip
        self.prompts = [templates[0].format(name.replace("_", " ")) for name in classnames]
        self.register_buffer("text", clip.classifier(classnames, templates), persistent=False)

    def encode_text(self):
        """-> (K, E), unit rows."""
        return self.text

    def features(self, images, text=None):
        """images (B, 3, R, R) -> image features (B, E), text features (K, E)."""
        return self.clip.encode_image(images), self.text if text is None else text

    def forward(self, images, text=None):
        """-> logits (B, K)."""
        return self.clip.logits(*self.features(images, text))


METHODS = {"zeroshot": ZeroShot, "coop": CoOp, "vpt": VPT, "vlp": VLP, "cavpt": CAVPT, "dpt": DPT,
           "upt": UPT, "fgvpl": FGVPL}

SHOWN = 336  # pixels, a side of each picture that --attention puts side by side

# On the embedded world the recipes are the papers' but for this, so that a run takes seconds.
WORLD_EPOCHS = 50

FLAGS = ("epochs", "lr", "warmup_epochs", "batch_size")  # they override the recipe


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", help=f"one of {', '.join(METHODS)} (default: coop)")
    parser.add_argument("--data", help="a dataset's name or a folder of pictures (default: shapes)")
    parser.add_argument("--root", default="data", help="where datasets are, or are put (default: data)")
    parser.add_argument("--shots", type=int, help="pictures per class, 0 for all (default: 16)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each (default: 1)")
    parser.add_argument("--backbone", help="tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a weights file "
                        "(default: tiny for shapes, else ViT-B/16)")
    parser.add_argument("--epochs", type=int, help="default: the recipe's, as for the three below")
    parser.add_argument("--lr", type=float, help="rates of single parts, such as DPT's text prompts, scale with it")
    parser.add_argument("--warmup-epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help="of the frozen towers; learned tensors are always fp32 (auto: bf16 or fp16 on CUDA)")
    parser.add_argument("--workers", type=int, help="processes that read pictures (default: 0 on a CPU, else up to 8)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        help="options of the method")
    parser.add_argument("--eval-on", nargs="+", action="extend", default=[], metavar="DATA",
                        help="test the run on these, too: shifted data of the same classes, such as imagenetv2 "
                        "imagenet_sketch imagenet_a imagenet_r")
    parser.add_argument("--out", default="runs", help="where runs are saved (default: runs)")
    parser.add_argument("--variance", action="store_true", help="also UPT's Appendix A: the variance of image features "
                        "within and of text features between the classes, before and after training")
    parser.add_argument("--load", metavar="RUN", help="evaluate what a finished run learned, with its settings, "
                        "instead of training")
    parser.add_argument("--attention", metavar="IMAGE", help="with --load: write what the method looks at in a picture")
    parser.add_argument("--summary", action="store_true", help="print a table of all runs under --out, mean and "
                        "standard deviation over seeds, and draw accuracy over shots as --out/summary.png")
    args = parser.parse_args(argv)
    try:
        for flag, least in dict(epochs=1, lr=1e-30, batch_size=1, warmup_epochs=0, workers=0, shots=0).items():
            if (given := getattr(args, flag)) is not None and not given >= least:
                allowed = "above 0" if least else "0 or more"
                raise UserError(f"--{flag.replace('_', '-')} is {given}: it must be {allowed}.")
        if args.summary:
            summarise(Path(args.out))
        elif args.attention:
            show_attention(args)
        elif args.load:
            evaluate_again(args)
        else:
            for seed in args.seeds or [1]:
                run(args, seed)
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback in front
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


def run(args, seed):
    """One training run, from settings to saved prompts."""
    started = time.time()
    name = args.method or "coop"
    method_class = METHODS.get(name)
    if method_class is None:
        raise UserError(f"There is no method {name}: choose one of {', '.join(METHODS)}.")
    options = parse_options(method_class, args.set, name)
    device, dtype = choose_device(args.device, args.precision)
    shots = 16 if args.shots is None else args.shots
    bench = data.load(args.data or "shapes", args.root, shots, seed)
    targets = load_targets(args, bench)
    if not bench.train and method_class.recipe:
        raise UserError(f"{bench.name} has test pictures only: train on other data, with --eval-on {bench.name}.")
    backbone = args.backbone or ("tiny" if bench.name in data.WORLD and not bench.own else "ViT-B/16")
    recipe = resolve_recipe(method_class.recipe, options, None if bench.own else bench.name, shots, args)
    options, templates = recipe.pop("options", {}) | options, recipe.pop("templates", bench.templates)
    file = Path(backbone).expanduser()
    saved = dict(method=name, options=options, recipe=recipe, shots=shots, seed=seed, precision=args.precision,
                 data=str(bench.folder.resolve()) if bench.own else bench.name,
                 backbone=str(file.resolve()) if file.is_file() else backbone,
                 classnames=list(bench.classnames), templates=list(templates))
    clip = load_clip(backbone, device)
    folder = Path(args.out) / bench.name / name / f"{backbone_label(backbone)}_{shots}shot_seed{seed}"
    make_folder(Path(args.out))  # now, so that a place that cannot be written to does not cost a training

    print(f"method    {name} {options or ''}")
    print(f"data      {bench.name}: {len(bench.classnames)} classes, {len(bench.train)} training pictures "
          f"({f'{shots} shots' if shots else 'all'}, seed {seed}), {len(bench.test)} test pictures")
    print(f"backbone  {backbone} on {device.type}, {str(dtype or torch.float32).removeprefix('torch.')}")
    print(f"recipe    {', '.join(f'{key} {value}' for key, value in recipe.items()) or 'nothing to train'}")

    torch.manual_seed(seed)  # initial prompts, order of pictures, augmentation
    method = method_class(clip, bench.classnames, templates, **options).to(device)
    cached = getattr(method, "has_cache", False)
    if cached:
        method.reserve(len(bench.train))
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    print(f"prompts   {' | '.join(method.prompts[:3])}   ({trainable:,} numbers to learn)")

    pictures = test_loader(bench, clip, device, args.workers)
    zero_shot = ZeroShot(clip, bench.classnames, templates)
    zero_shot_accuracy = accuracy = evaluate(zero_shot, pictures, device, dtype)
    print(f"zero-shot {zero_shot_accuracy:.2f} %")
    spread = {"before": variance(zero_shot, pictures, device, dtype)} if args.variance else {}
    began = time.time()
    if cached:
        prepare(method, bench, recipe, device, dtype, args.workers)
    if trainable:
        final_loss = train(method, bench, recipe, device, dtype, args.workers)
    seconds_training = time.time() - began
    if cached or trainable:
        accuracy = evaluate(method, pictures, device, dtype)
    if trainable:
        chance = math.log(len(bench.classnames))
        if accuracy < zero_shot_accuracy or abs(final_loss - chance) < 0.03 * chance:
            print(f"warning: training ended at loss {final_loss:.3f} (chance is ln K = {chance:.3f}) and "
                  f"{accuracy:.2f} % (zero-shot {zero_shot_accuracy:.2f} %): if it collapsed, try a smaller --lr.")
    papers = published(saved, saved["data"])
    print(f"accuracy  {accuracy:.2f} % of {len(bench.test)} test pictures after the last epoch{quoted(papers)}")
    shifts = evaluate_shifts(method, saved, bench, targets, accuracy, device, dtype, args.workers)
    if args.variance:
        spread["after"] = variance(method, pictures, device, dtype)
        for when, values in spread.items():
            print(f"variance  {when} training: {', '.join(f'{key} {value:.4f}' for key, value in values.items())}")

    tensors = {key: tensor.cpu() for key, tensor in own_state(method).items()}
    save(folder / "prompts.pt", torch.save, saved | dict(tensors=tensors))
    save(folder / "result.json", write_json, dict(
        method=name, data=bench.name, backbone=backbone, shots=shots, seed=seed, classes=len(bench.classnames),
        train_images=len(bench.train), test_images=len(bench.test), zero_shot=round(zero_shot_accuracy, 4),
        accuracy=round(accuracy, 4), published=papers[0][0] if papers else None,
        published_source=papers[0][1] if papers else None, shifts=shifts, trainable_parameters=trainable,
        seconds_training=round(seconds_training, 2), seconds_total=round(time.time() - started, 2),
        epochs=recipe["epochs"] if trainable else 0, recipe=recipe, options=options, picks=bench.picks,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **({"variance": spread} if spread else {})))
    print(f"saved     {folder}")


class Views:
    """Batches of the few-shot set in its order: every walk through it is another view, augmented anew."""

    def __init__(self, loader, device, views):
        self.loader, self.device, self.views, self.number = loader, device, views, 0

    def __iter__(self):
        self.number += 1
        for batch, (images, labels) in enumerate(self.loader, 1):
            if sys.stdout.isatty():
                line = f"cache     view {self.number}/{self.views}, batch {batch}/{len(self.loader)}"
                print("\r" + line.ljust(70), end="", flush=True)
            yield images.to(self.device, non_blocking=True), labels.to(self.device)


def prepare(method, bench, recipe, device, dtype, workers):
    """Show the method the few-shot set before training, with the training's augmentation."""
    augment = data.augment(method.clip.visual.resolution, recipe["crop_scale"])
    loader = picture_loader(bench, bench.train, augment, 100, device, workers, keep=True)
    views = Views(loader, device, method.cache_views)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        method.prepare(views)
    print(f"\rcache     {len(bench.train)} pictures, {views.number} views".ljust(70))


def train(method, bench, recipe, device, dtype, workers):
    """The loop. -> mean loss of the last epoch. Only the method's own parameters change."""
    augment = data.augment(method.clip.visual.resolution, recipe["crop_scale"])
    # Instead of its label each picture brings its row in the training list: FG-VPL's loss knows the pictures by it.
    numbered = [(path, row) for row, (path, _) in enumerate(bench.train)]
    targets = torch.tensor([label for _, label in bench.train], device=device)
    # A last short batch is dropped unless it is the only one, as Dassl does.
    drop_last = recipe.get("drop_last", True) and len(numbered) >= recipe["batch_size"]
    loader = picture_loader(bench, numbered, augment, recipe["batch_size"], device, workers, keep=True, shuffle=True,
                            drop_last=drop_last)
    takes_rows = "rows" in inspect.signature(method.loss).parameters
    per_step = recipe.get("cosine") == "steps"  # else the rate stays for an epoch
    learned = [p for p in method.parameters() if p.requires_grad]
    groups = method.parameter_groups() if hasattr(method, "parameter_groups") else [{"params": learned}]
    for group in groups:
        if "lr" in group:
            group["lr"] *= recipe["lr"] / method.recipe["lr"]
    if recipe["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe["lr"], momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], eps=1e-4, weight_decay=0.01)
    base = [(g["lr"], g.get("warmup_epochs", recipe["warmup_epochs"])) for g in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    began, epochs = time.time(), recipe["epochs"]
    method.train()
    for epoch in range(epochs):
        losses = []
        for step, (images, rows) in enumerate(loader):
            for group, (lr, warmup) in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = learning_rate(lr, epoch + (step / len(loader) if per_step else 0), epochs, warmup)
            images, rows = (x.to(device, non_blocking=True) for x in (images, rows))
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = method.loss(images, targets[rows], epoch, **({"rows": rows} if takes_rows else {}))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())  # read once per epoch: reading each would make a GPU wait
        losses = torch.stack(losses).tolist()
        rates = "/".join(dict.fromkeys(f"{g['lr']:.2g}" for g in optimizer.param_groups))
        bad = [step for step, value in enumerate(losses, 1) if not math.isfinite(value)]
        if bad or not all(p.isfinite().all() for p in learned):  # the last step has no loss behind it
            raise UserError(f"The loss or what it taught is no longer finite in epoch {epoch + 1}, step "
                            f"{bad[0] if bad else len(losses)}, at learning rate {rates}: nothing was saved, "
                            "try a smaller --lr or --precision fp32.")
        mean = sum(losses) / len(losses)
        left = (time.time() - began) / (epoch + 1) * (epochs - epoch - 1)
        line = f"epoch {epoch + 1}/{epochs}  loss {mean:.3f}  lr {rates}  {left:.0f} s left"
        if sys.stdout.isatty() or epoch == epochs - 1:  # one line that is written over; in a log only the last
            print("\r" + line.ljust(70), end="\n" if epoch == epochs - 1 else "", flush=True)
    return mean


def learning_rate(base, epoch, epochs, warmup):
    """Dassl's schedule: 1e-5 for the first `warmup` epochs, then a cosine whose period is not shortened by them.

    So it starts at base and ends above zero. CoOp, VPT, DPT and UPT were trained with it, one rate per epoch; a broken
    number of epochs and no warm-up give the plain cosine over all steps, FG-VPL's.
    """
    return 1e-5 if epoch < warmup else base / 2 * (1 + math.cos(math.pi * (epoch - warmup) / epochs))


@torch.no_grad()
def evaluate(method, loader, device, dtype, columns=None):
    """-> top-1 accuracy in percent of all pictures (micro average), of all classes or the columns given."""
    method.eval()
    correct = torch.zeros((), dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        text = method.encode_text()  # once
        for images, labels in loader:
            images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
            logits = method(images, text)
            logits = logits if columns is None else logits[:, columns]
            correct += (logits.argmax(dim=-1) == labels).sum()
    return 100 * correct.item() / len(loader.dataset)


@torch.no_grad()
def variance(method, loader, device, dtype):
    """-> UPT's Var_v (Eq. 6-7) of the test pictures and Var_t (Eq. 8) of the classifier, by name, of unit features."""
    method.eval()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        text = method.encode_text()
        batches = [(method.features(images.to(device), text)[0], labels) for images, labels in loader]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return {"image_within_classes": intra_class_variance(images, labels.to(device)).item(),
            "text_between_classes": inter_class_variance(text).item()}


def load_targets(args, bench):
    """--eval-on -> Benchmarks whose classes are bench's or some of them, each of another name."""
    targets = [data.load(name, args.root, 0) for name in args.eval_on]
    for i, target in enumerate(targets):
        if target.name in [bench.name, *(other.name for other in targets[:i])]:
            raise UserError(f"--eval-on names {target.name}, which is tested already: name each data set once.")
        shifted = bench.class_ids and target.class_ids and set(target.class_ids) <= set(bench.class_ids)
        if target.classnames != bench.classnames and not shifted:
            raise UserError(f"The classes of {target.name} are not those of {bench.name}: give --eval-on shifted data "
                            "of the same classes.")
    return targets


def transferred(method, saved, bench, target):
    """A trained method for the target's classes -> (method, columns of its logits that are meant, None for all).

    Prompts are rebuilt around the target's class names, and what only training used, CAVPT's classifier, is dropped.
    What is tied to the training classes, FG-VPL's cache and contexts per class, stays whole and is read in part.
    """
    if target.classnames == bench.classnames:
        return method, None
    if getattr(method, "has_cache", False) or saved["options"].get("csc"):
        return method, [bench.class_ids.index(i) for i in target.class_ids]
    rebuilt = type(method)(method.clip, target.classnames, saved["templates"], **saved["options"])
    rebuilt.load_state_dict({k: v for k, v in own_state(method).items() if "aux_classifier" not in k}, strict=False)
    return rebuilt, None


def evaluate_shifts(method, saved, bench, targets, accuracy, device, dtype, workers):
    """--eval-on: UPT's Table 1 and DPT's Table III -> {data set: accuracy}. accuracy: the source's."""
    shifts = {}
    for target in targets:
        model, columns = transferred(method, saved, bench, target)
        pictures = test_loader(target, method.clip, device, workers)
        shifts[target.name] = round(evaluate(model, pictures, device, dtype, columns), 4)
        papers = [] if bench.own or target.own else published(saved, target.name)
        print(f"shift     {shifts[target.name]:.2f} % of {len(target.test)} test pictures of {target.name}"
              f"{quoted(papers)}")
    if shifts:
        print(f"average   {statistics.mean([accuracy, *shifts.values()]):.2f} % with {bench.name}, "
              f"{statistics.mean(shifts.values()):.2f} % of the shifted alone (OOD average)")
    return shifts


def settings(run):
    """A run's options and flags, and what they are by default on its data, both spelled as in assets/published.csv."""
    recipe = resolve_recipe(METHODS[run["method"]].recipe, run["options"], run["data"], run["shots"])
    parameters = inspect.signature(METHODS[run["method"]]).parameters.values()
    default = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | recipe.pop("options", {})
    default |= {key: recipe[key] for key in FLAGS if key in recipe}

    def spelled(values):
        return {key: f"{value:g}" if isinstance(value, float) else str(value).lower() for key, value in values.items()}

    own = run["options"] | run["recipe"]
    return spelled({key: own.get(key, value) for key, value in default.items()}), spelled(default)


def published(run, data_name):
    """What the papers report for exactly this run: [(accuracy, "DPT, Table II"), ...], most often one or none."""
    wanted = (run["method"], run["backbone"], "0" if run["method"] == "zeroshot" else str(run["shots"]), data_name)
    setting, default = settings(run)
    with (ASSETS / "published.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if tuple(row[key] for key in ("method", "backbone", "shots", "dataset")) == wanted]
    return [(float(row["accuracy"]), f"{row['paper']}, {row['table']}") for row in rows
            if default | dict(pair.split("=", 1) for pair in row["options"].split(";") if pair) == setting]


def quoted(papers):
    return f"  ({'; '.join(f'{source}: {value:.2f}' for value, source in papers)})" if papers else ""


def test_loader(bench, clip, device, workers):
    """Batches of (images, labels) of the full test set."""
    return picture_loader(bench, bench.test, preprocess(clip.visual.resolution), 100, device, workers)


def picture_loader(bench, items, transform, batch_size, device, workers, keep=False, **order):
    """Batches of (images, labels). keep: few-shot pictures are decoded once and kept, if they fit (data.KEEP_BYTES)."""
    pictures = data.Pictures(items, transform, bench.own)
    if keep:
        pictures.keep()
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    fork = "fork" if workers and sys.platform == "linux" else None  # shares the kept pictures instead of copying them
    return DataLoader(pictures, batch_size, num_workers=workers, persistent_workers=workers > 0,
                      multiprocessing_context=fork, pin_memory=device.type == "cuda", **order)


def resolve_recipe(recipe, options, data_name, shots, args=None):
    """The paper's settings for these options, dataset and shots, with the flags that were given on top."""
    if not recipe:
        return {}
    recipe = dict(recipe)
    variants = recipe.pop("variants", {})
    for key, value in options.items():
        recipe |= variants.get(f"{key}={value}", {})
    recipe |= recipe.pop("datasets", {}).get(data_name, {})
    if data_name in data.WORLD and recipe["epochs"]:
        recipe["epochs"] = WORLD_EPOCHS
    elif isinstance(recipe["epochs"], dict):  # by shots: the next lower count decides, all pictures are the most
        counts = [n for n in recipe["epochs"] if n <= shots or not shots]
        recipe["epochs"] = recipe["epochs"][max(counts)]
    return recipe | {key: given for key in FLAGS if (given := getattr(args, key, None)) is not None}


def parse_options(method_class, pairs, name):
    """["n_ctx=4", ...] -> {"n_ctx": 4, ...}: the keyword-only arguments of the method, typed as their defaults are."""
    signature = inspect.signature(method_class).parameters.values()
    defaults = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    options = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in defaults:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise UserError(f"{name} has no option {key}; its options and their defaults: {known}.")
        kind = int if defaults[key] is None else type(defaults[key])
        try:
            options[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
            if kind is int and options[key] < 0:
                raise ValueError
        except (KeyError, ValueError):
            kinds = {int: "whole number from 0", float: "number", bool: "true or false", str: "text"}
            raise UserError(f"--set {pair}: {key} takes a {kinds[kind]}, such as {defaults[key]}.") from None
    return options


def choose_device(device, precision):
    """-> (torch.device, autocast dtype or None for fp32). bf16 and fp16 are chosen by themselves on CUDA only."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA GPU here, use --device cpu or its CUDA build.")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--device {device} cannot be used by PyTorch here: use cuda or cpu.") from error
    device = torch.device(device)
    if precision == "auto":  # emulated bf16, as on a V100 or T4, is slower than fp16
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if device.type != "cuda" else "bf16" if native else "fp16"
    return device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def evaluate_again(args):
    """--load: the saved prompts on the full test set again. The data come from --root, the rest from the run."""
    method, saved, device, dtype = restore(args)
    bench = data.load(args.data or saved["data"], args.root, saved["shots"], saved["seed"])
    if bench.classnames != saved["classnames"]:
        theirs, ours = (", ".join(names[:3]) for names in (saved["classnames"], bench.classnames))
        raise UserError(f"{args.load} was trained for the classes {theirs}, ..., and {bench.name} has {ours}, ...: "
                        "choose the data of that run.")
    targets = load_targets(args, bench)
    accuracy = evaluate(method, test_loader(bench, method.clip, device, args.workers), device, dtype)
    print(f"accuracy  {accuracy:.2f} % of {len(bench.test)} test pictures of {bench.name} ({args.load})")
    evaluate_shifts(method, saved, bench, targets, accuracy, device, dtype, args.workers)


@torch.no_grad()
def show_attention(args):
    """--attention: the picture as CLIP sees it, the attention map, Otsu's mask, and the object, side by side."""
    if not args.load:
        raise UserError("--attention shows what a trained method looks at: name its run with --load.")
    method, _, device, dtype = restore(args)
    if not hasattr(method, "attention"):
        raise UserError(f"{args.load} is a run of {type(method).__name__}: only those of fgvpl have an attention map.")
    resolution = method.clip.visual.resolution
    picture = data.read(args.attention, own=True)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        maps = method.attention(preprocess(resolution)(picture).unsqueeze(0).to(device))
    side = math.isqrt(maps[0].shape[1])
    attention, otsu, region = (values[0].view(side, side).float().nan_to_num(0).cpu() for values in maps)
    attention = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    seen = transforms.Compose(preprocess(resolution).transforms[:2])(picture).resize((SHOWN, SHOWN))
    dark = Image.new("RGB", seen.size)
    sheet = Image.new("RGB", (4 * SHOWN + 3 * 8, SHOWN), "white")
    panels = [torch.ones(1, 1), 0.1 + 0.9 * attention, otsu, 0.2 + 0.8 * region]  # how much of the picture shows
    for number, light in enumerate(panels):
        light = Image.fromarray((255 * light).byte().numpy()).resize(seen.size, Image.Resampling.NEAREST)
        panel = light if number == 2 else Image.composite(seen, dark, light)
        sheet.paste(panel, (number * (SHOWN + 8), 0))
    path = Path(args.load) / f"attention_{Path(args.attention).stem}.png"
    save(path, lambda image, part: image.save(part, "PNG"), sheet)
    print(f"saved     {path}: picture, attention map, Otsu's mask, object ({int(region.sum())} of {side**2} patches)")


def restore(args):
    """A finished run -> (method with what it learned, prompts.pt, device, autocast dtype)."""
    path = Path(args.load) / "prompts.pt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give --load the folder of a finished run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        name, options, tensors = saved["method"], saved["options"], saved["tensors"]
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        known = inspect.signature(METHODS[name]).parameters.keys() >= options.keys()
        keys = {"data", "shots", "seed", "backbone", "precision", "classnames", "templates", "recipe"}
        if not keys <= saved.keys():  # written by an older train.py
            raise KeyError(keys - saved.keys())
    except Exception as error:  # any file can stand there
        raise UserError(f"{path} is not a prompt file of train.py ({type(error).__name__}): train again.") from error
    if (args.method or name) != name or not known:
        raise UserError(f"{path} holds prompts of {name} with {options}, not of {args.method or name}: "
                        "leave --method out.")
    precision = saved["precision"] if args.precision == "auto" else args.precision
    device, dtype = choose_device(args.device, precision)
    clip = load_clip(args.backbone or saved["backbone"], device)
    method = METHODS[name](clip, saved["classnames"], saved["templates"], **options).to(device)
    if "labels" in tensors and hasattr(method, "reserve"):
        method.reserve(len(tensors["labels"]))
    if shapes != {key: tensor.shape for key, tensor in own_state(method).items()}:
        raise UserError(f"The tensors in {path} do not fit {name} on this backbone: use {saved['backbone']}.")
    method.load_state_dict(tensors, strict=False)  # CLIP's own are not in it
    return method, saved, device, dtype


def own_state(method):
    """What a method learned or gathered, by name: all of its state but CLIP's."""
    return {key: tensor for key, tensor in method.state_dict().items() if not key.startswith("clip.")}


def read_result(path):
    """result.json -> the run, with its row's label, and accuracies and papers' numbers by data set; None if broken."""
    try:
        run = json.loads(path.read_text())
        setting, default = settings(run)
        changed = [f"{key}={setting[key]}" for key in setting if setting[key] != default[key]]
        accuracies = {**run["shifts"], run["data"]: run["accuracy"]}
        papers = {name: published(run, name) if run["published"] else [] for name in accuracies}
        return run | dict(label=" ".join([run["method"], *changed]), accuracies=accuracies, papers=papers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # any file can have that name
        print(f"warning: {path} is left out, it is no result of train.py ({error!r})", file=sys.stderr)


def summarise(out):
    """--summary: the runs under `out` as a Markdown table, and their accuracy over shots as a picture."""
    rows, papers = {}, {}  # (label, backbone, shots) -> data set -> accuracies of the seeds, or the papers' numbers
    zero_shot = {}  # (label, backbone) -> data set -> accuracy; FG-VPL's templates are its own
    for run in filter(None, map(read_result, sorted(out.rglob("result.json")))):
        key = run["label"], run["backbone"], run["shots"]
        zero_shot.setdefault(key[:2], {})[run["data"]] = run["zero_shot"]
        papers.setdefault(key, {}).update(run["papers"])
        for name, accuracy in run["accuracies"].items():
            rows.setdefault(key, {}).setdefault(name, []).append(accuracy)
    if not rows:
        raise UserError(f"There is no result.json under {out}: train something first, or give its --out.")
    sets = sorted({name for row in zero_shot.values() for name in row})
    names = sets + sorted({name for row in rows.values() for name in row} - set(sets))
    averaged = [name for name in sets if name in data.BENCHMARKS] or sets

    def cell(values, paper):
        beside = "".join(f"; paper {value:.2f}" for value, _ in paper[:1])
        return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f} ({len(values)}{beside})"

    print("Accuracy in percent, mean ± standard deviation (number of seeds; the paper's)\n")
    print(f"| method | backbone | shots | {' | '.join(names)} | average of {len(averaged)} |")
    print("|---" * (len(names) + 4) + "|")
    curves, averages = {name: {} for name in sets}, {}  # data set -> method -> shots -> accuracy
    for (label, backbone, shots), row in sorted(rows.items(), key=lambda item: (*item[0][:2], item[0][2] or math.inf)):
        cells = [cell(row[name], papers[label, backbone, shots][name]) if name in row else "" for name in names]
        means = {name: statistics.mean(row[name]) for name in sets if name in row}
        origin, average = zero_shot[label, backbone], ""
        for name, mean in means.items():
            curves[name].setdefault(f"{label}, {backbone}", {0: origin[name]})[shots or math.inf] = mean
        if means.keys() >= set(averaged):
            average = statistics.mean(means[name] for name in averaged)
            start = {0: statistics.mean(origin[name] for name in averaged)}
            averages.setdefault(f"{label}, {backbone}", start)[shots or math.inf] = average
            average = f"{average:.2f}"
        print(f"| {label} | {backbone} | {shots or 'all'} | {' | '.join(cells)} | {average} |")
    if averages and len(averaged) > 1:
        curves = {f"average of {len(averaged)}": averages} | curves
    save(out / "summary.png", lambda image, part: image.save(part, "PNG"), draw_curves(curves))
    print(f"saved     {out / 'summary.png'}", file=sys.stderr)


def draw_curves(curves):
    """{data set: {label: {shots: accuracy}}} -> picture, a panel for each set, as Fig. 4 of UPT, DPT and FG-VPL."""
    labels = sorted({label for panel in curves.values() for label in panel})
    ticks = sorted({shots for panel in curves.values() for curve in panel.values() for shots in curve})
    colours = {label: f"hsl({360 * i // len(labels)}, 75%, {(42, 25)[i % 2]}%)" for i, label in enumerate(labels)}
    width, height, columns = 420, 300, min(len(curves), 4)
    bottom = -(-len(curves) // columns) * height
    image = Image.new("RGB", (max(columns, 2) * width, bottom + 20 * len(labels) + 20), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)

    def draw_panel(x, y, name, panel):
        values = [value for curve in panel.values() for value in curve.values()]
        low, high = math.floor(min(values) / 5) * 5, math.floor(max(values) / 5) * 5 + 5

        def place(shots, value):
            return (x + 50 + (width - 70) * (ticks.index(shots) + 0.5) / len(ticks),
                    y + 230 - 200 * (value - low) / (high - low))

        pen.text((x + width / 2, y + 14), name, "black", font, anchor="mm")
        pen.text((x + width / 2, y + 265), "labelled pictures per class", "black", font, anchor="mm")
        for value in range(low, high + 1, 5 if high - low <= 40 else 10):
            level = place(ticks[0], value)[1]
            pen.line((x + 50, level, x + width - 20, level), "lightgrey")
            pen.text((x + 44, level), str(value), "black", font, anchor="rm")
        for shots in ticks:
            pen.text((place(shots, 0)[0], y + 245), f"{shots:g}".replace("inf", "all"), "black", font, anchor="mm")
        for label, curve in panel.items():
            points = [place(shots, curve[shots]) for shots in sorted(curve)]
            pen.line(points, colours[label], 2)
            for u, v in points:
                pen.ellipse((u - 3, v - 3, u + 3, v + 3), colours[label])

    for number, (name, panel) in enumerate(curves.items()):
        draw_panel(number % columns * width, number // columns * height, name, panel)
    for i, label in enumerate(labels):
        pen.line((50, bottom + 20 * i + 10, 80, bottom + 20 * i + 10), colours[label], 3)
        pen.text((90, bottom + 20 * i + 10), label, "black", font, anchor="lm")
    return image


def backbone_label(backbone):
    """ "ViT-B/16" -> "ViT-B-16", "~/weights/ViT-B-16.pt" -> "ViT-B-16": a folder name."""
    return Path(backbone).stem if Path(backbone).expanduser().is_file() else backbone.replace("/", "-")


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out.") from error


def write_json(value, path):
    path.write_text(json.dumps(value, indent=1) + "\n")


def save(path, write, value):
    """write(value, path), whole or not at all: into a file beside it that is then renamed."""
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    try:
        write(value, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{path} cannot be written ({error}): make room or choose another --out.") from error


if __name__ == "__main__":
    sys.exit(main())
