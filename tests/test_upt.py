"""What upt.py promises: Equation 5 line by line, the author's other method as a preset, and the rows of Table 2."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_clip, random_state_dict
from test_clip import assert_equal, picture, plain_block

import train
from clip_min import (
    CLIP,
    Method,
    TextTransformer,
    UserError,
    VisionTransformer,
    tokenize,
)
from coop import CoOp
from support import settings
from support.machine import Machine
from upt import UPT, inter_class_variance, intra_class_variance, variances
from vpt import VPT

NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "St. John's Co.", "ox"]  # of different lengths, one ends in a dot
ALIKE = ["large thing", "large thing on a hill", "large_thing 3"]  # the classes share more than the prompt
MODES, PRESETS = ["attention", "mlp", "shared", "joint"], ["paper", "released"]
ALL = [dict(mode=mode, preset=preset) for mode in MODES for preset in PRESETS]
DEPTHS = [
    dict(depth_text=1), dict(depth_visual=1), dict(depth_text=2, depth_visual=3), dict(depth_text=4, depth_visual=2),
]  # fmt: skip
LABELS = torch.tensor([0, 2, 1, 2])
CPU = Machine(torch.device("cpu"), None, 0)


# ---- Helpers ----


def learned(method):
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def trained(clip, names=NAMES, **options):
    """UPT in eval(), every learned tensor moved away from where it began, biases and LayerNorms too."""
    torch.manual_seed(3)
    method, generator = UPT(clip, names, **options).eval(), torch.Generator().manual_seed(4)
    for p in learned(method).values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return method


def train_step(method, lr=0.01):
    optimizer = torch.optim.SGD(learned(method).values(), lr=lr, weight_decay=0.01)
    method.train().loss(picture(32, 4), LABELS).backward()
    optimizer.step()


def literal_norm(ln, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + ln.eps).sqrt() * ln.weight + ln.bias


def literal_attention(attention, x):
    """Multi-head attention over the rows of x (n, Dt), head by head, with nn.MultiheadAttention's weights."""
    heads = []
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
    for q_h, k_h, v_h in zip(*(t.chunk(attention.num_heads, dim=-1) for t in (q, k, v)), strict=True):
        heads.append((q_h @ k_h.T / math.sqrt(q_h.shape[-1])).softmax(dim=-1) @ v_h)
    return torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias


def literal_ffn(ffn, x):
    return F.linear(F.linear(x, ffn[0].weight, ffn[0].bias).clamp(min=0), ffn[-1].weight, ffn[-1].bias)


def literal_theta(method, mode, preset, u):
    """U^i of one layer (n, Dt) -> transformed (n, Dt)."""
    if mode == "shared":
        return u
    if mode == "mlp":
        return literal_ffn(method.ffn, u)
    if preset == "released":
        alone = torch.cat([literal_attention(method.self_attention, token.unsqueeze(0)) for token in u])
        h = literal_norm(method.ln_1, u + alone)
        return h + literal_ffn(method.ffn, literal_norm(method.ln_2, h))
    u_prime = literal_attention(method.self_attention, u) + literal_norm(method.ln_1, u)
    return literal_ffn(method.ffn, literal_norm(method.ln_2, u_prime)) + literal_norm(method.ln_2, u_prime)


def literal_prompts(method, mode="attention", preset="paper", n_ctx=4, text_scale=1.0, **_):
    """-> two lists, layer by layer: (n_ctx, Dt) and (n_visual, D)."""
    if mode == "joint":
        return [text_scale * t for t in method.ctx], list(method.visual_prompts)
    text, visual = [], []
    for u in method.unified:
        u = literal_theta(method, mode, preset, u)
        u_text, u_visual = (u, u) if mode == "shared" else (u[:n_ctx], u[n_ctx:])
        text.append(text_scale * u_text)
        visual.append(u_visual @ method.to_visual.weight.T + method.to_visual.bias)
    return text, visual


def literal_text(clip, names, prompts, depth):
    """Every class alone, all 77 positions; in front of each of `depth` blocks positions 1 .. n hold its prompts."""
    text, features = clip.text, []
    mask = torch.full((77, 77), -math.inf).triu(1)
    for name in names:
        n = len(prompts[0])
        tokens = tokenize(" ".join(["X"] * n) + f" {name.replace('_', ' ')}.")[0]
        x = text.token_embedding(tokens)
        x = torch.cat([x[:1], prompts[0], x[1 + n :]]) + text.positional_embedding
        for layer, block in enumerate(text.blocks):
            if 0 < layer < depth:
                x = torch.cat([x[:1], prompts[layer], x[1 + n :]])
            x = plain_block(block, x.unsqueeze(0), mask)[0]
        features.append(text.ln_final(x[tokens.argmax()]) @ text.text_projection)
    return torch.stack(features)


