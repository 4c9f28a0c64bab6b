"""VLP, DPT and the first CAVPT: learn prompts of both towers; the last image prompts are made from the likely classes.

Xing, Wu, Cheng, Zhang, Liang, Wang, Zhang: Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model, IEEE
Transactions on Multimedia 2023, arXiv:2208.08340. Its version 1 (Class-Aware Visual Prompt Tuning) is another method.

    G = T(ctx)   W = norm(G)   W0 = norm(T(template))   z0 = V(x)   z = V(x, prompts)    logits = cos(z, W) / tau
    [s_l, _, E_l] = Block_l([s_{l-1}, E_{l-1}, P_{l-1}])                          l = 1 .. L             Eq. 4
  DPT, in the layers of cavpt_layers, for the K_N classes with the best zero-shot logits of the picture:
    o  = softmax(Q K^T / sqrt(d_k)) V,  Q = q W_q, q = fc(g), K, V = [s, E, C] W_k, W_v                  Eq. 6
    P~ = LN(o + q)   takes the place of P_{l-1}                                                          Eq. 7, 10
    L_ca = CE(LN(o) W_c, y), for pictures whose class is among the K_N                                   Eq. 8
    L = CE(cos(z, W)) + alpha L_ca                                                main phase             Eq. 9, 11
    L = CE(cos(z0, W)) + CE(cos(z, W0)) + beta CE(cos(z, W)) + alpha L_ca         first guide_epochs     Eq. 12
  VLP: no such layer, the same losses without L_ca.
  CAVPT, version 1, in the last layer, q = MLP(g) of the template features:
    o_j = softmax_j(q_j . s W_k) s W_v + s,   h = LN(o),   P~ = LP(h)                                 v1 Eq. 9
    L = CE(cos(z, W)) + L_ca;  L_ca: h W_c against one-hot in y's row and 1/K in all others           v1 Eq. 10-12

    v_1..v_M  ctx  (M, Dt)      P_l, C  visual_prompts[l]  (P, D)     g  (B, K_N, E) rows of G (DPT) or W0 (v1)
    s, E  class token and patches at the layer's input, no gradient through them here    W_c  aux_classifier  (D, K)

What the papers leave open, settled as in the authors' release where it tells: d_k is 32; g is not normalised; the two
LN are two; a layer's class-aware module uses that layer's own prompts as the keys C; everything is trained in fp32
where the release steps in fp16. Version 1 has no code: its softmax runs over the classes (over a single key it would
be 1 for all), its MLP is E-32-D with ReLU, LP is linear, the layer's own prompts are replaced. Read so, the bias of
the MLP's last layer adds the same to every class's score and never learns.

The papers' ablations, each one `train.py --method ... --set ...`:
    DPT Table IV  dpt alpha=0 .. 1      Table V  dpt k_n=0 .. 100      Table VI  vlp n_vpt=120; vpt n_ctx=120
    DPT Fig. 6    dpt cavpt_layers=1-12, 4-12, 8-12, 12, 1, 1-4, 1-8, and these with cavpt_shared=true
    v1 Table 1    vpt deep=false (--lr 0.001); vpt; vlp guide_epochs=0 (--epochs 200); cavpt text=template; cavpt
    v1 Table 2    cavpt text=template cavpt_loss=false      Table 3  cavpt text=template k_n=5 .. 100, 1000 for all

Copy this file and clip_min.py anywhere. B images, K classes, N patches, D and Dt widths of the towers, E joint width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import UserError, tokenize


class VLP(nn.Module):
    """Text prompts as CoOp's and deep visual prompts as VPT's, together. Learns 100,352 numbers on ViT-B."""

    # DPT, Section IV-A and the release's files. The rates are the visual side's; the text prompts have their own.
    recipe = dict(
        optimizer="sgd", lr=0.01, warmup_epochs=10, batch_size=32, crop_scale=(0.08, 1.0),
        epochs={1: 60, 2: 100, 4: 100, 8: 100, 16: 100},
        datasets={"imagenet": dict(epochs=20, warmup_epochs=1, options=dict(guide_epochs=10))},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_vpt=10, guide_epochs=30,
                 beta=0.1):
        super().__init__()
        if min(n_ctx, n_vpt) < 0:
            raise UserError(f"n_ctx is {n_ctx} and n_vpt {n_vpt}: they must be 0 or more.")
        self.clip, self.guide_epochs, self.beta, self.k = clip.requires_grad_(False), guide_epochs, beta, 0
        names = [name.replace("_", " ") for name in classnames]
        self.prompts = [f"[{n_ctx} vectors] {name}." for name in names]  # for people to read
        tokens = tokenize([" ".join(["X"] * n_ctx) + f" {name}." for name in names])
        shared, own, eot = clip.text.embed(tokens.to(clip.logit_scale.device))  # (1, >=1+M, Dt), (K, S, Dt), (K,)
        for key, value in dict(shared=shared, own=own, eot=eot, w0=clip.classifier(classnames, templates)).items():
            self.register_buffer(key, value, persistent=False)
        layers, width = len(clip.visual.blocks), len(clip.visual.class_embedding)
        self.ctx = nn.Parameter(shared.new_empty(n_ctx, shared.shape[-1]).normal_(std=0.02))
        self.visual_prompts = nn.Parameter(shared.new_empty(layers, n_vpt, width).normal_(std=0.02))

    def parameter_groups(self):
        """The text prompts learn at CoOp's rate and warm-up, everything else at the recipe's."""
        rest = [p for p in self.parameters() if p.requires_grad and p is not self.ctx]
        return [{"params": [self.ctx], "lr": 0.002, "warmup_epochs": 1}, {"params": rest}]

    def encode_text(self):
        """-> G (K, E), not normalised."""
        m, text = len(self.ctx), self.clip.text
        ctx = (self.ctx + text.positional_embedding[1 : 1 + m]).unsqueeze(0)  # behind the start token
        return text(torch.cat([self.shared[:, :1], ctx, self.shared[:, 1 + m :]], dim=1), self.own, self.eot)

    def frozen(self, images):
        """-> z0 (B, E): the image tower without prompts."""
        with torch.no_grad():
            return self.clip.encode_image(images)

    def likely(self, z0):
        """z0 (B, E) -> (B, k): the classes that zero-shot CLIP finds likeliest; DPT and CAVPT make prompts of them."""
        return self.clip.logits(z0, self.w0).topk(self.k, dim=-1).indices

    def encode_image(self, images):
        """-> z (B, E)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        n = x.shape[1]
        for block, p in zip(visual.blocks, self.visual_prompts, strict=True):
            x = block(torch.cat([x[:, :n], p.expand(len(x), -1, -1)], dim=1))  # Eq. 4
        return visual.project(x)

    def features(self, images, text=None):
        """images (B, 3, R, R), text = G (K, E) or None to compute it -> z (B, E), G (K, E)."""
        text = self.encode_text() if text is None else text
        return self.encode_image(images), text

    def forward(self, images, text=None):
        """-> logits (B, K)."""
        return self.clip.logits(*self.features(images, text))

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar: Eq. 12 without its last term in the first guide_epochs, then Eq. 9."""
        text, z = self.encode_text(), self.encode_image(images)
        z0 = self.frozen(images) if epoch < self.guide_epochs else None
        return self.phase_loss(z0, z, text, labels)

    def phase_loss(self, z0, z, text, labels):
        """Eq. 12 without L_ca where z0 is given (general-knowledge guidance), Eq. 9 where it is None."""
        ce = F.cross_entropy(self.clip.logits(z, text), labels)
        if z0 is None:
            return ce
        coop = F.cross_entropy(self.clip.logits(z0, text), labels)  # learned text, frozen image
        vpt = F.cross_entropy(self.clip.logits(z, self.w0), labels)  # learned image, hand-written text
        return coop + vpt + self.beta * ce


class ClassAwarePrompts(nn.Module):
    """DPT's CAVPT module: 1,036,032 numbers on ViT-B, besides the auxiliary classifier that only training uses."""

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
        o = self.w_v(a @ kv)  # Eq. 6
        return self.ln_p(o + q), self.aux_classifier(self.ln_o(o))  # Eq. 7, and the input of Eq. 8


