"""Token mixers and kernels against naive float64 truths, forward and backward."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.kernels.attention import reference, sdpa
from backbones.mixers import build_mixer
from experiments.engine.timing.cost import MacCounter
from tests.support.networks import randomise, relative_rms

Parameters = dict[str, Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def agree(
    mixer: nn.Module,
    truth: Callable[[Parameters, Tensor], Tensor],
    shape: tuple[int, int, int, int],
) -> None:
    """Compare the output and all gradients, in both dtypes and with both attention kernels."""
    randomise(mixer)
    x, probe = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))

    # The truth, in float64.
    exact = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    exact_x = x.double().requires_grad_()
    exact_out = truth(exact, exact_x)
    exact_grads = torch.autograd.grad((exact_out * probe).sum(), [exact_x, *exact.values()])
    expected = [exact_out, *exact_grads]

    # The mixer with both kernels, in both precisions.
    for dtype, tolerance in TOLERANCE.items():
        for choice in ("sdpa", "reference"):
            m = deepcopy(mixer).to(dtype)
            own_x = x.to(dtype, copy=True).requires_grad_()
            with kernels.use(attention=choice):
                out = m(own_x)
            grads = torch.autograd.grad((out * probe.to(dtype)).sum(), [own_x, *m.parameters()])
            names = ["out", "x", *exact]
            for name, value, wanted in zip(names, [out, *grads], expected, strict=True):
                assert value.dtype == dtype
                assert value.shape == wanted.shape
                assert relative_rms(value, wanted) <= tolerance, f"{name} in {dtype} with {choice}"


def tokens_of(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, T, C), row by row."""
    return torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)


def grid_of(tokens: Tensor, height: int, width: int) -> Tensor:
    rows = [
        torch.stack([tokens[:, i * width + j] for j in range(width)], dim=-1) for i in range(height)
    ]
    return torch.stack(rows, dim=-2)


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return torch.einsum("oc,ntc->nto", p[f"{name}.weight"], x) + p[f"{name}.bias"]


def pointwise(p: Parameters, name: str, x: Tensor) -> Tensor:
    out = torch.einsum("oc,nchw->nohw", p[f"{name}.weight"][:, :, 0, 0], x)
    return out + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else out


def depthwise(p: Parameters, name: str, x: Tensor) -> Tensor:
    """Every pixel as the weighted sum of its shifted neighbours, zero outside."""
    weight, (height, width) = p[f"{name}.weight"], x.shape[2:]
    radius = weight.shape[-1] // 2
    padded = F.pad(x, (radius,) * 4)
    offsets = [(i, j) for i in range(2 * radius + 1) for j in range(2 * radius + 1)]
    out = sum(
        weight[:, :, i, j][:, :, None] * padded[:, :, i : i + height, j : j + width]
        for i, j in offsets
    )
    return out + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else out


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Compute a head of softmax attention by its explicit matrix: (N, T_q, e), 2 x (N, T_k, e)."""
    weights = (torch.einsum("nie,nje->nij", q, k) / math.sqrt(q.shape[-1]) + bias).exp()
    return torch.einsum("nij,nje->nie", weights / weights.sum(dim=-1, keepdim=True), v)


def heads_of(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.split(x.shape[-1] // heads, dim=-1))


def full_attention(p: Parameters, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention over all tokens; `bias` (heads, T, T) may forbid pairs with -inf."""
    q, k, v = (heads_of(part, heads) for part in linear(p, "qkv", tokens_of(x)).chunk(3, dim=-1))
    out = [attend(q[h], k[h], v[h], 0.0 if bias is None else bias[h]) for h in range(heads)]
    return grid_of(linear(p, "proj", torch.cat(out, dim=-1)), *x.shape[2:])


def test_softmax_attention():
    mixer = build_mixer("softmax", 21, (5, 7), 0, heads=3)
    agree(mixer, lambda p, x: full_attention(p, x, 3), (2, 21, 5, 7))


