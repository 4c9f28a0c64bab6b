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
import itertools
import math
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

import data
from baselines.clip_adapter import CLIPAdapter
from baselines.cocoop import CoCoOp
from baselines.linear_probe import LinearProbe
from baselines.proda import ProDA
from baselines.prograd import ProGrad
from baselines.zeroshot import ZeroShot
from clip_min import Method, UserError, load_clip
from coop import CoOp
from dpt import CAVPT, DPT, VLP
from fgvpl import FGVPL
from support.benchmarks import published, quoted
from support.changes import add_to_result, look_again, require_same_weights
from support.checks import columns
from support.console import advice, exit_status, print_settings, show_epoch, start
from support.identity import made_of, of_clip
from support.loading import load_data, load_shifts
from support.machine import average, cast_products, choose_machine, gather, join_processes, process_0_first
from support.prompts import read_learned
from support.runs import Checkpoint, device_name, rates, read_prompts, require_finite, reserve, save_run, warn_of_moved
from support.settings import above, resolve_settings, template
from upt import UPT, variances
from vpt import VPT

METHODS = {"zeroshot": ZeroShot, "coop": CoOp, "vpt": VPT, "vlp": VLP, "cavpt": CAVPT, "dpt": DPT, "upt": UPT,
           "fgvpl": FGVPL, "cocoop": CoCoOp, "prograd": ProGrad, "proda": ProDA, "clip_adapter": CLIPAdapter,
           "linear_probe": LinearProbe}


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
    add("--prompts", metavar="PATH", help="evaluate learned prompts instead of training: a run's folder or prompts.pt, "
        "or output of the official code of coop, cocoop, prograd, vpt, vlp or dpt")
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


def main(argv=None):
    return exit_status(sweep, parse_arguments(argv))


def sweep(args):
    """All runs of a command, one after the other. Finished ones are revisited, those of another process left alone."""
    with join_processes(choose_machine(args.device, args.precision, args.workers)) as machine:
        for combination in itertools.product(args.data, args.method, args.shots, args.seeds):
            settings = resolve_settings(args, METHODS, *combination)
            folder = Path(args.out) / settings.folder
            with reserve(folder, args.again, machine) as state:
                if state == "ours":
                    run(settings, folder, args, machine)
                elif state == "finished":
                    revisit(settings, folder, args, machine)


def run(settings, folder, args, machine):
    """One run: data and CLIP, the method, zero-shot CLIP, training, accuracy, other data, and a folder with it all."""
    started = time.time()
    given = read_learned(args.prompts, settings.method)
    with process_0_first(machine):  # it fetches what is not there yet
        bench, new_classes, trained_on = load_data(settings, args, given)
        targets = load_shifts(args.eval_on, args.root, bench, trained_on)
        clip = load_clip(settings.backbone_path or settings.backbone, machine.device, settings.activation or None)
        made = made_of(bench, trained_on, of_clip(clip), targets)
    settings = replace(settings, activation=clip.activation, templates=settings.templates or list(bench.templates))
    warn_of_moved(bench, folder.parents[1])

    torch.manual_seed(settings.seed)  # initial prompts and dropout; pictures have random streams of their own
    method = METHODS[settings.method](clip, bench.classnames, settings.templates, **settings.options).to(machine.device)
    if given:
        given.put_into(method, bench, settings)
    if new_classes:
        method.for_classes(new_classes.classnames)  # where a method cannot do this, the error comes before training
    print_settings(settings, bench, machine, method)

    zero_shot = Method(clip, bench.classnames, settings.templates)
    test = data.plain_batches(bench.test, clip, machine.device, machine.workers, bench.own)
    if machine.dtype:
        cast_products(clip, machine.dtype)  # from here on the towers are called under autocast alone
    before = evaluate(zero_shot, test, machine)
    print(f"zero-shot   {before.accuracy:.2f} %")

    began = time.time()
    description = asdict(settings) | dict(classnames=method.classnames, class_ids=bench.class_ids, train=trained_on,
                                          weights=made["weights"])
    checkpoint = Checkpoint(folder.with_name(f"{folder.name}.checkpoint"), description, machine)
    epoch_losses = learn(method, bench, settings, machine, checkpoint) if settings.recipe else []
    seconds_training = time.time() - began

    is_zero_shot = not settings.recipe and not given and method.templates == zero_shot.templates
    after = before if is_zero_shot else evaluate(method, test, machine)
    if settings.recipe and after.accuracy < before.accuracy:
        print(f"warning: {advice(after, len(epoch_losses), len(bench.classnames))}")
    papers = published(settings, settings.data)
    when = " after the last epoch" if epoch_losses else ""
    print(f"accuracy    {after.accuracy:.2f} % of the test pictures{when}{quoted(papers)}")
    variance = compare_variances(zero_shot, method, test, machine) if args.variance else {}
    shifts = evaluate_shifts(method, settings, bench, targets, after.accuracy, machine)
    base_to_new = evaluate_new(method, new_classes, after.accuracy, machine) if new_classes else {}

    paper, source = papers[0] if papers else (None, None)
    result = asdict(settings) | dict(
        classes=len(bench.classnames), train_images=len(bench.train), test_images=len(bench.test),
        zero_shot=before.accuracy, accuracy=after.accuracy, published=paper, published_source=source, shifts=shifts,
        base_to_new=base_to_new, variance=variance, trainable_parameters=count_learned(method),
        seconds_training=seconds_training, seconds_total=time.time() - started, epochs=len(epoch_losses),
        losses=epoch_losses, picks=bench.picks, made_of=made, torch=torch.__version__,
        device=device_name(machine.device), prompts=str(given.path) if given else "")
    if machine.rank == 0:
        save_run(folder, bench, method, description, after, result)
        checkpoint.remove()
        print(f"saved       {folder}")


