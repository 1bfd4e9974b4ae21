"""Normalised linear attention against the sum over pairs of tokens, forward and backward, on awkward sizes."""

import pytest
import torch
from test_kernels_gla import with_gradients
from torch import Tensor

from backbones import kernels
from backbones.kernels import linear_attention


def features(tokens: int, e: int, zeros: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, e, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k = q.relu(), k.relu()
    if zeros:
        q[:, :, 0] = 0
    return [q, k, v]


def over_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation 3 of the paper, a query at a time, its denominator kept from zero by 1e-6 a token."""
    rows = []
    for i in range(q.shape[2]):
        weights = torch.einsum("nhe,nhje->nhj", q[:, :, i], k)
        rows.append(torch.einsum("nhj,nhje->nhe", weights, v) / (weights.sum(dim=-1, keepdim=True) + 1e-6 * k.shape[2]))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("choice", linear_attention.choices)
@pytest.mark.parametrize(("tokens", "e"), [(1, 5), (7, 3), (49, 11)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_linear_attention_is_the_sum_over_pairs(choice: str, tokens: int, e: int, dtype: torch.dtype, limit: float):
    inputs = features(tokens, e)
    truth = with_gradients(over_pairs, inputs)
    with kernels.use(linear_attention=choice):
        values = with_gradients(linear_attention, [x.to(dtype) for x in inputs])
    for value, expected in zip(values, truth, strict=True):
        # one token: its weights cancel in the quotient, and the gradient of q and k is the derivative of eps
        assert value.dtype == dtype and (value - expected).norm() <= limit * max(expected.norm(), truth[0].norm())


@pytest.mark.parametrize("choice", linear_attention.choices)
def test_a_query_without_features_gives_zero(choice: str):
    with kernels.use(linear_attention=choice):
        out = linear_attention(*features(7, 3, zeros=True))
    assert not out[:, :, 0].any() and out[:, :, 1:].any()
