"""VLP, DPT and the first CAVPT: learn prompts of both towers; the last image prompts are made from the likely classes.

Xing, Wu, Cheng, Zhang, Liang, Wang, Zhang: Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model, IEEE
Transactions on Multimedia 2023, arXiv:2208.08340. Its version 1 (Class-Aware Visual Prompt Tuning) is another method.

    g_i = g(u_1 .. u_M, CLASS_i)      W: all g_i      W0: the same of the templates                          Eq. 1-2
    z = f(x, prompts)      z0 = f(x)      CE(z, W): cross-entropy of cos(z, W) / tau with the label y        Eq. 2, 9
    [s_l, _, E_l] = Block_l([s_{l-1}, P_{l-1}, E_{l-1}]),  l = 1 .. L                                        Eq. 4
  VLP: CE(z, W), after guide_epochs in which the loss is Eq. 12 without L_ca.
  DPT, in the layers of cavpt_layers, for the K_N classes j that zero-shot CLIP finds likeliest in the picture:
    o_j = softmax( q_j W_q (X W_k)^T / sqrt(d_k) ) X W_v,  q_j = fc(g_j),  X = [s_{l-1}, E_{l-1}, P_{l-1}]   Eq. 6
    P~_j = LN(o_j + q_j)  take the place of P_{l-1}                                                          Eq. 7, 10
    L_ca = cross-entropy of LN(o_j) W_c with y, where j is y; pictures whose y is not among the j are left out   Eq. 8
    L = CE(z, W) + alpha L_ca                                                                                Eq. 11
    L = CE(z0, W) + CE(z, W0) + beta CE(z, W) + alpha L_ca  in the first guide_epochs                        Eq. 12
  CAVPT, version 1, in the last layer, with g_j of the templates:
    o_j = softmax_j( q_j . s W_k ) s W_v + s,  q_j = MLP(g_j);  h_j = LN(o_j);  P~_j = LP(h_j)               v1 Eq. 9
    L = CE(z, W) + L_ca;  L_ca: h_j W_c against one-hot y where j is y, against 1/K elsewhere             v1 Eq. 10-12

    u_1 .. u_M  ctx  (M, Dt)       P_l  visual_prompts[l]  (P, D)      W_c  aux_classifier  (D, K)      all learned
    fc, W_q, W_k, W_v, LN, MLP, LP      in `cavpt`, learned            o_j, P~_j  (B, k, D), k = min(K_N, K)
    f, g  towers, frozen      W0  zero_shot  (K, E), frozen      W  (K, E)      z, z0  (B, E)      g_j  (B, k, E)
    s, E  class token (B, D) and patches (B, N, D) of a layer; no gradient flows through them in Eq. 6 and v1 Eq. 9

What DPT leaves open is settled as in its release, github.com/fanrena/DPT, trainers/DPT.py (VLP: trainers/VLP.py): d_k
is 32; g_j is not normalised; Eq. 7 and 8 have a LayerNorm each; each layer of cavpt_layers keeps its own P_{l-1} as
keys. Everything is trained in fp32, where the release steps in fp16. Version 1 has no code. Its Eq. 9 prints
Softmax(Q^T k v), closed after v; here it is closed before v, which weighs it. Chosen for version 1: k is s W_k and v is
s W_v, which it does not define; the softmax runs over the classes, since over its single key it would be 1 for all; the
MLP is E-32-D with ReLU; LP is linear; P~ replaces P_{l-1}; L_ca is the mean over all rows, K_N of each picture. The
bias of the MLP's last layer adds the same to every class's score, so it never learns.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, N patches, P = n_visual, M = n_ctx, D and Dt widths of the towers, E joint width (in equations the
paper's patches).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import Method, UserError, sum_over_processes


class VLP(Method):
    """CoOp's text prompts and VPT's deep visual prompts together. Learns 100,352 numbers on ViT-B by default.

    There are `n_ctx` context vectors and `n_visual` visual prompts per layer. The first `guide_epochs` are the phase of
    general-knowledge guidance, where `beta` weighs the loss of both prompts together.
    """

    # DPT, Section IV-A and the release's files. The text prompts, `ctx`, have a rate and a warm-up of their own.
    recipe = dict(
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.01, warmup_epochs=10,
        parts={"ctx": dict(lr=0.002, warmup_epochs=1)}, batch_size=32, crop_scale=(0.08, 1.0),
        epochs={1: 60, 2: 100, 4: 100, 8: 100, 16: 100},
        datasets={"imagenet": dict(epochs=20, warmup_epochs=1, options=dict(guide_epochs=10))},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_visual=10, guide_epochs=30,
                 beta=0.1):
        if min(n_ctx, n_visual) < 0:
            raise UserError(f"n_ctx is {n_ctx} and n_visual {n_visual}: they must be 0 or more.")
        super().__init__(clip, classnames, templates)
        self.n_ctx, self.guide_epochs, self.beta = n_ctx, guide_epochs, beta
        layers, width = len(clip.visual.blocks), len(clip.visual.class_embedding)
        ctx = self.zero_shot.new_empty(n_ctx, clip.text.token_embedding.embedding_dim)
        self.ctx = nn.Parameter(ctx.normal_(std=0.02))
        self.visual_prompts = nn.Parameter(ctx.new_empty(layers, n_visual, width).normal_(std=0.02))
        self.embed_prompts()

    def embed_prompts(self):
        """Embed the prompts "X .. X CLASS." of all classes: (C + K*S, Dt) and their Layout."""
        prompts, self.layout = self.clip.embed_prompts(self.classnames, self.n_ctx)
        self.prompts = nn.Buffer(prompts, persistent=False)

    def contexts(self):
        """-> (M, Dt)."""
        return self.ctx

    def encode_text(self):
        """-> W (K, E), not normalised."""
        m, tower = self.n_ctx, self.clip.text
        ctx = self.ctx + tower.positional_embedding[1 : 1 + m]  # (M, Dt), behind the start token
        return tower(torch.cat([self.prompts[:1], ctx, self.prompts[1 + m :]]), self.layout)

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> z (B, E)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        for block, p in zip(visual.blocks, self.visual_prompts, strict=True):
            x = block(x, p)  # p (P, D)                                                                       Eq. 4
        return visual.project(x)

    def frozen_features(self, images):
        """images (B, 3, R, R) -> z0 (B, E): the image tower without prompts."""
        with torch.no_grad():
            return self.clip.encode_image(images)

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar: Eq. 12 without L_ca in the first guide_epochs, then Eq. 9."""
        z0 = self.frozen_features(images) if epoch < self.guide_epochs else None
        return self.phase_loss(z0, self.encode_image(images), self.encode_text(), labels)

    def phase_loss(self, z0, z, text, labels):
        """Eq. 12 without L_ca where z0 is given (general-knowledge guidance), Eq. 9 where it is None."""
        loss = F.cross_entropy(self.clip.logits(z, text), labels)
        if z0 is None:
            return loss
        text_alone = F.cross_entropy(self.clip.logits(z0, text), labels)  # as in CoOp
        image_alone = F.cross_entropy(self.clip.logits(z, self.zero_shot), labels)  # as in VPT
        return text_alone + image_alone + self.beta * loss


