"""What has to hold on a GPU, in one command: python -m pytest -m cuda. Every test is skipped where there is none.

The figures that it prints are peak memory; `python tests/bench.py --device cuda` measures the speed.
"""

import copy
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import B16, random_clip
from PIL import Image

import data
import train
from clip_min import load_clip, preprocess
from support.machine import Machine, cast_products

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]

NAMES = ["cat", "polka dotted dog", "red bird", "small fish"]
OPTIONS = {"upt": dict(dropout=0.0)}  # dropout draws other numbers on a GPU
TRAINED = [name for name, method in train.METHODS.items() if method.recipe.get("epochs")]  # by steps
STEPS = [*((name, 100) for name in TRAINED), ("vlp", 0), ("dpt", 0)]  # method, epoch: VLP and DPT have two phases


@pytest.fixture(autouse=True)
def full_fp32():
    """By default cuDNN rounds the factors of a convolution to TF32: train.py forbids it."""
    train.choose_machine("cuda", "fp32", 0)


def make(name, clip, names=NAMES):
    """-> a method in training mode, and a batch of images and labels, on the CLIP's device."""
    torch.manual_seed(1)
    device, resolution = clip.logit_scale.device, clip.visual.resolution
    method = train.METHODS[name](clip, names, **OPTIONS.get(name, {})).to(device)
    images = torch.randn(8, 3, resolution, resolution).to(device)
    labels = torch.arange(8, device=device) % len(names)
    method.prepare([(images, labels)])
    return method.train(), images, labels


def learned_gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def assert_close(ours, expected, what, least=0.0):
    """Within 1e-4 of the largest entry; `least` is for a gradient that is zero but for rounding."""
    error, scale = (ours.cpu() - expected).abs().max(), expected.abs().max().clamp(min=least)
    assert error <= 1e-4 * scale, f"{what}: {error:.2g} apart, of {scale:.2g}"


@pytest.mark.parametrize("name,epoch", [("zeroshot", 0), ("linear_probe", 0), *STEPS])
def test_loss_gradients_and_evaluation_equal_the_cpus(name, epoch):
    on_cpu, images, labels = make(name, random_clip())
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    losses = {}
    for method, device in (on_cpu, "cpu"), (on_gpu, DEVICE):
        torch.manual_seed(2)  # ProDA draws some of its prompts
        losses[method] = method.loss(images.to(device), labels.to(device), epoch)
        if name in TRAINED:
            losses[method].backward()
    assert_close(losses[on_gpu].detach(), losses[on_cpu].detach(), "loss")
    gradients, expected = learned_gradients(on_gpu), learned_gradients(on_cpu)
    assert gradients.keys() == expected.keys() and bool(expected) == (name in TRAINED)
    largest = max((gradient.abs().max() for gradient in expected.values()), default=0)
    for parameter, gradient in expected.items():  # a bias of CAVPT's adds the same to all scores of a softmax
        assert_close(gradients[parameter], gradient, parameter, least=1e-3 * largest)
    with torch.no_grad():
        logits = on_gpu.eval()(images.to(DEVICE), on_gpu.encode_text())
        assert_close(logits, on_cpu.eval()(images, on_cpu.encode_text()), "logits")


