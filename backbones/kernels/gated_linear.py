"""Gated linear attention: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024, equations 3 and 4.

S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, S_0 = 0;  o_t = e^-1/2 S_t^T q_t (token t sees itself).

q, k and g (N, heads, T, e), v (N, heads, T, f) -> (N, heads, T, f), S (e, f); g <= 0 is the logarithm of the decay.
The torch paths keep S in float32 or better. fla's products run in TF32 where the inputs are float32, some 1e-3 relative to
the reference, so unless forced it is taken for them only where one of PyTorch's flags allows TF32, as its default does for
convolutions. The kernel that DiG's authors called, fla's earlier fused_chunk_gla, kept its products in float32.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.kernels.op import Choice, Op
from backbones.kernels.precision import at_least_float32

CHUNK = 32
LIMIT = 40.0  # exp(40) squared is far from float32's end; a chunk that decays further in either half is not factored


@at_least_float32
def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The recurrence, token by token."""
    q, state, out = q * q.shape[-1] ** -0.5, 0.0, []
    for t in range(q.shape[2]):
        state = (
            g[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        )  # (N, h, e, f)
        out.append(q[:, :, t, None] @ state)  # (N, h, 1, f)
    return torch.cat(out, dim=2)


@at_least_float32
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Matrix products inside chunks of 32 tokens, one step of the recurrence from chunk to chunk (section 4)."""
    tokens = q.shape[2]
    q, k, v, g = (_chunks(x) for x in (q * q.shape[-1] ** -0.5, k, v, g))  # (N, h, T/C, C, e), v: f
    b = g.cumsum(dim=-2)  # decay since the chunk began
    last = b[..., -1:, :]
    update = (k * (last - b).exp()).mT @ v  # (N, h, T/C, e, f)
    decay, state, states = last.exp().mT, torch.zeros_like(update[:, :, 0]), []
    for i in range(update.shape[2]):
        states.append(state)
        state = decay[:, :, i] * state + update[:, :, i]
    inside = _factored if _mild(b) else _halved
    out = inside(q, k, v, b) + (q * b.exp()) @ torch.stack(states, dim=2)  # (N, h, T/C, C, f)
    return out.flatten(2, 3)[:, :, :tokens]


def _chunks(x: Tensor) -> Tensor:
    """Whole chunks, the last filled with tokens that neither decay nor add."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK))


def _middle(b: Tensor) -> Tensor:
    return b[..., CHUNK // 2 - 1 : CHUNK // 2, :]


def _mild(b: Tensor) -> bool:
    """Whether every half chunk decays little enough for _factored. On a GPU asking would stop the host: it takes what is always right."""
    if b.is_cuda:
        return False
    middle = _middle(b)
    return bool(torch.minimum(middle, b[..., -1:, :] - middle).amin() > -LIMIT)


def _factored(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """exp(b_i - b_j) as a product around the middle of the chunk: fast, and overflows where the decay is strong."""
    b = b - _middle(b)
    return ((q * b.exp()) @ (k * (-b).exp()).mT).tril() @ v


def _halved(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The same by halves: late queries see early keys through the point between them, so that no exponent is positive."""
    if q.shape[-2] == 1:
        return (q * k).sum(dim=-1, keepdim=True) * v
    q, k, v, b = (x.unflatten(-2, (2, -1)) for x in (q, k, v, b))
    (q2, b2), (k1, v1, b1) = (x[..., 1, :, :] for x in (q, b)), (x[..., 0, :, :] for x in (k, v, b))
    between = b1[..., -1:, :]
    across = ((q2 * (b2 - between).exp()) @ (k1 * (between - b1).exp()).mT) @ v1
    early, late = _halved(q, k, v, b).unbind(dim=-3)
    return torch.cat([early, late + across], dim=-2)


def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    out, _ = chunk_gla(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v, g))
    )  # its layout is (N, T, heads, e)
    return out.transpose(1, 2)


@cache
def _fla_installed() -> bool:
    try:
        from fla.ops.gla import chunk_gla  # noqa: F401
    except ImportError:
        return False
    return True


def _fla_supports(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
    return (
        q.is_cuda and q.dtype in (torch.float16, torch.bfloat16, torch.float32) and _fla_installed()
    )


def _fla_pays(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
    return (
        q.dtype != torch.float32
        or torch.backends.cuda.matmul.allow_tf32
        or torch.backends.cudnn.allow_tf32
    )


def shape(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What comes out on the meta device, where there is nothing to compute."""
    return torch.empty_like(v)


def macs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> int:
    """Two an element of the state and token, as the recurrence has them: decay and update, and the query's product."""
    return 2 * q.numel() * v.shape[-1]


gated_linear = Op(
    "gated_linear",
    [
        Choice("shape", shape, lambda q, *rest: q.is_meta),
        Choice("fla", fla, _fla_supports, _fla_pays),
        Choice("chunked", chunked),
        Choice("reference", reference),
    ],
    macs,
)
