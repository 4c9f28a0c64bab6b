"""What vpt.py promises: learned tokens beside the patches, exactly as a slow reading of the papers puts them there."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import B16, B32, random_clip
from test_clip import assert_equal, picture, plain_block
from test_coop import NAMES, train_step

import train
from clip_min import UserError
from support import settings
from vpt import VPT

KINDS = [
    dict(), dict(deep=False), dict(before_ln_pre=True), dict(deep=False, before_ln_pre=True),
]  # fmt: skip


# ---- Helpers ----


@pytest.fixture
def clip():
    return random_clip(vision_layers=3)


@functools.cache
def wide_clip(patch):
    """ViT-B's image tower in full; its text tower is cut down, since no text is learned."""
    return random_clip(**(B32 if patch == 32 else B16) | dict(text_layers=1, text_width=64))


def strong(method):
    """Prompts as large as tokens, so that a mistake with any of them shows."""
    method.visual_prompts.data.normal_(generator=torch.Generator().manual_seed(3))
    return method


def literal_deep(method, image):
    """DPT Eq. 4, one picture: the prompts stand between class token and patches, their outputs are dropped."""
    visual, prompts = method.clip.visual, method.visual_prompts
    s, e = visual.embed(image[None])[0].split([1, 4])
    for block, p in zip(visual.blocks, prompts, strict=True):
        s, _, e = plain_block(block, torch.cat([s, p, e])[None])[0].split([1, len(p), 4])
    return visual.ln_post(s[0]) @ visual.proj


def literal_shallow(method, image):
    """Version 1, Eq. 4-5, one picture: the first layer's prompts travel through all blocks."""
    visual, prompts = method.clip.visual, method.visual_prompts
    s, e = visual.embed(image[None])[0].split([1, 4])
    x = torch.cat([s, prompts[0], e])
    for block in visual.blocks:
        x = plain_block(block, x[None])[0]
    return visual.ln_post(x[0]) @ visual.proj


def before_ln_pre(method, images):
    """The tokens behind an ln_pre that sees prompts and patches alike: (B, 1+N+P, D)."""
    visual, rows = method.clip.visual, []
    for image in images:
        patches = visual.conv1(image[None])[0].flatten(1).T
        x = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
        rows.append(visual.ln_pre(torch.cat([x, method.visual_prompts[0]])))
    return torch.stack(rows)


def literal_logits(method, images, literal):
    features = torch.stack([literal(method, image) for image in images])
    return method.clip.logit_scale.exp() * F.normalize(features, dim=-1) @ method.zero_shot.T


def run_recorded(method, call):
    """-> what call() returned, and what each run of the first image block looks at, prompts last: (B, tokens, D)."""
    inputs = []

    def record(block, given):
        x, *prompts = given
        inputs.append(torch.cat([x, *(p.expand(len(x), -1, -1) for p in prompts)], dim=1))

    hook = method.clip.visual.blocks[0].register_forward_pre_hook(record)
    result = call()
    hook.remove()
    return result, inputs


def gradient(value, method):
    return torch.autograd.grad(value, method.visual_prompts)[0]


def learned(method):
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


