"""Diagonal state space model, time-invariant (S4D): Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022.

x_t = exp(z) x_{t-1} + u_t, x_0 = 0;  y_t = Re(sum over s of w_s x_{t,s}), for every channel by itself.

u (N, D, T) real, z and w (D, S) complex, Re z <= 0 -> (N, D, T). A system in continuous time (A, B = 1, C, step dt) held
constant between samples has z = dt A and w = C (exp(z) - 1) / A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backbones.kernels.op import Choice, Op
from backbones.kernels.precision import at_least_float32


@at_least_float32
def reference(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The recurrence, token by token."""
    decay, state, out = z.exp(), 0.0, []
    for t in range(u.shape[-1]):
        state = decay * state + u[..., t, None]  # (N, D, S)
        out.append((w * state).sum(dim=-1).real)  # (N, D)
    return torch.stack(out, dim=-1)


@at_least_float32
def fft(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Causal convolution with the impulse response, as a product of spectra at twice the length."""
    tokens = u.shape[-1]
    spectrum = torch.fft.rfft(u, 2 * tokens) * torch.fft.rfft(
        _response(z, w, tokens).to(u.dtype), 2 * tokens
    )
    return torch.fft.irfft(spectrum, 2 * tokens)[..., :tokens]


def _response(z: Tensor, w: Tensor, tokens: int) -> Tensor:
    """Re(sum over s of w_s exp(z_s t)), t = a c + b: a real product of (c a) x 2S and 2S x b factors -> (D, T).

    Exponents are taken in float64: their phases reach 1e5, where float32 keeps two decimals.
    """
    fine = math.isqrt(tokens - 1) + 1
    coarse = -(-tokens // fine)
    exact = z.to(torch.complex128)[:, None]  # (D, 1, S)
    left = w[:, None] * _powers(exact, torch.arange(coarse, device=z.device) * fine).to(
        w.dtype
    )  # (D, c, S)
    right = _powers(exact, torch.arange(fine, device=z.device)).to(w.dtype)  # (D, b, S)
    left, right = torch.cat([left.real, -left.imag], -1), torch.cat([right.real, right.imag], -1)
    return (left @ right.mT).flatten(1)[:, :tokens]


def _powers(z: Tensor, steps: Tensor) -> Tensor:
    return (z * steps[:, None]).exp()


def shape(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """What comes out on the meta device, where there is nothing to compute."""
    return torch.empty_like(u)


def macs(u: Tensor, z: Tensor, w: Tensor) -> int:
    """Two an element of the state and token, complex ones counted once, as of every recurrence here."""
    return 2 * u.numel() * z.shape[-1]


diagonal_ssm = Op(
    "diagonal_ssm",
    [
        Choice("shape", shape, lambda u, *rest: u.is_meta),
        Choice("fft", fft),
        Choice("reference", reference),
    ],
    macs,
)
