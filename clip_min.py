"""CLIP in one file: tokenizer, image and text towers in stages, weights, preprocessing.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv:2103.00020
github.com/openai/CLIP (MIT): same token ids, same key names, same outputs; ViT models only.

    f(image) = project(blocks(embed(image)))        (B, 3, R, R) -> (B, E)
    g(text)  = project(blocks(embed(tokens)))       (K, 77)      -> (K, E)
    logits   = exp(logit_scale) * cos(f, g)         (B, K)

Prompt learning works between the stages: a method writes the loop over the blocks itself. Two shortcuts, exact in
outputs and gradients, make it several times faster than OpenAI's code:

  * Prompts begin alike ("a photo of a", or learned context). Attention is causal, so the states of those tokens never
    see the class name: they are computed once, not K times. Nothing behind the end-of-text token is computed at all.
  * The last block computes only the one token that `project` reads.

B images, R resolution, N patches, K texts, P shared tokens, S own tokens per text, D width of a tower, E joint width.
"""

import copy
import functools
import gzip
import hashlib
import html
import json
import math
import pickle
import sys
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp.autocast_mode import is_autocast_available
from torchvision import transforms

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ASSETS = Path(__file__).parent / "assets"


class UserError(ValueError):
    """Something the user can mend: train.py prints the one sentence and exits with status 2, without a traceback."""


def full_precision(device):
    """A context without autocast, for the few steps that need fp32; also on a device that knows no autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


def preprocess(resolution):
    """CLIP's picture pipeline: an RGB PIL image -> (3, resolution, resolution) float tensor."""
    return transforms.Compose([
        transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(resolution),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])


# ---------------------------------------------------------------------------------------------------------- tokenizer

WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


@functools.cache
def vocabulary():
    """-> {byte: id}, {(left id, right id): merged id}. The lower a merge's id, the earlier it was learned and applies.

    Ids: 256 bytes, the same 256 ending a word, 48,894 merges, start and end of text.
    """
    path = ASSETS / "bpe_merges.txt.gz"
    if not path.exists():
        raise UserError(f"The tokenizer's vocabulary {path} is missing: copy it from the project, or put OpenAI's "
                        "bpe_simple_vocab_16e6.txt.gz there (github.com/openai/CLIP, PyPI's clip-anytorch).")
    # The file writes bytes as printable characters: those that are printable as themselves, the rest from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    ids = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
    merges = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file.read().split("\n")[1:48895]:  # the first line is a comment
            left, right = line.split()
            merges[ids[left], ids[right]] = ids[left + right] = len(ids)
    return {b: i for i, b in enumerate(order)}, merges


@functools.lru_cache(maxsize=1 << 16)
def encode_word(word):
    """One word -> tuple of ids: bytes first, then the earliest-learned merge of any neighbours, again and again."""
    byte_ids, merges = vocabulary()
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return (49406 + (word == "<|endoftext|>"),)
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
        ids = [49406, *encode(text), 49407]
        if len(ids) > context_length:
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise UserError(f'"{shown}" is {len(ids)} tokens long with its start and end marks, CLIP reads '
                            f"{context_length}: shorten the class name, the template or the context.")
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# ------------------------------------------------------------------------------------------------------------- towers