# ---- The method of the papers ----


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_prompts_are_zero_shot_clip(kind, clip):
    method, images = VPT(clip, NAMES, n_visual=0, **kind), picture(32, 3)
    assert_equal(method(images), clip.logits(clip.encode_image(images), clip.classifier(NAMES)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_order_of_the_prompts_does_not_matter(kind, clip):
    method, images = strong(VPT(clip, NAMES, n_visual=5, **kind)), picture(32, 3)
    before = method(images)
    method.visual_prompts.data = method.visual_prompts.data[:, [3, 0, 4, 1, 2]]
    assert_equal(method(images), before)


@pytest.mark.parametrize("deep, literal", [(True, literal_deep), (False, literal_shallow)], ids=["deep", "shallow"])
def test_logits_losses_and_gradients_equal_the_equations(deep, literal, precision, clip):
    method, images, labels = strong(VPT(clip, NAMES, n_visual=5, deep=deep)), picture(32, 3), torch.tensor([0, 3, 4])
    expected = literal_logits(method, images, literal)
    assert_equal(method(images), expected)
    loss, expected_loss = method.loss(images, labels), F.cross_entropy(expected, labels)
    assert_equal(loss, expected_loss)
    assert_equal(gradient(loss, method), gradient(expected_loss, method), relative=1e-4)


def test_deep_and_shallow_differ(clip):
    deep, shallow = strong(VPT(clip, NAMES)), VPT(clip, NAMES, deep=False)
    shallow.visual_prompts.data = deep.visual_prompts.data[:1]
    assert not torch.allclose(deep(picture(32, 2)), shallow(picture(32, 2)), rtol=1e-2)


@pytest.mark.parametrize("layer", range(3))
def test_prompts_of_every_layer_are_read(layer, clip):
    method = strong(VPT(clip, NAMES))
    before = method(picture(32, 2))
    method.visual_prompts.data[layer] = 0
    assert not torch.allclose(method(picture(32, 2)), before, rtol=1e-2)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_before_ln_pre_enter_the_first_block_as_if_it_saw_them_beside_the_patches(deep, clip):
    method, images = strong(VPT(clip, NAMES, n_visual=5, deep=deep, before_ln_pre=True)), picture(32, 3)
    _, [ours] = run_recorded(method, lambda: method(images))
    expected = before_ln_pre(method, images)
    assert_equal(ours, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    assert_equal(gradient((ours * weight).sum(), method)[0], gradient((expected * weight).sum(), method)[0])


def test_shallow_prompts_before_ln_pre_equal_the_literal_insertion_in_logits_and_gradients(precision, clip):
    method, images = strong(VPT(clip, NAMES, n_visual=5, deep=False, before_ln_pre=True)), picture(32, 3)
    x = before_ln_pre(method, images)
    for block in clip.visual.blocks:
        x = plain_block(block, x)
    expected = clip.logits(clip.visual.project(x), clip.classifier(NAMES))
    assert_equal(method(images), expected)
    ours, theirs = (gradient(logits.square().sum(), method) for logits in (method(images), expected))
    assert_equal(ours, theirs, relative=1e-4)


@pytest.mark.parametrize("deep", [True, False])
def test_before_ln_pre_normalises_the_first_set_alone(deep, clip):
    before, behind = (strong(VPT(clip, NAMES, n_visual=5, deep=deep, before_ln_pre=flag)) for flag in (True, False))
    behind.visual_prompts.data[0] = clip.visual.ln_pre(before.visual_prompts[0])
    assert_equal(before(picture(32, 3)), behind(picture(32, 3)))


def test_random_prompts_follow_the_seed_and_have_the_papers_scale(clip):
    torch.manual_seed(1)
    one = VPT(clip, NAMES, n_visual=50).visual_prompts.detach()
    torch.manual_seed(1)
    assert torch.equal(one, VPT(clip, NAMES, n_visual=50).visual_prompts)
    assert float(one.std()) == pytest.approx(0.02, rel=0.05) and abs(float(one.mean())) < 1e-3


# ---- What learns ----


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_the_prompts_learn_and_all_of_them_get_a_gradient(kind, clip):
    clip.requires_grad_(True)
    method = VPT(clip, NAMES, **kind)
    assert list(learned(method)) == ["visual_prompts"] and method.visual_prompts.dtype == torch.float32
    method.loss(picture(32, 4), torch.arange(4)).backward()
    assert all(p.grad is None for p in clip.parameters())
    assert method.visual_prompts.grad.abs().sum(dim=-1).gt(0).all()


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("options, count", [
    (dict(), 92_160), (dict(n_visual=120), 1_105_920), (dict(n_visual=4), 768 * 4 * 12),
    (dict(n_visual=4, deep=False), 768 * 4),
], ids=str)  # fmt: skip
def test_parameter_counts_of_the_papers(options, count, patch):
    assert sum(p.numel() for p in learned(VPT(wide_clip(patch), ["cat"], **options)).values()) == count


def test_training_lowers_the_loss(clip):
    torch.manual_seed(0)
    method, images, labels = VPT(clip, NAMES), picture(32, 4), torch.arange(4)
    before = float(method.loss(images, labels).detach())
    for _ in range(5):
        method.visual_prompts.data -= 1e-3 * gradient(method.loss(images, labels), method)
    assert float(method.loss(images, labels).detach()) < before


def test_clip_never_changes(clip):
    weights, method = copy.deepcopy(clip.state_dict()), VPT(clip, NAMES)
    before = method(picture(32, 2))
    train_step(method)
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())
    assert not torch.equal(method(picture(32, 2)), before)


# ---- The interface ----


def test_encode_text_is_the_classifier_of_the_templates(clip):
    templates = ["a photo of a {}.", "{} texture."]
    method = VPT(clip, NAMES, templates)
    assert torch.equal(method.encode_text(), clip.classifier(NAMES, templates))
    assert not torch.allclose(method.encode_text(), VPT(clip, NAMES).encode_text(), rtol=1e-2)
    train_step(method)
    assert torch.equal(method.encode_text(), clip.classifier(NAMES, templates))


def test_the_image_tower_runs_once_and_never_without_prompts(clip, monkeypatch):
    monkeypatch.setattr(clip, "encode_image", lambda _: pytest.fail("the frozen image tower is run"))
    method, images = VPT(clip, NAMES, n_visual=5), picture(32, 2)
    for call in (lambda: method(images), lambda: method.loss(images, torch.arange(2))):
        assert [x.shape[1] for x in run_recorded(method, call)[1]] == [1 + 4 + 5]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes(kind, clip):
    method, images = VPT(clip, NAMES, n_visual=5, **kind), picture(32, 3)
    assert method.visual_prompts.shape == (3 if kind.get("deep", True) else 1, 5, 128)
    assert method.encode_text().shape == (5, 64) and method.encode_image(images).shape == (3, 64)
    assert method(images).shape == (3, 5) and method(images, method.encode_text()[:4]).shape == (3, 4)
    assert method.loss(images, torch.arange(3), epoch=7).shape == ()


def test_one_class_is_enough(clip):
    method, images = VPT(clip, ["cat"]), picture(32, 2)
    assert method(images).shape == (2, 1)
    assert method.loss(images, torch.zeros(2, dtype=torch.long)).item() == 0


def test_prompts_to_show_have_the_name_and_the_template(clip):
    assert VPT(clip, ["polka_dotted"], ["{} texture.", "{}"]).prompt_texts == ["polka dotted texture."]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_runs_on_the_meta_device(kind, clip):
    method = copy.deepcopy(VPT(clip, NAMES, **kind)).to("meta")
    images, labels = torch.empty(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    assert method.encode_text().device.type == "meta" and method(images).shape == (2, 5)
    method.loss(images, labels).backward()
    assert method.visual_prompts.grad.device.type == "meta"


def test_train_py_has_it_with_the_recipe_of_the_paper():
    assert train.METHODS["vpt"] is VPT
    recipe, options = settings.resolve_recipe(VPT.recipe, {}, "dtd", 16)
    assert (recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"], recipe["epochs"]) == (0.01, 10, 32, 200)
    assert (recipe["optimizer"], recipe["momentum"], recipe["weight_decay"], options) == ("sgd", 0.9, 5e-4, {})
    epochs = [settings.resolve_recipe(VPT.recipe, {}, "dtd", shots)[0]["epochs"] for shots in (1, 2, 4)]
    assert epochs == [50, 100, 100]
    imagenet, _ = settings.resolve_recipe(VPT.recipe, {}, "imagenet", 16)
    assert (imagenet["epochs"], imagenet["warmup_epochs"], imagenet["lr"]) == (50, 10, 0.01)


def test_a_negative_number_of_prompts_is_refused(clip):
    with pytest.raises(UserError, match="n_visual is -1.*0 or more"):
        VPT(clip, NAMES, n_visual=-1)
