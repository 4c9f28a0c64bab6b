"""FG-VPL: a visual prompt and a branch for the object in the picture, recognised by text and by the few-shot pictures.

Sun, He, Zhou, Peng: Fine-Grained Visual Prompt Learning of Vision-Language Models for Image Recognition, ACM MM 2023,
doi 10.1145/3581783.3612403. Its repository, github.com/PKU-ICST-MIPL/FG-VPL, holds no code. Also Tip-Adapter and
Tip-Adapter-F (Zhang et al., ECCV 2022, arXiv:2207.09519), which are the second path alone beside zero-shot CLIP.

    z_0  = [x_cls, patches, x_FP],  z_l = Block_l(z_{l-1}),  l = 1 .. L-1                             Eq. 2-4
    Att  = Att^{L-1} ... Att^1 per head;  AM = sum over heads of its class-token row, patches only    Eq. 5-7
    O    = the largest connected region of the patches whose AM is above Otsu's threshold
    f    = class token of Block_L(z_{L-1});  f_O = class token of Phi_O(z_{L-1}[x_cls, O, x_FP])      Eq. 8-9
    w_new = w + alpha p(w);  path 1:  f w_new^T,  f_O w_new^T                                         Eq. 10-12
    u_new = u + q(u)  for u = f, f_O and for F, F_O, the same of the few-shot pictures                Eq. 13-16
    path 2:  phi(f_new F_new^T) L,  phi(f_O,new F_O,new^T) L,  phi(s) = exp(-(1-s))                   Eq. 17-18
    logits = (path 1 + lambda path 2 of f) + beta (the same of f_O), cross-entropy                    Eq. 19

    x_FP     x_fp       (D,)          learned, zeros at first, goes through ln_pre as the other tokens do
    Phi_O    layer      Block         learned, a copy of CLIP's last block
    p, q     p, q       Linear(E, E)  learned, with LeakyReLU(0.2)
    w        zero_shot  (K, E)        unit rows, from the templates: on ImageNet Tip-Adapter's seven
    F, F_O   keys       (2, n, E)     the cache, not learned;  L  labels  (n,), one-hot in the paper
    lambda   lam        1, alpha 0.05, beta 0.5      AM, O  (B, N)      f, f_O  (B, E)      z_l  hidden states

Two things are printed and not followed, since CLIP's weights need their own form: a LayerNorm behind each sum (Eq. 3-4)
and attention divided by the root of the number of heads (Eq. 5). Eq. 4 prints z_k where it means the z'_k of Eq. 3.
Left open, and here chosen:
  * Path 1 is exp(logit_scale) times a cosine, but w_new is not made unit again. phi takes the cosine of adapted
    features. p(u) and q(u) are made unit before they are added to the unit u. One p and one q serve f and f_O.
  * Att^{L-1} stands on the left. No identity is added, no row is renormalised. No gradient flows through O.
  * Otsu's threshold has 256 levels. Patches connect over edges and corners. Of equally large regions that with the
    highest attention counts. In a map without contrast, with NaN or inf, all patches are the object.
  * The cache comes from CLIP without x_FP: the mean over augmented views, made unit. F_O projects the mean of O behind
    Block_L, where f_O is a class token: as printed. In training a picture meets itself in the cache.
  * AdamW's eps and weight decay are Tip-Adapter's. Crops show half of a picture or more, the cosine runs over all
    steps, no batch is dropped. The last epoch counts; Tip-Adapter-F's published numbers are its best test epoch's.
  * lambda is 1, Tip-Adapter's constants are those of its configurations. `search` chooses them by Tip-Adapter's grid on
    the validation shots, never on test pictures, which its code uses on ImageNet. Without such shots they stay.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, N patches, n cached pictures, H heads, L layers (in Eq. 17-18 labels), D tower, E joint width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import SEVEN, Block, LastBlock, Method, UserError, full_precision

# Tip-Adapter's configurations: its alpha, here lam, and the ends of its search for that and its beta, here sharpness.
TIP = {name: dict(options=dict(lam=lam, max_lam=max_lam, max_sharpness=max_sharpness))
       for name, lam, max_lam, max_sharpness in (
           ("imagenet", 1.17, 3.0, 7.0), ("caltech101", 3.0, 5.0, 12.0), ("dtd", 2.0, 13.0, 13.0),
           ("eurosat", 2.0, 10.0, 12.0), ("fgvc_aircraft", 5.0, 30.0, 30.0), ("food101", 1.17, 10.0, 10.0),
           ("oxford_flowers", 10.0, 50.0, 50.0), ("oxford_pets", 1.17, 3.0, 7.0), ("stanford_cars", 3.0, 10.0, 20.0),
           ("sun397", 1.17, 10.0, 12.0), ("ucf101", 3.0, 3.0, 7.0))}
TIP["imagenet"]["templates"] = SEVEN


class FGVPL(Method):
    """FG-VPL, its parts, and Tip-Adapter. Learns 7,613,952 numbers on ViT-B by default.

    `parts` is what is built:
      "fvp+tar"  FG-VPL, all of the above
      "fvp"      prompt and object branch with the templates' classifier: no adapters, no cache
      "tar"      both paths on CLIP's own image feature                                 (525,312)
      "tip"      Tip-Adapter: no adapters, nothing learned; lam is its alpha, sharpness its beta
      "tip-f"    Tip-Adapter-F: the same with learned keys                              (n * E)
    `alpha`, `beta` and `lam` stand in Eq. 10 and 19, and phi(s) = exp(-sharpness (1-s)). `search` chooses lam, and
    Tip-Adapter's sharpness, below `max_lam` and `max_sharpness`. With `region="bbox"` the object is the box around the
    region. `new_layer="light"` is a random Phi_O of one head, its MLP one linear layer and the activation, as in the
    authors' later code (3,482,112). With `share_adapters=False` f and f_O have a p and a q each, as there. The cache is
    the mean of `cache_views` augmented views of each picture. prepare() builds it; before that it is empty.
    """

    # FG-VPL, Section 4.2. Tip-Adapter-F: its own epochs, the rest is the same.
    recipe = dict(
        optimizer="adamw", eps=1e-4, weight_decay=0.01, lr=0.001, cosine="steps", warmup_epochs=0, batch_size=256,
        drop_last=False, crop_scale=(0.5, 1.0), epochs=100,
        datasets={"imagenet": dict(epochs=50, templates=SEVEN), "eurosat": dict(epochs=400)},
        variants={"parts=tip": dict(epochs=0, datasets=TIP),
                  "parts=tip-f": dict(epochs=20, datasets=TIP | {"eurosat": TIP["eurosat"] | dict(epochs=100)})},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, parts="fvp+tar", alpha=0.05, beta=0.5,
                 lam=1.0, sharpness=1.0, search=False, max_lam=3.0, max_sharpness=7.0, region="component",
                 new_layer="copy", share_adapters=True, cache_views=10):
        super().__init__(clip, classnames, templates)
        if parts not in ("fvp+tar", "fvp", "tar", "tip", "tip-f"):
            raise UserError(f"parts is {parts}: choose fvp+tar, fvp, tar, tip or tip-f.")
        if region not in ("component", "bbox") or new_layer not in ("copy", "light"):
            raise UserError(f"region is {region} and new_layer {new_layer}: choose component or bbox, copy or light.")
        if cache_views < 1:
            raise UserError(f"cache_views is {cache_views}: choose 1 or more.")
        self.alpha, self.beta = alpha, beta
        self.search, self.max_lam, self.max_sharpness = search, max_lam, max_sharpness
        self.lam = nn.Buffer(self.zero_shot.new_tensor(lam), persistent=search)  # what was found is saved
        self.sharpness = nn.Buffer(self.zero_shot.new_tensor(sharpness), persistent=search)
        self.parts, self.region, self.cache_views = parts, region, cache_views
        self.has_object, self.has_adapters, self.has_cache = "fvp" in parts, "tar" in parts, parts != "fvp"
        visual, joint, device = clip.visual, self.zero_shot.shape[1], self.zero_shot.device
        if self.has_object:
            width = len(visual.class_embedding)
            self.x_fp = nn.Parameter(torch.zeros(width, device=device))
            self.layer = LastBlock(width, visual.blocks[-1].attn.heads, clip.activation).to(device)
            if new_layer == "copy":
                self.layer.load_state_dict(visual.blocks[-1].state_dict())
            else:  # PyTorch's initialisation of attention
                self.layer.attn.heads = 1
                self.layer.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, width), "c_proj": nn.Identity()}).to(device)
                nn.init.xavier_uniform_(self.layer.attn.in_proj_weight)
                nn.init.zeros_(self.layer.attn.in_proj_bias)
                nn.init.zeros_(self.layer.attn.out_proj.bias)
        if self.has_adapters:  # the first serves f, the last serves f_O
            number = 2 if self.has_object and not share_adapters else 1
            self.p = nn.ModuleList(nn.Linear(joint, joint) for _ in range(number)).to(device)
            self.q = nn.ModuleList(nn.Linear(joint, joint) for _ in range(number)).to(device)
        empty = self.zero_shot.new_zeros(1 + self.has_object, 0, joint)
        self.set_cache(empty, torch.zeros(0, dtype=torch.long, device=device))

    def embed(self, images):
        """-> z_0 (B, 1+N+1, D) with the prompt behind the patches, or without object branch (B, 1+N, D)."""
        visual = self.clip.visual
        z = visual.embed(images)
        if not self.has_object:
            return z
        return torch.cat([z, visual.ln_pre(self.x_fp).expand(len(z), 1, -1)], dim=1)  # Eq. 2; ln_pre works per token

    def run_blocks(self, z):
        """z_0 -> z_{L-1} and AM (B, N)."""
        inputs = []  # fused attention shows no weights: the rollout computes them again from what autograd keeps anyway
        for block in self.clip.visual.blocks[:-1]:
            inputs.append(z)
            z = block(z)
        return z, self.rollout(inputs)

    @torch.no_grad()
    def rollout(self, inputs):
        """z_0 .. z_{L-2}, each (B, 1+N or 1+N+1, D) -> AM (B, N), by the class token's row of the product alone."""
        blocks, z = self.clip.visual.blocks[:-1], inputs[0]
        n = len(self.clip.visual.positional_embedding)  # class token and patches
        row = z.new_zeros(len(z), blocks[0].attn.heads, 1, z.shape[1], dtype=torch.float32)
        row[..., 0] = 1  # the class token's row of the identity, times Att^{L-1}, ..., times Att^1
        for block, x in zip(reversed(blocks), reversed(inputs), strict=True):
            weights = block.attention_weights(x)  # (B, H, n or n+1, n or n+1)                                Eq. 5
            with full_precision(x.device):
                row = row @ weights.float()  # (B, H, 1, n or n+1)                                            Eq. 6
        return row[:, :, 0, 1:n].sum(dim=1)  # Eq. 7

    def encode_image_and_object(self, images):
        """images (B, 3, R, R) -> f (B, E) and, with the object branch, f_O (B, E)."""
        visual = self.clip.visual
        if not self.has_object:
            return (self.clip.encode_image(images),)
        z, am = self.run_blocks(self.embed(images))
        seen = F.pad(object_patches(am, self.region), (1, 1), value=True)  # (B, 1+N+1): x_cls, O, x_FP
        f = visual.project(visual.blocks[-1](z))  # Eq. 8
        f_o = visual.project(self.layer(z, mask=seen))  # Eq. 9: a token that nobody looks at is as good as left out
        return f, f_o

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> f (B, E)."""
        return self.encode_image_and_object(images)[0]

    def set_cache(self, keys, labels):
        """keys (1 or 2, n, E): F and, with the object branch, F_O, unit rows; labels (n,)."""
        self.keys = nn.Parameter(keys) if self.parts == "tip-f" else nn.Buffer(keys, persistent=self.has_cache)
        self.labels = nn.Buffer(labels, persistent=self.has_cache)

    @torch.no_grad()
    def prepare(self, batches, val=()):
        """Build the cache: walk through batches of (images, labels) cache_views times, see Method."""
        if not self.has_cache:
            return
        total = 0
        for _ in range(self.cache_views):
            features, labels = [], []
            for images, of_images in batches:
                features.append(self.cache_features(images))
                labels.append(of_images)
            total = total + torch.cat(features, dim=1).float()  # (1 or 2, n, E)
        self.set_cache(F.normalize(total, dim=-1), torch.cat(labels))

    def cache_features(self, images):
        """-> F and, with the object branch, F_O (1 or 2, B, E), from CLIP without the prompt; not normalised."""
        visual = self.clip.visual
        if not self.has_object:
            return self.clip.encode_image(images).unsqueeze(0)
        z, am = self.run_blocks(visual.embed(images))
        z = Block.forward(visual.blocks[-1], z)  # (B, 1+N, D): all tokens, not the class token alone
        seen = object_patches(am, self.region).unsqueeze(-1)  # (B, N, 1)
        patches = (z[:, 1:] * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)  # (B, 1, D)
        return torch.stack([visual.project(z), visual.project(patches)])

    def load_learned(self, tensors):
        """See Method. The cache takes the size of the one that is loaded."""
        if self.has_cache and "labels" in tensors:
            n = tensors["labels"].numel()
            self.set_cache(self.keys.new_zeros(len(self.keys), n, self.keys.shape[2]), self.labels.new_zeros(n))
        super().load_learned(tensors)

    def for_classes(self, classnames, columns=None):
        """See Method. The cache holds pictures of the training classes: `columns` tells which of them to keep."""
        if self.has_cache and columns is None:
            raise UserError("A cache of few-shot pictures belongs to the classes that it was built for: train with "
                            "parts=fvp, which has none, to use other class names.")
        other = super().for_classes(classnames)
        if self.has_cache:
            same = self.labels.unsqueeze(1) == torch.tensor(columns, device=self.labels.device)  # (n, K)
            kept = same.any(dim=1)
            other.set_cache(self.keys.detach()[:, kept], same[kept].long().argmax(dim=1))
        return other

    # ---- Two-pathway recognition. `side`, an index of p, q and keys: 0 for f, -1, the last, for f_O ----

    def encode_text(self, side=0):
        """-> w_new (K, E); without adapters the zero-shot classifier."""
        if not self.has_adapters:
            return self.zero_shot
        with full_precision(self.zero_shot.device):
            return self.zero_shot + self.alpha * adapt(self.p[side], self.zero_shot)  # Eq. 10

    def compare(self, f, side, text):
        """f or f_O (B, E), w_new (K, E) -> path 1 (B, K), and the cosines of path 2 with the cache (B, n)."""
        f, keys = F.normalize(f.float(), dim=-1), self.keys[side]  # (B, E), (n, E)
        path_1 = self.clip.logit_scale.exp() * f @ text.T  # Eq. 11-12
        if self.has_adapters:
            f, keys = (F.normalize(u + adapt(self.q[side], u), dim=-1) for u in (f, keys))  # Eq. 13-16
        return path_1, f @ keys.T

    def pathways(self, images, text=None):
        """-> what compare() gives for f and, with the object branch, for f_O. Shapes as in forward()."""
        text = self.encode_text() if text is None else text
        features = self.encode_image_and_object(images)
        with full_precision(images.device):  # the adapters too: in half precision they lose their small steps
            pathways = [self.compare(features[0], 0, text)]
            if self.has_object:
                if self.has_adapters and len(self.p) == 2:  # the object's text has a p of its own
                    text = self.encode_text(-1)
                pathways.append(self.compare(features[1], -1, text))
        return pathways

    def combine(self, pathways, lam, sharpness):
        """pathways() and two constants -> logits (B, K), or (A, B, K) for lam (A, 1, 1)."""
        logits = []
        for path_1, cosines in pathways:
            affinity = torch.exp(sharpness * (cosines - 1))  # (B, n), phi
            path_2 = torch.zeros_like(path_1).index_add(1, self.labels, affinity)  # Eq. 17-18: @ L
            logits.append(path_1 + lam * path_2)
        return logits[0] + self.beta * logits[1] if self.has_object else logits[0]  # Eq. 19

    def forward(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> logits (B, K)."""
        return self.combine(self.pathways(images, text), self.lam, self.sharpness)

    @torch.no_grad()
    def finish(self, val=()):
        """With `search`: choose lam and sharpness, those with most of val recognised, of equals the smallest."""
        if not (self.search and self.has_cache and len(val)):
            return
        lams, right = search_values(self.max_lam, 20).to(self.lam.device), 0
        # FG-VPL, which has adapters, has no constant but lambda.
        sharpnesses = self.sharpness.view(1) if self.has_adapters else search_values(self.max_sharpness, 200)
        for images, labels in val:
            pathways = self.pathways(images)
            predicted = torch.stack([self.combine(pathways, lams.view(-1, 1, 1), sharpness).argmax(dim=-1)
                                     for sharpness in sharpnesses.tolist()])  # (200 or 1, 20, B)
            right = right + (predicted == labels).sum(dim=-1)
        best_sharpness, best_lam = divmod(right.argmax().item(), len(lams))
        self.sharpness.fill_(sharpnesses[best_sharpness].item())
        self.lam.fill_(lams[best_lam])

    @torch.no_grad()
    def attention(self, images):
        """See Method. -> AM, what is above Otsu's threshold, and the object O, by title, each (B, N)."""
        am = self.run_blocks(self.embed(images))[1]
        return {"attention": am, "above Otsu's threshold": above_otsu(am), "object": object_patches(am, self.region)}


