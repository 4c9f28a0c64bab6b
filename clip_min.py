"""CLIP in one file: tokenizer, image and text towers in stages, weights, preprocessing.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv:2103.00020
github.com/openai/CLIP (MIT): same token ids, same key names, same outputs; ViT models only.

    f(image) = project(blocks(embed(image)))        (B, 3, R, R) -> (B, E)
    g(text)  = project(blocks(embed(tokens)))       (K, 77)      -> (K, E)
    logits   = exp(logit_scale) * cos(f, g)         (B, K)

Prompt learning works between the stages: a method writes the loop over the blocks itself. Three shortcuts are exact in
outputs and gradients: what all prompts begin with is computed once and not for every class (Layout), visual prompts
that nobody reads are keys and values only (Block), and the last block computes only the token that is read (LastBlock).

B images, R resolution, N patches, P visual prompts, K texts of C common and S further tokens, D width of a tower, H
heads of width d, E joint width; T tokens look at others.
"""

import copy
import functools
import gzip
import html
import json
import math
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import transforms

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ASSETS = Path(__file__).parent / "assets"
SEVEN = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",  # of Tip-Adapter and
         "a {} in a video game.", "art of the {}.", "a photo of the small {}.")  # FG-VPL, for ImageNet


class UserError(ValueError):
    """Something the user can mend: train.py prints the one sentence and exits with status 2, without a traceback."""


def full_precision(device):
    """A context without autocast, for the few steps that need fp32. The meta device knows no autocast."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def sum_over_processes(x):
    """A sum over this process's pictures -> the sum over the batch, whose pictures the processes of torchrun share."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


