"""How fast, how much memory, how close to the machine's limit? Beside the official code: same weights, same results.

    pip install clip-anytorch             # OpenAI's code: what the official repositories of the papers are built on
    python tests/bench.py                 # the main cases on ViT-B/32, under five minutes on two slow CPU cores
    python tests/bench.py --all           # every method on ViT-B/32 and ViT-B/16, then --growth and --pipeline
    python tests/bench.py --device cuda   # the same on a GPU, also with --all
    python tests/bench.py --growth        # steps a second and memory against classes, batch and number of prompts
    python tests/bench.py --pipeline      # pictures a second of data.py beside a plain torchvision pipeline
    python tests/bench.py --backbone tiny # try the benchmark itself, in seconds; its ratios mean nothing

Each case runs in one process with the official computation, in turns with it and with a large matrix product; the table
has the median of five ratios and their range. Before it is timed, both sides must give the same loss and gradients, or
the same logits. Weights are random, of the real sizes. The exit status is 1 if a target is missed.

Peak memory is what a step takes above the weights, on a CPU measured in a process of its own. On a GPU the results are
compared in fp32, then both sides are timed as train.py runs there, in bf16 with the towers' weights held in it; there
are no targets, since the batches are too small to fill one.

Operations are what forward and backward pass hand to the device, ours of the official computation's, since they tell
what a GPU will do: it waits for each of them to be started. Kernels are those that are not views. See test_operations.

"of the limit" compares a step with the products that it cannot avoid, at the rate of the large matrix product. Counted
are two operations for each number of a frozen weight matrix and each token that meets it, with D the tower's width:
  * 12 D^2 numbers in every block but the last. The last needs 2 D^2, keys and values, of each token, and 10 D^2 of the
    tokens that are read. Visual prompts need keys and values alone. The text's shared beginning counts once, and a
    class has no tokens behind its end mark.
  * The backward pass counts the same again where a learned tensor lies below. In the first block, the 3 D^2 of query,
    key and value are left out for tokens that nothing learned has touched.
  * FG-VPL's learned layer counts three times: forward, gradients of its input and of its weights.
Attention itself, LayerNorm, activations and small learned modules are not counted, so 100 % cannot be reached.

A further method adds a class, if a plain version of it does not exist yet, and rows to CASES.
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from conftest import B16, B32, TINY, openai_clip, random_state_dict
from PIL import Image
from test_operations import NAMES, Plain, PlainCoOp, PlainUPT, PlainVLP, PlainVPT, count
from test_weights import save_torchscript
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import data
from clip_min import CLIP, Layout, full_precision, load_clip, preprocess, tokenize
from fgvpl import object_patches
from support.machine import Machine, cast_products
from train import METHODS

SIZES = {"ViT-B/32": B32, "ViT-B/16": B16, "tiny": TINY}
TRAIN_BATCH = {"ViT-B/32": 8, "ViT-B/16": 4, "tiny": 4}
TEST_BATCH, TURNS = 32, 5
GPU_TRAIN_BATCH, GPU_TEST_BATCH, GPU_REPEATS = 32, 100, 10


class Case(NamedTuple):
    """One row of the table: a training step of a method, or its evaluation of one batch."""

    name: str
    method: str
    targets: dict = {}  # by backbone: how many times faster than the official computation it must be
    options: dict = {}  # of the method
    epoch: int = 100  # VLP and DPT are in their guidance phase below 30
    evaluation: bool = False
    short: bool = False  # also without --all
    limit: float = 0  # the least fraction of the machine's limit
    classes: int = 47
    batch: int = 0  # 0: TRAIN_BATCH or TEST_BATCH


CASES = [
    Case("CoOp step", "coop", {"ViT-B/32": 5.5, "ViT-B/16": 4.2}, short=True, limit=0.7),
    Case("VPT step", "vpt", {"ViT-B/32": 1.25, "ViT-B/16": 1.2}, short=True, limit=0.7),
    Case("VPT step, 120 prompts", "vpt", {"ViT-B/32": 3}, dict(n_visual=120), limit=0.7),
    Case("VLP step, guidance", "vlp", {"ViT-B/32": 3.2}, epoch=0, limit=0.7),
    Case("VLP step, main phase", "vlp", {"ViT-B/32": 4.5}, short=True, limit=0.7),
    Case("DPT step, guidance", "dpt", {"ViT-B/32": 3.2}, epoch=0, limit=0.7),
    Case("DPT step, main phase", "dpt", {"ViT-B/32": 3.5}, limit=0.7),
    Case("UPT step", "upt", options=dict(dropout=0.0), limit=0.7),  # dropout would make the two sides differ
    Case("FG-VPL step", "fgvpl", short=True, limit=0.7),
    Case("CAVPT step", "cavpt", limit=0.7),
    Case("CoCoOp step, one picture", "cocoop", {"ViT-B/32": 5, "ViT-B/16": 5}, limit=0.7, batch=1),
    Case("ProGrad step", "prograd", limit=0.7),
    Case("ProDA step", "proda", limit=0.7),
    Case("CLIP-Adapter step", "clip_adapter", limit=0.7),
    Case("Tip-Adapter-F step", "fgvpl", options=dict(parts="tip-f"), limit=0.7),
    Case("zero-shot evaluation", "zeroshot", {"ViT-B/32": 1, "ViT-B/16": 1}, evaluation=True, short=True, limit=0.85),
    Case("CoOp evaluation", "coop", {"ViT-B/32": 2, "ViT-B/16": 1.3}, evaluation=True, short=True),
    Case("VPT evaluation", "vpt", evaluation=True),
    Case("VLP evaluation", "vlp", evaluation=True),
    Case("DPT evaluation", "dpt", evaluation=True),
    Case("UPT evaluation", "upt", options=dict(dropout=0.0), evaluation=True),
    Case("FG-VPL evaluation", "fgvpl", evaluation=True),
    Case("CAVPT evaluation", "cavpt", evaluation=True),
    Case("ProDA evaluation, four prompts", "proda", options=dict(n_prompts=4), evaluation=True),
    Case("CoCoOp evaluation, two pictures", "cocoop", {"ViT-B/32": 5, "ViT-B/16": 5}, evaluation=True, batch=2),
]  # ProGrad's evaluation is CoOp's; those of CLIP-Adapter, Tip-Adapter and the linear probe are zero-shot CLIP's

MANY_CLASSES, MANY_CLASSES_GB = Case("CoOp step, 1,000 classes", "coop", classes=1000), 4


# ---- The official computation of the methods that test_operations.py does not count ----


class PlainDPT(PlainVLP):
    def encode_image(self, images, text):
        self.z0 = super().frozen_features(images)
        self.likely = self.cosines(self.z0, self.method.zero_shot).topk(10).indices

        def class_aware(x, prompts):
            p, self.aux = self.method.cavpt[0](text[self.likely], x.transpose(0, 1), prompts)
            return p.transpose(0, 1)

        return self.image_tower(images, self.method.visual_prompts, class_aware)

    def frozen_features(self, images):
        return self.z0  # encode_image needed them, too

    def loss(self, images, labels, epoch):
        loss = super().loss(images, labels, epoch)
        hit = self.likely == labels.unsqueeze(1)
        return loss + 0.3 * F.cross_entropy(self.aux[hit], labels[hit.any(dim=1)]) if hit.any() else loss


class PlainCAVPT(PlainVLP):
    def encode_image(self, images, text):
        method = self.method
        likely = self.cosines(self.frozen_features(images), method.zero_shot).topk(10).indices

        def class_aware(x, _):
            p, self.aux = method.cavpt(method.zero_shot[likely], x[0].detach())
            return p.transpose(0, 1)

        self.hit = likely == self.labels.unsqueeze(1) if self.training else None
        return self.image_tower(images, [*method.visual_prompts, method.visual_prompts[0]], class_aware)

    def loss(self, images, labels, epoch):
        self.labels = labels
        loss, log_p = F.cross_entropy(self(images), labels), self.aux.log_softmax(dim=-1)
        of_label = log_p[torch.arange(len(labels)), :, labels]
        return loss - torch.where(self.hit, of_label, log_p.mean(dim=-1)).mean()


class PlainCoCoOp(Plain):
    def forward(self, images):
        f = self.clip.encode_image(images)
        shifts = self.method.meta_net(f / f.norm(dim=-1, keepdim=True))
        texts = [self.text_tower(self.method.ctx + shift) for shift in shifts]
        return torch.cat([self.cosines(of_one, text) for of_one, text in zip(f.split(1), texts, strict=True)])


class PlainProGrad(PlainCoOp):
    def loss(self, images, labels, epoch):
        ctx, logits = self.method.ctx, self(images)
        general = self.cosines(self.clip.encode_image(images), self.method.zero_shot).softmax(dim=-1)
        ce = F.cross_entropy(logits, labels)
        g_d = torch.autograd.grad(ce, ctx, retain_graph=True)[0]
        g_g = torch.autograd.grad(F.cross_entropy(logits, general), ctx)[0]
        product = (g_d * g_g).sum()
        g = torch.where(product < 0, g_d - product / g_g.square().sum() * g_g, g_d)
        surrogate = (ctx * g).sum()
        return ce.detach() + surrogate - surrogate.detach()


class PlainProDA(Plain):
    def __init__(self, ours, clip):
        super().__init__(ours, clip)
        places, m = torch.arange(self.embedded.shape[1], device=self.eot.device), self.n_ctx  # the name is behind them
        self.orders = []
        for n_front in 0, m // 2, m:  # the vectors in front of the name
            context, rows = places[1 : 1 + m], []
            for end in (self.eot - 1).tolist():  # of the name
                rows.append(torch.cat([places[:1], context[:n_front], places[1 + m : end], context[n_front:],
                                       places[end:]]))
            self.orders.append(torch.stack(rows).unsqueeze(-1))  # (K, 77, 1)
        self.nameless = clip.token_embedding(tokenize("X " * m + ".").to(self.eot.device)).detach()  # (1, 77, D)

    def with_context(self, embedded, ctx):
        ctx = ctx.expand(max(len(embedded), len(ctx)), -1, -1)
        embedded = embedded.expand(len(ctx), -1, -1)
        return torch.cat([embedded[:, :1], ctx, embedded[:, 1 + self.n_ctx :]], dim=1)

    def prompt(self, n):
        """All 77 tokens of a prompt of every class, with the name at its place -> unit features (K, E)."""
        x = self.with_context(self.embedded, self.method.ctx[n : n + 1])
        x = x.take_along_dim(self.orders[self.method.place[n]], dim=1)
        return F.normalize(self.encode(x, self.eot), dim=-1)

    def encode(self, x, eot):
        clip = self.clip
        x = clip.transformer((x + clip.positional_embedding).transpose(0, 1)).transpose(0, 1)
        return clip.ln_final(x)[torch.arange(len(x)), eot] @ clip.text_projection

    def forward(self, images):
        mu = sum(self.prompt(n) for n in range(self.method.n_prompts)) / self.method.n_prompts
        return self.clip.logit_scale.exp() * F.normalize(self.clip.encode_image(images), dim=-1) @ mu.T

    def loss(self, images, labels, epoch):
        method, scale = self.method, self.clip.logit_scale.exp()
        drawn = torch.randperm(method.n_prompts)[: method.n_per_step].tolist()
        w = torch.stack([self.prompt(n) for n in drawn], dim=-1)  # (K, E, drawn)
        z = F.normalize(self.clip.encode_image(images), dim=-1)
        scores = scale * torch.einsum("be,ken->bkn", z, w)
        margins = scores - scores[torch.arange(len(labels)), labels].unsqueeze(1)
        loss = F.cross_entropy(scores.mean(dim=-1) + margins.var(dim=-1, correction=0) / 2, labels)
        x = self.with_context(self.nameless, method.ctx)
        f = F.normalize(self.encode(x, torch.tensor(2 + method.n_ctx)), dim=-1)
        different = ~torch.eye(len(f), dtype=torch.bool, device=f.device)
        return loss + method.lam * (f @ f.T).abs()[different].mean()


class PlainCLIPAdapter(Plain):
    def encode_image(self, images, text):
        f = self.clip.encode_image(images)
        return self.method.ratio * self.method.adapter(f) + (1 - self.method.ratio) * f


class PlainTipAdapterF(Plain):
    def forward(self, images):
        method = self.method
        f = F.normalize(self.clip.encode_image(images), dim=-1)
        votes = torch.exp(method.sharpness * (f @ method.keys[0].T - 1))
        one_hot = F.one_hot(method.labels, len(method.classnames)).float()
        return self.clip.logit_scale.exp() * f @ method.zero_shot.T + method.lam * votes @ one_hot


class PlainFGVPL(Plain):
    def __init__(self, ours, clip):
        super().__init__(ours, clip)
        self.method.layer = copy.deepcopy(clip.visual.transformer.resblocks[-1]).requires_grad_(True)  # Phi_O

    def forward(self, images):
        method, blocks, rollout = self.method, self.clip.visual.transformer.resblocks, None
        x = self.embed(images)
        n = len(x) - 1
        x = torch.cat([x, self.clip.visual.ln_pre(method.x_fp).expand(1, len(images), -1)])
        for block in blocks[:-1]:
            h = block.ln_1(x)
            attended, weights = block.attn(h, h, h, average_attn_weights=False)  # (B, H, N+2, N+2)
            x = x + attended
            x = x + block.mlp(block.ln_2(x))
            rollout = weights.detach() if rollout is None else weights.detach() @ rollout
        seen = F.pad(object_patches(rollout[:, :, 0, 1 : 1 + n].sum(dim=1)), (1, 1), value=True)
        h = method.layer.ln_1(x)
        y = x + method.layer.attn(h, h, h, key_padding_mask=~seen, need_weights=False)[0]
        f, f_o = self.project(blocks[-1](x)), self.project(y + method.layer.mlp(method.layer.ln_2(y)))
        text = method.encode_text()
        with full_precision(images.device):
            pathways = [method.compare(f, 0, text), method.compare(f_o, -1, text)]
        return method.combine(pathways, method.lam, method.sharpness)


PLAIN = {"zeroshot": Plain, "coop": PlainCoOp, "vpt": PlainVPT, "vlp": PlainVLP, "dpt": PlainDPT, "upt": PlainUPT,
         "fgvpl": PlainFGVPL, "cavpt": PlainCAVPT, "cocoop": PlainCoCoOp, "prograd": PlainProGrad, "proda": PlainProDA,
         "clip_adapter": PlainCLIPAdapter, "tip-f": PlainTipAdapterF}


# ---- Running a case ----


def build(case, backbone, device, with_openai=True):
    """-> our method, the plain one or None; images and labels of a batch."""
    state = random_state_dict(**SIZES[backbone])
    clip = CLIP.from_state_dict(state).to(device)
    names = NAMES[: case.classes]
    if case.classes > len(NAMES):
        names = [f"{first} {second}" for first in NAMES for second in NAMES][: case.classes]
    torch.manual_seed(1)
    ours = METHODS[case.method](clip, names, **case.options).to(device)
    if case.method == "fgvpl":  # what the cache of 16 shots holds makes no difference to the time
        sides, joint = len(ours.keys), ours.zero_shot.shape[1]
        keys = F.normalize(torch.randn(sides, 16 * len(names), joint, device=device), dim=-1)
        ours.set_cache(keys, torch.arange(len(names), device=device).repeat_interleave(16))
    plain = None
    if with_openai:
        official = openai_clip(state).requires_grad_(False).to(device)
        plain = PLAIN[case.options.get("parts", case.method)](ours, official)
    on_gpu = GPU_TEST_BATCH if case.evaluation else GPU_TRAIN_BATCH
    on_cpu = TEST_BATCH if case.evaluation else TRAIN_BATCH[backbone]
    batch = case.batch or (on_gpu if device == "cuda" else on_cpu)
    images = torch.randn(batch, 3, clip.visual.resolution, clip.visual.resolution, device=device)
    return ours, plain, images, torch.arange(batch, device=device) % len(names)


def runner(case, method, images, labels, dtype=None):
    """-> a function that runs the case once and returns its results by name: loss and gradients, or logits.

    With a dtype the towers run in it, and their weights are kept in it from now on.
    """
    machine = Machine(images.device, dtype)
    if dtype:
        cast_products(method.clip, dtype)  # names that OpenAI's module has, too
    learned = {name.removeprefix("method."): p for name, p in method.named_parameters() if p.requires_grad}

    def step():
        torch.manual_seed(2)  # ProDA draws some of its prompts
        with machine.autocast():
            loss = method.loss(images, labels, case.epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()} | {name: p.grad for name, p in learned.items()}

    @torch.no_grad()
    def evaluate():
        with machine.autocast():
            return {"logits": method(images)}

    if case.evaluation:
        method.eval()
        return evaluate
    optimizer = torch.optim.SGD(learned.values(), lr=0.0, momentum=0.9)  # a rate of 0: comparable at every turn
    return step


def operations(case, method, images, labels):
    """-> the numbers of operations and of kernels in forward and backward pass, or in an evaluation, in fp32."""
    def run():
        torch.manual_seed(2)
        if case.evaluation:
            with torch.no_grad():
                method(images)
        else:
            method.loss(images, labels, case.epoch).backward()

    method.zero_grad()  # or the gradients of the step before would be added to
    return count(run)


def assert_same(ours, plain, case):
    """Every result within 1e-4 of its largest entry on the plain side. Gradients far below the others are rounding."""
    assert ours.keys() == plain.keys(), f"{case.name}: the two sides learn different tensors"
    largest = max((float(b.abs().max()) for name, b in plain.items() if b is not None and name != "loss"), default=0)
    for name, b in plain.items():
        if b is None:  # DPT's auxiliary classifier in a batch without a label among the likely classes
            assert ours[name] is None, f"{case.name}, {name}: only one side has a gradient"
            continue
        error, scale = float((ours[name] - b).abs().max()), max(float(b.abs().max()), 1e-3 * largest)
        assert error <= 1e-4 * scale, f"{case.name}, {name}: the two sides are {error:.2g} apart, of {scale:.2g}"


def seconds(function, device):
    """-> of one call; on a GPU, where a call takes milliseconds, the mean of several."""
    repeats = GPU_REPEATS if device == "cuda" else 1
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def blocks(tokens, prompts, read, tower):
    """The multiplications that a tower's blocks cannot avoid: see the head of this file."""
    layers, width = len(tower.blocks), tower.blocks[0].ln_1.normalized_shape[0]
    per_token = (layers - 1) * (12 * tokens + 2 * prompts) + 2 * (tokens + prompts) + 10 * read
    return per_token * width**2


