"""What train.py promises. Pictures and weights are made here: flat colours with noise, and a small random CLIP.

Runs that several tests look at are made once, by the fixtures finished, swept and shifted; tests only read them.
"""

import ast
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, random_clip, random_state_dict
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from clip_min import Method, UserError, load_clip, preprocess
from coop import CoOp
from support import benchmarks, checks, runs
from support.console import advice
from support.machine import Machine
from support.results import describe_zero_shot
from support.settings import WORLD_EPOCHS, Settings, resolve_recipe

SETTINGS = {field.name for field in fields(Settings)}
KEYS = SETTINGS | {
    "classes", "train_images", "test_images", "zero_shot", "accuracy", "published", "published_source", "shifts",
    "base_to_new", "variance", "trainable_parameters", "seconds_training", "seconds_total", "epochs", "losses", "picks",
    "made_of",
    "torch",
    "device", "prompts",
}
TIMES = {"seconds_training", "seconds_total"}
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
NUMBERS = {"n01440764": 0, "n02012849": 134, "n03126707": 517, "n15075141": 999}  # some of ImageNet's classes
SHIFTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
SCRIPT = Path(train.__file__)
CPU = torch.device("cpu")
PLAIN = Machine(CPU, None, 0)

# Every method, and the options that change what it learns or what is tied to the training classes.
CASES = ["zeroshot", "coop", "coop csc=true n_ctx=4", "vpt", "vlp", "dpt", "cavpt", "cavpt base=vpt", "upt", "fgvpl",
         "fgvpl parts=fvp", "fgvpl parts=tip", "fgvpl parts=tip-f"]
CLASS_AWARE = {"dpt", "cavpt", "cavpt base=vpt"}  # their prompts are made of the likeliest of the classes at hand
NOTHING_TO_LEARN = {"zeroshot", "fgvpl parts=tip"}


# ---- Helpers ----


def draw(folder, count, names=("red", "green", "blue")):
    """Class folders of `count` pictures each, 32 x 32, one colour and noise. `count` may differ: {"red": 3, ...}."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count[name] if isinstance(count, dict) else count):
            pixels = torch.tensor(COLOURS.get(name, (128, 128, 128))) + 20 * torch.randn(32, 32, 3, generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / name / f"{i:02}.png")
    return folder


def main(*flags):
    return train.main([str(flag) for flag in flags])


def printed(*flags):
    """What a run that ends well prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(*flags) == 0
    return out.getvalue()


def run_folders(out):
    return sorted(path.parent for path in out.rglob("result.json"))


def only_run(out):
    (folder,) = run_folders(out)
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def prompts(folder):
    return torch.load(folder / "prompts.pt", weights_only=True)


def predictions(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """Every file below the folder, hidden ones included, but for what a stopped run goes on from."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".checkpoint"}


def settings(command, data_name, shots=16, backbone="ViT-B/16"):
    """"vpt --lr=0.002 n_visual=4" -> Settings, as the command line makes them."""
    method, *words = command.split()
    sets = [word.replace("a_photo_of_a", "a photo of a") for word in words if not word.startswith("--")]
    argv = ["--backbone", backbone, *(word for word in words if word.startswith("--"))]
    args = train.parse_arguments([*argv, *(["--set", *sets] if sets else [])])
    return train.resolve_settings(args, train.METHODS, data_name, method, shots, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """photos/ and weights.pt, shared by all tests, which only read them."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "photos", 12)
    torch.save(random_state_dict(**TINY), folder / "weights.pt")
    return folder


@pytest.fixture(scope="module")
def usual(world):
    """Flags for two epochs on the photographs with the small CLIP."""
    return ["--data", world / "photos", "--backbone", world / "weights.pt", "--shots", 4, "--epochs", 2,
            "--device", "cpu"]


@pytest.fixture
def start(usual, tmp_path):
    """train.main with the usual flags, saved under tmp_path / "runs"; flags given come last."""
    return lambda *flags: main(*usual, "--out", tmp_path / "runs", *flags)


@pytest.fixture(scope="module")
def finished(usual, tmp_path_factory):
    """A finished CoOp run: its folder, what it printed."""
    out = tmp_path_factory.mktemp("finished")
    text = printed(*usual, "--out", out)
    return SimpleNamespace(folder=only_run(out), out=text)


@pytest.fixture
def error(start, capsys, tmp_path):
    """Runs with these flags and -> the one sentence of the error; it ends with status 2 and saves nothing."""
    def run(*flags):
        before = contents(tmp_path / "runs")
        assert start(*flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert contents(tmp_path / "runs") == before
        return lines[0]

    return run


class Toy(Method):
    """A method whose numbers are known: its loss is (a - 1)^2 + (b + 2)^2, with a > 0 it tells the three colours."""

    recipe = dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.1, warmup_epochs=1, batch_size=32,
                  crop_scale=(0.5, 1.0), epochs={1: 3})

    def __init__(self, clip, classnames, templates=("a photo of a {}.",)):
        super().__init__(clip, classnames, templates)
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.batches, self.autocast = [], []
        Toy.last = self  # the newest one, for the tests

    def encode_text(self):
        return self.a

    def prepare(self, batches, val=()):
        self.autocast.append(torch.is_autocast_enabled("cpu"))

    def forward(self, images, text=None):
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        blue_green_red = images.mean(dim=(2, 3)).flip(1)  # the classes' order, which is the alphabet's
        return blue_green_red[:, : len(self.classnames)] * (self.a if text is None else text)

    def loss(self, images, labels, epoch=0):
        self.batches.append((epoch, len(images)))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return (self.a - 1) ** 2 + (self.b + 2) ** 2


@pytest.fixture
def toy(monkeypatch):
    """-> a function that makes Toy, with these changes, the method "toy"."""
    def make(**changes):
        monkeypatch.setitem(train.METHODS, "toy", type("Toy", (Toy,), changes))

    return make


class OneBatch:
    """Stands in for data.Batches: in every epoch the same batch `steps` times."""

    def __init__(self, images, labels, steps):
        self.batch, self.steps = (images, labels), steps

    def __len__(self):
        return self.steps

    def epoch(self, number, first=0, rank=0, processes=1):
        return itertools.repeat(self.batch, self.steps - first)


def sgd(p, gradient, rates, momentum=0.9, weight_decay=5e-4):
    """SGD written out."""
    velocity = 0.0
    for rate in rates:
        velocity = momentum * velocity + gradient(p) + weight_decay * p
        p -= rate * velocity
    return p


def adamw(p, gradient, rates, eps=1e-4, weight_decay=0.01):
    """AdamW written out."""
    m = v = 0.0
    for t, rate in enumerate(rates, start=1):
        m, v = 0.9 * m + 0.1 * gradient(p), 0.999 * v + 0.001 * gradient(p) ** 2
        p -= rate * weight_decay * p
        p -= rate * m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + eps)
    return p


def gradient_a(a):
    return 2 * (a - 1)


def gradient_b(b):
    return 2 * (b + 2)


# ---- Schedule and recipe ----


@pytest.mark.parametrize(("base", "epochs", "warmup", "epoch", "rate"), [
    (0.002, 200, 1, 0, 1e-5), (0.002, 200, 1, 1, 2e-3), (0.002, 200, 1, 199, 4.93e-7),
    (0.01, 100, 10, 0, 1e-5), (0.01, 100, 10, 9, 1e-5), (0.01, 100, 10, 10, 1e-2), (0.01, 100, 10, 99, 2.956e-4),
    (0.01, 60, 10, 59, 8.07e-4), (0.001, 100, 0, 0, 1e-3), (0.001, 100, 0, 50, 5e-4), (0.001, 100, 0, 0.5, 9.9994e-4),
])
def test_learning_rates_are_dassls(base, epochs, warmup, epoch, rate):
    assert train.learning_rate(base, epoch, epochs, warmup) == pytest.approx(rate, rel=2e-3)


