"""Train and evaluate any method on any data set: one small loop for all of them.

    python train.py                                                   # CoOp on drawn shapes, tiny CLIP: no download
    python train.py --method upt --data dtd --shots 4                 # ViT-B/16, a CUDA GPU where there is one
    python train.py --method coop --data dtd --backbone ViT-B-16.pt   # a weights file of your own
    python train.py --data path/to/folder --shots 4                   # your own photographs, a folder per class
    python train.py --set n_ctx=4 class_token_position=middle         # a method's own options: see its file
    python train.py --method coop vpt upt --data dtd --shots 1 2 4 8 16 --seeds 1 2 3    # a sweep
    python train.py --method upt --data imagenet --eval-on imagenetv2 imagenet_sketch imagenet_a imagenet_r

The papers' protocol: k pictures per class drawn with seeds 1, 2, 3, the model of the last epoch, top-1 on the full
test set. A run leaves runs/DATA/METHOD/BACKBONE_SHOTSshot_seedS/ with result.json, prompts.pt (what was learned) and
predictions.csv (the test pictures). report.py shows what finished runs hold.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import data
from clip_min import ASSETS, Method, UserError, load_clip
from coop import CoOp
from dpt import CAVPT, DPT, VLP
from fgvpl import FGVPL
from upt import UPT, inter_class_variance, intra_class_variance
from vpt import VPT

METHODS = {"zeroshot": Method, "coop": CoOp, "vpt": VPT, "vlp": VLP, "cavpt": CAVPT, "dpt": DPT, "upt": UPT,
           "fgvpl": FGVPL}
RECIPE_FLAGS = ("epochs", "lr", "warmup_epochs", "batch_size")  # given by the user, they override the recipe
WORLD_EPOCHS = 50  # on the drawn data sets the recipes are the papers' but for this, so that a run takes seconds


@dataclass(frozen=True)
class Settings:
    """What a run is. result.json and prompts.pt hold these fields as they are."""

    method: str
    options: dict  # the method's own, as given
    data: str
    data_path: str  # of a user's own folder, else ""
    shots: int  # per class, 0: all
    seed: int
    backbone: str
    backbone_path: str  # of a weights file, else ""
    precision: str
    recipe: dict  # resolved for this data set and these shots, with the user's flags

    @property
    def folder(self):
        """DATA/METHOD/BACKBONE_SHOTSshot_seedS; METHOD carries what differs from the defaults, such as upt,mode=mlp."""
        method = ",".join([self.method, *(f"{key}={value}" for key, value in changes(self).items())])
        run = f"{labelled(self.backbone, self.backbone_path)}_{self.shots}shot_seed{self.seed}"
        return Path(labelled(self.data, self.data_path), method.replace("/", "-"), run)


@dataclass(frozen=True)
class Machine:
    """Where a run computes, in which precision, and how many processes read its pictures."""

    device: torch.device
    dtype: torch.dtype | None  # of the frozen towers under autocast, None: fp32; learned tensors are always fp32
    workers: int

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


@dataclass(frozen=True)
class Evaluation:
    """What a method says about pictures: accuracy in percent, mean cross-entropy, and for each the class predicted."""

    accuracy: float
    cross_entropy: float
    predicted: list
    probability: list


def main(argv=None):
    args = parse_arguments(argv)

    def sweep():
        machine = choose_machine(args.device, args.precision, args.workers)
        for setting in itertools.product(args.data, args.method, args.shots, args.seeds):
            run(resolve_settings(args, *setting), args, machine)

    return exit_status(sweep)


def run(settings, args, machine):
    """One run, from its settings to a folder with its results. A finished run is skipped."""
    started, folder, recipe = time.time(), Path(args.out) / settings.folder, settings.recipe
    if (folder / "result.json").exists() and not args.again:
        print(f"finished  {folder} (--again repeats it)")
        return
    bench = data.load(settings.data_path or settings.data, args.root, settings.shots, settings.seed)
    targets = load_targets(args, bench)
    if recipe and not bench.train:
        raise UserError(f"{bench.name} has test pictures only: train on other data, with --eval-on {bench.name}.")
    make_folder(folder.parent)  # now, so that a place that cannot be written to does not cost a training
    clip = load_clip(settings.backbone_path or settings.backbone, machine.device)
    templates = recipe.get("templates", bench.templates)
    torch.manual_seed(settings.seed)  # initial prompts and dropout; pictures have random streams of their own
    method = METHODS[settings.method](clip, bench.classnames, templates, **settings.options).to(machine.device)
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    print_settings(settings, bench, machine, method, trainable)

    test = data.plain_batches(bench, bench.test, clip.visual.resolution, machine.device, machine.workers)
    zero_shot = Method(clip, bench.classnames, templates)
    before = after = evaluate(zero_shot, test, machine)
    print(f"zero-shot {before.accuracy:.2f} %")
    variance = {"before": variances(zero_shot, test, machine)} if args.variance else {}
    began, losses = time.time(), []
    if recipe:
        few_shot = data.few_shot_batches(bench, clip.visual.resolution, recipe, settings.seed, machine.device,
                                         machine.workers)
        with machine.autocast():
            method.prepare(Watched(few_shot, "few-shot pictures"))
        if trainable:
            losses = train(method, few_shot, recipe, machine)
    seconds_training = time.time() - began
    if recipe:
        after = evaluate(method, test, machine)
        if after.accuracy < before.accuracy:
            print(f"warning: {advice(method, bench, recipe, before, after, machine)}")
    papers = published(settings, settings.data)
    print(f"accuracy  {after.accuracy:.2f} % of {len(bench.test)} test pictures after the last epoch{quoted(papers)}")
    shifts = evaluate_shifts(method, settings, bench, targets, after.accuracy, machine)
    if args.variance:
        variance["after"] = variances(method, test, machine)
        for when, values in variance.items():
            print(f"variance  {when} training: {', '.join(f'{key} {value:.4f}' for key, value in values.items())}")

    result = asdict(settings) | dict(
        classes=len(bench.classnames), train_images=len(bench.train), test_images=len(bench.test),
        zero_shot=round(before.accuracy, 4), accuracy=round(after.accuracy, 4),
        published=papers[0][0] if papers else None, published_source=papers[0][1] if papers else None, shifts=shifts,
        variance=variance, trainable_parameters=trainable, seconds_training=round(seconds_training, 2),
        seconds_total=round(time.time() - started, 2), epochs=len(losses), losses=losses, picks=bench.picks,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else machine.device.type)
    save_run(folder, settings, bench, method, after, result)
    print(f"saved     {folder}")


def train(method, few_shot, recipe, machine):
    """The loop. -> mean loss of every epoch. Only the method's own parameters change."""
    groups, constants = method.parameter_groups(recipe), ("momentum", "weight_decay", "eps")
    optimizer_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe["optimizer"]]
    optimizer = optimizer_class(groups, lr=recipe["lr"], **{key: recipe[key] for key in constants if key in recipe})
    rates = [(group["lr"], group["warmup_epochs"]) for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    epochs, means, began = recipe["epochs"], [], time.time()
    method.train()
    for epoch in range(epochs):
        losses = []
        for step, (images, labels) in enumerate(few_shot.epoch(epoch)):
            progress = epoch + (step / len(few_shot) if recipe.get("cosine") == "steps" else 0)
            for group, (lr, warmup_epochs) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(lr, progress, epochs, warmup_epochs)
            with machine.autocast():
                loss = method.loss(images, labels, epoch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())  # read once per epoch: reading each would make a GPU wait
        losses = torch.stack(losses).tolist()
        current = "/".join(dict.fromkeys(f"{group['lr']:.2g}" for group in optimizer.param_groups))
        require_finite(losses, method, epoch, current)
        means.append(sum(losses) / len(losses))
        left = (time.time() - began) / (epoch + 1) * (epochs - epoch - 1)
        show(f"epoch {epoch + 1}/{epochs}  loss {means[-1]:.3f}  lr {current}  {left:.0f} s left",
             keep=epoch + 1 == epochs, in_log=(epoch + 1) % max(1, epochs // 10) == 0)
    return means


def learning_rate(base, epoch, epochs, warmup_epochs):
    """Dassl's schedule: 1e-5 for the first `warmup_epochs`, then a cosine whose period is not shortened by them.

    So it starts at base and ends above zero. CoOp, VPT, DPT and UPT were trained with it, one rate per epoch; a broken
    number of epochs and no warm-up give the plain cosine over all steps, FG-VPL's.
    """
    if epoch < warmup_epochs:
        return 1e-5
    return base / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs))


def require_finite(losses, method, epoch, rates):
    bad = [step for step, value in enumerate(losses, 1) if not math.isfinite(value)]
    if bad or not all(p.isfinite().all() for p in method.parameters() if p.requires_grad):  # the last step has no loss
        raise UserError(f"The loss or what it taught is no longer finite in epoch {epoch + 1}, step "
                        f"{bad[0] if bad else len(losses)}, at learning rate {rates}: nothing was saved, try a smaller "
                        "--lr or --precision fp32.")


@torch.no_grad()
def evaluate(method, batches, machine):
    """-> Evaluation of all pictures of `batches`, in their order."""
    method.eval()
    rows = []
    with machine.autocast():
        text = method.encode_text()  # once
        for images, labels in Watched(batches, "test pictures"):
            logits = method(images, text).float()  # (B, K)
            predicted, log_p = logits.argmax(dim=-1, keepdim=True), logits.log_softmax(dim=-1)
            rows.append(torch.cat([predicted, log_p.gather(1, predicted), log_p.gather(1, labels.unsqueeze(1))], dim=1))
    predicted, log_p, log_p_of_label = torch.cat(rows).cpu().T
    correct = predicted.long() == torch.tensor([label for _, label in batches.pictures.items])
    return Evaluation(100 * correct.sum().item() / len(correct), -log_p_of_label.mean().item(),
                      predicted.long().tolist(), log_p.exp().tolist())


def advice(method, bench, recipe, before, after, machine):
    """What to try where training ended below zero-shot CLIP: told by how the method does on its training pictures."""
    pictures = data.plain_batches(bench, bench.train, method.clip.visual.resolution, machine.device, machine.workers)
    trained, chance = evaluate(method, pictures, machine), math.log(len(bench.classnames))
    long_enough = recipe["epochs"] >= recipe["warmup_epochs"] + 10
    if long_enough and trained.cross_entropy > 0.97 * chance and trained.accuracy < 200 / len(bench.classnames):
        what = "it has collapsed to chance: try a smaller --lr"
    elif trained.accuracy < before.accuracy:
        what = "it has not learned its training pictures yet: try more --epochs"
    else:
        what = "it knows its training pictures, and that does not carry over: try more --shots"
    return (f"the run ends at {after.accuracy:.2f} %, below zero-shot CLIP's {before.accuracy:.2f} %. On its training "
            f"pictures it has {trained.accuracy:.2f} % and cross-entropy {trained.cross_entropy:.2f} (chance: {chance:.2f}), "
            f"so {what}.")


@torch.no_grad()
def variances(method, batches, machine):
    """-> UPT's Var_v (Eq. 6-7) of the test pictures and Var_t (Eq. 8) of the classifier, by name, of unit features."""
    method.eval()
    with machine.autocast():
        text = method.encode_text()
        features, labels = zip(*((method.encode_image(images, text), labels) for images, labels in batches), strict=True)
    return {"image_within_classes": intra_class_variance(torch.cat(features), torch.cat(labels)).item(),
            "text_between_classes": inter_class_variance(text).item()}


# ---- Other data of the same classes ----


def load_targets(args, bench):
    """--eval-on -> Benchmarks whose classes are bench's or some of them, each of another name."""
    targets = [data.load(name, args.root, 0) for name in args.eval_on]
    for i, target in enumerate(targets):
        if target.name in [bench.name, *(other.name for other in targets[:i])]:
            raise UserError(f"--eval-on names {target.name}, which is tested already: name each data set once.")
        if target.classnames != bench.classnames and columns_of(target, bench.class_ids) is None:
            raise UserError(f"The classes of {target.name} are not those of {bench.name}: give --eval-on shifted data "
                            "of the same classes.")
    return targets


def columns_of(target, class_ids):
    """Which of the training classes, whose numbers in ImageNet are class_ids, are the target's; None if not all are."""
    if class_ids and target.class_ids and set(target.class_ids) <= set(class_ids):
        return [class_ids.index(i) for i in target.class_ids]
    return None


def evaluate_on(method, target, class_ids, machine):
    """-> Evaluation of a trained method on a target's test pictures, with the target's class names."""
    if target.classnames != method.classnames:
        method = method.for_classes(target.classnames, columns_of(target, class_ids))
    pictures = data.plain_batches(target, target.test, method.clip.visual.resolution, machine.device, machine.workers)
    return evaluate(method, pictures, machine)


def evaluate_shifts(method, settings, bench, targets, accuracy, machine):
    """--eval-on: UPT's Table 1 and DPT's Table III -> {data set: accuracy}. accuracy: the source's."""
    shifts = {}
    for target in targets:
        shifts[target.name] = round(evaluate_on(method, target, bench.class_ids, machine).accuracy, 4)
        papers = [] if target.own else published(settings, target.name)
        print(f"shift     {shifts[target.name]:.2f} % of {len(target.test)} test pictures of {target.name}{quoted(papers)}")
    if shifts:
        print(f"average   {statistics.mean([accuracy, *shifts.values()]):.2f} % with {bench.name}, "
              f"{statistics.mean(shifts.values()):.2f} % of the shifted alone (OOD average)")
    return shifts


# ---- Settings ----


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, help, **options):
        parser.add_argument(name, help=help, **options)

    add("--method", f"one or several of {', '.join(METHODS)} (default: coop)", nargs="+", default=["coop"],
        choices=METHODS, metavar="METHOD")
    add("--data", "data sets' names or folders of pictures (default: shapes)", nargs="+", default=["shapes"])
    add("--root", "where data sets are, or are put (default: data)", default="data")
    add("--shots", "pictures per class, 0 for all (default: 16)", nargs="+", type=at_least(0), default=[16])
    add("--seeds", "one run each (default: 1)", nargs="+", type=int, default=[1])
    add("--backbone", "tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or a weights file (default: tiny for shapes, "
        "else ViT-B/16)")
    add("--epochs", "default: the recipe's, as for the three below", type=at_least(1))
    add("--lr", "rates of single parts, such as DPT's text prompts, scale with it", type=float)
    add("--warmup-epochs", "of all parts", type=at_least(0))
    add("--batch-size", "pictures per training step", type=at_least(1))
    add("--device", "cuda, cpu, ... (default: cuda where there is one)")
    add("--precision", "of the frozen towers; learned tensors are always fp32 (auto: bf16 or fp16 on CUDA)",
        choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--workers", "processes that read pictures (default: 0 on a CPU, else up to 8)", type=at_least(0))
    add("--set", "options of the method", nargs="+", action="extend", default=[], metavar="key=value")
    add("--eval-on", "test the run on these, too: shifted data of the same classes, such as imagenetv2 imagenet_sketch "
        "imagenet_a imagenet_r", nargs="+", action="extend", default=[], metavar="DATA")
    add("--variance", "also UPT's Appendix A: the variance of image features within and of text features between the "
        "classes, before and after training", action="store_true")
    add("--out", "where runs are saved (default: runs)", default="runs")
    add("--again", "repeat runs that are finished", action="store_true")
    return parser.parse_args(argv)


def at_least(least):
    """For argparse: a whole number that is not smaller."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)
    return whole_number


def resolve_settings(args, data_name, method, shots, seed):
    """-> Settings of one run of the command: defaults filled in, names settled, the recipe resolved."""
    name, data_path = data.identify(data_name)
    backbone = args.backbone or ("tiny" if name in data.WORLD and not data_path else "ViT-B/16")
    file = Path(backbone).expanduser()
    options = parse_options(METHODS[method], args.set, method)
    flags = {key: getattr(args, key) for key in RECIPE_FLAGS if getattr(args, key) is not None}
    recipe, data_options = resolve_recipe(METHODS[method].recipe, options, "" if data_path else name, shots, flags)
    return Settings(method, data_options | options, name, data_path, shots, seed, file.stem if file.is_file() else backbone,
                    str(file.resolve()) if file.is_file() else "", args.precision, recipe)


def resolve_recipe(recipe, options, data_name, shots, flags):
    """-> the paper's settings for these options, data set and shots, under the user's flags; options of the data set.

    In a method's recipe, `epochs` may depend on the shots, `datasets` has what differs on a data set (`options` among
    it), `variants` what differs with an option, `parts` the rates of single tensors.
    """
    if not recipe:
        return {}, {}
    recipe = dict(recipe)
    variants = recipe.pop("variants", {})
    for key, value in options.items():
        recipe |= variants.get(f"{key}={value}", {})
    recipe |= recipe.pop("datasets", {}).get(data_name, {})
    data_options = recipe.pop("options", {})
    if data_name in data.WORLD and recipe["epochs"]:
        recipe["epochs"] = WORLD_EPOCHS
    elif isinstance(recipe["epochs"], dict):  # by shots: the next lower count decides, all pictures are the most
        recipe["epochs"] = recipe["epochs"][max(n for n in recipe["epochs"] if n <= shots or not shots)]
    if not flags.get("lr", recipe["lr"]) > 0:
        raise UserError(f"--lr is {flags['lr']}: it must be above 0.")
    scale = flags.get("lr", recipe["lr"]) / recipe["lr"]
    recipe["parts"] = {
        name: dict(lr=part["lr"] * scale, warmup_epochs=flags.get("warmup_epochs", part["warmup_epochs"]))
        for name, part in recipe.get("parts", {}).items()}
    return recipe | flags, data_options


def parse_options(method_class, pairs, name):
    """["n_ctx=4", ...] -> {"n_ctx": 4, ...}: options of the method, typed as their defaults are."""
    defaults = method_class.default_options()
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


def changes(settings):
    """What of a run differs from the defaults on its data, {name: value}, spelled as in assets/published.csv."""
    method_class, data_name = METHODS[settings.method], "" if settings.data_path else settings.data
    recipe, data_options = resolve_recipe(method_class.recipe, settings.options, data_name, settings.shots, {})
    default = method_class.default_options() | data_options | {key: recipe[key] for key in RECIPE_FLAGS if key in recipe}
    default["precision"] = "auto"
    own = default | settings.options | {key: settings.recipe[key] for key in RECIPE_FLAGS if key in settings.recipe}
    own["precision"] = settings.precision
    return {key: spell(value) for key, value in own.items() if spell(value) != spell(default[key])}


def spell(value):
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def published(settings, data_name):
    """What the papers report for exactly this run: [(accuracy, "DPT, Table II"), ...], most often one or none."""
    if settings.data_path:
        return []
    shots = "0" if settings.method == "zeroshot" else str(settings.shots)
    wanted, changed = [settings.method, settings.backbone, shots, data_name], changes(settings)
    changed.pop("precision", None)
    with (ASSETS / "published.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if [row[key] for key in ("method", "backbone", "shots", "dataset")] == wanted]
    return [(float(row["accuracy"]), f"{row['paper']}, {row['table']}") for row in rows
            if dict(pair.split("=", 1) for pair in row["options"].split(";") if pair) == changed]


def quoted(papers):
    return f"  ({'; '.join(f'{source}: {value:.2f}' for value, source in papers)})" if papers else ""


def labelled(name, path):
    """A folder's name. Two paths that end alike get different ones."""
    digest = "-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:6] if path else ""
    return name.replace("/", "-") + digest