def literal_image(clip, images, prompts, depth, before_ln_pre):
    """Prompts between class token and patches; a layer with prompts of its own drops the ones that come out."""
    visual, features = clip.visual, []
    for image in images:
        patches = F.conv2d(image.unsqueeze(0), visual.conv1.weight, stride=visual.patch).flatten(2)[0].T
        s, e = visual.class_embedding + visual.positional_embedding[:1], patches + visual.positional_embedding[1:]
        p = visual.ln_pre(prompts[0]) if before_ln_pre else prompts[0]
        s, e = visual.ln_pre(s), visual.ln_pre(e)
        for layer, block in enumerate(visual.blocks):
            if 0 < layer < depth:
                p = prompts[layer]
            x = plain_block(block, torch.cat([s, p, e]).unsqueeze(0))[0]
            s, p, e = x[:1], x[1 : 1 + len(p)], x[1 + len(p) :]
        features.append(visual.ln_post(s[0]) @ visual.proj)
    return torch.stack(features)


def literal_logits(method, images, names, **options):
    clip, released = method.clip, options.get("preset") == "released"
    text_layers, visual_layers = len(clip.text.blocks), len(clip.visual.blocks)
    depth_text = options.get("depth_text") or (1 if released or options.get("mode") == "joint" else text_layers)
    depth_visual = options.get("depth_visual") or (1 if released else visual_layers)
    text, visual = literal_prompts(method, **options)
    text = F.normalize(literal_text(clip, names, text, depth_text), dim=-1)
    image = F.normalize(literal_image(clip, images, visual, depth_visual, released), dim=-1)
    return clip.logit_scale.exp() * image @ text.T


def assert_same_as_literal(clip, names=NAMES, **options):
    """Logits, and the gradient of every learned tensor, each relative to its own largest value."""
    method, images = trained(clip, names, **options), picture(32, 4)
    literal = literal_logits(method, images, names, **options)
    assert_equal(method(images), literal, 1e-4)
    parameters = learned(method)
    theirs = torch.autograd.grad(F.cross_entropy(literal, LABELS), parameters.values())
    ours = torch.autograd.grad(method.loss(images, LABELS), parameters.values())
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert float(other.abs().max()) > 0, f"{name} has no gradient: the comparison says nothing"
        assert_equal(one, other, 1e-4)


def untouched_copy(method, clip, options):
    """Another UPT with the same learned tensors, that has computed nothing yet."""
    other = UPT(clip, NAMES, **options).eval()
    for p, value in zip(learned(other).values(), learned(method).values(), strict=True):
        p.data = value.detach().clone()
    return other


def moved(method, layer, token):
    """The prompts of both towers before and after one token of one layer changed."""
    with torch.no_grad():
        before = method.tower_prompts()
        method.unified[layer, token] += torch.linspace(-1, 1, method.unified.shape[-1])
        return *before, *method.tower_prompts()


def counted(monkeypatch, owner, name):
    """-> a list that grows by one with every call of owner.name."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


class Batches:
    """Test pictures in batches of two, as data.plain_batches gives them."""

    def __init__(self, images, labels):
        self.images, self.labels, self.walks = images, labels, 0
        self.pictures = SimpleNamespace(items=[("", label) for label in labels.tolist()])

    def __iter__(self):
        self.walks += 1
        return zip(self.images.split(2), self.labels.split(2), strict=True)

    def share(self, rank, processes):
        return iter(self)


@pytest.fixture(scope="module")
def weights():
    return random_state_dict(**TINY)


@pytest.fixture
def clip(weights):
    """A small random CLIP, new for every test, of weights drawn once."""
    return CLIP.from_state_dict(weights)


@pytest.fixture(scope="module")
def vit_b():
    """A CLIP of ViT-B's sizes without any numbers in it: nothing is computed with it."""
    with torch.device("meta"):
        clip = CLIP(VisionTransformer(224, 32, 768, 12, 512), TextTransformer(77, 49408, 512, 12, 512))
    return clip.to_empty(device="cpu")


