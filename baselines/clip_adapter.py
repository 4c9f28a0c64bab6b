"""x"""

from torch import nn

from baselines.context_prompt import COOP
from clip_min import Method, full_precision


class CLIPAdapter(Method):
    """A small bottleneck network behind the image tower. Learns 2 * E * E/4 numbers: 131,072 on ViT-B.

        A(f) = ReLU(ReLU(f W_1) W_2)                                                                          Eq. 4
        f*   = ratio A(f) + (1 - ratio) f,   logits = cos(f*, w) / tau

        W_1, W_2  adapter, (E, E/4) and (E/4, E), without biases, learned      w  zero_shot  (K, E), from the template

    The second ReLU is the code's. The paper's rate, 1e-5, comes without optimizer and epochs: CoOp's recipe is used.
    """

    recipe = COOP

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, ratio=0.2):
        super().__init__(clip, classnames, templates)
        self.ratio, joint = ratio, self.zero_shot.shape[1]
        down, up = nn.Linear(joint, joint // 4, bias=False), nn.Linear(joint // 4, joint, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU()).to(self.zero_shot.device)

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> f* (B, E), not normalised."""
        f = self.clip.encode_image(images).float()
        with full_precision(images.device):  # learned tensors are fp32
            return self.ratio * self.adapter(f) + (1 - self.ratio) * f  # Eq. 4
