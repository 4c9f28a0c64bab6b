"""The linear probe: logistic regression on CLIP's image features, without any text.

Radford et al., the paper of CLIP, arXiv:2103.00020, Appendix A.3, with few shots as in CoOp's Section 4

    minimise  C sum_j CE(W z_j + b, y_j) + |W|^2 / 2        over the few-shot pictures j, plain, not augmented

    W, b  weight (K, E), bias (K,), fitted by prepare()      z_j  the image feature, not made unit      C  strength

C is chosen on the validation pictures: the best of 1e6, 1e4, .. 1e-6, then eight steps of binary search around it.
Where there are none, C is 1. L-BFGS runs in fp64 until it has converged, where the code stops earlier.
Code: github.com/KaiyangZhou/CoOp, lpclip/linear_probe.py
To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, n few-shot pictures, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import Method, UserError, full_precision


class LinearProbe(Method):
    """Logistic regression in the place of the text classifier. Fits K * (E + 1) numbers, 24,111 for 47 classes."""

    recipe = dict(epochs=0, batch_size=100, drop_last=False, crop_scale=None)  # None: resized and centre-cropped alone

    def __init__(self, clip, classnames, templates=("a photo of a {}.",)):
        super().__init__(clip, classnames, templates)
        self.weight = nn.Buffer(torch.zeros_like(self.zero_shot))
        self.bias = nn.Buffer(self.zero_shot.new_zeros(len(self.classnames)))
        self.strength = nn.Buffer(self.zero_shot.new_ones(()))

    def prepare(self, batches, val=()):
        """Fit W and b. batches, val: plain (images, labels) of the few-shot and of the validation pictures."""
        z, labels = self.features(batches)
        strength = choose_strength(z, labels, *self.features(val), len(self.bias)) if len(val) else 1.0
        self.strength.fill_(strength)
        self.weight, self.bias = (nn.Buffer(x.float()) for x in fit(z, labels, strength, len(self.bias)))

    def features(self, batches):
        """-> z (n, E) in fp64, labels (n,)."""
        z, labels = zip(*((self.clip.encode_image(images), labels) for images, labels in batches), strict=True)
        return torch.cat(z).double(), torch.cat(labels)

    def forward(self, images, text=None):
        """images (B, 3, R, R) -> logits (B, K). `text` is not used."""
        z = self.clip.encode_image(images).float()
        with full_precision(images.device):
            return z @ self.weight.T + self.bias

    def for_classes(self, classnames, columns=None):
        """See Method. Every row of W belongs to a training class: `columns` tells which of them to keep."""
        if columns is None:
            raise UserError("A linear probe knows no class names, only the classes that it was trained for.")
        other = super().for_classes(classnames)
        other.weight, other.bias = nn.Buffer(self.weight[columns]), nn.Buffer(self.bias[columns])
        return other


def fit(z, labels, strength, n_classes):
    """f (n, E) in fp64, labels (n,), C -> W (K, E), b (K,)."""
    mean = z.mean(dim=0)
    z = z - mean  # moves b alone, at the end back again, and takes a hundredth of the steps
    weight, bias = z.new_zeros(n_classes, z.shape[1], requires_grad=True), z.new_zeros(n_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-18,
                               line_search_fn="strong_wolfe")

    def objective():  # divided by C n, which does not move the minimum
        solver.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, labels) + weight.square().sum() / (2 * strength * len(z))
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), (bias - weight @ mean).detach()


def choose_strength(z, labels, val_z, val_labels, n_classes):
    """-> C, by the accuracy on the validation pictures."""
    def accuracy(exponent):
        weight, bias = fit(z, labels, 10.0**exponent, n_classes)
        return ((val_z @ weight.T + bias).argmax(dim=1) == val_labels).double().mean().item()

    best = max((6, 4, 2, 0, -2, -4, -6), key=accuracy)
    low, high = best - 1, best + 1
    for _ in range(8):
        middle = (low + high) / 2
        if accuracy(low) < accuracy(high):
            best, low = high, middle
        else:
            best, high = low, middle
    return 10.0**best