class DPT(VLP):
    """VLP with class-aware visual prompts. Learns 1,136,384 numbers on ViT-B besides the auxiliary classifier.

    k_n: how many of the classes that zero-shot CLIP finds likeliest make prompts. cavpt_layers: "12", "8-12", "1-4",
    counted from 1; beyond the last layer means the last (ViT-B's is 12, ViT-L's 24). cavpt_shared: one module for all.
    """

    recipe = VLP.recipe | dict(datasets=VLP.recipe["datasets"] | dict.fromkeys(
        ("caltech101", "oxford_pets"), {"epochs": {1: 60, 2: 100, 4: 100, 8: 100, 16: 60}}))

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_vpt=10, guide_epochs=30,
                 beta=0.1, k_n=10, alpha=0.3, cavpt_layers="12", cavpt_shared=False):
        super().__init__(clip, classnames, templates, n_ctx=n_ctx, n_vpt=n_vpt, guide_epochs=guide_epochs, beta=beta)
        self.k, self.alpha = min(k_n, len(classnames)), alpha
        depth, joint, width = len(clip.visual.blocks), self.w0.shape[1], self.visual_prompts.shape[-1]
        first, dash, last = str(cavpt_layers).partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(f"cavpt_layers is {cavpt_layers}: give a layer or a range, such as 12 or 8-12.")
        self.layers = sorted({min(n, depth) - 1 for n in range(int(first), int(last) + 1)})
        modules = [ClassAwarePrompts(joint, width, len(classnames)) for _ in self.layers[: 1 if cavpt_shared else None]]
        self.cavpt = nn.ModuleList(modules).to(self.w0.device)

    def encode_image(self, images, g):
        """g (B, k, E) -> z (B, E), auxiliary logits (layers, B, k, K)."""
        visual, aux = self.clip.visual, []
        x = visual.embed(images)  # (B, 1+N, D)
        n = x.shape[1]
        for layer, (block, p) in enumerate(zip(visual.blocks, self.visual_prompts, strict=True)):
            x = x[:, :n]
            if layer in self.layers:  # the layer's own prompts become keys, Eq. 10
                module = self.cavpt[self.layers.index(layer) % len(self.cavpt)]
                p, logits = module(g, x, p)
                aux.append(logits)
            else:
                p = p.expand(len(x), -1, -1)  # Eq. 4
            x = block(torch.cat([x, p], dim=1))
        return visual.project(x), torch.stack(aux)

    def features(self, images, text=None):
        """images (B, 3, R, R), text = G (K, E) or None to compute it -> z (B, E), G (K, E)."""
        text = self.encode_text() if text is None else text
        return self.encode_image(images, text[self.likely(self.frozen(images))])[0], text

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar: Eq. 12 in the first guide_epochs, then Eq. 11."""
        text, z0 = self.encode_text(), self.frozen(images)
        likely = self.likely(z0)
        z, aux = self.encode_image(images, text[likely])
        hit = (likely == labels[:, None]).expand(len(aux), -1, -1)  # (layers, B, k), at most one per picture
        rows = F.cross_entropy(aux.movedim(-1, 1), labels[None, :, None].expand_as(hit), reduction="none")
        l_ca = (rows * hit).sum() / hit.sum().clamp(min=1)  # Eq. 8, over pictures and layers; 0 if there is no hit
        return self.phase_loss(z0 if epoch < self.guide_epochs else None, z, text, labels) + self.alpha * l_ca


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
        h = self.ln(a * self.w_v(s).unsqueeze(1) + s.unsqueeze(1))  # v1 Eq. 9, (B, k, D)
        return self.lp(h), self.aux_classifier(h)


class CAVPT(VLP):
    """Version 1: on VLP with text="prompt", on VPT, whose classifier is frozen, with text="template". No guidance.

    keep_vpt leaves the last layer its own prompts too. softmax_axis="keys" reads Eq. 9 as ordinary attention: over its
    single key all k_n prompts come out the same. The paper chose k_n per dataset by test accuracy: 5 for EuroSAT,
    Flowers, Food and DTD, 20 for Aircraft, 50 for Caltech, 100 for Cars, 37 for Pets.
    """

    # v1 prints 200 epochs and 10 of warm-up, at 16 shots. The rates are DPT's, the other epochs CoOp's.
    recipe = VLP.recipe | dict(epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200},
                               datasets={"imagenet": dict(epochs=50, warmup_epochs=1)})

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_ctx=16, n_vpt=10, k_n=10,
                 softmax_axis="classes", keep_vpt=False, cavpt_loss=True, text="prompt"):
        super().__init__(clip, classnames, templates, n_ctx=n_ctx, n_vpt=n_vpt)
        if text not in ("prompt", "template") or softmax_axis not in ("classes", "keys"):
            raise UserError(f"text is {text} and softmax_axis {softmax_axis}: choose prompt or template, "
                            "classes or keys.")
        self.k, self.keep_vpt, self.cavpt_loss = min(k_n, len(classnames)), keep_vpt, cavpt_loss
        if text == "template":
            self.ctx, self.prompts = None, [templates[0].format(name.replace("_", " ")) for name in classnames]
        if not keep_vpt:  # the last layer's make room for the class-aware ones
            self.visual_prompts = nn.Parameter(self.visual_prompts[:-1].detach().clone())
        joint, width = self.w0.shape[1], self.visual_prompts.shape[-1]
        self.cavpt = TemplatePrompts(joint, width, len(classnames), softmax_axis).to(self.w0.device)

    def parameter_groups(self):
        """As VLP's; without text prompts all is at the recipe's rate."""
        return super().parameter_groups() if self.ctx is not None else [
            {"params": [p for p in self.parameters() if p.requires_grad]}]

    def encode_text(self):
        """-> (K, E): G, not normalised, or with text="template" the zero-shot classifier."""
        return super().encode_text() if self.ctx is not None else self.w0

    def encode_image(self, images, likely):
        """likely (B, k), classes -> z (B, E), auxiliary logits (B, k, K)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        n = x.shape[1]
        for block, p in zip(visual.blocks[:-1], self.visual_prompts, strict=False):  # one set more with keep_vpt
            x = block(torch.cat([x[:, :n], p.expand(len(x), -1, -1)], dim=1))  # v1 Eq. 6
        x = x[:, :n]
        p, aux = self.cavpt(self.w0[likely], x[:, 0].detach())
        if self.keep_vpt:
            p = torch.cat([p, self.visual_prompts[-1].expand(len(x), -1, -1)], dim=1)
        return visual.project(visual.blocks[-1](torch.cat([x, p], dim=1))), aux

    def features(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> z (B, E), text features (K, E)."""
        text = self.encode_text() if text is None else text
        return self.encode_image(images, self.likely(self.frozen(images)))[0], text

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar, v1 Eq. 12."""
        likely = self.likely(self.frozen(images))
        z, aux = self.encode_image(images, likely)
        loss = F.cross_entropy(self.clip.logits(z, self.encode_text()), labels)  # v1 Eq. 11
        if not self.cavpt_loss:
            return loss
        log_p = aux.log_softmax(dim=-1)  # (B, k, K)
        own = log_p.gather(2, labels[:, None, None].expand(-1, self.k, -1)).squeeze(2)  # (B, k), of the true class
        rows = torch.where(likely == labels[:, None], own, log_p.mean(dim=-1))  # all other rows should know nothing
        return loss - rows.sum() / max(rows.numel(), 1)  # v1 Eq. 10
