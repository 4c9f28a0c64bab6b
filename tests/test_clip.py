"""What clip_min.py promises about texts and towers: OpenAI's ids, OpenAI's outputs, and shortcuts that are exact.

OpenAI's own answers were recorded once from PyPI's clip-anytorch by `python tests/test_clip.py --record`; where that
package is installed, the same comparisons run live as well.
"""

import copy
import hashlib
import importlib.util
import json
import math
import random
import shutil
import sys
from pathlib import Path

import ftfy
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    B16,
    B32,
    TINY,
    at_most,
    openai_clip,
    openai_module,
    random_clip,
    random_numbers,
    random_state_dict,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import clip_min
from clip_min import CLIP, MEAN, STD, Block, LastBlock, UserError, preprocess, tokenize
from coop import CoOp

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"tiny": TINY, "ViT-B/32": B32, "ViT-B/16": B16}
ODD = [
    dict(joint=96, resolution=48, vision_layers=1, vision_width=192, patch=8, text_width=128, text_layers=3),
    dict(joint=32, resolution=42, vision_layers=3, vision_width=64, patch=14, text_width=192, text_layers=1),
    dict(joint=640, resolution=20, vision_layers=2, vision_width=256, patch=20, text_width=64, text_layers=4),
]
CAPTIONS = [
    "a photo of a cat.",
    "two dogs & a crème brûlée",
    "a blurry photo of the hard to see shovel-nosed ray, 3 of 12",
]
TEXTS = [
    "a photo of a cat.",
    "",
    " ",
    "Hello,   World!\t\nA  new line",
    "UPPER lower MiXeD",
    "crème brûlée à l'Été, Ünïcode",
    "Ångström façade naïve coöperate",
    "it's we're I'll they've don't I'm he'd 'sup 'Twas",
    "don’t “quote” it – really…",
    "schÃ¶n und cafÃ©",
    "fish &amp; chips",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &eacute;&#233;&#xe9; &unknown; &copy 2021",
    "🐱 🐶🐶 👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "你好，世界。日本語のテキスト 한국어 텍스트",
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते ไทย",
    "bell\x07 null\x00 escape\x1b[31mred\x1b[0m del\x7f",
    "zero\u200bwidth\ufeff soft\u00adhyphen no\u00a0break\u3000wide",
    "a <|startoftext|> in <|endoftext|> the text",
    "<|ENDOFTEXT|><|startoftext|> <|other|>",
    "snake_case __init__ a_b _",
    "12345 3.14159 1,000,000 ½ Ⅷ ٣ ²",
    "C++ C# .NET @home #tag $5.00 100% a/b\\c ~!@#$%^&*()_+{}|:\"<>?`-=[];',./",
    "ﬁne ｆｕｌｌｗｉｄｔｈ ℌ Å ǆ İstanbul ẞ",
    "e\u0301 decomposed n\u0303",
    "Pneumonoultramicroscopicsilicovolcanoconiosis",
    "antidisestablishmentarianism" * 3,
    "shovel-nosed ray; 737-200 (Boeing), St. John's wort",
    "line\r\nline\u2028line\x85line",
]


# ---- Helpers ----


def noise(size=100_000, seed=0):
    """`size` UTF-8 bytes of Latin, accented, Greek, Cyrillic, kana, Chinese, emoji, digits, signs, controls."""
    ranges = [(97, 122)] * 8 + [(65, 90), (33, 64), (91, 126), (32, 32), (32, 32), (9, 13), (1, 31), (0xC0, 0x17F),
              (0x391, 0x3A1), (0x410, 0x44F), (0x3042, 0x3093), (0x4E00, 0x9FA5), (0x1F600, 0x1F64F)]  # fmt: skip
    rng = random.Random(seed)
    text = ""
    while len(text) < size:  # at least a byte each
        low, high = ranges[int(rng.random() * len(ranges))]
        text += chr(low + int(rng.random() * (high - low + 1)))
    return text.encode("utf-8")[:size].decode("utf-8", errors="ignore")


def digest(ids):
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def ids_of(text):
    """The ids of any text, long or short, without start and end marks."""
    return tokenize([text], context_length=len(text.encode()) + 2)[0].tolist()[1 : 1 + len(clip_min.encode(text))]


def picture(resolution, n=1, seed=1):
    return random_numbers(random.Random(seed), n, 3, resolution, resolution)


def checksum(state):
    """Other weights move this by whole units, another order of the sum by less than a millionth."""
    return sum(float(tensor.sum(dtype=torch.float64)) for tensor in state.values())


