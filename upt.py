"""UPT: one set of prompts for both towers, mixed by a small Transformer layer before it is split between them.

Zang, Li, Zhou, Huang, Loy: Unified Vision and Language Prompt Learning, arXiv:2210.07225

    U'   = SA(U) + LN(U)                                                                              Eq. 5
    U^   = FFN(LN(U')) + LN(U') = {U^_t, U^_v}                                                        Eq. 5
    text tower, layer i:   positions 1 .. n_text hold U^_t^i                                          Eq. 2
    image tower, layer i:  [s_i, _, E_i] = Block_i([s_{i-1}, E_{i-1}, U^_v^i W_p + b])                Eq. 4
    p(y = i | x) = softmax_i( cos(w_i, z) / tau ), cross-entropy                                      Eq. 1

    U^i     unified  (depth, n_text + n_visual, Dt)    learned, N(0, 0.02^2)
    theta   attention, ffn, ln_1, ln_2                 learned, one for all layers
    W_p, b  to_visual  Dt -> D                         learned, one for all layers

The paper prints Eq. 5 and "layer-wise prompts". It leaves open, and here is chosen: how 512 numbers become 768 (W_p,
as in the author's code), whether tokens or features are split (tokens, the first n_text for the text), n (4 + 4), how
many LN (two, the second used twice), heads (1), width of the FFN (512), dropout (0.1), theta per layer or one (one),
how deep text prompts enter (they overwrite the hidden states of the last ones), warm-up and epochs (CoOp's). Appendix
B names one template for zero-shot and VPT, "a photo of a"; the dataset's own is used, which its published numbers
need.

The author's later trainer, the only code there is, is another method: preset="released" has its one shallow set, its
block h = LN(U + SA(U)), U^ = h + FFN(LN(h)), its prompts in front of ln_pre, and its attention, which sees one token
at a time because its axes are swapped: the two modalities meet only in the weights of theta, and the query and key
weights never learn. (It evaluates theta twice per step, with two dropout masks; here once.)

Eq. 5 ends in LN, so its prompts have unit variance, 25 to 50 times a word embedding's size at the door of the text
tower (so do the released ones; mlp's and shared's stay small). The literal form is the default: on the embedded world
(16 shots, mean of seeds 1 to 3, shapes / shapes_tint) it reached 79.1 / 91.8 %, and with text_scale=0.05, which mends
the size, 80.3 / 91.9; with the logit scale raised from 26 to CLIP's 100, 63.8 / 84.7 and 65.8 / 81.6, seeds up to 29
points apart. None collapsed, and no difference exceeds the spread. On OpenAI's weights neither has been run here.

Table 2 of the paper, the first three rows with the other files:
    1 CoOp         train.py --method coop --set ctx_init="a photo of a"
    2 VPT-shallow  train.py --method vpt --lr 0.002 --warmup-epochs 1 --set n_ctx=4 deep=false before_ln_pre=true
    3 VPT-deep     train.py --method vpt --lr 0.002 --warmup-epochs 1 --set n_ctx=4
    4-7            train.py --method upt --set mode=joint | shared | mlp | attention
(Row 1 starts from the phrase, joint's text prompts at random.) Where the towers differ in depth, the deeper one's extra
sets carry tokens that the other does not use. The prompts stand behind the patches: without positions any place is one.

Copy this file and clip_min.py anywhere. B images, K classes, N patches, D and Dt widths of the towers, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import UserError, tokenize


class UPT(nn.Module):
    """mode: "attention" (UPT), "mlp" (theta is two linear layers per token), "shared" (no theta, the same tokens to
    both towers) or "joint" (CoOp and VPT side by side). preset: "paper" or "released", see above.

    depth_text, depth_visual: how many layers get prompts of their own, None for the preset's (all, or one).
    text_scale multiplies the text prompts. Learns on ViT-B: attention 2,021,120 (released 1,976,064), mlp 968,448,
    shared 418,560, joint 38,912.
    """

    # UPT, Appendix B; warm-up, crops and epochs are CoOp's, on whose code it is built.
    recipe = dict(
        optimizer="sgd", lr=0.002, warmup_epochs=1, batch_size=32, crop_scale=(0.08, 1.0),
        epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": {"epochs": 50}},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, mode="attention", preset="paper", n_text=4,
                 n_visual=4, depth_text=None, depth_visual=None, heads=1, dropout=0.1, text_scale=1.0):
        super().__init__()
        if mode not in ("attention", "mlp", "shared", "joint") or preset not in ("paper", "released"):
            raise UserError(f"mode is {mode} and preset {preset}: choose attention, mlp, shared or joint, and paper or "
                            "released.")
        if min(n_text, n_visual) < 1 or (mode == "shared" and n_text != n_visual):
            raise UserError(f"n_text is {n_text} and n_visual {n_visual}: choose 1 or more, and equal if mode=shared.")
        self.clip, self.mode, self.n_text, self.text_scale = clip.requires_grad_(False), mode, n_text, text_scale
        self.released = preset == "released"
        text_layers, visual_layers = len(clip.text.blocks), len(clip.visual.blocks)
        if depth_text is None:
            depth_text = 1 if self.released or mode == "joint" else text_layers
        if depth_visual is None:
            depth_visual = 1 if self.released else visual_layers
        if not (1 <= depth_text <= text_layers and 1 <= depth_visual <= visual_layers):
            raise UserError(f"depth_text is {depth_text} and depth_visual {depth_visual}: choose 1 to {text_layers} "
                            f"and 1 to {visual_layers}.")
        self.depth_text, self.depth_visual = depth_text, depth_visual

        names = [name.replace("_", " ") for name in classnames]
        self.prompts = [f"[{n_text} vectors] {name}." for name in names]  # for people to read
        tokens = tokenize([" ".join(["X"] * n_text) + f" {name}." for name in names])
        shared, own, eot = clip.text.embed(tokens.to(clip.logit_scale.device))  # (1, >=1+n_text, Dt), (K, S, Dt), (K,)
        for key, value in dict(shared=shared, own=own, eot=eot).items():
            self.register_buffer(key, value, persistent=False)

        if heads < 1 or shared.shape[-1] % heads or not 0 <= dropout < 1:
            raise UserError(f"heads is {heads} and dropout {dropout}: choose a divisor of {shared.shape[-1]}, and "
                            "0 to 1.")
        width, visual_width, depth = shared.shape[-1], len(clip.visual.class_embedding), max(depth_text, depth_visual)

        def normal(*shape):
            return nn.Parameter(shared.new_empty(shape).normal_(std=0.02))

        if mode == "joint":
            self.ctx = normal(depth_text, n_text, width)
            self.visual_prompts = normal(depth_visual, n_visual, visual_width)
            return
        self.unified = normal(depth, n_text if mode == "shared" else n_text + n_visual, width)
        self.to_visual = nn.Linear(width, visual_width)
        if mode == "attention":
            self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
            self.ln_1, self.ln_2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        if mode != "shared":
            hidden = [nn.ReLU(), nn.Dropout(dropout)] if mode == "attention" else [nn.ReLU()]
            self.ffn = nn.Sequential(nn.Linear(width, width), *hidden, nn.Linear(width, width))
        self.to(shared.device)

    def unify(self):
        """-> text prompts (depth, n_text, Dt), visual prompts (depth, n_visual, D): theta, evaluated once."""
        if self.mode == "joint":
            return self.ctx * self.text_scale, self.visual_prompts
        u = self.unified  # (depth, n_text + n_visual, Dt)
        if self.mode == "shared":
            return u * self.text_scale, self.to_visual(u)
        if self.mode == "mlp":
            u = self.ffn(u)
        elif self.released:
            one = u.flatten(0, 1).unsqueeze(1)  # (depth * n, 1, Dt): every token is a sequence of its own
            attended = self.attention(one, one, one, need_weights=False)[0].view_as(u)
            h = self.ln_1(u + self.dropout(attended))
            u = h + self.dropout(self.ffn(self.ln_2(h)))
        else:
            u_prime = self.attention(u, u, u, need_weights=False)[0] + self.ln_1(u)  # Eq. 5, attention within a layer
            y = self.ln_2(u_prime)
            u = self.ffn(y) + y
        return u[:, : self.n_text] * self.text_scale, self.to_visual(u[:, self.n_text :])

    def encode_text(self):
        """-> (K, E), not normalised. For evaluation: keeps the visual prompts that features(images, text) then uses."""
        text, visual = self.unify()
        self.kept = (visual.detach(),)  # a tuple, since nn.Module would register a tensor
        return self.encode_prompts(text)

    def encode_prompts(self, prompts):
        """Text prompts (depth, n_text, Dt) -> (K, E)."""
        text, shared, own, m = self.clip.text, self.shared, self.own, self.n_text
        for layer, block in enumerate(text.blocks):
            if layer < self.depth_text:  # only the shared beginning is rewritten: nothing per class is computed again
                ctx = prompts[layer] if layer else prompts[0] + text.positional_embedding[1 : 1 + m]
                shared = torch.cat([shared[:, :1], ctx.unsqueeze(0), shared[:, 1 + m :]], dim=1)
            shared, own = block(shared, own, self.eot)
        return text.project(own)

    def encode_image(self, images, prompts):
        """prompts (depth, n_visual, D) -> (B, E)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        n = x.shape[1]
        if self.released:  # the first in front of ln_pre, which works token by token
            prompts = torch.cat([visual.ln_pre(prompts[:1]), prompts[1:]])
        for layer, block in enumerate(visual.blocks):
            if layer < self.depth_visual:
                x = torch.cat([x[:, :n], prompts[layer].expand(len(x), -1, -1)], dim=1)  # Eq. 4
            x = block(x)
        return visual.project(x)

    def features(self, images, text=None):
        """images (B, 3, R, R), text of the last encode_text(), or None to compute it -> z (B, E), text (K, E)."""
        if text is not None:
            return self.encode_image(images, *self.kept), text
        prompts, visual = self.unify()
        return self.encode_image(images, visual), self.encode_prompts(prompts)

    def forward(self, images, text=None):
        """-> logits (B, K)."""
        return self.clip.logits(*self.features(images, text))  # Eq. 1

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar cross-entropy."""
        return F.cross_entropy(self(images), labels)


def intra_class_variance(features, labels):
    """Var_v of Appendix A, Eq. 6-7: image features (n, E), labels (n,) -> mean over classes of their variance.

    Features are made unit here and squared distances summed over the dimensions; the paper prints neither.
    """
    features = F.normalize(features.float(), dim=-1)
    classes = [features[labels == c] for c in labels.unique()]
    return torch.stack([(x - x.mean(dim=0)).square().sum(dim=1).mean() for x in classes]).mean()


def inter_class_variance(text):
    """Var_t of Appendix A, Eq. 8: text features (K, E), made unit -> their variance over the classes."""
    text = F.normalize(text.float(), dim=-1)
    return (text - text.mean(dim=0)).square().sum(dim=1).mean()
