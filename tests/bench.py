"""How much faster than the official code? Same weights, same inputs, same results, in one process, in turns.

    pip install clip-anytorch        # OpenAI's code: what the official repositories of the papers are built on
    python tests/bench.py            # on two CPU cores ten minutes; --quick: B/32 alone and fewer turns

The plain side computes what the official code does, with OpenAI's modules: 77 positions for every class, in training
at every step and in evaluation for every batch. Weights are random, of the real sizes. Before a case is timed, both
sides must give the same numbers. Exit status 1 if a ratio misses its target.

A further method adds one function, clips -> (ours, plain), and one row to CASES.
"""

import argparse
import copy
import gc
import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from conftest import B16, B32, openai_clip, random_state_dict
from torch import nn

from clip_min import CLIP, tokenize
from coop import CoOp
from dpt import DPT, VLP
from fgvpl import FGVPL
from upt import UPT
from vpt import VPT

SIZES = {"ViT-B/32": B32, "ViT-B/16": B16}
N_CTX = 16
DTD = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
    studded swirly veined waffled woven wrinkled zigzagged"""
NAMES = DTD.split()  # 47 classes


class Clips(NamedTuple):
    """One backbone twice, frozen, with the same weights; images of its resolution on demand."""

    ours: CLIP
    openai: nn.Module
    train_batch: int

    def images(self, n):
        resolution = self.ours.visual.resolution
        return torch.randn(n, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


class PlainCoOp(nn.Module):
    """CoOp as its official code computes it, on OpenAI's package."""

    def __init__(self, clip, ctx):
        super().__init__()
        self.clip, self.ctx = clip, nn.Parameter(ctx.detach().clone())
        self.tokens = tokenize([" ".join(["X"] * len(ctx)) + f" {name}." for name in NAMES])
        embedding = clip.token_embedding(self.tokens)
        self.prefix, self.suffix = embedding[:, :1], embedding[:, 1 + len(ctx) :]

    def encode_text(self):
        ctx = self.ctx.unsqueeze(0).expand(len(NAMES), -1, -1)
        x = torch.cat([self.prefix, ctx, self.suffix], dim=1) + self.clip.positional_embedding  # (K, 77, D)
        x = self.clip.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.clip.ln_final(x)
        return x[torch.arange(len(x)), self.tokens.argmax(dim=-1)] @ self.clip.text_projection

    def forward(self, images):
        image = self.clip.encode_image(images)
        text = self.encode_text()
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return self.clip.logit_scale.exp() * image @ text.t()

    def loss(self, images, labels):
        return F.cross_entropy(self(images), labels)