def test_global_regional_attention():
    """A query sees its region and the averages of all squares, in one softmax."""
    height, width, window, pool = 4, 8, 4, 2
    mixer = build_mixer("global_regional", 6, (height, width), 0, heads=2, window=window, pool=pool)

    def truth(p: Parameters, x: Tensor) -> Tensor:
        projected = linear(p, "qkv", tokens_of(x))  # (N, T, 3C)
        image = grid_of(projected, height, width)
        means = torch.stack(
            [
                image[:, :, i : i + pool, j : j + pool].mean((2, 3))
                for i in range(0, height, pool)
                for j in range(0, width, pool)
            ],
            dim=1,
        )  # (N, G, 3C)
        out = torch.zeros_like(projected[..., :6])
        for token in range(height * width):
            i, j = divmod(token, width)
            region = [
                other
                for other in range(height * width)
                if other // width // window == i // window
                and other % width // window == j // window
            ]
            keys = torch.cat([projected[:, region], means], dim=1)
            q, _, _ = (heads_of(part, 2) for part in projected[:, [token]].chunk(3, dim=-1))
            _, k, v = (heads_of(part, 2) for part in keys.chunk(3, dim=-1))
            out[:, [token]] = torch.cat([attend(q[h], k[h], v[h]) for h in range(2)], dim=-1)
        return grid_of(linear(p, "proj", out), height, width)

    agree(mixer, truth, (2, 6, height, width))


def test_global_regional_attention_refuses_a_grid_that_its_regions_do_not_fill():
    with pytest.raises(ValueError, match="divisible by its window and its pool"):
        build_mixer("global_regional", 6, (6, 8), 0, heads=2, window=4)


def test_global_regional_attention_saves_what_a_layer_of_stable_diffusion_spends():
    """Both products of a 4096-token layer: 1.34 G in place of 10.74 G."""
    with torch.device("meta"):
        mixer = build_mixer("global_regional", 320, (64, 64), 0, heads=8)
        whole = build_mixer("softmax", 320, (64, 64), 0, heads=8)
    x = torch.empty(1, 320, 64, 64, device="meta")
    spent = []
    for layer in (mixer, whole):
        with torch.no_grad(), kernels.use(attention="reference"), MacCounter() as macs:
            layer(x)
        spent.append((macs.core - 4 * 4096 * 320**2) / 1e9)
    assert spent == [pytest.approx(1.34, abs=0.005), pytest.approx(10.74, abs=0.005)]


def window_bias(table: Tensor, size: tuple[int, int], window: int, shift: int) -> Tensor:
    """Build a dense bias (heads, T, T): the table's row of the offset, -inf for pairs apart.

    After the roll, two tokens meet if they share a window and the roll kept their distance.
    """
    grid = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    index = 0
    together = True
    for axis in (0, 1):
        # Places of all tokens along the axis, before and after the roll.
        place = grid[axis].flatten()
        rolled = (place - shift) % size[axis]
        offset = rolled[:, None] - rolled

        # Both axes must agree that two tokens meet.
        same_window = rolled[:, None] // window == rolled // window
        same_distance = place[:, None] - place == offset
        together = together & same_window & same_distance

        # The table holds 2 * window - 1 offsets along an axis.
        column = offset.clamp(1 - window, window - 1) + window - 1
        index = index * (2 * window - 1) + column
    return table[index].permute(2, 0, 1).masked_fill(~together, -torch.inf)


@pytest.mark.parametrize(
    "size, window, index, used_window, shift",
    [
        ((12, 12), 4, 0, 4, 0),
        ((12, 12), 4, 1, 4, 2),
        ((12, 12), 3, 5, 3, 1),
        ((6, 9), 3, 1, 3, 1),
        ((5, 5), 5, 1, 5, 0),
        ((5, 5), 8, 3, 5, 0),
    ],
)
def test_window_attention(
    size: tuple[int, int], window: int, index: int, used_window: int, shift: int
):
    mixer = build_mixer("window", 15, size, index, heads=3, window=window)

    def truth(p: Parameters, x: Tensor) -> Tensor:
        return full_attention(p, x, 3, window_bias(p["bias_table"], size, used_window, shift))

    agree(mixer, truth, (2, 15, *size))


def test_shifted_windows_are_windows_of_the_rolled_grid():
    """Only the last row and the last column of windows hold a seam, and differ."""
    plain = randomise(build_mixer("window", 15, (12, 12), 0, heads=3, window=4))
    shifted = randomise(build_mixer("window", 15, (12, 12), 1, heads=3, window=4))
    x = torch.randn(2, 15, 12, 12, generator=torch.Generator().manual_seed(4))
    left = shifted(x).roll((-2, -2), (2, 3))
    right = plain(x.roll((-2, -2), (2, 3)))
    assert relative_rms(left[..., :8, :8], right[..., :8, :8]) <= 1e-6
    assert relative_rms(left[..., 8:, :], right[..., 8:, :]) > 1e-2
    assert relative_rms(left[..., 8:], right[..., 8:]) > 1e-2