def preprocess(resolution):
    """CLIP's picture pipeline: an RGB PIL image -> (3, resolution, resolution) float tensor."""
    square = transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(resolution)
    return transforms.Compose([*square, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


# ---------------------------------------------------------------------------------------------------------- tokenizer
WORD = regex.compile(r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
START, END = 49406, 49407  # token ids
SPECIAL = {"<|startoftext|>": (START,), "<|endoftext|>": (END,)}


@functools.cache
def vocabulary():
    """-> {byte: id}, {(left id, right id): merged id}. Merges with a lower id were learned earlier and apply first."""
    path = ASSETS / "bpe_merges.txt.gz"
    if not path.exists():
        raise UserError(f"The tokenizer's vocabulary {path} is missing: copy it from the project, or put OpenAI's "
                        "bpe_simple_vocab_16e6.txt.gz there (github.com/openai/CLIP, PyPI's clip-anytorch).")
    # The file writes bytes as printable characters: those that are printable as themselves, the rest from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    ids = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}  # </w> ends a word
    merges = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file.read().split("\n")[1:48895]:  # the first line is a comment
            left, right = line.split()
            merges[ids[left], ids[right]] = ids[left + right] = len(ids)
    return {b: i for i, b in enumerate(order)}, merges


@functools.lru_cache(maxsize=1 << 16)
def encode_word(word):
    """One word -> tuple of ids: bytes first, then the earliest-learned merge of any neighbours, again and again."""
    if word in SPECIAL:
        return SPECIAL[word]
    byte_ids, merges = vocabulary()
    parts = [byte_ids[b] for b in word.encode("utf-8")]
    parts[-1] += 256  # the byte's twin that ends a word
    while pairs := merges.keys() & set(zip(parts, parts[1:], strict=False)):
        pair, i = min(pairs, key=merges.get), 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i : i + 2] = [merges[pair]]
            i += 1
    return tuple(parts)


def encode(text):
    """Text -> list of token ids, without start and end marks; equal to OpenAI's on any text."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    return [token for word in WORD.findall(text) for token in encode_word(word)]


def tokenize(texts, context_length=77):
    """n texts -> (n, context_length) int64: start, ids, end (the largest id), zeros. UserError if one is too long."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *encode(text), END]
        if len(ids) > context_length:
            shown = regex.sub("^(X )+", "[context] ", text)[:80]  # an X holds the place of a learned vector
            raise UserError(f'"{shown}" is {len(ids)} tokens long with its start and end marks, CLIP reads '
                            f"{context_length}: shorten the class name, the template or the context.")
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# ------------------------------------------------------------------------------------------------------------- towers
ACTIVATIONS = {"quickgelu": lambda x: F.silu(1.702 * x) / 1.702, "gelu": F.gelu}  # the first is x sigmoid(1.702 x)
MANY_TEXTS = 500  # with more texts attend_behind() saves memory, at the cost of a little time


class Attention(nn.Module):
    """Multi-head attention's weights under OpenAI's key names: H heads of width d = D / H. See attend()."""

    def __init__(self, width, heads=None):
        super().__init__()
        self.heads = heads or width // 64  # CLIP's convention; from_state_dict tells where it does not hold
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def qkv(self, x, first=0, end=3):
        """x (.., D) -> (.., 3, H, d): queries, keys, values; or, as of a slice, those from `first` up to `end`."""
        rows = slice(first * x.shape[-1], end * x.shape[-1])
        projected = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return projected.unflatten(-1, (end - first, self.heads, -1))


def attend(q, kv, mask=None, causal=False):
    """Queries (B, T, 1, H, d), keys and values (B, .., 2, H, d) -> (B, T, D). mask: as PyTorch's, bool or added."""
    q = q.squeeze(2).transpose(1, 2)  # (B, H, T, d)
    k, v = kv.transpose(1, 3).unbind(2)  # (B, H, .., d)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block: x (B, T, D) -> (B, T, D). The text tower's inherit its tensors, not its forward."""

    def __init__(self, width, heads=None, activation="quickgelu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.attn = Attention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, prompts=None):
        """prompts (P, D) or (B, P, D): tokens that x looks at, but whose outputs nobody reads: keys and values only.

        Of (P, D), the same for all pictures, they are computed once. It equals block(cat([x, prompts]))[:, :T].
        """
        q, kv = self.attn.qkv(self.ln_1(x)).split([1, 2], dim=2)
        return self.add_attention_and_mlp(x, attend(q, self.with_prompts(kv, prompts)))

    def with_prompts(self, kv, prompts):
        """Keys and values (B, T, 2, H, d) -> (B, T+P, 2, H, d)."""
        if prompts is None:
            return kv
        of_prompts = self.attn.qkv(self.ln_1(prompts), 1, 3)  # (P, 2, H, d), or (B, P, 2, H, d)
        return torch.cat([kv, of_prompts.expand(len(kv), -1, -1, -1, -1)], dim=1)

    def add_attention_and_mlp(self, x, attended):
        x = x + self.attn.out_proj(attended)
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))

    def attention_weights(self, x, prompts=None):
        """How much each token looks at each, for rollout and maps: -> (B, H, T, T+P), rows sum to 1."""
        q, kv = self.attn.qkv(self.ln_1(x)).split([1, 2], dim=2)
        k = self.with_prompts(kv, prompts)[:, :, 0]  # (B, T+P, H, d)
        return (q.squeeze(2).transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class LastBlock(Block):
    """The image tower's last block: x (B, T, D) -> (B, 1, D), the class token alone, since nobody reads the others."""

    def forward(self, x, prompts=None, mask=None):
        """prompts as in Block; mask (B, T+P): True for the tokens that the class token looks at; None: for all."""
        h = self.ln_1(x)
        kv = self.with_prompts(self.attn.qkv(h, 1, 3), prompts)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, T+P): the same for every head
        return self.add_attention_and_mlp(x[:, :1], attend(self.attn.qkv(h[:, :1], 0, 1), kv, mask))


class Layout(nn.Module):
    """How K prompts lie in one stream of tokens, x (C + K*S, D), and which of them each token looks at.

    The C tokens that all prompts begin with come first, once, then S further ones of each prompt, padded. A token looks
    at itself and at what stands in front of it in its prompt. So the common tokens are the same for all prompts.
    """

    def __init__(self, eot, n_common, n_further, like):
        """eot (K,): where each prompt's end mark stands. n_common: C, n_further: S. like: of x's device and dtype."""
        super().__init__()
        self.n_common, self.n_further, self.n_prompts = n_common, n_further, len(eot)
        causal = like.new_full((n_common + n_further, n_common + n_further), -math.inf).triu(1)  # added to scores
        self.mask = nn.Buffer(causal[n_common:], persistent=False)  # (S, C+S)
        self.eot_mask = nn.Buffer(causal[eot, None, None], persistent=False)  # (K, 1, 1, C+S)
        self.eot_rows = nn.Buffer(eot + n_further * torch.arange(len(eot), device=eot.device), persistent=False)  # of x

    def join(self, x):
        """Prompts (K, >=C+S, ..) -> one stream (C + K*S, ..)."""
        end = self.n_common + self.n_further
        return torch.cat([x[0, : self.n_common], x[:, self.n_common : end].flatten(0, 1)])

    def split(self, x):
        """(C + K*S, ..) -> the common tokens (C, ..) and the further ones of each prompt (K, S, ..)."""
        common, further = x.split([self.n_common, self.n_prompts * self.n_further])
        return common, further.unflatten(0, (self.n_prompts, self.n_further))

    def attend(self, qkv):
        """Queries, keys and values (C + K*S, 3, H, d) -> (C + K*S, D)."""
        common, further = self.split(qkv)
        q_common, kv_common = common.split([1, 2], dim=1)
        q_further, kv_further = further.split([1, 2], dim=2)
        of_common = attend(q_common.unsqueeze(0), kv_common.unsqueeze(0), causal=True)
        of_further = attend_behind(q_further, kv_common, kv_further, self.mask)
        return torch.cat([of_common.flatten(0, 1), of_further.flatten(0, 1)])


def attend_behind(q, common, further, mask):
    """Each prompt's q (K, T, 1, H, d) look at common (C, 2, H, d), further (K, S, 2, H, d); mask (.., T, C+S)."""
    def join_and_attend(q, common, further):
        return attend(q, torch.cat([common.expand(len(further), -1, -1, -1, -1), further], dim=1), mask)

    if len(further) <= MANY_TEXTS:
        return join_and_attend(q, common, further)
    # The joined tensor, a quarter of a step's memory, is not kept for the backward pass, which makes it anew.
    return checkpoint(join_and_attend, q, common, further, use_reentrant=False, preserve_rng_state=False)


class TextBlock(Block):
    """Block of the text tower: x (C + K*S, D) -> (C + K*S, D). Only attention, see Layout, tells the prompts apart."""

    def forward(self, x, layout):
        return self.add_attention_and_mlp(x, layout.attend(self.attn.qkv(self.ln_1(x))))


class LastTextBlock(Block):
    """The text tower's last block: x (C + K*S, D) -> (K, D), the end-of-text tokens alone."""

    def forward(self, x, layout):
        h = self.ln_1(x)
        q = self.attn.qkv(h[layout.eot_rows], 0, 1).unsqueeze(1)  # (K, 1, 1, H, d)
        of_eot = attend_behind(q, *layout.split(self.attn.qkv(h, 1, 3)), layout.eot_mask)  # (K, 1, D)
        return self.add_attention_and_mlp(x[layout.eot_rows], of_eot.squeeze(1))


class VisionTransformer(nn.Module):
    """Image tower. `x = embed(images)`, then every block, then `project(x)`."""

    def __init__(self, resolution, patch, width, layers, joint, heads=None, activation="quickgelu"):
        super().__init__()
        self.resolution, self.patch = resolution, patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (resolution // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = [Block(width, heads, activation) for _ in range(layers - 1)]
        self.blocks = nn.ModuleList([*blocks, LastBlock(width, heads, activation)])
        self.proj = nn.Parameter(torch.empty(width, joint))

    def embed(self, images):
        """(B, 3, R, R) -> (B, 1+N, D), class token first, through ln_pre."""
        x = self.conv1(images).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    def project(self, x):
        """(B, >=1, D) -> (B, E); reads the class token only."""
        return self.ln_post(x[:, 0]) @ self.proj

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.project(x)


class TextTransformer(nn.Module):
    """Text tower. `x, layout = embed(tokens)`, then `x = block(x, layout)` for every block, then `project(x)`."""

    def __init__(self, context_length, vocab_size, width, layers, joint, heads=None, activation="quickgelu"):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        blocks = [TextBlock(width, heads, activation) for _ in range(layers - 1)]
        self.blocks = nn.ModuleList([*blocks, LastTextBlock(width, heads, activation)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, joint))

    def embed(self, tokens, n_common=None):
        """(K, 77) -> x (C + K*S, D) and its Layout. C: n_common, or the longest common beginning without end mark."""
        eot = tokens.argmax(dim=-1)
        if n_common is None:
            alike = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
            n_common = min(int(alike), int(eot.min()))
        length = int(eot.max()) + 1  # nobody looks at what stands behind the last end mark
        x = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]  # (K, C+S, D)
        layout = Layout(eot, n_common, length - n_common, x)
        return layout.join(x), layout

    def project(self, x):
        """(K, D), the end-of-text tokens that the last block returns -> (K, E)."""
        return self.ln_final(x) @ self.text_projection

    def forward(self, x, layout):
        """All blocks on embedded prompts -> (K, E)."""
        for block in self.blocks:
            x = block(x, layout)
        return self.project(x)


class CLIP(nn.Module):
    """The two towers and the temperature. Every size is read from the weights: see from_state_dict and load_clip."""

    def __init__(self, visual, text, activation="quickgelu"):
        super().__init__()
        self.visual, self.text, self.activation = visual, text, activation
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, images):
        """(B, 3, R, R) -> (B, E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """(n, 77) from tokenize -> (n, E), not normalised."""
        return self.text(*self.text.embed(tokens))

    def tokenize(self, texts):
        """As the function tokenize, for as many tokens as this CLIP reads and on its device."""
        return tokenize(texts, len(self.text.positional_embedding)).to(self.logit_scale.device)

    def embed_prompts(self, classnames, n_ctx):
        """K prompts "X .. X name." -> x (C + K*S, D), whose rows 1 .. n_ctx take learned vectors, and its Layout."""
        return self.text.embed(self.tokenize([f"{'X ' * n_ctx}{name}." for name in classnames]))

    def logits(self, image_features, text_features):
        """(B, E), (K, E) -> (B, K): exp(logit_scale) * cosine, in fp32 also under autocast (logits of 30 need it)."""
        with full_precision(image_features.device):
            image, text = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
            return self.logit_scale.exp() * image @ text.T

    @torch.no_grad()
    def classifier(self, classnames, templates=("a photo of a {}.",)):
        """The zero-shot classifier: unit text features (K, E), for several templates the mean of theirs made unit."""
        features = []
        for template in templates:
            tokens = self.tokenize([template.format(name.replace("_", " ")) for name in classnames])
            features.append(F.normalize(self.encode_text(tokens).float(), dim=-1))  # fp32 also under autocast
        return F.normalize(sum(features), dim=-1)

    @classmethod
    def from_state_dict(cls, state_dict, activation="quickgelu", vision_heads=None, text_heads=None):
        """A state dict in OpenAI's keys -> CLIP with fp32 parameters, frozen, eval(). Sizes are read from the tensors.

        Heads whose number is not given are 64 wide. UserError if that is not known, or if the tensors do not fit.
        """
        state = {}  # under our keys: blocks lie directly in their tower, the text tower is a module of its own
        try:
            for key, tensor in state_dict.items():
                tower = "" if key.startswith(("visual.", "logit_scale")) else "text."
                if key not in ("input_resolution", "context_length", "vocab_size"):  # in OpenAI's archives
                    state[tower + key.replace("transformer.resblocks.", "blocks.")] = tensor.detach()
            if not all(tensor.is_floating_point() for tensor in state.values()):
                raise ValueError("it has other numbers than floats, as a quantised model has")
            layers = Counter(key.split(".")[0] for key in state if key.endswith(".ln_1.weight"))
            width, _, patch, _ = state["visual.conv1.weight"].shape
            resolution = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
            length, text_width = state["text.positional_embedding"].shape
            words, joint = len(state["text.token_embedding.weight"]), state["text.text_projection"].shape[1]
            for of_one, heads in (width, vision_heads), (text_width, text_heads):
                if of_one % (heads or 64) or (heads is None and of_one > 1024):  # OpenAI's widest
                    raise ValueError(f"the number of attention heads for its width {of_one} is not {heads or 'known'}, "
                                     "put its own open_clip_config.json or config.json beside the weights")
            with torch.device("meta"):  # no memory and no random initialisation: the tensors are assigned below
                visual = VisionTransformer(resolution, patch, width, layers["visual"], joint, vision_heads, activation)
                text = TextTransformer(length, words, text_width, layers["text"], joint, text_heads, activation)
                clip = cls(visual, text, activation)
            clip.requires_grad_(False).load_state_dict(state, assign=True)
        except Exception as error:  # what is no state dict of a CLIP can fail anywhere
            detail = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(f"These are not the weights of a CLIP ViT: {detail}.") from error
        return clip.float().eval()


# ------------------------------------------------------------------------------------------------------------ methods
class Method(nn.Module):
    """Zero-shot CLIP (Radford et al., 2021, Section 3.1), and what a prompt-learning method may change of it.

    A method overrides the functions that its paper changes; train.py and report.py call nothing but these. CLIP stays
    frozen; only tensors of the method's own require grad.
    """

    recipe = {}  # the paper's settings for training, see support/settings.py; empty: there is nothing to train

    def __init__(self, clip, classnames, templates=("a photo of a {}.",)):
        """classnames: K names; templates: hand-written prompts, each with one {} for the name."""
        super().__init__()
        self.clip, self.templates = clip.requires_grad_(False), tuple(templates)
        self.set_classes(classnames)

    @classmethod
    def default_options(cls):
        """-> {name: default} of the method's options, the keyword-only arguments of its __init__."""
        return cls.__init__.__kwdefaults__ or {}

    def set_classes(self, classnames):
        """Take over class names, and compute zero_shot (K, E), CLIP's classifier of the templates."""
        self.classnames = [name.replace("_", " ") for name in classnames]
        self.zero_shot = nn.Buffer(self.clip.classifier(self.classnames, self.templates), persistent=False)

    def embed_prompts(self):
        """Make prompts of the class names. A method's own __init__ calls this, and so does for_classes."""

    @property
    def prompt_texts(self):
        """A sentence per class for people to read."""
        ctx = self.contexts()
        if ctx is None:
            return [self.templates[0].format(name) for name in self.classnames]
        shown = f"[{' x '.join(map(str, ctx.shape[:-1]))} vectors] " if ctx.numel() else ""
        return [f"{shown}{name}." for name in self.classnames]

    def encode_text(self):
        """-> (K, E), the classifier. It does not depend on the image, so an evaluation computes it once."""
        return self.zero_shot

    def contexts(self):
        """-> the learned vectors that enter the text tower's first layer, (M, Dt) or (number, M, Dt), or None."""

    def encode_image(self, images, text=None):
        """images (B, 3, R, R), text (K, E) from encode_text for methods whose image side reads it -> (B, E)."""
        return self.clip.encode_image(images)

    def forward(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> logits (B, K)."""
        text = self.encode_text() if text is None else text
        return self.clip.logits(self.encode_image(images, text), text)

    def loss(self, images, labels, epoch=0):
        """labels (B,), epoch counted from 0 -> scalar."""
        return F.cross_entropy(self(images), labels)

    def parameter_groups(self, recipe=None):
        """-> the optimizer's groups, with rates and warm-up. recipe["parts"]: {tensor's name: rates of its own}."""
        recipe = recipe or self.recipe
        parts = recipe.get("parts", {})
        learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [dict(params=[learned[name]], **rates) for name, rates in parts.items() if name in learned]
        rest = [p for name, p in learned.items() if name not in parts]
        return [*groups, dict(params=rest, lr=recipe["lr"], warmup_epochs=recipe["warmup_epochs"])]

    def prepare(self, batches, val=()):
        """Make a cache, before training. Both give (images, labels); each walk through `batches` augments them anew."""

    def finish(self, val=()):
        """Choose constants after the training, by the validation pictures that prepare() was given."""

    def learned(self):
        """-> {name: tensor}, all that sets this method apart from a new one, a cache included: prompts.pt holds it."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clip.")}

    def load_learned(self, tensors):
        """Take over the tensors of learned(). UserError where names or shapes differ."""
        expected = {name: tensor.shape for name, tensor in self.learned().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise UserError(f"The learned tensors do not fit {type(self).__name__} on this backbone.")
        self.load_state_dict(tensors, strict=False)  # CLIP's own are not in it

    def for_classes(self, classnames, columns=None):
        """-> a copy of the trained method on the same CLIP, for other class names.

        columns: which training class each of them is; a method with tensors per class keeps theirs, or refuses if None.
        """
        other = copy.deepcopy(self, {id(self.clip): self.clip})  # as if CLIP were copied already: it is shared
        other.set_classes(classnames)
        other.embed_prompts()
        return other

    def attention(self, images):
        """images (B, 3, R, R) -> {title: (B, N)}, maps over the patches that only this method has, for report.py."""
        return {}


# ------------------------------------------------------------------------------------------------------------ weights
def load_clip(name_or_path, device="cpu", activation=None):
    """-> CLIP with fp32 parameters, frozen, eval(). UserError where there is none or it cannot be read.

    name_or_path: a weights file; beside the folder support/ also a folder with one, or a name such as "ViT-B/16".
    activation: "gelu" or "quickgelu"; None: what a configuration beside the weights says, or else QuickGELU.
    """
    try:
        from support.weights import load
    except ModuleNotFoundError:  # this file was copied without the folder
        load = load_openais
    return load(str(name_or_path), activation).to(device)


def load_openais(path, activation):
    """What load_clip can do by itself: OpenAI's archives, and state dicts in OpenAI's keys."""
    try:
        if Path(path).with_name("open_clip_config.json").exists():
            raise ValueError("the configuration beside it is open_clip's")
        return CLIP.from_state_dict(read_weights(path), activation or "quickgelu")
    except Exception as error:  # a broken file can fail anywhere in the readers
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"clip_min.py alone reads OpenAI's weights files, and not {path} ({fault}): copy the project's "
                        "folder support for names and other forms, or download the file again.") from error


def read_weights(path):
    """The state dict in a safetensors file, one of torch.save or, as OpenAI's, one of torch.jit.save."""
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":  # safetensors: what comes behind the header's length
            file.seek(0)
            return read_safetensors(file)
        names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
        if any(name.endswith("/constants.pkl") for name in names):  # of torch.jit.save
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, but OpenAI's files need it
                return torch.jit.load(path, map_location="cpu").state_dict()
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def read_safetensors(file):
    """Eight bytes of header length, a JSON header {key: dtype, shape, [begin, end)}, raw little-endian tensors."""
    length = int.from_bytes(file.read(8), "little")
    if length > 100_000_000:  # the format's limit
        raise ValueError("its header is too long")
    header, raw = json.loads(file.read(length)), memoryview(bytearray(file.read()))
    dtypes = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)
    header.pop("__metadata__", None)
    if len(raw) != max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("it is longer or shorter than its header says")
    return {key: torch.frombuffer(raw[slice(*entry["data_offsets"])], dtype=dtypes[entry["dtype"]]).view(entry["shape"])
            for key, entry in header.items()}