def revisit(settings, folder, args, machine):
    """A finished run: UserError if what it was made of has changed. --eval-on and --variance are added to it."""
    asked = look_again(settings, folder, args, machine)
    if not asked:
        return
    bench, targets, known = asked
    method = load_run(folder, machine.device)
    zero_shot = Method(method.clip, method.classnames, method.templates)
    if machine.dtype:
        cast_products(method.clip, machine.dtype)
    test = data.plain_batches(bench.test, method.clip, machine.device, machine.workers, bench.own)
    variance = known["variance"] or (compare_variances(zero_shot, method, test, machine) if args.variance else {})
    shifts = evaluate_shifts(method, settings, bench, targets, known["accuracy"], machine, known["shifts"])
    if machine.rank == 0:
        add_to_result(folder, shifts, variance, targets)


def learn(method, bench, settings, machine, checkpoint):
    """Give the method its cache, train it and let it choose its constants. -> the mean loss of every epoch."""
    batches = data.few_shot_batches(bench, method.clip, settings.recipe, settings.seed, machine.device, machine.workers)
    val = data.plain_batches(bench.val, method.clip, machine.device, machine.workers, bench.own)
    if not checkpoint.restore_tensors(method):
        with machine.autocast():
            method.prepare(batches, val)
    epoch_losses = []
    if count_learned(method):
        print(f"learning    {count_learned(method):,} numbers")
        epoch_losses = train(method, batches, settings.recipe, machine, checkpoint)
    with machine.autocast():
        method.eval().finish(val)
    return epoch_losses


def count_learned(method):
    """-> how many numbers the optimizer learns. Those of a cache may be among them, once prepare() has made it."""
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


def train(method, few_shot, recipe, machine, checkpoint=None):
    """The loop. -> mean loss of every epoch. Only the method's own parameters change."""
    optimizer_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe["optimizer"]]
    constants = {key: recipe[key] for key in ("momentum", "weight_decay", "eps") if key in recipe}
    optimizer = optimizer_class(method.parameter_groups(recipe), **constants)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    epoch_losses, step_losses = checkpoint.restore(optimizer, scaler) if checkpoint else ([], [])
    epochs, first_epoch, began = recipe["epochs"], len(epoch_losses), time.time()
    method.train()
    for epoch in range(first_epoch, epochs):
        batches = few_shot.epoch(epoch, len(step_losses), machine.rank, machine.processes)
        for step, (images, labels) in enumerate(batches, len(step_losses)):
            progress = epoch + (step / len(few_shot) if recipe.get("cosine") == "steps" else 0)
            for group, base_rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = learning_rate(base_rate, progress, epochs, group["warmup_epochs"])
            with machine.autocast():
                loss = method.loss(images, labels, epoch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            loss = average(loss.detach(), method, len(labels), machine)  # over processes, and the gradients with it
            scaler.step(optimizer)
            scaler.update()
            step_losses.append(loss)  # read where it is saved: reading each would make a GPU wait
            if checkpoint:
                checkpoint.write_if_due(method, optimizer, scaler, epoch_losses, step_losses)
        require_finite(step_losses, method, epoch, optimizer)
        epoch_losses.append(sum(torch.stack(step_losses).tolist()) / len(step_losses))
        step_losses = []
        if checkpoint:
            checkpoint.write(method, optimizer, scaler, epoch_losses, step_losses)
        seconds_left = (time.time() - began) / (epoch + 1 - first_epoch) * (epochs - epoch - 1)
        show_epoch(epoch, epochs, epoch_losses[-1], rates(optimizer), seconds_left)
    return epoch_losses


def learning_rate(base, epoch, epochs, warmup_epochs):
    """Dassl's schedule: 1e-5 in `warmup_epochs`, then a cosine from base, cut off by their number, so it ends above 0.

    CoOp, VPT, DPT and UPT have one rate per epoch; fractions of epochs, without warm-up, give FG-VPL's plain cosine.
    """
    if epoch < warmup_epochs:
        return 1e-5
    return base / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs))


