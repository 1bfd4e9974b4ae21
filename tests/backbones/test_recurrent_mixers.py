"""The recurrent mixers against their published equations, token by token, in float64.

DiG, DiS, DiM, DiMSUM and DiffuSSM, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.dis import BidirectionalMamba
from backbones.kernels import use
from backbones.mamba import Mamba
from tests.support.networks import randomise, relative_rms

TOKENS = 7


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def mamba(mixer: nn.Module, x: Tensor, z: Tensor, end: str = "") -> Tensor:
    """Run Gu & Dao's algorithm 2 with the convolution and gate of figure 3: (T, I) -> (T, I)."""
    # The weights of this direction.
    conv = getattr(mixer, f"conv1d{end}")
    x_proj = getattr(mixer, f"x_proj{end}")
    dt_proj = getattr(mixer, f"dt_proj{end}")
    a = -torch.exp(mixer.A_b_log if end else mixer.A_log)
    skip = getattr(mixer, f"D{end}")
    inner, states = a.shape
    sizes = [dt_proj.in_features, states, states]
    taps = conv.kernel_size[0]

    # Every token is convolved with those before it, and moves the state by its own step.
    h = torch.zeros(inner, states, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        reach = range(min(taps, t + 1))
        past = sum(conv.weight[:, 0, taps - 1 - back] * x[t - back] for back in reach)
        u = silu(past + conv.bias)
        step, b, c = (x_proj.weight @ u).split(sizes)
        dt = torch.log1p(torch.exp(dt_proj.weight @ step + dt_proj.bias))
        h = torch.exp(dt[:, None] * a) * h + (dt * u)[:, None] * b
        rows.append((h @ c + skip * u) * silu(z[t]))
    return torch.stack(rows)


def one_way(mixer: nn.Module, x: Tensor) -> Tensor:
    inner, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    return mamba(mixer, inner, z) @ mixer.out_proj.weight.T


def both_ways(mixer: nn.Module, x: Tensor) -> Tensor:
    inner, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    forth = mamba(mixer, inner, z)
    back = mamba(mixer, inner.flip(0), z.flip(0), "_b").flip(0)
    return (forth + back) @ mixer.out_proj.weight.T


def gated_linear(mixer: nn.Module, x: Tensor) -> Tensor:
    """Run Yang et al.'s equations 3 and 4 for three heads, normalised and gated as in DiG.

    Keys have 4 channels and values 8.
    """
    heads = []
    for head in range(3):
        key = slice(4 * head, 4 * head + 4)
        value = slice(8 * head, 8 * head + 8)
        state = torch.zeros(4, 8, dtype=x.dtype)
        rows = []
        for token in x:
            # The state decays, takes the token in, and is read by the query.
            decay = torch.sigmoid(mixer.gk_proj(token)[key]) ** (1 / 16)
            update = torch.outer(mixer.k_proj(token)[key], mixer.v_proj(token)[value])
            state = decay[:, None] * state + update
            o = mixer.q_proj(token)[key] / 2 @ state

            # Normalise and gate.
            o = o / (o.square().mean() + 1e-6).sqrt() * mixer.g_norm_swish_gate.weight
            rows.append(o * silu(mixer.g_proj(token)[value]))
        heads.append(torch.stack(rows))
    return mixer.o_proj(torch.cat(heads, dim=-1))


def zero_order_hold(ssm: nn.Module, u: Tensor) -> Tensor:
    """S4D's continuous system, integrated exactly over each step: u (D, T) -> same."""
    a = torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    decay = (ssm.log_dt.exp() * a).exp()
    out = torch.view_as_complex(ssm.out)
    state = torch.zeros(4, 3, dtype=torch.complex128)
    columns = []
    for t in range(u.shape[1]):
        state = decay * state + (decay - 1) / a * u[:, t, None]
        columns.append((out * state).sum(dim=-1).real + ssm.skip[:, 0] * u[:, t])
    return torch.stack(columns, dim=-1)


def dig_attention() -> nn.Module:
    return backbones.build("dig_s_2", dim=24, heads=3, depth=4).blocks[0].attn


def diffussm_ssm() -> nn.Module:
    model = backbones.build("diffussm_xl", dim=4, depth=1, states=3, input_size=4)
    return model.blocks[0].ssm_forward


Recurrence = Callable[[nn.Module, Tensor], Tensor]
MIXERS: dict[str, tuple[Callable[[], nn.Module], Recurrence, tuple[int, int]]] = {
    "DiM's and DiMSUM's": (lambda: randomise(Mamba(12)), one_way, (TOKENS, 12)),
    "DiS's": (lambda: randomise(BidirectionalMamba(12)), both_ways, (TOKENS, 12)),
    "DiG's": (lambda: randomise(dig_attention()), gated_linear, (TOKENS, 24)),
    "DiffuSSM's": (diffussm_ssm, zero_order_hold, (4, TOKENS)),
}


REFERENCES = dict(
    selective_scan="reference",
    causal_conv="reference",
    gated_linear="reference",
    diagonal_ssm="reference",
)


@pytest.mark.parametrize("choices", [{}, REFERENCES], ids=["chosen", "references"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_its_recurrence(name: str, choices: dict[str, str]):
    """Outputs agree, and so do the gradients of the input and of every parameter."""
    make, recurrence, shape = MIXERS[name]
    mixer = make().double()
    draw = torch.Generator().manual_seed(5)
    x, probe = torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    inputs = [x.requires_grad_(), *(p for p in mixer.parameters() if p.requires_grad)]

    # The recurrence, token by token, and the mixer.
    truth = recurrence(mixer, x)
    truths = [truth, *torch.autograd.grad(truth, inputs, probe)]
    with use(**choices):
        out = mixer(x[None])[0]
    values = [out, *torch.autograd.grad(out, inputs, probe)]

    # A gradient of zero would prove nothing.
    for value, expected in zip(values, truths, strict=True):
        assert expected.any()
        assert relative_rms(value, expected) <= 1e-11