class Attention(nn.Module):
    """Multi-head attention under OpenAI's key names, cut in two: projections, then attention over given keys."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def split_heads(self, x):  # (..., N, D) -> (..., H, N, 64)
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def query(self, x):
        d = x.shape[-1]
        return self.split_heads(F.linear(x, self.in_proj_weight[:d], self.in_proj_bias[:d]))

    def key_value(self, x):
        d = x.shape[-1]
        k, v = F.linear(x, self.in_proj_weight[d:], self.in_proj_bias[d:]).chunk(2, dim=-1)
        return self.split_heads(k), self.split_heads(v)

    def forward(self, q, k, v, mask=None):  # mask: True where a query may look
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block of the image tower: (B, N, D) -> (B, N, D), or (B, 1, D) if it is the last."""

    def __init__(self, width, last):
        super().__init__()
        self.last = last
        self.attn = Attention(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, prompts=None, mask=None, all_tokens=False):
        """prompts (P, D) or (B, P, D) are tokens beside those of x whose outputs nobody reads.

        So they are keys and values only: no query, no output projection, no MLP. Prompts (P, D) are the same for every
        picture, and their LayerNorm, keys and values are computed once. Outputs and gradients are those of
        block(cat([x, prompts]))[:, :N].

        mask (B, N+P) tells which tokens are looked at, None: all. With all_tokens, the last block returns every token.
        """
        h = self.ln_1(x)
        k, v = self.keys_and_values(h, prompts)
        if self.last and not all_tokens:  # only the class token is read after the last block
            x, h = x[:, :1], h[:, :1]
        return self.add_attention_and_mlp(x, self.attn(self.attn.query(h), k, v, mask if mask is None else mask[:, None, None]))

    def keys_and_values(self, h, prompts):  # -> two (B, H, N+P, 64)
        k, v = self.attn.key_value(h)
        if prompts is None:
            return k, v
        prompt_k, prompt_v = self.attn.key_value(self.ln_1(prompts))  # (H, P, 64), or (B, H, P, 64)
        per_picture = len(k), -1, -1, -1
        return torch.cat([k, prompt_k.expand(per_picture)], dim=2), torch.cat([v, prompt_v.expand(per_picture)], dim=2)

    def add_attention_and_mlp(self, x, attended):
        x = x + attended
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))  # QuickGELU

    def attention_weights(self, x, prompts=None):
        """The weights that forward(x, prompts) uses, for rollout and maps: -> (B, H, N, N+P), rows sum to 1."""
        h = self.ln_1(x)
        q, (k, _) = self.attn.query(h), self.keys_and_values(h, prompts)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)


class TextBlock(Block):
    """Causal block on prompts that begin alike: shared (1, P, D) and each text's own tokens (K, S, D) -> the same.

    `eot` (K,) is the place of the end-of-text token in `own`; the last block returns only that token, own (K, 1, D).
    """

    def forward(self, shared, own, eot):
        h_shared, h_own = self.ln_1(shared), self.ln_1(own)
        k_shared, v_shared = self.attn.key_value(h_shared)
        k_own, v_own = self.attn.key_value(h_own)
        k = torch.cat([k_shared.expand(len(own), -1, -1, -1), k_own], dim=2)  # (K, H, P+S, 64)
        v = torch.cat([v_shared.expand(len(own), -1, -1, -1), v_own], dim=2)
        p, s = shared.shape[1], own.shape[1]
        causal = torch.ones(p + s, p + s, dtype=torch.bool, device=own.device).tril()
        if self.last:
            rows = torch.arange(len(own), device=own.device)
            own, h_own = own[rows, eot].unsqueeze(1), h_own[rows, eot].unsqueeze(1)  # (K, 1, D)
            mask = causal[p + eot, None, None]  # (K, 1, 1, P+S)
        else:
            mask = causal[p:]
            attended = self.attn(self.attn.query(h_shared), k_shared, v_shared, causal[:p, :p])
            shared = self.add_attention_and_mlp(shared, attended)
        return shared, self.add_attention_and_mlp(own, self.attn(self.attn.query(h_own), k, v, mask))


