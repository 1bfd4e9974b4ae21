"""Scaled dot-product attention: softmax(q k^T / sqrt(e) + bias) v.

q (N, heads, T_q, e), k and v (N, heads, T_k, e), bias broadcastable to (N, heads, T_q, T_k) or None -> (N, heads, T_q, e).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.op import Choice, Op


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Explicit products, with the queries scaled: what the paper's counter sees and its ablations time."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


@cache
def _flash_installed() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def _flash_supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    return (
        q.is_cuda
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and bias is None
        and _flash_installed()
    )


attention = Op(
    "attention",
    [Choice("flash", flash, _flash_supports), Choice("sdpa", sdpa), Choice("reference", reference)],
)
