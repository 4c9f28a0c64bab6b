"""What --prompts promises: learned tensors of earlier runs, and of the official code, give the logits of their method.

The folders of the official code are made here, as Dassl writes them, from small modules with the official names. What
the official code computes stands here once more, literally: prompts of full length, all tokens, layer by layer.
"""

import copy
import csv
import json
import math
import os
import pickle
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_clip, random_state_dict
from test_clip import assert_equal, picture, plain_block, plain_text
from test_train import draw, only_run, predictions, prompts, result, run_folders
from torch import nn

import report
import train
from clip_min import UserError, encode, tokenize
from support import benchmarks, settings
from support.pickles import StandIn, read_file
from support.prompts import read_learned

NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "ox"]
CTX_LEARNER, EXTRACTOR = "image_encoder.transformer.ctx_learner", "image_encoder.transformer.extractor"
SIZES = TINY | dict(vision_layers=3)
WIDTH, TEXT_WIDTH, JOINT = SIZES["vision_width"], SIZES["text_width"], SIZES["joint"]


# ---- The official code: modules with its names, and what they compute, in fp32 ----


class PromptLearner(nn.Module):
    """CoOp's, with its buffers, and with `meta` CoCoOp's."""

    def __init__(self, clip, names=NAMES, n_ctx=4, csc=False, meta=False):
        super().__init__()
        self.ctx = nn.Parameter(0.02 * torch.randn(*((len(names),) if csc else ()), n_ctx, TEXT_WIDTH))
        if meta:
            self.meta_net = nn.Sequential(OrderedDict(
                linear1=nn.Linear(JOINT, JOINT // 16), relu=nn.ReLU(), linear2=nn.Linear(JOINT // 16, TEXT_WIDTH)))
        names = [name.replace("_", " ") for name in names]
        self.tokens, self.lengths = tokenize([f"{'X ' * n_ctx}{name}." for name in names]), [*map(len, map(encode, names))]
        embedding = clip.text.token_embedding(self.tokens)
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :])

    def features(self, clip, position="end", shift=0):
        """-> (K, E), every prompt encoded alone."""
        rows, half = [], self.ctx.shape[-2] // 2
        ctx = (self.ctx if self.ctx.dim() == 3 else self.ctx.expand(len(self.tokens), -1, -1)).to(shift) + shift
        for prefix, own, suffix, length in zip(self.token_prefix, ctx, self.token_suffix, self.lengths, strict=True):
            name, end = suffix[:length], suffix[length:]
            rows.append(torch.cat({"end": [prefix, own, name, end], "front": [prefix, name, own, end],
                                   "middle": [prefix, own[:half], name, own[half:], end]}[position]))
        return plain_text(clip, torch.stack(rows), self.tokens.argmax(dim=-1))


class CtxLearner(nn.Module):
    def __init__(self, layers, n_ctx=3):
        super().__init__()
        self.ctx = nn.Parameter(torch.randn(layers, n_ctx, WIDTH))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.kmlp, self.qmlp = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.vmlp = nn.Linear(WIDTH, WIDTH, bias=False)


class Extractor(nn.Module):
    """DPT's class-aware prompts, which its code calls CAVPT."""

    def __init__(self, layers, names=NAMES, n_ctx=3):
        super().__init__()
        self.meta_nets = nn.ModuleList(nn.Linear(JOINT, WIDTH) for _ in range(layers))
        self.attns = nn.ModuleList(Attention() for _ in range(layers))
        self.lns, self.lns2 = (nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers)) for _ in range(2))
        self.classfiers = nn.ModuleList(nn.Linear(WIDTH, len(names), bias=False) for _ in range(layers))
        self.ctx = nn.Parameter(torch.randn(layers, n_ctx, WIDTH))
        for p in [p for ln in (*self.lns, *self.lns2) for p in ln.parameters()]:
            p.data += 0.1 * torch.randn(WIDTH)

    def forward(self, x, g, i):
        """x (B, 1+N, D), g (B, k, E) -> prompts (B, k, D)."""
        q = self.meta_nets[i](g)
        kv, attn = torch.cat([x, self.ctx[i].expand(len(x), -1, -1)], dim=1), self.attns[i]
        scores = attn.qmlp(q) @ attn.kmlp(kv).transpose(1, 2) / math.sqrt(32)
        return self.lns2[i](attn.vmlp(scores.softmax(dim=-1) @ kv) + q)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def image_features(clip, images, plain=(), extractor=None, g=None):
    """Prompts of the layers below, then class-aware ones -> (B, E)."""
    visual = clip.visual
    x = visual.embed(images)
    for layer, block in enumerate(visual.blocks):
        if layer < len(plain):
            extra = plain[layer].expand(len(x), -1, -1)
        else:
            extra = extractor(x, g, layer - len(plain)) if extractor else x[:, :0]
        x = plain_block(block, torch.cat([x, extra], dim=1))[:, : x.shape[1]]
    return visual.ln_post(x[:, 0]) @ visual.proj


