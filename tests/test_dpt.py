"""What dpt.py promises: VLP, DPT and the first CAVPT, exactly as a slow reading of the papers' equations."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import B16, B32, random_clip
from test_clip import assert_equal, picture, plain_block
from test_coop import NAMES, literal_encode_text, train_step

import train
from clip_min import UserError
from coop import CoOp
from dpt import CAVPT, DPT, VLP, likely_classes
from support import settings

LAYERS = [("12", False, {2: 0}), ("2-3", False, {1: 0, 2: 1}), ("1-2", False, {0: 0, 1: 1}),
          ("1-12", True, {0: 0, 1: 0, 2: 0})]  # cavpt_layers, cavpt_shared, which module makes whose prompts
VARIANTS = {
    "vlp": (VLP, {}), "dpt": (DPT, {}), "dpt 1-12": (DPT, dict(cavpt_layers="1-12")),
    "dpt shared": (DPT, dict(cavpt_layers="1-12", cavpt_shared=True)), "cavpt": (CAVPT, {}),
    "cavpt on vpt": (CAVPT, dict(base="vpt")), "cavpt keep_vpt": (CAVPT, dict(keep_vpt=True)),
}  # fmt: skip
V1 = [dict(), dict(softmax_axis="keys"), dict(keep_vpt=True), dict(cavpt_loss=False), dict(base="vpt"),
      dict(base="vpt", keep_vpt=True)]  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- Helpers ----


@pytest.fixture
def clip():
    return random_clip(vision_layers=3)


@functools.cache
def wide_clip(patch):
    """ViT-B's widths and image tower; of the text tower, whose depth no count depends on, one layer."""
    return random_clip(**(B32 if patch == 32 else B16) | dict(text_layers=1))


def make(variant, clip, names=NAMES, **options):
    method_class, defaults = VARIANTS[variant]
    torch.manual_seed(0)
    return method_class(clip, names, **dict(n_ctx=4, n_visual=3) | defaults | options)


def strong(method):
    """Visual prompts as large as tokens and norms off their start, so that a mistake with any of them shows."""
    generator = torch.Generator().manual_seed(3)
    method.visual_prompts.data.normal_(generator=generator)
    for name, p in method.named_parameters():
        if ".ln" in name and "cavpt" in name:
            p.data += torch.randn(p.shape, generator=generator) * 0.1
    return method


def learned(method):
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def count_without_classifier(method):
    return sum(p.numel() for name, p in learned(method).items() if "aux_classifier" not in name)


def ranking(clip, images):
    """All classes of every picture, those first that zero-shot CLIP finds likeliest: (B, K)."""
    return clip.logits(clip.encode_image(images), clip.classifier(NAMES)).argsort(dim=-1, descending=True)


def some_inside(clip, images):
    """Labels of which every second is the second likeliest class, every other the least likely one."""
    order = ranking(clip, images)
    return torch.where(torch.arange(len(images)) % 2 == 0, order[:, 1], order[:, -1])


def assert_same_gradients(ours, theirs, method):
    for name, p in learned(method).items():
        pair = [torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0] for loss in (ours, theirs)]
        if pair[1] is None:  # the literal version never reads it, as the classifier without cavpt_loss
            assert pair[0] is None or not pair[0].any(), name
        elif name == "cavpt.mlp.2.bias":  # it moves all scores alike, to which a softmax over classes is blind
            assert max(float(gradient.abs().max()) for gradient in pair) < 1e-6
        else:
            assert_equal(*pair, relative=1e-4)


def only_l_ca(method, images, labels, monkeypatch):
    """L_ca alone: every other term of the loss is taken out."""
    monkeypatch.setattr(method, "phase_loss", lambda *_: torch.zeros(()))
    return method.loss(images, labels) / method.alpha


def image_runs(method, call):
    """How many tokens and prompts the first image block looks at in every run by call(): 5 without prompts."""
    tokens = []
    hook = method.clip.visual.blocks[0].register_forward_pre_hook(
        lambda _, given: tokens.append(sum(x.shape[-2] for x in given)))
    call()
    hook.remove()
    return tokens