def test_the_rate_is_constant_in_the_warm_up_and_then_falls_without_reaching_zero():
    rates = [train.learning_rate(0.01, epoch, 60, 10) for epoch in range(60)]
    assert rates[:10] == [1e-5] * 10 and rates[10] == 0.01
    assert all(a > b > 0 for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize(("shots", "epochs"), [
    (1, 50), (2, 100), (3, 100), (4, 100), (8, 200), (16, 200), (0, 200), (32, 200),
])
def test_coop_trains_as_many_epochs_as_its_paper_at_that_number_of_shots(shots, epochs):
    recipe, options = resolve_recipe(CoOp.recipe, {}, "dtd", shots)
    assert recipe["epochs"] == epochs and options == {}
    assert (recipe["optimizer"], recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"]) == ("sgd", 0.002, 1, 32)
    assert (recipe["momentum"], recipe["weight_decay"], recipe["crop_scale"]) == (0.9, 5e-4, (0.08, 1.0))
    assert resolve_recipe(CoOp.recipe, {}, "imagenet", shots)[0]["epochs"] == 50


def test_a_data_set_can_change_the_recipe_and_the_methods_options_and_the_user_both():
    dtd = settings("vlp", "dtd")
    assert (dtd.recipe["warmup_epochs"], dtd.options["guide_epochs"], dtd.changed) == (10, 30, {})
    imagenet = settings("vlp", "imagenet")
    assert (imagenet.recipe["epochs"], imagenet.recipe["warmup_epochs"]) == (20, 1)
    assert (imagenet.options["guide_epochs"], imagenet.changed) == (10, {})
    changed = settings("vlp --epochs=7 guide_epochs=30", "imagenet")  # 30 is the option's default, but not there
    assert (changed.recipe["epochs"], changed.options["guide_epochs"]) == (7, 30)
    assert changed.changed == {"guide_epochs": "30", "epochs": "7"}


def test_an_option_can_change_the_recipe():
    assert settings("fgvpl", "dtd").recipe["epochs"] == 100
    assert settings("fgvpl parts=tip-f", "dtd").recipe["epochs"] == 20
    assert settings("fgvpl parts=tip-f", "eurosat").recipe["epochs"] == 100


def test_on_drawn_data_the_recipe_is_the_papers_with_fewer_epochs(world):
    papers, drawn = (settings("coop", name).recipe for name in ("dtd", "shapes_tint"))
    assert papers | {"epochs": WORLD_EPOCHS} == drawn != papers
    assert settings("fgvpl parts=tip", "shapes").recipe["epochs"] == 0  # there is nothing to train


def test_flags_override_the_recipe_and_are_recorded(start, tmp_path):
    assert start("--epochs", 3, "--lr", 0.01, "--batch-size", 5, "--warmup-epochs", 2) == 0
    run = result(only_run(tmp_path / "runs"))
    assert run["epochs"] == run["recipe"]["epochs"] == len(run["losses"]) == 3
    assert [run["recipe"][key] for key in ("lr", "batch_size", "warmup_epochs")] == [0.01, 5, 2]
    assert run["changed"] == {"epochs": "3", "lr": "0.01", "batch_size": "5", "warmup_epochs": "2"}
    assert isinstance(CoOp.recipe["epochs"], dict) and CoOp.recipe["lr"] == 0.002  # the class's own is as it was


def test_rate_and_warm_up_of_the_command_reach_the_parts_with_rates_of_their_own(start, tmp_path, capsys, monkeypatch):
    used, learning_rate = set(), train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda base, epoch, epochs, warmup_epochs: (
        used.add((base, warmup_epochs)), learning_rate(base, epoch, epochs, warmup_epochs))[1])
    assert start("--method", "vlp", "--epochs", 1) == 0
    assert used == {(0.01, 10), (0.002, 1)}
    out = re.search("^recipe .*$", capsys.readouterr().out, re.MULTILINE)[0]
    assert re.search(r"ctx\W.*lr\W+0\.002\W.*warmup_epochs\W+1\b", out)
    used.clear()
    assert start("--method", "vlp", "--lr", 0.05, "--warmup-epochs", 3) == 0
    assert used == {(0.05, 3), (0.01, 3)}
    recipe = result(next((tmp_path / "runs").rglob("*lr=0.05*/*/result.json")).parent)["recipe"]
    assert recipe["parts"] == {"ctx": {"lr": 0.01, "warmup_epochs": 3}}


@pytest.mark.parametrize("name", ["shapes", "imagenet"])
def test_a_users_folder_that_is_called_like_a_known_set_is_not_taken_for_it(start, tmp_path, toy, name):
    toy(recipe=Toy.recipe | {"epochs": {1: 1, 4: 2}, "datasets": {"imagenet": {"epochs": 3}}})
    own = settings("toy", str(draw(tmp_path / name, 12)), shots=4, backbone="tiny")
    assert own.recipe["epochs"] == 2 and own.data == name and own.data_path == str(tmp_path / name)


@pytest.mark.parametrize(("pictures", "batches"), [(32, [32]), (33, [32]), (10, [10]), (64, [32, 32])])
def test_a_last_short_batch_is_dropped_unless_it_is_the_only_one(start, tmp_path, toy, pictures, batches):
    toy()
    for part in ("train", "test"):
        draw(tmp_path / "set" / part, {"red": pictures - 1, "blue": 1}, ("red", "blue"))
    assert start("--data", tmp_path / "set", "--method", "toy", "--shots", 0, "--epochs", 1) == 0
    assert [size for _, size in Toy.last.batches] == batches


# ---- The loop ----


@pytest.mark.parametrize(("update", "constants"), [
    (sgd, dict(momentum=0.9, weight_decay=5e-4)), (sgd, dict(momentum=0.5, weight_decay=0.1)),
    (adamw, dict(eps=1e-4, weight_decay=0.01)), (adamw, dict(eps=0.5, weight_decay=0.2)),
])
def test_an_update_is_the_optimisers_formula_at_the_schedules_rate_with_the_recipes_constants(
        start, tmp_path, toy, update, constants):
    rest = dict(lr=0.1, warmup_epochs=1, batch_size=32, crop_scale=(0.5, 1.0), epochs={1: 3})
    toy(recipe=dict(optimizer=update.__name__, **constants, **rest))
    assert start("--method", "toy", "--epochs", 5) == 0
    rates = [train.learning_rate(0.1, epoch, 5, 1) for epoch in range(5)]
    learned = prompts(only_run(tmp_path / "runs"))["tensors"]
    assert learned["a"].item() == pytest.approx(update(0.5, gradient_a, rates, **constants), rel=1e-5)
    assert learned["b"].item() == pytest.approx(update(0.0, gradient_b, rates, **constants), rel=1e-5)


def test_parts_of_the_recipe_have_their_own_rate_and_warm_up(start, tmp_path, toy):
    toy(recipe=Toy.recipe | {"parts": {"a": dict(lr=0.01, warmup_epochs=3)}})
    assert start("--method", "toy", "--epochs", 5) == 0
    learned = prompts(only_run(tmp_path / "runs"))["tensors"]
    rates_a = [train.learning_rate(0.01, epoch, 5, 3) for epoch in range(5)]
    rates_b = [train.learning_rate(0.1, epoch, 5, 1) for epoch in range(5)]
    assert learned["a"].item() == pytest.approx(sgd(0.5, gradient_a, rates_a), rel=1e-5)
    assert learned["b"].item() == pytest.approx(sgd(0.0, gradient_b, rates_b), rel=1e-5)


def test_a_cosine_over_steps_moves_in_every_step_and_else_in_every_epoch(start, toy, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "learning_rate", lambda base, epoch, *_: seen.append(epoch) or base)
    steps = dict(batch_size=4, drop_last=False, epochs={1: 2})
    toy(recipe=Toy.recipe | steps | {"cosine": "steps"})
    assert start("--method", "toy") == 0
    assert seen == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    seen.clear()
    toy(recipe=Toy.recipe | steps)
    assert start("--method", "toy", "--again") == 0
    assert seen == [0, 0, 0, 1, 1, 1]


def test_the_loss_is_told_the_epoch(start, toy):
    toy()
    assert start("--method", "toy", "--epochs", 3) == 0
    assert [epoch for epoch, _ in Toy.last.batches] == [0, 1, 2]


def test_the_losses_are_the_mean_of_every_epoch(start, tmp_path, toy):
    values = itertools.count(1.0)
    toy(loss=lambda self, images, labels, epoch: self.a * 0 + self.b * 0 + next(values))
    assert start("--method", "toy", "--batch-size", 4, "--epochs", 2) == 0
    assert result(only_run(tmp_path / "runs"))["losses"] == [2, 5]  # of 1, 2, 3 and of 4, 5, 6


def test_dropout_is_on_in_training_and_off_in_evaluation(start, toy):
    modes = []
    toy(loss=lambda self, *_: modes.append(("loss", self.training)) or self.a + self.b,
        encode_text=lambda self: modes.append(("text", self.training)) or self.a)
    assert start("--method", "toy", "--epochs", 1) == 0
    assert modes == [("loss", True), ("text", False)]
    train.train(Toy.last, OneBatch(torch.zeros(3, 3, 32, 32), torch.arange(3), 1), Toy.recipe | {"epochs": 1}, PLAIN)
    assert modes[-1] == ("loss", True)  # also after an evaluation


def test_a_log_gets_a_line_every_tenth_of_the_epochs(start, toy, capsys):
    toy()
    assert start("--method", "toy", "--epochs", 40) == 0
    assert re.findall(r"^epoch (\d+)/40 ", capsys.readouterr().out, re.MULTILINE) == [f"{4 * i}" for i in range(1, 11)]


def test_the_model_of_the_last_epoch_is_judged_and_not_the_best(start, tmp_path, toy):
    toy(loss=lambda self, images, labels, epoch: self.a + self.b)  # a falls below 0, where every answer is wrong
    assert start("--method", "toy", "--epochs", 1) == 0  # the warm-up alone: a has hardly moved
    assert result(only_run(tmp_path / "runs"))["accuracy"] == 100
    assert start("--method", "toy", "--epochs", 12) == 0
    assert sorted(result(run)["accuracy"] for run in run_folders(tmp_path / "runs")) == [0, 100]


def test_an_evaluation_counts_pictures_and_encodes_the_text_once(world, monkeypatch):
    bench = data.load(str(world / "photos"), shots=1)
    method = CoOp(random_clip(), bench.classnames, n_ctx=2)
    images = torch.stack([preprocess(32)(data.read(path)) for path, _ in bench.test])
    with torch.no_grad():
        log_p = method(images).log_softmax(dim=1)
    wanted = log_p.argmax(dim=1)
    labels = wanted.clone()
    labels[:2] = (labels[:2] + 1) % 3  # two are wrong
    items = [(path, int(label)) for (path, _), label in zip(bench.test, labels, strict=True)]
    calls, encode_text = [], CoOp.encode_text
    monkeypatch.setattr(CoOp, "encode_text", lambda self: calls.append(1) or encode_text(self))
    batches = data.Batches(data.Pictures(items, preprocess(32)), 5, CPU)
    evaluation = train.evaluate(method, batches, PLAIN)
    assert evaluation.accuracy == pytest.approx(100 * (len(items) - 2) / len(items)) and len(calls) == 1
    assert evaluation.predicted == wanted.tolist()
    assert evaluation.probability == pytest.approx(log_p.max(dim=1).values.exp().tolist(), rel=1e-4)
    expected = nn.functional.nll_loss(log_p, labels).item()
    assert evaluation.cross_entropy == pytest.approx(expected, rel=1e-4)


def test_only_the_methods_parameters_change(start, world, monkeypatch):
    loaded = []
    monkeypatch.setattr(train, "load_clip", lambda *args: loaded.append(load_clip(*args)) or loaded[-1])
    assert start("--lr", 0.1) == 0
    assert len(loaded) == 1
    before = load_clip(str(world / "weights.pt")).state_dict()
    after = loaded[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in loaded[0].parameters())


def test_variance_is_printed_and_recorded_before_and_after_training(start, tmp_path, capsys):
    assert start("--variance", "--epochs", 1) == 0
    assert "text_between_classes" in capsys.readouterr().out
    spread = result(only_run(tmp_path / "runs"))["variance"]
    before, after = spread["before"], spread["after"]
    assert before["image_within_classes"] == after["image_within_classes"]  # CoOp leaves the image features alone
    assert before["text_between_classes"] != after["text_between_classes"]
    assert all(0 < value < 2 for value in [*before.values(), *after.values()])


def test_neither_variance_nor_workers_change_what_is_learned(start, tmp_path):
    learned = []
    for flags in (), ("--variance",), ("--workers", 2):
        assert start("--method", "upt", "--batch-size", 5, "--again", *flags) == 0  # UPT has dropout as well as crops
        learned.append(prompts(only_run(tmp_path / "runs"))["tensors"])
    assert all(torch.equal(tensor, other[name]) for other in learned[1:] for name, tensor in learned[0].items())


# ---- Where and how it computes ----


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert train.choose_machine("cpu", "auto", None) == Machine(CPU, None, 0)
    assert train.choose_machine("cpu", "fp32", 3) == Machine(CPU, None, 3)
    assert train.choose_machine("cpu", "bf16", None).dtype == torch.bfloat16
    assert train.choose_machine("cpu", "fp16", None).dtype == torch.float16


@pytest.mark.parametrize(("native", "emulated", "dtype"), [
    (True, True, torch.bfloat16), (False, False, torch.float16), (False, True, torch.float16),
])
def test_a_gpu_computes_in_bf16_where_its_hardware_does_and_else_in_fp16(monkeypatch, native, emulated, dtype):
    def is_bf16_supported(including_emulation=True):
        return native or (emulated and including_emulation)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # there is no GPU to make a tensor on
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert train.choose_machine(None, "auto", None) == Machine(torch.device("cuda"), dtype, 8)
    assert train.choose_machine("cuda", "fp32", 0) == Machine(torch.device("cuda"), None, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cache_training_and_evaluation_run_under_the_runs_precision_and_tensors_stay_fp32(
        start, tmp_path, toy, monkeypatch, precision):
    toy()
    scaled, scaler = [], torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, enabled: scaled.append(enabled) or scaler(
        *args, enabled=enabled))
    assert start("--method", "toy", "--precision", precision) == 0
    assert len(Toy.last.autocast) == 4 and set(Toy.last.autocast) == {precision != "fp32"}  # with two epochs
    towers = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert Toy.last.clip.visual.proj.dtype == towers and Toy.last.clip.logit_scale.dtype == torch.float32
    assert prompts(only_run(tmp_path / "runs"))["tensors"]["a"].dtype == torch.float32
    assert scaled == [precision == "fp16"]  # whose small gradients would be zero otherwise


def test_the_loop_reads_nothing_from_the_device_but_once_per_epoch(tmp_path):
    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.reads += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **kwargs or {})

    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    reads = []
    for steps in (1, 6):
        method = CoOp(random_clip(), ["red", "green", "blue"], n_ctx=2)
        checkpoint = runs.Checkpoint(tmp_path / f"{steps}.checkpoint", {}, PLAIN)  # not due before the epoch's end
        with CountReads() as mode, redirect_stdout(io.StringIO()):
            train.train(method, OneBatch(images, labels, steps), CoOp.recipe | {"epochs": 2}, PLAIN, checkpoint)
        reads.append(mode.reads)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize("name", ["coop", "upt", "dpt"])