def assert_equal(ours, theirs, relative=1e-5):
    """The largest difference, relative to the largest value. In double precision 1e-7 of that is allowed."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    relative = 1e-7 * relative if theirs.dtype == torch.double else relative
    ours, theirs = ours.detach(), theirs.detach()
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert difference <= relative * scale, f"differ by {difference / scale:.1e}, allowed is {relative:.0e}"


def plain_block(block, x, mask=None):
    """A transformer block from its parameters by OpenAI's names, every token computed: (B, N, D) -> (B, N, D)."""
    p, width = dict(block.named_parameters()), x.shape[-1]
    h = F.layer_norm(x, (width,), p["ln_1.weight"], p["ln_1.bias"]).transpose(0, 1)  # (N, B, D)
    attended, _ = F.multi_head_attention_forward(
        h, h, h, width, width // 64, p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None, False, 0.0,
        p["attn.out_proj.weight"], p["attn.out_proj.bias"], attn_mask=mask, need_weights=False)  # fmt: skip
    return plain_mlp(block, x + attended.transpose(0, 1))


def plain_mlp(block, x):
    """The second half of a block."""
    p, width = dict(block.named_parameters()), x.shape[-1]
    h = F.layer_norm(x, (width,), p["ln_2.weight"], p["ln_2.bias"])
    h = F.linear(h, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
    return x + F.linear(h * torch.sigmoid(1.702 * h), p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])


def plain_text(clip, x, eot):
    """The text tower as in OpenAI's code: embedded prompts (K, 77, D) one by one, all positions -> (K, E)."""
    text, n = clip.text, x.shape[1]
    mask = torch.full((n, n), -math.inf).triu(1)
    features = []
    for prompt, end in zip(x + text.positional_embedding, eot, strict=True):
        states = prompt.unsqueeze(0)
        for block in text.blocks:
            states = plain_block(block, states, mask)
        features.append(text.ln_final(states[0, end]) @ text.text_projection)
    return torch.stack(features)


def plain_encode_text(clip, tokens):
    return plain_text(clip, clip.text.token_embedding(tokens), tokens.argmax(dim=-1))


