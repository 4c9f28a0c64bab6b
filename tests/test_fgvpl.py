"""What fgvpl.py promises: Equations 2-19 line by line, an exact rollout, the object, the cache, runs of train.py."""

import copy
import functools
import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_state_dict
from test_clip import as_last_block, assert_equal, picture, watch_attention
from test_upt import counted, learned, literal_norm
from torch import nn

import clip_min
import data
import fgvpl
import train
from clip_min import CLIP, Block, LastBlock, UserError
from fgvpl import FGVPL, above_otsu, bounding_box, largest_component, object_patches
from support import settings
from support.machine import Machine

NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "St. John's Co.", "ox"]
SIZES = TINY | dict(resolution=40, patch=8, vision_layers=4)  # 5 x 5 patches: 27 tokens with the prompt
SHOTS = torch.tensor([2, 2, 0, 1, 4, 3, 0])  # labels of the few-shot pictures, not as many of each
VIEWS = [picture(40, 7) + 0.3 * picture(40, 7, seed=seed) for seed in (2, 3, 4)]
PICKED = torch.tensor([5, 0, 6])  # the pictures that a training batch shows, augmented once more
IMAGES, LABELS = picture(40, 7)[PICKED] + 0.3 * picture(40, 3, seed=5), SHOTS[PICKED]
PARTS = ["fvp+tar", "fvp", "tar", "tip", "tip-f"]
OPTIONS = [
    dict(), dict(region="bbox"), dict(new_layer="light"), dict(share_adapters=False),
    dict(alpha=0.4, beta=0.9, lam=3.0), dict(beta=0.0),
    dict(alpha=0.2, beta=0.1, lam=0.5, region="bbox", new_layer="light", share_adapters=False),
    dict(parts="fvp"), dict(parts="fvp", beta=0.9, region="bbox", new_layer="light"),
    dict(parts="tar"), dict(parts="tar", share_adapters=False, alpha=0.3, lam=2.0),
    dict(parts="tip"), dict(parts="tip", lam=5.0), dict(parts="tip-f"), dict(parts="tip-f", lam=5.0),
    dict(parts="tip", lam=3.0, sharpness=5.5),
]  # fmt: skip


# ---- Helpers ----


class Batches:
    """The few-shot set in batches of three, the last one shorter; every walk through it shows the next view."""

    def __init__(self, views=None, labels=SHOTS, size=3):
        self.views, self.labels, self.size, self.walks = VIEWS if views is None else views, labels, size, 0

    def __iter__(self):
        self.walks += 1
        return zip(self.views[self.walks - 1].split(self.size), self.labels.split(self.size), strict=True)


def prepared(clip, names=NAMES, **options):
    """As before the first step: x_FP zero, Phi_O a copy."""
    torch.manual_seed(3)
    method = FGVPL(clip, names, **dict(cache_views=len(VIEWS)) | options).eval()
    method.prepare(Batches())
    return method


def trained(clip, **options):
    """With every learned tensor moved away from where it began."""
    method, generator = prepared(clip, **options), torch.Generator().manual_seed(4)
    for p in learned(method).values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return method


def train_step(method):
    optimizer = torch.optim.SGD(learned(method).values(), lr=0.01, weight_decay=0.01)
    method.train().loss(IMAGES, LABELS).backward()
    optimizer.step()


def unit(x):
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def zero_shot(clip, images=IMAGES):
    return clip.logits(clip.encode_image(images), clip.classifier(NAMES))


def assert_differs(one, other):
    assert float((one - other).detach().abs().max()) > 0.01 * float(other.detach().abs().max())


@functools.cache
def threshold_by_search(levels):
    """Sorted levels -> the first of 256 thresholds with the largest between-class variance, in exact arithmetic."""
    best, found = 0, 255
    for t in range(256):
        low, high = [v for v in levels if v <= t], [v for v in levels if v > t]
        if low and high:
            gap = Fraction(sum(high), len(high)) - Fraction(sum(low), len(low))
            if (between := len(low) * len(high) * gap**2) > best:
                best, found = between, t
    return found