def test_no_tensor_of_the_loop_or_the_evaluation_is_on_another_device_than_the_methods(monkeypatch, name):
    """The meta device stands in for a GPU: a tensor made on the CPU fails there. What is read at the end is faked."""
    method = train.METHODS[name](random_clip(), ["red", "green", "blue"]).to("meta")
    images, labels = torch.empty(4, 3, 32, 32, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    machine = SimpleNamespace(device=CPU, dtype=None, rank=0, processes=1, autocast=nullcontext)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0] * self.numel())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape))
    monkeypatch.setattr(train, "require_finite", lambda *_: None)
    if name == "dpt":  # it asks whether there is a hit
        monkeypatch.setattr(torch.Tensor, "any", lambda self: True)
    recipe = train.METHODS[name].recipe | {"epochs": 1}
    assert train.train(method, OneBatch(images, labels, 2), recipe, machine) == [0]

    class Walk:
        pictures = SimpleNamespace(items=[("picture", 0)] * 4)

        def share(self, rank, processes):
            yield images, labels

    assert train.evaluate(method, Walk(), machine).accuracy == 100


# ---- What a run leaves ----


def test_a_run_leaves_its_result(finished, world):
    run = result(finished.folder)
    assert run.keys() == KEYS
    assert (run["method"], run["data"], run["shots"], run["seed"], run["classes"]) == ("coop", "photos", 4, 1, 3)
    assert (run["data_path"], run["backbone"]) == (str(world / "photos"), "weights")
    assert run["backbone_path"] == str(world / "weights.pt")
    assert (run["train_images"], run["test_images"], run["epochs"]) == (12, 12, 2)
    assert run["options"] == CoOp.default_options() and run["changed"] == {"epochs": "2"}
    assert run["trainable_parameters"] == 16 * TINY["text_width"] and len(run["losses"]) == 2
    assert 0 <= run["zero_shot"] <= 100 and 0 <= run["accuracy"] <= 100
    assert 0 < run["seconds_training"] < run["seconds_total"]
    assert re.fullmatch("[0-9a-f]{64}", run["picks"]) and run["precision"] == "auto"
    assert (run["torch"], run["device"]) == (torch.__version__, "cpu")
    assert run["published"] is run["published_source"] is None and run["shifts"] == run["variance"] == {}


def test_a_run_leaves_the_learned_tensors_alone_in_fp32(finished):
    saved = prompts(finished.folder)
    assert saved["tensors"].keys() == {"ctx"}
    assert saved["tensors"]["ctx"].shape == (16, TINY["text_width"]) and saved["tensors"]["ctx"].dtype == torch.float32
    assert saved["classnames"] == ["blue", "green", "red"] and saved["templates"] == ["a photo of a {}."]
    assert (finished.folder / "prompts.pt").stat().st_size < 10_000
    assert {path.name for path in finished.folder.iterdir()} == {"result.json", "prompts.pt", "predictions.csv"}


def test_result_and_prompts_hold_the_same_settings(finished):
    saved, run = prompts(finished.folder), result(finished.folder)
    assert saved.keys() >= SETTINGS
    assert json.loads(json.dumps({key: saved[key] for key in SETTINGS})) == {key: run[key] for key in SETTINGS}


