"""FG-VPL: a visual prompt and a branch for the object in the picture, recognised by text and by the few-shot pictures.

Sun, He, Zhou, Peng: Fine-Grained Visual Prompt Learning of Vision-Language Models for Image Recognition, ACM MM 2023,
doi 10.1145/3581783.3612403. Its repository, github.com/PKU-ICST-MIPL/FG-VPL, holds no code. Also Tip-Adapter and
Tip-Adapter-F (Zhang et al., ECCV 2022, arXiv:2207.09519), two limits of the same second pathway.

    z_0  = [x_cls, patches, x_FP],  z_l = Block_l(z_{l-1}),  l = 1 .. L-1                             Eq. 2-4
    Att  = Att^{L-1} ... Att^1 per head;  AM = sum over heads of its class-token row, patches only    Eq. 5-7
    O    = the largest connected region of AM above Otsu's threshold
    f    = class token of Block_L(z_{L-1});  f_O = class token of Phi_O(z_{L-1}[x_cls, O, x_FP])      Eq. 8-9
    w_new = w + alpha p(w)                                                                            Eq. 10
    path 1:  f w_new^T,  f_O w_new^T                                                                  Eq. 11-12
    u_new = u + q(u)  for  F, F_O (few-shot pictures), f, f_O                                         Eq. 13-16
    path 2:  phi(f_new F_new^T) L,  phi(f_O,new F_O,new^T) L,  phi(s) = exp(-(1-s))                   Eq. 17-18
    logits = (path 1 + lambda path 2 of f) + beta (the same of f_O), cross-entropy                    Eq. 19

    x_FP      x_fp          (D,)           learned, zeros at first, through ln_pre as the other tokens
    Phi_O     layer         Block          learned, a copy of CLIP's last
    p, q      p, q          Linear(E, E)   learned, with LeakyReLU(0.2)
    W         w0            (K, E)         unit rows, from the templates: on ImageNet Tip-Adapter's seven
    F, F_O    keys          (2, n, E)      the cache of n few-shot pictures, not learned;  L  labels  (n,)
    lambda    lam           1;  alpha 0.05;  beta 0.5

The paper prints the equations above, alpha, beta, lambda, AdamW at 1e-3 with a cosine, batch 256, the epochs. Printed,
but not followed: layers are post-norm (Eq. 3-4; CLIP's weights need pre-norm), attention is divided by the root of the
number of heads (Eq. 5; CLIP's own root of the head's width). It leaves open, and here is chosen:
  * Scales. Eq. 1 has cos / tau, Eq. 11-19 neither: path 1 is exp(logit_scale) times a cosine, 100 with OpenAI's CLIP,
    with f unit and w_new not made unit again; phi gets the cosine of adapted features and its result no factor but
    lambda. p(u) and q(u) are made unit before they are added to the unit u.
  * Att^{L-1} stands on the left: row i of the product tells how the patches reach token i. No identity is added, no
    row is renormalised. No gradient flows through O.
  * Otsu: on 256 levels between the map's extremes. Connected: also over corners; of regions equally large that with
    the highest attention counts. A map without contrast, NaN or inf: all patches. region="bbox": the box around the
    same region (the authors' later code boxes the contour of the largest area, which differs for rings).
  * Phi_O: CLIP's block by default (new_layer="copy"), so that training begins with CLIP's answer; "light" is the size
    of what the authors' later code defines: one head, one linear layer as MLP, random. CLIP's ln_post and projection
    serve f_O too.
  * The cache comes from CLIP without x_FP: means over cache_views augmented views, made unit. F_O averages the object's
    patches behind Block_L and projects the average as a class token; f_O, its query, is a class token: as printed.
  * One p and one q for both streams, as the symbols say; share_adapters=False is the later code's two of each.
  * A training picture meets itself in the cache, as "the so-called test image is from the training set" says;
    exclude_self=True leaves that out, in the training loss only.
  * AdamW's eps 1e-4 and weight decay 0.01 (Tip-Adapter's code), crops from half of the picture, the cosine over all
    steps, no dropped batch. The last epoch's model is reported. Tip-Adapter-F's published numbers are its best test
    epoch's with alpha and beta chosen on the validation set, on ImageNet the test set: not comparable.

Rollout, exact and cheap: only one row of the product is needed, so a vector goes through the layers from the last to
the first, N^2 per layer and head instead of N^3. The blocks run scaled_dot_product_attention; the weights are computed
again, one layer at a time, from its input, which autograd keeps anyway (without gradients the inputs take 0.7 GB at
batch 100 on ViT-B/16). No N x N map is stored: the peak is one layer's, before and after softmax, 1 GB in fp32 at batch
256, where all eleven would take 5.3 GB.

Copy this file and clip_min.py anywhere. B images, K classes, N patches, D width of the image tower, E joint width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import Block, UserError, full_precision

SEVEN = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
         "a {} in a video game.", "art of the {}.", "a photo of the small {}.")


class FGVPL(nn.Module):
    """parts: "fvp+tar"; "fvp", prompt and object branch with the templates' classifier; "tar", both pathways on CLIP's
    own image feature; "tip" and "tip-f", Tip-Adapter and with learned keys: no adapters, lam is its alpha, its beta 1.

    Learns on ViT-B: 7,613,952 numbers (new_layer="light" 3,482,112), tar 525,312, tip-f n x E. For all but fvp call
    prepare() before the optimizer is made: it builds the cache; without it the second path adds nothing.
    """

    # FG-VPL, Section 4.2. Tip-Adapter-F: its own epochs, the rest is the same.
    recipe = dict(
        optimizer="adamw", lr=0.001, cosine="steps", warmup_epochs=0, batch_size=256, drop_last=False,
        crop_scale=(0.5, 1.0), epochs=100,
        datasets={"imagenet": dict(epochs=50, templates=SEVEN), "eurosat": dict(epochs=400)},
        variants={"parts=tip": dict(epochs=0, datasets={"imagenet": dict(templates=SEVEN)}),
                  "parts=tip-f": dict(epochs=20, datasets={"imagenet": dict(templates=SEVEN),
                                                           "eurosat": dict(epochs=100)})},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, parts="fvp+tar", alpha=0.05, beta=0.5,
                 lam=1.0, region="component", new_layer="copy", share_adapters=True, exclude_self=False,
                 cache_views=10):
        super().__init__()
        if parts not in ("fvp+tar", "fvp", "tar", "tip", "tip-f"):
            raise UserError(f"parts is {parts}: choose fvp+tar, fvp, tar, tip or tip-f.")
        if region not in ("component", "bbox") or new_layer not in ("copy", "light") or cache_views < 1:
            raise UserError(f"region is {region}, new_layer {new_layer} and cache_views {cache_views}: choose "
                            "component or bbox, copy or light, and 1 or more.")
        self.clip, self.alpha, self.beta, self.lam = clip.requires_grad_(False), alpha, beta, lam
        self.parts, self.region, self.exclude_self, self.cache_views = parts, region, exclude_self, cache_views
        self.prompts = [templates[0].format(name.replace("_", " ")) for name in classnames]  # for people to read
        self.register_buffer("w0", clip.classifier(classnames, templates), persistent=False)
        self.has_object, self.has_adapters, self.has_cache = "fvp" in parts, "tar" in parts, parts != "fvp"
        visual, joint, device = clip.visual, self.w0.shape[1], self.w0.device
        if self.has_object:
            width = len(visual.class_embedding)
            self.x_fp = nn.Parameter(torch.zeros(width, device=device))
            self.layer = Block(width, last=True).to(device)
            if new_layer == "copy":
                self.layer.load_state_dict(visual.blocks[-1].state_dict())
            else:  # one head, an MLP of one linear layer and QuickGELU, PyTorch's initialisation
                self.layer.attn.heads = 1
                self.layer.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, width), "c_proj": nn.Identity()}).to(device)
                nn.init.xavier_uniform_(self.layer.attn.in_proj_weight)
                nn.init.zeros_(self.layer.attn.in_proj_bias)
                nn.init.zeros_(self.layer.attn.out_proj.bias)
        if self.has_adapters:  # for the image's stream and, if not shared, for the object's
            number = 1 if share_adapters else 1 + self.has_object
            self.p, self.q = (nn.ModuleList(nn.Linear(joint, joint) for _ in range(number)).to(device) for _ in "pq")
        self.reserve(0)

    # ---- The image encoder ----

    def embed(self, images):
        """-> z_0: (B, 1+N, D), with the prompt behind the patches (B, 1+N+1, D)."""
        visual = self.clip.visual
        z = visual.embed(images)
        if not self.has_object:
            return z
        return torch.cat([z, visual.ln_pre(self.x_fp).expand(len(z), 1, -1)], dim=1)  # Eq. 2; ln_pre works per token

    def walk(self, z):
        """z_0 -> z_{L-1} and AM (B, N)."""
        inputs = []
        for block in self.clip.visual.blocks[:-1]:
            inputs.append(z)
            z = block(z)
        return z, self.rollout(inputs, z)

    @torch.no_grad()
    def rollout(self, inputs, z):
        """z_0 .. z_{L-2} and z_{L-1}, all (B, 1+N or 1+N+1, D) -> AM (B, N)."""
        n = len(self.clip.visual.positional_embedding)  # class token and patches
        row = z.new_zeros(len(z), self.clip.visual.blocks[0].attn.heads, 1, z.shape[1], dtype=torch.float32)
        row[..., 0] = 1  # the class token's row of the identity, times Att^{L-1}, ..., times Att^1
        for block, x in zip(reversed(self.clip.visual.blocks[:-1]), reversed(inputs), strict=True):
            weights = block.attention_weights(x)  # (B, H, n or n+1, the same), Eq. 5
            with full_precision(x.device):
                row = row @ weights.float()  # (B, H, 1, n or n+1), Eq. 6
        return row[:, :, 0, 1:n].sum(dim=1)  # Eq. 7

    def encode_image(self, images):
        """-> f (B, E) and, with the object branch, f_O (B, E)."""
        visual = self.clip.visual
        if not self.has_object:
            return (self.clip.encode_image(images),)
        z, am = self.walk(self.embed(images))
        seen = F.pad(object_patches(am, self.region), (1, 1), value=True)  # (B, 1+N+1): x_cls, O, x_FP
        f = visual.project(visual.blocks[-1](z))  # Eq. 8
        f_o = visual.project(self.layer(z, mask=seen))  # Eq. 9: what is not a key is as good as not there
        return f, f_o

    # ---- The cache ----

    def reserve(self, n):
        """Room for n pictures in the cache, which prepare() fills, or load_state_dict()."""
        if not self.has_cache:
            return
        keys = self.w0.new_zeros(1 + self.has_object, n, self.w0.shape[1])
        if self.parts == "tip-f":
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.zeros(n, dtype=torch.long, device=keys.device))

    @torch.no_grad()
    def prepare(self, batches):
        """Build the cache. batches: (images, labels) of the few-shot set on CLIP's device; no generator, since it is
        walked through cache_views times, and not shuffled: in the same order, with augmentations drawn anew."""
        if not self.has_cache:
            return
        total = 0
        for _ in range(self.cache_views):
            features, labels = zip(*((self.cache_features(images), labels) for images, labels in batches), strict=True)
            total = total + torch.cat(features, dim=1).float()  # (1 or 2, n, E)
        if len(self.labels) != total.shape[1]:
            self.reserve(total.shape[1])
        self.keys.copy_(F.normalize(total, dim=-1))
        self.labels.copy_(torch.cat(labels))

    def cache_features(self, images):
        """-> F and, with the object branch, F_O (1 or 2, B, E), from CLIP without the prompt; not normalised."""
        visual = self.clip.visual
        if not self.has_object:
            return self.clip.encode_image(images).unsqueeze(0)
        z, am = self.walk(visual.embed(images))
        z = visual.blocks[-1](z, every=True)  # (B, 1+N, D)
        seen = object_patches(am, self.region).unsqueeze(-1)  # (B, N, 1)
        patches = (z[:, 1:] * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
        return torch.stack([visual.project(z), visual.project(patches)])

    # ---- Two-pathway recognition ----

    def encode_text(self):
        """-> w_new (K, E); without adapters the zero-shot classifier."""
        return self.adapted_text(0)

    def adapted_text(self, stream):  # Eq. 10; stream 0 is the image's, -1 the object's: the same where p is shared
        if not self.has_adapters:
            return self.w0
        with full_precision(self.w0.device):
            return self.w0 + self.alpha * adapted(self.p[stream], self.w0)

    def pathways(self, f, stream, text, rows):
        """Features (B, E) of a stream -> path 1 + lambda path 2 (B, K)."""
        f = F.normalize(f.float(), dim=-1)
        logits = self.clip.logit_scale.exp() * f @ text.T  # Eq. 11-12
        if not self.has_cache:
            return logits
        keys = self.keys[stream]  # (n, E)
        if self.has_adapters:
            f, keys = (F.normalize(u + adapted(self.q[stream], u), dim=-1) for u in (f, keys))  # Eq. 13-16
        affinity = torch.exp(f @ keys.T - 1)  # (B, n), phi
        if rows is not None:
            affinity = affinity.scatter(1, rows.unsqueeze(1), 0)
        return logits + self.lam * torch.zeros_like(logits).index_add(1, self.labels, affinity)  # Eq. 17-18: @ L

    def features(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> f (B, E), w_new (K, E)."""
        return self.encode_image(images)[0], self.encode_text() if text is None else text

    def forward(self, images, text=None, rows=None):
        """-> logits (B, K). rows (B,): entries of the cache that these pictures are not to meet, one each."""
        text = self.encode_text() if text is None else text
        features = self.encode_image(images)
        with full_precision(images.device):  # the adapters too: in half precision they lose their small steps
            logits = self.pathways(features[0], 0, text, rows)
            if self.has_object:
                shared = not self.has_adapters or len(self.p) == 1
                text = text if shared else self.adapted_text(-1)
                logits = logits + self.beta * self.pathways(features[1], -1, text, rows)  # Eq. 19
        return logits

    def loss(self, images, labels, epoch=0, rows=None):
        """labels (B,), rows (B,) the pictures' places in the cache, for exclude_self -> scalar cross-entropy."""
        if self.exclude_self and rows is None:
            raise UserError("exclude_self leaves a picture's own entry out of the cache: give loss() its rows there.")
        return F.cross_entropy(self(images, rows=rows if self.exclude_self else None), labels)

    @torch.no_grad()
    def attention(self, images):
        """-> AM (B, N), what is above Otsu's threshold (B, N), the object O (B, N): what the method looks at."""
        am = self.walk(self.embed(images))[1]
        return am, above_otsu(am), object_patches(am, self.region)


