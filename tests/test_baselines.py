"""What the files in baselines/ promise: the methods equal slow, literal versions of their equations."""

import ast
import copy
import csv
import dataclasses
import importlib
import json
import math
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_clip, random_state_dict
from test_clip import assert_equal, picture, plain_text

import data
import fgvpl
import train
from baselines import linear_probe
from baselines.clip_adapter import CLIPAdapter
from baselines.cocoop import CoCoOp
from baselines.linear_probe import LinearProbe
from baselines.proda import ProDA
from baselines.prograd import ProGrad
from baselines.zeroshot import ZeroShot
from clip_min import CLIP, Method, UserError, encode, preprocess, tokenize
from support import attention, benchmarks, settings

ROOT = Path(__file__).parents[1]
METHODS = dict(cocoop=CoCoOp, prograd=ProGrad, proda=ProDA, clip_adapter=CLIPAdapter, linear_probe=LinearProbe)
NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "St. John's Co.", "ox"]  # of different lengths, one ends in a dot
OTHERS = ["dog", "a large blue whale", "tree"]
SMALL = {ProDA: dict(n_prompts=8, n_per_step=3, n_ctx=5)}


# ---- Helpers ----


def new(method_class, clip, names=NAMES, **options):
    """A method that has moved away from its start, so that nothing is zero or alike by chance."""
    torch.manual_seed(0)
    method = method_class(clip, names, **SMALL.get(method_class, {}) | options)
    generator = torch.Generator().manual_seed(4)
    for p in [p for p in method.parameters() if p.requires_grad] + [getattr(method, "weight", torch.zeros(0))]:
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return method