def test_predictions_name_every_test_picture_with_what_the_method_says_of_it(finished, world):
    rows, run = predictions(finished.folder), result(finished.folder)
    assert list(rows[0]) == ["picture", "class", "predicted class", "probability"]
    bench = data.load(str(world / "photos"))
    assert [(str(world / "photos" / row["picture"]), row["class"]) for row in rows] == [
        (path, bench.classnames[label]) for path, label in bench.test]
    right = statistics.mean(row["class"] == row["predicted class"] for row in rows)
    assert 100 * right == pytest.approx(run["accuracy"]) and 0 < right < 1
    images = torch.stack([preprocess(32)(data.read(path)) for path, _ in bench.test])
    with torch.no_grad():
        best = train.load_run(finished.folder)(images).softmax(dim=1).max(dim=1)
    assert [bench.classnames[i] for i in best.indices] == [row["predicted class"] for row in rows]
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_run_says_what_it_is_before_it_says_how_it_went(finished):
    run = result(finished.folder)
    patterns = ["method +coop", "data +photos.*3 classes.*12 training.*12 test pictures",
                "backbone +weights with quickgelu on cpu",
                r"recipe +.*lr\W+0.002", r"prompts +.*blue.*\|.*green.*\|.*red",
                rf"zero-shot +{run['zero_shot']:.2f} %", "epoch 2/2 +loss", rf"accuracy +{run['accuracy']:.2f} %",
                f"saved +{finished.folder}"]
    found = [re.search(f"^{pattern}", finished.out, re.MULTILINE) for pattern in patterns]
    assert all(found), patterns[found.index(None)]
    assert [match.start() for match in found] == sorted(match.start() for match in found)


def test_base_to_new_trains_on_one_half_of_the_classes_and_tests_both(start, tmp_path, capsys, world):
    assert start("--base-to-new") == 0
    (folder,) = run_folders(tmp_path / "runs")
    run, bench = result(folder), data.load(str(world / "photos"), shots=4)
    halves = run["base_to_new"]
    assert "base_to_new=true" in str(folder) and run["classes"] == 2 and run["train_images"] == 8
    assert prompts(folder)["classnames"] == bench.classnames[:2]
    assert set(prompts(folder)["train"]) == {bench.relative(path) for path, label in bench.train if label < 2}
    assert halves["base"] == run["accuracy"] and halves["new"] == 100  # the other half is one class
    assert halves["harmonic_mean"] == pytest.approx(2 / (1 / halves["base"] + 1 / halves["new"]))
    method = train.load_run(folder, "cpu").for_classes(bench.classnames[2:])
    assert method.classnames == bench.classnames[2:]
    for options in ["--set", "csc=true"], ["--method", "fgvpl"]:  # tied to their classes: said before the training
        capsys.readouterr()
        assert start("--base-to-new", *options) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and "learning" not in said.out
    assert len(run_folders(tmp_path / "runs")) == 1


def test_templates_of_the_command_are_averaged_and_kept(start, tmp_path, capsys):
    texts = "a photo of a {}, a type of colour.", "{} again."
    assert start("--method", "zeroshot", "--template", *texts) == 0
    folder = only_run(tmp_path / "runs")
    method = train.load_run(folder, "cpu")
    expected = method.clip.classifier(method.classnames, texts)
    assert torch.equal(method.encode_text(), expected)
    assert result(folder)["templates"] == list(texts) and "template=" in str(folder)
    for wrong in "a photo", "{} and {", "{} {1}", "{name}", "{0}", "{{x}} {}":
        with pytest.raises(SystemExit) as stop:
            start("--template", wrong)
        assert stop.value.code == 2 and "needs one {}" in capsys.readouterr().err


@pytest.mark.parametrize("texts", [("a {}.", "the {}."), ('a {}? "yes"',), ("data: {}",), ("{}\\",)])
def test_on_windows_templates_make_no_folder_that_it_refuses(monkeypatch, texts):
    def folder(*texts):
        args = train.parse_arguments(["--template", *texts])
        return train.resolve_settings(args, train.METHODS, "shapes", "coop", 16, 1).folder.parts[1]

    elsewhere = folder(*texts)
    assert elsewhere == f"coop,template={' | '.join(texts)}"
    monkeypatch.setattr(sys, "platform", "win32")
    assert not set(folder(*texts)) & set('<>:"|?*\\') and folder("a {}.") == "coop,template=a {}."
    assert len({folder("a {}?"), folder("a {}*"), folder("a {}-")}) == 3


def test_the_same_seed_gives_the_same_run_to_the_bit_and_another_seed_another(start, finished, tmp_path):
    assert start("--seeds", 2, 1) == 0  # whatever ran before it
    again, other = run_folders(tmp_path / "runs")
    assert torch.equal(prompts(again)["tensors"]["ctx"], prompts(finished.folder)["tensors"]["ctx"])
    assert all(result(again)[key] == result(finished.folder)[key] for key in KEYS - TIMES)
    assert predictions(again) == predictions(finished.folder)
    assert (result(again)["seed"], result(other)["seed"]) == (1, 2) and result(again)["picks"] != result(other)["picks"]
    apart = (prompts(again)["tensors"]["ctx"] - prompts(other)["tensors"]["ctx"]).abs().mean()
    assert apart > 0.01  # as far apart as two draws with standard deviation 0.02: they began differently


def test_the_seed_decides_the_crops(start, toy):
    def loss(self, images, labels, epoch=0):
        seen.append(images.sum().item())
        return self.a + self.b

    seen = []
    toy(loss=loss)
    assert start("--method", "toy", "--shots", 0, "--epochs", 1, "--seeds", 1, 2) == 0
    assert start("--method", "toy", "--shots", 0, "--epochs", 1, "--again") == 0
    assert seen[0] == seen[2] != seen[1]


def test_options_reach_the_method_also_from_two_flags(start, tmp_path):
    assert start("--set", "n_ctx=4", "class_token_position=middle", "--set", "csc=true") == 0
    folder = only_run(tmp_path / "runs")
    assert prompts(folder)["tensors"]["ctx"].shape == (3, 4, TINY["text_width"])
    chosen = {"n_ctx": 4, "class_token_position": "middle", "csc": True}
    assert result(folder)["options"] == CoOp.default_options() | chosen


@pytest.mark.parametrize("flags", [["zeroshot"], ["linear_probe"], ["fgvpl", "--set", "parts=tip"],
                                   ["coop", "--set", "n_ctx=0"]], ids=str)
def test_where_the_optimizer_learns_nothing_no_line_speaks_of_learning_or_epochs(start, capsys, flags):
    assert start("--method", *flags) == 0
    out = capsys.readouterr().out
    assert not re.search("^(learning|epoch) ", out, re.MULTILINE)
    assert re.search(r"^accuracy +[\d.]+ % of the test pictures$", out, re.MULTILINE)


def test_where_the_optimizer_learns_something_lines_say_how_much_and_how_long(finished):
    assert f"learning    {16 * TINY['text_width']:,} numbers\n" in finished.out
    assert re.search(r"^accuracy +[\d.]+ % of the test pictures after the last epoch$", finished.out, re.MULTILINE)


def test_all_pictures_are_called_all_for_a_reader_and_zero_in_folder_and_settings(start, tmp_path, capsys):
    assert start("--method", "zeroshot", "--shots", 0) == 0
    assert "(all per class, seed 1)" in capsys.readouterr().out
    folder = only_run(tmp_path / "runs")
    assert "_0shot_" in folder.name and result(folder)["shots"] == 0


def test_zero_shot_learns_nothing_and_is_a_run_too(start, tmp_path):
    assert start("--method", "zeroshot", "--epochs", 3) == 0
    folder = only_run(tmp_path / "runs")
    run = result(folder)
    assert run["trainable_parameters"] == run["epochs"] == 0 and run["losses"] == []
    assert run["accuracy"] == run["zero_shot"] and prompts(folder)["tensors"] == run["recipe"] == run["changed"] == {}
    assert len(predictions(folder)) == run["test_images"]


@pytest.mark.parametrize("method, options", [
    ("coop", dict(n_ctx=0)), ("vlp", dict(n_ctx=0, n_visual=0)), ("zeroshot", dict(seven_templates=True))])
def test_without_anything_to_learn_it_is_the_methods_own_accuracy_and_not_zero_shots(
        start, tmp_path, world, method, options):
    assert start("--method", method, "--set", *(f"{key}={value}" for key, value in options.items())) == 0
    folder, clip, bench = only_run(tmp_path / "runs"), random_clip(), data.load(str(world / "photos"))
    assert result(folder)["trainable_parameters"] == 0
    batches = data.plain_batches(bench.test, clip, CPU, 0)
    own = train.evaluate(train.METHODS[method](clip, bench.classnames, **options), batches, PLAIN)
    probability = [float(row["probability"]) for row in predictions(folder)]
    assert probability == pytest.approx(own.probability, abs=1e-5) and result(folder)["accuracy"] == own.accuracy
    zero_shot = train.evaluate(Method(clip, bench.classnames), batches, PLAIN)
    assert probability != pytest.approx(zero_shot.probability, abs=1e-2)