class PlainDPT(PlainCoOp):
    """VPT, VLP and DPT as DPT's official code computes them, on OpenAI's package, with the learned tensors of `ours`."""

    def __init__(self, clip, ours):
        ctx = getattr(ours, "ctx", torch.zeros(N_CTX, clip.positional_embedding.shape[1]))
        super().__init__(clip, ctx)
        self.w0, self.guidance = ours.clip.classifier(NAMES), not isinstance(ours, VPT)
        self.visual_prompts = nn.Parameter(ours.visual_prompts.detach().clone())
        self.cavpt = copy.deepcopy(ours.cavpt[0]) if isinstance(ours, DPT) else None

    def encode_image(self, images, g=None):
        visual, aux = self.clip.visual, None
        x = visual.conv1(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        x = visual.ln_pre(x).permute(1, 0, 2)  # (1+N, B, D), OpenAI's layout
        n, blocks = len(x), visual.transformer.resblocks
        for i, block in enumerate(blocks):
            p = self.visual_prompts[i].unsqueeze(1).expand(-1, len(images), -1)
            if self.cavpt is not None and i == len(blocks) - 1:
                p, aux = self.cavpt(g, x[:n].permute(1, 0, 2), self.visual_prompts[i])
                p = p.permute(1, 0, 2)
            x = block(torch.cat([x[:n], p], dim=0))
        return visual.ln_post(x[0]) @ visual.proj, aux

    def cosines(self, image, text):
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return self.clip.logit_scale.exp() * image @ text.t()

    def loss(self, images, labels):
        if not self.guidance:  # VPT
            return F.cross_entropy(self.cosines(self.encode_image(images)[0], self.w0), labels)
        text = self.encode_text()
        with torch.no_grad():
            z0 = self.clip.encode_image(images)
            likely = self.cosines(z0, self.w0).topk(10).indices
        z, aux = self.encode_image(images, text[likely])
        loss = (F.cross_entropy(self.cosines(z0, text), labels) + F.cross_entropy(self.cosines(z, self.w0), labels)
                + 0.1 * F.cross_entropy(self.cosines(z, text), labels))
        hit = likely == labels[:, None]
        if aux is not None and hit.any():
            loss = loss + 0.3 * F.cross_entropy(aux[hit], labels[hit.any(dim=1)])
        return loss


def coop_pair(clips):
    torch.manual_seed(1)
    ours = CoOp(clips.ours, NAMES, n_ctx=N_CTX)
    return ours, PlainCoOp(clips.openai, ours.ctx)


# ---- Cases: clips -> (ours, plain), two functions without arguments that return the same tensors ----


def coop_step(clips):
    return training_steps(clips, coop_pair(clips), "ctx")


def training_steps(clips, methods, *learned):
    """Forward, backward, SGD step of each method. -> loss, gradients of the named tensors."""
    images = clips.images(clips.train_batch)
    labels = torch.arange(len(images))

    def step_of(method):
        parameters = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)  # comparable at every turn

        def step():
            loss = method.loss(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach(), *(getattr(method, name).grad for name in learned)

        return step

    return tuple(step_of(method) for method in methods)


def vpt_step(clips):
    ours = VPT(clips.ours, NAMES)
    return training_steps(clips, (ours, PlainDPT(clips.openai, ours)), "visual_prompts")


def vlp_step(clips):
    ours = VLP(clips.ours, NAMES)
    return training_steps(clips, (ours, PlainDPT(clips.openai, ours)), "visual_prompts", "ctx")


def dpt_step(clips):
    ours = DPT(clips.ours, NAMES)
    return training_steps(clips, (ours, PlainDPT(clips.openai, ours)), "visual_prompts", "ctx")


def upt_step(clips):
    """The other side is no plain UPT but VLP's main phase with as many prompts: what the unified layer costs."""
    upt, vlp = UPT(clips.ours, NAMES), VLP(clips.ours, NAMES, n_ctx=4, n_vpt=4, guide_epochs=0)
    return training_steps(clips, (upt, vlp))


def fgvpl_step(clips):
    """The other side is the frozen tower with one learned token: what rollout, object branch and pathways cost."""
    fgvpl, plain = FGVPL(clips.ours, NAMES), VPT(clips.ours, NAMES, n_ctx=1, deep=False)
    fgvpl.reserve(16 * len(NAMES))  # 16 shots; what the cache holds makes no difference to the time
    fgvpl.keys.copy_(F.normalize(torch.randn_like(fgvpl.keys), dim=-1))
    return training_steps(clips, (fgvpl, plain))


def coop_evaluation(clips, batches=3):
    """Three batches of 32: the official code encodes the text for each, ours once. -> logits."""
    ours, plain = coop_pair(clips)
    images = clips.images(32)

    @torch.no_grad()
    def evaluate_ours():
        text = ours.encode_text()
        return [ours(images, text) for _ in range(batches)]

    @torch.no_grad()
    def evaluate_plain():
        return [plain(images) for _ in range(batches)]

    return evaluate_ours, evaluate_plain


def text_tower_step(clips):
    """The classifier from the contexts, forward and backward, without images. -> features, gradient."""
    def step_of(method):
        def step():
            method.ctx.grad = None
            text = method.encode_text()
            F.normalize(text, dim=-1)[:, 0].sum().backward()
            return text.detach(), method.ctx.grad

        return step

    return tuple(step_of(method) for method in coop_pair(clips))


class Case(NamedTuple):
    name: str
    make: callable
    targets: dict  # backbone: the ratio it must reach, None to report it only
    same: bool = True  # both sides must return the same tensors


CASES = [
    Case("CoOp training step", coop_step, {"ViT-B/32": 5, "ViT-B/16": 3.5}),
    # With B/16 nine tenths of our evaluation is the image tower, which both sides must compute: 2 is out of reach.
    Case("CoOp evaluation, 3 batches of 32", coop_evaluation, {"ViT-B/32": 2, "ViT-B/16": None}),
    # VLP and DPT in the guidance phase, where both sides also run the frozen image tower once.
    Case("VPT training step", vpt_step, {"ViT-B/32": 1.1}),
    Case("VLP training step", vlp_step, {"ViT-B/32": 2.8}),
    Case("DPT training step", dpt_step, {"ViT-B/32": 2.8}),
    Case("UPT training step against VLP's", upt_step, {"ViT-B/32": 1 / 1.15}, same=False),
    Case("FG-VPL training step against one token's", fgvpl_step, {"ViT-B/32": 1 / 1.4, "ViT-B/16": 1 / 1.4}, same=False),
    Case("CoOp text tower, forward and backward", text_tower_step, {"ViT-B/32": 10}),  # the same in both backbones
]
TRAIN_BATCH = {"ViT-B/32": 8, "ViT-B/16": 4}


# ---- Measuring ----


def build(backbone):
    state = random_state_dict(**SIZES[backbone])
    return Clips(CLIP.from_state_dict(state), openai_clip(state).requires_grad_(False), TRAIN_BATCH[backbone])


def assert_same(ours, plain, case):
    """Warm-up and proof at once: every tensor within 1e-4 of its largest entry."""
    for a, b in zip(ours(), plain(), strict=True):
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        assert error <= 1e-4 * scale, f"{case}: the two sides are {error:.2g} apart, their largest entry is {scale:.2g}"


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def row(case, backbone, clips, turns):
    """Time one case in turns, print its table row. -> whether the median ratio reaches the target."""
    ours, plain = case.make(clips)
    if case.same:
        assert_same(ours, plain, f"{case.name}, {backbone}")
    else:
        ours(), plain()
    times = [(seconds(ours), seconds(plain)) for _ in range(turns)]
    ratios = [b / a for a, b in times]
    ratio, target = statistics.median(ratios), case.targets[backbone] or 0
    a, b = (statistics.median(side) for side in zip(*times, strict=True))
    verdict = "" if ratio >= target else " **missed**"
    print(f"| {case.name} | {backbone} | {a:.3f} | {b:.3f} | {ratio:.2f} | {min(ratios):.2f}-{max(ratios):.2f} "
          f"| {f'{target:.2g}' if target else '-'}{verdict} |", flush=True)
    return ratio >= target


def machine():
    x = torch.randn(2048, 2048)
    best = min(seconds(lambda: x @ x) for _ in range(5))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = next(iter(models), platform.processor() or platform.machine())
    return (f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model}, "
            f"{2 * 2048**3 / best / 1e9:.0f} GFLOP/s in a 2048 x 2048 fp32 matmul")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-B/32 alone, three turns instead of five")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("clip") is None:
        print("skipped: clip-anytorch is not installed, and it is what this compares with: pip install clip-anytorch")
        return 0
    print(machine() + f"; {len(NAMES)} classes, {N_CTX} contexts, training batches {TRAIN_BATCH}\n")
    print("| case | backbone | ours, s | official, s | times faster, median | min-max | target |")
    print("|---|---|---|---|---|---|---|", flush=True)
    reached = []
    for backbone in list(SIZES)[: 1 if args.quick else None]:
        clips = build(backbone)
        reached += [row(case, backbone, clips, 3 if args.quick else 5) for case in CASES if backbone in case.targets]
        del clips  # before the next one is built
        gc.collect()
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
