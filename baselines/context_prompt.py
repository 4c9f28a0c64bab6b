"""x"""

import torch
from torch import nn

from clip_min import Method, UserError, encode

SGD = dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, crop_scale=(0.08, 1.0))  # CoOp's code
COOP = SGD | dict(lr=0.002, warmup_epochs=1, batch_size=32, epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200},
                  datasets={"imagenet": dict(epochs=50)})  # CoOp's recipe, epochs by shots


class ContextPrompt(Method):
    """CoOp's prompt. Its `n_ctx` context vectors begin at random, or as zeros and then the words in `ctx_init`."""

    def __init__(self, clip, classnames, templates, n_ctx, ctx_init):
        words = encode(ctx_init.replace("_", " "))
        if n_ctx < max(1, len(words)):
            raise UserError(f"n_ctx is {n_ctx}: it must be 1 or more, and {len(words)} tokens of ctx_init must fit.")
        self.n_ctx, self.ctx_init = n_ctx, ctx_init.replace("_", " ")
        super().__init__(clip, classnames, templates)  # calls set_classes, which reads the options above
        ctx = self.shared.new_empty(n_ctx, self.shared.shape[-1]).normal_(std=0.02)
        if words:
            ctx.zero_()
            ctx[-len(words) :] = clip.text.token_embedding(torch.tensor(words, device=ctx.device))
        self.ctx = nn.Parameter(ctx)

    def set_classes(self, classnames):
        """Embed the prompts "X .. X CLASS.": shared (1, >=1+M, D), own (K, S, D), eot (K,)."""
        super().set_classes(classnames)
        self.prompt_texts = [f"{self.ctx_init or f'[{self.n_ctx} vectors]'} {name}." for name in self.classnames]
        shared, own, eot = self.clip.embed_prompts(self.classnames, self.n_ctx)
        self.shared, self.own, self.eot = (nn.Buffer(x, persistent=False) for x in (shared, own, eot))

    def contexts(self):  # (M, D)
        return self.ctx

    def encode_context(self, ctx):
        """ctx (M, D) -> the classifier (K, E), not normalised. What all classes begin with is encoded once."""
        m, text = self.n_ctx, self.clip.text
        ctx = (ctx + text.positional_embedding[1 : 1 + m]).unsqueeze(0)  # behind the start token
        return text(torch.cat([self.shared[:, :1], ctx, self.shared[:, 1 + m :]], dim=1), self.own, self.eot)

    def encode_text(self):
        """-> (K, E), not normalised."""
        return self.encode_context(self.ctx)