@pytest.mark.parametrize("name", train.METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_under_autocast_are_close_to_fp32(name, dtype):
    clip = load_clip("tiny", DEVICE)
    clip.logit_scale.fill_(math.log(100))  # as OpenAI's
    method, images, _ = make(name, clip)
    method.eval()
    expected = method(images)
    with torch.autocast("cuda", dtype):
        logits = method(images)
    assert logits.dtype == torch.float32 and (logits - expected).abs().max() < 0.5


@pytest.mark.parametrize("name,epoch", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_towers_held_in_half_precision_compute_the_same_numbers(name, epoch, dtype):
    method, images, labels = make(name, random_clip().to(DEVICE))
    results = []
    for _ in range(2):
        torch.manual_seed(2)  # ProDA draws some of its prompts
        with torch.autocast("cuda", dtype):
            loss = method.loss(images, labels, epoch)
        method.zero_grad()
        loss.backward()
        results.append([loss, *learned_gradients(method).values()])
        cast_products(method.clip, dtype)
    for cast_at_every_use, held in zip(*results, strict=True):
        assert_close(held.detach(), cast_at_every_use.detach().cpu(), name)


@pytest.fixture(scope="module")
def shapes_accuracy(tmp_path_factory):
    """A function: method, precision -> the mean test accuracy of three seeds on shapes, trained on the GPU."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def accuracy(method, precision):
        if (method, precision) not in known:
            out = folder / f"{method} {precision}"
            assert train.main(["--method", method, "--seeds", "1", "2", "3", "--precision", precision, "--workers", "2",
                               "--device", DEVICE.type, "--root", str(folder), "--out", str(out)]) == 0
            results = [json.loads(file.read_text()) for file in out.rglob("result.json")]
            known[method, precision] = sum(result["accuracy"] for result in results) / len(results)
        return known[method, precision]

    return accuracy


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["coop", "fgvpl"])
def test_accuracy_in_half_precision_is_that_of_fp32(shapes_accuracy, method, precision):
    assert abs(shapes_accuracy(method, precision) - shapes_accuracy(method, "fp32")) <= 2


# DPT reads once per step whether a label is among the likely classes, fp16 whether gradients have overflowed.
@pytest.mark.parametrize("name,epoch", [step for step in STEPS if step[0] != "dpt"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_never_waits_for_the_gpu(name, epoch, dtype):
    method, images, labels = make(name, random_clip().to(DEVICE))
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    machine, images, labels = Machine(DEVICE, dtype, 0), images.cpu().pin_memory(), labels.cpu().pin_memory()

    def step():
        on_gpu = [x.to(DEVICE, non_blocking=True) for x in (images, labels)]
        with machine.autocast():
            loss = method.loss(*on_gpu, epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # libraries start, and may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_classes", [47, 1000])
@pytest.mark.parametrize("name", ["coop", "upt", "dpt"])
def test_a_step_on_vit_b_16_fits_into_8_gb(name, n_classes, capsys):
    words = ["red", "dotted", "small", "polka", "striped", "round", "green", "old", "wet", "soft"]
    names = [" ".join(three) for three in itertools.product(words, repeat=3)][:n_classes]
    method, images, labels = make(name, random_clip(**B16).to(DEVICE), names)
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)  # 32 pictures
    for precision, dtype in ("fp32", None), ("bf16", torch.bfloat16):
        if dtype:
            cast_products(method.clip, dtype)
        torch.cuda.reset_peak_memory_stats()
        with Machine(DEVICE, dtype, 0).autocast():
            loss = method.loss(images, labels)
        loss.backward()
        peak = torch.cuda.max_memory_allocated() / 1e9
        del loss
        with capsys.disabled():
            print(f"\n{name}, ViT-B/16, {n_classes} classes, batch 32, {precision}: {peak:.2f} GB with weights")
    assert peak < 8  # in bf16, which is the default


def test_workers_read_the_same_pictures_with_cuda_initialised(tmp_path):
    torch.zeros(1, device=DEVICE)  # the workers are forked from a process that has CUDA
    items = []
    for i in range(20):
        items.append((str(tmp_path / f"{i}.png"), i))
        Image.new("RGB", (40, 30), (12 * i, 99, 250 - 12 * i)).save(items[-1][0])
    for transform, seed in (preprocess(32), None), (data.augment(32), 3):
        plain = data.Batches(data.Pictures(items, transform), 8, torch.device("cpu"), workers=0, seed=seed)
        on_gpu = data.Batches(data.Pictures(items, transform), 8, DEVICE, workers=2, seed=seed)
        assert on_gpu.loader.pin_memory
        for (images, labels), (expected, of_expected) in zip(on_gpu.epoch(0), plain.epoch(0), strict=True):
            assert images.device.type == labels.device.type == DEVICE.type
            assert images.cpu().equal(expected) and labels.cpu().equal(of_expected)


def test_torchrun_on_one_gpu_learns_what_a_plain_run_learns(tmp_path):
    """With NCCL instead of gloo, and its one process's GPU by number."""
    common = ["train.py", "--epochs", "2", "--precision", "fp32", "--device", DEVICE.type, "--root", str(tmp_path)]
    tensors = []
    for program in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]):
        out = tmp_path / str(len(program))
        subprocess.run([*program, *common, "--out", str(out)], check=True, cwd=Path(train.__file__).parent)
        tensors.append(train.read_prompts(next(out.rglob("result.json")).parent)["tensors"]["ctx"])
    torch.testing.assert_close(*tensors, rtol=0, atol=1e-5)


def test_a_run_of_the_gpu_predicts_the_same_on_the_cpu(tmp_path):
    assert train.main(["--epochs", "2", "--precision", "fp32", "--device", DEVICE.type, "--root", str(tmp_path),
                       "--out", str(tmp_path / "runs")]) == 0
    folder = next((tmp_path / "runs").rglob("result.json")).parent
    on_gpu, on_cpu = train.load_run(folder, DEVICE.type), train.load_run(folder, "cpu")
    images = torch.randn(8, 3, on_cpu.clip.visual.resolution, on_cpu.clip.visual.resolution)
    with torch.no_grad():
        probabilities = F.softmax(on_gpu(images.to(DEVICE)), dim=1).cpu()
        torch.testing.assert_close(probabilities, F.softmax(on_cpu(images), dim=1), rtol=0, atol=1e-4)
