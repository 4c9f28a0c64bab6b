"""CLIP-Adapter: a small bottleneck network behind the image tower.

Gao, Geng, Zhang, Ma, Fang, Zhang, Li, Qiao: CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV
2024, arXiv:2110.04544

    A(z) = ReLU(ReLU(z W_1) W_2)                                                                              Eq. 4
    z*   = ratio A(z) + (1 - ratio) z,   logits = cos(z*, w) / tau

    W_1, W_2  adapter    (E, E/4) and (E/4, E), without biases      learned
    w         zero_shot  (K, E), from the template                  z  the image feature (B, E)

The second ReLU is the code's, github.com/gaopengcuhk/CLIP-Adapter, clip_adapter.py. The paper's rate, 1e-5, comes
without optimizer and epochs: CoOp's recipe is used.
To use it elsewhere, copy this file, coop.py (for its recipe), clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, E joint width.
"""

from torch import nn

from clip_min import Method, full_precision
from coop import CoOp


class CLIPAdapter(Method):
    """CLIP with an adapted image feature. Learns 2 * E * E/4 numbers: 131,072 on ViT-B."""

    recipe = CoOp.recipe

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, ratio=0.2):
        super().__init__(clip, classnames, templates)
        self.ratio, joint = ratio, self.zero_shot.shape[1]
        down, up = nn.Linear(joint, joint // 4, bias=False), nn.Linear(joint // 4, joint, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU()).to(self.zero_shot.device)

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> z* (B, E), not normalised."""
        z = self.clip.encode_image(images).float()
        with full_precision(images.device):  # learned tensors are fp32
            return self.ratio * self.adapter(z) + (1 - self.ratio) * z  # Eq. 4