class VisionTransformer(nn.Module):
    """Image tower. `x = embed(images)`, then every block, then `project(x)`."""

    def __init__(self, resolution, patch, width, layers, joint):
        super().__init__()
        self.resolution, self.patch = resolution, patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (resolution // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, last=i == layers - 1) for i in range(layers))
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
    """Text tower. `shared, own, eot = embed(tokens)`, `shared, own = block(shared, own, eot)`, then `project(own)`."""

    def __init__(self, context_length, vocab_size, width, layers, joint):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(TextBlock(width, last=i == layers - 1) for i in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, joint))

    def embed(self, tokens):
        """(K, 77) -> shared (1, P, D), own (K, S, D), eot (K,). P: the longest common beginning without an end mark."""
        eot = tokens.argmax(dim=-1)
        alike = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
        p, end = min(int(alike), int(eot.min())), int(eot.max()) + 1
        x = self.token_embedding(tokens[:, :end]) + self.positional_embedding[:end]
        return x[:1, :p], x[:, p:], eot - p

    def project(self, own):
        """(K, 1, D), the end-of-text tokens that the last block returns -> (K, E)."""
        return self.ln_final(own[:, 0]) @ self.text_projection

    def forward(self, shared, own, eot):
        """All blocks on embedded prompts -> (K, E)."""
        for block in self.blocks:
            shared, own = block(shared, own, eot)
        return self.project(own)


class CLIP(nn.Module):
    """The two towers and the temperature. Every size is read from the weights: see from_state_dict and load_clip."""

    def __init__(self, visual, text):
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, images):
        """(B, 3, R, R) -> (B, E), not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """(n, 77) from tokenize -> (n, E), not normalised."""
        return self.text(*self.text.embed(tokens))

    def embed_prompts(self, classnames, n_ctx):
        """Prompts "X .. X name." with n_ctx places for learned vectors -> shared, own, eot as TextTransformer.embed's.

        The places are 1 .. n_ctx of `shared`, behind the start token.
        """
        places = " ".join(["X"] * n_ctx)
        tokens = tokenize([f"{places} {name}." for name in classnames])
        return self.text.embed(tokens.to(self.logit_scale.device))

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
            tokens = tokenize([template.format(name.replace("_", " ")) for name in classnames])
            features.append(F.normalize(self.encode_text(tokens.to(self.logit_scale.device)), dim=-1))
        return F.normalize(sum(features), dim=-1)

    @classmethod
    def from_state_dict(cls, state_dict):
        """OpenAI's keys -> CLIP with fp32 parameters, frozen, eval(). Strict: UserError on any key or shape amiss."""
        if isinstance(state_dict, dict) and "visual.layer1.0.conv1.weight" in state_dict:
            raise UserError("These are the weights of a ResNet CLIP, and only ViT models are supported: use ViT-B/16.")
        notes = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's archives, beside the weights
        try:
            state = {}  # under our keys: blocks lie directly in their tower, the text tower is a module of its own
            for key in state_dict.keys() - notes:
                prefix = "" if key.startswith(("visual.", "logit_scale")) else "text."
                state[prefix + key.replace("transformer.resblocks.", "blocks.")] = state_dict[key].float()
            depth = Counter(".".join(k.split(".")[:2]) for k in state if k.endswith(".ln_1.weight"))
            vision_width, _, patch, _ = state["visual.conv1.weight"].shape
            grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
            context_length, text_width = state["text.positional_embedding"].shape
            joint = state["text.text_projection"].shape[1]
            vocab_size = len(state["text.token_embedding.weight"])
            with torch.device("meta"):  # no memory and no random initialisation: the tensors are assigned below
                clip = cls(VisionTransformer(grid * patch, patch, vision_width, depth["visual.blocks"], joint),
                           TextTransformer(context_length, vocab_size, text_width, depth["text.blocks"], joint))
            clip.load_state_dict(state, strict=True, assign=True)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"These are not the weights of a CLIP ViT under OpenAI's key names: {detail}") from error
        return clip.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------ methods