def adapt(adapter, u):
    """p and q: unit rows (..., E) -> what is added to them, made unit."""
    return F.normalize(F.leaky_relu(adapter(u), 0.2), dim=-1)


def search_values(end, steps):
    """-> (steps,), evenly spaced from 0.1 on, without the end, as in Tip-Adapter's code."""
    return 0.1 + (end - 0.1) / steps * torch.arange(steps)


# ---- The object: maps and masks (B, N) of a square grid, for a whole batch at once, on any device ----


@torch.no_grad()
def object_patches(am, region="component"):
    """Attention maps -> the patches of the object, never none."""
    mask = largest_component(above_otsu(am), am)
    mask = bounding_box(mask) if region == "bbox" else mask
    return mask | ~mask.any(dim=1, keepdim=True)


def above_otsu(am):
    """-> True above Otsu's threshold, of 256 levels. Nowhere in a map that is constant or not finite."""
    low, high = am.amin(dim=1, keepdim=True), am.amax(dim=1, keepdim=True)
    levels = (255 * ((am - low) / (high - low)).nan_to_num(0)).long()
    count = levels.new_zeros(len(am), 256).scatter_add(1, levels, torch.ones_like(levels))
    below, n = count.cumsum(dim=1), am.shape[1]  # patches up to each level
    total = (count * torch.arange(256, device=am.device)).cumsum(dim=1)  # the sum of their levels
    # The variance between the sides, times n^2, is gap^2 / (below * above). Rounding would make one of two equally good
    # levels the better one, on each processor another: so whole parts are compared first, and then the remainders.
    gap, sides = total[:, -1:] * below - n * total, (below * (n - below)).clamp(min=1)
    whole, rest = gap.square() // sides, gap.square() % sides / sides
    best = whole == whole.amax(dim=1, keepdim=True)
    return levels > torch.where(best, rest, -1).argmax(dim=1, keepdim=True)  # of equally good ones the lowest