@pytest.fixture
def tall():
    """Four text layers and three image layers."""
    return random_clip(text_layers=4, vision_layers=3)


# ---- Equation 5 and what goes into the towers ----


@pytest.mark.parametrize("heads", [1, 4])
def test_equation_5_line_by_line(heads, clip):
    method = trained(clip, heads=heads)
    text, visual = method.tower_prompts()
    for layer, u in enumerate(method.unified):
        u_prime = literal_attention(method.self_attention, u) + literal_norm(method.ln_1, u)
        u_hat = literal_ffn(method.ffn, literal_norm(method.ln_2, u_prime)) + literal_norm(method.ln_2, u_prime)
        assert_equal(text[layer], u_hat[:4])
        assert_equal(visual[layer], u_hat[4:] @ method.to_visual.weight.T + method.to_visual.bias)


def test_the_released_block_line_by_line(clip):
    method = trained(clip, preset="released")
    text, visual = method.tower_prompts()
    u, d = method.unified[0], method.unified.shape[-1]
    sa = method.self_attention
    value = u @ sa.in_proj_weight[2 * d :].T + sa.in_proj_bias[2 * d :]  # a token alone has all of the attention
    h = literal_norm(method.ln_1, u + sa.out_proj(value))
    u_hat = h + literal_ffn(method.ffn, literal_norm(method.ln_2, h))
    assert_equal(text[0], u_hat[:4])
    assert_equal(visual[0], u_hat[4:] @ method.to_visual.weight.T + method.to_visual.bias)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_prompts_without_gradients_are_the_same(options, clip):
    """PyTorch computes MultiheadAttention in another way then."""
    method = trained(clip, **options)
    with torch.no_grad():
        without = method.tower_prompts()
    for ours, theirs in zip(without, method.tower_prompts(), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_logits_and_gradients_equal_a_literal_upt(options, precision, clip):
    assert_same_as_literal(clip, **options)


@pytest.mark.parametrize("options", [dict(n_ctx=2, n_visual=5), dict(heads=2), dict(text_scale=0.05)], ids=str)
def test_logits_and_gradients_equal_a_literal_upt_with_other_options(options, precision, clip):
    assert_same_as_literal(clip, **options)


@pytest.mark.parametrize("names", [ALIKE, ["cat"]], ids=["names that begin alike", "one class"])
def test_overwriting_the_context_leaves_what_classes_share_behind_it(names, precision, tall):
    method, images = trained(tall, names), picture(32, 4)
    assert method.layout.n_common > 1 + 4
    assert_equal(method(images), literal_logits(method, images, names), 1e-4)
    if len(names) > 1:  # the loss of a single class is always 0
        assert_same_as_literal(tall, names)


@pytest.mark.parametrize("options", DEPTHS, ids=str)
@pytest.mark.parametrize("mode", ["attention", "joint"])
def test_behind_the_last_layer_with_its_own_prompts_they_travel_on(mode, options, precision, tall):
    assert_same_as_literal(tall, mode=mode, **options)


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_of_both_towers_gets_prompts_of_its_own(mode, tall):
    method = UPT(tall, NAMES, mode=mode)
    assert (method.depth_text, method.depth_visual) == (1 if mode == "joint" else 4, 3)
    text, visual = method.tower_prompts()
    assert len(text) >= method.depth_text and len(visual) >= method.depth_visual


# ---- The presets ----


@pytest.mark.parametrize("token", range(4))
def test_paper_a_text_token_changes_every_visual_prompt_of_its_layer(token, clip):
    _, before, _, after = moved(trained(clip), 1, token)
    assert (before[1] - after[1]).abs().amax(dim=-1).gt(1e-4).all()


@pytest.mark.parametrize("token", range(4))
def test_released_a_text_token_leaves_the_visual_prompts_unchanged(token, clip):
    text, visual, new_text, new_visual = moved(trained(clip, preset="released"), 0, token)
    assert torch.equal(visual, new_visual)
    changed = (text[0] - new_text[0]).abs().amax(dim=-1) > 1e-4
    assert changed.tolist() == [i == token for i in range(4)]


@pytest.mark.parametrize("mode", ["attention", "mlp", "shared"])
def test_layers_never_mix(mode, tall):
    text, visual, new_text, new_visual = moved(trained(tall, mode=mode), 1, 2)
    for before, after in ((text, new_text), (visual, new_visual)):
        rest = torch.arange(len(before)) != 1
        assert_equal(after[rest], before[rest], 1e-6)
    assert not torch.allclose(text[1], new_text[1])


def test_mlp_works_token_by_token(clip):
    text, visual, new_text, new_visual = moved(trained(clip, mode="mlp"), 0, 2)
    assert_equal(visual, new_visual, 1e-6)
    assert (text[0] - new_text[0]).abs().amax(dim=-1).gt(1e-4).tolist() == [False, False, True, False]


def test_shared_gives_both_towers_the_same_tokens(clip):
    method = trained(clip, mode="shared")
    text, visual = method.tower_prompts()
    assert torch.equal(text, method.unified)
    assert_equal(visual, method.to_visual(text))


@pytest.mark.parametrize("mode", MODES)
def test_released_has_one_set_in_front_of_ln_pre_that_travels_on(mode, tall):
    method, images = trained(tall, mode=mode, preset="released"), picture(32, 3)
    text, visual = method.tower_prompts()
    assert len(text) == len(visual) == method.depth_text == method.depth_visual == 1
    vpt = VPT(tall, NAMES, n_visual=4, deep=False, before_ln_pre=True)
    vpt.visual_prompts.data = visual.detach()
    assert_equal(method.encode_image(images), vpt.encode_image(images))
    coop = CoOp(tall, NAMES, n_ctx=4)
    coop.ctx.data = text[0].detach()
    assert_equal(method.encode_text(), coop.encode_text())


# ---- Table 2 ----


def test_joint_is_coop_and_vpt_side_by_side(clip):
    joint, coop, vpt = trained(clip, mode="joint"), CoOp(clip, NAMES, n_ctx=4), VPT(clip, NAMES, n_visual=4)
    coop.ctx.data, vpt.visual_prompts.data = joint.ctx.data[0].clone(), joint.visual_prompts.data.clone()
    images, text = picture(32, 4), coop.encode_text()
    assert_equal(joint.encode_text(), text)
    assert_equal(joint.encode_image(images), vpt.encode_image(images))
    assert_equal(joint(images), vpt(images, text))
    ours = torch.autograd.grad(joint.loss(images, LABELS), [joint.ctx, joint.visual_prompts])
    theirs = torch.autograd.grad(F.cross_entropy(vpt(images, text), LABELS), [coop.ctx, vpt.visual_prompts])
    assert_equal(ours[0][0], theirs[0])
    assert_equal(ours[1], theirs[1])


COUNTS = [
    (dict(), 2_021_120), (dict(preset="released"), 1_976_064), (dict(mode="mlp"), 968_448),
    (dict(mode="shared"), 418_560), (dict(mode="joint"), 38_912),
]  # fmt: skip


@pytest.mark.parametrize("options, count", COUNTS, ids=str)
def test_parameter_counts_on_vit_b(options, count, vit_b):
    assert sum(p.numel() for p in learned(UPT(vit_b, NAMES, **options)).values()) == count
    assert f"{count:,}" in UPT.__doc__


def test_unified_prompts_begin_small_and_follow_the_seed(vit_b):
    torch.manual_seed(1)
    one = UPT(vit_b, NAMES).unified.detach()
    torch.manual_seed(1)
    assert torch.equal(one, UPT(vit_b, NAMES).unified)
    assert not torch.equal(one, UPT(vit_b, NAMES).unified)
    assert float(one.std()) == pytest.approx(0.02, rel=0.05) and abs(float(one.mean())) < 1e-3


# ---- text_scale ----


@pytest.mark.parametrize("options", ALL, ids=str)
def test_text_scale_multiplies_the_text_prompts_only(options, clip):
    (text, visual), (small, same) = (trained(clip, text_scale=s, **options).tower_prompts() for s in (1.0, 0.05))
    assert_equal(small, 0.05 * text, 1e-6)
    assert torch.equal(same, visual)


def test_text_scale_changes_the_classifier_and_still_learns(clip):
    plain, small = trained(clip), trained(clip, text_scale=0.05)
    assert not torch.allclose(plain.encode_text(), small.encode_text(), rtol=1e-2)
    before = float(small.loss(picture(32, 4), LABELS).detach())
    for _ in range(3):
        train_step(small, lr=0.002)
    assert float(small.eval().loss(picture(32, 4), LABELS).detach()) < before


# ---- What is computed, and how often ----


@pytest.mark.parametrize("options", ALL, ids=str)
def test_theta_runs_once_per_training_step(options, clip, monkeypatch):
    method = UPT(clip, NAMES, **options)
    calls = counted(monkeypatch, method, "tower_prompts")
    for steps in (1, 2):
        method.loss(picture(32, 4), LABELS).backward()
        assert len(calls) == steps


def test_both_towers_see_the_same_dropout(clip, monkeypatch):
    method, seen = UPT(clip, NAMES).train(), []
    monkeypatch.setattr(method, "encode_text_with", lambda prompts: seen.append(prompts) or torch.ones(5, 64))
    monkeypatch.setattr(method, "encode_image_with", lambda prompts, images: seen.append(prompts) or torch.ones(4, 64))
    torch.manual_seed(1)
    method(picture(32, 4))
    torch.manual_seed(1)
    for ours, theirs in zip(seen, method.tower_prompts(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_an_evaluation_encodes_the_text_once(options, clip, monkeypatch):
    method = UPT(clip, NAMES, **options)
    text = counted(monkeypatch, method, "encode_text_with")
    batches = Batches(picture(32, 6), torch.zeros(6, dtype=torch.long))
    train.evaluate(method, batches, CPU)
    assert len(text) == 1 and batches.walks == 1


def test_text_given_is_used_and_not_encoded_again(clip, monkeypatch):
    method, images = trained(clip), picture(32, 3)
    text, logits = method.encode_text(), method(images)
    calls = counted(monkeypatch, method, "encode_text_with")
    assert torch.equal(method(images, text), logits) and not calls
    assert_equal(method(images, text.flip(0)), logits.flip(1))
    assert not calls and torch.equal(method(images), logits) and len(calls) == 1


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_step_that_follows_an_evaluation_uses_the_prompts_of_today(options, clip):
    method = UPT(clip, NAMES, **options)
    with torch.no_grad():
        method.eval().encode_text()
    train_step(method)
    assert all(p.grad is not None for p in learned(method).values())
    text = method.eval().encode_text()
    assert torch.equal(method(picture(32, 3), text), untouched_copy(method, clip, options)(picture(32, 3)))


def test_the_image_tower_without_prompts_never_runs(clip, monkeypatch):
    method = UPT(clip, NAMES)
    calls = [counted(monkeypatch, owner, name) for owner, name in ((clip, "encode_image"), (clip.visual, "forward"))]
    layers = counted(monkeypatch, clip.visual.blocks[0], "forward")
    method.loss(picture(32, 4), LABELS).backward()
    method(picture(32, 4), method.encode_text())
    assert calls == [[], []] and len(layers) == 2


def test_the_loss_is_cross_entropy(clip):
    method = trained(clip)
    expected = -method(picture(32, 4)).log_softmax(dim=-1)[torch.arange(4), LABELS].mean()
    torch.testing.assert_close(method.loss(picture(32, 4), LABELS), expected)


# ---- Dropout ----


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_in_training_only(preset, clip):
    method = trained(clip, preset=preset)
    images = picture(32, 3)
    assert torch.equal(method(images), method(images))
    method.train()
    assert not torch.equal(method(images), method(images))
    assert torch.equal(method.eval()(images), method(images))


@pytest.mark.parametrize("preset, branches", [("paper", 0), ("released", 2)])
def test_dropout_acts_on_attention_ffn_and_in_released_on_both_branches(preset, branches, clip, monkeypatch):
    method = trained(clip, preset=preset).train()
    assert method.self_attention.dropout == method.ffn[2].p == method.dropout.p == 0.1
    calls = counted(monkeypatch, method.dropout, "forward")
    method.tower_prompts()
    assert len(calls) == branches
    method.self_attention.dropout = method.ffn[2].p = method.dropout.p = 0.0
    for owner, name in ((method.self_attention, "dropout"), (method.ffn[2], "p")):
        without = method.tower_prompts()[0]
        setattr(owner, name, 0.5)
        assert not torch.allclose(method.tower_prompts()[0], without)
        setattr(owner, name, 0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_dropout_is_training_as_in_evaluation(preset, clip):
    method = trained(clip, preset=preset, dropout=0.0)
    evaluated = method(picture(32, 3))
    assert_equal(method.train()(picture(32, 3)), evaluated)


@pytest.mark.parametrize("mode", ["mlp", "shared", "joint"])
def test_other_modes_have_no_dropout(mode, clip):
    method = UPT(clip, NAMES, mode=mode).train()
    assert torch.equal(method(picture(32, 3)), method(picture(32, 3)))


@pytest.mark.parametrize("options", ALL, ids=str)
def test_two_seeds_differ_and_a_seed_repeats(options, clip):
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(float(UPT(clip, NAMES, **options).train().loss(picture(32, 4), LABELS).detach()))
    assert losses[0] == losses[2] != losses[1]


# ---- What learns ----


@pytest.mark.parametrize("options", ALL, ids=str)
def test_only_the_method_learns_and_all_of_it_gets_a_gradient(options, clip):
    clip.requires_grad_(True)
    method = UPT(clip, NAMES, **options)
    assert not any(name.startswith("clip.") for name in learned(method))
    method.train().loss(picture(32, 4), LABELS).backward()
    assert all(p.grad is None for p in clip.parameters())
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in learned(method).values())
    for name in ("unified", "ctx", "visual_prompts"):  # every token of every layer
        assert name not in learned(method) or getattr(method, name).grad.abs().sum(dim=-1).gt(0).all()


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_step_changes_what_learns_and_not_a_bit_of_clip(options, clip):
    method, weights = UPT(clip, NAMES, **options), copy.deepcopy(clip.state_dict())
    before = {name: p.detach().clone() for name, p in learned(method).items()}
    buffers = [b.clone() for b in method.buffers()]
    train_step(method)
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())
    assert all(torch.equal(b, old) for b, old in zip(method.buffers(), buffers, strict=True))
    assert not any(torch.equal(p, before[name]) for name, p in learned(method).items())


@pytest.mark.parametrize("options", ALL, ids=str)
def test_half_precision_towers_give_finite_full_precision_gradients(options, clip):
    method = trained(clip, **options)
    full = method(picture(32, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(method(picture(32, 4)), full, 0.2)
        method.train().loss(picture(32, 4), LABELS).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned(method).values())


# ---- Appendix A ----


def features_and_labels():
    features = picture(8, 9)[:, 0].flatten(1)[:, :16] * torch.arange(1, 10).unsqueeze(1)
    return features, torch.tensor([7, 2, 2, 7, 7, 2, 2, 0, 7])  # class 0 has a single picture


def test_intra_class_variance_equals_slow_loops():
    features, labels = features_and_labels()
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in features.tolist()]
    variances = []
    for c in (0, 2, 7):
        rows = [row for row, label in zip(unit, labels.tolist(), strict=True) if label == c]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        distances = [sum((v - m) ** 2 for v, m in zip(row, mean, strict=True)) for row in rows]
        variances.append(sum(distances) / len(rows))
    assert variances[0] == 0, "a single picture does not vary"
    assert float(intra_class_variance(features, labels)) == pytest.approx(sum(variances) / 3, rel=1e-5)


def test_inter_class_variance_equals_slow_loops():
    text, _ = features_and_labels()
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in text.tolist()]
    mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    expected = sum(sum((v - m) ** 2 for v, m in zip(row, mean, strict=True)) for row in unit) / len(unit)
    assert float(inter_class_variance(text)) == pytest.approx(expected, rel=1e-5)


def test_variances_by_hand():
    features = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    assert float(intra_class_variance(features, torch.tensor([0, 0, 1, 1]))) == 0.5  # opposite: 1, alike: 0
    assert float(inter_class_variance(features[:2])) == 1
    assert float(intra_class_variance(features, torch.arange(4))) == float(inter_class_variance(features[2:])) == 0


def test_variances_do_not_depend_on_the_lengths_of_features():
    features, labels = features_and_labels()
    other = features * torch.linspace(0.01, 100, 9).unsqueeze(1)
    torch.testing.assert_close(intra_class_variance(other, labels), intra_class_variance(features, labels))
    torch.testing.assert_close(inter_class_variance(other), inter_class_variance(features))


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_variances_are_those_of_the_methods_features(bf16, clip):
    method, labels, images = trained(clip).train(), torch.tensor([0, 0, 1, 1]), picture(32, 4)
    ours = variances(method, Batches(images, labels), torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    assert not method.training, "without dropout"
    expected = dict(image_within_classes=float(intra_class_variance(method.encode_image(images), labels)),
                    text_between_classes=float(inter_class_variance(method.encode_text())))
    assert ours == pytest.approx(expected, rel=0.1 if bf16 else 1e-5) and min(ours.values()) > 0
    zero_shot = variances(Method(clip, NAMES), Batches(images, labels), torch.autocast("cpu", enabled=False))
    of_images = intra_class_variance(clip.encode_image(images), labels)
    assert zero_shot["image_within_classes"] == pytest.approx(float(of_images))
    assert zero_shot["text_between_classes"] == pytest.approx(float(inter_class_variance(clip.classifier(NAMES))))


# ---- The interface ----


@pytest.mark.parametrize("options", ALL, ids=str)
def test_shapes(options, clip):
    method, images = UPT(clip, NAMES, **options), picture(32, 3)
    assert method.encode_text().shape == (5, 64)
    assert method(images).shape == method(images, method.encode_text()).shape == (3, 5)
    assert method.loss(images, LABELS[:3]).shape == method.loss(images, LABELS[:3], epoch=3).shape == ()


@pytest.mark.parametrize("options", ALL, ids=str)
def test_it_runs_on_another_device(options, clip):
    method = copy.deepcopy(UPT(clip, NAMES, **options)).to("meta")
    images, labels = picture(32, 4).to("meta"), LABELS.to("meta")
    method.loss(images, labels).backward()
    assert method.encode_text().device.type == method(images).device.type == "meta"
    with torch.no_grad():
        assert method.eval()(images, method.encode_text()).shape == (4, 5)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_one_class_is_enough(options, clip):
    method = UPT(clip, ["cat"], **options)
    assert method(picture(32, 2)).shape == (2, 1)
    method.loss(picture(32, 2), torch.zeros(2, dtype=torch.long)).backward()


@pytest.mark.parametrize("options", [dict(), dict(preset="released")], ids=str)
def test_a_thousand_classes(options, clip):
    method = UPT(clip, [f"large thing number {i}" for i in range(1000)], **options)
    method.loss(picture(32, 4), torch.arange(4)).backward()
    assert method(picture(32, 4)).shape == (4, 1000)


def test_a_method_can_be_copied_after_use(clip):
    method = UPT(clip, NAMES)
    method.loss(picture(32, 4), LABELS).backward()
    assert torch.equal(copy.deepcopy(method).eval()(picture(32, 2)), method.eval()(picture(32, 2)))


@pytest.mark.parametrize("mode", MODES)
def test_use_leaves_the_state_dict_as_it_was(mode, clip):
    method = UPT(clip, NAMES, mode=mode)
    before = list(method.state_dict())
    method(picture(32, 2))
    assert list(method.state_dict()) == before


def test_prompts_to_show_have_the_name_and_the_number_of_vectors(clip):
    prompts = UPT(clip, NAMES, n_ctx=3).prompt_texts
    assert len(prompts) == 5 and "3" in prompts[0] and prompts[1].endswith("shovel-nosed ray.")


def test_the_recipe_is_the_papers():
    recipe, options = settings.resolve_recipe(UPT.recipe, {}, "dtd", 16)
    assert (recipe["optimizer"], recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"]) == ("sgd", 0.002, 1, 32)
    assert (recipe["momentum"], recipe["weight_decay"], recipe["crop_scale"]) == (0.9, 5e-4, (0.08, 1.0))
    epochs = [settings.resolve_recipe(UPT.recipe, {}, "dtd", shots)[0]["epochs"] for shots in (1, 2, 4, 8, 16)]
    assert epochs == [50, 100, 100, 200, 200] and options == {}
    assert settings.resolve_recipe(UPT.recipe, {}, "imagenet", 16)[0]["epochs"] == 50


BAD = [
    (dict(mode="both"), "both.*attention, mlp, shared, joint"),
    (dict(preset="official"), "official.*paper, released"),
    (dict(mode="shared", n_ctx=4, n_visual=8), "n_ctx is 4 and n_visual 8.*equal if mode=shared"),
    (dict(n_visual=0), "n_visual 0.*1 or more"), (dict(heads=3), "heads is 3"), (dict(dropout=1.5), "dropout 1.5"),
    (dict(depth_text=0), "depth_text is 0.*1 to 2"), (dict(depth_text=3), "depth_text is 3.*1 to 2"),
    (dict(depth_visual=-1), "depth_visual -1.*1 to 2"), (dict(depth_visual=3), "depth_visual 3.*1 to 2"),
    (dict(n_ctx=80), "tokens long.*shorten"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD, ids=str)
def test_a_wrong_option_says_what_to_choose(options, message, clip):
    with pytest.raises(UserError, match=message):
        UPT(clip, NAMES, **options)
