"""The selective scan in Triton, forward and backward; shapes and formulas as in selective_scan.py.

A program owns a block of channels of one sample and walks its time in chunks. A chunk is a scan
of the maps h -> a h + b in registers, (BLOCK_D, BLOCK_S, BLOCK_T) at once. Only one state per
chunk reaches memory, from which the backward pass starts. Sums over channels leave one term per
program and are added up outside, without atomics, so gradients are the same in every run.
Positions past the end have dt = 0, which keeps a state as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.kernels.launch import launch

# With 8 warps, a thread has 16 values of each operand of the scan: both operands and the results
# fit the registers.
_BLOCK_T, _STATES, _WARPS = 16, 256, 8


@triton.jit
def _then(a1, b1, a2, b2):
    """Return the map h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), and x above 20 as in torch.

    The quotient undoes the rounding of 1 + e^x near 1.
    """
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(w == 1.0, e, tl.log(w) * (e / (w - 1.0 + (w == 1.0)))))


@triton.jit
def _load(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay(dt, a):
    return tl.exp(dt[:, None, :] * a[:, :, None])


@triton.jit
def _states(x, dt, a, b, h):
    """Return the states h_t (D, S, T) of a chunk that starts from h (D, S).

    x = dt u and dt (D, T), a (D, S), b (S, T).
    """
    decays, adds = tl.associative_scan((_decay(dt, a), x[:, None, :] * b[None, :, :]), 2, _then)
    return decays * h[:, :, None] + adds


@triton.jit
def _forward(
    u_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    states_ptr,
    D,
    S,
    T,
    KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    state = tl.arange(0, BLOCK_S)
    step = tl.arange(0, BLOCK_T)
    real_d = channel < D
    real_s = state < S
    real_ds = real_d[:, None] & real_s[None, :]

    # The parameters of the channels are loaded once, for all chunks.
    a = _load(a_ptr, channel[:, None] * S + state[None, :], real_ds)
    d = _load(d_ptr, channel, real_d)
    bias = _load(bias_ptr, channel, real_d)
    h = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    chunks = tl.cdiv(T, BLOCK_T)

    for chunk in range(chunks):
        # The backward pass starts from the state before each chunk.
        if KEEP:
            tl.store(
                states_ptr + ((n * chunks + chunk) * D + channel[:, None]) * S + state[None, :],
                h,
                mask=real_ds,
            )

        # The chunk's places in memory follow, with masks for what lies past the ends.
        t = chunk * BLOCK_T + step
        dt_at = (n * D + channel[:, None]) * T + t[None, :]
        st_at = (n * S + state[:, None]) * T + t[None, :]
        real_dt = real_d[:, None] & (t < T)[None, :]
        real_st = real_s[:, None] & (t < T)[None, :]

        # The whole chunk is scanned at once, then gated and stored.
        u = _load(u_ptr, dt_at, real_dt)
        z = _load(z_ptr, dt_at, real_dt)
        dt = tl.where(real_dt, _softplus(_load(delta_ptr, dt_at, real_dt) + bias[:, None]), 0.0)
        states = _states(dt * u, dt, a, _load(b_ptr, st_at, real_st), h)
        y = tl.sum(states * _load(c_ptr, st_at, real_st)[None, :, :], axis=1) + d[:, None] * u
        tl.store(
            out_ptr + dt_at, (y * z * tl.sigmoid(z)).to(out_ptr.dtype.element_ty), mask=real_dt
        )

        # The last state of the chunk is the next one's first.
        h = tl.sum(tl.where((step == BLOCK_T - 1)[None, None, :], states, 0.0), axis=2)


@triton.jit
def _backward(  # noqa: PLR0915  (one launch is one function)
    u_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    states_ptr,
    grad_ptr,
    grad_u_ptr,
    grad_delta_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_c_ptr,
    grad_d_ptr,
    grad_z_ptr,
    grad_bias_ptr,
    D,
    S,
    T,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    state = tl.arange(0, BLOCK_S)
    step = tl.arange(0, BLOCK_T)
    real_d = channel < D
    real_s = state < S
    real_ds = real_d[:, None] & real_s[None, :]
    a = _load(a_ptr, channel[:, None] * S + state[None, :], real_ds)
    d = _load(d_ptr, channel, real_d)
    bias = _load(bias_ptr, channel, real_d)
    grad_a = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    grad_d = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    # dL/dh at the first step of the chunk that comes after.
    carried = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    chunks = tl.cdiv(T, BLOCK_T)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * BLOCK_T + step
        dt_at = (n * D + channel[:, None]) * T + t[None, :]
        st_at = (n * S + state[:, None]) * T + t[None, :]
        real_dt = real_d[:, None] & (t < T)[None, :]
        real_st = real_s[:, None] & (t < T)[None, :]
        real_next = real_d[:, None] & (t + 1 < T)[None, :]
        real_before = real_d[:, None] & ((step > 0) & (t <= T))[None, :]
        u = _load(u_ptr, dt_at, real_dt)
        z = _load(z_ptr, dt_at, real_dt)
        grad = _load(grad_ptr, dt_at, real_dt)
        b = _load(b_ptr, st_at, real_st)
        c = _load(c_ptr, st_at, real_st)

        # The steps' sizes, and those of the steps after and before.
        raw = _load(delta_ptr, dt_at, real_dt) + bias[:, None]
        dt = tl.where(real_dt, _softplus(raw), 0.0)
        dt_next = tl.where(
            real_next, _softplus(_load(delta_ptr, dt_at + 1, real_next) + bias[:, None]), 0.0
        )
        dt_before = tl.where(
            real_before, _softplus(_load(delta_ptr, dt_at - 1, real_before) + bias[:, None]), 0.0
        )

        # Compute the states again. `before` holds what each step keeps of the state before it;
        # h_t - dt_t u_t b_t would cancel in `through`.
        b_before = _load(b_ptr, st_at - 1, real_s[:, None] & ((step > 0) & (t <= T))[None, :])
        h = _load(
            states_ptr, ((n * chunks + chunk) * D + channel[:, None]) * S + state[None, :], real_ds
        )
        before = _decay(dt, a) * _states(
            dt_before * _load(u_ptr, dt_at - 1, real_before), dt_before, a, b_before, h
        )
        states = before + (dt * u)[:, None, :] * b[None, :, :]

        # Back through the gate.
        y = tl.sum(states * c[None, :, :], axis=1) + d[:, None] * u
        gate = tl.sigmoid(z)
        grad_z = grad * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(grad_z_ptr + dt_at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=real_dt)
        grad_y = grad * z * gate

        # dL/dh_t = grad_y_t c_t + exp(dt_{t+1} a) dL/dh_{t+1}: the same scan from the end.
        decays, adds = tl.associative_scan(
            (_decay(dt_next, a), grad_y[:, None, :] * c[None, :, :]), 2, _then, reverse=True
        )
        grad_h = decays * carried[:, :, None] + adds
        carried = tl.sum(tl.where((step == 0)[None, None, :], grad_h, 0.0), axis=2)

        # Gradients of this chunk's inputs.
        through = grad_h * before  # dL/d(dt_t a)
        grad_x = tl.sum(grad_h * b[None, :, :], axis=1)
        grad_u = grad_x * dt + grad_y * d[:, None]
        grad_dt = tl.sum(through * a[:, :, None], axis=1) + grad_x * u
        grad_raw = tl.where(real_dt, grad_dt * tl.where(raw > 20.0, 1.0, tl.sigmoid(raw)), 0.0)
        tl.store(grad_u_ptr + dt_at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=real_dt)
        tl.store(grad_delta_ptr + dt_at, grad_raw.to(grad_delta_ptr.dtype.element_ty), mask=real_dt)

        # Terms and sums of what all channels, or all steps, share.
        term_at = ((n * tl.num_programs(0) + tl.program_id(0)) * S + state[:, None]) * T + t[
            None, :
        ]
        tl.store(grad_b_ptr + term_at, tl.sum(grad_h * (dt * u)[:, None, :], axis=0), mask=real_st)
        tl.store(grad_c_ptr + term_at, tl.sum(states * grad_y[:, None, :], axis=0), mask=real_st)
        grad_a += tl.sum(through * dt[:, None, :], axis=2)
        grad_d += tl.sum(grad_y * u, axis=1)
        grad_bias += tl.sum(grad_raw, axis=1)
    tl.store(grad_a_ptr + (n * D + channel[:, None]) * S + state[None, :], grad_a, mask=real_ds)
    tl.store(grad_d_ptr + n * D + channel, grad_d, mask=real_d)
    tl.store(grad_bias_ptr + n * D + channel, grad_bias, mask=real_d)


def _blocks(channels: int, states: int) -> dict[str, int]:
    """Return the sizes of a program's blocks: about `_STATES` states of some channels."""
    block_s = triton.next_power_of_2(states)
    block_d = min(max(1, _STATES // block_s), triton.next_power_of_2(channels))
    return dict(BLOCK_D=block_d, BLOCK_S=block_s, BLOCK_T=_BLOCK_T)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        u, _, a, *_ = inputs
        samples, channels, steps = u.shape
        blocks = _blocks(*a.shape)
        grid = triton.cdiv(channels, blocks["BLOCK_D"]), samples

        # Without gradients no state is kept, and any tensor stands in for the states.
        out = torch.empty_like(u)
        keep = any(ctx.needs_input_grad)
        states = out
        if keep:
            chunks = triton.cdiv(steps, _BLOCK_T)
            states = a.new_empty(samples, chunks, *a.shape, dtype=torch.float32)
        sizes = (*a.shape, steps)
        launch(_forward, grid, *inputs, out, states, *sizes, KEEP=keep, **blocks, num_warps=_WARPS)
        if keep:
            ctx.save_for_backward(*inputs, states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, states = ctx.saved_tensors
        u, delta, a, b, c, d, z, bias = inputs
        samples, channels, steps = u.shape
        blocks = _blocks(*a.shape)
        grid = triton.cdiv(channels, blocks["BLOCK_D"]), samples

        def empty_terms(*shape: int) -> Tensor:
            return u.new_empty(samples, *shape, dtype=torch.float32)

        # Each program leaves terms of what it shares with others.
        grad_u, grad_delta, grad_z = (torch.empty_like(x) for x in (u, delta, z))
        a_terms, d_terms, bias_terms = (
            empty_terms(*a.shape),
            empty_terms(channels),
            empty_terms(channels),
        )
        b_terms, c_terms = (empty_terms(grid[0], *b.shape[1:]) for _ in range(2))
        launch(
            _backward,
            grid,
            *inputs,
            states,
            grad.contiguous(),
            grad_u,
            grad_delta,
            a_terms,
            b_terms,
            c_terms,
            d_terms,
            grad_z,
            bias_terms,
            *a.shape,
            steps,
            **blocks,
            num_warps=_WARPS,
        )
        return (
            grad_u,
            grad_delta,
            a_terms.sum(0).to(a.dtype),
            b_terms.sum(1).to(b.dtype),
            c_terms.sum(1).to(c.dtype),
            d_terms.sum(0).to(d.dtype),
            grad_z,
            bias_terms.sum(0).to(bias.dtype),
        )


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Scan u; shapes and formulas as in selective_scan.py."""
    inputs: tuple[Tensor, ...] = (u, delta, a, b, c, d, z, bias)
    if not torch.is_grad_enabled():
        # A parameter asks for its gradient even then, and states would be kept.
        inputs = tuple(x.detach() for x in inputs)
    return _Scan.apply(*inputs)
