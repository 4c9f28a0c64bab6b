"""What every method promises, whatever its paper: the interface of Method in clip_min.py, and a method of your own."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_state_dict
from test_clip import assert_equal, picture, watch_attention
from torch import nn

import train
from clip_min import CLIP, Method, UserError
from support import attention
from support.machine import cast_products

# The linear probe learns nothing by steps, prepare() fits it: its promises are tested in test_baselines.py.
METHODS = {name: method for name, method in train.METHODS.items() if name != "linear_probe"}
ROOT = Path(__file__).parents[1]
NAMES = ["cat", "shovel-nosed_ray", "polka dotted", "St. John's Co.", "ox"]
OTHERS = ["a dog", "tree_frog", "sea", "old car", "house"]
SMALL = {"coop": dict(n_ctx=4), "fgvpl": dict(cache_views=2), "proda": dict(n_prompts=8)}  # options that save time
CACHES = {"fgvpl"}  # methods that keep pictures of the training classes
LIKELY = {"dpt", "cavpt"}  # methods whose prompts come from the likely classes, so that the set of classes matters
NEVER_LEARNS = {"cavpt": {"cavpt.mlp.2.bias"}}  # it moves every class's score alike, to which a softmax is blind
IMAGES, LABELS = picture(32, 4), torch.tensor([0, 3, 1, 2])
FEW_SHOT = [(picture(32, 3, seed=5), torch.tensor([0, 1, 2])), (picture(32, 2, seed=6), torch.tensor([3, 4]))]
WEIGHTS = random_state_dict(**TINY | dict(vision_layers=3))
TRAINED = [name for name in METHODS if METHODS[name].recipe]
every_method = pytest.mark.parametrize("name", METHODS)
every_trained_method = pytest.mark.parametrize("name", TRAINED)


# ---- Helpers ----


@pytest.fixture
def clip():
    """A small random CLIP, new for every test, of weights drawn once."""
    return CLIP.from_state_dict(WEIGHTS)


def make(name, clip, names=NAMES, seed=0, **options):
    """As train.py makes it: with its cache, before the first step."""
    torch.manual_seed(seed)
    method = METHODS[name](clip, names, **SMALL.get(name, {}) | options)
    method.prepare(FEW_SHOT)
    return method


def learned(method):
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def train_steps(method, steps=2):
    if not learned(method):
        return
    optimizer = torch.optim.SGD(learned(method).values(), lr=0.01, weight_decay=0.01)
    for epoch in range(steps):
        optimizer.zero_grad()
        method.train().loss(IMAGES, LABELS, epoch).backward()
        optimizer.step()


def trained(name, clip, **options):
    method = make(name, clip, **options)
    train_steps(method)
    return method.eval()


@torch.no_grad()
def logits(method):
    return method.eval()(IMAGES)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# ---- CLIP is frozen, and belongs to nobody ----


@every_method
def test_clip_stays_the_same_to_the_bit(name, clip):
    before, image, text = copied(clip.state_dict()), clip.encode_image(IMAGES), clip.classifier(NAMES)
    method = trained(name, clip.requires_grad_(True))
    method(IMAGES, method.encode_text())
    attention.maps(method, IMAGES)
    assert method.clip is clip and not any(p.requires_grad for p in clip.parameters())
    assert all(p.grad is None for p in clip.parameters())
    assert same_tensors(clip.state_dict(), before) and not clip._forward_pre_hooks
    assert torch.equal(clip.encode_image(IMAGES), image) and torch.equal(clip.classifier(NAMES), text)


def test_all_methods_share_one_clip_and_none_changes_another(clip):
    methods = {name: make(name, clip) for name in METHODS}
    expected = {name: logits(method) for name, method in methods.items()}
    for name, method in methods.items():
        train_steps(method)
        assert torch.equal(logits(method), expected[name]) != (name in TRAINED)
        expected[name] = logits(method)
        assert all(torch.equal(logits(other), expected[key]) for key, other in methods.items())


# ---- What learns ----


@every_method
def test_only_the_methods_own_tensors_learn_and_all_of_them_get_a_gradient(name, clip):
    method = make(name, clip)
    before = copied(learned(method))
    assert bool(before) == (name in TRAINED) and not any(key.startswith("clip.") for key in before)
    train_steps(method)
    for key, p in learned(method).items():
        assert p.grad is not None and p.dtype == p.grad.dtype == torch.float32, key
        assert p.grad.abs().max() > (0 if key not in NEVER_LEARNS.get(name, ()) else -1), key
        assert not torch.equal(p, before[key]) or key in NEVER_LEARNS.get(name, ()), key


@every_trained_method
def test_bfloat16_towers_leave_loss_gradients_and_learned_tensors_in_full_precision(name, clip):
    method = make(name, clip).eval()
    torch.manual_seed(0)  # ProDA draws some of its prompts
    full = method.loss(IMAGES, LABELS).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.encode_image(IMAGES).dtype == torch.bfloat16
        method.prepare(FEW_SHOT)
        torch.manual_seed(0)
        loss = method.loss(IMAGES, LABELS)
        assert method(IMAGES).dtype == torch.float32
    loss.backward()
    assert loss.dtype == torch.float32
    assert_equal(loss, full, 0.1)
    for key, p in learned(method).items():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all(), key
    assert all(not t.is_floating_point() or t.dtype == torch.float32 for t in method.learned().values())


@every_trained_method
def test_towers_held_in_half_precision_compute_the_same_bits_under_autocast(name, clip):
    method = make(name, copy.deepcopy(clip)).eval()
    results = []
    for _ in range(2):
        torch.manual_seed(0)  # ProDA draws some of its prompts
        with torch.autocast("cpu", torch.bfloat16):
            method.prepare(FEW_SHOT)
            loss = method.loss(IMAGES, LABELS)
            logits = method(IMAGES)
        method.zero_grad()
        loss.backward()
        results.append([loss, logits, *(p.grad for p in learned(method).values())])
        cast_products(method.clip, torch.bfloat16)
    assert method.clip.visual.conv1.weight.dtype == torch.bfloat16
    assert method.clip.logit_scale.dtype == method.clip.visual.ln_pre.weight.dtype == torch.float32
    for cast_at_every_use, held in zip(*results, strict=True):
        assert torch.equal(cast_at_every_use, held)


@every_trained_method
def test_groups_hold_every_learned_tensor_once_and_parts_have_rates_of_their_own(name, clip):
    """They come in the order of the recipe, the others in the method's: a checkpoint relies on it."""
    method = make(name, clip)
    tensors, rates = learned(method), dict(lr=0.5, warmup_epochs=7)
    last_and_first = {list(tensors)[-1]: rates, list(tensors)[0]: rates}
    recipe = dict(lr=0.25, warmup_epochs=3, parts=last_and_first | {"none of its tensors": rates})
    for groups, parts in ((method.parameter_groups(), METHODS[name].recipe.get("parts", {})),
                          (method.parameter_groups(recipe), last_and_first)):
        parts = [part for part in parts if part in tensors]
        order = [[part] for part in parts] + [[part for part in tensors if part not in parts]]
        held = [[id(p) for p in group["params"]] for group in groups]
        assert held == [[id(tensors[part]) for part in of_group] for of_group in order]
    assert [(group["lr"], group["warmup_epochs"]) for group in groups] == [(0.5, 7)] * len(parts) + [(0.25, 3)]


