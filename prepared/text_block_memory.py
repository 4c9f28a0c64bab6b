"""The proposed TextBlock methods, as they would stand in clip_min.py."""
import math, torch
def forward(self, shared, own, eot):
    h_shared, h_own = self.ln_1(shared), self.ln_1(own)
    k_shared, v_shared = self.attn.key_value(h_shared)  # (1, H, P, 64)
    k_own, v_own = self.attn.key_value(h_own)  # (K, H, S, 64)
    p, s = shared.shape[1], own.shape[1]
    causal = torch.ones(max(p, s), max(p, s), dtype=torch.bool, device=own.device).tril()
    if self.is_last:
        rows = torch.arange(len(own), device=own.device)
        own, h_own = own[rows, eot].unsqueeze(1), h_own[rows, eot].unsqueeze(1)  # (K, 1, D)
        mask = causal[eot, None, None, :s]  # (K, 1, 1, S)
    else:
        mask = causal[:s, :s]
        attended = self.attn(self.attn.query(h_shared), k_shared, v_shared, causal[:p, :p])
        shared = self.add_attention_and_mlp(shared, attended)
    attended = self.attend_to_both(self.attn.query(h_own), k_shared, v_shared, k_own, v_own, mask)
    return shared, self.add_attention_and_mlp(own, attended)

def attend_to_both(self, q, k_shared, v_shared, k_own, v_own, mask):
    """q (K, H, S, 64) looks at the shared tokens and at its own text's -> (K, S, D).

    Attention written out: torch's fused one would need a copy of the shared keys and values for each of the K texts,
    which autograd would keep. Here the queries of all texts meet the shared keys in one product.
    """
    def together(x):  # (K, H, S, n) -> (1, H, K*S, n)
        return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def apart(x):  # (1, H, K*S, n) -> (K, H, S, n)
        return x.squeeze(0).unflatten(1, (len(q), -1)).transpose(0, 1)

    q = q / math.sqrt(q.shape[-1])
    to_shared = apart(together(q) @ k_shared.mT)  # (K, H, S, P): all of them come before the own tokens
    to_own = (q @ k_own.mT).masked_fill(~mask, -math.inf)  # (K, H, S, S)
    weights = torch.cat([to_shared, to_own], dim=-1).softmax(dim=-1)
    w_shared, w_own = weights.split([k_shared.shape[2], k_own.shape[2]], dim=-1)
    x = apart(together(w_shared) @ v_shared) + w_own @ v_own  # (K, H, S, 64)
    return self.attn.out_proj(x.transpose(1, 2).flatten(2))
