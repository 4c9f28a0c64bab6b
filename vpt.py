"""VPT: learn tokens beside the image patches. The text classifier stays the hand-written templates'.

Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119. On CLIP it is a baseline of
  DPT  Xing et al., Dual Modality Prompt Tuning, IEEE TMM 2023, arXiv:2208.08340, Section III-B
  v1   the first version of that arXiv paper, Class-Aware Visual Prompt Tuning
  UPT  Zang et al., Unified Vision and Language Prompt Learning, arXiv:2210.07225, Section 2.1

    deep      [s_l, _, E_l] = Block_l([s_{l-1}, P_{l-1}, E_{l-1}]),  l = 1 .. L         DPT Eq. 4, v1 Eq. 6, UPT Eq. 4
    shallow   [s_1, Z_1, E_1] = Block_1([s_0, P_0, E_0])                                v1 Eq. 4
              [s_l, Z_l, E_l] = Block_l([s_{l-1}, Z_{l-1}, E_{l-1}]),  l = 2 .. L       v1 Eq. 5
    p(y = i | x) = softmax_i( cos(w_i, z) / tau ),  z = project(s_L)                    DPT Eq. 1, UPT Eq. 1

    P_l    visual_prompts[l]  (P, D), l = 0 .. L-1; shallow: P_0 alone                  learned
    s_l    class token  (B, D)      E_l  patches  (B, N, D)      Z_l  what the block makes of the prompts  (B, P, D)
    w_i    zero_shot[i]  (E,), from the templates of the data set                       frozen
    Block  clip.visual.blocks       1 / tau  clip.logit_scale.exp()                     frozen

Where the prompts stand among the tokens does not matter, since they have no positional embedding. Left open and chosen:
  * DPT's release inserts the prompts behind CLIP's first LayerNorm. UPT's author inserts shallow prompts in front of
    it; before_ln_pre does the same.
  * For the number of epochs DPT's text says "the same as CoOp", its configuration files 100. The text is followed.
Official code of DPT: github.com/fanrena/DPT, trainers/VPT.py.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, N patches, P = n_visual prompts, D width of the image tower, E joint width (in equations the papers'
patches), L layers.
"""

import torch
from torch import nn

from clip_min import Method, UserError


class VPT(Method):
    """CLIP with learned tokens in the image tower. Learns L * n_visual * D numbers: 92,160 on ViT-B by default.

    With deep, every layer has n_visual prompts of its own. Otherwise only the first layer has them, and their outputs
    travel on through the others. With before_ln_pre, the first layer's prompts go through CLIP's first LayerNorm.
    """

    # DPT, Section IV-A and its configuration files. On ImageNet it shortens the warm-up of VLP and DPT alone.
    recipe = dict(
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.01, warmup_epochs=10, batch_size=32,
        crop_scale=(0.08, 1.0), epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200},
        datasets={"imagenet": dict(epochs=50)},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_visual=10, deep=True,
                 before_ln_pre=False):
        if n_visual < 0:
            raise UserError(f"n_visual is {n_visual}: it must be 0 or more.")
        super().__init__(clip, classnames, templates)
        self.deep, self.before_ln_pre = deep, before_ln_pre
        layers, width = len(clip.visual.blocks) if deep else 1, len(clip.visual.class_embedding)
        prompts = self.zero_shot.new_empty(layers, n_visual, width)
        self.visual_prompts = nn.Parameter(prompts.normal_(std=0.02))

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> z (B, E), not normalised."""
        visual, prompts = self.clip.visual, self.visual_prompts
        x = visual.embed(images)  # (B, 1+N, D)
        if self.before_ln_pre:  # ln_pre works token by token: normalising the prompts alone is the same
            prompts = torch.cat([visual.ln_pre(prompts[:1]), prompts[1:]])
        if self.deep:
            for block, p in zip(visual.blocks, prompts, strict=True):
                x = block(x, p)  # p (P, D) is looked at and then dropped                                  DPT Eq. 4
        else:
            x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)  # (B, 1+N+P, D)
            for block in visual.blocks:
                x = block(x)  # v1 Eq. 4-5
        return visual.project(x)