# ---- Run folders and sweeps ----


def test_a_folder_is_called_by_data_method_backbone_shots_and_seed():
    assert settings("upt", "dtd", 4).folder == Path("dtd", "upt", "ViT-B-16_4shot_seed1")
    assert settings("upt mode=attention --epochs=100", "dtd", 4).folder == settings("upt", "dtd", 4).folder


def test_a_folder_names_what_differs_from_the_defaults():
    changed = settings("upt mode=mlp --epochs=7 --lr=0.01 --precision=fp32", "dtd", 0)
    assert changed.folder == Path("dtd", "upt,mode=mlp,epochs=7,lr=0.01,precision=fp32", "ViT-B-16_0shot_seed1")
    assert changed.changed == {"mode": "mlp", "epochs": "7", "lr": "0.01", "precision": "fp32"}
    assert settings("coop csc=true ctx_init=a/b", "dtd").folder.parts[1] == "coop,csc=true,ctx_init=a-b"


def test_an_option_that_is_called_like_a_flag_is_compared_with_its_own_default(monkeypatch):
    class Named(Toy):
        def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, lr=0.5, template="none", epochs=4):
            super().__init__(clip, classnames, templates)

    monkeypatch.setitem(train.METHODS, "named", Named)
    assert settings("named", "dtd").changed == {}
    assert settings("named lr=0.5 template=none epochs=4", "dtd").changed == {}
    options = settings("named lr=0.1 template=a epochs=3", "dtd")  # the recipe's rate and number of epochs
    assert options.changed == {"set.lr": "0.1", "set.template": "a", "set.epochs": "3"}
    assert options.options == {"lr": 0.1, "template": "a", "epochs": 3} and options.recipe["lr"] == 0.1
    flags = settings("named --lr=0.5 --template={} --epochs=4", "dtd")  # the options' defaults
    assert flags.changed == {"lr": "0.5", "epochs": "4", "template": "{}"}
    assert flags.options == Named.default_options() and flags.recipe["lr"] == 0.5
    both = settings("named --lr=0.2 lr=0.3", "dtd")
    assert both.changed == {"set.lr": "0.3", "lr": "0.2"} and both.folder.parts[1] == "named,set.lr=0.3,lr=0.2"
    labels = [describe_zero_shot(of_run, {})[0] for of_run in (options, both, settings("named --template={}", "dtd"))]
    assert labels == ["zeroshot", "zeroshot", "zeroshot template={}"]  # only the flag changes zero-shot CLIP, too


def test_two_things_of_one_name_have_different_folders(tmp_path):
    data_folders, weights = [], []
    for site in "siteA", "siteB":
        (tmp_path / site / "images").mkdir(parents=True)
        (tmp_path / site / "open_clip_model.safetensors").touch()
        data_folders.append(str(tmp_path / site / "images"))
        weights.append(str(tmp_path / site / "open_clip_model.safetensors"))
    found = {settings("coop", name, backbone=file).folder for name in data_folders for file in weights}
    assert len(found) == 4
    assert all(folder.parts[0].startswith("images") and folder.name.startswith("open_clip_model") for folder in found)
    named = settings("coop", "dtd").folder
    (tmp_path / "dtd").mkdir()
    assert settings("coop", str(tmp_path / "dtd")).folder != named


@pytest.fixture(scope="module")
def swept(world, tmp_path_factory):
    """A sweep of two methods, two data sets, two shots and two seeds: its flags, its folder of runs."""
    place = tmp_path_factory.mktemp("swept")
    for site in "siteA", "siteB":
        draw(place / site / "images", 4)
    flags = ["--method", "zeroshot", "coop", "--data", place / "siteA/images", place / "siteB/images", "--shots", 1, 2,
             "--seeds", 0, 3, "--epochs", 1, "--backbone", world / "weights.pt", "--device", "cpu",
             "--out", place / "runs"]
    printed(*flags)
    return SimpleNamespace(flags=flags, out=place / "runs")


def test_a_sweep_runs_every_combination(swept):
    runs = [result(folder) for folder in run_folders(swept.out)]
    found = [(run["method"], Path(run["data_path"]).parent.name, run["shots"], run["seed"]) for run in runs]
    wanted = itertools.product(["zeroshot", "coop"], ["siteA", "siteB"], [1, 2], [0, 3])
    assert sorted(found) == sorted(wanted)
    assert all(run["train_images"] == 3 * run["shots"] for run in runs)


def test_finished_runs_are_skipped_with_a_line_each(swept, monkeypatch):
    before = contents(swept.out)
    monkeypatch.setattr(train, "run", None)
    lines = printed(*swept.flags).splitlines()
    assert len(lines) == 16 and all("finished" in line and "--again" in line for line in lines)
    assert {folder for folder in run_folders(swept.out) if any(f"{folder} " in line for line in lines)} == set(
        run_folders(swept.out))
    assert contents(swept.out) == before


def test_again_repeats_a_finished_run_and_a_repeat_replaces_its_folder_as_a_whole(start, tmp_path):
    assert start() == 0
    folder = only_run(tmp_path / "runs")
    first = result(folder)
    (folder / "report.csv").write_text("made from the old run")
    assert start() == 0 and (folder / "report.csv").exists()
    assert start("--again") == 0
    assert set(contents(tmp_path / "runs")) == {f"{folder.relative_to(tmp_path / 'runs')}/{name}"
                                                for name in ("result.json", "prompts.pt", "predictions.csv")}
    assert result(folder)["seconds_total"] != first["seconds_total"] and result(folder)["losses"] == first["losses"]


def test_a_sweep_goes_on_behind_what_is_finished(start, tmp_path):
    assert start("--seeds", 1) == 0
    before = contents(tmp_path / "runs")
    assert start("--seeds", 1, 2) == 0
    assert len(run_folders(tmp_path / "runs")) == 2 and contents(tmp_path / "runs").items() >= before.items()


# ---- Nothing finished is lost ----


def full_disk(value, path):
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def full_disk_of_torch(value, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1216 vs 1112")


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full_disk, full_disk_of_torch])
def test_a_run_that_cannot_be_saved_leaves_the_earlier_run_whole_and_nothing_else(
        start, error, tmp_path, monkeypatch, failure):
    assert start() == 0
    monkeypatch.setattr(torch, "save", failure)
    assert str(only_run(tmp_path / "runs")) in error("--again")  # error() compares all files below runs/
    assert "seed2" in error("--seeds", 2)
    assert not list((tmp_path / "runs").rglob(".*"))


def test_a_result_that_cannot_be_written_is_no_half_run(start, error, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_, **__: full_disk(_, tmp_path / "scratch"))
    assert "No space left" in error()
    assert not list((tmp_path / "runs").rglob(".*"))


def test_an_old_run_comes_back_where_the_new_one_cannot_take_its_place(start, error, tmp_path, monkeypatch):
    assert start() == 0
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    error("--again")  # compares all files below runs/


@pytest.mark.parametrize("place", ["loss", "save"])
def test_ctrl_c_ends_with_one_line_and_status_130_and_keeps_what_is_finished(
        start, tmp_path, toy, monkeypatch, capsys, place):
    toy()
    assert start("--method", "toy") == 0
    before = contents(tmp_path / "runs")
    if place == "loss":
        toy(loss=interrupted)
    else:
        monkeypatch.setattr(torch, "save", interrupted)
    capsys.readouterr()
    assert start("--method", "toy", "--again", "--seeds", 1, 2) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert contents(tmp_path / "runs") == before and not list((tmp_path / "runs").rglob(".*"))


def test_a_loss_that_is_not_finite_names_epoch_step_and_rate_and_leaves_the_earlier_run_whole(start, error, toy):
    toy()
    assert start("--method", "toy", "--batch-size", 4) == 0
    calls = itertools.count(1)
    toy(loss=lambda self, images, labels, epoch: self.a + self.b + (math.nan if next(calls) == 5 else 0))
    message = error("--method", "toy", "--batch-size", 4, "--again")  # three steps in an epoch
    assert re.search(r"epoch 2, step 2\b.*learning rate 0\.1\b", message)


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_nothing_that_is_not_finite(
        error, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)  # due after every step
    calls = itertools.count(1)
    toy(loss=lambda self, images, labels, epoch: self.a + self.b + (math.nan if next(calls) == 5 else 0))
    assert "epoch 2, step 2" in error("--method", "toy", "--batch-size", 4)  # three steps in an epoch
    (path,) = (tmp_path / "runs").rglob("*.checkpoint")
    saved = torch.load(path, weights_only=True)
    assert (len(saved["epoch_losses"]), len(saved["step_losses"])) == (1, 1)  # of the step before
    tensors = [*saved["tensors"].values(), *saved["step_losses"]]
    assert all(tensor.isfinite().all() for tensor in tensors) and math.isfinite(saved["epoch_losses"][0])
    toy(loss=lambda self, images, labels, epoch: self.a * 1e38 * 10)  # what the step taught is not finite, either
    assert "epoch 1, step 1" in error("--method", "toy", "--batch-size", 4, "--epochs", 5, "--lr", 1e30)
    assert len(list((tmp_path / "runs").rglob("*.checkpoint"))) == 1


