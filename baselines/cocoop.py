"""CoCoOp: CoOp with a context that depends on the picture.

Zhou, Yang, Loy, Liu: Conditional Prompt Learning for Vision-Language Models, CVPR 2022, arXiv:2203.05557

    v_m(x) = v_m + h(z)                                                    shifts every context vector alike
    p(y = i | x) = softmax_i( cos(g(t_i(x)), z) / tau ), cross-entropy                                        Eq. 3

    v_m  ctx       (M, Dt)                                     learned
    h    meta_net  Linear(E, E/16), ReLU, Linear(E/16, Dt)     learned
    z    the image feature (B, E), unit      t_i(x)  the prompt of class i with the context v_m(x)
    g    clip.text      1 / tau  clip.logit_scale.exp()

Official code: github.com/KaiyangZhou/CoOp, trainers/cocoop.py; what the paper leaves open is settled as there.
To use it elsewhere, copy this file, coop.py, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, M = n_ctx, Dt text width, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import UserError, encode, full_precision
from coop import CoOp


class CoCoOp(CoOp):
    """CoOp's prompts with a shift for every picture. Learns 35,360 numbers on ViT-B by default.

    Every picture has a classifier of its own; encode_text() gives that of the context without a shift. forward() goes
    from picture to picture, so in an evaluation no more than K prompts are in memory.
    """

    # The configuration file vit_b16_c4_ep10_batch1_ctxv1.yaml.
    recipe = dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, crop_scale=(0.08, 1.0), lr=0.002, warmup_epochs=1,
                  batch_size=1, epochs=10)

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=4, ctx_init="a photo of a"):
        words = len(encode(ctx_init.replace("_", " ")))
        if n_ctx < 1 or words not in (0, n_ctx):
            raise UserError(f"n_ctx is {n_ctx} and ctx_init has {words} tokens: choose 1 or more vectors, and as many "
                            "tokens or none.")
        super().__init__(clip, classnames, templates, n_ctx=n_ctx, ctx_init=ctx_init)
        joint, width = self.zero_shot.shape[1], self.ctx.shape[1]
        self.meta_net = nn.Sequential(nn.Linear(joint, joint // 16), nn.ReLU(), nn.Linear(joint // 16, width))
        self.meta_net.to(self.ctx.device)

    def forward(self, images, text=None):
        """images (B, 3, R, R) -> logits (B, K). `text` is not used: it cannot be the same for all pictures."""
        z = self.clip.encode_image(images)
        with full_precision(images.device):  # learned tensors are fp32
            shifts = self.meta_net(F.normalize(z.float(), dim=-1))  # (B, Dt)
        return torch.cat([self.clip.logits(of_one, self.encode_text(self.ctx + shift))  # (1, K)              Eq. 3
                          for of_one, shift in zip(z.split(1), shifts, strict=True)])
