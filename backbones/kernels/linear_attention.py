"""Normalised linear attention that sees all tokens (Han et al., "FLatten Transformer", equation 3).

o_i = sum_j (q_i . k_j) v_j / (sum_j q_i . k_j + T eps).
q and k hold features, none of them negative; q, k and v (N, heads, T, e) -> (N, heads, T, e).
"""

from __future__ import annotations

from torch import Tensor

from backbones.kernels.op import Choice, Op

EPS = 1e-6


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write out the weights of all pairs of tokens."""
    weights = q @ k.transpose(-2, -1) / k.shape[-2]  # (N, h, T, T)
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + EPS)


def associated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multiply keys and values first, which is linear in T; each takes half of 1 / T."""
    normaliser = 1 / (q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) + EPS)  # (N, h, T, 1)
    root = k.shape[-2] ** -0.5
    return q @ ((k * root).transpose(-2, -1) @ (v * root)) * normaliser


linear_attention = Op(
    "linear_attention", [Choice("associated", associated), Choice("reference", reference)]
)