def focused(p: Parameters, x: Tensor, heads: int, power: int) -> Tensor:
    """Compute focused linear attention by its explicit matrix: phi(q) phi(k)^T over row means."""
    q, k, v = linear(p, "qkv", tokens_of(x)).chunk(3, dim=-1)
    k = k + p.get("position", 0.0)

    # The power sharpens the features and keeps their norms.
    def phi(features: Tensor) -> list[Tensor]:
        u = (features.clamp(min=0) + 1e-6) / (1 + p["sigma"].exp()).log()
        sharp = u**power
        norms = (u**2).sum(-1, keepdim=True) / (sharp**2).sum(-1, keepdim=True)
        return heads_of(sharp * norms.sqrt(), heads)

    # A convolution of the values, which all heads share, is added to the mixed values.
    out = []
    for phi_q, phi_k, value in zip(phi(q), phi(k), heads_of(v, heads), strict=True):
        matrix = torch.einsum("nie,nje->nij", phi_q, phi_k) / phi_k.shape[1]
        weights = matrix / (matrix.sum(dim=-1, keepdim=True) + 1e-6)
        mixed = torch.einsum("nij,nje->nie", weights, value)
        out.append(mixed + tokens_of(depthwise(p, "dwc", grid_of(value, *x.shape[2:]))))
    return grid_of(linear(p, "proj", torch.cat(out, dim=-1)), *x.shape[2:])


@pytest.mark.parametrize("options", [{}, dict(position=True), dict(power=2, kernel=3)])
def test_focused_linear_attention(options: dict[str, Any]):
    mixer = build_mixer("focused_linear", 21, (7, 5), 0, heads=3, **options)
    agree(mixer, lambda p, x: focused(p, x, 3, options.get("power", 3)), (2, 21, 7, 5))


def bilinear(length: int) -> Tensor:
    """Rows interpolate 7 samples at `length` pixel centres, clamped at the ends: (length, 7)."""
    matrix = torch.zeros(length, 7, dtype=torch.float64)
    for i in range(length):
        place = max((i + 0.5) * 7 / length - 0.5, 0.0)
        low = min(int(place), 6)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, 6)] += place - low
    return matrix