def largest_component(mask, am):
    """-> the mask's largest region, connected over edges and corners. Of equals the highest attention decides."""
    n = mask.shape[1]
    place = torch.arange(n, device=mask.device)
    y, x = place // math.isqrt(n), place % math.isqrt(n)
    near = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)  # (N, N)
    reach = near & mask[:, :, None] & mask[:, None, :]  # (B, N, N): patches one step apart
    for _ in range(math.ceil(math.log2(n))):  # the square takes twice as many steps, in the end n or more
        reach = (reach.float() @ reach.float()) > 0
    size = reach.sum(dim=2)
    peak = am.unsqueeze(1).masked_fill(~reach, -math.inf).amax(dim=2)  # of the region that the patch lies in
    best = peak.masked_fill(size < size.amax(dim=1, keepdim=True), -math.inf).argmax(dim=1)
    return reach[torch.arange(len(reach), device=mask.device), best]


def bounding_box(mask):
    """-> the box of rows and columns around the mask."""
    side = math.isqrt(mask.shape[1])
    grid = mask.unflatten(1, (side, side))
    return (fill_gaps(grid.any(dim=2)).unsqueeze(2) & fill_gaps(grid.any(dim=1)).unsqueeze(1)).flatten(1)


def fill_gaps(mask):
    """Masks (B, n) -> True from the first True of each row to its last."""
    return (mask.cumsum(dim=1) > 0) & (mask.flip(1).cumsum(dim=1).flip(1) > 0)
