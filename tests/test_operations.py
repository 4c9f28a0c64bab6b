"""How many operations a training step hands to the device: no more than the official computation's, and few kernels.

On a GPU small kernels wait for the processor that starts them, so what a step costs there is close to their number. A
shortcut that needs many small operations would be no shortcut. Counted are forward and backward pass of a step with 12
layers and 47 classes, on towers 64 wide: counts do not depend on the width, but for copies that two heads need and one
does not, so one head is the stricter comparison, and two are counted as well.
"""

import copy
import importlib.util
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import openai_clip, random_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_min import CLIP, tokenize
from train import METHODS

DTD = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified striped
    studded swirly veined waffled woven wrinkled zigzagged"""
NAMES = DTD.split()  # 47 classes


# ---- Counting ----

NO_KERNEL = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "new_empty_strided", "select_backward",
             "slice_backward", "split", "split_with_sizes", "unbind"}


class Operations(TorchDispatchMode):
    """Counts what is handed to the device. `kernels` are the operations that are neither views nor a view's backward.

    A view's backward writes a gradient into zeros. It is left out, since it stands for the indexing alone, of which the
    official computation has more: counting it would make the comparison easier.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.kernels += not (function.is_view or function.overloadpacket.__name__ in NO_KERNEL)
        return function(*args, **(kwargs or {}))


def count(function):
    """-> the numbers of operations and of kernels in a call."""
    with Operations() as counted:
        function()
    return counted.operations, counted.kernels