@every_method
def test_a_prepared_cache_is_the_only_thing_that_prepare_makes(name, clip):
    torch.manual_seed(0)
    method = METHODS[name](clip, NAMES, **SMALL.get(name, {}))
    before = copied(method.learned())
    assert method.prepare(FEW_SHOT) is None
    new = {key for key, tensor in method.learned().items() if not torch.equal(tensor, before[key])}
    assert new == ({"keys", "labels"} if name in CACHES else set())
    assert same_tensors(method.state_dict(), make(name, clip).state_dict())


# ---- The order of calls does not matter ----

ORDERS = ["text image logits loss attention", "image attention text loss logits",
          "loss attention logits image text", "attention loss image text logits"]  # fmt: skip


@every_method
def test_the_order_of_calls_does_not_matter(name, clip):
    original, results = trained(name, clip), []
    text = copy.deepcopy(original).encode_text().detach()
    for order in ORDERS:
        method, found = copy.deepcopy(original), {}
        calls = dict(text=method.encode_text, image=lambda m=method: m.encode_image(IMAGES, text),
                     logits=lambda m=method: m(IMAGES), loss=lambda m=method: m.loss(IMAGES, LABELS),
                     attention=lambda m=method: attention.maps(m, IMAGES)["attention"])  # fmt: skip
        for step in order.split():
            torch.manual_seed(0)  # ProDA draws some of its prompts
            found[step] = calls[step]().detach()
        results.append(found)
    assert all(same_tensors(found, results[0]) for found in results[1:])


