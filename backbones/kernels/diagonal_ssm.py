"""Diagonal, time-invariant state space model (S4D).

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models",
2022. For every channel by itself, with x_0 = 0:

    x_t = exp(z) x_{t-1} + u_t
    y_t = Re(sum over s of w_s x_{t,s})

u (N, D, T) real, z and w (D, S) complex, Re z <= 0 -> (N, D, T). A system in continuous time
(A, B = 1, C, step dt), held constant between samples, has z = dt A and w = C (exp(z) - 1) / A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backbones.kernels.op import Choice, Op, meta_choice
from backbones.kernels.precision import at_least_float32


@at_least_float32
def reference(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Run the recurrence token by token."""
    decay = z.exp()  # (D, S)
    state: Tensor | float = 0.0
    out = []
    for t in range(u.shape[-1]):
        state = decay * state + u[..., t, None]  # (N, D, S)
        out.append((w * state).sum(dim=-1).real)  # (N, D)
    return torch.stack(out, dim=-1)


@at_least_float32
def fft(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Convolve with the impulse response: a product of spectra at twice the length."""
    tokens = u.shape[-1]
    response = _impulse_response(z, w, tokens).to(u.dtype)  # (D, T)
    spectrum = torch.fft.rfft(u, 2 * tokens) * torch.fft.rfft(response, 2 * tokens)
    return torch.fft.irfft(spectrum, 2 * tokens)[..., :tokens]


def _impulse_response(z: Tensor, w: Tensor, tokens: int) -> Tensor:
    """Return Re(sum over s of w_s exp(z_s t)) for all t, (D, T).

    With t = a c + b, it is a real product of c x 2S and 2S x b factors. Exponents are taken in
    float64: their phases reach 1e5, where float32 keeps two decimals.
    """
    # About sqrt(T) coarse and sqrt(T) fine steps reach every t.
    num_fine = math.isqrt(tokens - 1) + 1
    num_coarse = -(-tokens // num_fine)
    exact = z.to(torch.complex128)[:, None]  # (D, 1, S)
    coarse = _powers(exact, torch.arange(num_coarse, device=z.device) * num_fine)
    fine = _powers(exact, torch.arange(num_fine, device=z.device)).to(w.dtype)  # (D, b, S)
    coarse = w[:, None] * coarse.to(w.dtype)  # (D, c, S)

    # The real part of a complex product is a real product of twice the width.
    left = torch.cat([coarse.real, -coarse.imag], -1)  # (D, c, 2S)
    right = torch.cat([fine.real, fine.imag], -1)  # (D, b, 2S)
    return (left @ right.mT).flatten(1)[:, :tokens]


def _powers(z: Tensor, steps: Tensor) -> Tensor:
    return (z * steps[:, None]).exp()


def count_macs(u: Tensor, z: Tensor, w: Tensor) -> int:
    """Count two for each state and token, as for every recurrence here; complex ones count once."""
    return 2 * u.numel() * z.shape[-1]


diagonal_ssm = Op(
    "diagonal_ssm",
    [meta_choice(), Choice("fft", fft), Choice("reference", reference)],
    count_macs,
)