def counted(monkeypatch, owner, name):
    """-> a list that grows by one with every call of owner.name."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(1) or original(*args))
    return calls


def resolved(method_class, data_name, shots):
    return settings.resolve_recipe(method_class.recipe, {}, data_name, shots)[0]


# ---- The slow literal version: one picture, one class, one key at a time ----


def linear(layer, x):
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def norm(layer, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def cosine_logits(clip, z, w):
    return clip.logit_scale.exp() * torch.stack([z @ row / (z.norm() * row.norm()) for row in w])


def cross_entropy(logits, label):
    return -torch.log(logits.softmax(dim=0)[label])


def dpt_prompts(module, text, x, own, likely, label, l_ca):
    """Eq. 6, 7 -> (k, D); Eq. 8 is added to l_ca where the class is the label."""
    prompts, keys = [], [*x.detach(), *own]
    for j in likely:
        q = linear(module.fc, text[j])
        scores = [linear(module.w_q, q) @ linear(module.w_k, key) / math.sqrt(32) for key in keys]
        weights = torch.stack(scores).softmax(dim=0)
        o = sum(a * linear(module.w_v, key) for a, key in zip(weights, keys, strict=True))
        prompts.append(norm(module.ln_p, o + q))
        if j == label:
            l_ca.append(cross_entropy(linear(module.aux_classifier, norm(module.ln_o, o)), label))
    return torch.stack(prompts) if prompts else own[:0]


def dpt_picture(method, image, label, text, modules, l_ca):
    """-> z (E,), z0 (E,)."""
    visual = method.clip.visual
    z0 = method.clip.encode_image(image[None])[0]
    likely = ranking(method.clip, image[None])[0, : method.k_n].tolist() if modules else []
    x = visual.embed(image[None])[0]
    for layer, block in enumerate(visual.blocks):
        prompts = method.visual_prompts[layer]
        if layer in modules:
            prompts = dpt_prompts(method.cavpt[modules[layer]], text, x, prompts, likely, label, l_ca)
        x = plain_block(block, torch.cat([x[:1], prompts, x[1:]])[None])[0]  # Eq. 4, Eq. 10
        x = torch.cat([x[:1], x[1 + len(prompts) :]])
    return visual.ln_post(x[0]) @ visual.proj, z0


def literal_dpt(method, images, labels, modules, guided=False):
    """modules {layer: number of its module}; {} is VLP. -> logits (B, K), loss (Eq. 11, or 12 when guided)."""
    clip, logits, coop, vpt, ce, l_ca = method.clip, [], [], [], [], []
    text, w0 = literal_encode_text(method, NAMES, n_ctx=4), clip.classifier(NAMES)
    for image, label in zip(images, labels.tolist(), strict=True):
        z, z0 = dpt_picture(method, image, label, text, modules, l_ca)
        logits.append(cosine_logits(clip, z, text))
        ce.append(cross_entropy(logits[-1], label))
        coop.append(cross_entropy(cosine_logits(clip, z0, text), label))
        vpt.append(cross_entropy(cosine_logits(clip, z, w0), label))
    coop, vpt, ce = (sum(terms) / len(terms) for terms in (coop, vpt, ce))
    auxiliary = method.alpha * sum(l_ca) / len(l_ca) if l_ca else 0
    return torch.stack(logits), (coop + vpt + method.beta * ce if guided else ce) + auxiliary


def v1_picture(method, image, label, w0, axis):
    """Version 1, Eq. 6 and 9 -> z (E,), the K_N terms of Eq. 10."""
    visual, module = method.clip.visual, method.cavpt
    x = visual.embed(image[None])[0]
    for block, prompts in zip(visual.blocks[:-1], method.visual_prompts, strict=False):
        x = plain_block(block, torch.cat([x, prompts])[None])[0, :5]
    s, likely = x[0].detach(), ranking(method.clip, image[None])[0, : method.k_n].tolist()
    queries = [linear(module.mlp[2], linear(module.mlp[0], w0[j]).clamp(min=0)) for j in likely]
    a = torch.stack([q @ linear(module.w_k, s) for q in queries])
    a = a.softmax(dim=0) if axis == "classes" else torch.ones(len(likely))
    h = [norm(module.ln, a_j * linear(module.w_v, s) + s) for a_j in a]
    prompts, terms = torch.stack([linear(module.lp, h_j) for h_j in h]), []
    for j, h_j in zip(likely, h, strict=True):
        p = linear(module.aux_classifier, h_j).softmax(dim=0)
        target = torch.eye(len(p))[label] if j == label else torch.full_like(p, 1 / len(p))
        terms.append(-(target * p.log()).sum())
    own = method.visual_prompts[2] if method.keep_vpt else prompts[:0]
    x = plain_block(visual.blocks[-1], torch.cat([x, prompts, own])[None])[0]
    return visual.ln_post(x[0]) @ visual.proj, terms


def literal_v1(method, images, labels, options):
    """-> logits (B, K), loss, v1 Eq. 11 and 12."""
    w0 = method.clip.classifier(NAMES)
    text = w0 if options.get("base") == "vpt" else literal_encode_text(method, NAMES, n_ctx=4)
    logits, ce, l_ca = [], [], []
    for image, label in zip(images, labels.tolist(), strict=True):
        z, terms = v1_picture(method, image, label, w0, options.get("softmax_axis", "classes"))
        logits.append(cosine_logits(method.clip, z, text))
        ce.append(cross_entropy(logits[-1], label))
        l_ca += terms
    auxiliary = sum(l_ca) / len(l_ca) if options.get("cavpt_loss", True) else 0
    return torch.stack(logits), sum(ce) / len(ce) + auxiliary


# ---- The methods of the papers ----


@pytest.mark.parametrize("n_ctx, shown", [(0, "cat."), (2, "[2 vectors] cat.")])
def test_prompts_show_their_context(n_ctx, shown, clip):
    assert VLP(clip, ["cat"], n_ctx=n_ctx).prompt_texts == [shown]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layers, shared, modules", LAYERS)
def test_dpt_equals_its_equations_in_logits_losses_and_gradients(layers, shared, modules, guided, precision, clip):
    options = dict(k_n=3, guide_epochs=2, cavpt_layers=layers, cavpt_shared=shared)
    method, images = strong(make("dpt", clip, **options)), picture(32, 4)
    labels = some_inside(clip, images)
    logits, loss = literal_dpt(method, images, labels, modules, guided)
    assert_equal(method(images), logits, relative=1e-4)
    ours = method.loss(images, labels, epoch=1 if guided else 2)
    assert_equal(ours, loss, relative=1e-4)
    assert_same_gradients(ours, loss, method)


@pytest.mark.parametrize("guided", [False, True])
def test_vlp_equals_its_equations_in_logits_losses_and_gradients(guided, precision, clip):
    method, images, labels = strong(make("vlp", clip, guide_epochs=2)), picture(32, 4), torch.tensor([0, 3, 4, 1])
    method.alpha = 0.0  # for the literal version; VLP has none
    logits, loss = literal_dpt(method, images, labels, {}, guided)
    assert_equal(method(images), logits, relative=1e-4)
    ours = method.loss(images, labels, epoch=1 if guided else 2)
    assert_equal(ours, loss, relative=1e-4)
    assert_same_gradients(ours, loss, method)


@pytest.mark.parametrize("options", V1, ids=str)
def test_version_1_equals_its_equations_in_logits_losses_and_gradients(options, precision, clip):
    method, images = strong(make("cavpt", clip, k_n=3, **options)), picture(32, 4)
    labels = some_inside(clip, images)
    logits, loss = literal_v1(method, images, labels, options)
    assert_equal(method(images), logits, relative=1e-4)
    ours = method.loss(images, labels)
    assert_equal(ours, loss, relative=1e-4)
    assert_same_gradients(ours, loss, method)


def test_vlp_without_visual_prompts_is_coop(clip):
    vlp, coop = VLP(clip, NAMES, n_ctx=4, n_visual=0), CoOp(clip, NAMES, n_ctx=4)
    coop.ctx.data = vlp.ctx.data.clone()
    assert_equal(vlp.encode_text(), coop.encode_text())
    assert_equal(vlp(picture(32, 3)), coop(picture(32, 3)))


def test_guidance_ends_after_guide_epochs_whatever_their_number(clip):
    images, labels = picture(32, 2), torch.arange(2)
    for variant in ("vlp", "dpt"):
        method = make(variant, clip, guide_epochs=30)
        losses = [method.loss(images, labels, epoch).item() for epoch in (0, 29, 30, 99)]
        assert losses[0] == losses[1] != losses[2] == losses[3]
        assert make(variant, clip, guide_epochs=0).loss(images, labels).item() == losses[2]


# ---- Class-aware prompts ----


def test_the_auxiliary_loss_teaches_the_text_and_the_keys_but_no_layer_below(clip, monkeypatch):
    method, images = strong(make("dpt", clip, cavpt_layers="2-3", alpha=5.0)), picture(32, 4)
    loss = only_l_ca(method, images, torch.arange(4), monkeypatch)
    ctx, prompts = torch.autograd.grad(loss, [method.ctx, method.visual_prompts])
    assert ctx.any() and not prompts[0].any() and prompts[1].any() and prompts[2].any()
    method = strong(make("dpt", clip))
    loss = only_l_ca(method, images, torch.arange(4), monkeypatch)
    (prompts,) = torch.autograd.grad(loss, [method.visual_prompts])
    assert not prompts[:2].any() and prompts[2].any()


def test_the_rest_of_the_loss_teaches_the_layers_below_through_the_last_block(clip):
    method = strong(make("dpt", clip, alpha=0.0))
    (gradient,) = torch.autograd.grad(method.loss(picture(32, 4), torch.arange(4)), method.visual_prompts)
    assert gradient.abs().sum(dim=-1).gt(0).all()


def test_a_label_outside_the_likeliest_adds_nothing_to_the_auxiliary_loss(clip, monkeypatch):
    method, images = strong(make("dpt", clip, k_n=2)), picture(32, 4)
    labels = some_inside(clip, images)
    loss = only_l_ca(method, images, labels, monkeypatch)
    torch.testing.assert_close(loss, only_l_ca(method, images[::2], labels[::2], monkeypatch))


def test_a_batch_whose_labels_are_all_unlikely_has_the_rest_of_the_loss(clip):
    method, images = strong(make("dpt", clip, k_n=2, cavpt_layers="2-3")), picture(32, 4)
    labels = ranking(clip, images)[:, -1]
    loss = method.loss(images, labels, epoch=99)
    assert torch.equal(loss, F.cross_entropy(method(images), labels))
    loss.backward()
    for name, p in learned(method).items():
        if "aux_classifier" in name or "ln_o" in name:
            assert p.grad is None, "a gradient of zero would let weight decay and momentum move it"
        else:
            assert p.grad.isfinite().all()
    before = {name: p.detach().clone() for name, p in learned(method).items()}
    torch.optim.SGD(method.parameter_groups(), momentum=0.9, weight_decay=0.1).step()
    unmoved = {name for name, p in learned(method).items() if torch.equal(p, before[name])}
    assert unmoved == {name for name in before if "aux_classifier" in name or "ln_o" in name}


@pytest.mark.parametrize("epoch", [0, 99])
def test_no_class_aware_prompts_are_vlp_without_prompts_in_the_last_layer(epoch, clip):
    method, images, labels = strong(make("dpt", clip, k_n=0)), picture(32, 3), torch.arange(3)
    logits, loss = literal_dpt(method, images, labels, {2: 0}, guided=epoch == 0)
    assert_equal(method(images), logits, relative=1e-4)
    assert_equal(method.loss(images, labels, epoch), loss, relative=1e-4)
    vlp = strong(make("vlp", clip))
    assert not torch.allclose(method(images), vlp(images), rtol=1e-3)


@pytest.mark.parametrize("variant", ["dpt", "cavpt"])
def test_more_class_aware_prompts_than_classes_are_as_many_as_classes(variant, clip):
    all_classes, more = make(variant, clip, k_n=5), make(variant, clip, k_n=100)
    assert torch.equal(more(picture(32, 2)), all_classes(picture(32, 2)))
    assert torch.equal(more.loss(picture(32, 2), torch.arange(2)), all_classes.loss(picture(32, 2), torch.arange(2)))


def test_version_1_runs_without_class_aware_prompts(clip):
    method, images, labels = make("cavpt", clip, k_n=0), picture(32, 2), torch.arange(2)
    torch.testing.assert_close(method.loss(images, labels), F.cross_entropy(method(images), labels))


def test_the_likeliest_classes_are_zero_shot_clips(clip):
    method, images = strong(make("dpt", clip, k_n=3)), picture(32, 4)
    assert torch.equal(likely_classes(method, method.frozen_features(images)), ranking(clip, images)[:, :3])


def test_dpt_prompts_come_from_the_learned_text(clip):
    method, images = make("dpt", clip, k_n=2), picture(32, 2)
    text = method.encode_text()
    before = method.encode_image(images, text)
    assert torch.equal(before, method.encode_image(images)), "without the text it is encoded"
    method.ctx.data.normal_()
    after = method.encode_image(images, method.encode_text())
    assert not torch.allclose(before, after, rtol=1e-3)


def test_over_keys_all_prompts_of_version_1_are_one_and_over_classes_not(clip):
    g, s = torch.randn(2, 4, 64), torch.randn(2, 128)
    keys, _ = make("cavpt", clip, softmax_axis="keys").cavpt(g, s)
    classes, _ = make("cavpt", clip, softmax_axis="classes").cavpt(g, s)
    assert torch.equal(keys, keys[:, :1].expand_as(keys))
    assert not torch.allclose(classes, classes[:, :1].expand_as(classes), rtol=1e-3)


@pytest.mark.parametrize("layers, expected", [
    ("12", [2]), ("8-12", [2]), ("1", [0]), ("1-12", [0, 1, 2]), ("2-3", [1, 2]), (2, [1]), ("2-2", [1]),
])  # fmt: skip
def test_layers_count_from_one_and_beyond_the_last_mean_the_last(layers, expected, clip):
    assert make("dpt", clip, cavpt_layers=layers).layers == expected


# ---- What learns ----


@pytest.mark.parametrize("method_class, options, count", [
    (VLP, dict(), 100_352), (VLP, dict(n_visual=120), 1_114_112), (DPT, dict(), 1_136_384),
    (DPT, dict(cavpt_layers="4-12"), 9_424_640), (DPT, dict(cavpt_layers="8-12"), 5_280_512),
    (DPT, dict(cavpt_layers="1-12"), 12_532_736), (DPT, dict(cavpt_layers="1-4"), 4_244_480),
    (DPT, dict(cavpt_layers="1-8"), 8_388_608), (DPT, dict(cavpt_layers="1"), 1_136_384),
    (DPT, dict(cavpt_layers="1-12", cavpt_shared=True), 1_136_384),
    (DPT, dict(cavpt_layers="4-12", cavpt_shared=True), 1_136_384),
    (CAVPT, dict(), 1_813_536 + 8_192 + 11 * 7_680), (CAVPT, dict(keep_vpt=True), 1_813_536 + 100_352),
    (CAVPT, dict(base="vpt"), 1_813_536 + 11 * 7_680),
])  # fmt: skip
def test_parameter_counts_of_the_papers(method_class, options, count):
    assert count_without_classifier(method_class(wide_clip(32), ["cat"], **options)) == count


@pytest.mark.parametrize("method_class, count", [(VLP, 100_352), (DPT, 1_136_384)])
def test_parameter_counts_are_the_same_for_smaller_patches(method_class, count):
    assert count_without_classifier(method_class(wide_clip(16), ["cat"])) == count


def test_a_class_aware_module_of_version_1_has_the_size_it_should():
    module = CAVPT(wide_clip(32), ["cat"]).cavpt
    assert sum(p.numel() for p in module.parameters()) - 768 == 1_813_536  # without the classifier of one class


def test_the_auxiliary_classifier_has_a_row_per_class(clip):
    assert make("dpt", clip).cavpt[0].aux_classifier.weight.shape == (5, 128)
    assert make("cavpt", clip).cavpt.aux_classifier.weight.shape == (5, 128)


@every_variant
def test_every_learned_tensor_gets_a_gradient_and_clip_none(variant, clip):
    clip.requires_grad_(True)
    method = make(variant, clip, **({} if variant == "vlp" else dict(k_n=3)))
    images = picture(32, 4)
    method.loss(images, some_inside(clip, images)).backward()
    assert all(p.grad is None for p in clip.parameters())
    for name, p in learned(method).items():
        assert p.dtype == torch.float32 and p.grad is not None, name
        assert p.grad.any() or name == "cavpt.mlp.2.bias", name  # to which a softmax over classes is blind
    assert method.visual_prompts.grad.abs().sum(dim=-1).gt(0).all()
    assert ("ctx" in learned(method)) == (variant != "cavpt on vpt")


@every_variant
def test_groups_hold_every_learned_tensor_once_and_the_text_has_its_own_rate(variant, clip):
    method = make(variant, clip)
    *text, rest = method.parameter_groups()
    held = [p for group in (*text, rest) for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, learned(method).values()))
    assert (rest["lr"], rest["warmup_epochs"]) == (0.01, 10)
    if variant == "cavpt on vpt":
        assert not text and method.ctx is None
    else:
        assert text[0].pop("params")[0] is method.ctx
        assert text == [{"lr": 0.002, "warmup_epochs": 1}]


@every_variant
def test_clip_never_changes(variant, clip):
    weights, method = copy.deepcopy(clip.state_dict()), make(variant, clip)
    before = method(picture(32, 2))
    train_step(method)
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())
    assert not torch.equal(method(picture(32, 2)), before)


@every_variant
def test_training_lowers_the_loss(variant, clip):
    method, images, labels = make(variant, clip), picture(32, 4), torch.arange(4)
    before = float(method.loss(images, labels).detach())
    optimizer = torch.optim.SGD(learned(method).values(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        method.loss(images, labels).backward()
        optimizer.step()
    assert float(method.loss(images, labels).detach()) < before


# ---- What is computed ----


@pytest.mark.parametrize("variant, epoch, frozen", [
    ("vlp", 0, 1), ("vlp", 29, 1), ("vlp", 30, 0), ("dpt", 0, 1), ("dpt", 99, 1), ("dpt 1-12", 0, 1),
    ("cavpt", 0, 1), ("cavpt", 99, 1), ("cavpt on vpt", 0, 1),
])  # fmt: skip
def test_a_loss_runs_the_frozen_image_tower_once_where_it_is_needed(variant, epoch, frozen, clip, monkeypatch):
    method, calls = make(variant, clip), counted(monkeypatch, clip, "encode_image")
    runs = image_runs(method, lambda: method.loss(picture(32, 2), torch.arange(2), epoch))
    assert len(calls) == frozen == runs.count(5) and len(runs) == frozen + 1


@every_variant
def test_a_test_batch_runs_the_frozen_image_tower_only_for_the_likeliest_classes(variant, clip, monkeypatch):
    method, calls = make(variant, clip), counted(monkeypatch, clip, "encode_image")
    runs = image_runs(method, lambda: method(picture(32, 2), method.encode_text()))
    assert len(calls) == runs.count(5) == (variant != "vlp") and len(runs) == 1 + len(calls)


@every_variant
def test_text_is_encoded_once_per_loss_and_not_when_it_is_given(variant, clip, monkeypatch):
    method, images = make(variant, clip), picture(32, 2)
    text, logits = method.encode_text(), method(images)
    calls = counted(monkeypatch, method, "encode_text")
    assert torch.equal(method(images, text), logits) and not calls
    for epoch in (0, 99):
        calls.clear()
        method.loss(images, torch.arange(2), epoch)
        assert calls == [1]


@every_variant
def test_the_frozen_text_tower_is_not_run_after_the_start(variant, clip, monkeypatch):
    method = make(variant, clip)
    monkeypatch.setattr(clip, "classifier", lambda *_: pytest.fail("the templates are encoded again"))
    method.loss(picture(32, 2), torch.arange(2))
    method(picture(32, 2))


# ---- The interface ----


@every_variant
def test_shapes(variant, clip):
    method, images = make(variant, clip), picture(32, 3)
    text = method.encode_text()
    assert text.shape == (5, 64) and method(images).shape == (3, 5) and method(images, text).shape == (3, 5)
    assert method.loss(images, torch.arange(3)).shape == method.loss(images, torch.arange(3), epoch=99).shape == ()


@every_variant
def test_prompts_to_show_have_the_name(variant, clip):
    prompts = make(variant, clip).prompt_texts
    assert len(prompts) == 5 and "shovel-nosed ray" in prompts[1]
    assert ("a photo of a" in prompts[1]) == (variant == "cavpt on vpt") != ("4" in prompts[1])


def test_several_templates_make_the_zero_shot_classifier(clip):
    templates = ["a photo of a {}.", "{} texture."]
    for method_class in (VLP, DPT, CAVPT):
        assert torch.equal(method_class(clip, NAMES, templates).zero_shot, clip.classifier(NAMES, templates))
    method = CAVPT(clip, NAMES, templates, base="vpt")
    assert torch.equal(method.encode_text(), clip.classifier(NAMES, templates))


@every_variant
def test_it_runs_on_the_meta_device(variant, clip, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "any", lambda self: True)  # DPT asks whether a picture has its label
    method = copy.deepcopy(make(variant, clip)).to("meta")
    images, labels = torch.empty(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    assert method.encode_text().device.type == "meta" and method(images).shape == (2, 5)
    for epoch in (0, 99):
        method.loss(images, labels, epoch).backward()
    assert all(p.grad.device.type == "meta" for p in learned(method).values())


@every_variant
def test_bfloat16_towers_give_nearly_the_same_loss_and_fp32_gradients(variant, clip):
    method, images, labels = make(variant, clip), picture(32, 4), torch.arange(4)  # K_N = K: rounding changes no rank
    for epoch in (0, 99):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(images, labels, epoch)
        assert loss.dtype == torch.float32
        assert_equal(loss, method.loss(images, labels, epoch), relative=0.05)
        loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learned(method).values())


@every_variant
def test_one_class_is_enough(variant, clip):
    method, labels = make(variant, clip, ["cat"]), torch.zeros(2, dtype=torch.long)
    assert method(picture(32, 2)).shape == (2, 1)
    assert [method.loss(picture(32, 2), labels, epoch).item() for epoch in (0, 99)] == [0, 0]


@pytest.mark.parametrize("variant", ["vlp", "dpt", "cavpt"])
def test_two_thousand_classes_work(variant):
    clip = random_clip(text_layers=1)
    method = make(variant, clip, [f"thing {i}" for i in range(2000)])
    images = picture(32, 2)
    labels = clip.logits(clip.encode_image(images), method.zero_shot).argmax(dim=1)
    method.loss(images, labels).backward()
    assert all(p.grad.isfinite().all() for p in learned(method).values())
    assert method(picture(32, 2)).shape == (2, 2000)


@pytest.mark.parametrize("layers", ["x", "0", "5-2", "", "-3", "1-x", "1,2", "0-3"])
def test_bad_layers_are_refused_with_an_example(layers, clip):
    with pytest.raises(UserError, match=f"cavpt_layers is {layers}: .*12 or 8-12"):
        make("dpt", clip, cavpt_layers=layers)


@pytest.mark.parametrize("options", [dict(base="picture"), dict(softmax_axis="rows")], ids=str)
def test_bad_choices_of_version_1_list_the_good_ones(options, clip):
    with pytest.raises(UserError, match="vlp or vpt, classes or keys"):
        make("cavpt", clip, **options)


@pytest.mark.parametrize("variant, options, message", [
    ("vlp", dict(n_ctx=-1), "n_ctx is -1"), ("dpt", dict(n_visual=-2), "n_visual -2"),
    ("dpt", dict(k_n=-1), "k_n is -1"), ("cavpt", dict(k_n=-1), "k_n is -1"),
])  # fmt: skip
def test_negative_numbers_are_refused(variant, options, message, clip):
    with pytest.raises(UserError, match=f"{message}.*0 or more"):
        make(variant, clip, **options)


# ---- Recipes ----


def test_train_py_has_the_methods():
    assert {name: train.METHODS[name] for name in ("vlp", "dpt", "cavpt")} == dict(vlp=VLP, dpt=DPT, cavpt=CAVPT)


@pytest.mark.parametrize("method_class", [VLP, DPT])
def test_recipes_of_the_paper(method_class):
    recipe, options = settings.resolve_recipe(method_class.recipe, {}, "dtd", 16)
    assert (recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"], options) == (0.01, 10, 32, {})
    assert [resolved(method_class, "dtd", shots)["epochs"] for shots in (1, 2, 4, 8, 16)] == [60, 100, 100, 100, 100]
    for shots in (1, 16):
        recipe, options = settings.resolve_recipe(method_class.recipe, {}, "imagenet", shots)
        assert (recipe["epochs"], recipe["warmup_epochs"], options) == (20, 1, dict(guide_epochs=10))


@pytest.mark.parametrize("data_name", ["caltech101", "oxford_pets"])
def test_dpt_trains_shorter_on_caltech_and_pets_at_16_shots(data_name):
    assert [resolved(DPT, data_name, shots)["epochs"] for shots in (1, 2, 4, 8, 16)] == [60, 100, 100, 100, 60]
    assert resolved(DPT, data_name, 16)["warmup_epochs"] == 10
    assert resolved(VLP, data_name, 16)["epochs"] == 100


def test_the_recipe_of_version_1_has_no_guidance():
    assert [resolved(CAVPT, "dtd", shots)["epochs"] for shots in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    imagenet, options = settings.resolve_recipe(CAVPT.recipe, {}, "imagenet", 16)
    assert (imagenet["epochs"], imagenet["warmup_epochs"], options) == (50, 1, {})


def test_version_1_takes_the_numbers_of_classes_of_its_table_1():
    k_n = dict(eurosat=5, caltech101=50, oxford_flowers=5, food101=5, fgvc_aircraft=20, dtd=5, oxford_pets=37,
               stanford_cars=100)
    tuned = {"tuned_k_n": True}
    for name, number in k_n.items():
        recipe, options = settings.resolve_recipe(CAVPT.recipe, tuned, name, 16)
        plain, no_options = settings.resolve_recipe(CAVPT.recipe, {}, name, 16)
        assert (options, no_options) == (dict(k_n=number), {}) and recipe == plain
    for name in ("imagenet", "sun397", "shapes"):
        untuned = settings.resolve_recipe(CAVPT.recipe, {}, name, 16)
        assert settings.resolve_recipe(CAVPT.recipe, tuned, name, 16) == untuned
    args = train.parse_arguments(["--set", "base=vpt", "tuned_k_n=true"])
    assert train.resolve_settings(args, train.METHODS, "stanford_cars", "cavpt", 16, 1).options["k_n"] == 100
    args = train.parse_arguments(["--set", "tuned_k_n=true", "k_n=3"])
    assert train.resolve_settings(args, train.METHODS, "stanford_cars", "cavpt", 16, 1).options["k_n"] == 3


@pytest.mark.parametrize("flags, text, rest", [
    ({}, (0.002, 1), (0.01, 10)), (dict(lr=0.02), (0.004, 1), (0.02, 10)),
    (dict(warmup_epochs=3), (0.002, 3), (0.01, 3)),
], ids=str)  # fmt: skip
def test_the_rate_of_the_text_scales_with_the_rate_given_and_a_warm_up_given_is_for_all(flags, text, rest, clip):
    recipe = settings.override(resolved(DPT, "dtd", 16), flags)
    groups = make("dpt", clip).parameter_groups(recipe)
    assert [(group["lr"], group["warmup_epochs"]) for group in groups] == [pytest.approx(text), pytest.approx(rest)]