@every_method
def test_text_given_is_what_it_would_have_encoded(name, clip):
    method = trained(name, clip)
    text = method.encode_text()
    assert text.shape == (5, 64) and method.encode_image(IMAGES, text).shape == (4, 64)
    assert torch.equal(method(IMAGES, text), method(IMAGES)) and method(IMAGES).shape == (4, 5)
    assert method.loss(IMAGES, LABELS).shape == method.loss(IMAGES, LABELS, epoch=99).shape == ()


@every_method
def test_an_evaluation_encodes_the_text_once(name, clip, monkeypatch):
    """CoCoOp's other contexts, those of the pictures, are not counted."""
    method, calls = trained(name, clip), []
    encode_text = method.encode_text
    monkeypatch.setattr(method, "encode_text", lambda *ctx: calls.append(ctx) or encode_text(*ctx))
    text = method.encode_text()
    for _ in range(2):
        method(IMAGES, text)
    assert calls.count(()) == 1


# ---- What is saved, and comes back ----


@every_method
def test_what_was_learned_comes_back(name, clip):
    method, other = trained(name, clip), METHODS[name](clip, NAMES, **SMALL.get(name, {})).eval()
    tensors = copied(method.learned())
    assert bool(tensors) == (name in TRAINED) and not any(key.startswith("clip.") for key in tensors)
    assert learned(method).keys() <= tensors.keys()
    assert torch.equal(logits(other), logits(method)) != (name in TRAINED)
    other.load_learned(tensors)
    assert torch.equal(logits(other), logits(method)) and same_tensors(other.learned(), tensors)
    assert learned(other).keys() == learned(method).keys()
    losses = []
    for each in other, method:
        torch.manual_seed(0)  # ProDA draws some of its prompts
        losses.append(each.loss(IMAGES, LABELS))
    assert torch.equal(*losses)


@every_method
def test_tensors_that_do_not_fit_are_refused(name, clip):
    method = trained(name, clip)
    tensors = copied(method.learned())
    wrong = [tensors | dict(another=torch.zeros(1))]
    for key, tensor in tensors.items():
        wrong.append({other: t for other, t in tensors.items() if other != key})
        wrong.append(tensors | {key: torch.cat([tensor, tensor])})
        wrong.append(tensors | {key: tensor.unsqueeze(0)})
    for given in wrong:
        with pytest.raises(UserError, match=f"do not fit {METHODS[name].__name__}"):
            make(name, clip).load_learned(given)


# ---- Other classes ----


@every_method
def test_for_other_classes_it_is_the_method_with_what_it_learned(name, clip):
    method = trained(name, clip)
    before = logits(method)
    columns = list(range(5)) if name in CACHES else None
    other = method.for_classes(OTHERS, columns)
    expected = METHODS[name](clip, OTHERS, **SMALL.get(name, {}))
    expected.load_learned(copied(method.learned()))
    assert_equal(logits(other), logits(expected))
    assert not torch.allclose(logits(other), before, rtol=1e-3)
    assert other.clip is clip and type(other) is METHODS[name] and other.classnames[1] == "tree frog"
    assert "tree frog" in other.prompt_texts[1] and other.zero_shot.shape == (5, 64)
    assert method.classnames[0] == "cat" and torch.equal(logits(method), before), "the original stays as it is"
    train_steps(other)
    assert torch.equal(logits(method), before), "they share no tensor"


@every_method
@pytest.mark.parametrize("columns", [[3, 1, 4, 0, 2], [4, 1]], ids=str)
def test_some_of_the_training_classes_have_the_logits_of_their_columns(columns, name, clip):
    method = trained(name, clip)
    other = method.for_classes([NAMES[column] for column in columns], columns)
    assert logits(other).shape == (4, len(columns))
    if name not in LIKELY or len(columns) == 5:
        assert_equal(logits(other), logits(method)[:, columns], 1e-4)


@pytest.mark.parametrize("name, options", [("coop", dict(csc=True)), ("fgvpl", {}), ("fgvpl", dict(parts="tip-f"))],
                         ids=str)