def literal_prompts(clip, names, ctx, position="end"):
    """ctx (M, D) -> (K, E): [SOS, context and name, ".", EOT] in all 77 positions, class by class."""
    m, prompts, ends = len(ctx), [], []
    for name in (name.replace("_", " ") for name in names):
        tokens = tokenize(f"{' '.join(['X'] * m)} {name}.")
        embedding, length = clip.text.token_embedding(tokens)[0], len(encode(name))
        sos, name, rest = embedding[:1], embedding[1 + m : 1 + m + length], embedding[1 + m + length :]
        parts = {"end": [sos, ctx, name, rest], "front": [sos, name, ctx, rest],
                 "middle": [sos, ctx[: m // 2], name, ctx[m // 2 :], rest]}
        prompts.append(torch.cat(parts[position]))
        ends.append(int(tokens.argmax()))
    return plain_text(clip, torch.stack(prompts), torch.tensor(ends))


def cosines(f, text):
    return F.normalize(f, dim=-1) @ F.normalize(text, dim=-1).T


def literal_cocoop(method, images, names=NAMES):
    clip, logits = method.clip, []
    for f in clip.encode_image(images):
        linear_1, _, linear_2 = method.meta_net
        shift = linear_2(torch.relu(linear_1(f / f.norm())))
        text = literal_prompts(clip, names, method.ctx + shift)
        logits.append(clip.logit_scale.exp() * cosines(f[None], text)[0])
    return torch.stack(logits)


def literal_prompts_of_proda(method, names=NAMES):
    """-> (N, K, E), unit."""
    n = method.n_prompts
    positions = ["front"] * (n // 4) + ["middle"] * (n // 4) + ["end"] * (n - 2 * (n // 4))
    return torch.stack([F.normalize(literal_prompts(method.clip, names, ctx, position), dim=-1)
                        for ctx, position in zip(method.ctx, positions, strict=True)])


def learned(method):
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def batches(clip, n_classes, per_class, seed=0, noise=1.0):
    """Pictures around one picture per class, as two batches. -> [(images, labels), (images, labels)]."""
    generator = torch.Generator().manual_seed(seed)
    resolution = clip.visual.resolution
    centres = torch.randn(n_classes, 3, resolution, resolution, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n_classes).repeat(per_class)
    images = centres[labels] + noise * torch.randn(len(labels), 3, resolution, resolution, generator=generator)
    return list(zip(images.split(7), labels.split(7), strict=True))


# ---- Zero-shot ----


def test_zero_shot_has_the_templates_given_or_tip_adapters_seven(clip):
    images, templates = picture(32, 3), ["{} texture.", "a photo of a {}."]
    assert len(set(fgvpl.SEVEN)) == 7
    assert ZeroShot(clip, NAMES, templates)(images).equal(Method(clip, NAMES, templates)(images))
    method = ZeroShot(clip, NAMES, templates, seven_templates=True)
    unit = [F.normalize(plain_text(clip, clip.text.token_embedding(tokens), tokens.argmax(1)), dim=-1)
            for tokens in (tokenize([text.format(name.replace("_", " ")) for name in NAMES]) for text in fgvpl.SEVEN)]
    assert_equal(method(images), clip.logit_scale.exp() * cosines(clip.encode_image(images), sum(unit)))
    assert method.templates == fgvpl.SEVEN and ZeroShot.recipe == {} and not learned(method)
    assert ZeroShot.default_options() == dict(seven_templates=False)


# ---- CoCoOp ----


def test_cocoop_equals_encoding_every_prompt_of_every_picture_alone_in_full_length(precision, clip):
    method, images, labels = new(CoCoOp, clip), picture(32, 3), torch.tensor([0, 3, 1])
    literal = literal_cocoop(method, images)
    assert_equal(method(images), literal)
    parameters = [*learned(method).values()]
    ours = torch.autograd.grad(method.loss(images, labels), parameters)
    theirs = torch.autograd.grad(F.cross_entropy(literal, labels), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert_equal(one, other, relative=1e-4)


def test_cocoop_without_a_shift_is_the_phrase(clip):
    method, images = CoCoOp(clip, NAMES), picture(32, 3)
    method.meta_net[2].weight.data.zero_()
    method.meta_net[2].bias.data.zero_()
    phrase = clip.logits(clip.encode_image(images), clip.classifier(NAMES, ["a photo of a {}."]))
    assert_equal(method(images), phrase)
    assert_equal(cosines(method.encode_text(), clip.classifier(NAMES)).diagonal(), torch.ones(5))


def test_cocoop_gives_a_picture_the_same_logits_in_any_company(clip):
    method, images = new(CoCoOp, clip), picture(32, 3)
    assert_equal(method(images[1:2], method.encode_text()), method(images)[1:2])
    shifts = method.meta_net(F.normalize(clip.encode_image(images), dim=-1))
    text = [literal_prompts(clip, NAMES, method.ctx + shift) for shift in shifts]
    assert float((text[0] - text[1]).detach().abs().max()) > 1e-3  # the classifiers do depend on the picture


# ---- ProGrad ----


@pytest.mark.parametrize("lam", [1.0, 0.4])
def test_prograd_removes_what_works_against_zero_shot_and_nothing_else(precision, clip, lam):
    method, images = new(ProGrad, clip, lam=lam), picture(32, 4)
    f = clip.encode_image(images)
    knows = (clip.logit_scale.exp() * cosines(f, clip.classifier(NAMES))).softmax(dim=-1)
    rng, conflicts = random.Random(0), []
    for labels in (torch.tensor(rng.choices(range(5), k=4)) for _ in range(20)):
        p = (clip.logit_scale.exp() * cosines(f, literal_prompts(clip, NAMES, method.ctx))).softmax(dim=-1)
        ce = -p[torch.arange(4), labels].log().mean()
        kl = (knows * (knows / p).log()).sum(dim=-1).mean()
        g_d = torch.autograd.grad(ce, method.ctx, retain_graph=True)[0].flatten()
        g_g = torch.autograd.grad(kl, method.ctx)[0].flatten()
        conflicts.append(bool(g_d @ g_g < 0))
        unit = g_g / g_g.norm()
        expected = g_d - lam * (g_d @ unit) * unit if conflicts[-1] else g_d
        loss = method.loss(images, labels)
        assert float(loss.detach()) == pytest.approx(float(ce.detach()), rel=1e-5)
        ours = torch.autograd.grad(3 * loss, method.ctx)[0].flatten() / 3  # as a scaler for fp16 multiplies it
        assert_equal(ours, expected, relative=1e-4)
    assert set(conflicts) == {True, False}


def test_prograd_without_any_gradient_is_not_nan(clip):
    method = ProGrad(clip, ["cat"])  # one class: the logits say nothing
    method.loss(picture(32, 2), torch.zeros(2, dtype=torch.long)).backward()
    assert torch.equal(method.ctx.grad, torch.zeros_like(method.ctx))


def test_prograd_begins_at_random_or_with_words_behind_zeros(clip):
    words = clip.text.token_embedding(tokenize("a photo of a")[0, 1:5])
    method = ProGrad(clip, NAMES, ctx_init="a photo of a")
    assert torch.equal(method.ctx, torch.cat([torch.zeros(12, 64), words]))
    assert method.prompt_texts[0] == "[12 vectors] a photo of a cat."
    assert ProGrad(clip, NAMES, n_ctx=4, ctx_init="a photo of a").prompt_texts[0] == "a photo of a cat."
    assert ProGrad(clip, NAMES, n_ctx=3).prompt_texts[0] == "[3 vectors] cat."
    torch.manual_seed(1)
    ctx = ProGrad(random_clip(text_width=256), NAMES).ctx
    assert ctx.shape == (16, 256) and float(ctx.detach().std()) == pytest.approx(0.02, rel=0.05)


# ---- ProDA ----


def test_proda_equals_its_equations(precision, clip):
    """With the covariances as matrices, E x E for each pair of classes."""
    method, images, labels = new(ProDA, clip, lam=0.7), picture(32, 3), torch.tensor([0, 3, 1])
    torch.manual_seed(5)
    drawn = torch.randperm(8)[:3]
    w, z = literal_prompts_of_proda(method)[drawn], F.normalize(clip.encode_image(images), dim=-1)
    tau = 1 / clip.logit_scale.exp()
    mu = w.mean(dim=0)

    def sigma(c, d):
        return sum(torch.outer(w[n, c] - mu[c], w[n, d] - mu[d]) for n in range(3)) / 3

    upper = 0
    for z_b, y in zip(z, labels.tolist(), strict=True):
        exponents = []
        for c in range(5):
            a = sigma(c, c) + sigma(y, y) - sigma(c, y) - sigma(y, c)
            exponents.append(z_b @ mu[c] / tau + z_b @ a @ z_b / (2 * tau**2))
        upper = upper - (z_b @ mu[y] / tau - torch.stack(exponents).logsumexp(dim=0)) / 3  # exp alone may overflow
    nameless = [tokenize(f"{' '.join(['X'] * 5)}.")] * 8
    x = clip.text.token_embedding(torch.cat(nameless))
    x = torch.cat([x[:, :1], method.ctx, x[:, 6:]], dim=1)
    g = plain_text(clip, x, [7] * 8)
    so = sum(cosines(g[n : n + 1], g[m : m + 1]).abs().sum() for n in range(8) for m in range(8) if n != m) / 56
    torch.manual_seed(5)
    ours, literal = method.loss(images, labels), upper + 0.7 * so
    assert_equal(ours, literal, relative=1e-4)
    assert_equal(torch.autograd.grad(ours, method.ctx)[0], torch.autograd.grad(literal, method.ctx)[0], relative=1e-3)


def test_proda_predicts_with_the_mean_over_all_prompts(precision, clip):
    method, images = new(ProDA, clip), picture(32, 3)
    mu = literal_prompts_of_proda(method).mean(dim=0)
    assert_equal(method.encode_text(), mu)
    expected = clip.logit_scale.exp() * F.normalize(clip.encode_image(images), dim=-1) @ mu.T
    assert_equal(method(images), expected)
    assert_equal(method(images, method.encode_text()), expected)


def test_prodas_loss_bounds_the_expected_cross_entropy(clip):
    method, images, labels = new(ProDA, clip, n_per_step=8, lam=0.0), picture(32, 3), torch.tensor([0, 3, 1])
    w = literal_prompts_of_proda(method).detach()  # (N, K, E)
    scores = clip.logit_scale.exp() * torch.einsum("be,nke->nbk", F.normalize(clip.encode_image(images), dim=-1), w)
    centred = (scores - scores.mean(dim=0)) / math.sqrt(8)
    normal = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    samples = scores.mean(dim=0) + torch.einsum("sn,nbk->sbk", normal, centred)  # a Gaussian of the prompts' covariance
    expected = -samples.log_softmax(dim=-1)[:, torch.arange(3), labels].mean()
    single = F.cross_entropy(scores.mean(dim=0), labels)
    assert float(single) < float(expected) < float(method.loss(images, labels).detach())


def test_proda_counts_the_tokens_that_its_clip_reads():
    """Also those of the prompts without a name: the context is too long for 32 tokens, and for 77."""
    state = random_state_dict(**TINY)
    for length in (32, 77):
        clip = CLIP.from_state_dict(state | dict(positional_embedding=state["positional_embedding"][:length]))
        sentence = rf'^"\[context\] \." is {length + 1} tokens long .*, CLIP reads {length}: '
        with pytest.raises(UserError, match=sentence):
            ProDA(clip, ["cat"], n_prompts=4, n_ctx=length - 2)
        assert ProDA(clip, ["cat"], n_prompts=4, n_ctx=length - 4).encode_text().shape == (1, 64)


# ---- CLIP-Adapter ----


def test_clip_adapter_equals_its_equations(precision, clip):
    method, images = new(CLIPAdapter, clip, templates=["a drawing of a {}.", "{}"]), picture(32, 3)
    w_1, w_2 = method.adapter[0].weight.T, method.adapter[2].weight.T
    f = clip.encode_image(images)
    f = 0.2 * (f @ w_1).clamp(min=0).matmul(w_2).clamp(min=0) + 0.8 * f
    text = clip.classifier(NAMES, ["a drawing of a {}.", "{}"])
    assert_equal(method(images), clip.logit_scale.exp() * cosines(f, text))
    assert w_1.shape == (64, 16) and w_2.shape == (16, 64)


def test_clip_adapter_with_ratio_0_is_zero_shot_clip(clip):
    assert_equal(new(CLIPAdapter, clip, ratio=0.0)(picture(32, 3)), Method(clip, NAMES)(picture(32, 3)))


# ---- The linear probe ----


def test_the_linear_probe_is_scikit_learns_solution(clip):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="pip install scikit-learn to compare with it")
    few_shot = batches(clip, 5, 6)
    f = torch.cat([clip.encode_image(images) for images, _ in few_shot]).double()
    labels = torch.cat([labels for _, labels in few_shot])
    for strength in (1.0, 0.1, 0.01):
        theirs = linear_model.LogisticRegression(C=strength, max_iter=100_000, tol=1e-12).fit(f.numpy(), labels.numpy())
        weight, bias = linear_probe.fit(f, labels, strength, 5)
        assert float((weight - torch.tensor(theirs.coef_)).abs().max()) < 1e-4
        assert float((bias - torch.tensor(theirs.intercept_)).abs().max()) < 1e-4
    method = LinearProbe(clip, NAMES)
    method.prepare(few_shot)
    theirs = linear_model.LogisticRegression(max_iter=100_000, tol=1e-12).fit(f.numpy(), labels.numpy())
    images = picture(32, 9)
    expected = torch.tensor(theirs.predict_proba(clip.encode_image(images).double().numpy())).float()
    assert float((method(images).softmax(dim=-1) - expected).abs().max()) < 1e-4 and method.strength == 1


def test_the_gradient_vanishes_at_the_linear_probes_solution():
    generator = torch.Generator().manual_seed(0)
    f, labels = 3 + torch.randn(20, 6, generator=generator).double(), torch.arange(20) % 4
    weight, bias = (x.requires_grad_() for x in linear_probe.fit(f, labels, 0.5, 4))
    objective = 0.5 * F.cross_entropy(f @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
    objective.backward()
    assert float(weight.grad.abs().max()) < 1e-6 and float(bias.grad.abs().max()) < 1e-6


def test_the_strength_is_searched_as_in_the_official_code(monkeypatch):
    """The accuracy of this solver grows towards C = 10^2.7: a picture is right if that is nearer than its threshold."""
    tried = []

    def solver(f, labels, strength, n_classes):
        tried.append(round(math.log10(strength), 6))
        return torch.tensor([[0.0], [-1.0]]).double(), torch.tensor([0.0, 20 - abs(tried[-1] - 2.7)]).double()

    monkeypatch.setattr(linear_probe, "fit", solver)
    thresholds = 20 - torch.linspace(0, 10, 2001).double().unsqueeze(1)
    found = linear_probe.choose_strength(None, None, thresholds, torch.ones(2001, dtype=torch.long), 2)
    assert tried[:7] == [6, 4, 2, 0, -2, -4, -6] and len(tried) == 7 + 2 * 8
    assert tried[7:15] == [1, 3, 2, 3, 2.5, 3, 2.5, 2.75] and math.log10(found) == pytest.approx(2.7, abs=0.02)
    never_right = torch.zeros(2001, dtype=torch.long)  # of equals the first of the seven, then the smaller of two
    assert linear_probe.choose_strength(None, None, thresholds - 40, never_right, 2) == pytest.approx(1e5)


def test_the_linear_probe_uses_the_validation_pictures_where_there_are_some(clip):
    few_shot, val = batches(clip, 5, 2, noise=4.0), batches(clip, 5, 8, seed=1, noise=4.0)
    method = LinearProbe(clip, NAMES)
    method.prepare(few_shot, val)

    f, val_f = (torch.cat([clip.encode_image(images) for images, _ in part]).double() for part in (few_shot, val))
    labels, val_labels = (torch.cat([labels for _, labels in part]) for part in (few_shot, val))
    strength = linear_probe.choose_strength(f, labels, val_f, val_labels, 5)
    weight, bias = linear_probe.fit(f, labels, strength, 5)
    assert float(method.strength) == pytest.approx(strength, rel=1e-6) and strength != 1
    assert_equal(method.weight, weight.float(), relative=1e-4)
    assert_equal(method.bias, bias.float(), relative=1e-4)
    images = picture(32, 9)
    assert_equal(method(images), clip.encode_image(images) @ weight.float().T + bias.float(), relative=1e-4)
    other = LinearProbe(clip, NAMES)
    other.prepare(few_shot, [])
    assert other.strength == 1 and not torch.equal(other.weight, method.weight)
    assert_equal(other.weight, linear_probe.fit(f, labels, 1.0, 5)[0].float(), relative=1e-4)


# ---- What learns ----


def test_parameter_counts_on_vit_b():
    clip = CLIP.from_state_dict(random_state_dict(**TINY | dict(joint=512, text_width=512, text_layers=1)))
    counts = {name: sum(p.numel() for p in learned(method(clip, NAMES)).values()) for name, method in METHODS.items()}
    cocoop = 2048 + 512 * 32 + 32 + 32 * 512 + 512
    assert counts == dict(cocoop=cocoop, prograd=8192, proda=262_144, clip_adapter=131_072, linear_probe=0)
    fitted = LinearProbe(clip, [f"class {i}" for i in range(47)]).learned()
    assert fitted["weight"].numel() + fitted["bias"].numel() == 24_111
    assert all(f"{count:,}" in METHODS[name].__doc__ for name, count in counts.items() if count)


@pytest.mark.parametrize("name", ["cocoop", "prograd", "proda", "clip_adapter"])
def test_only_the_methods_own_tensors_learn_and_all_of_them_do(name, clip):
    clip.requires_grad_(True)
    before, weights = Method(clip, NAMES)(picture(32, 3)), copy.deepcopy(clip.state_dict())
    method = new(METHODS[name], clip, **dict(n_per_step=8) if name == "proda" else {})
    images, labels = picture(32, 4), torch.arange(4)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = method.loss(images, labels, epoch=3)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in learned(method).values())
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in learned(method).values())
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())
    assert torch.equal(Method(clip, NAMES)(picture(32, 3)), before)


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_learned_tensors_stay_fp32_and_logits_are_finite(name, clip):
    method, images, labels = new(METHODS[name], clip), picture(32, 4), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        if name == "linear_probe":
            method.prepare(batches(clip, 5, 2))
        logits, loss = method(images, method.encode_text()), method.loss(images, labels)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    if name != "linear_probe":
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned(method).values())
    assert all(x.dtype == torch.float32 for x in method.learned().values())


# ---- The interface ----


@pytest.mark.parametrize("name", METHODS)
def test_what_was_learned_comes_back(name, clip):
    method, images = new(METHODS[name], clip), picture(32, 3)
    again = METHODS[name](clip, NAMES, **SMALL.get(METHODS[name], {}))
    tensors = {key: tensor.clone() for key, tensor in method.learned().items()}
    assert not torch.equal(again(images), method(images))
    again.load_learned(tensors)
    assert torch.equal(again(images), method(images))
    with pytest.raises(UserError, match="do not fit"):
        again.load_learned({key: tensor[:-1] if tensor.dim() else tensor for key, tensor in tensors.items()})


@pytest.mark.parametrize("name", ["cocoop", "prograd", "proda", "clip_adapter"])
def test_other_class_names_get_what_was_learned(name, clip):
    method, images = new(METHODS[name], clip), picture(32, 3)
    other, fresh = method.for_classes(OTHERS), METHODS[name](clip, OTHERS, **SMALL.get(METHODS[name], {}))
    if name == "cocoop":  # new names in base-to-new: a classifier of their own for every picture
        assert_equal(other(images), literal_cocoop(method, images, OTHERS))
    if name == "prograd":
        text = literal_prompts(clip, OTHERS, method.ctx)
        assert_equal(other(images), clip.logit_scale.exp() * cosines(clip.encode_image(images), text))
    fresh.load_learned(method.learned())
    assert other.clip is clip and other.classnames == OTHERS and len(other.prompt_texts) == 3
    assert torch.equal(other(images), fresh(images)) and method(images).shape == (3, 5)
    assert other.for_classes(NAMES)(images).equal(method(images))


def test_the_linear_probe_refuses_other_names_and_keeps_some_of_its_classes(clip):
    method, images = new(LinearProbe, clip), picture(32, 3)
    with pytest.raises(UserError, match="linear probe"):
        method.for_classes(OTHERS)
    some = method.for_classes(["ox", "cat"], columns=[4, 0])
    assert_equal(some(images), method(images)[:, [4, 0]])
    assert some.classnames == ["ox", "cat"] and method(images).shape == (3, 5)


@pytest.mark.parametrize("name", METHODS)
def test_shapes(name, clip):
    method, images = new(METHODS[name], clip), picture(32, 3)
    assert method.encode_text().shape == (5, 64) and method.encode_image(images, method.encode_text()).shape == (3, 64)
    assert method(images).shape == (3, 5) and method(images, method.encode_text()).shape == (3, 5)
    assert attention.maps(method, images)["attention"].shape == (3, 4)
    assert METHODS[name](clip, ["cat"], **SMALL.get(METHODS[name], {}))(images).shape == (3, 1)
    assert len(method.prompt_texts) == 5 and "polka dotted" in method.prompt_texts[2]


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_on_the_meta_device(name, clip):
    method = copy.deepcopy(new(METHODS[name], clip)).to("meta")
    images, labels = torch.empty(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    assert method.encode_text().device.type == "meta" and method(images).device.type == "meta"
    loss = method.loss(images, labels)
    if name != "linear_probe":
        loss.backward()
        assert all(p.grad.device.type == "meta" for p in learned(method).values())


@pytest.mark.parametrize("method, options, words", [
    (CoCoOp, dict(n_ctx=3), "n_ctx is 3"), (ProGrad, dict(n_ctx=0), "n_ctx is 0"),
    (ProDA, dict(n_per_step=1), "n_per_step 1"), (ProDA, dict(n_prompts=4, n_per_step=5), "n_prompts 4"),
    (ProDA, dict(n_ctx=0), "n_ctx is 0")])  # fmt: skip
def test_options_that_cannot_work_are_refused(method, options, words, clip):
    with pytest.raises(UserError, match=words):
        method(clip, NAMES, **options)


# ---- Recipes and train.py ----


@pytest.mark.parametrize("name, shots, expected", [
    ("cocoop", 16, dict(lr=0.002, warmup_epochs=1, batch_size=1, epochs=10, weight_decay=5e-4)),
    ("prograd", 4, dict(lr=0.002, warmup_epochs=1, batch_size=32, epochs=100, crop_scale=(0.08, 1.0))),
    ("proda", 16, dict(lr=0.001, warmup_epochs=0, batch_size=20, epochs=100, momentum=0.9)),
    ("clip_adapter", 16, dict(lr=0.002, warmup_epochs=1, batch_size=32, epochs=200)),
    ("linear_probe", 16, dict(epochs=0, crop_scale=None, drop_last=False))])  # fmt: skip
def test_the_recipes_are_the_papers(name, shots, expected):
    recipe, options = settings.resolve_recipe(METHODS[name].recipe, {}, "dtd", shots)
    assert {key: recipe[key] for key in expected} == expected and not options


def every_tenth_test_picture(bench):
    return dataclasses.replace(bench, test=bench.test[::10])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", METHODS)
def test_train_py_trains_it_and_loads_it_again(name, root, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "METHODS", train.METHODS | METHODS)
    augment = data.augment
    monkeypatch.setattr(data, "augment", lambda side, scale: augment(side, scale) if scale else preprocess(side))
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args, **options: every_tenth_test_picture(load(*args, **options)))
    epochs = [] if name == "linear_probe" else ["--epochs", "2"]
    options = ["--set", "n_prompts=4", "n_per_step=2"] if name == "proda" else []
    assert train.main(["--method", name, "--root", str(root), "--out", str(tmp_path), "--shots", "2", "--device", "cpu",
                       *epochs, *options]) == 0
    folder = next(tmp_path.glob("shapes/*/tiny_2shot_seed1"))
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == name and all(map(math.isfinite, result["losses"]))
    assert len(result["losses"]) == (0 if name == "linear_probe" else 2) and result["accuracy"] > 100 / 12
    method, bench = train.load_run(folder, "cpu"), data.load("shapes", root, shots=0)
    items = bench.test[::5]
    images = torch.stack([preprocess(method.clip.visual.resolution)(data.read(path)) for path, _ in items])
    written = [line.split(",")[2] for line in (folder / "predictions.csv").read_text().splitlines()[1::5]]
    assert [method.classnames[i] for i in method(images).argmax(dim=1)] == written


# ---- The papers' numbers ----

ROWS = {  # (paper, row) -> the run that it is
    ("DPT", "CoCoOp"): ("cocoop", ""), ("DPT", "ProGrad"): ("prograd", ""), ("DPT", "ProDA"): ("proda", ""),
    ("UPT", "CoCoOp"): ("cocoop", ""), ("FG-VPL", "Linear-probe CLIP"): ("linear_probe", ""),
    ("FG-VPL", "CLIP-Adapter"): ("clip_adapter", ""), ("FG-VPL", "Tip-Adapter"): ("fgvpl", "parts=tip"),
    ("FG-VPL", "Tip-Adapter-F"): ("fgvpl", "parts=tip-f"), ("FG-VPL", "Zero-shot CLIP"): (
        "zeroshot", "seven_templates=true"), ("FG-VPL", "Tip-Adapter-F (re-run)"): ("fgvpl", "parts=tip-f"),
    ("CAVPT-v1", "VLP-CLIP-CAVPT"): ("cavpt", "tuned_k_n=true"),
}  # fmt: skip


def test_every_row_of_the_other_methods_in_published_csv_is_the_run_that_it_is():
    with (ROOT / "assets" / "published.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if (row["paper"], row["row"]) in ROWS]
    assert {(row["paper"], row["row"]) for row in rows} == ROWS.keys() and len(rows) > 80
    assert all((row["method"], row["options"]) == ROWS[row["paper"], row["row"]] for row in rows)


def test_published_csv_has_the_numbers_of_the_other_methods_as_the_papers_print_them():
    file = ROOT.parent / "shared" / "published.json"
    if not file.exists():
        pytest.skip("needs ../shared")
    expected = sorted((*ROWS[entry["paper"], entry["method"]], entry["paper"], entry["table"], entry["backbone"],
                       str(entry["shots"]), entry["accuracy"])
                      for entry in json.loads(file.read_text()) if (entry["paper"], entry["method"]) in ROWS)
    with (ROOT / "assets" / "published.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    found = sorted((row["method"], row["options"], row["paper"], row["table"], row["backbone"], row["shots"],
                    float(row["accuracy"])) for row in rows if (row["paper"], row["row"]) in ROWS)
    assert found == expected and len(found) > 80
    assert all(row["method"] for row in rows), "every row is a run"


@pytest.mark.parametrize("method, options, backbone, shots, name, expected", [
    ("cocoop", [], "ViT-B/32", 16, "eurosat", [74.99]), ("cocoop", [], "ViT-B/16", 16, "imagenet_sketch", [48.75]),
    ("prograd", [], "ViT-B/32", 16, "dtd", [65.98]), ("proda", [], "ViT-B/32", 16, "caltech101", [95.5]),
    ("clip_adapter", [], "ViT-B/16", 16, "imagenet", [71.1]), ("linear_probe", [], "ViT-B/16", 1, "imagenet", [32.0]),
    ("fgvpl", ["parts=tip"], "ViT-B/32", 16, "imagenet", [65.6]),
    ("fgvpl", ["parts=tip"], "ViT-B/32", 8, "imagenet", []),
    ("fgvpl", ["parts=tip-f"], "ViT-B/16", 16, "imagenet", [73.7, 73.7]),
    ("fgvpl", ["parts=tip-f", "lam=2"], "ViT-B/16", 16, "imagenet", []),
    ("cavpt", ["base=vpt", "tuned_k_n=true"], "ViT-B/32", 16, "stanford_cars", [72.12, 72.12]),
    ("cavpt", ["base=vpt", "tuned_k_n=true", "cavpt_loss=false"], "ViT-B/32", 16, "average_8", [78.99]),
    ("cavpt", ["tuned_k_n=true"], "ViT-B/32", 16, "average_8", [80.14]), ("cavpt", [], "ViT-B/32", 16, "dtd", []),
], ids=str)
def test_a_run_finds_what_the_papers_quote(method, options, backbone, shots, name, expected):
    args = train.parse_arguments(["--backbone", backbone, *(["--set", *options] if options else [])])
    trained_on = "imagenet" if "imagenet" in name else name.replace("average_8", "dtd")
    run = train.resolve_settings(args, train.METHODS, trained_on, method, shots, 1)
    assert [value for value, _ in benchmarks.published(run, name)] == expected


@pytest.mark.parametrize("backbone, expected", [("ViT-B/16", [68.7, 68.7]), ("ViT-B/32", [63.8])])
def test_zero_shot_with_seven_templates_is_beside_fg_vpls(backbone, expected, monkeypatch):
    monkeypatch.setitem(train.METHODS, "zeroshot", ZeroShot)
    args = train.parse_arguments(["--backbone", backbone, "--set", "seven_templates=true"])
    run = train.resolve_settings(args, train.METHODS, "imagenet", "zeroshot", 16, 1)
    assert [value for value, _ in benchmarks.published(run, "imagenet")] == expected


# ---- A file can be copied ----

FILES = {name: method.__name__ for name, method in METHODS.items()} | dict(zeroshot="ZeroShot")
NEEDS_COOP = {"cocoop", "prograd", "proda", "clip_adapter"}


def test_every_file_of_the_folder_is_tested():
    assert {file.stem for file in (ROOT / "baselines").glob("*.py")} == {*FILES, "__init__"}


@pytest.mark.parametrize("name", FILES)
def test_the_file_imports_only_what_it_may(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "baselines" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported <= {"torch", "math", "clip_min"} | ({"coop"} if name in NEEDS_COOP else set())


@pytest.mark.parametrize("name", FILES)
def test_the_file_works_when_copied_with_what_its_head_names(name, tmp_path, monkeypatch):
    head = " ".join(ast.get_docstring(ast.parse((ROOT / "baselines" / f"{name}.py").read_text("utf-8"))).split())
    copying = head[head.index("copy this file") :]
    needed = ["coop.py"] if name in NEEDS_COOP else []
    assert [word for word in ("coop.py", "vpt.py", "data.py", "train.py", "support") if word in copying] == needed
    assert "clip_min.py" in copying and "assets/bpe_merges.txt.gz" in copying
    (tmp_path / "assets").mkdir()
    (tmp_path / "baselines").mkdir()
    for file in (f"baselines/{name}.py", "clip_min.py", "assets/bpe_merges.txt.gz", *needed):
        shutil.copy(ROOT / file, tmp_path / file)
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    ours = [module for module in sys.modules
            if module.split(".")[0] in ("clip_min", "coop", "data", "train", "support", "baselines")]
    for module in ours:
        monkeypatch.delitem(sys.modules, module)
    method, core = importlib.import_module(f"baselines.{name}"), importlib.import_module("clip_min")
    for module in method, core, *(sys.modules[file.removesuffix(".py")] for file in needed):
        assert tmp_path in Path(module.__file__).parents
    clip = core.CLIP.from_state_dict(random_state_dict(**TINY))
    assert getattr(method, FILES[name])(clip, NAMES)(picture(32, 2)).shape == (2, 5)
    for module in [module for module in sys.modules if module.split(".")[0] in ("clip_min", "coop", "baselines")]:
        monkeypatch.delitem(sys.modules, module)  # the copies go, the originals come back
