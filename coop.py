"""CoOp: learn the words around the class name. The image tower is untouched.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134

    t_i = [SOS, v_1 .. v_M, CLASS_i, ".", EOT]                            the prompt of class i       Eq. 2
    t_i = [SOS, v_1 .. v_{M/2}, CLASS_i, v_{M/2+1} .. v_M, ".", EOT]      with the name in the middle Eq. 4
    p(y = i | x) = softmax_i( cos(g(t_i), f(x)) / tau )                   trained with cross-entropy  Eq. 3

    v_1 .. v_M   ctx  (M, Dt), or (K, M, Dt) when every class has its own    learned
    CLASS_i      the word embeddings of the class name, in `prompts`         frozen
    g  clip.text      f  clip.visual      1 / tau  clip.logit_scale.exp()    frozen

Left open, and chosen as in its code, github.com/KaiyangZhou/CoOp, trainers/coop.py: random contexts are drawn from a
normal distribution with standard deviation 0.02, and weight decay applies to them.
To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
K classes, M = n_ctx, Dt text width, E joint width; C common tokens, S further ones of each class, as in clip_min.py.
"""

import torch
from torch import nn

from clip_min import Method, UserError, encode


class CoOp(Method):
    """CLIP with a learned context in place of a template. Learns n_ctx * Dt numbers: 8,192 on ViT-B by default.

    The context is `n_ctx` random vectors, or the embeddings of `ctx_init`, whatever their number. The name stands where
    `class_token_position` says, at its "end", in its "middle" or in "front" of it. With `csc`, every class has its own.
    """

    recipe = dict(  # Section 4.1 of the paper and its configuration files; epochs by shots
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.002, warmup_epochs=1, batch_size=32,
        crop_scale=(0.08, 1.0), epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": dict(epochs=50)})

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, ctx_init="",
                 class_token_position="end", csc=False):
        if n_ctx < 0 or class_token_position not in ("end", "middle", "front"):
            raise UserError(f"n_ctx is {n_ctx} and class_token_position {class_token_position}: choose 0 or more, and "
                            "end, middle or front.")
        super().__init__(clip, classnames, templates)
        self.ctx_init, self.csc = ctx_init.replace("_", " "), csc
        words = encode(self.ctx_init)
        self.n_ctx = len(words) or n_ctx
        self.n_front = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[class_token_position]
        self.is_common = self.n_front == self.n_ctx and not csc  # all prompts begin with the whole context
        number = (len(classnames),) if csc else ()  # of contexts
        ctx = self.zero_shot.new_empty(*number, self.n_ctx, clip.text.token_embedding.embedding_dim).normal_(std=0.02)
        if words:
            ctx.copy_(clip.text.token_embedding.weight[words])
        self.ctx = nn.Parameter(ctx)
        self.embed_prompts()

    def embed_prompts(self):
        """Embed the prompts of all classes as one stream of tokens (C + K*S, Dt), with places for the context."""
        if self.is_common:
            prompts, self.layout = self.clip.embed_prompts(self.classnames, self.n_ctx)
            self.prompts = nn.Buffer(prompts, persistent=False)
        else:
            self.prompts = Prompts(self.clip, self.classnames, self.n_ctx, self.n_front, self.csc)

    @property
    def prompt_texts(self):
        """See Method. The words of ctx_init are shown where the whole context stands in front of the name."""
        front, behind = (f"[{n} vectors]" if n else "" for n in (self.n_front, self.n_ctx - self.n_front))
        front = front if behind else self.ctx_init or front
        return [f"{front} {name} {behind}".strip() + "." for name in self.classnames]

    def contexts(self):  # (M, Dt), or (K, M, Dt) with csc
        return self.ctx

    def encode_text(self, ctx=None):
        """-> the classifier (K, E) of ctx, or of self.ctx if it is None (CoCoOp gives another), not normalised."""
        tower, ctx, m = self.clip.text, self.ctx if ctx is None else ctx, self.n_ctx
        if self.is_common:  # [SOS, v_1 .. v_M, CLASS_i, ".", EOT]                                               Eq. 2
            ctx = ctx + tower.positional_embedding[1 : 1 + m]
            return tower(torch.cat([self.prompts[:1], ctx, self.prompts[1 + m :]]), self.layout)
        return tower(self.prompts(ctx), self.prompts.layout)  # Eq. 4, or a context for each class

    def for_classes(self, classnames, columns=None):
        """See Method. `columns` tells which of the class-specific contexts to keep."""
        if self.csc and columns is None:
            raise UserError("Class-specific contexts belong to the classes of the training: train with csc=false.")
        other = super().for_classes(classnames)
        if self.csc:
            other.ctx = nn.Parameter(self.ctx[columns].detach())
        return other


class Prompts(nn.Module):
    """Prompts with the first `n_front` of `n_ctx` vectors in front of the class name and the others behind it."""

    def __init__(self, clip, classnames, n_ctx, n_front, csc=False):
        super().__init__()
        self.n_vectors = 0 if csc else n_front  # among the common tokens, which all prompts begin with
        tokens = clip.tokenize([f"{'X ' * n_ctx}{name}." for name in classnames])  # (K, 77)
        order = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)  # the token in each place
        for row, name in zip(order, classnames, strict=True):
            sos, ctx, words, end = row.tensor_split([1, 1 + n_ctx, 1 + n_ctx + len(encode(name))])
            row.copy_(torch.cat([sos, ctx[:n_front], words, ctx[n_front:], end]))  # "X X red circle X X."        Eq. 4
        x, self.layout = clip.text.embed(tokens.gather(1, order), n_common=1 + self.n_vectors)
        places = self.layout.join((order >= 1) & (order <= n_ctx)).nonzero().squeeze(1)  # the rows of x that hold an X
        positions = self.layout.join(clip.text.positional_embedding.expand(len(tokens), -1, -1))[places]
        self.x, self.places, self.positions = (nn.Buffer(t, persistent=False) for t in (x, places, positions))

    def forward(self, ctx):
        """ctx (M, Dt), or (K, M, Dt) with csc -> the prompts with their context (C + K*S, Dt)."""
        common, further = ctx.tensor_split([self.n_vectors], dim=-2)  # below in the order of their places in x
        vectors = torch.cat([common.flatten(0, -2), further.expand(self.layout.n_prompts, -1, -1).flatten(0, 1)])
        return self.x.index_copy(0, self.places, vectors + self.positions)
