"""CoOp: learn the words around the class name. The image tower is untouched.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134

    t_i = [SOS, v_1 .. v_M, CLASS_i, ".", EOT]                            the prompt of class i       Eq. 2
    t_i = [SOS, v_1 .. v_{M/2}, CLASS_i, v_{M/2+1} .. v_M, ".", EOT]      with the name in the middle Eq. 4
    p(y = i | x) = softmax_i( cos(g(t_i), f(x)) / tau )                   trained with cross-entropy  Eq. 3

    v_1 .. v_M   ctx  (M, D), or (K, M, D) when every class has its own      learned
    CLASS_i      the word embeddings of the class name, in `suffix`          frozen
    g  clip.text      f  clip.visual      1 / tau  clip.logit_scale.exp()    frozen

All classes share the start token and the context in front of the name, so those are encoded once: see TextBlock in
clip_min.py. What the paper leaves open is settled as in its code: random contexts are drawn from a normal distribution
with standard deviation 0.02, and weight decay applies to them. Official code: github.com/KaiyangZhou/CoOp,
trainers/coop.py.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, M = n_ctx, L tokens of the longest prompt, D text width, E joint width.
"""

import torch
from torch import nn

from clip_min import Method, UserError, encode


class CoOp(Method):
    """CLIP with learned context vectors in its prompts. Learns n_ctx * D numbers: 8,192 on ViT-B by default.

    The context is `n_ctx` random vectors, or the embeddings of the words in `ctx_init`. `class_token_position` puts the
    class name at the "end" of the context, in its "middle", or in "front" of it. With `csc`, every class has a context
    of its own (class-specific context). The templates are not used for the prompts: the context replaces them.
    """

    # Section 4.1 of the paper and its configuration files; epochs by shots.
    recipe = dict(
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.002, warmup_epochs=1, batch_size=32,
        crop_scale=(0.08, 1.0), epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": dict(epochs=50)},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, ctx_init="",
                 class_token_position="end", csc=False):
        if n_ctx < 0:
            raise UserError(f"n_ctx is {n_ctx}: it must be 0 or more.")
        if class_token_position not in ("end", "middle", "front"):
            raise UserError(f"class_token_position is {class_token_position}: choose end, middle or front.")
        ctx_init = ctx_init.replace("_", " ")
        self.n_ctx = len(encode(ctx_init)) if ctx_init else n_ctx
        self.ctx_init, self.class_token_position, self.csc = ctx_init, class_token_position, csc
        super().__init__(clip, classnames, templates)  # calls set_classes, which reads the options above
        if ctx_init:
            words = clip.tokenize(ctx_init)[0, 1 : 1 + self.n_ctx]
            ctx = clip.text.token_embedding(words)  # (M, D)
            ctx = ctx.expand(len(classnames), -1, -1) if csc else ctx
        else:
            size = (len(classnames), self.n_ctx) if csc else (self.n_ctx,)
            ctx = self.zero_shot.new_empty(*size, clip.text.token_embedding.embedding_dim).normal_(std=0.02)
        self.ctx = nn.Parameter(ctx.clone())

    def set_classes(self, classnames):
        """Compute the embeddings of "X .. X CLASS." for every class, and in which order its prompt reads them."""
        super().set_classes(classnames)
        context_words = self.ctx_init or " ".join(["X"] * self.n_ctx)
        self.prompt_texts = [f"{self.ctx_init or f'[{self.n_ctx} vectors]'} {name}." for name in self.classnames]
        tokens = self.clip.tokenize([f"{context_words} {name}." for name in self.classnames])
        eot = tokens.argmax(dim=-1)
        length = int(eot.max()) + 1  # nothing behind the end mark is ever read
        words = self.clip.text.token_embedding(tokens[:, :length])  # (K, L, D): SOS, context, name, ".", EOT

        # How many vectors of the context stand in front of the name.
        n_front = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[self.class_token_position]
        start, context = [0], list(range(1, 1 + self.n_ctx))
        order = []
        for name in self.classnames:
            end_of_name = 1 + self.n_ctx + len(encode(name))
            name_places, rest = range(1 + self.n_ctx, end_of_name), range(end_of_name, length)
            order.append([*start, *context[:n_front], *name_places, *context[n_front:], *rest])
        self.n_shared = 1 if self.csc else 1 + n_front  # the tokens that all prompts begin with
        self.order = nn.Buffer(torch.tensor(order, device=tokens.device), persistent=False)  # (K, L)
        self.sos = nn.Buffer(words[:, :1], persistent=False)  # (K, 1, D)
        self.suffix = nn.Buffer(words[:, 1 + self.n_ctx :], persistent=False)  # (K, L-1-M, D)
        self.eot = nn.Buffer(eot - self.n_shared, persistent=False)  # (K,), counted behind the shared tokens

    def contexts(self):
        """-> (M, D), or (K, M, D) with csc."""
        return self.ctx

    def encode_text(self):
        """-> (K, E), not normalised."""
        ctx = self.ctx.expand(len(self.sos), -1, -1)  # (K, M, D)
        x = torch.cat([self.sos, ctx, self.suffix], dim=1).take_along_dim(self.order.unsqueeze(-1), dim=1)  # Eq. 2, 4
        x = x + self.clip.text.positional_embedding[: x.shape[1]]  # (K, L, D)
        return self.clip.text(x[:1, : self.n_shared], x[:, self.n_shared :], self.eot)

    def for_classes(self, classnames, columns=None):
        """See Method. Class-specific contexts belong to the training classes: `columns` tells which ones to keep."""
        if self.csc and columns is None:
            raise UserError("Class-specific contexts (csc) belong to the classes that they were trained for: train "
                            "with csc=false to use other class names.")
        other = super().for_classes(classnames)
        if self.csc:
            other.ctx = nn.Parameter(self.ctx[columns].detach())
        return other
