"""Train and evaluate any method on any data set: one small loop for all of them.

    python train.py                                                   # CoOp on drawn shapes, tiny CLIP: no download
    python train.py --method upt --data dtd --shots 4                 # ViT-B/16, a CUDA GPU where there is one
    python train.py --data path/to/folder --backbone ViT-B-16.pt      # your own photographs and weights
    python train.py --set n_ctx=4 class_token_position=middle         # a method's own options: see its file
    python train.py --method coop vpt upt --data dtd --shots 1 2 4 8 16 --seeds 1 2 3    # a sweep
    python train.py --method upt --data imagenet --eval-on imagenetv2 imagenet_sketch imagenet_a imagenet_r
    torchrun --nproc_per_node 2 train.py --method dpt --data imagenet                    # several GPUs

The papers' protocol: k pictures per class drawn with seeds 1, 2, 3, the model of the last epoch, top-1 on the full
test set. A run leaves runs/DATA/METHOD/BACKBONE_SHOTSshot_seedS/ with result.json, prompts.pt (what was learned) and
predictions.csv (the test pictures). report.py shows what finished runs hold. A run that was stopped or killed goes on
with the same command.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

import data
from baselines import CLIPAdapter, CoCoOp, LinearProbe, ProDA, ProGrad, ZeroShot
from clip_min import OPENAI_MODELS, Method, UserError, dashes, load_clip
from coop import CoOp
from dpt import CAVPT, DPT, VLP
from fgvpl import FGVPL
from upt import UPT, variances
from vpt import VPT

METHODS = {"zeroshot": ZeroShot, "coop": CoOp, "vpt": VPT, "vlp": VLP, "cavpt": CAVPT, "dpt": DPT, "upt": UPT,
           "fgvpl": FGVPL, "cocoop": CoCoOp, "prograd": ProGrad, "proda": ProDA, "clip_adapter": CLIPAdapter,
           "linear_probe": LinearProbe}
WORLD_EPOCHS = 50  # on the drawn data sets the recipes are the papers' but for this, so that a run takes seconds
CHECKPOINT_SECONDS = 30  # between the checkpoints of an epoch that takes longer


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


@dataclass(frozen=True)
class Machine:
    """Where a run computes, in which precision, and how many processes read its pictures."""

    device: torch.device
    dtype: torch.dtype | None = None  # of the frozen towers under autocast, None: fp32; learned tensors are always fp32
    workers: int = 0
    rank: int = 0  # of this process among those that torchrun started
    processes: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


def main(argv=None):
    args = parse_arguments(argv)

    def sweep():
        machine = join_processes(choose_machine(args.device, args.precision, args.workers))
        for setting in itertools.product(args.data, args.method, args.shots, args.seeds):
            settings = resolve_settings(args, *setting)
            folder = Path(args.out) / settings.folder
            with reserve(folder, args.again, machine) as obstacle:
                if obstacle:
                    print(obstacle)
                else:
                    run(settings, folder, args, machine)

    return exit_status(sweep)


def run(settings, folder, args, machine):
    """One run, from its settings to a folder with its results."""
    started, recipe = time.time(), settings.recipe
    with process_0_first(machine):  # it fetches what is not there yet
        bench = data.load(settings.data_path or settings.data, args.root, settings.shots, settings.seed)
        targets = [data.load(name, args.root, shots=0, whole=True) for name in args.eval_on]
        clip = load_clip(settings.backbone_path or settings.backbone, machine.device, settings.activation or None)
    settings = replace(settings, activation=clip.activation, templates=settings.templates or list(bench.templates))
    bench, new_classes = data.split_classes(bench) if args.base_to_new else (bench, None)
    trained = bench.fingerprints() if recipe else {}
    data.require_same_classes(bench, targets)
    targets = [data.without_trained(target, trained, bench.folder) for target in targets]
    if recipe and not bench.train:
        raise UserError(f"{bench.name} has test pictures only: train on other data, with --eval-on {bench.name}.")
    warn_of_moved(bench, folder.parents[1])
    torch.manual_seed(settings.seed)  # initial prompts and dropout; pictures have random streams of their own
    method = METHODS[settings.method](clip, bench.classnames, settings.templates, **settings.options).to(machine.device)
    if new_classes:
        method.for_classes(new_classes.classnames)  # a method that cannot says so before it is trained
    print_settings(settings, bench, machine, method)

    test = data.plain_batches(bench.test, clip, machine.device, machine.workers, bench.own)
    zero_shot = Method(clip, bench.classnames, settings.templates)
    if machine.dtype:  # nothing below calls the towers but under autocast
        clip.cast_products(machine.dtype)
    before = after = evaluate(zero_shot, test, machine)
    print(f"zero-shot   {before.accuracy:.2f} %")
    variance = {"before": variances(zero_shot, test, machine.autocast())} if args.variance else {}
    began, losses, trainable = time.time(), [], 0
    description = asdict(settings) | dict(classnames=method.classnames, class_ids=bench.class_ids, train=trained)
    checkpoint = Checkpoint(folder.with_name(f"{folder.name}.checkpoint"), description, machine)
    if recipe:
        few_shot = data.few_shot_batches(bench, clip, recipe, settings.seed, machine.device, machine.workers)
        val = data.plain_batches(bench.val, clip, machine.device, machine.workers, bench.own)
        if not checkpoint.restore_tensors(method):
            with machine.autocast():
                method.prepare(few_shot, val)
        trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)  # a cache may be learned, too
        print(f"learning    {trainable:,} numbers")
        losses = train(method, few_shot, recipe, machine, checkpoint) if trainable else []
        with machine.autocast():
            method.eval().finish(val)
    seconds_training = time.time() - began
    if recipe or method.templates != zero_shot.templates:
        after = evaluate(method, test, machine)
    if recipe and after.accuracy < before.accuracy:
        print(f"warning: {advice(after, len(losses), len(bench.classnames))}")
    papers = data.published(settings, settings.data)
    print(f"accuracy    {after.accuracy:.2f} % of the test pictures after the last epoch{quoted(papers)}")
    if args.variance:
        variance["after"] = variances(method, test, machine.autocast())
        print(f"variance    {variance}")
    shifts = evaluate_shifts(method, settings, bench, targets, after.accuracy, machine)
    base_to_new = evaluate_new(method, new_classes, after.accuracy, machine) if new_classes else {}

    paper, source = papers[0] if papers else (None, None)
    device = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else machine.device.type
    if machine.rank:
        return
    save_run(folder, bench, method, description, after, asdict(settings) | dict(
        classes=len(bench.classnames), train_images=len(bench.train), test_images=len(bench.test),
        zero_shot=before.accuracy, accuracy=after.accuracy, published=paper, published_source=source, shifts=shifts,
        base_to_new=base_to_new, variance=variance, trainable_parameters=trainable, seconds_training=seconds_training,
        seconds_total=time.time() - started, epochs=len(losses), losses=losses, picks=bench.picks,
        torch=torch.__version__, device=device))
    checkpoint.remove()
    print(f"saved       {folder}")


def print_settings(settings, bench, machine, method):
    print(f"method      {settings.method}{''.join(f', {key} {value}' for key, value in settings.changed.items())}")
    print(f"data        {bench.name}: {len(bench.classnames)} classes, {len(bench.train)} training pictures "
          f"({settings.shots or 'all'} per class, seed {settings.seed}), {len(bench.test)} test pictures")
    print(f"backbone    {settings.backbone} with {settings.activation} on {machine.device.type}, "
          f"{machine.dtype or torch.float32}")
    print(f"recipe      {', '.join(f'{key} {value}' for key, value in settings.recipe.items()) or 'nothing to train'}")
    print(f"prompts     {' | '.join(method.prompt_texts[:3])}")


def train(method, few_shot, recipe, machine, checkpoint=None):
    """The loop. -> mean loss of every epoch. Only the method's own parameters change."""
    optimizer_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe["optimizer"]]
    constants = {key: recipe[key] for key in ("momentum", "weight_decay", "eps") if key in recipe}
    optimizer = optimizer_class(method.parameter_groups(recipe), **constants)
    rates = [(group["lr"], group["warmup_epochs"]) for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    epochs, began = recipe["epochs"], time.time()
    means, losses = checkpoint.restore(optimizer, scaler) if checkpoint else ([], [])  # of epochs; of the present steps
    restored = len(means)
    method.train()
    for epoch in range(restored, epochs):
        batches = few_shot.epoch(epoch, len(losses), machine.rank, machine.processes)
        for step, (images, labels) in enumerate(batches, len(losses)):
            progress = epoch + (step / len(few_shot) if recipe.get("cosine") == "steps" else 0)
            for group, (lr, warmup_epochs) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate(lr, progress, epochs, warmup_epochs)
            with machine.autocast():
                loss = method.loss(images, labels, epoch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            loss = loss.detach()
            if machine.processes > 1:
                loss = average(loss, method, len(labels))
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss)  # read once per epoch: reading each would make a GPU wait
            if checkpoint and checkpoint.is_due():
                checkpoint.write(method, optimizer, scaler, means, losses)
        losses = torch.stack(losses).tolist()
        means.append(sum(losses) / len(losses))
        current = "/".join(dict.fromkeys(f"{group['lr']:.2g}" for group in optimizer.param_groups))
        require_finite(losses, method, f"in epoch {epoch + 1}", current)
        losses = []
        if checkpoint:
            checkpoint.write(method, optimizer, scaler, means, losses)
        left = (time.time() - began) / (epoch + 1 - restored) * (epochs - epoch - 1)
        data.show(f"epoch {epoch + 1}/{epochs}  loss {means[-1]:.3f}  lr {current}  {left:.0f} s left",
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


def require_finite(losses, method, when, rates):
    bad = [step for step, value in enumerate(losses, 1) if not math.isfinite(value)]
    if bad or not all(p.isfinite().all() for p in method.parameters() if p.requires_grad):  # the last step has no loss
        step = bad[0] if bad else len(losses)
        raise UserError(f"The loss or what it taught is not finite {when}, step {step}, at learning rate {rates}: "
                        "nothing was saved, try a smaller --lr or --precision fp32.")


class Evaluation(NamedTuple):
    accuracy: float  # in percent, the micro average
    cross_entropy: float  # the mean
    predicted: list  # a class for each picture, in their order
    probability: list  # of that class


@torch.no_grad()
def evaluate(method, batches, machine):
    """-> Evaluation of all pictures of `batches`."""
    method.eval()
    rows = []
    with machine.autocast():
        text = method.encode_text()  # once
        for images, labels in batches.share(machine.rank, machine.processes):
            log_p = method(images, text).float().log_softmax(dim=-1)  # (B, K)
            best, predicted = log_p.max(dim=-1)
            rows.append(torch.stack([predicted, best, log_p.gather(1, labels.unsqueeze(1)).squeeze(1)]))
    predicted, best, of_label = torch.cat(gather(rows, machine), dim=1).cpu()
    correct = predicted == torch.tensor([label for _, label in batches.pictures.items])
    return Evaluation(100 * correct.sum().item() / len(correct), -of_label.mean().item(), predicted.int().tolist(),
                      best.exp().tolist())


def evaluate_shifts(method, settings, bench, targets, accuracy, machine):
    """--eval-on: UPT's Table 1 and DPT's Table III -> {data set: accuracy}. accuracy: on the training's data set."""
    shifts = {}
    for target in targets:
        name = str(target.folder) if target.own else target.name
        shifts[name] = evaluate_on(method, target, bench.class_ids, machine).accuracy
        papers = [] if target.own else data.published(settings, name)
        print(f"{name:11} {shifts[name]:.2f} % of {len(target.test)} test pictures{quoted(papers)}")
    if shifts:
        out_of_distribution = sum(shifts.values())
        print(f"average     {(accuracy + out_of_distribution) / (1 + len(shifts)):.2f} % with {bench.name}, "
              f"{out_of_distribution / len(shifts):.2f} % of the shifted alone (OOD average)")
    return shifts


def evaluate_on(method, target, class_ids, machine):
    """-> Evaluation on the target's test pictures, under its class names. class_ids: the training data's."""
    if target.classnames != method.classnames:
        with machine.autocast():
            method = method.for_classes(target.classnames, data.columns(target, class_ids))
    batches = data.plain_batches(target.test, method.clip, machine.device, machine.workers, target.own)
    return evaluate(method, batches, machine)


def evaluate_new(method, new_classes, base, machine):
    """CoCoOp's protocol, its Section 4.1 -> the accuracies on both halves of the classes and their harmonic mean."""
    new = evaluate_on(method, new_classes, None, machine).accuracy
    mean = statistics.harmonic_mean([base, new])
    print(f"new classes {new:.2f} % of {len(new_classes.test)} test pictures, harmonic mean with the base {mean:.2f} %")
    return dict(base=base, new=new, harmonic_mean=mean)


def advice(after, epochs, n_classes):
    """What to try where a run ends below zero-shot CLIP."""
    chance = math.log(n_classes)  # the cross-entropy of knowing nothing
    collapsed = epochs > 20 and after.cross_entropy > 0.97 * chance and after.accuracy < 150 / n_classes
    return (f"this is below zero-shot CLIP, with a cross-entropy of {after.cross_entropy:.2f} (chance: {chance:.2f}): "
            f"try {'a smaller --lr' if collapsed else 'more --epochs or --shots'}.")


# ---- Settings ----


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", nargs="+", default=["coop"], choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--data", nargs="+", default=["shapes"], help="data sets' names or folders of pictures (default: shapes)")
    add("--root", default="data", help="where data sets are, or are put (default: data)")
    add("--shots", type=above(-1, int), nargs="+", default=[16], help="per class, 0 for all pictures (default: 16)")
    add("--seeds", type=above(-1, int, below=2**32), nargs="+", default=[1], help="one run each (default: 1)")
    add("--backbone", help="tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, owner/name on the hub, a weights file "
        "or a folder with one (default: ViT-B/16, for drawn data tiny)")
    add("--activation", choices=["gelu", "quickgelu"], help="of the weights' MLPs (default: what the configuration "
        "beside them says, else quickgelu)")
    add("--template", nargs="+", type=template, default=[], help="your own prompts, each with {} for the class name; "
        "several are averaged (default: the data set's)")
    add("--epochs", type=above(0, int), help="default: the recipe's, as for the three below")
    add("--lr", type=above(0, float), help="rates of single parts, such as DPT's text prompts, scale with it")
    add("--warmup-epochs", type=above(-1, int), help="of all parts")
    add("--batch-size", type=above(0, int))
    add("--set", nargs="+", action="extend", default=[], metavar="key=value", help="options of the method")
    add("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the frozen towers; learned "
        "tensors are always fp32 (auto: bf16 or fp16 on CUDA)")
    add("--workers", type=above(-1, int), help="processes that read pictures (default: 0 on a CPU, else up to 8)")
    add("--eval-on", nargs="+", action="extend", default=[], metavar="DATA", help="test the run on shifted data of the "
        "same classes, too, such as imagenetv2")
    add("--base-to-new", action="store_true", help="train on the first half of the classes and test both (CoCoOp's "
        "protocol)")
    add("--variance", action="store_true", help="also UPT's Appendix A, before and after training")
    add("--out", default="runs", help="where runs are saved (default: runs)")
    add("--again", action="store_true", help="repeat runs that are finished")
    return parser.parse_args(argv)


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


def resolve_settings(args, data_name, method, shots, seed):
    """-> Settings of one run of the command: names settled, the recipe resolved, the user's flags on top."""
    name, data_path = data.identify(data_name)
    backbone = args.backbone or ("tiny" if name in data.WORLD and not data_path else "ViT-B/16")
    file, backbone_path = Path(backbone).expanduser(), ""
    backbone = {dashes(name): name for name in OPENAI_MODELS}.get(backbone, backbone)
    if file.exists() and backbone not in ("tiny", *OPENAI_MODELS):
        backbone, backbone_path = file.name.removesuffix(file.suffix), str(file.resolve())
    defaults = METHODS[method].default_options()
    options = parse_options(method, defaults, args.set)
    recipe, data_options = resolve_recipe(METHODS[method].recipe, options, "" if data_path else name, shots)
    templates = recipe.pop("templates", [])
    flags = {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    default = defaults | data_options | recipe | dict(precision="auto", activation=None, template="", base_to_new=False)
    chosen = options | flags | dict(precision=args.precision, activation=args.activation,
                                    template=" | ".join(args.template), base_to_new=args.base_to_new)
    changed = {key: data.spell(value) for key, value in chosen.items() if data.spell(value) != data.spell(default[key])}
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
    if data_name in data.WORLD and epochs:
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


def choose_machine(device, precision, workers):
    """The flags -> Machine. bf16 and fp16 are chosen by themselves on CUDA only."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # the first from a PyTorch without CUDA
        raise UserError(f"--device {device} cannot be used by PyTorch here: use cuda or cpu.") from error
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # else cuDNN rounds what an fp32 convolution multiplies
    if precision == "auto":  # emulated bf16, as on a V100 or T4, is slower than fp16
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if device.type != "cuda" else "bf16" if native else "fp16"
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    return Machine(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], workers)


# ---- Several GPUs: torchrun starts a process for each ----


def join_processes(machine):
    """Under torchrun: the Machine with this process's number and its GPU. Only process 0 prints."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return machine
    if machine.device.type == "cuda":
        machine = replace(machine, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(machine.device)
    backend = "nccl" if machine.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while process 0 downloads
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends those that wait for a process that has failed
    return replace(machine, rank=distributed.get_rank(), processes=distributed.get_world_size())


@contextmanager
def process_0_first(machine):
    """The block is run by process 0, and then by the others."""
    for turn in (0, 1):
        if (machine.rank > 0) == turn:
            yield
        if machine.processes > 1:
            distributed.barrier()


def average(loss, method, n):
    """-> the mean loss of the processes, weighted by their numbers n of pictures. Gradients become their mean, too."""
    learned = [p for p in method.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    values = n * torch.cat([loss.new_ones(1), loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(values)
    loss, *gradients = (values[1:] / values[0]).split([1, *(p.numel() for p in learned)])
    for p, gradient in zip(learned, gradients, strict=True):
        if p.grad is not None:  # a loss gives a tensor a gradient in all processes or in none
            p.grad = gradient.view_as(p)
    return loss[0]


def agree(value, machine):
    """-> process 0's value."""
    values = [value]
    if machine.processes > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(rows, machine):
    """The results for every batch, of which each process has those of its share, in the order of the batches."""
    if machine.processes == 1:
        return rows
    hands = [None] * machine.processes
    distributed.all_gather_object(hands, [row.cpu() for row in rows])
    return [hand[i] for i in range(len(hands[0])) for hand in hands if i < len(hand)]


# ---- Run folders ----


@contextmanager
def reserve(folder, again, machine):
    """Keep a run for this process while the block runs. -> "", or a line that says why there is nothing to do."""
    obstacle, connection, lock = "", None, folder.with_name(f"{folder.name}.lock")
    if machine.rank == 0 and (folder / "result.json").exists() and not again:
        obstacle = f"finished    {folder} (--again repeats it)"
    elif machine.rank == 0:
        make_folder(folder.parent)  # now, so that a place that cannot be written to does not cost a training
        try:  # SQLite knows the locks of every system; they go with the process, however it ends
            connection = sqlite3.connect(lock, timeout=0, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise UserError(f"{lock} cannot be written ({error}): choose another --out.") from error
            obstacle = f"in work     {folder} (by another process)"
    obstacle = agree(obstacle, machine)
    try:
        yield obstacle
    finally:
        if connection:
            connection.close()
            if not obstacle:
                with suppress(OSError):  # on Windows another process may have it open
                    lock.unlink()


class Checkpoint:
    """What a run that was stopped goes on from: a file beside its folder, used for the same settings and pictures.

    It holds the learned tensors, the state of optimizer, scaler and random streams, the mean losses of the finished
    epochs and the losses of the steps behind them.
    """

    def __init__(self, path, description, machine):
        """description: what prompts.pt holds besides the tensors."""
        self.path, self.description, self.machine, self.written = path, description, machine, time.time()
        self.saved = agree(self.read() if machine.rank == 0 else None, machine)

    def read(self):  # -> what was written, or None
        if not self.path.exists():
            return None
        try:
            saved = load_tensors(self.path)
            if any(saved[key] != value for key, value in self.description.items()):
                raise ValueError("other settings or pictures")
            print(f"goes on     behind {len(saved['means'])} epochs and {len(saved['losses'])} steps")
            return saved
        except Exception as error:  # any file can stand there
            if getattr(error, "errno", None):  # the machine's trouble, not the file's
                raise UserError(f"{self.path} cannot be read ({error.strerror}): see to it, or remove it.") from error
            detail = " ".join(str(error).split())[:80]
            print(f"warning: {self.path} is no checkpoint of this run ({detail}), which begins anew")

    def restore_tensors(self, method):
        """-> whether there were any."""
        if self.saved:
            with self.name_what_does_not_fit():
                method.load_learned(self.saved["tensors"])
        return bool(self.saved)

    def restore(self, optimizer, scaler):
        """-> the mean losses of the finished epochs, and the losses of the steps behind them."""
        if not self.saved:
            return [], []
        with self.name_what_does_not_fit():
            optimizer.load_state_dict(self.saved["optimizer"])
            scaler.load_state_dict(self.saved["scaler"])
            torch.set_rng_state(self.saved["random"])
            if self.machine.device.type == "cuda":
                torch.cuda.set_rng_state(self.saved["random_cuda"], self.machine.device)
            return self.saved["means"], [loss.to(self.machine.device) for loss in self.saved["losses"]]

    @contextmanager
    def name_what_does_not_fit(self):
        try:
            yield
        except Exception as error:  # another version of PyTorch or of a method, or a file that somebody changed
            detail = " ".join(str(error).split())[:80]
            raise UserError(f"{self.path} does not fit this run ({detail}): remove it to begin anew.") from error

    def is_due(self):
        return time.time() - self.written > CHECKPOINT_SECONDS

    def write(self, method, optimizer, scaler, means, losses):
        """Replace the file, whole or not at all."""
        self.written = time.time()
        if self.machine.rank:
            return
        state = self.description | dict(
            tensors=method.learned(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), means=means,
            losses=losses, random=torch.get_rng_state())
        if self.machine.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.machine.device)
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            torch.save(state, part)
            part.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            with suppress(OSError):
                part.unlink()
            raise UserError(f"{self.path} cannot be written ({error}): make room, the same command goes on.") from error

    def remove(self):
        for path in self.path, self.path.with_name(f"{self.path.name}.part"):
            path.unlink(missing_ok=True)


def save_run(folder, bench, method, description, evaluation, result):
    """Write a run's folder, whole or not at all: beside its place, then renamed."""
    prompts = description | {"tensors": {name: tensor.cpu() for name, tensor in method.learned().items()}}
    rows = [("picture", "class", "predicted class", "probability")]
    for (path, label), predicted, p in zip(bench.test, evaluation.predicted, evaluation.probability, strict=True):
        rows.append((bench.relative(path), bench.classnames[label], bench.classnames[predicted], f"{p:.6f}"))
    try:
        data.clear_leftovers(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            torch.save(prompts, new / "prompts.pt")
            with (new / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows(rows)
            (new / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            old = Path(temporary, "old")
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # Ctrl-C, too: an old run is never lost
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{folder} cannot be written ({error}): make room or choose another --out.") from error


def warn_of_moved(bench, runs):
    """A user's folder that has grown may train on what earlier runs were tested on: their numbers do not compare."""
    tested = set()
    for file in runs.rglob("predictions.csv") if bench.own else []:
        with suppress(OSError, csv.Error), file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            tested |= {row.get("picture") for row in csv.DictReader(lines)}
    if moved := tested & {bench.relative(path) for path, _ in bench.train}:
        print(f"warning: {len(moved)} training pictures were tested by earlier runs in {runs}: the folder has changed, "
              "compare with runs that are made again (--again).")


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out.") from error


def load_tensors(path):
    """A file that torch.save wrote. torch.load does not test the checksums of its archive, so that is done here."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_prompts(folder):
    """prompts.pt of a finished run: the fields of Settings, classnames, class_ids, train and tensors."""
    path = Path(folder) / "prompts.pt"
    try:
        saved = load_tensors(path)
        wanted = {*Settings.__dataclass_fields__, "classnames", "class_ids", "train", "tensors"}
        if not saved.keys() >= wanted:
            raise KeyError("a setting is missing")
        return saved
    except Exception as error:  # any file can stand there
        if getattr(error, "errno", None):  # the machine's trouble, not the file's
            raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a finished run.") from error
        raise UserError(f"{path} is not a prompt file of train.py ({type(error).__name__}): train again.") from error


def load_run(folder, device=None):
    """A finished run -> its trained method, ready to predict: method(images), see clip_min.preprocess for pictures."""
    saved = read_prompts(folder)
    device = choose_machine(device, "fp32", 0).device
    clip = load_clip(saved["backbone_path"] or saved["backbone"], device, saved["activation"])
    try:
        method = METHODS[saved["method"]](clip, saved["classnames"], saved["templates"], **saved["options"])
        method.load_learned(saved["tensors"])
        if not all(tensor.isfinite().all() for tensor in saved["tensors"].values()):
            raise ValueError("prompts.pt has numbers that are not finite")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not fit this version of train.py ({error}): train again.") from error
    return method.eval()


def exit_status(program):
    """Run a program. A user's mistake ends with one sentence and status 2, Ctrl-C and SIGTERM with one line and 130."""
    with suppress(ValueError):  # only the main thread of a program hears signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Slurm ends a job: as Ctrl-C
    try:
        program()
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback in front
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody reads the first lines only
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def quoted(papers):
    return f"  ({'; '.join(f'{source}: {value:.2f}' for value, source in papers)})" if papers else ""


if __name__ == "__main__":
    sys.exit(main())