class Method(nn.Module):
    """Zero-shot CLIP (Radford et al., 2021, Section 3.1), and what a prompt-learning method may change of it.

    A method overrides the functions that its paper changes; train.py and report.py call nothing but these. CLIP stays
    frozen; only tensors of the method's own require grad.
    """

    recipe = {}  # the paper's settings for training, see train.resolve_recipe; empty: there is nothing to train

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
        """Compute what depends on the class names alone. __init__ calls it, and for_classes for other names.

        It sets classnames; prompt_texts, a sentence per class for people to read; and zero_shot (K, E), CLIP's
        classifier of the templates.
        """
        self.classnames = [name.replace("_", " ") for name in classnames]
        self.prompt_texts = [self.templates[0].format(name) for name in self.classnames]
        self.zero_shot = nn.Buffer(self.clip.classifier(self.classnames, self.templates), persistent=False)

    def encode_text(self):
        """-> (K, E), the classifier. It does not depend on the image, so an evaluation computes it once."""
        return self.zero_shot

    def encode_image(self, images, text):
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
        """-> the optimizer's groups, each with its rate and warm-up: recipe["parts"] has tensors with rates of their own."""
        recipe = recipe or self.recipe
        learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [dict(params=[learned.pop(name)], **rates) for name, rates in recipe.get("parts", {}).items()
                  if name in learned]
        return [*groups, dict(params=[*learned.values()], lr=recipe["lr"], warmup_epochs=recipe["warmup_epochs"])]

    def prepare(self, batches):
        """Look at the few-shot pictures before training, for a cache. batches: (images, labels), in the same order at
        each walk through it, augmented anew."""

    def learned(self):
        """-> {name: tensor}, all that sets this method apart from a new one: what prompts.pt holds, a cache included."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clip.")}

    def load_learned(self, tensors):
        """Take over the tensors of learned(). UserError where names or shapes differ."""
        expected = {name: tensor.shape for name, tensor in self.learned().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise UserError(f"The learned tensors do not fit {type(self).__name__} on this backbone.")
        self.load_state_dict(tensors, strict=False)  # CLIP's own are not in it

    def for_classes(self, classnames, columns=None):
        """-> a copy of the trained method on the same CLIP, for other class names.

        columns: for each of them, which training class it is. A method with tensors per training class needs it, to
        keep those of these classes; without it such a method refuses.
        """
        other = copy.deepcopy(self, {id(self.clip): self.clip})
        other.set_classes(classnames)
        return other

    @torch.no_grad()
    def attention(self, images):
        """-> {title: (B, N)}, maps over the patches that show what the method looks at, the first one its attention.

        Here: the class token's attention to the patches in the last block, the mean of the heads.
        """
        inputs, last = [], self.clip.visual.blocks[-1]
        hook = last.register_forward_pre_hook(lambda block, args: inputs.append(args))
        try:
            self.encode_image(images, self.encode_text())
        finally:
            hook.remove()
        weights = last.attention_weights(*inputs[-1])  # the last call's: DPT runs the tower without prompts first
        n = len(self.clip.visual.positional_embedding)  # class token and patches
        return {"attention": weights[:, :, 0, 1:n].mean(dim=1)}


# ------------------------------------------------------------------------------------------------------------ weights

# Per name: the file that open_clip uses today for OpenAI's weights, then OpenAI's own, whose folder is its sha256
# (users report the latter as gone since October 2025: openai/CLIP issue 516).
HUB = "https://huggingface.co/timm/vit_{}.openai/resolve/main/open_clip_model.safetensors"
OPENAI = "https://openaipublic.azureedge.net/clip/models/{}/{}.pt"
SOURCES = {
    "ViT-B/32": ("base_patch32_clip_224", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("base_patch16_clip_224", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("large_patch14_clip_224", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("large_patch14_clip_336", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


def load_clip(name_or_path, device="cpu"):
    """"tiny", a name in SOURCES or a weights file -> CLIP with fp32 parameters, frozen, eval(); or UserError."""
    path = ASSETS / "tiny_clip.safetensors.gz" if name_or_path == "tiny" else Path(name_or_path).expanduser()
    if name_or_path in SOURCES:
        path = find_weights(name_or_path)
    if not path.is_file():
        raise UserError(f"There is no weights file {path}: give one, or a name of tiny, {', '.join(SOURCES)}.")
    return CLIP.from_state_dict(read_weights(path)).to(device)


def find_weights(name):
    """The file of a named model in OpenAI's own cache folder, ~/.cache/clip, or from the first source that gives it."""
    hub, sha256 = SOURCES[name]
    stem = name.replace("/", "-").replace("@", "-")
    cache, reasons = Path.home() / ".cache" / "clip", []
    sources = {cache / f"{stem}.safetensors": (HUB.format(hub), None),
               cache / f"{stem}.pt": (OPENAI.format(sha256, stem), sha256)}
    for path in sources:
        if path.is_file():
            return path
    for path, (url, digest) in sources.items():
        try:
            download(url, path, "sha256", digest, check=lambda part: CLIP.from_state_dict(read_weights(part)))
            return path
        except UserError as error:
            reasons.append(str(error))
    by_hand = " or ".join(f"{url} at {path}" for path, (url, _) in sources.items())
    raise UserError(f"The weights of {name} could not be downloaded ({'; '.join(reasons)}): put {by_hand} by hand.")