def test_tensors_for_every_training_class_need_the_columns(name, options, clip):
    method = trained(name, clip, **options)
    with pytest.raises(UserError, match="belong.* to the classes.*train with"):
        method.for_classes(OTHERS)
    other = method.for_classes([NAMES[3], NAMES[0]], [3, 0])
    assert_equal(logits(other), logits(method)[:, [3, 0]], 1e-4)


# ---- Maps of attention ----


@every_method
def test_attention_gives_maps_over_the_patches(name, clip):
    method = trained(name, clip)
    before = logits(method)
    maps = attention.maps(method, IMAGES)
    assert next(iter(maps)) == "attention" and all(m.shape == (4, 4) and not m.requires_grad for m in maps.values())
    sums = maps["attention"].sum(dim=1)  # of each head, and the class token and the prompts have the rest of it
    heads = clip.visual.blocks[0].attn.heads if name in CACHES else 1
    assert maps["attention"].gt(0).all() and sums.lt(heads).all()
    assert not clip.visual.blocks[-1]._forward_pre_hooks, "what it listened with is gone"
    assert torch.equal(logits(method), before)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CACHES])
def test_attention_is_that_of_the_last_block_with_the_prompts(name, clip, monkeypatch):
    method = trained(name, clip)
    seen = watch_attention(clip.visual.blocks[-1], monkeypatch)
    method(IMAGES)
    last = seen[-1]  # of the block's last run: (B, H, 1, 1+N or more)
    assert_equal(attention.maps(method, IMAGES)["attention"], last[:, :, 0, 1:5].mean(dim=1))
    weights = attention.weights(method, IMAGES)
    assert weights.shape[:2] == last.shape[:2] and weights.shape[-1] == last.shape[-1] >= weights.shape[2] >= 5
    assert_equal(weights[:, :, :1], last)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))


# ---- CLIPs of other kinds ----


@every_method
def test_a_clip_that_reads_fewer_tokens_gives_the_same(name, clip):
    short = CLIP.from_state_dict(WEIGHTS | dict(positional_embedding=WEIGHTS["positional_embedding"][:32]))
    assert_equal(logits(make(name, short)), logits(make(name, clip)))
    with pytest.raises(UserError, match="CLIP reads 32"):
        METHODS[name](short, ["cat", "dog " * 31])


@pytest.mark.parametrize("name, options, length", [
    ("coop", dict(n_ctx=12), 36), ("coop", dict(n_ctx=12, class_token_position="middle"), 36),
    ("coop", dict(n_ctx=12, class_token_position="front", csc=True), 36), ("vlp", dict(n_ctx=12), 36),
    ("dpt", dict(n_ctx=12), 36), ("cavpt", dict(n_ctx=12), 36), ("upt", dict(n_ctx=12), 36),
    ("cocoop", dict(n_ctx=12, ctx_init=""), 36), ("prograd", dict(n_ctx=12), 36),
    ("proda", dict(n_ctx=12, n_prompts=4), 36)], ids=str)
def test_the_sentence_about_a_long_prompt_counts_what_this_clip_reads(name, options, length, clip):
    """The template fits, the context does not: 12 vectors, 21 words, the dot, start and end."""
    short = CLIP.from_state_dict(WEIGHTS | dict(positional_embedding=WEIGHTS["positional_embedding"][:32]))
    long = ["ox", "dog " * 20 + "cat"]
    METHODS["zeroshot"](short, long)
    with pytest.raises(UserError, match=rf'^"\[context\] dog dog .*" is {length} tokens long .*, CLIP reads 32: '):
        METHODS[name](short, long, **options)
    assert logits(METHODS[name](clip, long, **options)).shape == (4, 2)


# ---- A method of your own: its __init__ needs no order but super() first ----


class Correction(Method):
    """The README's."""

    recipe = dict(optimizer="sgd", lr=0.002, warmup_epochs=1, batch_size=32, epochs=50)

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, ratio=1.0):
        super().__init__(clip, classnames, templates)
        self.ratio, joint = ratio, self.zero_shot.shape[1]
        self.a = nn.Parameter(self.zero_shot.new_zeros(joint, joint))

    def encode_image(self, images, text=None):
        z = F.normalize(self.clip.encode_image(images), dim=-1)
        return z + self.ratio * z @ self.a