def adapted(adapter, u):
    """p and q: unit rows (..., E) -> what is added to them, made unit."""
    return F.normalize(F.leaky_relu(adapter(u), 0.2), dim=-1)


# ---- The object: maps (B, N) of a square grid -> masks (B, N), for a whole batch at once, on any device ----


@torch.no_grad()
def object_patches(am, region="component"):
    """Attention maps -> the patches of the object, never none."""
    mask = largest_component(above_otsu(am), am)
    if region == "bbox":
        mask = bounding_box(mask)
    return mask | ~mask.any(dim=1, keepdim=True)


def above_otsu(am):
    """-> True above Otsu's threshold on 256 levels; nowhere in a map that is constant or not finite."""
    low, high = am.amin(dim=1, keepdim=True), am.amax(dim=1, keepdim=True)
    levels = (255 * ((am - low) / (high - low)).nan_to_num(0)).long()
    count = levels.new_zeros(len(am), 256).scatter_add(1, levels, torch.ones_like(levels))
    below, n = count.cumsum(dim=1), am.shape[1]  # patches up to each level
    total = (count * torch.arange(256, device=am.device)).cumsum(dim=1)  # the sum of their levels
    # Between-class variance times n^2, as whole part and remainder: in floating point equals would not stay equal.
    gap, sides = total[:, -1:] * below - n * total, (below * (n - below)).clamp(min=1)
    whole, rest = gap.square() // sides, gap.square() % sides / sides
    best = whole == whole.amax(dim=1, keepdim=True)
    return levels > torch.where(best, rest, -1).argmax(dim=1, keepdim=True)  # of equals the lowest


def largest_component(mask, am):
    """-> the mask's largest region, connected over edges and corners; of equals that with the highest attention."""
    n = mask.shape[1]
    place = torch.arange(n, device=mask.device)
    y, x = place // math.isqrt(n), place % math.isqrt(n)
    near = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)  # (N, N)
    reach = near & mask[:, :, None] & mask[:, None, :]  # (B, N, N): patches one step apart
    for _ in range(math.ceil(math.log2(n))):  # squared: twice as many steps, in the end as many as there are patches
        reach = (reach.float() @ reach.float()) > 0
    size = reach.sum(dim=2)
    peak = am.unsqueeze(1).masked_fill(~reach, -math.inf).amax(dim=2)  # of the region that the patch lies in
    best = peak.masked_fill(size < size.amax(dim=1, keepdim=True), -math.inf).argmax(dim=1)
    return reach[torch.arange(len(reach), device=mask.device), best]


def bounding_box(mask):
    """-> the box of rows and columns around the mask."""
    side = math.isqrt(mask.shape[1])
    grid = mask.unflatten(1, (side, side))
    rows, columns = ((v.cumsum(dim=1) > 0) & (v.flip(1).cumsum(dim=1).flip(1) > 0) for v in (grid.any(2), grid.any(1)))
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)