def unavoidable(case, method, batch):
    """-> the floating-point operations that a step or an evaluation cannot avoid: see the head of this file."""
    visual, text = method.clip.visual, method.clip.text
    width, n = len(visual.class_embedding), len(visual.positional_embedding) - 1
    total = batch * n * visual.conv1.weight.numel()
    guided = case.method == "vlp" and case.epoch < 30 and not case.evaluation
    without_prompts = "zeroshot", "coop", "cocoop", "prograd", "proda", "clip_adapter"
    tip = "parts" in case.options
    if case.method in (*without_prompts, "dpt", "cavpt") or guided or tip:  # the tower as it is
        total += blocks(batch * (1 + n), 0, batch, visual)
    if case.method not in without_prompts and not tip:  # the tower with what is learned
        fgvpl = case.method == "fgvpl"  # its prompt travels on as a token
        n_visual = (method.default_options() | case.options).get("n_visual", 0)
        forward = blocks(batch * (1 + n + fgvpl), n_visual, batch, visual)
        total += forward if case.evaluation else 2 * forward - 3 * batch * (1 + n) * width**2
        if fgvpl:
            total += (2 * batch * (2 + n) + 10 * batch) * width**2 * (1 if case.evaluation else 3)
    prompts = []  # of the text tower: how often, and their layout
    if case.method in ("coop", "vlp", "dpt", "cavpt", "upt", "cocoop", "prograd"):
        repeats = batch if case.method == "cocoop" else 1  # for every picture anew
        layout = next(module for module in method.modules() if isinstance(module, Layout))
        prompts = [(repeats, layout)]
    if case.method == "proda":  # those of a step, then all without names; in an evaluation all
        torch.manual_seed(2)
        for n in torch.randperm(method.n_prompts)[: None if case.evaluation else method.n_per_step].tolist():
            prompts.append((1, method.prompts[method.place[n]].layout))
        if not case.evaluation:
            prompts.append((1, method.nameless.layout))
    for repeats, layout in prompts:
        length = layout.mask.shape[0]  # of the longest prompt, behind the common tokens
        own = int(((layout.eot_rows - layout.n_common) % length + 1).sum())  # up to each prompt's end mark
        forward, own = repeats * blocks(layout.n_common + own, 0, layout.n_prompts, text), repeats * own
        total += forward if case.evaluation else 2 * forward - 3 * own * text.positional_embedding.shape[1] ** 2
    return 2 * total