class Bare(Correction):
    """With prompts that depend on the class names, and on an attribute set behind super().__init__()."""

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=2):
        super().__init__(clip, classnames, templates)
        self.n_ctx = n_ctx
        self.ctx = nn.Parameter(torch.zeros(n_ctx, clip.text.token_embedding.embedding_dim))
        self.embed_prompts()

    def embed_prompts(self):
        self.x, self.layout = self.clip.embed_prompts(self.classnames, self.n_ctx)

    def encode_text(self):
        return self.clip.text(torch.cat([self.x[:1], self.ctx, self.x[1 + self.n_ctx :]]), self.layout)


@pytest.mark.parametrize("method_class", [Correction, Bare])
def test_a_method_of_your_own_may_set_attributes_behind_super_and_works_for_other_classes(method_class, clip):
    method = method_class(clip, NAMES)
    train_steps(method)
    before = logits(method)
    for names in (OTHERS, OTHERS[:2], NAMES[::-1], ["a"]):
        other, expected = method.for_classes(names), method_class(clip, names)
        expected.load_learned(copied(method.learned()))
        assert torch.equal(logits(other), logits(expected)) and logits(other).shape == (4, len(names))
        assert other.clip is clip and other.prompt_texts == expected.prompt_texts and names[0] in other.prompt_texts[0]
    assert torch.equal(logits(method), before) and not torch.allclose(logits(method.for_classes(OTHERS)), before)
    assert_equal(logits(method.for_classes(NAMES[::-1])), before.flip(1))


