"""VPT: learn tokens beside the image patches. The text classifier stays the hand-written templates'.

Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119; on CLIP as a baseline of
  DPT  Xing et al., Dual Modality Prompt Tuning, IEEE TMM 2023, arXiv:2208.08340, Section III-B
  UPT  Zang et al., Unified Vision and Language Prompt Learning, arXiv:2210.07225, Section 2.1

    [s_l, _, E_l] = Block_l([s_{l-1}, P_{l-1}, E_{l-1}])      l = 1 .. L, deep: fresh prompts       DPT Eq. 4, UPT Eq. 4
    [s_l, Z_l, E_l] = Block_l([s_{l-1}, Z_{l-1}, E_{l-1}])    shallow: Z_0 = P_0 travels on         v1 Eq. 4-5
    p(y = i | x) = softmax_i( cos(w_i, z) / tau ),  z = project(s_L)                                DPT Eq. 1

    P_l    visual_prompts[l]  (P, D), l = 0 .. L-1 (shallow: P_0 alone)    learned
    s_l    class token (B, D)      E_l  patches (B, N, D)                  blocks frozen
    w_i    zero_shot[i]  (E,), from the templates of the data set          frozen

The place of the prompts does not matter, since they have no position. Left open and chosen:
  * DPT's release inserts prompts behind CLIP's first LayerNorm, UPT's shallow ones stand in front of it: before_ln_pre.
  * DPT's text says "as CoOp" for the epochs, its files 100. The text is followed.
Official code of DPT: github.com/fanrena/DPT, trainers/vpt.py.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, N patches, P = n_visual prompts, D width of the image tower, E joint width, L layers.
"""

import torch
from torch import nn

from clip_min import Method


class VPT(Method):
    """CLIP with learned tokens in the image tower. Learns L * n_visual * D numbers: 92,160 on ViT-B by default.

    With deep, every layer has n_visual prompts of its own. Otherwise only the first layer has them, and their outputs
    travel on through the others. With before_ln_pre, the first layer's prompts go through CLIP's first LayerNorm.
    """

    # DPT, Section IV-A and its configuration files; on ImageNet its warm-up is one epoch.
    recipe = dict(
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.01, warmup_epochs=10, batch_size=32,
        crop_scale=(0.08, 1.0), epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200},
        datasets={"imagenet": dict(epochs=50, warmup_epochs=1)},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_visual=10, deep=True,
                 before_ln_pre=False):
        super().__init__(clip, classnames, templates)
        self.deep, self.before_ln_pre = deep, before_ln_pre
        layers, width = len(clip.visual.blocks) if deep else 1, len(clip.visual.class_embedding)
        prompts = self.zero_shot.new_empty(layers, n_visual, width)
        self.visual_prompts = nn.Parameter(prompts.normal_(std=0.02))

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> (B, E), not normalised."""
        visual, prompts = self.clip.visual, self.visual_prompts
        x = visual.embed(images)  # (B, 1+N, D)
        if self.before_ln_pre:  # ln_pre works token by token: normalising the prompts alone is the same
            prompts = torch.cat([visual.ln_pre(prompts[:1]), prompts[1:]])
        if self.deep:
            for block, p in zip(visual.blocks, prompts, strict=True):
                x = block(x, p)  # p (P, D) is looked at and then dropped                                      Eq. 4
        else:
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)  # (B, 1+N+P, D)
            for block in visual.blocks:
                x = block(x)  # v1 Eq. 4-5
        return visual.project(x)