def peak_gigabytes(run, device):
    """-> the most memory that a run takes above what was held before. On a CPU only Linux tells it, others give NaN."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    if not Path("/proc/self/clear_refs").exists():
        return math.nan

    def kilobytes(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1e6


def alone(case, backbone, device):
    """Run our side of a case in this process. -> the seconds of a run, and its peak memory above the weights."""
    ours, _, images, labels = build(case, backbone, device, with_openai=False)
    run = runner(case, ours, images, labels, torch.bfloat16 if device == "cuda" else None)
    gigabytes = peak_gigabytes(run, device)
    return {"seconds": min(seconds(run, device) for _ in range(2)), "gigabytes": gigabytes}


def in_own_process(case, backbone, device):
    """alone(), in a process of its own. A GPU's memory can be measured in this one."""
    if device == "cuda":
        return alone(case, backbone, device)
    command = [sys.executable, __file__, "--device", device, "--alone", json.dumps([case, backbone])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- The tables ----


def compare(case, backbone, device):
    """Time a case in turns with the plain side and with a matrix product, print its row. -> whether targets are met."""
    ours, plain, images, labels = build(case, backbone, device)
    dtype = torch.bfloat16 if device == "cuda" else None
    run_ours, run_plain = runner(case, ours, images, labels), runner(case, plain, images, labels)
    assert_same(run_ours(), run_plain(), case)
    counts = [operations(case, method, images, labels) for method in (ours, plain)]
    run_ours, run_plain = runner(case, ours, images, labels, dtype), runner(case, plain, images, labels, dtype)
    if dtype:
        run_ours(), run_plain()  # a warm-up
    side = 8192 if device == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    turns = [(seconds(run_ours, device), seconds(run_plain, device), seconds(lambda: matrix @ matrix, device))
             for _ in range(TURNS)]
    work, product_work = unavoidable(case, ours, len(images)), 2 * side**3
    ratios = [b / a for a, b, _ in turns]
    limits = [(work / a) / (product_work / c) for a, _, c in turns]  # of each turn: the machine may be shared
    a, b, c = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio, limit = statistics.median(ratios), statistics.median(limits)
    target, least = (case.targets.get(backbone, 0), case.limit) if device == "cpu" else (0, 0)
    rest = where_time_goes(run_ours, device) if limit < case.limit else ""
    del ours, plain, run_ours, run_plain  # the next case builds its own
    gc.collect()
    memory = in_own_process(case, backbone, device)["gigabytes"]
    missed = ratio < target or limit < least
    print(f"| {case.name} | {backbone} | {a:.3g} | {b:.3g} | {ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
          f"| {counts[0][0]:,} of {counts[1][0]:,} | {counts[0][1]:,} of {counts[1][1]:,} "
          f"| {target or '-'} | {memory:.2f} | {work / 1e9:.0f} | {100 * limit:.0f} % of {product_work / c / 1e9:.0f} "
          f"| {os.getloadavg()[0]:.1f} | {'**missed** ' if missed else ''}{rest} |", flush=True)
    return not missed


def where_time_goes(run, device):
    """-> the shares of a run's time that products, attention and the rest take, by PyTorch's profiler."""
    kinds = {"products": ("addmm", "aten::mm", "bmm", "convolution", "gemm"), "attention": ("attention", "softmax"),
             "LayerNorm": ("layer_norm",), "activation": ("sigmoid", "silu", "gelu", "aten::mul"),
             "copies and sums": ("copy", "cat", "add", "sum", "index", "gather", "scatter", "fill", "clone")}
    with torch.profiler.profile() as profile:
        run()
    times = dict.fromkeys([*kinds, "other"], 0)
    for event in profile.key_averages():
        kind = next((kind for kind, parts in kinds.items() if any(part in event.key for part in parts)), "other")
        times[kind] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    total = sum(times.values())
    return ", ".join(f"{kind} {100 * time / total:.0f} %" for kind, time in times.items())


def many_classes(backbone, device):
    """The memory that limits the number of classes. -> whether its target is met."""
    gigabytes = in_own_process(MANY_CLASSES, backbone, device)["gigabytes"]
    missed = device == "cpu" and gigabytes >= MANY_CLASSES_GB
    print(f"\n{MANY_CLASSES.name}, {backbone}: {gigabytes:.2f} GB above the weights, target {MANY_CLASSES_GB}"
          f"{' **missed**' if missed else ''}")
    return not missed


def default_run(device):
    """python train.py as a beginner runs it, drawing its data first. -> whether its targets are met."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-u", str(Path(__file__).parents[1] / "train.py"), "--root", f"{folder}/data",
                   "--out", f"{folder}/runs"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("learning"):
                first = time.perf_counter() - began
        whole = time.perf_counter() - began
    missed = process.wait() != 0 or (device == "cpu" and (first >= 5 or whole >= 30))
    print(f"\npython train.py: {first:.1f} s to the first training step (target 5), {whole:.1f} s in all (target 30), "
          f"load {os.getloadavg()[0]:.1f}{' **missed**' if missed else ''}", flush=True)
    return not missed


def small_waits():
    """What a user waits for before anything is learned, on a quiet machine. -> whether the targets are met."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [[f"{label}/{i}.jpg", label, f"n{label}"] for label in range(10) for i in range(2700)]
        for path, _, _ in rows:
            Path(folder, path).parent.mkdir(exist_ok=True)
            Path(folder, path).touch()
        Path(folder, "split.json").write_text(json.dumps({"train": rows[::2], "val": [], "test": rows[1::2]}))
        archive = Path(folder, "ViT-B-16.pt")
        save_torchscript({key: value.half() for key, value in random_state_dict(**B16).items()}, archive)
        names = [f"{a} {b}" for a in NAMES for b in NAMES][:1000]
        tokenize(names)
        waits = [("27,000 pictures are found", lambda: data.load(folder, shots=0), 2),
                 ("an archive of ViT-B/16 is read", lambda: load_clip(archive), 3),
                 ("1,000 names are encoded again", lambda: tokenize(names), 0.5)]
        print()
        missed = []
        for name, function, target in waits:
            took = min(seconds(function, "cpu") for _ in range(3))
            missed.append(took >= target)
            print(f"{name}: {took:.2f} s (target {target}){' **missed**' if missed[-1] else ''}", flush=True)
    return not any(missed)


def growth(backbone, device):
    """Print how time and memory grow. A slope is that of their logarithms since the row above: 1 where it is linear."""
    print("\n| | number | steps a second | slope | peak GB | slope |\n|---|---|---|---|---|---|")
    series = [(f"classes, CoOp step with M = {m}", [(k, Case("", "coop", options=dict(n_ctx=m), classes=k, batch=8))
                                                    for k in (10, 100, 1000)]) for m in (4, 16)]
    series += [("batch, VPT step", [(b, Case("", "vpt", batch=b)) for b in (8, 16, 32, 64)]),
               ("visual prompts, VPT step, batch 8", [(p, Case("", "vpt", options=dict(n_visual=p), batch=8))
                                                      for p in (1, 10, 40, 120)])]
    for name, rows in series:
        before = None
        for number, case in rows:
            now = in_own_process(case, backbone, device)
            slopes = ["-", "-"]
            if before:
                slopes = [f"{math.log(now[key] / before[1][key]) / math.log(number / before[0]):.2f}" for key in now]
            print(f"| {name} | {number} | {1 / now['seconds']:.3g} | {slopes[0]} | {now['gigabytes']:.2f} "
                  f"| {slopes[1]} |", flush=True)
            before = number, now


def pipeline(n_pictures=256):
    """Print how many JPEGs of 500 x 375 a second become batches, beside torchvision's ImageFolder and a DataLoader."""
    print("\n| pictures a second | workers | data.py | torchvision |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(1)
        for i in range(n_pictures):  # smooth shapes and some noise, about as large as photographs are
            small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
            picture = np.asarray(small.resize((500, 375), Image.BICUBIC)) + rng.normal(0, 8, (375, 500, 3))
            place = Path(folder, str(i % 16))
            place.mkdir(exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)
        for name, transform, batch in ("training", data.augment(224), 32), ("test", preprocess(224), 100):
            theirs = ImageFolder(folder, transform)
            for workers in 0, 2, 8:
                pictures = data.Pictures(theirs.samples, transform)
                if name == "training":
                    data.decode_all(pictures)  # as few_shot_batches does
                seed = 1 if name == "training" else None
                loaders = (data.Batches(pictures, batch, torch.device("cpu"), workers, seed),
                           DataLoader(theirs, batch, num_workers=workers, persistent_workers=workers > 0))
                rates = []
                for loader in loaders:
                    list(loader)  # the workers start
                    rates.append(n_pictures / seconds(lambda loader=loader: list(loader), "cpu"))
                print(f"| {name} | {workers} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)
    pictures = 0.4 * 989e12 / 35e9
    print(f"\nOn paper, an H100 at 40 % of its 989 bf16 TFLOP/s takes {pictures:.0f} pictures a second through B/16, "
          f"35 GFLOP each, and {pictures / 2:.0f} in a step that learns visual prompts.")


def describe_machine(device):
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name() if device == "cuda" else next(iter(models), platform.machine())
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backbone", nargs="+", choices=SIZES)
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)  # for in_own_process
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(alone(Case(*args.alone[0]), args.alone[1], args.device)))
        return 0
    if importlib.util.find_spec("clip") is None:
        print("skipped: clip-anytorch is not installed, and it is what this compares with: pip install clip-anytorch")
        return 0
    print(describe_machine(args.device))
    backbones = args.backbone or (["ViT-B/32", "ViT-B/16"] if args.all else ["ViT-B/32"])
    met = []
    if args.all or not (args.growth or args.pipeline):
        print("\n| case | backbone | ours, s | official, s | times faster (range) | operations | kernels "
              "| target | peak GB | GFLOP | of the limit, GFLOP/s | load | |\n" + "|---" * 13 + "|", flush=True)
        cases = [case for case in CASES if case.short or args.all]
        if args.device == "cuda" and args.all:  # on a CPU the official computation would need minutes and 40 GB
            cases.append(MANY_CLASSES)
        met += [compare(case, backbone, args.device) for backbone in backbones for case in cases]
        met.append(default_run(args.device))
        if args.device == "cpu":
            met.append(small_waits())
        if args.all:
            met.append(many_classes(backbones[0], args.device))
    if args.all or args.growth:
        growth(backbones[0], args.device)
    if args.all or args.pipeline:
        pipeline()
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