def choose_machine(device, precision, workers):
    """The flags -> Machine. bf16 and fp16 are chosen by themselves on CUDA only."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    return Machine(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], workers)


# ---- What is printed, and what is saved ----


def print_settings(settings, bench, machine, method, trainable):
    shots = f"{settings.shots} shots" if settings.shots else "all"
    parts = [f"{key} {value}" for key, value in settings.recipe.items() if key not in ("parts", "templates")]
    parts += [f"{name}: {rates}" for name, rates in settings.recipe.get("parts", {}).items()]
    print(f"method    {settings.method} {settings.options or ''}")
    print(f"data      {bench.name}: {len(bench.classnames)} classes, {len(bench.train)} training pictures "
          f"({shots}, seed {settings.seed}), {len(bench.test)} test pictures")
    print(f"backbone  {settings.backbone} on {machine.device.type}, "
          f"{str(machine.dtype or torch.float32).removeprefix('torch.')}")
    print(f"recipe    {', '.join(parts) or 'nothing to train'}")
    print(f"prompts   {' | '.join(method.prompt_texts[:3])}   ({trainable:,} numbers to learn)")


def show(line, keep=False, in_log=False):
    """One live line on a terminal, written over by the next unless kept. A log gets only the lines meant for it."""
    if sys.stdout.isatty():
        print("\r" + line.ljust(70), end="\n" if keep else "", flush=True)
    elif in_log:
        print(line, flush=True)


class Watched:
    """Batches, with a live line on a terminal that tells how far the walk through them is."""

    def __init__(self, batches, what):
        self.batches, self.what, self.walks = batches, what, 0

    def __iter__(self):
        self.walks += 1
        for number, batch in enumerate(self.batches, 1):
            show(f"{self.what}: walk {self.walks}, batch {number}/{len(self.batches)}")
            yield batch
        show("")
        

def save_run(folder, settings, bench, method, evaluation, result):
    """Write the run's folder, whole or not at all: beside its place, then renamed."""
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        try:
            new.mkdir()
            prompts = asdict(settings) | dict(
                classnames=method.classnames, templates=list(method.templates), class_ids=bench.class_ids,
                tensors={name: tensor.cpu() for name, tensor in method.learned().items()})
            torch.save(prompts, new / "prompts.pt")
            with (new / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(["picture", "class", "predicted class", "probability"])
                for (path, label), best, p in zip(bench.test, evaluation.predicted, evaluation.probability, strict=True):
                    writer.writerow([Path(path).relative_to(bench.folder), bench.classnames[label],
                                     bench.classnames[best], f"{p:.6f}"])
            (new / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise UserError(f"{folder} cannot be written ({error}): make room or choose another --out.") from error


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out.") from error


def read_run(folder):
    """A finished run's folder -> (Settings, what else prompts.pt holds). UserError if it is not one."""
    path = Path(folder) / "prompts.pt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a finished run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings = Settings(**{field: saved.pop(field) for field in Settings.__dataclass_fields__})
        if not settings.options.keys() <= METHODS[settings.method].default_options().keys():
            raise KeyError(settings.options)
        return settings, {key: saved[key] for key in ("classnames", "templates", "class_ids", "tensors")}
    except Exception as error:  # any file can stand there
        raise UserError(f"{path} is not a prompt file of train.py ({type(error).__name__}): train again.") from error


def load_run(folder, device=None):
    """A finished run -> its trained method, ready to predict: method(images), see clip_min.preprocess for pictures."""
    settings, saved = read_run(folder)
    device = choose_machine(device, "fp32", 0).device
    clip = load_clip(settings.backbone_path or settings.backbone, device)
    method = METHODS[settings.method](clip, saved["classnames"], saved["templates"], **settings.options).to(device)
    method.load_learned(saved["tensors"])
    return method.eval()


def exit_status(program):
    """Run a program. A user's mistake ends with one sentence and status 2, Ctrl-C with one line and 130."""
    try:
        program()
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback in front
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: what was finished is kept, and the same command goes on behind it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
