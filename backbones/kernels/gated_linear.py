"""Gated linear attention.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024,
equations 3 and 4. With S_0 = 0, and token t seeing itself:

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
    o_t = e^-1/2 S_t^T q_t

q, k and g (N, heads, T, e), v (N, heads, T, f) -> (N, heads, T, f), with S (e, f) and g <= 0 the
logarithm of the decay.

The torch choices keep S in float32 or better. fla's products run in TF32 for float32 inputs, some
1e-3 from the reference. Unless forced, it is then taken only if a flag of PyTorch allows TF32, as
its default does for convolutions. The kernel that DiG's authors called, fla's earlier
fused_chunk_gla, kept its products in float32.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.launch import is_fake
from backbones.kernels.op import Choice, Op, meta_choice
from backbones.kernels.precision import at_least_float32

CHUNK = 32
# exp(40) squared is far below float32's largest number. A chunk whose halves decay more than
# exp(-40) is not factored.
LIMIT = 40.0


@at_least_float32
def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Run the recurrence token by token."""
    q = q * q.shape[-1] ** -0.5
    state: Tensor | float = 0.0
    out = []
    for t in range(q.shape[2]):
        decayed = g[:, :, t, :, None].exp() * state
        state = decayed + k[:, :, t, :, None] * v[:, :, t, None]  # (N, h, e, f)
        out.append(q[:, :, t, None] @ state)  # (N, h, 1, f)
    return torch.cat(out, dim=2)


@at_least_float32
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Multiply matrices inside chunks; take one step of the recurrence per chunk (section 4)."""
    tokens = q.shape[2]
    q, k, v, g = (_split_chunks(x) for x in (q * q.shape[-1] ** -0.5, k, v, g))  # (N, h, T/C, C, .)
    b = g.cumsum(dim=-2)  # logarithm of the decay since the chunk began
    last = b[..., -1:, :]

    # Walk over the chunks; each adds its update to the state that it received.
    update = (k * (last - b).exp()).mT @ v  # (N, h, T/C, e, f)
    decay = last.exp().mT
    state = torch.zeros_like(update[:, :, 0])
    states = []
    for i in range(update.shape[2]):
        states.append(state)
        state = decay[:, :, i] * state + update[:, :, i]

    # A token sees the earlier tokens of its chunk, and the state of all chunks before.
    attend = _attend_factored if _decays_mildly(b) else _attend_by_halves
    out = attend(q, k, v, b) + (q * b.exp()) @ torch.stack(states, dim=2)  # (N, h, T/C, C, f)
    return out.flatten(2, 3)[:, :, :tokens]


def _split_chunks(x: Tensor) -> Tensor:
    """Split tokens into chunks; the last one is filled with tokens that neither decay nor add."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))


def _middle(b: Tensor) -> Tensor:
    """Return the decay in the middle of each chunk."""
    return b[..., CHUNK // 2 - 1 : CHUNK // 2, :]


def _decays_mildly(b: Tensor) -> bool:
    """Tell whether every half chunk decays little enough for `_attend_factored`.

    On a GPU the answer would stop the host, so it is no there, which is always right.
    """
    if b.is_cuda:
        return False
    middle = _middle(b)
    return bool(torch.minimum(middle, b[..., -1:, :] - middle).amin() > -LIMIT)


def _attend_factored(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Factor exp(b_i - b_j) around the middle of the chunk; strong decays overflow."""
    b = b - _middle(b)
    return ((q * b.exp()) @ (k * (-b).exp()).mT).tril() @ v


def _attend_by_halves(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Attend within each half, and from the late half to the early one.

    Late queries see early keys through the point between them, so no exponent is positive.
    """
    if q.shape[-2] == 1:
        return (q * k).sum(dim=-1, keepdim=True) * v

    # Split the tokens into an early and a late half.
    q, k, v, b = (x.unflatten(-2, (2, -1)) for x in (q, k, v, b))
    late_q, late_b = (x[..., 1, :, :] for x in (q, b))
    early_k, early_v, early_b = (x[..., 0, :, :] for x in (k, v, b))

    between = early_b[..., -1:, :]
    weights = (late_q * (late_b - between).exp()) @ (early_k * (between - early_b).exp()).mT
    across = weights @ early_v
    early, late = _attend_by_halves(q, k, v, b).unbind(dim=-3)
    return torch.cat([early, late + across], dim=-2)


def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Call flash-linear-attention, whose layout is (N, T, heads, e)."""
    from fla.ops.gla import chunk_gla

    out, _ = chunk_gla(*(x.transpose(1, 2).contiguous() for x in (q, k, v, g)))
    return out.transpose(1, 2)


@cache
def _fla_installed() -> bool:
    try:
        from fla.ops.gla import chunk_gla  # noqa: F401
    except ImportError:
        return False
    return True


def _fla_supports(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return q.is_cuda and q.dtype in dtypes and not is_fake(q) and _fla_installed()


def _fla_pays(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
    return (
        q.dtype != torch.float32
        or torch.backends.cuda.matmul.allow_tf32
        or torch.backends.cudnn.allow_tf32
    )


def count_macs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> int:
    """Count two for each element of the state and token: the update, and the query's product."""
    return 2 * q.numel() * v.shape[-1]


gated_linear = Op(
    "gated_linear",
    [
        meta_choice(like=2),
        Choice("fla", fla, _fla_supports, _fla_pays),
        Choice("chunked", chunked),
        Choice("reference", reference),
    ],
    count_macs,
)
