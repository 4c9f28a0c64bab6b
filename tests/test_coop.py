"""What coop.py promises: CoOp's prompts, exactly as when every class is encoded alone in full length."""

import ast
import copy
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_clip, random_state_dict
from test_clip import assert_equal, picture, plain_text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clip_min import CLIP, UserError, encode, tokenize
from coop import CoOp, Prompts
from support import settings

ROOT = Path(__file__).parents[1]
FILES = dict(coop="CoOp", vpt="VPT", dpt="DPT", upt="UPT", fgvpl="FGVPL")
NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "St. John's Co.", "ox"]  # of different lengths, one ends in a dot
OPTIONS = [
    dict(n_ctx=4), dict(n_ctx=4, class_token_position="middle"), dict(n_ctx=4, class_token_position="front"),
    dict(n_ctx=5, class_token_position="middle"), dict(n_ctx=4, csc=True), dict(n_ctx=1, class_token_position="middle"),
    dict(n_ctx=5, csc=True, class_token_position="middle"), dict(n_ctx=4, csc=True, class_token_position="front"),
    dict(ctx_init="a photo of a"), dict(ctx_init="a photo of a", class_token_position="middle"),
    dict(ctx_init="a photo of a", csc=True, class_token_position="front"), dict(n_ctx=0), dict(),
]  # fmt: skip
AWKWARD = {
    "begin alike": ["red cup", "red-tailed hawk", "red", "red cup cake"],
    "like the places": ["x", "x x", "x x x x x x"],
    "marks": ["U.S.", "U.S. flag", "cat...", "who?!", "St. John's"], "one begins the other": ["cat", "cat cat"],
    "the same twice": ["ox", "ox"], "one": ["red cup"], "a long one": ["ox", "very " * 40 + "red cup"],
}


# ---- Helpers ----


def literal_encode_text(method, names, n_ctx=16, ctx_init="", class_token_position="end", csc=False):
    """As CoOp's code: embed "X .. X name.", put the contexts in place of the X, all 77 positions, class by class."""
    clip = method.clip
    n_ctx = len(encode(ctx_init)) if ctx_init else n_ctx
    prompts, ends = [], []
    for i, name in enumerate(name.replace("_", " ") for name in names):
        tokens = tokenize(f"{ctx_init or ' '.join(['X'] * n_ctx)} {name}.")
        embedding, name_len = clip.text.token_embedding(tokens)[0], len(encode(name))
        prefix, suffix = embedding[:1], embedding[1 + n_ctx :]
        class_i, suffix_i = suffix[:name_len], suffix[name_len:]
        ctx = method.ctx[i] if csc else method.ctx
        half = n_ctx // 2
        parts = {
            "end": [prefix, ctx, suffix],
            "middle": [prefix, ctx[:half], class_i, ctx[half:], suffix_i],
            "front": [prefix, class_i, ctx, suffix_i],
        }
        prompts.append(torch.cat(parts[class_token_position]))
        ends.append(int(tokens.argmax()))
    return plain_text(clip, torch.stack(prompts), torch.tensor(ends))


def trained(clip, options, names=NAMES):
    """CoOp with contexts that differ, also from class to class."""
    method = CoOp(clip, names, **options)
    method.ctx.data.normal_(std=0.02, generator=torch.Generator().manual_seed(4))
    return method


def literal_logits(method, images, text):
    image, text = F.normalize(method.clip.encode_image(images), dim=-1), F.normalize(text, dim=-1)
    return method.clip.logit_scale.exp() * image @ text.T


def zero_shot(clip, template):
    return clip.logits(clip.encode_image(picture(32, 3)), clip.classifier(NAMES, [template]))


def train_step(method):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.01)
    method.loss(picture(32, 4), torch.arange(4)).backward()
    optimizer.step()


# ---- The method of the paper ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_equal_encoding_every_class_alone_in_full_length(options, precision, clip):
    method, images = trained(clip, options), picture(32, 3)
    assert_equal(method.encode_text(), literal_encode_text(method, NAMES, **options))
    assert_equal(method(images), literal_logits(method, images, literal_encode_text(method, NAMES, **options)))


@pytest.mark.parametrize("options", [options for options in OPTIONS if options.get("n_ctx") != 0], ids=str)
def test_gradients_equal_encoding_every_class_alone_in_full_length(options, precision, clip):
    method, images, labels = trained(clip, options), picture(32, 4), torch.tensor([0, 3, 1, 2])
    literal = F.cross_entropy(literal_logits(method, images, literal_encode_text(method, NAMES, **options)), labels)
    ours = torch.autograd.grad(method.loss(images, labels), method.ctx)[0]
    assert_equal(ours, torch.autograd.grad(literal, method.ctx)[0], relative=1e-4)


