"""CoOp: learn the words around the class name. The image tower is untouched.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134

    t_i = [SOS, v_1 .. v_M, CLASS_i, ".", EOT]              the prompt of class i             Eq. 2
    p(y = i | x) = softmax_i( cos(g(t_i), f(x)) / tau )     trained with cross-entropy        Eq. 3

    v_1 .. v_M   ctx  (M, D), or (K, M, D) when every class has its own      learned
    g  clip.text      f  clip.visual      1 / tau  clip.logit_scale.exp()    frozen

All classes share the start token and the context in front of the name, so those are encoded once: see TextBlock in
clip_min.py. What the paper leaves open is settled as in its code: N(0, 0.02^2) for random contexts, weight decay on
them, and the end-of-text place of "X .. X CLASS." for every position of the name.

Copy this file and clip_min.py anywhere. B images, K classes, M = n_ctx, D text width, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import UserError, encode, tokenize


class CoOp(nn.Module):
    """n_ctx contexts at random, or the words of ctx_init; class_token_position: "end", "middle" or "front" of them.

    csc=True learns a context per class (class-specific). The templates are not used: the context replaces them.
    Learns n_ctx * D numbers, 8,192 on ViT-B with 16 contexts, K times as many with csc.
    """

    # Section 4.1 of the paper and its configuration files; epochs by shots.
    recipe = dict(
        optimizer="sgd", lr=0.002, warmup_epochs=1, batch_size=32, crop_scale=(0.08, 1.0),
        epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": {"epochs": 50}},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, ctx_init="",
                 class_token_position="end", csc=False):
        super().__init__()
        if n_ctx < 0:
            raise UserError(f"n_ctx is {n_ctx}: it must be 0 or more.")
        if class_token_position not in ("end", "middle", "front"):
            raise UserError(f"class_token_position is {class_token_position}: choose end, middle or front.")
        self.clip = clip.requires_grad_(False)
        names, ctx_init = [name.replace("_", " ") for name in classnames], ctx_init.replace("_", " ")
        n_ctx = len(encode(ctx_init)) if ctx_init else n_ctx
        self.prompts = [f"{ctx_init or f'[{n_ctx} vectors]'} {name}." for name in names]  # for people to read

        placeholder = ctx_init or " ".join(["X"] * n_ctx)
        tokens = tokenize([f"{placeholder} {name}." for name in names]).to(clip.logit_scale.device)
        eot = tokens.argmax(dim=-1)
        length = int(eot.max()) + 1  # nothing behind the end mark is ever read
        words = clip.text.token_embedding(tokens[:, :length])  # (K, length, D)
        ctx = words[:, 1 : 1 + n_ctx] if csc else words[0, 1 : 1 + n_ctx]
        self.ctx = nn.Parameter(ctx.clone() if ctx_init else torch.empty_like(ctx).normal_(std=0.02))

        before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[class_token_position]  # contexts before the name
        self.n_shared = 1 if csc else 1 + before
        order = []  # where each place of a prompt comes from in SOS, context, name, ".", EOT
        for name in names:
            end, rest = 1 + n_ctx + len(encode(name)), range(1 + before, 1 + n_ctx)
            order.append([*range(1 + before), *range(1 + n_ctx, end), *rest, *range(end, length)])
        self.register_buffer("order", torch.tensor(order, device=tokens.device), persistent=False)
        self.register_buffer("sos", words[:, :1], persistent=False)
        self.register_buffer("suffix", words[:, 1 + n_ctx :], persistent=False)
        self.register_buffer("eot", eot - self.n_shared, persistent=False)

    def encode_text(self):
        """-> (K, E), not normalised: the classifier. It does not depend on the image: one call serves an evaluation."""
        x = torch.cat([self.sos, self.ctx.expand(len(self.sos), -1, -1), self.suffix], dim=1)  # (K, L, D)     Eq. 2
        x = x.take_along_dim(self.order.unsqueeze(-1), dim=1)
        x = x + self.clip.text.positional_embedding[: x.shape[1]]
        return self.clip.text(x[:1, : self.n_shared], x[:, self.n_shared :], self.eot)

    def features(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> image features (B, E), text features (K, E)."""
        text = self.encode_text() if text is None else text
        with torch.no_grad():  # nothing to learn in the image tower
            return self.clip.encode_image(images), text

    def forward(self, images, text=None):
        """-> logits (B, K)."""
        return self.clip.logits(*self.features(images, text))  # Eq. 3

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar cross-entropy."""
        return F.cross_entropy(self(images), labels)
