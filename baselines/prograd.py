"""x"""

import torch
import torch.nn.functional as F

from baselines.context_prompt import COOP, ContextPrompt
from clip_min import whole_batch


class ProGrad(ContextPrompt):
    """CoOp with another gradient: it never works against what zero-shot CLIP knows. Learns 8,192 numbers by default.

        L_ce = CE(p, y),  L_kl = - sum_i p_zs(i) log p(i), both at temperature 1                              Eq. 3
        G_d = grad L_ce,  G_g = grad L_kl
        G = G_d - lam min(0, G_d . G_g) / |G_g|^2 G_g                                                         Eq. 4

        p_zs  softmax of the zero-shot logits  (B, K), from the templates      G  the gradient of all that learns, `ctx`

    L_kl is the KL divergence but for a constant. The code has the template's words in front of the name as ctx_init.
    """

    recipe = COOP

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, ctx_init="", lam=1.0):
        super().__init__(clip, classnames, templates, n_ctx, ctx_init)
        self.lam = lam

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar with the value of L_ce and the gradient G, so that any training loop takes its step."""
        f = self.clip.encode_image(images)
        logits = self.clip.logits(f, self.encode_text())
        ce = F.cross_entropy(logits, labels)
        kl = F.cross_entropy(logits, self.clip.logits(f, self.zero_shot).softmax(dim=-1))  # Eq. 3
        scale = 1024  # in fp16 small gradients would become zero on their way back
        share = len(labels) / whole_batch(torch.ones_like(labels).sum())  # of the batch; under torchrun not all of it
        of_ce = whole_batch(share * torch.autograd.grad(scale * ce, self.ctx, retain_graph=True)[0])
        of_kl = whole_batch(share * torch.autograd.grad(scale * kl, self.ctx)[0])
        conflict = (of_ce * of_kl).sum().clamp(max=0)
        length = of_kl.square().sum().clamp(min=torch.finfo(of_kl.dtype).tiny)
        gradient = (of_ce - self.lam * conflict / length * of_kl) / scale  # Eq. 4
        surrogate = (self.ctx * gradient).sum()
        return ce.detach() + surrogate - surrogate.detach()