def literal_above(am):
    """A map, a list of whole numbers or fractions -> list of bool."""
    low, high = min(am), max(am)
    levels = [255 * (v - low) // (high - low) if high > low else 0 for v in am]
    t = threshold_by_search(tuple(sorted(levels)))
    return [v > t for v in levels]


def literal_regions(mask):
    """-> the regions as lists of places, by flood fill."""
    side, left, regions = math.isqrt(len(mask)), {i for i, on in enumerate(mask) if on}, []
    while left:
        todo, region = [min(left)], []
        left.remove(todo[0])
        while todo:
            region.append(i := todo.pop())
            for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                y, x = i // side + dy, i % side + dx
                if 0 <= y < side and 0 <= x < side and y * side + x in left:
                    left.remove(y * side + x)
                    todo.append(y * side + x)
        regions.append(region)
    return regions


def literal_largest(mask, am):
    region = max(literal_regions(mask), key=lambda region: (len(region), max(am[i] for i in region)), default=[])
    return [i in region for i in range(len(mask))]


def literal_box(mask):
    side = math.isqrt(len(mask))
    ys, xs = ([f(i, side) for i, on in enumerate(mask) if on] for f in (int.__floordiv__, int.__mod__))
    return [bool(ys) and min(ys) <= i // side <= max(ys) and min(xs) <= i % side <= max(xs) for i in range(len(mask))]


def literal_object(am, region="component"):
    """-> places of the object's patches."""
    mask = literal_largest(literal_above([Fraction(v) for v in am]), am)
    mask = literal_box(mask) if region == "bbox" else mask
    return [i for i, on in enumerate(mask) if on or not any(mask)]


def literal_block(block, x, heads=2):
    """One picture's tokens (n, D) -> all tokens behind the block, and the weights (n, n) of each head."""
    attended, maps = [], []
    q, k, v = (literal_norm(block.ln_1, x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
    for q_h, k_h, v_h in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
        e = (q_h @ k_h.T / math.sqrt(q_h.shape[-1])).exp()
        maps.append(e / e.sum(dim=-1, keepdim=True))
        attended.append(maps[-1] @ v_h)
    x = x + torch.cat(attended, dim=-1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    h = literal_norm(block.ln_2, x) @ block.mlp["c_fc"].weight.T + block.mlp["c_fc"].bias
    h = h / (1 + (-1.702 * h).exp())
    if isinstance(block.mlp["c_proj"], nn.Linear):
        h = h @ block.mlp["c_proj"].weight.T + block.mlp["c_proj"].bias
    return x + h, maps


def literal_walk(clip, image, x_fp=None):
    """One picture -> z_{L-1} (n, D), the product of all weights (n, n) for each head, AM."""
    visual = clip.visual
    patches = F.conv2d(image.unsqueeze(0), visual.conv1.weight, stride=visual.patch).flatten(2)[0].T
    z = torch.cat([visual.class_embedding.unsqueeze(0), patches]) + visual.positional_embedding
    z = literal_norm(visual.ln_pre, z if x_fp is None else torch.cat([z, x_fp.unsqueeze(0)]))
    product = [torch.eye(len(z))] * 2
    for block in visual.blocks[:-1]:
        z, maps = literal_block(block, z)
        product = [later @ earlier for later, earlier in zip(maps, product, strict=True)]
    return z, product, sum(att[0, 1 : 1 + len(patches)] for att in product)


def literal_project(clip, token):
    return literal_norm(clip.visual.ln_post, token) @ clip.visual.proj


def literal_features(method, images, region, heads):
    """-> f (B, E) and, with the object branch, f_O, picture by picture."""
    clip, features = method.clip, []
    for image in images:
        z, _, am = literal_walk(clip, image, getattr(method, "x_fp", None))
        both = [literal_project(clip, literal_block(clip.visual.blocks[-1], z)[0][0])]
        if method.has_object:
            z_object = torch.stack([z[0], *(z[1 + i] for i in literal_object(am.tolist(), region)), z[-1]])
            both.append(literal_project(clip, literal_block(method.layer, z_object, heads)[0][0]))
        features.append(both)
    return [torch.stack(stream) for stream in zip(*features, strict=True)]


@torch.no_grad()
def literal_cache(clip, region):
    """-> F and F_O (n, E): CLIP without the prompt, the mean over the views, made unit."""
    cache = []
    for shown in zip(*VIEWS, strict=True):
        both = []
        for image in shown:
            z, _, am = literal_walk(clip, image)
            z = literal_block(clip.visual.blocks[-1], z)[0]
            patches = [z[1 + i] for i in literal_object(am.tolist(), region)]
            both.append([literal_project(clip, z[0]), literal_project(clip, sum(patches) / len(patches))])
        cache.append([unit(sum(stream) / len(shown)) for stream in zip(*both, strict=True)])
    return [torch.stack(stream) for stream in zip(*cache, strict=True)]


def literal_adapted(linear, u):
    h = u @ linear.weight.T + linear.bias
    return unit(torch.where(h > 0, h, 0.2 * h))


def literal_logits(method, cache, parts="fvp+tar", alpha=0.05, beta=0.5, lam=1.0, sharpness=1.0,
                   region="component", new_layer="copy", share_adapters=True, **_):
    """cache: F and F_O."""
    clip, total = method.clip, []
    features = literal_features(method, IMAGES, region, heads=1 if new_layer == "light" else 2)
    w = clip.classifier(NAMES)
    for stream in range(len(features)):
        adapter = 0 if share_adapters else stream
        w_new = w + alpha * literal_adapted(method.p[adapter], w) if "tar" in parts else w
        rows = []
        for f in unit(features[stream]):
            row = clip.logit_scale.exp() * w_new @ f
            if parts != "fvp":
                keys, one_hot = cache[stream], torch.eye(len(NAMES))[SHOTS]  # L
                if "tar" in parts:
                    f, keys = (unit(u + literal_adapted(method.q[adapter], u)) for u in (f, keys))
                row = row + lam * (-sharpness * (1 - keys @ f)).exp() @ one_hot
            rows.append(row)
        total.append(torch.stack(rows))
    return total[0] + beta * total[1] if len(total) == 2 else total[0]


def random_masks(sides=(7, 14, 24), densities=(0.1, 0.3, 0.4, 0.5, 0.7), number=4):
    """Masks and attention of these sides, of few and many patches; the sparser ones have regions of equal size."""
    generator = torch.Generator().manual_seed(0)
    for side, density in itertools.product(sides, densities):
        yield (torch.rand(number, side**2, generator=generator) < density,
               torch.rand(number, side**2, generator=generator))


def on(places, side=3):
    return torch.tensor([[i in places for i in range(side**2)]])


@pytest.fixture(scope="module")
def weights():
    return random_state_dict(**SIZES)


@pytest.fixture
def clip(weights):
    """A small random CLIP, new for every test, of weights drawn once."""
    return CLIP.from_state_dict(weights)


@pytest.fixture(scope="module")
def literal_keys(weights):
    """{region: (F, F_O)} of that CLIP."""
    return {region: literal_cache(CLIP.from_state_dict(weights), region) for region in ("component", "bbox")}


@pytest.fixture(scope="module")
def vit_b():
    """A CLIP of ViT-B/16's image tower without any numbers in it: nothing is computed with it."""
    with torch.device("meta"):
        visual = clip_min.VisionTransformer(224, 16, 768, 12, 512)
        clip = CLIP(visual, clip_min.TextTransformer(77, 49408, 64, 1, 512))
    return clip.to_empty(device="cpu")


# ---- Equations 2 to 19 ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_loss_and_gradients_equal_a_literal_fgvpl(options, precision, clip, literal_keys):
    method, region = trained(clip, **options), options.get("region", "component")
    if options.get("parts") == "tip-f":
        keys = [method.keys[0]]
    else:
        keys = literal_keys[region] if precision == "fp32" else literal_cache(clip, region)
    logits = literal_logits(method, keys, **options)
    assert_equal(method(IMAGES), logits, 1e-4)
    literal, loss = F.cross_entropy(logits, LABELS), method.loss(IMAGES, LABELS)
    torch.testing.assert_close(loss, literal, rtol=1e-4, atol=1e-5)
    parameters = learned(method)
    if not parameters:
        return
    ours = torch.autograd.grad(loss, parameters.values(), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(literal, parameters.values(), allow_unused=True, materialize_grads=True)
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert float(other.abs().max()) > 0 or (options.get("beta") == 0 and "layer" in name), f"{name}: no gradient"
        assert_equal(one, other, 1e-4)


def test_these_comparisons_see_the_object(clip):
    """It is a part of every picture, smaller than its box in some, and moves with the learned prompt."""
    method = trained(clip)
    am, otsu, component = method.attention(IMAGES).values()
    assert am.shape == otsu.shape == component.shape == (3, 25)
    assert component.sum(dim=1).lt(25).all() and component.sum(dim=1).lt(otsu.sum(dim=1)).any()
    assert not torch.equal(object_patches(am, "bbox"), component)
    assert_differs(am, prepared(clip).attention(IMAGES)["attention"])


def test_what_attention_shows_is_what_the_forward_uses(clip, monkeypatch):
    method, used = trained(clip, region="bbox"), []
    monkeypatch.setattr(fgvpl, "object_patches", lambda *args: used.append(object_patches(*args)) or used[-1])
    method(IMAGES)
    am, otsu, region = method.attention(IMAGES).values()
    assert torch.equal(region, used[0]) and torch.equal(otsu, above_otsu(am))
    assert torch.equal(region, object_patches(am, "bbox"))


@pytest.mark.parametrize("parts", ["tar", "tip"])
def test_without_the_object_branch_attention_is_clips(parts, clip):
    literal = torch.stack([literal_walk(clip, image)[2] for image in IMAGES])
    assert_equal(prepared(clip, parts=parts).attention(IMAGES)["attention"], literal)


def test_the_prompt_goes_behind_the_patches_and_through_ln_pre(clip):
    method = prepared(clip)
    z = method.embed(IMAGES)
    assert torch.equal(z[:, :-1], clip.visual.embed(IMAGES))
    assert torch.equal(z[:, -1], clip.visual.ln_pre.bias.expand(3, -1)), "zeros at first: what is left is the bias"
    method = trained(clip)
    assert_equal(method.embed(IMAGES)[1, -1], literal_norm(clip.visual.ln_pre, method.x_fp))


def test_the_prompt_changes_both_features(clip):
    with torch.no_grad():
        f, f_o = trained(clip).encode_image_and_object(IMAGES)
        f_before, f_o_before = prepared(clip).encode_image_and_object(IMAGES)
    assert not torch.allclose(f, f_before, rtol=1e-2) and not torch.allclose(f_o, f_o_before, rtol=1e-2)
    assert not torch.allclose(f_before, clip.encode_image(IMAGES), rtol=1e-2), "even zeros are a token"


# ---- Rollout ----


def test_rollout_is_the_class_row_of_the_full_product_whose_rows_sum_to_one(clip):
    method = trained(clip)
    z, am = method.run_blocks(method.embed(IMAGES))
    for i, image in enumerate(IMAGES):
        literal_z, product, literal_am = literal_walk(clip, image, method.x_fp)
        assert_equal(z[i], literal_z)
        assert_equal(am[i], literal_am)
        for att in product:
            torch.testing.assert_close(att.sum(dim=1), torch.ones(27))
        rest = sum(att[0, 0] + att[0, 26] for att in product)  # class token and prompt
        torch.testing.assert_close(am[i].sum() + rest, torch.tensor(2.0))


def test_rollout_uses_the_weights_of_the_forward_pass(clip, monkeypatch):
    method, rolled, weights = trained(clip), [], Block.attention_weights
    passed = [watch_attention(block, monkeypatch) for block in clip.visual.blocks]
    monkeypatch.setattr(Block, "attention_weights", lambda self, x: rolled.append(weights(self, x)) or rolled[-1])
    method.run_blocks(method.embed(IMAGES))
    assert len(rolled) == 3 and [len(of_one) for of_one in passed] == [1, 1, 1, 0], "one for each of the first L-1"
    for (one,), other in zip(passed[:-1], reversed(rolled), strict=True):
        assert_equal(other, one)


def test_no_gradient_flows_through_the_object(clip):
    method = trained(clip)
    z, am = method.run_blocks(method.embed(IMAGES))
    assert z.requires_grad and not am.requires_grad


@pytest.mark.parametrize("parts", ["fvp+tar", "fvp"])
def test_autograd_stores_no_map_of_all_tokens(parts, clip):
    method, shapes = trained(clip, parts=parts), []

    def maps():
        return [shape for shape in shapes if sum(side in (25, 26, 27) for side in shape) > 1]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        method.loss(IMAGES, LABELS).backward()
        assert len(shapes) > 50 and not maps()
        clip.visual.blocks[0].attention_weights(method.embed(IMAGES)).sum().backward()
        assert maps(), "this is how one would show"


# ---- The object branch ----


def test_a_layer_with_hidden_keys_is_the_layer_on_the_tokens_left(clip):
    method = trained(clip)
    z = method.run_blocks(method.embed(IMAGES))[0]
    light, of_clip = trained(clip, new_layer="light").layer, as_last_block(clip.visual.blocks[0])
    for block, x in itertools.product((method.layer, light, of_clip), (z, 3 * z)):
        mask = torch.rand(3, 27, generator=torch.Generator().manual_seed(7)) < 0.4
        mask[:, 0] = True
        hidden = block(x, mask=mask)[:, 0]
        left = torch.stack([block(x[i : i + 1, mask[i]])[0, 0] for i in range(3)])
        assert_equal(hidden, left)


@pytest.mark.parametrize("kind", [dict(), dict(activation="gelu"), dict(vision_heads=1)], ids=str)
def test_the_object_of_all_patches_and_a_fresh_copy_give_the_image_feature(kind, weights, monkeypatch):
    method = prepared(CLIP.from_state_dict(weights, **kind))
    method.x_fp.data.normal_()
    assert_differs(*method.encode_image_and_object(IMAGES))
    monkeypatch.setattr(fgvpl, "object_patches", lambda am, region: torch.ones_like(am, dtype=torch.bool))
    f, f_o = method.encode_image_and_object(IMAGES)
    assert_equal(f_o, f)


def test_the_new_layer_is_a_copy_and_not_the_layer_itself(clip):
    method, last = prepared(clip), clip.visual.blocks[-1]
    for (key, ours), theirs in zip(method.layer.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), key
    assert method.layer(torch.rand(2, 27, 128)).shape == (2, 1, 128), "only the class token is computed"


def test_the_light_layer_is_random_with_one_head_and_follows_the_seed(clip):
    one, same = (prepared(clip, new_layer="light").layer for _ in range(2))
    other = FGVPL(clip, NAMES, new_layer="light").layer
    assert one.attn.heads == 1 and isinstance(one.mlp["c_proj"], nn.Identity)
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight"):
        ours = one.get_parameter(name)
        assert torch.equal(ours, same.get_parameter(name)) and not torch.equal(ours, other.get_parameter(name))
        assert ours.isfinite().all() and 0.01 < float(ours.detach().std()) < 0.2


# ---- Limits ----


def test_without_prompt_adapters_cache_and_object_it_is_zero_shot_clip(clip, monkeypatch):
    method, expected = trained(clip, alpha=0.0, lam=0.0, beta=0.0), zero_shot(clip)
    run_block, run_last_block = Block.forward, LastBlock.forward
    assert_differs(method(IMAGES), expected)

    def block_without_prompt(self, x, prompts=None):
        return torch.cat([run_block(self, x[:, :26], prompts), x[:, 26:]], dim=1)

    def last_block_without_prompt(self, x, prompts=None, mask=None):
        seen = (torch.arange(27) < 26).expand(len(x), -1)
        return run_last_block(self, x, prompts, seen if mask is None else mask & seen)

    monkeypatch.setattr(Block, "forward", block_without_prompt)
    monkeypatch.setattr(LastBlock, "forward", last_block_without_prompt)
    assert_equal(method(IMAGES), expected)


@pytest.mark.parametrize("options", [dict(parts="tar", alpha=0.0, lam=0.0), dict(parts="tip", lam=0.0),
                                     dict(parts="tip-f", lam=0.0)], ids=str)
def test_without_adapters_and_cache_it_is_zero_shot_clip(options, clip):
    assert_equal(trained(clip, **options)(IMAGES), zero_shot(clip))


def test_tip_adapter_with_one_shot_adds_lam_times_its_similarity(clip):
    method = FGVPL(clip, NAMES, parts="tip", lam=2.0, cache_views=1)
    method.prepare(Batches(VIEWS[:1], torch.arange(7) % 5))
    added = method(VIEWS[0][:1]) - zero_shot(clip, VIEWS[0][:1])
    s = unit(clip.encode_image(VIEWS[0])) @ unit(clip.encode_image(VIEWS[0][:1]))[0]
    expected = 2 * torch.exp(-(1 - s))
    torch.testing.assert_close(added[0, 2], expected[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(added[0, 0], 2 + expected[5], rtol=0, atol=1e-4)  # itself, at a cosine of 1, and another


# ---- Otsu's threshold ----


def assert_otsu(am):
    """Maps of whole numbers from 0 to 256, where 255 times the share of the range is exact in fp32."""
    for ours, one in zip(above_otsu(am).tolist(), am.int().tolist(), strict=True):
        assert ours == literal_above(one), one


def test_otsu_on_every_3x3_map_of_three_values():
    assert_otsu(torch.cartesian_prod(*[torch.arange(3.0)] * 9))


@pytest.mark.parametrize("side, number", [(2, 40), (7, 20), (14, 8), (24, 4)])
@pytest.mark.parametrize("steps", [1, 4, 16, 256])
def test_otsu_on_random_maps(side, number, steps):
    am = torch.randint(0, steps + 1, (number, side**2), generator=torch.Generator().manual_seed(side)).float()
    am[:, 0], am[:, -1] = 0, steps
    assert_otsu(am[:, torch.randperm(side**2, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("side", [7, 14])
def test_otsu_does_not_depend_on_scale_and_offset(side):
    am = torch.rand(20, side**2, generator=torch.Generator().manual_seed(1)).mul(256).round() / 256
    am[:, 0], am[:, 1] = 0, 1
    for other in (am * 2**-20, am * 2**20, am / 4 + 8):
        assert torch.equal(above_otsu(other), above_otsu(am))


EQUAL = [  # how many patches at which of 256 levels: two thresholds are equally good
    {0: 1, 127: 20, 128: 20, 255: 1}, {0: 64, 119: 90, 255: 42}, {0: 132, 119: 22, 255: 42},
]  # fmt: skip


@pytest.mark.parametrize("counts", EQUAL, ids=str)
def test_otsu_takes_the_lowest_of_equally_good_thresholds(counts):
    levels = [level for level, count in counts.items() for _ in range(count)]
    assert threshold_by_search(tuple(levels)) == 0
    am = torch.tensor([min(level + 0.25, 255) if level else 0 for level in levels])
    assert above_otsu(am.unsqueeze(0))[0].tolist() == [level > 0 for level in levels]


SLOPE = torch.linspace(0, 1, 49).unsqueeze(0)
NO_CONTRAST = dict(
    zeros=0 * SLOPE, constant=0 * SLOPE + 0.3, nan=SLOPE * math.nan, inf=0 * SLOPE + math.inf, one=torch.ones(1, 1),
    one_nan=torch.where(SLOPE == 1, math.nan, SLOPE), one_inf=torch.where(SLOPE == 0, math.inf, SLOPE),
    one_minus_inf=torch.where(SLOPE == 0.5, -math.inf, SLOPE), all=torch.tensor([[-math.inf, math.inf, 0, math.nan]]),
)


@pytest.mark.parametrize("am", NO_CONTRAST.values(), ids=NO_CONTRAST)
@pytest.mark.parametrize("region", ["component", "bbox"])
def test_a_map_without_contrast_or_not_finite_gives_all_patches(am, region):
    assert not above_otsu(am).any() and object_patches(am, region).all()
    if am.shape == SLOPE.shape:
        ours, all_patches = object_patches(torch.cat([SLOPE, am, SLOPE])), torch.ones(1, 49, dtype=torch.bool)
        assert torch.equal(ours, torch.cat([object_patches(SLOPE), all_patches, object_patches(SLOPE)]))
        assert not ours[0].all(), "its neighbours stay as they are"


# ---- The largest region ----


def assert_regions(mask, am):
    ours = largest_component(mask, am).tolist()
    for one, theirs, attention in zip(ours, mask.tolist(), am.tolist(), strict=True):
        assert one == literal_largest(theirs, attention)


def every_3x3_mask():
    return torch.cartesian_prod(*[torch.tensor([False, True])] * 9)


def test_the_largest_region_of_every_3x3_mask():
    mask = every_3x3_mask()
    for seed in range(2):  # the attention that decides between equals
        assert_regions(mask, torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("mask, am", list(random_masks()), ids=lambda t: f"{t.sum():.0f} of {t.shape[1]}")
def test_the_largest_region_of_random_masks(mask, am):
    assert_regions(mask, am)


@pytest.mark.parametrize("side", [7, 14, 24])
def test_the_largest_region_may_be_a_long_snake(side):
    """Rows joined at alternating ends; beside it the same with a gap, which leaves its longer half."""
    grid = torch.zeros(side, side, dtype=torch.bool)
    grid[::2] = True
    grid[1:-1:4, -1] = grid[3:-1:4, 0] = True
    gap = grid.clone()
    gap[side // 2 // 2 * 2, side // 2] = False
    mask, am = torch.stack([grid.flatten(), gap.flatten()]), torch.rand(2, side**2)
    assert len(literal_regions(mask[0].tolist())) == 1 and len(literal_regions(mask[1].tolist())) == 2
    assert_regions(mask, am)
    assert torch.equal(largest_component(mask, am)[0], mask[0])


def test_of_equally_large_regions_that_with_the_highest_attention_counts():
    mask, am = on({0, 3, 2, 5}), torch.zeros(1, 9)
    for place in (0, 3, 2, 5):
        am.zero_()[0, place] = 1
        assert torch.equal(largest_component(mask, am), on({0, 3} if place in (0, 3) else {2, 5}))
    am.zero_()[0, 4] = 9  # outside the mask
    assert int(largest_component(mask, am).sum()) == 2


def test_a_corner_connects_and_the_edge_of_the_picture_does_not():
    assert torch.equal(largest_component(on({0, 4, 8, 2}), torch.rand(1, 9)), on({0, 2, 4, 8}))
    assert torch.equal(largest_component(on({2, 3, 6}), torch.rand(1, 9)), on({3, 6})), "2 and 3 lie on different rows"


@pytest.mark.parametrize("mask", [every_3x3_mask(), *(mask for mask, _ in random_masks((7, 14), (0.0, 0.02, 0.1)))])
def test_the_bounding_box(mask):
    assert bounding_box(mask).tolist() == [literal_box(one) for one in mask.tolist()]


@pytest.mark.parametrize("region", ["component", "bbox"])
def test_the_object_of_every_binary_3x3_map(region):
    am = every_3x3_mask().int()
    theirs = [literal_object(one, region) for one in am.tolist()]
    ours = object_patches(am.float(), region)
    assert ours.any(dim=1).all(), "never empty"
    assert [row.nonzero().flatten().tolist() for row in ours] == theirs


@pytest.mark.parametrize("region", ["component", "bbox"])
def test_a_batch_of_maps_gives_what_each_gives_alone(region):
    for am in (am * mask for mask, am in random_masks((7, 14))):
        ours = object_patches(am, region)
        assert ours.any(dim=1).all()
        assert torch.equal(ours, torch.cat([object_patches(one.unsqueeze(0), region) for one in am]))


def test_a_batch_gives_what_its_pictures_give_alone(clip):
    method = trained(clip)
    with torch.no_grad():
        assert_equal(method(IMAGES), torch.cat([method(image.unsqueeze(0)) for image in IMAGES]))


# ---- The cache ----


@pytest.mark.parametrize("parts, streams", [("fvp+tar", 2), ("tar", 1), ("tip", 1), ("tip-f", 1)])
def test_the_cache_is_the_mean_over_the_views_of_what_clip_alone_sees(parts, streams, clip, literal_keys):
    method = prepared(clip, parts=parts)
    assert method.keys.shape == (streams, 7, 64)
    for ours, theirs in zip(method.keys, literal_keys["component"], strict=False):
        assert_equal(ours, theirs)
    plain = unit(sum(clip.encode_image(view) for view in VIEWS))
    assert_equal(method.keys[0], plain)
    assert torch.equal(method.labels, SHOTS)


@pytest.mark.parametrize("region", ["component", "bbox"])
def test_the_learned_prompt_and_layer_do_not_touch_the_cache(region, clip, literal_keys):
    method = trained(clip, region=region)
    keys = method.keys.clone()
    method.prepare(Batches())
    assert torch.equal(method.keys, keys)
    assert_equal(keys[1], literal_keys[region][1])


@pytest.mark.parametrize("parts", PARTS)
def test_prepare_walks_through_the_pictures_once_for_every_view(parts, clip):
    for views in (1, 2, 3):
        batches = Batches()
        FGVPL(clip, NAMES, parts=parts, cache_views=views).prepare(batches)
        assert batches.walks == (0 if parts == "fvp" else views)
    assert FGVPL(clip, NAMES).cache_views == 10


def test_how_the_pictures_are_split_into_batches_does_not_matter(clip):
    keys = []
    for size in (1, 3, 7):
        method = FGVPL(clip, NAMES, cache_views=2)
        method.prepare(Batches(size=size))
        keys.append(method.keys)
    assert_equal(keys[0], keys[1])
    assert_equal(keys[2], keys[1])


@pytest.mark.parametrize("parts", ["fvp+tar", "tar", "tip", "tip-f"])
def test_keys_carry_no_gradient_to_the_encoder_and_only_tip_f_learns_them(parts, clip):
    method = prepared(clip, parts=parts)
    assert method.keys.grad_fn is None and method.keys.is_leaf
    assert method.keys.requires_grad == ("keys" in learned(method)) == (parts == "tip-f")
    before = method.keys.detach().clone()
    if parts != "tip":
        train_step(method)
        method.eval()(IMAGES)
    assert torch.equal(method.keys, before) == (parts != "tip-f") and torch.equal(method.labels, SHOTS)


def test_prepare_again_begins_anew(clip):
    method = prepared(clip)
    method.prepare(Batches([view[:4] for view in VIEWS], SHOTS[:4]))
    assert method.keys.shape == (2, 4, 64) and torch.equal(method.labels, SHOTS[:4])
    torch.testing.assert_close(method.keys.norm(dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize("options", [dict(parts=parts) for parts in PARTS] + [
    dict(share_adapters=False), dict(new_layer="light")], ids=str)
def test_what_was_learned_comes_back_with_the_cache(options, clip):
    method, other = trained(clip, **options), FGVPL(clip, NAMES, **options).eval()
    tensors = {name: tensor.clone() for name, tensor in method.learned().items()}
    assert tensors.keys() == learned(method).keys() | ({"keys", "labels"} if options.get("parts") != "fvp" else set())
    other.load_learned(tensors)
    assert torch.equal(other(IMAGES), method(IMAGES)) and learned(other).keys() == learned(method).keys()
    assert {name: tensor.dtype for name, tensor in other.learned().items()} == {
        name: tensor.dtype for name, tensor in tensors.items()}


@pytest.mark.parametrize("parts", ["fvp+tar", "tip-f"])
@pytest.mark.parametrize("keys, labels", [((1, 7, 64), (7,)), ((2, 7, 64), (6,)), ((2, 7, 32), (7,)), ((2, 7), (7,)),
                                          ((3, 7, 64), (7,)), ((7, 64), ()), ((), (7, 1))], ids=str)
def test_a_cache_of_a_wrong_shape_is_refused(parts, keys, labels, clip):
    method = prepared(clip, parts=parts)
    if parts == "tip-f" and keys == (1, 7, 64):
        keys = (2, 7, 64)
    tensors = method.learned() | dict(keys=torch.zeros(keys), labels=torch.zeros(labels, dtype=torch.long))
    with pytest.raises(UserError, match="do not fit FGVPL"):
        FGVPL(clip, NAMES, parts=parts).load_learned(tensors)


def test_an_empty_cache_adds_nothing_and_comes_back(clip):
    method = FGVPL(clip, NAMES, parts="tip", lam=5.0)
    assert_equal(method(IMAGES), zero_shot(clip))
    other = prepared(clip, parts="tip", lam=5.0)
    other.load_learned(method.learned())
    assert_equal(other(IMAGES), zero_shot(clip))


@pytest.mark.parametrize("parts", ["fvp+tar", "tar", "tip", "tip-f"])
def test_for_other_classes_the_cache_keeps_the_pictures_of_the_columns(parts, clip):
    method = trained(clip, parts=parts)
    with pytest.raises(UserError, match="cache.*parts=fvp"):
        method.for_classes(["cat", "ox"])
    before, keys = method(IMAGES).detach(), method.keys.detach().clone()
    other = method.for_classes(["a hound", "a ray", "a cat"], [2, 1, 0])
    kept = torch.tensor([0, 1, 2, 3, 6])  # those of 2, 2, 0, 1 and 0
    assert torch.equal(other.keys, keys[:, kept]) and other.labels.tolist() == [0, 0, 2, 1, 2]
    assert other.keys.requires_grad == (parts == "tip-f") and other.clip is method.clip
    assert torch.equal(method(IMAGES), before) and torch.equal(method.keys, keys), "the original stays as it is"
    same = method.for_classes([NAMES[c] for c in (2, 1, 0)], [2, 1, 0])
    assert_equal(same(IMAGES), before[:, [2, 1, 0]])


def test_without_a_cache_other_classes_need_no_columns(clip):
    method = trained(clip, parts="fvp")
    assert_equal(method.for_classes(NAMES[3:])(IMAGES), method(IMAGES)[:, 3:])


# ---- The search ----


class Val(list):
    """Batches of validation pictures that count how often they are walked through."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


def validation(seed=5):
    images = picture(40, 7) + 0.8 * picture(40, 7, seed=seed)
    return Val(zip(images.split(4), SHOTS.split(4), strict=True))


def literal_search(method, val, sharpnesses, max_lam):
    """Tip-Adapter's two loops -> the best (sharpness, lam), of equals the first; the accuracy of each."""
    logits, features, labels = method.clip.logits, [], torch.cat([labels for _, labels in val])
    features = torch.cat([method.clip.encode_image(images) for images, _ in val])
    one_hot, cosines = torch.eye(len(NAMES))[SHOTS], unit(features) @ method.keys[0].detach().T
    found, right = (), {}
    for sharpness in sharpnesses:
        cache = (-sharpness * (1 - cosines)).exp() @ one_hot
        for i in range(20):
            lam = 0.1 + i * (max_lam - 0.1) / 20
            predicted = (logits(features, method.zero_shot) + lam * cache).argmax(dim=1)
            right[sharpness, lam] = int((predicted == labels).sum())
            if not found or right[sharpness, lam] > right[found]:
                found = sharpness, lam
    return found, right


@pytest.mark.parametrize("parts", ["tip", "tip-f"])
def test_the_search_is_tip_adapters_two_loops(parts, clip):
    clip.logit_scale.data.fill_(1.0)  # so that the cache decides
    method = trained(clip, parts=parts, search=True, max_lam=13.0, max_sharpness=30.0)
    val = validation()
    expected, right = literal_search(method, val, [0.1 + i * (30 - 0.1) / 200 for i in range(200)], 13.0)
    assert len(set(right.values())) > 1 and expected not in ((0.1, 0.1), (1.0, 1.0)), "the pictures must tell"
    keys = method.keys.detach().clone()
    val.walks = 0
    method.finish(val)
    assert (float(method.sharpness), float(method.lam)) == pytest.approx(expected, rel=1e-5)
    assert val.walks == 1 and torch.equal(method.keys, keys)
    found = sum(int((method(images).argmax(1) == labels).sum()) for images, labels in val)
    assert found == right[expected] == max(right.values())


@pytest.mark.parametrize("parts", ["fvp+tar", "tar"])
def test_fg_vpl_searches_lambda_alone_among_the_same_values(parts, clip):
    clip.logit_scale.data.fill_(1.0)
    method, val = trained(clip, parts=parts, search=True, max_lam=13.0), validation()
    right = []
    for i in range(20):
        method.lam.fill_(0.1 + i * (13 - 0.1) / 20)
        right.append(sum(int((method(images).argmax(1) == labels).sum()) for images, labels in val))
    assert len(set(right)) > 1
    method.finish(val)
    assert float(method.lam) == pytest.approx(0.1 + right.index(max(right)) * 12.9 / 20) and method.sharpness == 1


@pytest.mark.parametrize("options, val", [(dict(search=True), []), (dict(search=True, parts="tip"), ()),
                                          (dict(), validation()), (dict(parts="tip"), validation()),
                                          (dict(search=True, parts="fvp"), validation())], ids=str)
def test_without_a_search_or_pictures_the_constants_stay(options, val, clip):
    method = trained(clip, lam=0.7, sharpness=1.5, **options)
    before = method(IMAGES)
    method.finish(val)
    assert (float(method.lam), float(method.sharpness)) == pytest.approx((0.7, 1.5)) and before.equal(method(IMAGES))
    saved = {"lam", "sharpness"} & method.learned().keys()
    assert saved == ({"lam", "sharpness"} if options.get("search") else set())


def test_what_was_found_is_saved_and_goes_along_to_other_classes(clip):
    method = trained(clip, parts="tip", search=True)
    method.lam.fill_(7.5)
    method.sharpness.fill_(3.25)
    other = FGVPL(clip, NAMES, parts="tip", search=True, lam=2.0).eval()
    other.load_learned({name: tensor.clone() for name, tensor in method.learned().items()})
    assert (float(other.lam), float(other.sharpness)) == (7.5, 3.25) and other(IMAGES).equal(method(IMAGES))
    some = method.for_classes([NAMES[4], NAMES[2]], [4, 2])
    assert (float(some.lam), float(some.sharpness)) == (7.5, 3.25)
    assert_equal(some(IMAGES), method(IMAGES)[:, [4, 2]])


# ---- What learns ----


LEARNED = {
    "fvp+tar": {"x_fp", "layer", "p", "q"}, "fvp": {"x_fp", "layer"}, "tar": {"p", "q"}, "tip": set(),
    "tip-f": {"keys"},
}


@pytest.mark.parametrize("options", [dict(parts=parts) for parts in PARTS] + [
    dict(new_layer="light"), dict(share_adapters=False)], ids=str)
def test_only_the_method_learns_and_all_of_it_gets_a_gradient(options, clip):
    clip.requires_grad_(True)
    method, weights = prepared(clip, **options), copy.deepcopy(clip.state_dict())
    before = {name: p.detach().clone() for name, p in learned(method).items()}
    assert {name.split(".")[0] for name in before} == LEARNED[options.get("parts", "fvp+tar")]
    assert all(p.dtype == torch.float32 for p in learned(method).values())
    assert not any(p.requires_grad for p in clip.parameters())
    if before:
        train_step(method)
    assert all(p.grad.abs().max() > 0 and not torch.equal(p, before[name]) for name, p in learned(method).items())
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())


@pytest.mark.parametrize("options, shared, number", [
    (dict(), True, 1), (dict(), False, 2), (dict(parts="tar"), True, 1), (dict(parts="tar"), False, 1)])
def test_one_adapter_each_or_one_for_every_stream(options, shared, number, clip):
    method = FGVPL(clip, NAMES, share_adapters=shared, **options)
    assert len(method.p) == len(method.q) == number


COUNTS = [
    (dict(), 7_613_952), (dict(new_layer="light"), 3_482_112), (dict(parts="fvp"), 7_613_952 - 525_312),
    (dict(parts="tar"), 525_312), (dict(parts="tip"), 0), (dict(parts="tip-f"), 80 * 512),
    (dict(share_adapters=False), 7_613_952 + 525_312),
]  # fmt: skip


@pytest.mark.parametrize("options, count", COUNTS, ids=str)
def test_parameter_counts_on_vit_b(options, count, vit_b):
    method = FGVPL(vit_b, NAMES, **options)
    if method.has_cache:
        method.set_cache(torch.zeros(1 + method.has_object, 80, 512), torch.zeros(80, dtype=torch.long))
    assert sum(p.numel() for p in learned(method).values()) == count
    assert all(f"{n:,}" in FGVPL.__doc__ for n in (7_613_952, 3_482_112, 525_312)) and "n * E" in FGVPL.__doc__


@pytest.mark.parametrize("options", [dict(), dict(new_layer="light"), dict(parts="tip-f")], ids=str)
def test_training_lowers_the_loss(options, clip):
    method = prepared(clip, **options)
    before = float(method.loss(IMAGES, LABELS).detach())
    optimizer = torch.optim.AdamW(learned(method).values(), lr=0.001, eps=1e-4)
    for _ in range(5):
        optimizer.zero_grad()
        method.loss(IMAGES, LABELS).backward()
        optimizer.step()
    assert float(method.loss(IMAGES, LABELS).detach()) < before


# ---- Edges ----


@pytest.mark.parametrize("options", [dict(parts=parts) for parts in PARTS], ids=str)
def test_one_class_one_shot_one_picture(options, clip):
    method = FGVPL(clip, ["cat"], cache_views=1, **options)
    method.prepare(Batches([IMAGES[:1]], LABELS[:1] * 0))
    loss = method.loss(IMAGES[:1], LABELS[:1] * 0)
    assert method(IMAGES[:1]).shape == (1, 1) and float(loss.detach()) == 0
    if learned(method):
        loss.backward()


@pytest.mark.parametrize("value", [0.0, 0.04, math.nan])
def test_maps_without_contrast_make_the_whole_picture_the_object(value, clip, monkeypatch):
    monkeypatch.setattr(FGVPL, "rollout", lambda self, inputs: torch.full((len(inputs[0]), 25), value))
    method = prepared(clip)
    f, f_o = method.encode_image_and_object(IMAGES)
    assert_equal(f_o, f)
    clip_alone = FGVPL(clip, NAMES, parts="tip")
    z = clip_alone.run_blocks(clip_alone.embed(VIEWS[0]))[0]
    patches = Block.forward(clip.visual.blocks[-1], z)[:, 1:].mean(dim=1, keepdim=True)
    assert_equal(method.cache_features(VIEWS[0])[1], clip.visual.project(patches))
    train_step(method)
    assert method(IMAGES).isfinite().all() and all(p.isfinite().all() for p in learned(method).values())


def test_a_picture_of_one_colour_works(clip):
    images = torch.zeros(2, 3, 40, 40)
    method = prepared(clip)
    method.loss(images, LABELS[:2]).backward()
    assert method(images).isfinite().all() and all(p.grad.isfinite().all() for p in learned(method).values())


@pytest.mark.parametrize("options", [dict(), dict(parts="tip-f")], ids=str)
def test_it_runs_on_another_device(options, clip):
    """No forward, no loss, no cache makes a tensor on the CPU."""
    method = copy.deepcopy(trained(clip, **options)).to("meta")
    images, labels = (x.to("meta") for x in (IMAGES, LABELS))
    method.prepare(Batches([view.to("meta") for view in VIEWS], SHOTS.to("meta")))
    loss = method.loss(images, labels)
    if learned(method):
        loss.backward()
    assert method.encode_text().device.type == method(images).device.type == loss.device.type == "meta"
    assert all(part.device.type == "meta" for part in method.attention(images).values())
    assert all(tensor.device.type == "meta" for tensor in method.state_dict().values())


@pytest.mark.parametrize("options", [dict(), dict(new_layer="light", share_adapters=False), dict(parts="tip-f")],
                         ids=str)
def test_half_precision_towers_leave_adapters_logits_and_keys_in_full(options, clip):
    method, dtypes = trained(clip, **options), []
    full, keys = method(IMAGES), method.keys.detach().clone()
    for adapter in (m for name in "pq" for m in getattr(method, name, [])):
        adapter.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.encode_image(IMAGES).dtype == torch.bfloat16
        text, logits = method.encode_text(), method(IMAGES)
        loss = method.loss(IMAGES, LABELS)
        loss.backward()
        method.prepare(Batches())
    assert bool(dtypes) == method.has_adapters and set(dtypes) <= {torch.float32}
    assert text.dtype == logits.dtype == loss.dtype == method.keys.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned(method).values()
               if p is not method.keys)
    torch.testing.assert_close(method.keys.norm(dim=-1), torch.ones(method.keys.shape[:2]))
    assert logits.shape == full.shape and float((method.keys - keys).detach().abs().max()) < 0.5
    assert torch.equal(text, method.encode_text()), "the classifier has not lost a bit"


# ---- The interface ----


@pytest.mark.parametrize("options", [dict(parts=parts) for parts in PARTS], ids=str)
def test_shapes(options, clip):
    method = prepared(clip, **options)
    image, text = method.encode_image(IMAGES), method.encode_text()
    assert image.shape == (3, 64) and text.shape == (5, 64)
    assert method(IMAGES).shape == method(IMAGES, text).shape == (3, 5)
    assert method.loss(IMAGES, LABELS).shape == method.loss(IMAGES, LABELS, epoch=3).shape == ()
    assert [x.shape for x in method.attention(IMAGES).values()] == [(3, 25)] * 3
    assert_equal(method.encode_image_and_object(IMAGES)[0], image)


def test_the_loss_is_cross_entropy(clip):
    method = trained(clip)
    expected = -method(IMAGES).log_softmax(dim=-1)[torch.arange(3), LABELS].mean()
    torch.testing.assert_close(method.loss(IMAGES, LABELS), expected)


@pytest.mark.parametrize("options", [dict(), dict(parts="fvp"), dict(parts="tar"), dict(parts="tip")], ids=str)
def test_text_given_is_used_and_not_encoded_again(options, clip, monkeypatch):
    method = trained(clip, **options)
    text, logits = method.encode_text(), method(IMAGES)
    calls = counted(monkeypatch, method, "encode_text")
    assert torch.equal(method(IMAGES, text), logits) and not calls
    assert torch.equal(method(IMAGES), logits) and calls == [1]


@pytest.mark.parametrize("options", [dict(lam=0.0), dict(parts="fvp"), dict(parts="tar", lam=0.0)], ids=str)
def test_text_given_is_the_classifier_of_every_stream_where_p_is_shared(options, clip):
    method = trained(clip, **options)
    assert_equal(method(IMAGES, method.encode_text().flip(0)), method(IMAGES).flip(1))


def test_two_methods_share_a_clip_that_never_changes(clip):
    before = zero_shot(clip)
    one, two = prepared(clip), prepared(clip, parts="tip-f")
    untouched = two(IMAGES).detach()
    train_step(one)
    assert torch.equal(two(IMAGES), untouched) and torch.equal(zero_shot(clip), before)


def test_a_method_can_be_copied_after_use(clip):
    method = trained(clip)
    method.loss(IMAGES, LABELS).backward()
    assert torch.equal(copy.deepcopy(method)(IMAGES), method(IMAGES))


def test_prompts_to_show_have_the_name(clip):
    assert FGVPL(clip, NAMES, ("{} texture.",)).prompt_texts[1] == "shovel-nosed ray texture."


BAD = [
    (dict(parts="tar+fvp"), r"tar\+fvp.*fvp\+tar, fvp, tar, tip or tip-f"), (dict(parts=""), "choose fvp"),
    (dict(region="contour"), "contour.*component or bbox"), (dict(new_layer="random"), "random.*copy or light"),
    (dict(cache_views=0), "cache_views is 0.*1 or more"), (dict(cache_views=-1), "cache_views is -1.*1 or more"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD, ids=str)
def test_a_wrong_option_says_what_to_choose(options, message, clip):
    with pytest.raises(UserError, match=message):
        FGVPL(clip, NAMES, **options)


# ---- The recipe ----


TIP = {name: dict(lam=lam, max_lam=max_lam, max_sharpness=max_sharpness) for name, lam, max_lam, max_sharpness in (
    ("dtd", 2, 13, 13), ("imagenet", 1.17, 3, 7), ("eurosat", 2, 10, 12))}  # its configuration files
SEVEN = ["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
         "a {} in a video game.", "art of the {}.", "a photo of the small {}."]  # Table 1
EPOCHS = [
    ({}, 100, 50, 400), (dict(parts="fvp+tar"), 100, 50, 400), (dict(parts="fvp"), 100, 50, 400),
    (dict(parts="tar", beta=0.3), 100, 50, 400), (dict(parts="tip"), 0, 0, 0), (dict(parts="tip-f"), 20, 20, 100),
]  # fmt: skip


@pytest.mark.parametrize("options, dtd, imagenet, eurosat", EPOCHS, ids=str)
@pytest.mark.parametrize("shots", [0, 1, 16])
def test_the_recipe_is_the_papers(options, dtd, imagenet, eurosat, shots):
    names = ("dtd", "imagenet", "eurosat")
    resolved = [settings.resolve_recipe(FGVPL.recipe, options, name, shots) for name in names]
    recipes, of_data = zip(*resolved, strict=True)
    assert of_data == tuple(TIP[name] if "tip" in options.get("parts", "") else {} for name in names)
    assert [recipe["epochs"] for recipe in recipes] == [dtd, imagenet, eurosat]
    assert [list(recipe.get("templates", [])) for recipe in recipes] == [[], SEVEN, []]
    for recipe in recipes:
        assert (recipe["optimizer"], recipe["lr"], recipe["cosine"]) == ("adamw", 0.001, "steps")
        assert (recipe["batch_size"], recipe["drop_last"], recipe["warmup_epochs"]) == (256, False, 0)
        assert (recipe["eps"], recipe["weight_decay"], recipe["crop_scale"]) == (1e-4, 0.01, (0.5, 1.0))


def test_tip_adapters_constants_are_those_of_its_configurations():
    alphas = dict(imagenet=1.17, caltech101=3, dtd=2, eurosat=2, fgvc_aircraft=5, food101=1.17, oxford_flowers=10,
                  oxford_pets=1.17, stanford_cars=3, sun397=1.17, ucf101=3)
    for name, alpha in alphas.items():
        for parts in ("tip", "tip-f"):
            _, options = settings.resolve_recipe(FGVPL.recipe, dict(parts=parts), name, 16)
            assert options["lam"] == alpha <= options["max_lam"] <= options["max_sharpness"] <= 50
            assert options.keys() == {"lam", "max_lam", "max_sharpness"} <= FGVPL.default_options().keys()
        assert settings.resolve_recipe(FGVPL.recipe, dict(parts="tar"), name, 16)[1] == {}
    args = train.parse_arguments(["--set", "parts=tip", "search=true", "sharpness=5.5"])
    options = train.resolve_settings(args, train.METHODS, "oxford_flowers", "fgvpl", 16, 1).options
    assert (options["lam"], options["sharpness"], options["search"], options["max_lam"]) == (10, 5.5, True, 50)


def test_seven_templates_are_averaged_as_unit_features(clip):
    mean = unit(sum(clip.classifier(NAMES, [template]) for template in SEVEN))
    assert_equal(FGVPL(clip, NAMES, fgvpl.SEVEN).zero_shot, mean)


class FewShot:
    """Stands for data.Batches in train.train: three batches an epoch."""

    def __len__(self):
        return 3

    def epoch(self, number, *_):
        return iter([(IMAGES[:2], LABELS[:2])] * 3)


def test_the_rate_follows_one_cosine_over_all_steps(clip, monkeypatch):
    given, rates = {}, []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **constants):
            super().__init__(groups, **constants)
            given.update(constants)

        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    recipe, _ = settings.resolve_recipe(FGVPL.recipe, {}, "dtd", 16)
    machine = Machine(torch.device("cpu"), None, 0)
    train.train(prepared(clip, parts="tar"), FewShot(), recipe | dict(epochs=4), machine)
    expected = [0.001 / 2 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]  # 4 epochs of 3 steps
    assert rates == pytest.approx(expected, rel=1e-9) and given == dict(eps=1e-4, weight_decay=0.01)


# ---- Runs ----


@pytest.mark.parametrize("options, tensors", [
    (dict(), {"x_fp", "layer", "p", "q", "keys", "labels"}), (dict(parts="tip-f"), {"keys", "labels"}),
    (dict(parts="tip"), {"keys", "labels"}),
], ids=lambda value: value.get("parts", "all") if isinstance(value, dict) else "")
def test_a_run_comes_back_with_its_cache(options, tensors, tmp_path, monkeypatch):
    judged, sizes, evaluate, load, loss = [], [], train.evaluate, data.load, FGVPL.loss
    monkeypatch.setattr(train, "evaluate", lambda method, *rest: judged.append(method) or evaluate(method, *rest))
    monkeypatch.setattr(data, "load", lambda *args: replace(b := load(*args), test=b.test[::6]))  # to save time
    monkeypatch.setattr(FGVPL, "loss", lambda self, x, *rest: sizes.append(len(x)) or loss(self, x, *rest))
    pairs = [f"{key}={value}" for key, value in options.items()]
    flags = ["--epochs", "2", "--batch-size", "5"] if options.get("parts") != "tip" else []
    assert train.main(["--method", "fgvpl", "--shots", "1", "--device", "cpu", *flags, "--root", str(tmp_path),
                       "--out", str(tmp_path / "runs"), "--set", "cache_views=2", *pairs]) == 0
    assert sizes == ([5, 5, 2] * 2 if flags else []), "no batch is dropped"
    (prompts,) = tmp_path.glob("runs/shapes/*/tiny_1shot_seed1/prompts.pt")
    saved, result = torch.load(prompts, weights_only=True), json.loads(prompts.with_name("result.json").read_text())
    assert {name.split(".")[0] for name in saved["tensors"]} == tensors  # CLIP's own are not in it
    assert saved["options"] == result["options"] and result["train_images"] == 12
    assert (dict(cache_views=2) | options).items() <= result["options"].items()
    assert (result["trainable_parameters"] == 0) == (result["epochs"] == 0) == (options.get("parts") == "tip")
    loaded, images = train.load_run(prompts.parent, "cpu"), picture(judged[1].clip.visual.resolution, 4)
    assert torch.equal(judged[1](images), loaded(images))
    fresh = FGVPL(loaded.clip, saved["classnames"], saved["templates"], **saved["options"]).eval()
    assert not torch.equal(fresh(images), loaded(images))