@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("names", AWKWARD.values(), ids=AWKWARD)
def test_names_that_are_easily_confused_keep_logits_and_gradients(names, position, csc, precision, clip):
    """Names with a beginning in common, like the places of the context, or with marks that merge with the dot."""
    options = dict(n_ctx=5, class_token_position=position, csc=csc)
    method, images = trained(clip, options, names), picture(32, 4)
    labels = torch.arange(4) % len(names)
    text = literal_encode_text(method, names, **options)
    assert_equal(method.encode_text(), text, 1e-5)
    literal = literal_logits(method, images, text)
    assert_equal(method(images), literal, 1e-5)  # in double precision to 1e-12
    weights = torch.randn(text.shape, generator=torch.Generator().manual_seed(5))
    gradients = [torch.autograd.grad((weights * features).sum(), method.ctx, retain_graph=True)[0]
                 for features in (method.encode_text(), text)]  # fmt: skip
    assert_equal(*gradients, 1e-5)
    if len(set(names)) > 1:  # else the loss does not depend on the context
        ours = torch.autograd.grad(method.loss(images, labels), method.ctx)[0]
        assert_equal(ours, torch.autograd.grad(F.cross_entropy(literal, labels), method.ctx)[0], 1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_no_context_is_zero_shot_clip(position, clip):
    method = CoOp(clip, NAMES, n_ctx=0, class_token_position=position)
    assert_equal(method(picture(32, 3)), zero_shot(clip, "{}."))


@pytest.mark.parametrize("csc", [False, True])
def test_a_phrase_is_zero_shot_clip_before_training(csc, clip):
    method = CoOp(clip, NAMES, ctx_init="a photo of a", csc=csc)
    assert_equal(method(picture(32, 3)), zero_shot(clip, "a photo of a {}."))


def test_positions_differ(clip):
    torch.manual_seed(0)
    methods = [CoOp(clip, NAMES, n_ctx=4, class_token_position=position) for position in ("end", "middle", "front")]
    for method in methods:
        method.ctx.data = methods[0].ctx.data.clone()
    end, middle, front = (method.encode_text() for method in methods)
    assert not torch.allclose(end, middle, rtol=1e-3) and not torch.allclose(end, front, rtol=1e-3)
    assert not torch.allclose(middle, front, rtol=1e-3)


def test_random_contexts_follow_the_seed_and_have_the_papers_scale():
    clip = random_clip(text_width=128)
    torch.manual_seed(1)
    one = CoOp(clip, NAMES, csc=True).ctx
    torch.manual_seed(1)
    assert torch.equal(one, CoOp(clip, NAMES, csc=True).ctx)
    assert float(one.detach().std()) == pytest.approx(0.02, rel=0.05) and abs(float(one.detach().mean())) < 1e-3


def test_every_class_begins_with_its_own_random_context(clip):
    ctx = CoOp(clip, NAMES, csc=True).ctx
    assert not any(torch.equal(ctx[0], other) for other in ctx[1:])


def test_the_loss_is_cross_entropy(clip):
    method, labels = CoOp(clip, NAMES), torch.tensor([0, 4, 2])
    logits = method(picture(32, 3))
    expected = -logits.log_softmax(dim=-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(method.loss(picture(32, 3), labels), expected)


# ---- What learns ----


@pytest.mark.parametrize("options", OPTIONS[:-2], ids=str)
def test_only_the_context_learns_and_all_of_it_gets_a_gradient(options, clip):
    clip.requires_grad_(True)
    method = CoOp(clip, NAMES, **options)
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["ctx"]
    method.loss(picture(32, 4), torch.arange(4)).backward()
    assert all(p.grad is None for p in clip.parameters())
    assert method.ctx.dtype == torch.float32 and method.ctx.grad.abs().flatten(0, -2).sum(dim=-1).gt(0).all()


@pytest.mark.parametrize("csc, count", [(False, 8192), (True, 5 * 8192)])
def test_parameter_counts_of_the_paper(csc, count):
    state = random_state_dict(**TINY | dict(text_width=512, text_layers=1))
    method = CoOp(CLIP.from_state_dict(state), NAMES, csc=csc)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count


def test_training_lowers_the_loss(clip):
    torch.manual_seed(0)
    method, images, labels = CoOp(clip, NAMES, n_ctx=4), picture(32, 4), torch.arange(4)
    before = float(method.loss(images, labels).detach())
    optimizer = torch.optim.SGD([method.ctx], lr=0.002)
    for _ in range(5):
        optimizer.zero_grad()
        method.loss(images, labels).backward()
        optimizer.step()
    assert float(method.loss(images, labels).detach()) < before


def test_two_methods_share_a_clip_that_never_changes(clip):
    before, weights = zero_shot(clip, "a photo of a {}."), copy.deepcopy(clip.state_dict())
    one, two = CoOp(clip, NAMES, n_ctx=4), CoOp(clip, NAMES, n_ctx=4, csc=True, class_token_position="front")
    untouched = two(picture(32, 3)).detach()
    train_step(one)
    assert torch.equal(two(picture(32, 3)), untouched)
    train_step(two)
    assert torch.equal(zero_shot(clip, "a photo of a {}."), before)
    assert all(torch.equal(value, weights[key]) for key, value in clip.state_dict().items())
    assert not torch.equal(two(picture(32, 3)), untouched)


# ---- The interface ----


@pytest.mark.parametrize("options, shape", [({}, (16, 64)), (dict(n_ctx=3, csc=True), (len(NAMES), 3, 64))])
def test_contexts_are_all_that_is_learned(options, shape, clip):
    method = CoOp(clip, NAMES, **options)
    assert method.contexts() is method.ctx and method.ctx.shape == shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shapes(options, clip):
    method, images = CoOp(clip, NAMES, **options), picture(32, 3)
    assert method.encode_text().shape == (5, 64)
    assert method(images).shape == (3, 5)
    assert method(images, method.encode_text()).shape == (3, 5)
    assert method.loss(images, torch.tensor([0, 1, 2])).shape == ()
    assert method.loss(images, torch.tensor([0, 1, 2]), epoch=3).shape == ()


def test_text_given_is_used_and_not_encoded_again(clip, monkeypatch):
    method = CoOp(clip, NAMES)
    text, logits = method.encode_text(), method(picture(32, 3))
    calls = []
    monkeypatch.setattr(method, "encode_text", lambda: calls.append(1) or text)
    assert torch.equal(method(picture(32, 3), text), logits) and not calls
    method(picture(32, 3))
    assert calls == [1]


def test_one_class_is_enough(clip):
    for options in OPTIONS:
        assert CoOp(clip, ["cat"], **options)(picture(32, 2)).shape == (2, 1)


@pytest.mark.parametrize("n_front, csc, n_common", [(0, False, 1), (2, False, 3), (5, False, 6), (2, True, 1)])
def test_what_all_prompts_begin_with_is_encoded_once(n_front, csc, n_common, clip):
    """The start token and the vectors in front of the names, unless every class has its own."""
    assert Prompts(clip, NAMES, 5, n_front, csc).layout.n_common == n_common


def test_a_thousand_classes_take_ten_times_the_multiplications_of_a_hundred(clip):
    multiplications, operators = [], []
    for number in 100, 1000:
        names = [f"large thing number {i * 1000 // number:03}" for i in range(number)]  # all digits in both
        with FlopCounterMode(display=False) as counter, CountOperators() as counted:
            CoOp(clip, names).loss(picture(32, 4), torch.arange(4)).backward()
        multiplications.append(counter.get_total_flops())
        operators.append(counted.number)
    assert 8 < multiplications[1] / multiplications[0] <= 10
    assert operators[1] < 20 * 1000, "the tower does not run for each class alone"


class CountOperators(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += 1
        return operator(*args, **(kwargs or {}))


def test_underscores_in_names_are_spaces(clip):
    torch.manual_seed(0)
    one = CoOp(clip, ["polka_dotted"]).encode_text()
    torch.manual_seed(0)
    assert torch.equal(one, CoOp(clip, ["polka dotted"]).encode_text())


def test_prompts_to_show_have_the_name_and_the_phrase(clip):
    assert CoOp(clip, ["shovel-nosed_ray"], ctx_init="a photo of a").prompt_texts == ["a photo of a shovel-nosed ray."]
    prompts = CoOp(clip, NAMES, n_ctx=4).prompt_texts
    assert len(prompts) == 5 and "4" in prompts[0] and prompts[0].endswith("cat.")


SHOWN = [
    (dict(n_ctx=4), "[4 vectors] red cup."), (dict(n_ctx=4, csc=True), "[4 vectors] red cup."),
    (dict(), "[16 vectors] red cup."), (dict(n_ctx=0), "red cup."),
    (dict(n_ctx=5, class_token_position="middle"), "[2 vectors] red cup [3 vectors]."),
    (dict(n_ctx=1, class_token_position="middle"), "red cup [1 vectors]."),
    (dict(n_ctx=4, class_token_position="front"), "red cup [4 vectors]."),
    (dict(n_ctx=4, class_token_position="front", csc=True), "red cup [4 vectors]."),
    (dict(n_ctx=0, class_token_position="middle"), "red cup."),
    (dict(ctx_init="a_photo of a"), "a photo of a red cup."),
    (dict(n_ctx=9, ctx_init="a photo of a"), "a photo of a red cup."),
    (dict(ctx_init="a photo of a", class_token_position="middle"), "[2 vectors] red cup [2 vectors]."),
    (dict(ctx_init="a photo of a", class_token_position="front"), "red cup [4 vectors]."),
]  # fmt: skip


@pytest.mark.parametrize("options, expected", SHOWN, ids=str)
def test_prompts_to_show_have_the_context_where_it_stands(options, expected, clip):
    method = CoOp(clip, ["red_cup", "ox"], **options)
    assert method.prompt_texts == [expected, expected.replace("red cup", "ox")]
    if not method.csc:
        assert method.for_classes(["ox", "red_cup"]).prompt_texts == method.prompt_texts[::-1]


def test_a_negative_number_of_vectors_is_refused(clip):
    with pytest.raises(UserError, match="n_ctx is -1.*0 or more"):
        CoOp(clip, NAMES, n_ctx=-1)


def test_a_wrong_position_lists_the_choices(clip):
    with pytest.raises(UserError, match="class_token_position.*behind.*end, middle or front"):
        CoOp(clip, NAMES, class_token_position="behind")


@pytest.mark.parametrize("options, name", [(dict(), "dog " * 60), (dict(n_ctx=80), "dog"), (dict(n_ctx=74), "dog")])
def test_a_name_too_long_for_clip_is_refused(options, name, clip):
    with pytest.raises(UserError, match="dog.*tokens long|tokens long.*shorten"):
        CoOp(clip, ["cat", name], **options)


def test_the_longest_prompt_that_fits_works(clip):
    method = CoOp(clip, ["dog", "dog " * 57], n_ctx=16)  # start, 16, 57, ".", end: 76 of 77
    assert_equal(method.encode_text(), literal_encode_text(method, ["dog", "dog " * 57]))


def test_the_recipe_is_the_papers():
    recipe, options = settings.resolve_recipe(CoOp.recipe, {}, "dtd", 16)
    assert (recipe["optimizer"], recipe["lr"], recipe["warmup_epochs"], recipe["batch_size"]) == ("sgd", 0.002, 1, 32)
    assert (recipe["momentum"], recipe["weight_decay"], recipe["crop_scale"]) == (0.9, 5e-4, (0.08, 1.0))
    epochs = [settings.resolve_recipe(CoOp.recipe, {}, "dtd", shots)[0]["epochs"] for shots in (1, 2, 4, 8, 16)]
    assert epochs == [50, 100, 100, 200, 200] and options == {}
    assert settings.resolve_recipe(CoOp.recipe, {}, "imagenet", 16)[0]["epochs"] == 50


# ---- A method file can be copied ----


@pytest.mark.parametrize("file", FILES)
def test_a_method_file_imports_only_what_it_may(file):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported <= {"torch", "math", "collections", "functools", "typing", "clip_min"}


@pytest.mark.parametrize("file", FILES)
def test_a_method_file_trains_when_copied_with_clip_min_and_the_vocabulary(file, tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    for name in (f"{file}.py", "clip_min.py", "assets/bpe_merges.txt.gz"):
        shutil.copy(ROOT / name, tmp_path / name)
        assert name in (ROOT / f"{file}.py").read_text(encoding="utf-8") or name == f"{file}.py", "its head says so"
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    for name in ("clip_min", "data", "train", *FILES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, core = importlib.import_module(file), importlib.import_module("clip_min")
    assert Path(module.__file__).parent == tmp_path and Path(core.__file__).parent == tmp_path
    clip = core.CLIP.from_state_dict(random_state_dict(**TINY))
    method = getattr(module, FILES[file])(clip, NAMES)
    method.loss(picture(32, 2), torch.arange(2)).backward()
    assert method.parameter_groups() and any(p.grad is not None for p in method.parameters())
    for name in ("clip_min", file):
        monkeypatch.delitem(sys.modules, name)  # the copies go, the originals come back