def test_the_readmes_method_needs_no_more_than_init_and_encode_image():
    source = re.search(r"^class Correction\(Method\):.*?^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[0]
    (written,) = ast.parse(source.removesuffix("```")).body
    functions = {node.name: len(node.body) for node in written.body if isinstance(node, ast.FunctionDef)}
    assert functions == dict(__init__=3, encode_image=2) and len(source.splitlines()) <= 13


# ---- Options and sentences ----


@every_method
def test_default_options_are_all_that_can_be_set(name, clip):
    options = METHODS[name].default_options()
    plain, explicit = ({key: t.shape for key, t in METHODS[name](clip, NAMES, **given).learned().items()}
                       for given in ({}, options))
    assert plain == explicit
    assert all(type(value) in (int, float, bool, str, type(None)) for value in options.values())
    with pytest.raises(TypeError):
        METHODS[name](clip, NAMES, ("a photo of a {}.",), None)  # options have names


@every_method
def test_prompts_to_show_name_every_class(name, clip):
    method = make(name, clip)
    assert method.classnames[1] == "shovel-nosed ray" and len(method.prompt_texts) == 5
    assert all(c in text and "_" not in text for c, text in zip(method.classnames, method.prompt_texts, strict=True))
    assert METHODS[name](clip, NAMES, ("{} texture.", "a {}.")).templates == ("{} texture.", "a {}.")


@every_method
def test_showing_the_prompts_draws_no_random_number(name, clip):
    """A run shows them before it trains, and learns the same as one that does not."""
    method = make(name, clip).train()
    before = torch.get_rng_state()
    assert method.prompt_texts and torch.equal(torch.get_rng_state(), before)


@every_method
def test_the_zero_shot_classifier_is_that_of_the_templates(name, clip):
    templates = ("{} texture.", "a photo of a {}.")
    assert torch.equal(METHODS[name](clip, NAMES, templates).zero_shot, clip.classifier(NAMES, templates))


# ---- Zero-shot CLIP is the limit ----


@pytest.mark.parametrize("name, template, options", [
    ("zeroshot", "a photo of a {}.", {}), ("coop", "{}.", dict(n_ctx=0)), ("vpt", "a photo of a {}.", dict(n_visual=0)),
    ("vpt", "a photo of a {}.", dict(n_visual=0, deep=False)), ("vlp", "{}.", dict(n_ctx=0, n_visual=0)),
    ("dpt", "{}.", dict(n_ctx=0, n_visual=0, k_n=0)), ("cavpt", "{}.", dict(n_ctx=0, n_visual=0, k_n=0)),
    ("cavpt", "a photo of a {}.", dict(base="vpt", n_visual=0, k_n=0)),
    ("fgvpl", "a photo of a {}.", dict(parts="tip", lam=0.0)),
    ("fgvpl", "a photo of a {}.", dict(parts="tar", lam=0.0, alpha=0.0)),
], ids=str)  # fmt: skip
def test_without_prompts_it_is_zero_shot_clip(name, template, options, clip):
    expected = clip.logits(clip.encode_image(IMAGES), clip.classifier(NAMES, [template]))
    assert_equal(logits(make(name, clip, **options)), expected)


def test_method_itself_is_zero_shot_clip_and_has_nothing_to_learn(clip):
    method = Method(clip, NAMES)
    expected = clip.logits(clip.encode_image(IMAGES), clip.classifier(NAMES))
    assert issubclass(METHODS["zeroshot"], Method) and torch.equal(method(IMAGES), expected)
    torch.testing.assert_close(method.loss(IMAGES, LABELS), F.cross_entropy(expected, LABELS))
    assert method.learned() == learned(method) == method.recipe == method.default_options() == {}


# ---- Another device: a tensor made on the CPU meets the others of "meta" and fails, as it would on a GPU ----


@every_method
def test_it_runs_on_another_device(name, clip, monkeypatch):
    if name == "dpt":  # it asks whether there is a hit: meta has no answer
        monkeypatch.setattr(torch.Tensor, "any", lambda self: True)
    method = copy.deepcopy(make(name, clip)).to("meta")
    images, labels = IMAGES.to("meta"), LABELS.to("meta")
    method.prepare([(x.to("meta"), y.to("meta")) for x, y in FEW_SHOT])
    for epoch in (0, 99):
        loss = method.train().loss(images, labels, epoch)
        if learned(method):
            loss.backward()
    assert all(p.grad.device.type == "meta" for p in learned(method).values())
    with torch.no_grad():
        made = [method.eval().encode_text(), method(images), method(images, method.encode_text()), loss,
                *attention.maps(method, images).values(), *method.learned().values()]  # fmt: skip
    assert all(tensor.device.type == "meta" for tensor in made)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_method
def test_on_a_gpu_it_is_made_there_and_gives_what_it_gives_on_a_cpu(name, clip):
    expected, method = trained(name, clip), make(name, CLIP.from_state_dict(WEIGHTS).to("cuda"))
    assert all(tensor.is_cuda for tensor in [*method.parameters(), *method.buffers()])
    method.load_learned(copied(expected.learned()))
    images, labels = IMAGES.cuda(), LABELS.cuda()
    assert_equal(method.eval()(images).cpu(), expected(IMAGES), 1e-3)
    loss = method.loss(images, labels)
    if learned(method):
        loss.backward()
    assert_equal(loss.cpu(), expected.loss(IMAGES, LABELS), 1e-3)
    other = method.for_classes(OTHERS, list(range(5)) if name in CACHES else None)
    assert all(tensor.is_cuda for tensor in [*other.parameters(), *other.buffers(), other(images)])
    assert all(m.is_cuda for m in attention.maps(method, images).values())


# ---- The programs know no method ----


@pytest.mark.parametrize("file", [file for file in ("train.py", "report.py") if (ROOT / file).exists()])
def test_programs_neither_probe_methods_nor_name_what_is_theirs(file, clip):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not re.findall(r"\bhasattr\b|\binspect\b|\bgetattr\((?!error\b)|\bisinstance\(method\b", source)
    theirs = set()
    for name in METHODS:
        method = make(name, clip)
        theirs |= METHODS[name].default_options().keys() | {key.split(".")[0] for key in method.learned()}
    assert {"n_ctx", "csc", "ctx", "visual_prompts", "cavpt", "unified", "x_fp", "cache_views"} <= theirs
    theirs -= {"parts", "keys", *METHODS}  # words of a recipe, of a dict, and of the command line
    for node in ast.walk(ast.parse(source)):
        used = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        assert used not in theirs, f"line {node.lineno}"


@pytest.mark.parametrize("file", ["coop", "vpt", "dpt", "upt", "fgvpl"])
def test_a_method_file_opens_with_a_short_head_and_has_no_long_lines(file):
    source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    head = ast.get_docstring(ast.parse(source))
    assert len(head.splitlines()) <= 40 and max(map(len, source.splitlines())) <= 120
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi 10\.", head) and "Eq. " in head and "To use it elsewhere, copy" in head
