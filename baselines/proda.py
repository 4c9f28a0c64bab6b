"""x"""

import torch
import torch.nn.functional as F
from torch import nn

from baselines.context_prompt import SGD, ContextPrompt
from clip_min import Method, UserError, encode, full_precision, tokenize


class ProDA(Method):
    """A distribution of classifiers from a collection of prompts. Learns n_prompts * n_ctx * D numbers: 262,144.

        w_c(n) = g(t_c(n)) made unit, n = 1 .. N;   w ~ Normal(mu, Sigma),  mu_c = mean over n of w_c(n)
        L_upper = - log( exp(z.mu_y / tau) / sum_c exp(z.mu_c / tau + z^T A_c z / (2 tau^2)) )
        A_c     = Sigma_cc + Sigma_yy - Sigma_cy - Sigma_yc;   z^T A_c z is the variance of z.(w_c - w_y) over n
        L_so    = mean over n != m of |cos(g(P_n), g(P_m))|,  P_n = [SOS, v_1(n) .. v_M(n), ".", EOT], without a name
        L       = L_upper + lam L_so;   a picture's class is that of the largest z.mu_c over all N prompts

        v_1(n) .. v_M(n)   ctx   (N, M, D)   learned

    A quarter of the prompts has the class name in front of the context, a quarter in its middle, the rest behind it.
    Each step draws `n_per_step` prompts for L_upper, which bounds the expected cross-entropy; L_so takes all. Left open
    and chosen: variances are divided by the number drawn, contexts begin as CoOp's, there is no warm-up.
    """

    recipe = SGD | dict(lr=0.001, warmup_epochs=0, batch_size=20, epochs=100)  # its Section 4; the rest is CoOp's
    contexts = ContextPrompt.contexts  # (N, M, D)

    def __init__(self, clip, classnames, templates=("a photo of a {}.",), *, n_prompts=32, n_per_step=4, n_ctx=16,
                 lam=0.1):
        if n_ctx < 1 or not 2 <= n_per_step <= n_prompts:
            raise UserError(f"n_ctx is {n_ctx}, n_per_step {n_per_step} and n_prompts {n_prompts}: choose 1 or more "
                            "contexts, and 2 to n_prompts prompts per step.")
        self.n_prompts, self.n_per_step, self.n_ctx, self.lam = n_prompts, n_per_step, n_ctx, lam
        self.in_front = 0, n_ctx // 2, n_ctx  # context vectors in front of the name, for the three places
        self.place = [min(4 * n // n_prompts, 2) for n in range(n_prompts)]  # of the name in each prompt
        super().__init__(clip, classnames, templates)  # calls set_classes, which reads n_ctx
        nameless = tokenize(".")[:, :3].to(self.eot.device)  # SOS, ".", EOT
        self.nameless = nn.Buffer(clip.text.token_embedding(nameless), persistent=False)  # (1, 3, D)
        self.ctx = nn.Parameter(self.words.new_empty(n_prompts, n_ctx, self.words.shape[-1]).normal_(std=0.02))

    def set_classes(self, classnames):
        """Embed "X .. X CLASS." for every class, and find how a prompt reads it, for each place of the name."""
        super().set_classes(classnames)
        m, device = self.n_ctx, self.zero_shot.device
        self.prompt_texts = [f"[{self.n_prompts} x {m} vectors] {name}." for name in self.classnames]
        tokens = tokenize([f"{' '.join(['X'] * m)} {name}." for name in self.classnames]).to(device)
        self.eot = nn.Buffer(tokens.argmax(dim=-1), persistent=False)  # (K,)
        length = int(self.eot.max()) + 1  # nothing behind the end mark is ever read
        self.words = nn.Buffer(self.clip.text.token_embedding(tokens[:, :length]), persistent=False)  # (K, L, D)
        context, ends = list(range(1, 1 + m)), [1 + m + len(encode(name)) for name in self.classnames]  # of the names
        order = [[[0, *context[:in_front], *range(1 + m, end), *context[in_front:], *range(end, length)]
                  for end in ends] for in_front in self.in_front]
        self.order = nn.Buffer(torch.tensor(order, device=device), persistent=False)  # (3, K, L)

    def encode_prompt(self, n):
        """The number of a prompt -> w_c(n) of all classes (K, E), unit."""
        text, place = self.clip.text, self.place[n]
        ctx = self.ctx[n].expand(len(self.words), -1, -1)  # (K, M, D)
        x = torch.cat([self.words[:, :1], ctx, self.words[:, 1 + self.n_ctx :]], dim=1)
        x = x.take_along_dim(self.order[place].unsqueeze(-1), dim=1)
        x = x + text.positional_embedding[: x.shape[1]]  # (K, L, D)
        shared = 1 + self.in_front[place]  # what the prompt begins with in all classes
        return F.normalize(text(x[:1, :shared], x[:, shared:], self.eot - shared).float(), dim=-1)

    def encode_text(self):
        """-> mu (K, E) of all prompts, not normalised."""
        return sum(self.encode_prompt(n) for n in range(self.n_prompts)) / self.n_prompts

    def forward(self, images, text=None):
        """images (B, 3, R, R), text (K, E) or None to compute it -> z.mu / tau (B, K): mu is not made unit."""
        text = self.encode_text() if text is None else text
        z = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        with full_precision(images.device):
            return self.clip.logit_scale.exp() * z @ text.T

    def loss(self, images, labels, epoch=0):
        """labels (B,) -> scalar, L_upper of the prompts drawn + lam L_so."""
        drawn = torch.randperm(self.n_prompts)[: self.n_per_step].tolist()
        weights = torch.stack([self.encode_prompt(n) for n in drawn], dim=-1)  # (K, E, drawn)
        z = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        with full_precision(images.device):
            scores = self.clip.logit_scale.exp() * torch.einsum("be,ken->bkn", z, weights)  # z.w_c(n) / tau
        margins = scores - scores.take_along_dim(labels[:, None, None], dim=1)  # z.(w_c(n) - w_y(n)) / tau
        logits = scores.mean(dim=-1) + margins.var(dim=-1, correction=0) / 2  # (B, K)
        return F.cross_entropy(logits, labels) + self.lam * self.similarity()

    def similarity(self):
        """-> L_so, scalar."""
        text, n = self.clip.text, self.n_prompts
        sos, end = self.nameless.expand(n, -1, -1).split([1, 2], dim=1)
        x = torch.cat([sos, self.ctx, end], dim=1)  # (N, 1+M+2, D)
        x = x + text.positional_embedding[: x.shape[1]]
        eot = torch.full((n,), x.shape[1] - 2, device=x.device)  # in x without SOS, which all share
        features = text(x[:1, :1], x[:, 1:], eot).float()  # (N, E)
        cosines = F.cosine_similarity(features.unsqueeze(0), features.unsqueeze(1), dim=-1).abs()  # (N, N)
        return (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))
