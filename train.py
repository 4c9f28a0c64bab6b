"""Train and evaluate any method on any data set: one small loop for all of them.

    python train.py                                                   # CoOp on drawn shapes, tiny CLIP: no download
    python train.py --method upt --data dtd --shots 4                 # ViT-B/16, a CUDA GPU where there is one
    python train.py --data path/to/folder --backbone ViT-B-16.pt      # your own photographs and weights
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
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import data
from baselines import CLIPAdapter, CoCoOp, LinearProbe, ProDA, ProGrad
from clip_min import OPENAI_MODELS, Method, UserError, dashes, load_clip
from coop import CoOp
from dpt import CAVPT, DPT, VLP
from fgvpl import FGVPL
from upt import UPT, variances
from vpt import VPT

METHODS = {"zeroshot": Method, "coop": CoOp, "vpt": VPT, "vlp": VLP, "cavpt": CAVPT, "dpt": DPT, "upt": UPT,
           "fgvpl": FGVPL, "cocoop": CoCoOp, "prograd": ProGrad, "proda": ProDA, "clip_adapter": CLIPAdapter,
           "linear_probe": LinearProbe}
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
    recipe: dict  # for this data set, these shots and options, with the user's flags
    changed: dict  # what the user changed of options and recipe, spelled as in assets/published.csv

    @property
    def folder(self):
        """DATA/METHOD/BACKBONE_SHOTSshot_seedS; METHOD tells what was changed, such as upt,mode=mlp."""
        def name(text, path=""):  # two paths that end alike stay apart
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:6]
            return text.replace("/", "-") + (f"-{digest}" if path else "")

        method = ",".join([self.method, *(f"{key}={value}" for key, value in self.changed.items())])
        run = f"{name(self.backbone, self.backbone_path)}_{self.shots}shot_seed{self.seed}"
        return Path(name(self.data, self.data_path), name(method), run)


@dataclass(frozen=True)
class Machine:
    """Where a run computes, in which precision, and how many processes read its pictures."""

    device: torch.device
    dtype: torch.dtype | None  # of the frozen towers under autocast, None: fp32; learned tensors are always fp32
    workers: int

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


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
        print(f"finished    {folder} (--again repeats it)")
        return
    bench = data.load(settings.data_path or settings.data, args.root, settings.shots, settings.seed)
    trained = bench.fingerprints() if recipe else {}
    targets = [data.load(name, args.root, shots=0, whole=True) for name in args.eval_on]
    data.require_same_classes(bench, targets)
    targets = [data.without_trained(target, trained, bench.folder) for target in targets]
    if recipe and not bench.train:
        raise UserError(f"{bench.name} has test pictures only: train on other data, with --eval-on {bench.name}.")
    warn_of_moved(bench, folder.parents[1])
    make_folder(folder.parent)  # now, so that a place that cannot be written to does not cost a training
    clip = load_clip(settings.backbone_path or settings.backbone, machine.device, settings.activation or None)
    settings = replace(settings, activation=clip.activation)
    templates = recipe.get("templates", bench.templates)
    torch.manual_seed(settings.seed)  # initial prompts and dropout; pictures have random streams of their own
    method = METHODS[settings.method](clip, bench.classnames, templates, **settings.options).to(machine.device)
    print_settings(settings, bench, machine, method)

    test = data.plain_batches(bench.test, clip, machine.device, machine.workers, bench.own)
    zero_shot = Method(clip, bench.classnames, templates)
    before = after = evaluate(zero_shot, test, machine)
    print(f"zero-shot   {before.accuracy:.2f} %")
    variance = {"before": variances(zero_shot, test, machine.autocast())} if args.variance else {}
    began, losses, trainable = time.time(), [], 0
    if recipe:
        few_shot = data.few_shot_batches(bench, clip, recipe, settings.seed, machine.device, machine.workers)
        val = data.plain_batches(bench.val, clip, machine.device, machine.workers, bench.own)
        with machine.autocast():
            method.prepare(few_shot, val)
        trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)  # a cache may be learned, too
        print(f"learning    {trainable:,} numbers")
        losses = train(method, few_shot, recipe, machine) if trainable else []
        with machine.autocast():
            method.eval().finish(val)
    seconds_training = time.time() - began
    if recipe:
        after = evaluate(method, test, machine)
    if after.accuracy < before.accuracy:
        print(f"warning: {advice(after, len(losses), len(bench.classnames))}")
    papers = data.published(settings, settings.data)
    print(f"accuracy    {after.accuracy:.2f} % of the test pictures after the last epoch{quoted(papers)}")
    if args.variance:
        variance["after"] = variances(method, test, machine.autocast())
        print(f"variance    {variance}")
    shifts = evaluate_shifts(method, settings, bench, targets, after.accuracy, machine)

    paper, source = papers[0] if papers else (None, None)
    device = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else machine.device.type
    save_run(folder, settings, bench, trained, method, after, asdict(settings) | dict(
        classes=len(bench.classnames), train_images=len(bench.train), test_images=len(bench.test),
        zero_shot=before.accuracy, accuracy=after.accuracy, published=paper, published_source=source, shifts=shifts,
        variance=variance, trainable_parameters=trainable, seconds_training=seconds_training,
        seconds_total=time.time() - started, epochs=len(losses), losses=losses, picks=bench.picks,
        torch=torch.__version__, device=device))
    print(f"saved       {folder}")


def print_settings(settings, bench, machine, method):
    recipe = {key: value for key, value in settings.recipe.items() if key != "templates"}
    print(f"method      {settings.method}{''.join(f', {key} {value}' for key, value in settings.changed.items())}")
    print(f"data        {bench.name}: {len(bench.classnames)} classes, {len(bench.train)} training pictures "
          f"({settings.shots or 'all'} per class, seed {settings.seed}), {len(bench.test)} test pictures")
    print(f"backbone    {settings.backbone} with {settings.activation} on {machine.device.type}, "
          f"{machine.dtype or torch.float32}")
    print(f"recipe      {', '.join(f'{key} {value}' for key, value in recipe.items()) or 'nothing to train'}")
    print(f"prompts     {' | '.join(method.prompt_texts[:3])}")


def train(method, few_shot, recipe, machine):
    """The loop. -> mean loss of every epoch. Only the method's own parameters change."""
    optimizer_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe["optimizer"]]
    constants = {key: recipe[key] for key in ("momentum", "weight_decay", "eps") if key in recipe}
    optimizer = optimizer_class(method.parameter_groups(recipe), **constants)
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
        means.append(sum(losses) / len(losses))
        current = "/".join(dict.fromkeys(f"{group['lr']:.2g}" for group in optimizer.param_groups))
        require_finite(losses, method, f"in epoch {epoch + 1}", current)
        left = (time.time() - began) / (epoch + 1) * (epochs - epoch - 1)
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
        for images, labels in batches:
            log_p = method(images, text).float().log_softmax(dim=-1)  # (B, K)
            best, predicted = log_p.max(dim=-1)
            rows.append(torch.stack([predicted, best, log_p.gather(1, labels.unsqueeze(1)).squeeze(1)]))
    predicted, best, of_label = torch.cat(rows, dim=1).cpu()
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
        method = method.for_classes(target.classnames, data.columns(target, class_ids))
    batches = data.plain_batches(target.test, method.clip, machine.device, machine.workers, target.own)
    return evaluate(method, batches, machine)


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
    flags = {key: value for key, value in vars(args).items() if key in recipe and value is not None}
    default = defaults | data_options | recipe | {"precision": "auto", "activation": None}
    chosen = options | flags | {"precision": args.precision, "activation": args.activation}
    changed = {key: data.spell(value) for key, value in chosen.items() if data.spell(value) != data.spell(default[key])}
    return Settings(method, defaults | data_options | options, name, data_path, backbone, backbone_path, shots, seed,
                    args.activation or "", args.precision, override(recipe, flags), changed)


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
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--device {device} cannot be used by PyTorch here: use cuda or cpu.") from error
    device = torch.device(device)
    if precision == "auto":  # emulated bf16, as on a V100 or T4, is slower than fp16
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if device.type != "cuda" else "bf16" if native else "fp16"
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    return Machine(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], workers)


# ---- Run folders ----


def save_run(folder, settings, bench, trained, method, evaluation, result):
    """Write a run's folder, whole or not at all: beside its place, then renamed."""
    tensors = {name: tensor.cpu() for name, tensor in method.learned().items()}
    prompts = asdict(settings) | dict(classnames=method.classnames, templates=list(method.templates),
                                      class_ids=bench.class_ids, train=trained, tensors=tensors)
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


def read_prompts(folder):
    """prompts.pt of a finished run: the fields of Settings, classnames, templates, class_ids, train and tensors."""
    path = Path(folder) / "prompts.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {*Settings.__dataclass_fields__, "classnames", "templates", "class_ids", "train", "tensors"}
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
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not fit this version of train.py ({error}): train again.") from error
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
        print("\nstopped: finished runs are kept, and the same command goes on behind them", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody reads the first lines only
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def quoted(papers):
    return f"  ({'; '.join(f'{source}: {value:.2f}' for value, source in papers)})" if papers else ""


if __name__ == "__main__":
    sys.exit(main())