def test_a_rate_that_is_far_too_large_ends_in_one_sentence(error):
    assert re.search(r"epoch \d, step \d, at learning rate \S*e\+(29|30)", error("--epochs", 6, "--lr", 1e30))


def test_prompts_that_are_not_finite_after_the_last_step_are_not_saved(error, toy):
    toy(loss=lambda self, images, labels, epoch: (self.a + self.b) * 1e20)  # finite before the last step, inf after
    assert "epoch 2, step 1" in error("--method", "toy", "--epochs", 2, "--lr", 1e30)


# ---- The advice where a run ends below zero-shot CLIP ----


@pytest.mark.parametrize("accuracy, cross_entropy, epochs, smaller_rate", [
    (34.0, math.log(3), 50, True),  # as good as chance, and sure of nothing
    (34.0, 9.0, 50, True),  # as good as chance, and sure of it
    (34.0, math.log(3), 5, False),  # not trained enough to tell
    (60.0, 0.9, 50, False),  # it has learned
    (60.0, 5.0, 50, False),  # it has learned, and is too sure of its mistakes: no collapse
])
def test_a_smaller_rate_is_advised_only_for_a_collapse_after_many_epochs(
        start, tmp_path, toy, capsys, monkeypatch, accuracy, cross_entropy, epochs, smaller_rate):
    toy(loss=lambda self, images, labels, epoch: self.a * 0 + self.b * 0)
    zero_shot, trained = (train.Evaluation(value, loss, [0] * 12, [0.5] * 12)
                          for value, loss in ((80.0, 0.5), (accuracy, cross_entropy)))
    monkeypatch.setattr(train, "evaluate", lambda method, *_: trained if isinstance(method, Toy) else zero_shot)
    assert start("--method", "toy", "--epochs", epochs) == 0
    (warning,) = re.findall("^warning: .*$", capsys.readouterr().out, re.MULTILINE)
    assert f"{cross_entropy:.2f}" in warning
    assert ("smaller --lr" in warning) == smaller_rate
    assert ("--epochs" in warning and "--shots" in warning) == (not smaller_rate)


def test_a_method_without_epochs_is_not_advised_to_take_more():
    remedy = advice(train.Evaluation(30.0, 5.0, [], []), 0, 3)
    assert "--shots" in remedy and "--epochs" not in remedy


def test_above_zero_shot_nobody_is_warned(start, toy, capsys):
    toy()
    assert start("--method", "toy") == 0
    out = capsys.readouterr()
    assert "warning" not in out.out + out.err


# ---- Finished runs ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four classes of ImageNet and of its shifts, and a dtd of two classes in CoOp's layout."""
    root = tmp_path_factory.mktemp("root")
    for part in "train", "val":
        draw(root / "imagenet" / "images" / part, 6, NUMBERS)
    draw(root / "imagenetv2" / "imagenetv2-matched-frequency-format-val", 3, [str(n) for n in NUMBERS.values()])
    draw(root / "imagenet-sketch" / "sketch", 3, NUMBERS)
    draw(root / "imagenet-adversarial" / "imagenet-a", 4, ["n03126707", "n02012849"])
    draw(root / "imagenet-rendition" / "imagenet-r", 4, ["n15075141", "n01440764", "n03126707"])
    draw(root / "dtd" / "images", 6, ["dotted", "lined"])
    rows = [[f"{name}/{i:02}.png", label, name] for label, name in enumerate(["dotted", "lined"]) for i in range(6)]
    split = {"train": rows[:4] + rows[6:10], "val": [], "test": rows[4:6] + rows[10:]}
    (root / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    return root


@pytest.fixture(scope="module")
def shifted(root, world, tmp_path_factory):
    """A case of CASES -> its run on imagenet with all shifts, made once: folder, output and the trained method."""
    @functools.cache
    def run(case):
        method, *options = case.split()
        out, trained, save_run = tmp_path_factory.mktemp("shifted"), [], train.save_run
        flags = ["--data", "imagenet", "--method", method, *(["--set", *options] if options else []), "--shots", 2,
                 "--epochs", 2, "--lr", 0.05, "--warmup-epochs", 0, "--eval-on", *SHIFTS, "--root", root,
                 "--backbone", world / "weights.pt", "--device", "cpu", "--out", out]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "save_run", lambda *args: (
                trained.extend(arg for arg in args if isinstance(arg, Method)), save_run(*args)))
            text = printed(*flags)
        return SimpleNamespace(folder=only_run(out), out=text, method=trained[0].eval())

    return run


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_every_method_that_has_something_to_learn_learns(shifted, case):
    run, saved = result(shifted(case).folder), prompts(shifted(case).folder)
    if case in NOTHING_TO_LEARN:
        assert run["trainable_parameters"] == run["epochs"] == 0
    else:
        assert run["epochs"] == len(run["losses"]) == 2 and run["losses"][0] != run["losses"][1]
        learned = [p for p in shifted(case).method.parameters() if p.requires_grad]
        assert run["trainable_parameters"] == sum(p.numel() for p in learned) > 0
        assert all(p.dtype == torch.float32 for p in saved["tensors"].values() if p.is_floating_point())
    assert run.keys() == KEYS and len(predictions(shifted(case).folder)) == run["test_images"] == 24


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_loaded_gives_the_logits_of_the_trained_method(shifted, images, case):
    trained, loaded = shifted(case).method, train.load_run(shifted(case).folder, "cpu")
    assert type(loaded) is type(trained) and not loaded.training
    assert (loaded.classnames, loaded.templates) == (trained.classnames, trained.templates)
    with torch.no_grad():
        assert torch.equal(loaded(images), trained(images))


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_tested_on_the_shifts_and_again_from_its_run(shifted, root, case):
    run, out = result(shifted(case).folder), shifted(case).out
    assert list(run["shifts"]) == SHIFTS
    assert f"{statistics.mean(run['shifts'].values()):.2f} % of the shifted alone (OOD average)" in out
    assert f"{statistics.mean([run['accuracy'], *run['shifts'].values()]):.2f} % with imagenet" in out
    loaded, class_ids = train.load_run(shifted(case).folder), prompts(shifted(case).folder)["class_ids"]
    for name, accuracy in run["shifts"].items():
        assert re.search(f"^{name} +{accuracy:.2f} %", out, re.MULTILINE)
        assert train.evaluate_on(loaded, data.load(name, root, 0), class_ids, PLAIN).accuracy == accuracy


@pytest.mark.parametrize("case", CASES)
def test_for_the_classes_that_remain_a_method_says_what_it_said_before(shifted, root, images, case):
    source, target = (data.load(name, root, 0) for name in ("imagenet", "imagenet_a"))
    columns = checks.columns(target, source.class_ids)
    assert columns == [1, 2] and (source.class_ids, target.class_ids) == ([0, 134, 517, 999], [134, 517])
    method = shifted(case).method
    with torch.no_grad():
        whole, part = method(images)[:, columns], method.for_classes(target.classnames, columns).eval()(images)
    if case in CLASS_AWARE:  # of four classes others are the likeliest than of two: other prompts, other logits
        assert part.shape == (5, 2) and not torch.allclose(part, whole, atol=1e-3)
    else:
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["coop csc=true n_ctx=4", "fgvpl", "fgvpl parts=tip"])
def test_what_is_tied_to_the_training_classes_is_read_in_part_or_refused(shifted, root, case):
    method, target = shifted(case).method, data.load("imagenet_r", root, 0)
    pictures = [preprocess(32)(data.read(path)) for path, _ in target.test]
    with torch.no_grad():
        expected = method(torch.stack(pictures))[:, [0, 2, 3]].argmax(dim=1)
    evaluation = train.evaluate_on(method, target, [0, 134, 517, 999], PLAIN)
    assert evaluation.predicted == expected.tolist()
    right = [label == guess for (_, label), guess in zip(target.test, expected.tolist(), strict=True)]
    assert evaluation.accuracy == pytest.approx(100 * statistics.mean(right))
    with pytest.raises(UserError):
        train.evaluate_on(method, target, None, PLAIN)