class Evaluation(NamedTuple):
    accuracy: float  # in percent, the micro average
    cross_entropy: float  # the mean
    predicted: list  # a class for each picture, in their order
    probability: list  # of that class


@torch.no_grad()
def evaluate(method, batches, machine):
    """-> Evaluation of all pictures of `batches`."""
    method.eval()
    rows = []  # (3, B) for every batch
    with machine.autocast():
        text = method.encode_text()  # once
        for images, labels in batches.share(machine.rank, machine.processes):
            log_p = method(images, text).float().log_softmax(dim=-1)  # (B, K)
            best, predicted = log_p.max(dim=-1)
            of_label = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
            rows.append(torch.stack([predicted, best, of_label]))
    predicted, best, of_label = torch.cat(gather(rows, machine), dim=1).cpu()
    correct = predicted == torch.tensor([label for _, label in batches.pictures.items])
    return Evaluation(accuracy=100 * correct.sum().item() / len(correct), cross_entropy=-of_label.mean().item(),
                      predicted=predicted.int().tolist(), probability=best.exp().tolist())


def evaluate_shifts(method, settings, bench, targets, accuracy, machine, known=()):
    """--eval-on: UPT's Table 1 and DPT's Table III -> {data set: accuracy}. accuracy: on the training's data set.

    known: {data set: accuracy} of those that need not be tested again.
    """
    shifts = dict(known)
    for target in targets:
        name = target.title
        if name not in shifts:
            shifts[name] = evaluate_on(method, target, bench.class_ids, machine).accuracy
        papers = [] if target.own else published(settings, name)
        print(f"{name:11} {shifts[name]:.2f} % of {len(target.test)} test pictures{quoted(papers)}")
    if shifts:
        total = sum(shifts.values())
        print(f"average     {(accuracy + total) / (1 + len(shifts)):.2f} % with {bench.name}, "
              f"{total / len(shifts):.2f} % of the shifted alone (OOD average)")
    return shifts


def evaluate_on(method, target, class_ids, machine):
    """-> Evaluation on the target's test pictures, under its class names. class_ids: the training data's."""
    if target.classnames != method.classnames:
        with machine.autocast():
            method = method.for_classes(target.classnames, columns(target, class_ids))
    batches = data.plain_batches(target.test, method.clip, machine.device, machine.workers, target.own)
    return evaluate(method, batches, machine)


def evaluate_new(method, new_classes, base, machine):
    """CoCoOp's protocol, its Section 4.1 -> the accuracies on both halves of the classes and their harmonic mean."""
    new = evaluate_on(method, new_classes, None, machine).accuracy
    mean = statistics.harmonic_mean([base, new])
    print(f"new classes {new:.2f} % of {len(new_classes.test)} test pictures, harmonic mean with the base {mean:.2f} %")
    return dict(base=base, new=new, harmonic_mean=mean)


def compare_variances(zero_shot, method, batches, machine):
    """--variance: UPT's Appendix A -> its variances of zero-shot CLIP, "before", and of the method, "after"."""
    variance = {"before": variances(zero_shot, batches, machine.autocast()),
                "after": variances(method, batches, machine.autocast())}
    print(f"variance    {variance}")
    return variance


def load_run(folder, device=None):
    """A finished run -> its trained method, ready to predict: method(images), see clip_min.preprocess for pictures."""
    saved = read_prompts(folder)
    device = choose_machine(device, "fp32", 0).device
    clip = load_clip(saved["backbone_path"] or saved["backbone"], device, saved["activation"])
    require_same_weights(folder, saved, clip)
    try:
        method = METHODS[saved["method"]](clip, saved["classnames"], saved["templates"], **saved["options"])
        method.load_learned(saved["tensors"])
        if not all(tensor.isfinite().all() for tensor in saved["tensors"].values()):
            raise ValueError("prompts.pt has numbers that are not finite")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not fit this version of train.py ({error}): train again.") from error
    return method.eval()


if __name__ == "__main__":
    start(main)