class Official:
    """A trainer: its parts, and its logits."""

    def __init__(self, method, clip, names=NAMES, **options):
        torch.manual_seed(5)
        self.method, self.clip, self.parts = method, clip, {}
        self.position, self.w0 = options.pop("position", "end"), clip.classifier(names)
        below = options.pop("below", 2 if method == "dpt" else 3)
        if method in ("vpt", "vlp", "dpt"):
            self.parts[CTX_LEARNER] = CtxLearner(below)
        if method == "dpt":
            self.parts[EXTRACTOR] = Extractor(3 - below, options.pop("trained_on", names))
        if method != "vpt":
            self.parts["prompt_learner"] = PromptLearner(clip, names, meta=method == "cocoop", **options)

    @torch.no_grad()
    def logits(self, images):
        clip, text, plain = self.clip, self.parts.get("prompt_learner"), self.parts.get(CTX_LEARNER)
        z0, scale = clip.encode_image(images), clip.logit_scale.exp()
        if self.method == "cocoop":
            shifts = text.meta_net(unit(z0))
            return torch.cat([scale * unit(z)[None] @ unit(text.features(clip, shift=shift)).T
                              for z, shift in zip(z0, shifts, strict=True)])
        w = self.w0 if text is None else text.features(clip, self.position, torch.zeros(()))
        if self.method == "dpt":
            order = (scale * unit(z0) @ self.w0.T).argsort(dim=-1, descending=True)[:, :10]
            z = image_features(clip, images, plain.ctx, self.parts[EXTRACTOR], w[order])
        else:
            z = z0 if plain is None else image_features(clip, images, plain.ctx)
        return scale * unit(z) @ unit(w).T

    def save(self, folder, epochs=50, old=False, half=False):
        """As Dassl saves it, with an optimizer and a scheduler, which are objects."""
        for name, part in self.parts.items():
            optimizer = torch.optim.SGD(part.parameters(), lr=0.002, momentum=0.9)
            sum(p.square().sum() for p in part.parameters()).backward()
            optimizer.step()
            successor, tensors = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), part.state_dict()
            if half:
                tensors = OrderedDict((key, tensor.half()) for key, tensor in tensors.items())
                for key, p in part.named_parameters():  # with what they have lost
                    p.data.copy_(tensors[key])
            state = dict(state_dict=tensors, epoch=epochs, optimizer=optimizer.state_dict(),
                         scheduler=dict(warmup_epoch=1, successor=successor), val_result=None)
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name / f"model.pth.tar-{epochs}", _use_new_zipfile_serialization=not old)
            (folder / name / "checkpoint").write_text(f"model.pth.tar-{epochs}\n")
        return folder


@pytest.fixture
def clip():
    return random_clip(**SIZES)


def take_over(folder, method, clip, names=NAMES, **options):
    """-> our method with the tensors of a folder or file."""
    learned, method_class = read_learned(folder, method), train.METHODS[method]
    options = learned.options(method_class.default_options()) | options
    return learned.method(SimpleNamespace(classnames=names, class_ids=None),
                          lambda names: method_class(clip, names, **options), SimpleNamespace(backbone="", shots=16))


OUTPUTS = {  # what the official code was trained with, and what the command has to say of it
    "coop": ("coop", {}, {}), "coop in the middle": ("coop", dict(position="middle"), "middle"),
    "coop in front": ("coop", dict(position="front", n_ctx=5), "front"),
    "coop csc": ("coop", dict(csc=True), {}), "coop csc in the middle": ("coop", dict(csc=True, position="middle"), "middle"),
    "coop 16": ("coop", dict(n_ctx=16), {}), "prograd": ("prograd", dict(n_ctx=16), {}), "cocoop": ("cocoop", {}, {}),
    "cocoop 6": ("cocoop", dict(n_ctx=6), {}), "vpt": ("vpt", {}, {}), "vlp": ("vlp", {}, {}), "dpt": ("dpt", {}, {}),
    "dpt in two layers": ("dpt", dict(below=1), {}), "dpt in all layers": ("dpt", dict(below=0), {}),
}  # fmt: skip


@pytest.fixture(params=OUTPUTS)
def output(request, clip):
    method, made_with, position = OUTPUTS[request.param]
    return Official(method, clip, **made_with), dict(class_token_position=position) if position else {}


@pytest.mark.parametrize("form", ["archive", "old", "half"])
def test_an_official_output_folder_gives_the_official_logits(form, precision, output, clip, tmp_path):
    official, options = output
    official.save(tmp_path, old=form == "old", half=form == "half")
    images = picture(32, 4)
    assert_equal(take_over(tmp_path, official.method, clip, **options)(images), official.logits(images))
