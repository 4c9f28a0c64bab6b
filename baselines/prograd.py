"""ProGrad: CoOp with another gradient, which never works against what zero-shot CLIP knows.

Zhu, Niu, Han, Wu, Zhang: Prompt-aligned Gradient for Prompt Tuning, ICCV 2023, arXiv:2205.14865

    L_ce = CE(p, y),  L_kl = - sum_i p_zs(i) log p(i), both at temperature 1                                  Eq. 3
    G_d = grad L_ce,  G_g = grad L_kl
    G = G_d - lam min(0, G_d . G_g) / |G_g|^2 G_g                                                             Eq. 4

    p     softmax of the logits (B, K) of CoOp's prompts      p_zs  the same of zero-shot CLIP's, from the templates
    G     the gradient of all that learns, `ctx` (M, Dt)

L_kl is the KL divergence but for a constant. Its code puts the template's words in front of the name: see ctx_init.
The equations' numbers come from secondary sources. Official code: github.com/BeierZhu/Prompt-align,
trainers/prograd.py.
To use it elsewhere, copy this file, coop.py, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, M = n_ctx, Dt text width.
"""

import torch
import torch.nn.functional as F

from clip_min import UserError, encode, sum_over_processes
from coop import CoOp


class ProGrad(CoOp):
    """CoOp with projected gradients. Learns n_ctx * Dt numbers: 8,192 on ViT-B by default.

    The `n_ctx` context vectors begin at random, or as zeros and then the words in `ctx_init`.
    """

    recipe = CoOp.recipe

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, ctx_init="", lam=1.0):
        words = encode(ctx_init.replace("_", " "))
        if n_ctx < max(1, len(words)):
            raise UserError(f"n_ctx is {n_ctx}: it must be 1 or more, and {len(words)} tokens of ctx_init must fit.")
        super().__init__(clip, classnames, templates, n_ctx=n_ctx)
        self.ctx_init, self.lam = ctx_init.replace("_", " "), lam
        if words:
            self.ctx.data.zero_()
            self.ctx.data[-len(words) :] = clip.text.token_embedding.weight[words]

    @property
    def prompt_texts(self):
        """See Method. The vectors that begin as zeros stand in front of the words."""
        zeros = self.n_ctx - len(encode(self.ctx_init))
        shown = f"[{zeros} vectors] " if self.ctx_init and zeros else ""
        return [f"{shown}{text}" for text in super().prompt_texts]

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar with the value of L_ce and the gradient G, so that any training loop takes its step."""
        z = self.clip.encode_image(images)
        logits = self.clip.logits(z, self.encode_text())
        ce = F.cross_entropy(logits, labels)
        kl = F.cross_entropy(logits, self.clip.logits(z, self.zero_shot).softmax(dim=-1))  # Eq. 3
        scale = 1024  # in fp16 small gradients would become zero on their way back
        of_ce = torch.autograd.grad(scale * ce, self.ctx, retain_graph=True)[0]
        of_kl = torch.autograd.grad(scale * kl, self.ctx)[0]
        share = len(labels) / sum_over_processes(torch.ones_like(labels).sum())  # this process's part of the batch
        of_ce, of_kl = sum_over_processes(share * of_ce), sum_over_processes(share * of_kl)  # G_d, G_g of the batch
        conflict = (of_ce * of_kl).sum().clamp(max=0)
        length = of_kl.square().sum().clamp(min=torch.finfo(of_kl.dtype).tiny)
        gradient = (of_ce - self.lam * conflict / length * of_kl) / scale  # Eq. 4
        surrogate = (self.ctx * gradient).sum()
        return ce.detach() + surrogate - surrogate.detach()