def test_fgvpl_on_imagenet_reads_the_seven_templates(shifted):
    templates = prompts(shifted("fgvpl").folder)["templates"]
    assert len(templates) == 7 and templates[0] == "itap of a {}."


def test_a_loaded_run_needs_nothing_but_its_folder_and_the_weights(finished, tmp_path, images):
    (tmp_path / "prompts.pt").write_bytes((finished.folder / "prompts.pt").read_bytes())
    with torch.no_grad():
        assert torch.equal(train.load_run(str(tmp_path))(images), train.load_run(finished.folder)(images))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        train.load_run(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_does_not_exist_is_not_loaded(tmp_path):
    assert str(tmp_path / "no_run") in refusal(tmp_path / "no_run")


@pytest.mark.parametrize("content", [b"", b"noise", [1, 2], {"method": "coop"}, {"ctx": torch.zeros(16, 64)}], ids=str)
def test_a_file_that_holds_no_prompts_is_not_loaded(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "prompts.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "prompts.pt")
    assert str(tmp_path / "prompts.pt") in refusal(tmp_path)


def test_no_code_in_a_prompt_file_is_run(finished, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    torch.save(prompts(finished.folder) | {"options": Code()}, tmp_path / "prompts.pt")
    refusal(tmp_path)
    assert not (tmp_path / "it ran").exists()


def test_prompts_that_the_machine_cannot_read_are_not_called_broken(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", denied)
    message = refusal(tmp_path)
    assert str(tmp_path / "prompts.pt") in message and "Permission denied" in message and "train again" not in message


@pytest.mark.parametrize("length", [0.1, 0.5, 0.99])
def test_truncated_prompts_are_not_loaded(finished, tmp_path, length):
    whole = (finished.folder / "prompts.pt").read_bytes()
    (tmp_path / "prompts.pt").write_bytes(whole[: int(length * len(whole))])
    assert str(tmp_path / "prompts.pt") in refusal(tmp_path)


@pytest.mark.parametrize("change", [{"method": "later"}, {"options": {"later": 1}}, {"tensors": {"ctx": 1}},
                                    {"tensors": {"ctx": torch.zeros(16, 32)}}, {"tensors": {}}], ids=str)
def test_prompts_of_another_version_are_not_loaded(finished, tmp_path, change):
    torch.save(prompts(finished.folder) | change, tmp_path / "prompts.pt")
    refusal(tmp_path)


@pytest.mark.parametrize("key", sorted(SETTINGS | {"classnames", "templates", "class_ids", "tensors"}))
def test_prompts_that_lack_something_are_not_loaded(finished, tmp_path, key):
    saved = prompts(finished.folder)
    del saved[key]
    torch.save(saved, tmp_path / "prompts.pt")
    assert str(tmp_path / "prompts.pt") in refusal(tmp_path)


# ---- Shifted data ----


@pytest.fixture
def on_benchmarks(root, usual, tmp_path, monkeypatch):
    """train.main on the data in root; every backbone is a small random CLIP. -> result.json, of two shots."""
    monkeypatch.setattr(train, "load_clip", lambda *args: random_clip())

    def run(data_name, method, *flags, status=0):
        flags = ["--data", data_name, "--method", method, "--shots", 2, "--epochs", 1, *flags]
        assert main(*flags, "--root", root, "--device", "cpu", "--out", tmp_path / "runs") == status
        return result(only_run(tmp_path / "runs")) if status == 0 else None

    return run


@pytest.mark.parametrize("sets", [["imagenet"], ["imagenetv2", "imagenet-v2"]], ids=str)
def test_a_set_is_tested_once(on_benchmarks, capsys, sets):
    on_benchmarks("imagenet", "coop", "--eval-on", *sets, status=2)
    assert "already" in capsys.readouterr().err


def test_a_second_eval_on_adds_to_the_first(on_benchmarks):
    found = on_benchmarks("imagenet", "zeroshot", "--eval-on", "imagenet_a", "--eval-on", "imagenet_r")["shifts"]
    assert list(found) == SHIFTS[2:]


def test_data_with_other_classes_are_no_shift(on_benchmarks, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", None)  # it is said before the training
    on_benchmarks("imagenet", "coop", "--eval-on", "dtd", status=2)
    assert "dtd" in capsys.readouterr().err
    on_benchmarks("dtd", "coop", "--eval-on", "imagenet_a", status=2)
    assert "imagenet_a" in capsys.readouterr().err


def test_nothing_is_trained_on_data_without_training_pictures(on_benchmarks, capsys):
    on_benchmarks("imagenet_a", "coop", status=2)
    assert "--eval-on imagenet_a" in capsys.readouterr().err
    assert on_benchmarks("imagenet_a", "zeroshot")["test_images"] == 8


# ---- The papers' numbers ----


def test_every_published_number_of_a_method_is_found_by_its_setting():
    with (SCRIPT.parent / "assets" / "published.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"]]
    wanted = {}
    for row in rows:
        key = tuple(row[name] for name in ("method", "options", "backbone", "shots", "dataset"))
        wanted.setdefault(key, []).append((float(row["accuracy"]), f"{row['paper']}, {row['table']}"))
    assert len(rows) > 400 and len(wanted) > 300
    for (method, options, backbone, shots, name), numbers in wanted.items():
        pairs = dict(pair.split("=") for pair in options.split(";") if pair)
        recipe = [key for key in pairs if key in ("epochs", "lr", "warmup_epochs")]
        flags = [f"--{key.replace('_', '-')}={pairs.pop(key)}" for key in recipe]
        sets = [f"{key}={value}" for key, value in pairs.items()]
        args = train.parse_arguments(["--backbone", backbone, *flags, *(["--set", *sets] if sets else [])])
        trained_on = {"average_8": "dtd", "average_11": "dtd"}.get(name, name)
        if name in [*SHIFTS, "shift_average", "ood_average"]:
            trained_on = "imagenet"
        run = train.resolve_settings(args, train.METHODS, trained_on, method, int(shots), 1)
        assert sorted(benchmarks.published(run, name)) == sorted(numbers), (method, options, backbone, shots, name)


@pytest.mark.parametrize("command, backbone, shots, name, expected", [
    ("zeroshot", "ViT-B/16", 4, "eurosat", [47.69]),
    ("coop", "ViT-B/16", 16, "eurosat", [83.74]),
    ("coop", "ViT-B/32", 16, "eurosat", [83.12, 83.11]),
    ("coop n_ctx=16", "ViT-B/16", 16, "imagenet", [71.62, 71.9]),
    ("coop ctx_init=a_photo_of_a", "ViT-B/16", 16, "imagenet", [71.51, 71.36]),
    ("coop n_ctx=4", "ViT-B/16", 16, "imagenet", []),
    ("coop", "ViT-B/16", 8, "eurosat", []),
    ("coop", "ViT-L/14", 16, "eurosat", []),
    ("coop --epochs=10", "ViT-B/16", 16, "eurosat", []),
    ("coop --lr=0.003", "ViT-B/16", 16, "eurosat", []),
    ("coop --batch-size=8", "ViT-B/16", 16, "eurosat", []),
    ("coop --epochs=200", "ViT-B/16", 16, "eurosat", [83.74]),  # what the recipe says anyway
    ("coop --precision=fp32", "ViT-B/16", 16, "eurosat", [83.74]),  # changes no more than the last digits
    ("vpt --lr=0.002 --warmup-epochs=1 n_visual=4", "ViT-B/16", 16, "imagenet_a", [43.85]),
    ("vpt deep=false --lr=0.001", "ViT-B/32", 16, "eurosat", [79.33]),
    ("vlp guide_epochs=0 --epochs=200", "ViT-B/32", 16, "eurosat", [91.84]),
    ("dpt", "ViT-B/32", 16, "eurosat", [91.16]),
    ("dpt", "ViT-B/32", 1, "imagenetv2", [55.15]),
    ("dpt alpha=0", "ViT-B/32", 16, "average_11", [78.96]),
    ("dpt k_n=0", "ViT-B/32", 16, "average_11", [78.41]),
    ("cavpt base=vpt tuned_k_n=true cavpt_loss=false", "ViT-B/32", 16, "eurosat", [92.16]),
    ("cavpt", "ViT-B/32", 16, "eurosat", []),  # the paper does not say for how many classes
    ("upt", "ViT-B/16", 16, "imagenetv2", [64.35]),
    ("upt mode=mlp", "ViT-B/16", 16, "imagenet", [71.0]),
    ("fgvpl", "ViT-B/16", 2, "imagenet", [71.1]),
    ("fgvpl parts=fvp", "ViT-B/16", 16, "imagenet", [74.5]),
    ("fgvpl alpha=0.1", "ViT-B/16", 16, "imagenet", [75.3]),
    ("fgvpl parts=tip-f", "ViT-B/16", 16, "imagenet", [73.7, 73.7]),  # of the best test epoch, see the README
], ids=str)
def test_a_run_finds_what_the_papers_report_for_exactly_its_setting(command, backbone, shots, name, expected):
    trained_on = "imagenet" if "imagenet" in name else name.replace("average_11", "dtd")
    run = settings(command, trained_on, shots, backbone)
    assert [value for value, _ in benchmarks.published(run, name)] == expected


def test_a_folder_or_a_weights_file_of_ones_own_is_not_compared_with_the_papers(tmp_path):
    assert benchmarks.published(settings("coop", "dtd"), "dtd")
    (tmp_path / "dtd").mkdir()
    (tmp_path / "ViT-B-16.pt").touch()
    assert not benchmarks.published(settings("coop", str(tmp_path / "dtd")), "dtd")
    assert not benchmarks.published(settings("coop", "dtd", backbone=str(tmp_path / "ViT-B-16.pt")), "dtd")


def test_a_run_prints_and_saves_the_papers_number(on_benchmarks, capsys):
    run = on_benchmarks("dtd", "zeroshot", "--backbone", "ViT-B/32")
    assert (run["published"], run["published_source"]) == (44.03, "DPT, Table I")
    assert "(DPT, Table I: 44.03; CAVPT-v1, Table 1: 43.97)" in capsys.readouterr().out


def test_each_shift_is_compared_with_its_own_numbers(on_benchmarks, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: [0.0])  # the numbers do not matter here
    flags = ["--backbone", "ViT-B/32", "--shots", 1, "--epochs", 50, "--eval-on", *SHIFTS]
    run, out = on_benchmarks("imagenet", "coop", *flags), capsys.readouterr().out
    numbers = dict(accuracy=59.92, imagenetv2=52.88, imagenet_sketch=37.32, imagenet_a=28.52, imagenet_r=62.12)
    for line, number in numbers.items():
        assert re.search(rf"^{line} +[\d.]+ % .*\(DPT, Table III: {number:.2f}\b.*\)$", out, re.MULTILINE), line
    assert run["published"] == numbers["accuracy"]


# ---- Errors: one sentence and status 2 ----


@pytest.mark.parametrize("flags", [("--method", "nothing"), ("--epochs", "0"), ("--epochs", "-1"), ("--lr", "0"),
                                   ("--batch-size", "0"), ("--shots", "-1"), ("--workers", "-1"), ("--epochs", "two"),
                                   ("--warmup-epochs", "-1"), ("--precision", "fp8"), ("--seeds", "first")], ids=str)
def test_what_the_command_line_refuses_is_said_with_its_usage(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        main(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[0].startswith("usage: ") and "error: " in lines[-1]
    assert flags[0] in lines[-1] and flags[1] in lines[-1]


def test_the_help_names_every_flag_and_method(capsys):
    with pytest.raises(SystemExit) as ended:
        main("--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and all(method in out for method in train.METHODS)
    assert all(f"--{name.replace('_', '-')}" in out for name in vars(train.parse_arguments([])))


def test_an_unknown_method_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main("--method", "nothing")
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(method in last for method in train.METHODS)


def test_unknown_option(error):
    message = error("--set", "length=4")
    assert "length" in message and "n_ctx=16" in message and "class_token_position=end" in message
    assert "zeroshot" in error("--method", "zeroshot", "--set", "n_ctx=4")


@pytest.mark.parametrize("pair", ["n_ctx=four", "n_ctx=", "n_ctx", "n_ctx=-1", "csc=maybe", "class_token_position=top"])
def test_bad_value_of_an_option(error, pair):
    assert pair.split("=")[0] in error("--set", pair)


def test_context_that_leaves_no_room_for_the_class(error):
    assert "77" in error("--set", "n_ctx=80")


def test_unknown_data_set(error):
    assert "no_such_set" in (message := error("--data", "no_such_set")) and "dtd" in message


def test_no_cuda(error, monkeypatch):
    def no_driver(*size, device):
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", no_driver)
    message = error("--device", "cuda")
    assert "--device cuda" in message and "no NVIDIA driver" in message and "cpu" in message


@pytest.mark.parametrize("device", ["toaster", "cpu:first", "xpu:9"])
def test_a_device_that_is_not_there(error, device):
    assert device in error("--device", device)


def test_missing_weights_file(error, tmp_path):
    assert str(tmp_path / "none.pt") in error("--backbone", tmp_path / "none.pt")


def test_resnet_weights(error, tmp_path):
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "RN50.pt")
    assert "ResNet" in error("--backbone", tmp_path / "RN50.pt")


def test_truncated_weights(error, world, tmp_path):
    whole = (world / "weights.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(whole[: len(whole) // 2])
    assert "part.pt" in error("--backbone", tmp_path / "part.pt")


def test_folder_without_pictures(error, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in error("--data", tmp_path / "empty")


def test_class_without_pictures(error, tmp_path):
    (draw(tmp_path / "set", 4) / "yellow").mkdir()
    assert str(tmp_path / "set" / "yellow") in error("--data", tmp_path / "set")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_picture(error, tmp_path, part, workers):
    for each in ("train", "test"):
        draw(tmp_path / "set" / each, 4)
    broken = tmp_path / "set" / part / "red" / "02.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert str(broken) in error("--data", tmp_path / "set", "--workers", workers)


def test_class_name_that_is_too_long(error, tmp_path):
    name = " ".join("q" * 90)
    assert "q q q" in (message := error("--data", draw(tmp_path / "set", 4, ["red", name]))) and "77" in message


def test_output_that_cannot_be_written_is_found_before_training(error, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained, though nothing can be saved"))
    assert str(tmp_path / "file") in error("--out", tmp_path / "file")


def test_from_the_shell_an_error_is_one_line_and_status_2_and_a_reader_that_has_seen_enough_no_word(usual, tmp_path):
    zeroshot = *usual, "--method", "zeroshot", "--out", tmp_path
    with program(tmp_path, "--data", "nothing") as mistaken, program(tmp_path, *zeroshot) as cut:
        cut.stdout.close()
        out, error = mistaken.communicate()
        assert out == b"" and error.startswith(b"error: ") and error.count(b"\n") == 1
        assert cut.stderr.read() == b""
    assert (mistaken.returncode, cut.returncode) == (2, 1)


def program(folder, *words):
    """The real program, started in a folder, at the same time as others."""
    command = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- The house, and the commands that are written down ----


def test_train_py_and_what_it_imports_know_nothing_of_report_py():
    known = {name: SCRIPT.with_name(f"{name}.py") for name in ("train", "data", "clip_min", "coop", "vpt", "dpt", "upt",
                                                             "fgvpl")}
    for file in known.values():
        tree = ast.walk(ast.parse(file.read_text()))
        found = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert found and "report" not in {name.split(".")[0] for name in found}


def test_pictures_that_move_from_the_test_to_the_training_are_told(tmp_path, world, capsys):
    flags = ["--data", tmp_path / "own", "--backbone", world / "weights.pt", "--out", tmp_path / "runs", "--shots", 0,
             "--device", "cpu", "--epochs", 1]
    draw(tmp_path / "own", 6)
    assert main(*flags) == 0
    tested = {path for path, _ in data.load(tmp_path / "own", shots=0).test}
    assert main(*flags, "--again") == 0 and "were tested" not in capsys.readouterr().out  # nothing has changed
    moved = set()
    for i in range(60):  # the folder grows by pictures behind the tested ones, until one of those moves
        picture = tmp_path / "own" / "red" / f"more{i}.png"
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(picture)
        train_paths = {path for path, _ in data.load(tmp_path / "own", shots=0).train}
        moved = tested & train_paths
        if moved:
            break
        if str(picture) in train_paths:
            picture.unlink()
    assert moved
    assert main(*flags, "--again") == 0
    assert f"warning: {len(moved)} training pictures were tested by earlier runs" in capsys.readouterr().out


def test_what_a_killed_save_left_is_removed_by_the_next_one_after_an_hour(tmp_path, world):
    flags = ["--data", world / "photos", "--backbone", world / "weights.pt", "--out", tmp_path, "--device", "cpu",
             "--method", "zeroshot"]
    assert main(*flags) == 0
    folder = only_run(tmp_path)
    old, new = folder.with_name(f".{folder.name}.old"), folder.with_name(f".{folder.name}.new")
    for left in old, new:
        (left / "new").mkdir(parents=True)
    os.utime(old, (0, 0))
    assert main(*flags, "--again") == 0
    assert not old.exists() and new.exists()  # the new one may be another process's


def test_the_default_run_beats_zero_shot(tmp_path, capsys):
    assert main("--root", tmp_path / "data", "--out", tmp_path / "runs") == 0
    run, (out, err) = result(tmp_path / "runs" / "shapes" / "coop" / "tiny_16shot_seed1"), capsys.readouterr()
    assert run["accuracy"] > run["zero_shot"] and "warning" not in out and "tiny" in out and err == ""