def embedding_gradient(clip, encode, tokens):
    """Of a random weighting of the outputs, so that every one of them counts."""
    weight = clip.text.token_embedding.weight.requires_grad_(True)
    features = encode(tokens)
    loss = (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum()
    return torch.autograd.grad(loss, weight)[0]


class Operators(TorchDispatchMode):
    """Notes every operator that runs: its name such as "addmm", its arguments, and the shapes of what it makes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        shapes = [tuple(x.shape) for x in (made if isinstance(made, (tuple, list)) else [made])
                  if isinstance(x, torch.Tensor)]  # fmt: skip
        self.calls.append((operator.name().removeprefix("aten::").split(".")[0], args, shapes))
        return made

    def rows(self):
        """-> how many tokens entered each linear layer, in ascending order."""
        return sorted(len(args[1]) for name, args, _ in self.calls if name == "addmm")


def watch_attention(block, monkeypatch):
    """-> a list that grows by the weights (B, H, T, U) of every attention that this block's forward computes."""
    seen, forward, attend = [], block.forward, clip_min.attend

    def record(q, kv, mask=None, causal=False):
        assert mask is None and not causal
        scores = q.squeeze(2).transpose(1, 2) @ kv[:, :, 0].permute(0, 2, 3, 1)
        seen.append((scores / q.shape[-1] ** 0.5).softmax(dim=-1))
        return attend(q, kv)

    def watched(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(clip_min, "attend", record)
            return forward(*args, **kwargs)

    monkeypatch.setattr(block, "forward", watched)
    return seen


def as_last_block(block):
    """A LastBlock with another block's weights: it alone takes a mask."""
    last = LastBlock(len(block.ln_1.weight), block.attn.heads)
    last.load_state_dict(block.state_dict())
    return last


def clip_min_without_assets(folder):
    shutil.copy(clip_min.__file__, folder)
    spec = importlib.util.spec_from_file_location("clip_min_elsewhere", folder / "clip_min.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record():
    """Ask OpenAI's package once; the answers go to tests/fixtures."""
    FIXTURES.mkdir(exist_ok=True)
    theirs = openai_module("simple_tokenizer").SimpleTokenizer()
    tokens = dict(ftfy=ftfy.__version__, texts=[[text, theirs.encode(text)] for text in TEXTS],
                  noise=digest(theirs.encode(noise())))  # fmt: skip
    (FIXTURES / "tokens.json").write_text(json.dumps(tokens, indent=0) + "\n")
    towers = {}
    for name, sizes in SIZES.items():
        state = random_state_dict(**sizes)
        model = openai_clip(state)
        with torch.no_grad():
            image, text = model.encode_image(picture(sizes["resolution"])), model.encode_text(tokenize(CAPTIONS))
        rounded = {key: [[float(f"{v:.8g}") for v in row] for row in rows.tolist()]
                   for key, rows in dict(image=image, text=text).items()}  # fmt: skip
        towers[name] = dict(checksum=checksum(state)) | rounded
    (FIXTURES / "towers.json").write_text(json.dumps(towers) + "\n")


@pytest.fixture(scope="module")
def recorded_tokens():
    return json.loads((FIXTURES / "tokens.json").read_text())


@pytest.fixture(scope="module", params=SIZES)
def sized(request):
    """Name, OpenAI's state dict and CLIP of each size. Made once: ViT-B has 150 million random numbers."""
    state = random_state_dict(**SIZES[request.param])
    return request.param, state, CLIP.from_state_dict(state)


# ---- Tokenizer ----


@pytest.mark.parametrize("i", range(len(TEXTS)), ids=lambda i: ascii(TEXTS[i][:20]))
def test_ids_equal_the_ones_recorded_from_openai(i, recorded_tokens):
    text, ids = recorded_tokens["texts"][i]
    assert text == TEXTS[i], "TEXTS changed: run python tests/test_clip.py --record"
    assert ids_of(text) == ids


def test_ids_of_100_kb_of_noise_equal_the_ones_recorded_from_openai(recorded_tokens):
    assert digest(ids_of(noise())) == recorded_tokens["noise"], f"recorded with ftfy {recorded_tokens['ftfy']}"


def test_ids_equal_openais_live():
    theirs = openai_module("simple_tokenizer").SimpleTokenizer()
    for text in [*TEXTS, *(noise(200, seed) for seed in range(100)), noise(seed=1)]:
        assert ids_of(text) == theirs.encode(text), ascii(text[:200])


def test_tokens_are_start_ids_end_and_zeros():
    tokens = tokenize(["a photo of a cat.", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.long
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407] + [0] * 69
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75


def test_the_end_mark_is_the_largest_id():
    tokens = tokenize(["a cat", "a photo of a cat", "a <|startoftext|> cat"])
    assert tokens.argmax(dim=-1).tolist() == [3, 6, 4]


def test_one_text_is_a_batch_of_one():
    assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))


def test_a_shorter_context_length_cuts_the_padding_only():
    assert torch.equal(tokenize(["a cat", "two dogs"], context_length=5), tokenize(["a cat", "two dogs"])[:, :5])


def test_75_ids_fit_and_76_do_not():
    assert tokenize("cat " * 75)[0, -1] == 49407
    with pytest.raises(UserError, match="cat cat.* 78 tokens .* 77"):
        tokenize("cat " * 76)


def test_a_text_too_long_is_named_among_the_others_with_its_count():
    with pytest.raises(UserError, match="^.{0,3}a dog dog dog.* 103 tokens"):
        tokenize(["a cat", "a" + " dog" * 100, "a bird"])


def test_each_word_is_encoded_once():
    rng = random.Random(0)
    names = [" ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=25)) for _ in range(2)) for _ in range(1000)]
    tokenize(names)
    with at_most(300 * len(names)):  # 130 for a name; 700 where its words are encoded again
        tokenize(names)


def test_without_its_vocabulary_the_tokenizer_says_where_to_get_it(tmp_path):
    elsewhere = clip_min_without_assets(tmp_path)
    with pytest.raises(elsewhere.UserError, match="bpe_merges.txt.gz.*missing.*github.com/openai/CLIP"):
        elsewhere.tokenize("a cat")


def test_without_assets_the_towers_work(tmp_path):
    clip = clip_min_without_assets(tmp_path).CLIP.from_state_dict(random_state_dict(**TINY))
    assert clip.encode_text(tokenize("a cat")).shape == (1, 64)


# ---- The towers are OpenAI's ----


def test_towers_equal_the_outputs_recorded_from_openai(sized):
    name, state, clip = sized
    recorded = json.loads((FIXTURES / "towers.json").read_text())[name]
    assert checksum(state) == pytest.approx(recorded["checksum"], abs=1e-2), (
        "The random weights are not those of the record, so this says nothing about the towers: "
        "random_state_dict was changed, run python tests/test_clip.py --record."
    )
    with torch.no_grad():
        assert_equal(clip.encode_image(picture(clip.visual.resolution)), torch.tensor(recorded["image"]))
        assert_equal(clip.encode_text(tokenize(CAPTIONS)), torch.tensor(recorded["text"]))


def test_towers_equal_openais_live(sized):
    _, state, clip = sized
    theirs, images, tokens = openai_clip(state), picture(clip.visual.resolution), tokenize(CAPTIONS)
    with torch.no_grad():
        assert_equal(clip.encode_image(images), theirs.encode_image(images))
        assert_equal(clip.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("sizes", ODD)
def test_towers_of_any_size_and_their_logits_equal_openais_live(sizes):
    state = random_state_dict(**sizes)
    clip, theirs = CLIP.from_state_dict(state), openai_clip(state)
    images, tokens = picture(sizes["resolution"], 3), tokenize(TEXTS[:8])
    with torch.no_grad():
        assert_equal(clip.encode_image(images), theirs.encode_image(images))
        assert_equal(clip.logits(clip.encode_image(images), clip.encode_text(tokens)), theirs(images, tokens)[0])


# ---- The text tower's shortcuts are exact ----

ALIKE = {
    "one text": ["a photo of a cat."],
    "identical texts": ["a photo of a cat."] * 3,
    "one token differs": ["a photo of a cat.", "a photo of a dog."],
    "different lengths": ["a photo of a cat.", "a photo of a shovel-nosed ray in the deep sea.", "a photo of an ox."],
    "one begins the other": ["a photo", "a photo of a cat.", "a photo of"],
    "nothing but the start mark in common": ["cat", "a photo of a dog", "two birds"],
    "an empty text": ["", "a cat"],
    "all 77 places": ["cat " * 75, "cat " * 74 + "dog", "cat"],
    "an end mark inside": ["a <|endoftext|> cat", "a dog", "a <|endoftext|> bird"],
}


@pytest.mark.parametrize("texts", ALIKE.values(), ids=ALIKE)
def test_shared_prefix_equals_encoding_every_text_alone(texts, precision, clip):
    tokens = tokenize(texts)
    assert_equal(clip.encode_text(tokens), plain_encode_text(clip, tokens))


@pytest.mark.parametrize("texts", ALIKE.values(), ids=ALIKE)
def test_shared_prefix_has_the_gradients_of_encoding_every_text_alone(texts, precision, clip):
    tokens = tokenize(texts)
    ours = embedding_gradient(clip, clip.encode_text, tokens)
    plain = embedding_gradient(clip, lambda tokens: plain_encode_text(clip, tokens), tokens)
    assert_equal(ours, plain)


def test_saving_memory_with_many_texts_changes_no_bit(clip, monkeypatch):
    tokens = tokenize(ALIKE["different lengths"])
    features, gradient = clip.encode_text(tokens), embedding_gradient(clip, clip.encode_text, tokens)
    calls = []
    monkeypatch.setattr(clip_min, "MANY_TEXTS", 2)
    monkeypatch.setattr(clip_min, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    assert torch.equal(clip.encode_text(tokens), features)
    assert torch.equal(embedding_gradient(clip, clip.encode_text, tokens), gradient)
    assert len(calls) == 2 * len(clip.text.blocks)


def test_autograd_keeps_no_copy_of_what_many_texts_share(clip, monkeypatch):
    def kept():
        """-> how many numbers the text tower's graph holds, each tensor counted once."""
        sizes = {}
        x, layout = clip.text.embed(tokenize([f"{'a ' * 40}{i}" for i in range(40)]))

        def keep(x):
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = clip.text(x.clone().requires_grad_(), layout)
        assert features.requires_grad  # and the graph lives until here, so that no address is used twice
        return sum(sizes.values())

    before = kept()
    monkeypatch.setattr(clip_min, "MANY_TEXTS", 39)
    assert kept() < 0.6 * before


def test_the_shared_prefix_is_computed_once_and_nothing_behind_the_last_end_mark(clip):
    tokens = tokenize(["a photo of a cat.", "a photo of a shovel-nosed ray."])
    x, layout = clip.text.embed(tokens)
    common, own = layout.split(x)
    assert common.shape == (5, 64)  # start, a photo of a
    assert own.shape == (2, 7, 64)  # shovel-nosed ray . end
    assert layout.eot_rows.tolist() == [5 + 2, 5 + 7 + 6]  # in the stream
    assert x.shape == (5 + 2 * 7, 64)
    embedded = clip.text.token_embedding(tokens[:, :12]) + clip.text.positional_embedding[:12]
    assert torch.equal(common, embedded[0, :5]) and torch.equal(own, embedded[:, 5:])
    for block, rows in zip(clip.text.blocks, ([19, 19, 19, 19], [2, 2, 2, 2, 19]), strict=True):
        with Operators() as operators:
            x = block(x, layout)
        assert operators.rows() == rows  # qkv, out, two of the MLP; in the last block all of that is for the end marks


def test_a_prompt_may_be_shared_or_not(clip):
    """Every split of the same prompts gives the same features: methods choose their own."""
    tokens = tokenize(["a photo of a cat.", "a photo of a large dog."])
    longest = clip.text.embed(tokens)[1].n_common
    assert longest == 5
    for n_common in range(1, longest + 1):
        x, layout = clip.text.embed(tokens, n_common)
        assert x.shape == (n_common + 2 * (9 - n_common), 64)
        assert_equal(clip.text(x, layout), plain_encode_text(clip, tokens))


def test_a_loop_over_the_text_blocks_equals_encode_text(clip):
    tokens = tokenize(CAPTIONS)
    x, layout = clip.text.embed(tokens)
    for block in clip.text.blocks:
        x = block(x, layout)
    assert x.shape == (3, 64)
    assert torch.equal(clip.text.project(x), clip.encode_text(tokens))


@pytest.mark.parametrize("texts", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("many", [False, True])
def test_no_block_makes_a_mask(many, texts, clip, monkeypatch):
    """The layout has them, and what is causal needs none."""
    if many:
        monkeypatch.setattr(clip_min, "MANY_TEXTS", 0)
    x, layout = clip.text.embed(tokenize(texts))
    x.requires_grad_()
    masks = {tuple(layout.mask.shape[-2:]), (layout.n_common, layout.n_common)} - {(1, 1)}  # others have that shape
    for block in clip.text.blocks:
        with Operators() as operators:
            x = block(x, layout)
        names = {name for name, _, _ in operators.calls}
        assert {"addmm", "cat"} <= names, "it has seen the block"
        makers = ("tril", "triu", "ones", "zeros", "full", "where", "arange", "masked_fill", "new_full", "ones_like",
                  "full_like", "zeros_like", "scalar_tensor", "lt", "le", "gt", "ge", "logical_not")  # fmt: skip
        assert not names & {maker + end for maker in makers for end in ("", "_")}
        made = {shape[-2:] for _, _, shapes in operators.calls for shape in shapes}
        assert not made & masks, "no tensor with the shape of a mask"


# ---- The image tower's shortcut is exact ----


def test_the_last_block_computes_the_class_token_as_if_it_computed_them_all(precision, clip):
    x = clip.visual.embed(picture(32, 3))
    *blocks, last = clip.visual.blocks
    for block in blocks:
        assert_equal(block(x), plain_block(block, x))
        x = block(x)
    assert last(x).shape == (3, 1, 128)
    assert_equal(last(x), plain_block(last, x)[:, :1])


def test_a_loop_over_the_image_blocks_equals_encode_image(clip):
    images = picture(32, 3)
    x = clip.visual.embed(images)
    for block in clip.visual.blocks:
        x = block(x)
    assert torch.equal(clip.visual.project(x), clip.encode_image(images))


def test_gradients_through_the_image_tower_equal_computing_every_token(precision, clip):
    x = clip.visual.embed(picture(32, 3))
    prompts = torch.randn(5, 128).requires_grad_(True)

    def gradient(run):
        h = torch.cat([x, prompts.expand(3, -1, -1)], dim=1)
        for block in clip.visual.blocks:
            h = run(block, h)
        return torch.autograd.grad(clip.visual.project(h).square().sum(), prompts)[0]

    assert_equal(gradient(lambda block, h: block(h)), gradient(plain_block))


def test_the_order_of_visual_prompts_does_not_matter(clip):
    x, prompts = clip.visual.embed(picture(32, 3)), torch.randn(6, 128, generator=torch.Generator().manual_seed(3))

    def features(tokens):
        for block in clip.visual.blocks:
            tokens = block(tokens)
        return clip.visual.project(tokens)

    ends = features(torch.cat([x, prompts.expand(3, -1, -1)], dim=1))
    shuffled = torch.cat([x, prompts[torch.tensor([3, 0, 5, 1, 4, 2])].expand(3, -1, -1)], dim=1)
    in_front = torch.cat([x[:, :1], prompts.expand(3, -1, -1), x[:, 1:]], dim=1)
    assert_equal(features(shuffled), ends)
    assert_equal(features(in_front), ends)
    assert not torch.allclose(ends, features(x), rtol=0.01)  # they are read


def test_attention_weights_are_the_ones_that_the_block_uses(clip):
    block, x = clip.visual.blocks[0], clip.visual.embed(picture(32, 3))
    weights, p = block.attention_weights(x), dict(block.named_parameters())
    assert weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 5))
    h = F.layer_norm(x, (128,), p["ln_1.weight"], p["ln_1.bias"])
    projected = h @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]
    q, k, v = projected.reshape(3, 5, 3, 2, 64).permute(2, 0, 3, 1, 4)
    assert_equal(weights, (q @ k.transpose(2, 3) / 8).softmax(dim=-1))
    attended = (weights @ v).transpose(1, 2).reshape(3, 5, 128) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    assert_equal(block(x), plain_mlp(block, x + attended))


def test_attention_weights_of_the_last_block_cover_all_tokens(clip):
    weights = clip.visual.blocks[-1].attention_weights(torch.randn(2, 5, 128))
    assert weights.shape == (2, 2, 5, 5)


# ---- Prompts are keys and values, and nothing else changes ----

PROMPTS = {"the same for every picture": (5, 128), "one set per picture": (3, 5, 128), "one": (1, 128),
           "none": (0, 128), "none per picture": (3, 0, 128)}  # fmt: skip


def block_and_inputs(clip, layer, shape):
    block, x = clip.visual.blocks[layer], clip.visual.embed(picture(32, 3)).detach()
    prompts = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return block, x.requires_grad_(True), prompts.requires_grad_(True)


def concatenated(block, x, prompts):
    """Every token goes through the whole block, and the outputs of the prompts are thrown away."""
    return plain_block(block, torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1))[:, : x.shape[1]]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("shape", PROMPTS.values(), ids=PROMPTS)
def test_prompts_give_the_outputs_and_gradients_of_concatenated_tokens(shape, layer, precision, clip):
    block, x, prompts = block_and_inputs(clip, layer, shape)
    ours, plain = block(x, prompts), concatenated(block, x, prompts)
    assert ours.shape == ((3, 1, 128) if layer == -1 else (3, 5, 128))
    plain = plain[:, : ours.shape[1]]
    assert_equal(ours, plain)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    for got, expected in zip(torch.autograd.grad((ours * weights).sum(), [x, prompts]),
                             torch.autograd.grad((plain * weights).sum(), [x, prompts]), strict=True):  # fmt: skip
        assert got.shape == expected.shape
        if got.numel():
            assert_equal(got, expected)
    if prompts.numel():
        assert not torch.allclose(ours, block(x), rtol=0.01)  # they are read


def test_all_tokens_of_the_last_block_are_those_of_a_block(clip):
    """FG-VPL reads them."""
    block, x, prompts = block_and_inputs(clip, -1, (5, 128))
    assert_equal(Block.forward(block, torch.cat([x, prompts.expand(3, -1, -1)], dim=1))[:, :5],
                 concatenated(block, x, prompts))
    assert_equal(Block.forward(block, x), plain_block(block, x))


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("shape", [(5, 128), (3, 5, 128)])
def test_a_mask_hides_tokens_and_prompts_as_if_they_were_not_there(shape, layer, precision, clip):
    block, x, prompts = block_and_inputs(clip, layer, shape)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, [2, 7]] = False  # a patch and the third prompt
    seen = prompts[..., [0, 1, 3, 4], :]
    plain = concatenated(block, x[:, [0, 1, 3, 4]], seen)
    assert_equal(as_last_block(block)(x, prompts, mask), plain[:, :1])
    assert not torch.allclose(as_last_block(block)(x, prompts), plain[:, :1], rtol=0.01)  # they were there


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("shape", [(5, 128), (3, 5, 128), (0, 128)])
def test_prompts_in_half_precision(shape, layer, clip):
    """fp32 prompts under bf16 autocast: outputs and gradients near those in full precision, gradients in fp32."""
    block, x, prompts = block_and_inputs(clip, layer, shape)
    expected = block(x, prompts)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    expected_gradient = torch.autograd.grad((expected * weights).sum(), prompts)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = block(x, prompts)
    gradient = torch.autograd.grad((ours.float() * weights).sum(), prompts)[0]
    assert_equal(ours.float(), expected, relative=0.03)
    assert gradient.dtype == torch.float32
    if prompts.numel():
        assert_equal(gradient, expected_gradient, relative=0.06)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("shape", PROMPTS.values(), ids=PROMPTS)
def test_attention_weights_with_prompts_are_the_rows_of_a_literal_softmax(shape, layer, precision, clip):
    block, x, prompts = block_and_inputs(clip, layer, shape)
    p = dict(block.named_parameters())
    tokens = F.layer_norm(torch.cat([x, prompts.expand(3, -1, -1)], dim=1), (128,), p["ln_1.weight"], p["ln_1.bias"])
    q = tokens @ p["attn.in_proj_weight"][:128].T + p["attn.in_proj_bias"][:128]
    k = tokens @ p["attn.in_proj_weight"][128:256].T + p["attn.in_proj_bias"][128:256]
    weights = block.attention_weights(x, prompts)
    assert weights.shape == (3, 2, 5, 5 + shape[-2])
    for picture_, head, query in ((0, 0, 0), (1, 1, 3), (2, 0, 4)):
        at = slice(64 * head, 64 * head + 64)
        scores = torch.stack([q[picture_, query, at] @ key[at] / 64**0.5 for key in k[picture_]])
        assert_equal(weights[picture_, head, query], scores.exp() / scores.exp().sum())


def test_the_image_blocks_take_one_set_of_prompts_each(precision, clip):
    """VPT's loop against every token in every layer, the prompts replaced."""
    images, prompts = picture(32, 3), torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(6))
    x = plain = clip.visual.embed(images)
    for block, p in zip(clip.visual.blocks, prompts, strict=True):
        x, plain = block(x, p), concatenated(block, plain, p)
    assert_equal(clip.visual.project(x), clip.visual.project(plain))