# ---- OpenAI's towers, literally ----


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class LiteralBlock(nn.Module):
    """x (T, B, D) -> (T, B, D), sequence first."""

    def __init__(self, width, mask=None):
        super().__init__()
        self.attn, self.mask = nn.MultiheadAttention(width, width // 64), mask
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class LiteralTransformer(nn.Module):
    def __init__(self, width, layers, mask=None):
        super().__init__()
        self.resblocks = nn.Sequential(*[LiteralBlock(width, mask) for _ in range(layers)])

    def forward(self, x):
        return self.resblocks(x)


class LiteralVisionTransformer(nn.Module):
    def __init__(self, width, patch, n_tokens, layers, joint):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(n_tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = LiteralTransformer(width, layers)
        self.proj = nn.Parameter(torch.empty(width, joint))


class LiteralCLIP(nn.Module):
    """A state dict in OpenAI's keys -> its towers as OpenAI computes them, under OpenAI's names. Plain walks them."""

    def __init__(self, state):
        super().__init__()
        width, _, patch, _ = state["visual.conv1.weight"].shape
        (context_length, text_width), joint = state["positional_embedding"].shape, state["text_projection"].shape[1]
        layers = [sum(key.startswith(tower) and key.endswith("ln_1.bias") for key in state)
                  for tower in ("visual.transformer", "transformer")]
        mask = torch.full((context_length, context_length), float("-inf")).triu(1)
        n_tokens = len(state["visual.positional_embedding"])
        self.visual = LiteralVisionTransformer(width, patch, n_tokens, layers[0], joint)
        self.transformer = LiteralTransformer(text_width, layers[1], mask)
        self.token_embedding = nn.Embedding(len(state["token_embedding.weight"]), text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, joint))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.load_state_dict(state)


# ---- The official computation: every prompt is a token of every class and of every picture ----


class Plain(nn.Module):
    """Zero-shot CLIP on OpenAI's towers. `method` is a copy of ours, for its learned tensors and its small modules.

    The names are tokenized and embedded beforehand, with places for the method's context, as in the official code.
    """

    def __init__(self, ours, clip):
        super().__init__()
        self.clip, self.method = clip, copy.deepcopy(ours, {id(ours.clip): ours.clip})
        self.n_ctx = getattr(ours, "n_ctx", 0)
        tokens = tokenize([f"{'X ' * self.n_ctx}{name}." for name in ours.classnames]).to(ours.zero_shot.device)
        self.eot = nn.Buffer(tokens.argmax(dim=-1))
        self.embedded = nn.Buffer(clip.token_embedding(tokens).detach())  # (K, 77, D)

    def encode_text(self):
        return self.method.zero_shot

    def encode_image(self, images, text):
        return self.image_tower(images)

    def cosines(self, image, text):
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return self.clip.logit_scale.exp() * image @ text.t()

    def forward(self, images):
        text = self.encode_text()  # for every batch, as the official forward passes do
        return self.cosines(self.encode_image(images, text), text)

    def loss(self, images, labels, epoch):
        return F.cross_entropy(self(images), labels)

    def text_tower(self, ctx, *deeper):
        """ctx (M, D) stands behind the start token, those of deeper take its place in the next layers -> (K, E)."""
        clip, m, n = self.clip, self.n_ctx, len(self.embedded)
        x = torch.cat([self.embedded[:, :1], ctx.expand(n, -1, -1), self.embedded[:, 1 + m :]], dim=1)
        x = (x + clip.positional_embedding).permute(1, 0, 2)  # (77, K, D), OpenAI's layout
        for layer, block in enumerate(clip.transformer.resblocks):
            if 0 < layer <= len(deeper):
                x = torch.cat([x[:1], deeper[layer - 1].unsqueeze(1).expand(-1, n, -1), x[1 + m :]])
            x = block(x)
        x = clip.ln_final(x.permute(1, 0, 2))
        return x[torch.arange(n, device=x.device), self.eot] @ clip.text_projection

    def embed(self, images):
        """-> (1+N, B, D), OpenAI's layout."""
        visual = self.clip.visual
        x = visual.conv1(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        return visual.ln_pre(x).permute(1, 0, 2)

    def project(self, x):
        return self.clip.visual.ln_post(x[0]) @ self.clip.visual.proj

    def image_tower(self, images, prompts=(), last=None):
        """prompts (L, P, D). last(x (1+N, B, D), prompts (P, D)) makes those of the last layer (k, B, D). -> (B, E)"""
        x, blocks = self.embed(images), self.clip.visual.transformer.resblocks
        n, prompts = len(x), list(prompts)
        for layer, block in enumerate(blocks):
            if prompts:
                p = prompts[layer].unsqueeze(1).expand(-1, len(images), -1)
                if last and layer == len(blocks) - 1:
                    p = last(x[:n], prompts[layer])
                x = torch.cat([x[:n], p])
            x = block(x)
        return self.project(x)


class PlainCoOp(Plain):
    def encode_text(self):
        return self.text_tower(self.method.ctx)


class PlainVPT(Plain):
    def encode_image(self, images, text):
        return self.image_tower(images, self.method.visual_prompts)


class PlainVLP(PlainCoOp, PlainVPT):
    def loss(self, images, labels, epoch):
        text = self.encode_text()
        z = self.encode_image(images, text)
        loss = F.cross_entropy(self.cosines(z, text), labels)
        if epoch >= self.method.guide_epochs:
            return loss
        text_alone = F.cross_entropy(self.cosines(self.frozen_features(images), text), labels)
        image_alone = F.cross_entropy(self.cosines(z, self.method.zero_shot), labels)
        return text_alone + image_alone + self.method.beta * loss

    @torch.no_grad()
    def frozen_features(self, images):
        return self.image_tower(images)


class PlainUPT(Plain):
    def forward(self, images):
        text_prompts, visual_prompts = self.method.tower_prompts()
        return self.cosines(self.image_tower(images, visual_prompts), self.text_tower(*text_prompts))


# ---- The comparison ----

CASES = {  # method: its plain side, options, epoch
    "coop": (PlainCoOp, {}, 0), "vpt": (PlainVPT, {}, 0), "vlp": (PlainVLP, {}, 100),
    "upt": (PlainUPT, dict(dropout=0.0), 0),  # dropout would make the two sides differ
}
KERNELS = 1.12  # at most so many times the official computation's
IMAGES, LABELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4)


@pytest.fixture(scope="module", params=[1, 2], ids=["one head", "two heads"])
def state(request):
    width = 64 * request.param
    return random_state_dict(joint=64, resolution=32, vision_layers=12, vision_width=width, patch=16, text_width=width,
                             text_layers=12)


def build(name, state, official):
    """-> our method and the plain one on the official towers."""
    plain, options, _ = CASES[name]
    torch.manual_seed(1)
    ours = METHODS[name](CLIP.from_state_dict(state), NAMES, **options)
    return ours, plain(ours, official.requires_grad_(False))


def step(name, method):
    """One step -> its numbers of operations and of kernels, and its results: the loss, every learned tensor's gradient.

    The results are those of the step that was counted.
    """
    results = {}

    def forward_and_backward():
        results["loss"] = method.loss(IMAGES, LABELS, CASES[name][2])
        results["loss"].backward()

    counts = count(forward_and_backward)
    learned = {key.removeprefix("method."): p.grad for key, p in method.named_parameters() if p.requires_grad}
    return counts, results | learned


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_no_more_operations_than_the_official_computation(name, state):
    sides = build(name, state, LiteralCLIP(state))
    ((operations, kernels), ours), ((official_operations, official_kernels), official) = [step(name, m) for m in sides]
    assert ours.keys() == official.keys()
    for key, expected in official.items():  # the two sides do the same, or their counts say nothing
        error = ((ours[key] - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-5, f"{key}: the two sides are {error:.1g} of the largest entry apart"
    assert operations <= official_operations, f"{name}: {operations} operations, officially {official_operations}"
    assert kernels <= KERNELS * official_kernels, f"{name}: {kernels} kernels, officially {official_kernels}"


@pytest.mark.skipif(importlib.util.find_spec("clip") is None, reason="clip-anytorch is not installed")
@pytest.mark.parametrize("name", CASES)
def test_the_literal_towers_have_the_counts_of_openais_own(name, state):
    (counts, results), (openai_counts, openai_results) = [
        step(name, build(name, state, clip)[1]) for clip in (LiteralCLIP(state), openai_clip(state))]
    assert results.keys() == openai_results.keys()
    assert all(torch.equal(results[key], openai_results[key]) for key in results)
    slices = 0 if name == "vpt" else 2 * 12  # clip-anytorch cuts the mask to size in every layer, OpenAI does not
    assert counts == (openai_counts[0] - slices, openai_counts[1])


def test_views_are_operations_and_no_kernels():
    x = torch.ones(2, 4, 6)
    for view in (lambda: x.mT, lambda: x[0], lambda: x.detach(), lambda: x.split(2, dim=1), lambda: x.unbind(),
                 lambda: x.chunk(2)):
        assert count(view) == (1, 0)
    assert count(lambda: x + 1) == (1, 1) and count(lambda: x.mT.contiguous()) == (2, 1)
    assert count(lambda: x.mT.flatten(1)) == (3, 1)  # mT, a copy, and a view of the copy
    x.requires_grad_()
    summed, of_a_row = count(lambda: torch.autograd.grad(x.sum(), x)), count(lambda: torch.autograd.grad(x[0].sum(), x))
    assert of_a_row == (summed[0] + 2, summed[1])  # x[0] and its backward
