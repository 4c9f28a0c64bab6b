"""What train.py promises. Pictures and weights are made here: flat colours with noise, and a small random CLIP."""

import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_clip, random_state_dict
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import data
import train
from clip_min import UserError, load_clip
from coop import CoOp

KEYS = {
    "method", "data", "backbone", "shots", "seed", "classes", "train_images", "test_images", "zero_shot", "accuracy",
    "published", "published_source", "shifts", "trainable_parameters", "seconds_training", "seconds_total", "epochs",
    "recipe", "options", "picks", "torch", "device",
}
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
SCRIPT = Path(train.__file__)
CPU = torch.device("cpu")


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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """photos/ and weights.pt, shared by all tests, which only read them."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "photos", 12)
    torch.save(random_state_dict(**TINY), folder / "weights.pt")
    return folder


@pytest.fixture
def start(world, tmp_path):
    """train.main on the photographs with the small CLIP, two epochs, saved under tmp_path; flags given come last."""
    usual = ["--data", world / "photos", "--backbone", world / "weights.pt", "--shots", 4, "--epochs", 2,
             "--device", "cpu", "--out", tmp_path / "runs"]
    return lambda *flags: train.main([str(flag) for flag in (*usual, *flags)])


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """The folder of a finished CoOp run, which tests only read."""
    out = tmp_path_factory.mktemp("finished")
    assert train.main(["--data", f"{world / 'photos'}", "--backbone", f"{world / 'weights.pt'}", "--shots", "4",
                       "--epochs", "2", "--device", "cpu", "--out", f"{out}"]) == 0
    return out / "photos" / "coop" / "weights_4shot_seed1"


@pytest.fixture
def error(start, capsys):
    """Runs with these flags and -> the one sentence of the error; it ends with status 2 and saves nothing."""
    def run(*flags):
        assert start(*flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return run


def run_folder(tmp_path, method="coop", name="photos", seed=1, shots=4):
    return tmp_path / "runs" / name / method / f"weights_{shots}shot_seed{seed}"


def result(folder):
    return json.loads((folder / "result.json").read_text())


def prompts(folder):
    return torch.load(folder / "prompts.pt", weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def accuracy_line(capsys):
    return re.search(r"^accuracy +([\d.]+) %", capsys.readouterr().out, re.MULTILINE)[1]


class Toy(nn.Module):
    """A method whose numbers are known: its loss is (a - 1)^2 + (b + 2)^2, with a > 0 it tells the three colours."""

    recipe = dict(optimizer="sgd", lr=0.1, warmup_epochs=1, batch_size=32, crop_scale=(0.5, 1.0), epochs={1: 3})

    def __init__(self, clip, classnames, templates=()):
        super().__init__()
        self.clip, self.prompts, self.batches = clip, list(classnames), []
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        Toy.last = self  # the newest one, for the tests

    def encode_text(self):
        return self.a

    def forward(self, images, text=None):
        blue_green_red = images.mean(dim=(2, 3)).flip(1)  # the classes' order, which is the alphabet's
        return blue_green_red * (self.a if text is None else text)

    def loss(self, images, labels, epoch=0):
        self.batches.append((epoch, len(images)))
        return (self.a - 1) ** 2 + (self.b + 2) ** 2


@pytest.fixture
def toy(monkeypatch):
    """-> a function that makes Toy, with these changes, the method "toy"."""
    def make(**changes):
        monkeypatch.setitem(train.METHODS, "toy", type("Toy", (Toy,), changes))

    return make


def sgd(p, gradient, rates):
    """SGD with momentum .9 and weight decay 5e-4, written out."""
    velocity = 0.0
    for rate in rates:
        velocity = 0.9 * velocity + gradient(p) + 5e-4 * p
        p -= rate * velocity
    return p


def adamw(p, gradient, rates):
    """AdamW with eps 1e-4 and weight decay .01, written out."""
    m = v = 0.0
    for t, rate in enumerate(rates, start=1):
        m, v = 0.9 * m + 0.1 * gradient(p), 0.999 * v + 0.001 * gradient(p) ** 2
        p -= rate * 0.01 * p
        p -= rate * m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-4)
    return p


# ---- Schedule and recipe ----


@pytest.mark.parametrize(("base", "epochs", "warmup", "epoch", "rate"), [
    (0.002, 200, 1, 0, 1e-5), (0.002, 200, 1, 1, 2e-3), (0.002, 200, 1, 199, 4.93e-7),
    (0.01, 100, 10, 0, 1e-5), (0.01, 100, 10, 9, 1e-5), (0.01, 100, 10, 10, 1e-2), (0.01, 100, 10, 99, 2.956e-4),
    (0.01, 60, 10, 59, 8.07e-4), (0.001, 100, 0, 0, 1e-3), (0.001, 100, 0, 50, 5e-4),
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
    flags = Namespace(epochs=None, lr=None, warmup_epochs=None, batch_size=None)
    recipe = train.resolve_recipe(CoOp.recipe, {}, "dtd", shots, flags)
    assert recipe["epochs"] == epochs
    assert (recipe["optimizer"], recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"]) == ("sgd", 0.002, 1, 32)
    assert recipe["crop_scale"] == (0.08, 1.0)
    assert train.resolve_recipe(CoOp.recipe, {}, "imagenet", shots, flags)["epochs"] == 50


def test_variance_is_printed_and_recorded_before_and_after_training(start, tmp_path, capsys):
    assert start("--variance", "--epochs", 1) == 0
    assert "variance  before training" in (out := capsys.readouterr().out) and "variance  after training" in out
    spread = result(run_folder(tmp_path))["variance"]
    before, after = spread["before"], spread["after"]
    assert before["image_within_classes"] == after["image_within_classes"]  # CoOp leaves the image features as they were
    assert before["text_between_classes"] != after["text_between_classes"]
    assert all(0 < value < 2 for value in [*before.values(), *after.values()])


def test_flags_override_the_recipe_and_are_recorded(start, tmp_path):
    assert start("--epochs", 3, "--lr", 0.01, "--batch-size", 5) == 0
    run = result(run_folder(tmp_path))
    assert run["epochs"] == run["recipe"]["epochs"] == 3
    assert run["recipe"]["lr"] == 0.01 and run["recipe"]["batch_size"] == 5
    assert isinstance(CoOp.recipe["epochs"], dict)  # the class's own recipe is as it was


@pytest.mark.parametrize("name", ["shapes", "imagenet"])
def test_a_users_folder_that_is_called_like_a_known_set_is_not_taken_for_it(world, tmp_path, toy, name):
    toy(recipe=Toy.recipe | {"epochs": {1: 1, 4: 2}, "datasets": {"imagenet": {"epochs": 3}}})
    draw(tmp_path / name, 12)
    flags = ["--method", "toy", "--data", tmp_path / name, "--backbone", world / "weights.pt", "--shots", 4,
             "--device", "cpu", "--out", tmp_path / "runs"]
    assert train.main([str(flag) for flag in flags]) == 0
    assert result(run_folder(tmp_path, "toy", name))["epochs"] == 2


@pytest.mark.parametrize(("pictures", "batches"), [(32, [32]), (33, [32]), (10, [10]), (64, [32, 32])])
def test_a_last_short_batch_is_dropped_unless_it_is_the_only_one(start, tmp_path, toy, pictures, batches):
    toy()
    for part in ("train", "test"):
        draw(tmp_path / "set" / part, {"red": pictures - 1, "blue": 1}, ("red", "blue"))
    assert start("--data", tmp_path / "set", "--method", "toy", "--shots", 0, "--epochs", 1) == 0
    assert [size for _, size in Toy.last.batches] == batches


# ---- The loop ----


@pytest.mark.parametrize(("optimizer", "update"), [("sgd", sgd), ("adamw", adamw)])
def test_an_update_is_the_optimisers_formula_at_the_schedules_rate(start, tmp_path, toy, optimizer, update):
    toy(recipe=Toy.recipe | {"optimizer": optimizer})
    assert start("--method", "toy", "--epochs", 5) == 0
    rates = [train.learning_rate(0.1, epoch, 5, 1) for epoch in range(5)]
    learned = prompts(run_folder(tmp_path, "toy"))["tensors"]
    assert learned["a"].item() == pytest.approx(update(0.5, lambda a: 2 * (a - 1), rates), rel=1e-5)
    assert learned["b"].item() == pytest.approx(update(0.0, lambda b: 2 * (b + 2), rates), rel=1e-5)


def test_parameter_groups_have_their_own_rate_and_warm_up(start, tmp_path, toy):
    toy(parameter_groups=lambda self: [{"params": [self.a], "lr": 0.01, "warmup_epochs": 3}, {"params": [self.b]}])
    assert start("--method", "toy", "--epochs", 5) == 0
    learned = prompts(run_folder(tmp_path, "toy"))["tensors"]
    rates_a = [train.learning_rate(0.01, epoch, 5, 3) for epoch in range(5)]
    rates_b = [train.learning_rate(0.1, epoch, 5, 1) for epoch in range(5)]
    assert learned["a"].item() == pytest.approx(sgd(0.5, lambda a: 2 * (a - 1), rates_a), rel=1e-5)
    assert learned["b"].item() == pytest.approx(sgd(0.0, lambda b: 2 * (b + 2), rates_b), rel=1e-5)


def test_the_loss_is_told_the_epoch(start, toy):
    toy()
    assert start("--method", "toy", "--epochs", 3) == 0
    assert [epoch for epoch, _ in Toy.last.batches] == [0, 1, 2]


def test_the_model_of_the_last_epoch_is_judged_and_not_the_best(start, tmp_path, toy, capsys):
    toy(loss=lambda self, images, labels, epoch: self.a + self.b)  # a falls below 0, where every answer is wrong
    assert start("--method", "toy", "--epochs", 1) == 0  # the warm-up alone: a has hardly moved
    assert accuracy_line(capsys) == "100.00"
    assert start("--method", "toy", "--epochs", 12) == 0
    assert accuracy_line(capsys) == "0.00"
    assert result(run_folder(tmp_path, "toy"))["accuracy"] == 0


def test_accuracy_counts_pictures_and_encodes_the_text_once(monkeypatch):
    method = CoOp(random_clip(), ["red", "green", "blue"], n_ctx=2)
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = method(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3  # one of seven is wrong
    calls, encode_text = [], CoOp.encode_text
    monkeypatch.setattr(CoOp, "encode_text", lambda self: calls.append(1) or encode_text(self))
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    assert train.evaluate(method, loader, CPU, None) == pytest.approx(100 * 6 / 7)
    assert len(calls) == 1


def test_only_the_methods_parameters_change(start, world, monkeypatch):
    loaded = []
    monkeypatch.setattr(train, "load_clip", lambda *args: loaded.append(load_clip(*args)) or loaded[-1])
    assert start("--lr", 0.1) == 0
    assert len(loaded) == 1
    before = load_clip(str(world / "weights.pt")).state_dict()
    after = loaded[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in loaded[0].parameters())


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert train.choose_device("cpu", "auto") == (CPU, None)
    assert train.choose_device("cpu", "fp32") == (CPU, None)
    assert train.choose_device("cpu", "bf16") == (CPU, torch.bfloat16)


@pytest.mark.parametrize(("native", "emulated", "dtype"), [
    (True, True, torch.bfloat16), (False, False, torch.float16), (False, True, torch.float16),
])
def test_a_gpu_computes_in_bf16_where_its_hardware_does_and_else_in_fp16(monkeypatch, native, emulated, dtype):
    def is_bf16_supported(including_emulation=True):
        return native or (emulated and including_emulation)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # there is no GPU to make a tensor on
    assert train.choose_device(None, "auto") == (torch.device("cuda"), dtype)
    assert train.choose_device("cuda", "fp32") == (torch.device("cuda"), None)


# ---- What a run leaves ----


def test_a_run_leaves_its_result(finished):
    run = result(finished)
    assert run.keys() == KEYS
    assert (run["method"], run["data"], run["shots"], run["seed"], run["classes"]) == ("coop", "photos", 4, 1, 3)
    assert (run["train_images"], run["test_images"], run["epochs"], run["options"]) == (12, 12, 2, {})
    assert run["trainable_parameters"] == 16 * TINY["text_width"]
    assert 0 <= run["zero_shot"] <= 100 and 0 <= run["accuracy"] <= 100
    assert 0 < run["seconds_training"] < run["seconds_total"] < 60
    assert re.fullmatch("[0-9a-f]{64}", run["picks"])
    assert (run["torch"], run["device"]) == (torch.__version__, "cpu")
    assert run["published"] is run["published_source"] is None and run["shifts"] == {}


def test_a_run_leaves_the_learned_tensors_alone_in_fp32(finished):
    saved = prompts(finished)
    assert saved["tensors"].keys() == {"ctx"}
    assert saved["tensors"]["ctx"].shape == (16, TINY["text_width"]) and saved["tensors"]["ctx"].dtype == torch.float32
    assert (saved["method"], saved["options"], saved["classnames"]) == ("coop", {}, ["blue", "green", "red"])
    assert (finished / "prompts.pt").stat().st_size < 10_000
    assert {path.name for path in finished.iterdir()} == {"result.json", "prompts.pt"}


def test_every_seed_has_its_folder_and_other_prompts(start, tmp_path):
    assert start("--seeds", 0, 1, 2) == 0
    runs = [run_folder(tmp_path, seed=seed) for seed in (0, 1, 2)]
    assert [result(run)["seed"] for run in runs] == [0, 1, 2]
    assert len({result(run)["picks"] for run in runs}) == 3
    assert len({prompts(run)["tensors"]["ctx"].sum().item() for run in runs}) == 3


def test_the_same_seed_gives_the_same_run_to_the_bit(start, finished, tmp_path):
    assert start("--seeds", 2, 1) == 0  # whatever ran before it
    again = run_folder(tmp_path)
    assert torch.equal(prompts(again)["tensors"]["ctx"], prompts(finished)["tensors"]["ctx"])
    assert all(result(again)[key] == result(finished)[key] for key in KEYS - {"seconds_training", "seconds_total"})


def test_a_finished_run_evaluates_to_the_same_accuracy(finished, capsys):
    before = contents(finished)
    assert train.main(["--load", f"{finished}", "--device", "cpu"]) == 0  # all else is known from the run
    assert float(accuracy_line(capsys)) == round(result(finished)["accuracy"], 2)
    assert contents(finished) == before


def test_a_finished_run_is_evaluated_with_its_own_tensors(start, finished, tmp_path, monkeypatch):
    saved, seen = prompts(finished), []
    saved["tensors"]["ctx"] = torch.rand_like(saved["tensors"]["ctx"])
    torch.save(saved, tmp_path / "prompts.pt")
    monkeypatch.setattr(train, "evaluate", lambda method, *_: seen.append(method.ctx) or 0.0)
    assert start("--load", tmp_path) == 0
    assert torch.equal(seen[0], saved["tensors"]["ctx"])


def test_options_reach_the_method(start, tmp_path):
    assert start("--set", "n_ctx=4", "class_token_position=middle", "csc=true") == 0
    assert prompts(run_folder(tmp_path))["tensors"]["ctx"].shape == (3, 4, TINY["text_width"])
    assert result(run_folder(tmp_path))["options"] == {"n_ctx": 4, "class_token_position": "middle", "csc": True}


def test_options_given_in_two_flags_both_count(start, tmp_path):
    assert start("--set", "n_ctx=4", "--set", "csc=true") == 0
    assert result(run_folder(tmp_path))["options"] == {"n_ctx": 4, "csc": True}


def test_zero_shot_learns_nothing_and_is_a_run_too(start, tmp_path, capsys):
    assert start("--method", "zeroshot") == 0
    run = result(run_folder(tmp_path, "zeroshot"))
    assert run["trainable_parameters"] == run["epochs"] == run["seconds_training"] == 0
    assert run["accuracy"] == run["zero_shot"] and prompts(run_folder(tmp_path, "zeroshot"))["tensors"] == {}
    assert start("--load", run_folder(tmp_path, "zeroshot")) == 0
    assert float(capsys.readouterr().out.split("accuracy")[-1].split()[0]) == round(run["accuracy"], 2)


def test_worker_processes_change_nothing_in_evaluation(start, finished, capsys):
    assert start("--load", finished, "--workers", 1) == 0
    assert float(accuracy_line(capsys)) == round(result(finished)["accuracy"], 2)


# ---- Nothing finished is lost ----


def half_written(value, path):
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_earlier_file_whole(tmp_path):
    train.save(tmp_path / "run" / "result.json", train.write_json, {"accuracy": 50})
    with pytest.raises((OSError, UserError)):
        train.save(tmp_path / "run" / "result.json", half_written, {"accuracy": 60})
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"accuracy": 50}


def test_a_run_that_cannot_be_saved_leaves_the_earlier_run_whole(start, tmp_path, monkeypatch):
    assert start() == 0
    before = contents(run_folder(tmp_path))
    monkeypatch.setattr(torch, "save", half_written)
    with suppress(OSError):
        start("--lr", 0.1)
    assert contents(run_folder(tmp_path)) | before == contents(run_folder(tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_earlier_one_whole(start, error, tmp_path):
    assert start() == 0
    before = contents(run_folder(tmp_path))
    message = error("--epochs", 6, "--lr", 1e30)
    assert re.search(r"epoch \d, step \d, at learning rate \S*e\+(29|30)", message)
    assert contents(run_folder(tmp_path)) == before


def test_prompts_that_are_not_finite_after_the_last_step_are_not_saved(error, tmp_path, toy):
    toy(loss=lambda self, images, labels, epoch: (self.a + self.b) * 1e20)  # finite before the last step, inf after
    error("--method", "toy", "--epochs", 2, "--lr", 1e30)
    assert not run_folder(tmp_path, "toy").exists()


def test_training_that_collapses_says_so(start, capsys, toy):
    toy(loss=lambda self, images, labels, epoch: self.a * 0 + self.b * 0 + math.log(3))
    assert start("--method", "toy") == 0
    assert "warning: " in capsys.readouterr().out


# ---- Errors: one sentence and status 2 ----


def test_unknown_method(error):
    assert "nothing" in (message := error("--method", "nothing")) and "coop" in message and "zeroshot" in message


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


@pytest.mark.parametrize("flags", [("--epochs", 0), ("--epochs", -1), ("--lr", 0), ("--batch-size", 0), ("--shots", -1),
                                   ("--workers", -1)])
def test_numbers_that_make_no_sense(error, flags):
    assert flags[0].strip("-") in error(*flags)


def test_no_cuda(error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in error("--device", "cuda")


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


def test_loading_a_run_that_does_not_exist(error, tmp_path):
    assert str(tmp_path / "no_run") in error("--load", tmp_path / "no_run")


@pytest.mark.parametrize("content", [b"", b"noise", [1, 2], {"method": "coop"}, {"ctx": torch.zeros(16, 64)}])
def test_loading_a_file_that_holds_no_prompts(error, tmp_path, content):
    path = tmp_path / "prompts.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "prompts.pt" in error("--load", tmp_path)


@pytest.mark.parametrize("change", [{"method": "later"}, {"options": {"later": 1}}, {"tensors": {"ctx": 1}}])
def test_loading_prompts_of_another_version(error, finished, tmp_path, change):
    torch.save(prompts(finished) | change, tmp_path / "prompts.pt")
    assert "prompts.pt" in error("--load", tmp_path)


def test_loading_with_another_method(error, finished):
    assert "coop" in (message := error("--load", finished, "--method", "zeroshot")) and "zeroshot" in message


def test_loading_with_other_classes(error, finished, tmp_path):
    message = error("--load", finished, "--data", draw(tmp_path / "other", 4, ["red", "green", "black"]))
    assert "blue" in message and "black" in message


def test_loading_with_a_backbone_of_another_width(error, finished, tmp_path):
    torch.save(random_state_dict(**TINY | {"text_width": 128}), tmp_path / "wide.pt")
    assert "prompts.pt" in error("--load", finished, "--backbone", tmp_path / "wide.pt")


def test_from_the_shell_an_error_is_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--method", "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- The first command of the README ----


def test_the_default_run_beats_zero_shot_in_a_minute_on_two_cores(tmp_path):
    assert "shapes" in data.WORLD
    command = [sys.executable, SCRIPT, "--root", tmp_path / "data", "--out", tmp_path / "runs"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    used = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    patterns = ["method +coop", "data +shapes: ", "backbone +tiny", r"recipe +.*lr 0.002", r"prompts +.*\|.*\|",
                r"zero-shot +[\d.]+ %", r"epoch (\d+)/\1 +loss", r"accuracy +[\d.]+ %", "saved +"]
    found = [re.search(f"^{pattern}", done.stdout.replace("\r", "\n"), re.MULTILINE) for pattern in patterns]
    assert all(found)
    assert [match.start() for match in found] == sorted(match.start() for match in found)
    run = result(tmp_path / "runs" / "shapes" / "coop" / "tiny_16shot_seed1")
    assert run["accuracy"] > run["zero_shot"] and "warning" not in done.stdout
    # Processor time, since tests may share the machine: two cores give 120 s of it in a minute.
    assert used.children_user + used.children_system - before.children_user - before.children_system < 120
