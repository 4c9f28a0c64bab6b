"""ProDA: a distribution of classifiers, from a collection of prompts.

Lu, Liu, Zhang, Liu, Tian: Prompt Distribution Learning, CVPR 2022, arXiv:2205.03340. No code.

    w_c(n) = g(t_c(n)) made unit, n = 1 .. n_prompts;   w ~ Normal(mu, Sigma),  mu_c = mean over n of w_c(n)
    L_upper = - log( exp(z.mu_y / tau) / sum_c exp(z.mu_c / tau + z^T A_c z / (2 tau^2)) )
    A_c     = Sigma_cc + Sigma_yy - Sigma_cy - Sigma_yc;   z^T A_c z is the variance of z.(w_c - w_y) over n
    L_so    = mean over n != m of |cos(g(P_n), g(P_m))|,  P_n = [SOS, v_1(n) .. v_M(n), ".", EOT], without a name
    L       = L_upper + lam L_so;   a picture's class is that of the largest z.mu_c over all prompts

    v_1(n) .. v_M(n)   ctx   (n_prompts, M, Dt)   learned
    t_c(n)  prompt n of class c      z  the image feature (B, E), unit      g  clip.text

A quarter of the prompts has the class name in front of the context, a quarter in its middle, the rest behind it. Each
step draws `n_per_step` prompts for L_upper, which bounds the expected cross-entropy; L_so takes all. Left open and
chosen: variances are divided by the number drawn, contexts begin as CoOp's, there is no warm-up.
To use it elsewhere, copy this file, coop.py, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, M = n_ctx, Dt and E widths of text tower and joint space.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import Method, UserError, full_precision
from coop import Prompts


class ProDA(Method):
    """A collection of CoOp's prompts. Learns n_prompts * n_ctx * Dt numbers: 262,144 on ViT-B by default."""

    # Its Section 4; the rest is CoOp's.
    recipe = dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, crop_scale=(0.08, 1.0), lr=0.001, warmup_epochs=0,
                  batch_size=20, epochs=100)

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_prompts=32, n_per_step=4, n_ctx=16,
                 lam=0.1):
        if n_ctx < 1 or not 2 <= n_per_step <= n_prompts:
            raise UserError(f"n_ctx is {n_ctx}, n_per_step {n_per_step} and n_prompts {n_prompts}: choose 1 or more "
                            "contexts, and 2 to n_prompts prompts per step.")
        super().__init__(clip, classnames, templates)
        self.n_prompts, self.n_per_step, self.n_ctx, self.lam = n_prompts, n_per_step, n_ctx, lam
        self.place = [min(4 * n // n_prompts, 2) for n in range(n_prompts)]  # of the name: front, middle, end
        width = clip.text.token_embedding.embedding_dim
        self.ctx = nn.Parameter(self.zero_shot.new_empty(n_prompts, n_ctx, width).normal_(std=0.02))
        self.nameless = Prompts(clip, [""] * n_prompts, n_ctx, n_ctx, csc=True)  # P_n with contexts of their own
        self.embed_prompts()

    def embed_prompts(self):
        """See Method. There are three kinds of prompts, for the three places of the name."""
        places = (0, self.n_ctx // 2, self.n_ctx)
        self.prompts = nn.ModuleList(Prompts(self.clip, self.classnames, self.n_ctx, n_front) for n_front in places)

    def contexts(self):
        """-> (n_prompts, M, Dt)."""
        return self.ctx

    def encode_prompt(self, n):
        """The number of a prompt, from 0 -> w_c(n) of all classes (K, E), unit."""
        prompts = self.prompts[self.place[n]]
        return F.normalize(self.clip.text(prompts(self.ctx[n]), prompts.layout).float(), dim=-1)

    def encode_text(self):
        """-> mu (K, E) of all prompts, not normalised."""
        return sum(self.encode_prompt(n) for n in range(self.n_prompts)) / self.n_prompts

    def forward(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> z.mu / tau (B, K): mu is not made unit."""
        text = self.encode_text() if text is None else text
        z = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        with full_precision(images.device):
            return self.clip.logit_scale.exp() * z @ text.T

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar, L_upper of the prompts drawn + lam L_so."""
        drawn = torch.randperm(self.n_prompts)[: self.n_per_step].tolist()
        weights = torch.stack([self.encode_prompt(n) for n in drawn], dim=-1)  # (K, E, drawn)
        z = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        with full_precision(images.device):
            scores = self.clip.logit_scale.exp() * torch.einsum("be,ken->bkn", z, weights)  # z.w_c(n) / tau
        margins = scores - scores.take_along_dim(labels[:, None, None], dim=1)  # z.(w_c(n) - w_y(n)) / tau
        logits = scores.mean(dim=-1) + margins.var(dim=-1, correction=0) / 2  # (B, K)
        return F.cross_entropy(logits, labels) + self.lam * self.similarity()

    def similarity(self):
        """-> L_so, scalar."""
        n = self.n_prompts
        features = self.clip.text(self.nameless(self.ctx), self.nameless.layout).float()  # (n_prompts, E)
        cosines = F.cosine_similarity(features.unsqueeze(0), features.unsqueeze(1), dim=-1).abs()  # (n, n)
        return (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))
