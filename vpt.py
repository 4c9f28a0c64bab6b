"""VPT: learn tokens beside the image patches. The text classifier stays the hand-written templates'.

Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119; on CLIP as a baseline of
  DPT  Xing et al., Dual Modality Prompt Tuning, IEEE TMM 2023, arXiv:2208.08340, Section III-B
  UPT  Zang et al., Unified Vision and Language Prompt Learning, arXiv:2210.07225, Section 2.1

    [s_l, _, E_l] = Block_l([s_{l-1}, P_{l-1}, E_{l-1}])      l = 1 .. L, deep: fresh prompts       DPT Eq. 4, UPT Eq. 4
    [s_l, Z_l, E_l] = Block_l([s_{l-1}, Z_{l-1}, E_{l-1}])    shallow: Z_0 = P_0 travels on         v1 Eq. 4-5
    p(y = i | x) = softmax_i( cos(w_i, z) / tau ),  z = project(s_L)                                DPT Eq. 1

    P_l    prompts[l]  (P, D), l = 0 .. L-1 (shallow: P_0 alone)        learned, N(0, 0.02^2)
    s_l    class token (B, D)      E_l  patches (B, N, D)               frozen blocks
    w_i    clip.classifier(classnames, templates)[i]  (E,)              frozen; the templates of the dataset

Where the prompts stand does not matter, since they have no position: they are appended. Left open and chosen: DPT's
release inserts behind ln_pre, UPT's shallow prompts stand before it (before_ln_pre=true). DPT's text says "as CoOp"
for the epochs, its files 100: the text is followed.

UPT's baselines (Table 2, rows 2 and 3):
    train.py --method vpt --lr 0.002 --warmup-epochs 1 --set n_ctx=4 deep=false before_ln_pre=true
    train.py --method vpt --lr 0.002 --warmup-epochs 1 --set n_ctx=4

Copy this file and clip_min.py anywhere. B images, N patches, P = n_ctx prompts, D width of the image tower, L layers.
"""

import torch
import torch.nn.functional as F
from torch import nn


class VPT(nn.Module):
    """n_ctx prompts for every layer (deep) or for the first alone, there before ln_pre if before_ln_pre.

    Learns L * n_ctx * D numbers, 92,160 on ViT-B with 10 deep prompts; shallow n_ctx * D.
    """

    # DPT, Section IV-A and its configuration files; on ImageNet its warm-up is one epoch.
    recipe = dict(
        optimizer="sgd", lr=0.01, warmup_epochs=10, batch_size=32, crop_scale=(0.08, 1.0),
        epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": {"epochs": 50, "warmup_epochs": 1}},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=10, deep=True, before_ln_pre=False):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.before_ln_pre = before_ln_pre
        self.prompts = [templates[0].format(name.replace("_", " ")) for name in classnames]
        self.register_buffer("text", clip.classifier(classnames, templates), persistent=False)
        layers, width = len(clip.visual.blocks) if deep else 1, len(clip.visual.class_embedding)
        self.visual_prompts = nn.Parameter(self.text.new_empty(layers, n_ctx, width).normal_(std=0.02))

    def encode_text(self):
        """-> (K, E), unit rows: the zero-shot classifier, the same at any time."""
        return self.text

    def encode_image(self, images):
        """(B, 3, R, R) -> (B, E), not normalised."""
        visual, prompts = self.clip.visual, self.visual_prompts
        x = visual.embed(images)  # (B, 1+N, D)
        n = x.shape[1]
        if self.before_ln_pre:  # of the first layer; ln_pre works token by token, so normalising them alone is the same
            prompts = torch.cat([visual.ln_pre(prompts[:1]), prompts[1:]])
        for layer, block in enumerate(visual.blocks):
            if layer < len(prompts):  # deep: the outputs of the last prompts make room                     Eq. 4
                x = torch.cat([x[:, :n], prompts[layer].expand(len(x), -1, -1)], dim=1)  # (B, 1+N+P, D)
            x = block(x)
        return visual.project(x)

    def features(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None -> image features (B, E), text features (K, E)."""
        return self.encode_image(images), self.text if text is None else text

    def forward(self, images, text=None):
        """-> logits (B, K)."""
        return self.clip.logits(*self.features(images, text))  # Eq. 1

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar cross-entropy."""
        return F.cross_entropy(self(images), labels)