class ClassAwarePrompts(nn.Module):
    """DPT's CAVPT module: 1,036,032 numbers on ViT-B besides the auxiliary classifier, which only training uses."""

    def __init__(self, joint, width, n_classes, d_k=32):
        super().__init__()
        self.fc = nn.Linear(joint, width)
        self.w_q, self.w_k = nn.Linear(width, d_k, bias=False), nn.Linear(width, d_k, bias=False)
        self.w_v = nn.Linear(width, width, bias=False)
        self.ln_o, self.ln_p = nn.LayerNorm(width), nn.LayerNorm(width)
        self.aux_classifier = nn.Linear(width, n_classes, bias=False)

    def forward(self, g, x, keys):
        """g (B, k, E), x (B, 1+N, D), keys (P, D) -> prompts (B, k, D), auxiliary logits (B, k, K)."""
        q = self.fc(g)  # (B, k, D)
        kv = torch.cat([x.detach(), keys.expand(len(x), -1, -1)], dim=1)  # (B, 1+N+P, D)
        a = (self.w_q(q) @ self.w_k(kv).mT / math.sqrt(self.w_q.out_features)).softmax(dim=-1)  # (B, k, 1+N+P)
        o = self.w_v(a @ kv)  # (B, k, D)                                                                     Eq. 6
        return self.ln_p(o + q), self.aux_classifier(self.ln_o(o))  # Eq. 7, and the input of Eq. 8