# ---- CLIPs that read fewer than 77 tokens ----


@pytest.fixture
def short_clip():
    state = random_state_dict(**TINY)
    return CLIP.from_state_dict(state | {"positional_embedding": state["positional_embedding"][:32]})


def test_a_clip_may_read_32_tokens(short_clip, clip):
    assert torch.equal(short_clip.classifier(["cat", "dog"]), clip.classifier(["cat", "dog"]))
    (ours, layout), (plain, of_plain) = short_clip.embed_prompts(["cat"], 16), clip.embed_prompts(["cat"], 16)
    assert torch.equal(ours, plain) and layout.n_common == of_plain.n_common == 19
    of_plain = dict(of_plain.named_buffers())
    assert of_plain and all(torch.equal(buffer, of_plain[name]) for name, buffer in layout.named_buffers())
    assert torch.equal(short_clip.text(ours, layout), clip.encode_text(clip.tokenize("X " * 16 + "cat.")))


def test_a_text_too_long_for_a_clip_of_32_tokens_is_one_sentence(short_clip):
    with pytest.raises(UserError, match='^"a photo of a cat cat.*" is 41 tokens long .* CLIP reads 32: [^\n]*$'):
        short_clip.classifier(["dog", "cat" + " cat" * 33])


def test_a_context_too_long_shows_the_class_name_instead_of_its_places(short_clip, clip):
    with pytest.raises(UserError, match=r'^"\[context\] golden retriever\." is 35 tokens long .* reads 32: '):
        short_clip.embed_prompts(["golden retriever"], 30)
    with pytest.raises(UserError, match=r'^"\[context\] dog dog .* reads 77: '):
        clip.embed_prompts(["cat", "dog" + " dog" * 15], 60)


