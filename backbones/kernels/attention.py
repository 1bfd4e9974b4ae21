"""Scaled dot-product attention: softmax(q k^T / sqrt(e) + bias) v.

q (N, heads, T_q, e), k and v (N, heads, T_k, e) -> (N, heads, T_q, e).
bias is None, or broadcasts to (N, heads, T_q, T_k).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels import rows, rows_attend
from backbones.kernels.launch import is_fake
from backbones.kernels.op import Choice, Op, never


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute explicit products, as the paper's counter sees them and its ablations time them."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, T_q, T_k)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call PyTorch's fused attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call the fused attention that PyTorch takes for float32 on a GPU, by its own name."""
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, bias, differentiates)[0]


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call flash-attn, whose layout is (N, T, heads, e)."""
    from flash_attn import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return out.transpose(1, 2)


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
        and not is_fake(q)
        and _flash_installed()
    )


def _efficient_supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    return q.is_cuda or q.is_meta


# On the meta device PyTorch would write attention out; "efficient" keeps it whole, by force.
attention = Op(
    "attention",
    [
        Choice("flash", flash, _flash_supports),
        Choice("efficient", efficient, _efficient_supports, pays=never),
        Choice("rows", rows_attend.attend, rows_attend.supports_attend, rows.pays),
        Choice("sdpa", sdpa),
        Choice("reference", reference),
    ],
)


def _attend_to_channels(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, temperature: Tensor
) -> Tensor:
    cosines = q @ k.transpose(-2, -1) / norm_q / norm_k.transpose(-2, -1)  # (N, heads, e, e)
    return (cosines * temperature).softmax(dim=-1) @ v


def _attend_to_channels_by_rows(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, temperature: Tensor
) -> Tensor:
    # Keys and values must lie alike in memory.
    scaled = q * (temperature / norm_q), k / norm_k, v.contiguous()
    return rows_attend.attend_unscaled(*scaled)


def _rows_attend_to_channels(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> bool:
    return rows_attend.supports_attend(q, k, v)


# Attention among channels by their cosines: q, k and v (N, heads, e, T), norms of queries and keys
# (N, heads, e, 1), temperature (heads, 1, 1) -> as v.
channel_attention = Op(
    "channel_attention",
    [
        Choice("rows", _attend_to_channels_by_rows, _rows_attend_to_channels, rows.pays),
        Choice("reference", _attend_to_channels),
    ],
)


def _part(packed: Tensor) -> tuple[Tensor, ...]:
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


# The queries, keys and values in a linear layer's output: (N, T, 3, heads, e) -> three of
# (N, heads, T, e). Gradients that `rows` writes side by side go on without a copy.
unpack = Op(
    "unpack",
    [
        Choice("rows", rows_attend.unpack, rows.fits, rows.pays),
        Choice("reference", _part),
    ],
)