def download(url, path, algorithm=None, digest=None, check=None):
    """Fetch url into path: resumed from path.part, verified, and renamed into place only when whole; or UserError.

    algorithm: one of hashlib's, or "git" for a git blob id; digest: the hex expected, None where the source states
    none; check(part): raises UserError when the content is not what it should be.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    print(f"Downloading {url}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "clip_min"})
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0  # a server without ranges sends the whole file again
            total = have + int(response.headers.get("Content-Length") or 0)
            with part.open("ab" if have else "wb") as file:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    if sys.stderr.isatty():
                        print(f"  {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB", end="\r", file=sys.stderr)
            if part.stat().st_size < total:
                raise UserError(f"{url} stopped at {part.stat().st_size} of {total} bytes, run again to resume")
    except (OSError, HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing is left to send, the part is whole already
            raise UserError(f"{url} could not be read: {error}") from error
    try:
        if digest and file_digest(part, algorithm) != digest:
            raise UserError(f"what {url} sent does not have the {algorithm} hash {digest} and was deleted")
        if check:
            check(part)
    except UserError:
        part.unlink()
        raise
    part.replace(path)


def file_digest(path, algorithm):
    """Hex digest of a file; "git" is git's blob id: sha1 over a short header and the content."""
    h = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if algorithm == "git" else hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


DTYPES = {  # as safetensors and as TorchScript archives call them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64,
}


def read_weights(path):
    """A state dict from OpenAI's TorchScript archive, a safetensors file (also gzipped), or a plain state dict.

    Recognised by content, not by name. No code of the file is run. UserError names the file when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        gzipped = head[:2] == b"\x1f\x8b"
        if gzipped or head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            with gzip.open(path) if gzipped else open(path, "rb") as file:
                return read_safetensors(file)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        with open(path, "rb") as file:  # torch.load goes by the name if it gets one
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail anywhere in the readers
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a whole weights file ({detail}): download it again.") from error


def read_safetensors(file):
    """Eight bytes of header length, a JSON header {key: dtype, shape, [begin, end)}, raw little-endian tensors."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    state, position = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        raw = bytearray(file.read(end - begin))
        if begin != position or len(raw) != end - begin:
            raise ValueError(f"the data of {key} is not all there")
        state[key] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
        position = end
    if file.read(1):  # reading to the end also has gzip check its sum
        raise ValueError("there is more behind the last tensor")
    return state


def read_torchscript(archive):
    """Its pickle names modules and tensors: only tensors and containers are built, the archive's code is not read."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")

    class Node:
        """Stands for a module of the archive; unpickling fills its __dict__ with parameters and submodules."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return Node
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if module == "torch" and name in DTYPES:
                return DTYPES[name]
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")

        def persistent_load(self, record):
            _, dtype, key, _, _ = record  # "storage", type, key, device, number of elements
            return torch.frombuffer(bytearray(archive.read(f"{root}data/{key}")), dtype=dtype)

    def tensors(node, prefix=""):
        for name, value in vars(node).items():
            if isinstance(value, Node):
                yield from tensors(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor):
                yield prefix + name, value

    with archive.open(root + "data.pkl") as file:
        return dict(tensors(Unpickler(file).load()))
