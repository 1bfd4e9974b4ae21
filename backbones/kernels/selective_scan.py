"""Mamba's selective scan.

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
section 3. With S states per channel:

    dt = softplus(delta + bias)
    h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t
    y_t = c_t . h_t + d u_t
    out = y silu(z)

u, delta, z (N, D, T), a (D, S) negative, b and c (N, S, T), d and bias (D,) -> (N, D, T).
The state and all sums are float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.launch import is_fake
from backbones.kernels.op import Choice, Op, meta_choice, outside_graphs


def reference(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Run the recurrence token by token."""
    dtype = u.dtype
    u, delta, a, b, c, d, z, bias = _cast_up(u, delta, a, b, c, d, z, bias)
    dt = F.softplus(delta + bias[:, None])
    h = u.new_zeros(*u.shape[:2], a.shape[1])  # (N, D, S)
    ys = []
    for t in range(u.shape[2]):
        decayed = torch.exp(dt[:, :, t, None] * a) * h
        h = decayed + (dt * u)[:, :, t, None] * b[:, None, :, t]
        ys.append((h * c[:, None, :, t]).sum(-1))
    return ((torch.stack(ys, -1) + d[:, None] * u) * F.silu(z)).to(dtype)


def _cast_up(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all tensors to float32, or to float64 if the first one is."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


class _Loop(torch.autograd.Function):
    """A loop over time that keeps its state in place.

    Everything is time-major: (T, N, D) and (T, N, S). The forward pass keeps one state per
    stretch of about sqrt(T) steps, and the backward pass computes a stretch's states again.
    """

    @staticmethod
    def forward(ctx: Any, dt: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """dt and x = dt u (T, N, D), a (D, S), b and c (T, N, S) -> y (T, N, D)."""
        steps = len(dt)
        stride = max(1, int(steps**0.5))
        h = dt.new_zeros(*dt.shape[1:], a.shape[1])
        decay = torch.zeros_like(h)
        y = torch.empty_like(dt)
        kept = []

        # One state in every `stride` is kept, and the backward pass recomputes those between.
        for t in range(steps):
            if t % stride == 0 and any(ctx.needs_input_grad):
                kept.append(h.clone())
            _step(h, decay, dt[t], x[t], a, b[t])
            torch.matmul(h, c[t, :, :, None], out=y[t, :, :, None])

        ctx.save_for_backward(dt, x, a, b, c, *kept)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        dt, x, a, b, c, *kept = ctx.saved_tensors
        grad_dt, grad_x, grad_b, grad_c = (torch.empty_like(tensor) for tensor in (dt, x, b, c))
        # carried is dL/dh_{t-1} through h_t; decay is scratch.
        grad_a, grad_h, carried, decay = (torch.zeros_like(kept[0]) for _ in range(4))
        states = dt.new_empty(ctx.stride + 1, *kept[0].shape)

        # Walk over the stretches from the last to the first.
        for first in range((len(kept) - 1) * ctx.stride, -1, -ctx.stride):
            last = min(first + ctx.stride, len(dt))
            # Compute the stretch's states again: states[i] is the state before step first + i.
            states[0] = kept.pop()
            for i, t in enumerate(range(first, last)):
                _step(states[i + 1].copy_(states[i]), decay, dt[t], x[t], a, b[t])

            # Walk back through the stretch.
            for t in range(last - 1, first - 1, -1):
                i = t - first
                torch.matmul(grad_y[t, :, None], states[i + 1], out=grad_c[t, :, None])
                torch.mul(grad_y[t, :, :, None], c[t, :, None], out=grad_h).add_(carried)  # dL/dh_t
                torch.matmul(grad_h, b[t, :, :, None], out=grad_x[t, :, :, None])
                torch.matmul(x[t, :, None], grad_h, out=grad_b[t, :, None])
                torch.mul(dt[t, :, :, None], a, out=decay).exp_()
                torch.mul(grad_h, decay, out=carried)
                torch.mul(carried, states[i], out=grad_h)  # dL/d(dt_t a)
                torch.sum(decay.copy_(grad_h).mul_(a), -1, out=grad_dt[t])
                grad_a.addcmul_(grad_h, dt[t, :, :, None])
        return grad_dt, grad_x, grad_a.sum(0), grad_b, grad_c


def _step(h: Tensor, decay: Tensor, dt: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """Set h = exp(dt a) h + x b in place; `decay` is scratch."""
    torch.mul(dt[:, :, None], a, out=decay).exp_()
    h.mul_(decay).addcmul_(x[:, :, None], b[:, None])


@outside_graphs
def loop(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Run the recurrence with its state in place, and a backward pass by hand."""
    dtype = u.dtype
    with torch.autocast(u.device.type, enabled=False):
        u, delta, a, b, c, d, z, bias = _cast_up(u, delta, a, b, c, d, z, bias)
        # (T, N, D or S)
        u, delta, b, c, z = (x.permute(2, 0, 1).contiguous() for x in (u, delta, b, c, z))

        # The recurrence runs alone: the skip and the gate need no state.
        dt = F.softplus(delta + bias)
        scanned: tuple[Tensor, ...] = (dt, dt * u, a, b, c)
        if not torch.is_grad_enabled():
            # A parameter asks for its gradient even then, and states would be kept.
            scanned = tuple(x.detach() for x in scanned)
        y = _Loop.apply(*scanned) + d * u
        return (y * F.silu(z)).permute(1, 2, 0).to(dtype)


@outside_graphs
def mamba_ssm(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Call the library mamba-ssm."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, b, c, z = (x.contiguous() for x in (u, delta, b, c, z))
    return selective_scan_fn(
        u, delta, a.float(), b, c, d.float(), z, bias.float(), delta_softplus=True
    )


@outside_graphs
def triton(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Run one Triton kernel forward and one backward."""
    from backbones.kernels.selective_scan_triton import selective_scan as fused_scan

    return fused_scan(u, delta, a, b, c, d, z, bias)


@cache
def _mamba_ssm_installed() -> bool:
    try:
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _on_gpu(u: Tensor, a: Tensor) -> bool:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return u.is_cuda and u.dtype in dtypes and a.shape[1] <= 256


def _mamba_ssm_supports(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> bool:
    same_dtype = all(x.dtype == u.dtype for x in (delta, b, c, z))
    return _on_gpu(u, a) and same_dtype and not is_fake(u) and _mamba_ssm_installed()


def _triton_supports(u: Tensor, delta: Tensor, a: Tensor, *rest: Tensor) -> bool:
    return _on_gpu(u, a) and _triton_installed()


def _count_macs(u: Tensor, delta: Tensor, a: Tensor, *rest: Tensor) -> int:
    """Count two for each state, channel and token: one updates it and one reads it."""
    return 2 * u.numel() * a.shape[1]


selective_scan = Op(
    "selective_scan",
    [
        meta_choice(),
        Choice("mamba_ssm", mamba_ssm, _mamba_ssm_supports),
        Choice("triton", triton, _triton_supports),
        Choice("loop", loop),
        Choice("reference", reference),
    ],
    macs=_count_macs,
)