class DPT(VLP):
    """VLP with class-aware visual prompts. Learns 1,136,384 numbers on ViT-B besides the auxiliary classifier.

    `k_n`          how many classes make prompts, those that zero-shot CLIP finds likeliest (K_N)
    `alpha`        the weight of the auxiliary loss L_ca
    `cavpt_layers` where: "12", "8-12" or "1-4", counted from 1; a number beyond the last layer means the last one
    `cavpt_shared` one class-aware module for all these layers instead of one for each
    """

    recipe = VLP.recipe | dict(datasets=VLP.recipe["datasets"] | dict.fromkeys(
        ("caltech101", "oxford_pets"), {"epochs": {1: 60, 2: 100, 4: 100, 8: 100, 16: 60}}))

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_visual=10, guide_epochs=30,
                 beta=0.1, k_n=10, alpha=0.3, cavpt_layers="12", cavpt_shared=False):
        super().__init__(clip, classnames, templates, n_ctx=n_ctx, n_visual=n_visual, guide_epochs=guide_epochs,
                         beta=beta)
        if k_n < 0:
            raise UserError(f"k_n is {k_n}: it must be 0 or more.")
        self.k_n, self.alpha = k_n, alpha
        depth, joint, width = len(clip.visual.blocks), self.zero_shot.shape[1], self.visual_prompts.shape[-1]
        first, dash, last = str(cavpt_layers).partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(f"cavpt_layers is {cavpt_layers}: give a layer or a range, such as 12 or 8-12.")
        self.layers = list(range(min(int(first), depth) - 1, min(int(last), depth)))  # counted from 0
        n_modules = 1 if cavpt_shared else len(self.layers)
        modules = (ClassAwarePrompts(joint, width, len(classnames)) for _ in range(n_modules))
        self.cavpt = nn.ModuleList(modules).to(self.zero_shot.device)

    def encode_image(self, images, text=None):
        """images (B, 3, R, R), text = W (K, E) or None to compute it -> z (B, E)."""
        text = self.encode_text() if text is None else text
        top_classes = likely_classes(self, self.frozen_features(images))
        return self.class_aware_features(images, text[top_classes])[0]

    def class_aware_features(self, images, g):
        """g (B, k, E), text features of each picture's classes -> z (B, E), auxiliary logits (layers, B, k, K)."""
        visual, aux = self.clip.visual, []
        x = visual.embed(images)  # (B, 1+N, D)
        for layer, (block, p) in enumerate(zip(visual.blocks, self.visual_prompts, strict=True)):
            if layer in self.layers:  # the layer's prompts (P, D) become keys, and P~ (B, k, D) takes their place
                module = self.cavpt[self.layers.index(layer) % len(self.cavpt)]
                p, logits = module(g, x, p)  # Eq. 10
                aux.append(logits)
            x = block(x, p)  # Eq. 4
        return visual.project(x), torch.stack(aux)

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar: Eq. 12 in the first guide_epochs, then Eq. 11."""
        text, z0 = self.encode_text(), self.frozen_features(images)
        top_classes = likely_classes(self, z0)
        z, aux = self.class_aware_features(images, text[top_classes])
        hit = (top_classes == labels[:, None]).expand(len(aux), -1, -1)  # (layers, B, k), at most one per picture
        rows = F.cross_entropy(aux.movedim(-1, 1), labels[None, :, None].expand_as(hit), reduction="none")
        hits, pictures = sum_over_processes(torch.stack([hit.sum(), torch.ones_like(labels).sum()]))
        l_ca = (rows * hit).sum() / hits  # Eq. 8: the mean over the hits, in all pictures and layers
        # Of several processes each has some of the pictures, and train.py will weigh its loss by their share. The hits
        # are the whole batch's already, so that this weight is taken out here.
        l_ca = l_ca / (len(labels) / pictures)
        loss = self.phase_loss(z0 if epoch < self.guide_epochs else None, z, text, labels)
        # Without a hit W_c and its LN have no gradient, as in the release: weight decay and momentum do not move them.
        # To know it, a GPU has to be waited for, once in a step.
        return loss + self.alpha * l_ca if hits.any() else loss


def likely_classes(method, z0):
    """z0 (B, E) -> (B, k): the k = min(k_n, K) classes that zero-shot CLIP finds likeliest for each picture."""
    k = min(method.k_n, len(method.classnames))
    return method.clip.logits(z0, method.zero_shot).topk(k, dim=-1).indices


class TemplatePrompts(nn.Module):
    """The CAVPT module of version 1."""

    def __init__(self, joint, width, n_classes, softmax_axis, hidden=32):
        super().__init__()
        self.softmax_axis = softmax_axis
        self.mlp = nn.Sequential(nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.w_k, self.w_v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.ln, self.lp = nn.LayerNorm(width), nn.Linear(width, width)
        self.aux_classifier = nn.Linear(width, n_classes, bias=False)

    def forward(self, g, s):
        """g (B, k, E), s (B, D) -> prompts (B, k, D), auxiliary logits (B, k, K)."""
        scores = self.mlp(g) @ self.w_k(s).unsqueeze(-1)  # (B, k, 1): queries by classes, the one key by column
        a = scores.softmax(dim=1 if self.softmax_axis == "classes" else 2)
        h = self.ln(a * self.w_v(s).unsqueeze(1) + s.unsqueeze(1))  # (B, k, D)                            v1 Eq. 9
        return self.lp(h), self.aux_classifier(h)


class CAVPT(VLP):
    """Version 1, without guidance: on VLP (`base="vlp"`), or on VPT, whose classifier is the templates' (`base="vpt"`).

    `softmax_axis="keys"` reads Eq. 9 as ordinary attention: over its single key, all k_n prompts come out the same.
    With `keep_vpt` the last layer has its own prompts as well. `cavpt_loss=False` leaves L_ca out. The paper chose
    `k_n` for each data set by its test accuracy: `tuned_k_n` takes these numbers, for its Tables 1 and 2.
    """

    # v1 prints 200 epochs and 10 of warm-up, at 16 shots. The rates are DPT's, the other epochs CoOp's.
    tuned = {name: dict(options=dict(k_n=k_n)) for name, k_n in dict(
        eurosat=5, oxford_flowers=5, food101=5, dtd=5, fgvc_aircraft=20, oxford_pets=37, caltech101=50,
        stanford_cars=100).items()}
    imagenet = {"imagenet": dict(epochs=50, warmup_epochs=1)}
    recipe = VLP.recipe | dict(
        epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets=imagenet,
        variants={"tuned_k_n=True": dict(datasets=imagenet | tuned)})

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_visual=10, k_n=10,
                 softmax_axis="classes", keep_vpt=False, cavpt_loss=True, base="vlp", tuned_k_n=False):
        if base not in ("vlp", "vpt") or softmax_axis not in ("classes", "keys"):
            raise UserError(f"base is {base} and softmax_axis {softmax_axis}: choose vlp or vpt, classes or keys.")
        if k_n < 0:
            raise UserError(f"k_n is {k_n}: it must be 0 or more.")
        super().__init__(clip, classnames, templates, n_ctx=n_ctx, n_visual=n_visual)
        self.base, self.k_n, self.keep_vpt, self.cavpt_loss = base, k_n, keep_vpt, cavpt_loss
        if base == "vpt":
            self.ctx = None
        if not keep_vpt:  # the last layer's make room for the class-aware ones
            self.visual_prompts = nn.Parameter(self.visual_prompts[:-1].detach().clone())
        joint, width = self.zero_shot.shape[1], self.visual_prompts.shape[-1]
        self.cavpt = TemplatePrompts(joint, width, len(classnames), softmax_axis).to(self.zero_shot.device)

    def encode_text(self):
        """-> (K, E): W, not normalised, or the zero-shot classifier."""
        return super().encode_text() if self.base == "vlp" else self.zero_shot

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> z (B, E)."""
        return self.class_aware_features(images, likely_classes(self, self.frozen_features(images)))[0]

    def class_aware_features(self, images, top_classes):
        """top_classes (B, k), classes of each picture -> z (B, E), auxiliary logits (B, k, K)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        for block, p in zip(visual.blocks[:-1], self.visual_prompts, strict=False):  # keep_vpt has one set more
            x = block(x, p)  # v1 Eq. 6
        p, aux = self.cavpt(self.zero_shot[top_classes], x[:, 0].detach())  # (B, k, D)
        if self.keep_vpt:
            p = torch.cat([p, self.visual_prompts[-1].expand(len(x), -1, -1)], dim=1)
        return visual.project(visual.blocks[-1](x, p)), aux

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar, v1 Eq. 12."""
        top_classes = likely_classes(self, self.frozen_features(images))
        z, aux = self.class_aware_features(images, top_classes)
        loss = F.cross_entropy(self.clip.logits(z, self.encode_text()), labels)  # v1 Eq. 11
        if not self.cavpt_loss:
            return loss
        log_p = aux.log_softmax(dim=-1)  # (B, k, K)
        of_label = log_p.gather(2, labels[:, None, None].expand(-1, top_classes.shape[1], -1)).squeeze(2)  # (B, k)
        # The target is y where the prompt's class is y, and the same probability 1/K for every class elsewhere.
        rows = torch.where(top_classes == labels[:, None], of_label, log_p.mean(dim=-1))  # (B, k)
        return loss - rows.sum() / max(rows.numel(), 1)  # v1 Eq. 10
