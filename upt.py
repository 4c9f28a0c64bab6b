"""UPT: one set of prompts for both towers, mixed by a small Transformer layer before it is split between them.

Zang, Li, Zhou, Huang, Loy: Unified Vision and Language Prompt Learning, arXiv:2210.07225

    U'  = SA(U) + LN(U);   U^  = FFN(LN(U')) + LN(U') = {U^_t, U^_v}                                  Eq. 5
    text tower, layer i:   the tokens 1 .. M of every prompt are U^_t of U^i                          Eq. 2
    image tower, layer i:  [c, _, Z] = l_i([c, V, Z]),  V = U^_v of U^i, times W_p, plus b            Eq. 4
    p(y = i | x) = softmax_i( cos(w_i, z) / tau ), trained with cross-entropy                         Eq. 1

    U^i     unified[i]  (M + P, Dt)                    learned, from a normal distribution, standard deviation 0.02
    theta   self_attention, ffn, ln_1, ln_2            learned, one for all layers
    W_p, b  to_visual  Dt -> D                         learned, one for all layers
    c, Z    class token (B, D), patches (B, N, D)      w_i  classifier (E,)      z  image feature (E,)

The paper prints Eq. 5 and "layer-wise prompts". It leaves open, and here is chosen:
  * Text width 512 meets visual width 768 in W_p, as in the author's code. The first M tokens of U^ are the text's.
  * M and P are 4. theta has two LayerNorms, the second used twice, one head, an FFN of width Dt and dropout 0.1.
  * A deep text prompt overwrites the hidden states at its places. Warm-up and epochs are CoOp's.
  * Templates are the data set's, which the published numbers need. Appendix B names one, "a photo of a".
The only code there is, a later trainer of the author's, is another method: preset="released". It has one set U, whose
prompts travel on through all layers, in front of ln_pre in the image tower. Its block is h = LN(U + SA(U)), U^ = h +
FFN(LN(h)). The axes of its attention are swapped, so that it sees one token at a time: the two modalities meet only in
the weights of theta, and the query and key weights never learn.

Eq. 5 ends in LN, so its prompts have unit variance, 25 to 50 times the size of a word embedding. The literal form is
the default; text_scale=0.05 mends the size.

To use it elsewhere, copy this file, clip_min.py and assets/bpe_merges.txt.gz.
B images, K classes, N patches, M = n_ctx, P = n_visual, D and Dt widths of the towers, E joint width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_min import Method, UserError


class UPT(Method):
    """CLIP with unified prompts for both towers. Learns 2,021,120 numbers on ViT-B by default.

    `mode` is what makes the prompts of the towers out of the unified ones, as in the paper's Table 2:
      "attention"  theta, a Transformer layer: UPT               (1,976,064 with preset="released")
      "mlp"        two linear layers, on each token alone                              (968,448)
      "shared"     nothing: both towers get the same tokens                            (418,560)
      "joint"      there are no unified prompts, but CoOp's and VPT's side by side      (38,912)
    `preset` is "paper" or "released", see above. `n_ctx` text prompts enter each of the first `depth_text` layers and
    `n_visual` visual prompts each of the first `depth_visual`. None means the preset's depth, all layers or one. Where
    the depths differ, one tower leaves its part of the deeper sets unused. `text_scale` multiplies the text prompts.
    """

    # UPT, Appendix B; warm-up, crops and epochs are CoOp's, on whose code it is built.
    recipe = dict(
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, lr=0.002, warmup_epochs=1, batch_size=32,
        crop_scale=(0.08, 1.0), epochs={1: 50, 2: 100, 4: 100, 8: 200, 16: 200}, datasets={"imagenet": dict(epochs=50)},
    )

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, mode="attention", preset="paper", n_ctx=4,
                 n_visual=4, depth_text=None, depth_visual=None, heads=1, dropout=0.1, text_scale=1.0):
        if mode not in ("attention", "mlp", "shared", "joint") or preset not in ("paper", "released"):
            raise UserError(f"mode is {mode}, preset {preset}: choose attention, mlp, shared, joint; paper, released.")
        if min(n_ctx, n_visual) < 1 or (mode == "shared" and n_ctx != n_visual):
            raise UserError(f"n_ctx is {n_ctx} and n_visual {n_visual}: choose 1 or more, and equal if mode=shared.")
        super().__init__(clip, classnames, templates)
        self.mode, self.released, self.n_ctx, self.text_scale = mode, preset == "released", n_ctx, text_scale
        self.embed_prompts()
        text_layers, visual_layers = len(clip.text.blocks), len(clip.visual.blocks)
        if depth_text is None:
            depth_text = 1 if self.released or mode == "joint" else text_layers
        if depth_visual is None:
            depth_visual = 1 if self.released else visual_layers
        if not (1 <= depth_text <= text_layers and 1 <= depth_visual <= visual_layers):
            raise UserError(f"depth_text is {depth_text} and depth_visual {depth_visual}: choose 1 to {text_layers} "
                            f"and 1 to {visual_layers}.")
        self.depth_text, self.depth_visual = depth_text, depth_visual
        width, visual_width = clip.text.token_embedding.embedding_dim, len(clip.visual.class_embedding)
        if heads < 1 or width % heads or not 0 <= dropout < 1:
            raise UserError(f"heads is {heads} and dropout {dropout}: choose a divisor of {width} and 0 to below 1.")

        def normal(*shape):
            return nn.Parameter(self.zero_shot.new_empty(shape).normal_(std=0.02))

        if mode == "joint":
            self.ctx = normal(depth_text, n_ctx, width)
            self.visual_prompts = normal(depth_visual, n_visual, visual_width)
            return
        self.unified = normal(max(depth_text, depth_visual), n_ctx if mode == "shared" else n_ctx + n_visual, width)
        self.to_visual = nn.Linear(width, visual_width)
        if mode == "attention":
            self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
            self.ln_1, self.ln_2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
            self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        if mode == "mlp":
            self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.to(self.zero_shot.device)

    def embed_prompts(self):  # "X .. X CLASS." of all classes, (C + K*S, Dt), and their Layout
        prompts, self.layout = self.clip.embed_prompts(self.classnames, self.n_ctx)
        self.prompts = nn.Buffer(prompts, persistent=False)

    @property
    def prompt_texts(self):  # as Method's, without a draw of dropout for contexts()
        return [f"[{self.n_ctx} vectors] {name}." for name in self.classnames]

    def tower_prompts(self):
        """-> text prompts (depth, M, Dt), visual prompts (depth, P, D)."""
        if self.mode == "joint":
            return self.ctx * self.text_scale, self.visual_prompts
        u = self.unified  # (depth, M+P, Dt)
        if self.mode == "shared":
            return u * self.text_scale, self.to_visual(u)
        if self.mode == "mlp":
            u = self.ffn(u)
        elif self.released:
            one = u.flatten(0, 1).unsqueeze(1)  # (depth * (M+P), 1, Dt): every token is a sequence of its own
            attended = self.self_attention(one, one, one, need_weights=False)[0].view_as(u)
            h = self.ln_1(u + self.dropout(attended))
            u = h + self.dropout(self.ffn(self.ln_2(h)))
        else:
            u_prime = self.self_attention(u, u, u, need_weights=False)[0] + self.ln_1(u)  # Eq. 5, within a layer
            y = self.ln_2(u_prime)
            u = self.ffn(y) + y  # Eq. 5
        return u[:, : self.n_ctx] * self.text_scale, self.to_visual(u[:, self.n_ctx :])

    def contexts(self):  # those of the first layer, (M, Dt)
        return self.tower_prompts()[0][0]

    def encode_text(self):
        """-> (K, E), not normalised."""
        return self.encode_text_with(self.tower_prompts()[0])

    def encode_image(self, images, text=None):
        """images (B, 3, R, R) -> (B, E), not normalised."""
        return self.encode_image_with(self.tower_prompts()[1], images)

    def forward(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> logits (B, K)."""
        text_prompts, visual_prompts = self.tower_prompts()  # once: both towers see the same dropout
        text = self.encode_text_with(text_prompts) if text is None else text
        return self.clip.logits(self.encode_image_with(visual_prompts, images), text)  # Eq. 1

    def encode_text_with(self, prompts):
        """Text prompts (depth, M, Dt) -> (K, E)."""
        tower, x, m = self.clip.text, self.prompts, self.n_ctx  # x (C + K*S, Dt)
        for layer, block in enumerate(tower.blocks):
            if layer < self.depth_text:  # the common tokens 1 .. M are rewritten, once for all classes           Eq. 2
                ctx = prompts[layer] if layer else prompts[0] + tower.positional_embedding[1 : 1 + m]
                x = torch.cat([x[:1], ctx, x[1 + m :]])
            x = block(x, self.layout)
        return tower.project(x)

    def encode_image_with(self, prompts, images):
        """Visual prompts (depth, P, D), images (B, 3, R, R) -> (B, E)."""
        visual = self.clip.visual
        x = visual.embed(images)  # (B, 1+N, D)
        if self.released:  # in front of ln_pre, which works token by token
            prompts = torch.cat([visual.ln_pre(prompts[:1]), prompts[1:]])
        deepest = self.depth_visual - 1
        for block, p in zip(visual.blocks[:deepest], prompts, strict=False):
            x = block(x, p)  # p (P, D)                                                                       Eq. 4
        x = torch.cat([x, prompts[deepest].expand(len(x), -1, -1)], dim=1)  # the last ones travel on: no others follow
        for block in visual.blocks[deepest:]:
            x = block(x)
        return visual.project(x)


# Appendix A. Features are made unit and squared distances are summed over the dimensions: the paper prints neither.
def intra_class_variance(features, labels):
    """Var_v, Eq. 6-7: image features (n, E), labels (n,) -> the mean over the classes of their variance."""
    features = F.normalize(features.float(), dim=-1)
    classes = [features[labels == c] for c in labels.unique()]
    return torch.stack([(x - x.mean(dim=0)).square().sum(dim=1).mean() for x in classes]).mean()


def inter_class_variance(text):
    """Var_t, Eq. 8: text features (K, E) -> their variance over the classes."""
    text = F.normalize(text.float(), dim=-1)
    return (text - text.mean(dim=0)).square().sum(dim=1).mean()


@torch.no_grad()
def variances(method, batches, autocast):
    """batches of (images, labels) -> Var_v of the method's image features and Var_t of its classifier, by name."""
    method.eval()
    with autocast:
        text = method.encode_text()
        seen = [(method.encode_image(images, text), labels) for images, labels in batches]
    features, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return {"image_within_classes": intra_class_variance(features, labels).item(),
            "text_between_classes": inter_class_variance(text).item()}