# ---- Logits and the zero-shot classifier ----


def test_logits_are_the_scaled_cosine(clip):
    image, text = torch.randn(4, 64), torch.randn(7, 64)
    cosine = F.cosine_similarity(image.unsqueeze(1), text.unsqueeze(0), dim=-1)
    assert_equal(clip.logits(image, text), clip.logit_scale.exp() * cosine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_fp32_under_autocast(clip, dtype):
    image, text = torch.randn(4, 64).to(dtype), torch.randn(7, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = clip.logits(image, text)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, clip.logits(image.float(), text.float()), rtol=0, atol=1e-4)


def test_the_towers_run_under_autocast(clip):
    images, tokens = picture(32, 2), tokenize(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = clip.encode_image(images), clip.encode_text(tokens)
    assert_equal(image.float(), clip.encode_image(images), relative=0.05)
    assert_equal(text.float(), clip.encode_text(tokens), relative=0.05)


def test_the_classifier_is_the_unit_text_feature_of_every_class(clip):
    features = clip.encode_text(tokenize(["a photo of a cat.", "a photo of a polka dotted dog."]))
    assert_equal(clip.classifier(["cat", "polka_dotted dog"]), F.normalize(features, dim=-1))


def test_the_classifier_of_several_templates_is_the_unit_mean_of_theirs(clip):
    templates = ["a photo of a {}.", "{} texture.", "art of the {}.", "{}", "a {} in a game.", "the {}.", "itap of {}."]
    classifier = clip.classifier(["cat", "dog", "ox"], templates)
    assert classifier.shape == (3, 64)
    mean = sum(clip.classifier(["cat", "dog", "ox"], [template]) for template in templates) / 7
    assert_equal(classifier, mean / mean.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(classifier.norm(dim=-1), torch.ones(3))


# ---- Shapes of everything public ----


def test_shapes_of_the_image_tower(clip):
    images = picture(32, 3)
    x = clip.visual.embed(images)
    assert x.shape == (3, 1 + 4, 128)
    assert clip.visual.blocks[0](x).shape == (3, 5, 128)
    assert clip.visual.blocks[-1](x).shape == (3, 1, 128)
    assert clip.visual.project(x).shape == (3, 64)
    assert clip.encode_image(images).shape == (3, 64)


def test_shapes_of_the_text_tower(clip):
    tokens = tokenize(["a photo of a cat.", "a photo of a dog.", "a photo of an ox."])
    x, layout = clip.text.embed(tokens)
    assert x.shape == (4 + 3 * 4, 64) and (layout.n_common, layout.n_prompts, layout.eot_rows.shape) == (4, 3, (3,))
    assert [part.shape for part in layout.split(x)] == [(4, 64), (3, 4, 64)]
    assert clip.text.blocks[0](x, layout).shape == (4 + 3 * 4, 64)
    assert clip.text.blocks[-1](x, layout).shape == (3, 64)
    assert clip.text.project(x[:3]).shape == clip.text(x, layout).shape == (3, 64)
    assert clip.encode_text(tokens).shape == (3, 64)


def test_shapes_of_logits_and_classifier(clip):
    assert clip.logits(torch.randn(4, 64), torch.randn(7, 64)).shape == (4, 7)
    assert clip.classifier(["cat", "dog"]).shape == (2, 64)
    assert clip.classifier(["cat"]).shape == (1, 64)


@pytest.mark.parametrize("size", [(32, 32), (300, 200), (20, 64), (1, 1)])
def test_preprocess_gives_a_square_of_the_resolution(size):
    picture = preprocess(32)(Image.new("RGB", size))
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32


def test_preprocess_crops_the_centre_and_subtracts_clips_mean():
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((51, 102, 204), (32, 0, 64, 32))
    expected = [(c / 255 - m) / s for c, m, s in zip((51, 102, 204), MEAN, STD, strict=True)]
    torch.testing.assert_close(preprocess(32)(wide), torch.tensor(expected).view(3, 1, 1).expand(3, 32, 32))


@pytest.mark.parametrize("width, height", [(60, 45), (45, 60), (32, 32), (97, 33), (20, 31)])
def test_preprocess_is_openais_to_the_number(width, height):
    """Bicubic, the shorter side to the resolution, the centre, CLIP's mean and deviation: written out here."""
    picture = Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))
    short = min(width, height)
    size = (int(32 * width / short), int(32 * height / short))
    left, top = (round((side - 32) / 2) for side in size)
    small = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    pixels = torch.tensor(list(small.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(preprocess(32)(picture), (pixels - mean) / deviation)


# ---- from_state_dict ----


def test_a_clip_is_frozen_in_eval_mode_and_fp32():
    clip = CLIP.from_state_dict({key: value.half() for key, value in random_state_dict(**TINY).items()})
    assert not clip.training and not any(module.training for module in clip.modules())
    assert {(p.dtype, p.requires_grad) for p in clip.parameters()} == {(torch.float32, False)}
    assert not list(clip.buffers())


def test_fp16_weights_become_their_fp32_values():
    state = {key: value.half() for key, value in random_state_dict(**TINY).items()}
    assert torch.equal(CLIP.from_state_dict(state).visual.proj, state["visual.proj"].float())


@pytest.mark.parametrize("sizes", ODD)
def test_every_size_is_read_from_the_tensors(sizes):
    clip = random_clip(**sizes)
    assert clip.visual.resolution == sizes["resolution"]
    assert (len(clip.visual.blocks), len(clip.text.blocks)) == (sizes["vision_layers"], sizes["text_layers"])
    assert clip.encode_image(picture(sizes["resolution"], 2)).shape == (2, sizes["joint"])
    assert clip.encode_text(tokenize(CAPTIONS)).shape == (3, sizes["joint"])


def test_openais_three_extra_keys_are_ignored():
    state = random_state_dict(**TINY)
    extra = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    clip = CLIP.from_state_dict(state | extra)
    assert torch.equal(clip.encode_text(tokenize("a cat")), CLIP.from_state_dict(state).encode_text(tokenize("a cat")))


def test_the_state_dict_given_is_left_as_it_was():
    state = random_state_dict(**TINY) | dict(vocab_size=torch.tensor(49408))
    before = copy.deepcopy(state)
    CLIP.from_state_dict(state)
    assert list(state) == list(before) and all(torch.equal(state[key], before[key]) for key in state)


KEYS = list(random_state_dict(**TINY, vocab=1))


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused(key):
    state = random_state_dict(**TINY, vocab=100)
    del state[key]
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        CLIP.from_state_dict(state)


@pytest.mark.parametrize("key", ["extra.weight", "visual.extra", "transformer.resblocks.2.ln_1.weight", "state_dict"])
def test_an_unexpected_key_is_refused(key):
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        CLIP.from_state_dict(random_state_dict(**TINY, vocab=100) | {key: torch.zeros(64)})


@pytest.mark.parametrize("change", [lambda t: t[..., None], lambda t: torch.cat([t, t[:1]]), lambda t: t.sum()],
                         ids=["a dimension more", "one row more", "a scalar"])  # fmt: skip
@pytest.mark.parametrize("key", [key for key in KEYS if ".resblocks.1" not in key and key != "logit_scale"])
def test_a_wrong_shape_is_refused(key, change):
    state = random_state_dict(**TINY, vocab=100)
    state[key] = change(state[key])
    if state[key].shape in ((101, 64), (78, 64)):
        return  # a vocabulary and a context may have any length
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        CLIP.from_state_dict(state)


@pytest.mark.parametrize("content", [
    {}, {"epoch": 3, "state_dict": {}}, [torch.zeros(3)], torch.zeros(3), {0: torch.zeros(3)},
], ids=["empty", "a training checkpoint", "a list", "a tensor", "keys that are numbers"])  # fmt: skip
def test_what_is_not_a_state_dict_is_refused(content):
    with pytest.raises(UserError, match="not the weights of a CLIP ViT"):
        CLIP.from_state_dict(content)


# ---- The meta device: a tensor that a forward makes on the CPU fails there, as it would on a GPU ----


def test_the_image_tower_runs_on_the_meta_device(clip):
    clip = copy.deepcopy(clip).to("meta")
    features = clip.encode_image(torch.empty(2, 3, 32, 32, device="meta"))
    assert features.device.type == "meta" and features.shape == (2, 64)
    assert clip.visual.blocks[0].attention_weights(torch.empty(2, 5, 128, device="meta")).device.type == "meta"


def test_the_text_tower_runs_on_the_meta_device(clip):
    prompts = [x.to("meta") for x in clip.text.embed(tokenize(CAPTIONS))]
    features = copy.deepcopy(clip).to("meta").text(*prompts)
    assert features.device.type == "meta" and features.shape == (3, 64)


def test_logits_run_on_the_meta_device(clip):
    clip, features = copy.deepcopy(clip).to("meta"), torch.empty(2, 64, device="meta")
    assert clip.logits(features, features).device.type == "meta"


@pytest.mark.parametrize("csc", [False, True])
def test_coop_runs_on_the_meta_device(clip, csc):
    method = copy.deepcopy(CoOp(clip, ["cat", "large dog"], csc=csc)).to("meta")
    images, labels = torch.empty(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    assert method.encode_text().device.type == "meta"
    assert method(images).shape == (2, 2)
    method.loss(images, labels).backward()
    assert method.ctx.grad.device.type == "meta"


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:
    record()