def agent_tokens(q: Tensor, side: int) -> Tensor:
    """Average side x side bins, which may overlap: (N, C, H, W) -> (N, side^2, C)."""

    def edges(length: int) -> list[tuple[int, int]]:
        return [(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]

    means = []
    for top, bottom in edges(q.shape[2]):
        for left, right in edges(q.shape[3]):
            means.append(q[:, :, top:bottom, left:right].mean(dim=(2, 3)))
    return torch.stack(means, dim=1)


def agent_biases(p: Parameters, h: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a head's biases of agents by tokens, and of tokens by agents: (A, T), (T, A).

    A bias is a table of 7x7, interpolated to the grid, plus a part per row and one per column.
    """

    def resized(table: Tensor) -> Tensor:
        return torch.einsum("ir,nrc,jc->nij", bilinear(size[0]), table, bilinear(size[1]))

    gather = resized(p["agent_table"][h]) + p["agent_row"][h] + p["agent_column"][h]
    spread = resized(p["query_table"][h]).permute(1, 2, 0)
    spread = spread + p["query_row"][h] + p["query_column"][h]
    return gather.flatten(1), spread.flatten(0, 1)


def agents_attend(p: Parameters, x: Tensor, heads: int, side: int) -> Tensor:
    """Let agents gather from all tokens, and let all tokens read the agents."""
    size = tuple(x.shape[2:])
    q, k, v = linear(p, "qkv", tokens_of(x)).chunk(3, dim=-1)
    queries, keys, values = (heads_of(part, heads) for part in (q, k, v))
    agents = heads_of(agent_tokens(grid_of(q, *size), side), heads)

    # Biases are optional.
    gather = 0.0
    spread = 0.0
    out = []
    for h in range(heads):
        if "agent_table" in p:
            gather, spread = agent_biases(p, h, size)
        gathered = attend(agents[h], keys[h], values[h], gather)
        out.append(attend(queries[h], agents[h], gathered, spread))

    # A convolution of the values adds what agents cannot tell apart.
    local = tokens_of(depthwise(p, "dwc", grid_of(v, *size)))
    return grid_of(linear(p, "proj", torch.cat(out, dim=-1) + local), *size)


@pytest.mark.parametrize(
    "size, agents, biases",
    [((12, 12), 16, True), ((5, 9), 4, True), ((3, 10), 9, True), ((7, 6), 9, False)],
)
def test_agent_attention(size: tuple[int, int], agents: int, biases: bool):
    mixer = build_mixer("agent", 15, size, 0, heads=3, agents=agents, biases=biases)
    agree(mixer, lambda p, x: agents_attend(p, x, 3, math.isqrt(agents)), (2, 15, *size))


def channel_attention(p: Parameters, x: Tensor, heads: int) -> Tensor:
    """Attend among the channels of a head, by the cosines between them."""
    qkv = depthwise(p, "channel.depthwise", pointwise(p, "channel.qkv", x)).flatten(2)
    queries, keys, values = (part.chunk(heads, dim=1) for part in qkv.chunk(3, dim=1))
    out = []
    for h in range(heads):
        q = queries[h] / (queries[h] ** 2).sum(-1, keepdim=True).sqrt()
        k = keys[h] / (keys[h] ** 2).sum(-1, keepdim=True).sqrt()
        cosine = torch.einsum("nct,ndt->ncd", q, k)
        weights = (cosine * p["channel.temperature"][h]).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out.append(torch.einsum("ncd,ndt->nct", weights, values[h]))
    x = torch.cat(out, dim=1).unflatten(2, x.shape[2:])
    return pointwise(p, "channel.project", x) if "channel.project.weight" in p else x


def conv_module(
    p: Parameters, x: Tensor, activation: str = "gelu", channel: str = "cca", heads: int = 1
) -> Tensor:
    x = depthwise(p, "depthwise", pointwise(p, "pointwise_in", x))
    x = x.clamp(min=0) if activation == "relu" else x * (1 + torch.erf(x / math.sqrt(2))) / 2
    pooled = x.mean(dim=(2, 3), keepdim=True)
    if channel == "cca":
        x = x / (1 + (-pointwise(p, "channel.weight", pooled)).exp())
    elif channel == "se":
        squeezed = pointwise(p, "channel.squeeze", pooled).clamp(min=0)
        x = x / (1 + (-pointwise(p, "channel.excite", squeezed)).exp())
    elif channel == "mdta":
        x = channel_attention(p, x, heads)
    return pointwise(p, "pointwise_out", x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kernel=5),
        dict(kernel=7, activation="relu"),
        dict(activation="relu"),
        dict(channel="none"),
        dict(channel="none", kernel=7),
        dict(channel="se", reduction=4),
        dict(channel="mdta", heads=3),
        dict(channel="mdta", heads=5, project=True, kernel=5),
    ],
    ids=str,
)
def test_conv_module(options: dict[str, Any]):
    names = ("activation", "channel", "heads")
    known = {name: value for name, value in options.items() if name in names}
    mixer = build_mixer("conv", 15, (5, 7), 0, **options)
    agree(mixer, lambda p, x: conv_module(p, x, **known), (2, 15, 5, 7))


@pytest.mark.parametrize("bias_shape", [None, (2, 3, 7, 13), (1, 3, 7, 13), (1, 1, 1, 13)])
def test_attention_kernels_agree(bias_shape: tuple[int, ...] | None):
    """Outputs and gradients of both kernels are those of the explicit matrix, with any bias."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(2, 3, 7, 9), (2, 3, 13, 9), (2, 3, 13, 9)]
    if bias_shape:
        shapes.append(bias_shape)
    args = [torch.randn(shape, generator=generator) for shape in shapes]
    probe = torch.randn(2, 3, 7, 9, generator=generator)

    def results(kernel: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [arg.to(dtype, copy=True).requires_grad_() for arg in args]
        out = kernel(*own)
        return [out, *torch.autograd.grad((out * probe.to(dtype)).sum(), own)]

    def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = torch.zeros((), dtype=q.dtype) if bias is None else bias
        bias = bias.expand(2, 3, 7, 13)
        heads = [attend(q[:, h], k[:, h], v[:, h], bias[:, h]) for h in range(3)]
        return torch.stack(heads, dim=1)

    # Both kernels in both precisions, against the matrix in float64.
    truth = results(naive, torch.float64)
    for kernel in (sdpa, reference):
        for dtype, tolerance in TOLERANCE.items():
            for value, exact in zip(results(kernel, dtype), truth, strict=True):
                assert relative_rms(value, exact) <= tolerance, (kernel, dtype)
