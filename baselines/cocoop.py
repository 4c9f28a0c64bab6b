"""x"""

import torch
import torch.nn.functional as F
from torch import nn

from baselines.context_prompt import SGD, ContextPrompt
from clip_min import full_precision


class CoCoOp(ContextPrompt):
    """CoOp with a context that depends on the picture. Learns 35,360 numbers on ViT-B by default.

        v_m(x) = v_m + h(z)                                                    shifts every context vector alike
        p(y = i | x) = softmax_i( cos(g(t_i(x)), f) / tau ), cross-entropy                                    Eq. 3

        v_m  ctx  (M, D)      h  meta_net, Linear(E, E/16), ReLU, Linear(E/16, D)      learned

    Every picture has a classifier of its own; encode_text() gives that of the context without a shift. forward() goes
    from picture to picture, so in an evaluation no more than K prompts are in memory, and encodes their beginning once.
    """

    recipe = SGD | dict(lr=0.002, warmup_epochs=1, batch_size=1, epochs=10)  # as vit_b16_c4_ep10_batch1_ctxv1.yaml

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=4, ctx_init="a photo of a"):
        super().__init__(clip, classnames, templates, n_ctx, ctx_init)
        joint, hidden, width = self.zero_shot.shape[1], self.zero_shot.shape[1] // 16, self.ctx.shape[1]
        self.meta_net = nn.Sequential(nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, width)).to(self.ctx.device)

    def forward(self, images, text=None):
        """images (B, 3, R, R) -> logits (B, K). `text` is not used: it cannot be the same for all pictures."""
        f = self.clip.encode_image(images)
        with full_precision(images.device):  # learned tensors are fp32
            shifts = self.meta_net(F.normalize(f.float(), dim=-1))  # (B, D)
        return torch.cat([self.clip.logits(of_one, self.encode_context(self.ctx + shift))  # (1, K)           Eq. 3
                          for of_one, shift in zip(f.split(1), shifts, strict=True)])
