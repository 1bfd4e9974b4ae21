"""Linear layers, 1x1 convolutions and linear attention equal sums that are written out."""

import sys

import pytest
import torch
from torch import Tensor

from backbones import kernels
from backbones.kernels import linear, linear_attention, pointwise
from tests.support.kernels import with_gradients

# `rows` takes whole vectors of channels, and is tested by itself.
OF_ANY_SIZE = {
    op.name: [name for name in op.choices if name != "rows"] for op in (linear, pointwise)
}


def features(tokens: int, e: int, zeros: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(2, 3, tokens, e, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    q, k = q.relu(), k.relu()
    if zeros:
        q[:, :, 0] = 0
    return [q, k, v]


def over_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute equation 3 query by query; 1e-6 per token keeps the denominator from zero."""
    rows = []
    for i in range(q.shape[2]):
        weights = torch.einsum("nhe,nhje->nhj", q[:, :, i], k)
        rows.append(
            torch.einsum("nhj,nhje->nhe", weights, v)
            / (weights.sum(dim=-1, keepdim=True) + 1e-6 * k.shape[2])
        )
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("choice", linear_attention.choices)
@pytest.mark.parametrize(("tokens", "e"), [(1, 5), (7, 3), (49, 11)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_linear_attention_is_the_sum_over_pairs(
    choice: str, tokens: int, e: int, dtype: torch.dtype, limit: float
):
    inputs = features(tokens, e)
    truth = with_gradients(over_pairs, inputs)
    with kernels.use(linear_attention=choice):
        values = with_gradients(linear_attention, [x.to(dtype) for x in inputs])
    for value, expected in zip(values, truth, strict=True):
        # The weights of a single token cancel, and only eps leaves q and k a small gradient.
        scale = max(expected.norm(), truth[0].norm())
        assert value.dtype == dtype
        assert (value - expected).norm() <= limit * scale


@pytest.mark.parametrize("choice", linear_attention.choices)
def test_a_query_without_features_gives_zero(choice: str):
    with kernels.use(linear_attention=choice):
        out = linear_attention(*features(7, 3, zeros=True))
    assert not out[:, :, 0].any() and out[:, :, 1:].any()


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def error(values: list[Tensor], truth: list[Tensor]) -> float:
    return max(
        ((value - expected).norm() / expected.norm()).item()
        for value, expected in zip(values, truth, strict=True)
    )


@pytest.mark.parametrize("choice", OF_ANY_SIZE["linear"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("lead", "wide", "out"),
    [((1,), 3, 5), ((3, 7), 13, 29), ((67,), 129, 31), ((2, 5, 11), 24, 96)],
)
def test_a_linear_layer_is_its_sum(
    choice: str, bias: bool, lead: tuple[int, ...], wide: int, out: int
):
    inputs = normal((*lead, wide), (out, wide), (out,))[: 2 + bias]
    truth = with_gradients(
        lambda x, w, b=None: torch.einsum("...i,oi->...o", x, w) + (0 if b is None else b), inputs
    )
    with kernels.use(linear=choice):
        assert error(with_gradients(linear, [x.float() for x in inputs]), truth) < 1e-6


@pytest.mark.parametrize("choice", OF_ANY_SIZE["pointwise"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("n", "wide", "out", "side"), [(1, 5, 3, 1), (2, 13, 29, 5), (3, 24, 48, 7)]
)
def test_a_pointwise_convolution_is_its_sum(
    choice: str, layout: torch.memory_format, n: int, wide: int, out: int, side: int
):
    inputs = normal((n, wide, side, side), (out, wide, 1, 1), (out,))
    truth = with_gradients(
        lambda x, w, b: torch.einsum("nihw,oiyx->nohw", x, w) + b[:, None, None], inputs
    )
    with kernels.use(pointwise=choice, linear="onednn"):
        x, *weights = (value.float() for value in inputs)
        assert (
            error(with_gradients(pointwise, [x.contiguous(memory_format=layout), *weights]), truth)
            < 1e-6
        )


@pytest.mark.parametrize("has_avx512, choice", [(True, "onednn"), (False, "reference")])
def test_large_float32_products_are_onednns_where_there_is_avx512(
    has_avx512: bool, choice: str, monkeypatch: pytest.MonkeyPatch
):
    # The package names the operation, not the module.
    monkeypatch.setattr(sys.modules["backbones.kernels.linear"], "_AVX512", has_avx512)
    x, w = (torch.randn(256, 256) for _ in range(2))
    kernels.reset_used()
    linear(x, w)
    assert kernels.used()["linear"] == [choice]
    kernels.reset_used()
    linear(x[:1], w), linear(x.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert kernels.used()["linear"] == ["reference"]
