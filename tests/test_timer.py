"""The timer refuses what does not compute the reference, and leaves the flags as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backbones.kernels.attention import attention
from backbones.kernels.op import Choice
from experiments.engine import timing
from experiments.engine.precision import flags
from experiments.engine.spec import Backbone, Cost, Timing

TINY = Backbone("dit_s_2", dict(depth=1, dim=24, heads=3))
OTHER = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))


def spec(**changes: object) -> Timing:
    return Timing(**(dict(backbone=TINY, size=8, channels=3, num_classes=5, batch=2, device="cpu") | changes))


@pytest.fixture
def wrong() -> Iterator[None]:
    """An implementation of attention that forgets the softmax."""
    attention.choices = {"wrong": Choice("wrong", lambda q, k, v, bias=None: (q @ k.transpose(-2, -1)) @ v)} | attention.choices
    yield
    attention.choices.pop("wrong")


def test_figures_and_flags():
    before = flags()
    values = timing.run(spec(baseline=OTHER, kernels={"attention": "reference"}))
    assert flags() == before
    assert values["images_per_s"] > 0 and values["relative"] > 0 and values["images_per_s_spread"] >= 0
    assert values["matmul_tf32"] is values["cudnn_tf32"] is False and values["runs"] >= timing.FEWEST
    assert values["peak_memory_bytes"] is None


def test_the_baseline_is_one():
    assert timing.run(spec(baseline=TINY))["relative"] == 1.0


@pytest.mark.parametrize("kernels", [{}, {"attention": "wrong"}])
def test_a_wrong_kernel_is_not_timed(wrong: None, kernels: dict[str, str]):
    with pytest.raises(ValueError, match="differs from its reference"):
        timing.run(spec(kernels=kernels))
    assert timing.run(spec(kernels={"attention": "sdpa"}))["images_per_s"] > 0


def test_unknown_kernels_list_the_known():
    with pytest.raises(ValueError, match="flash, sdpa, reference"):
        timing.run(spec(kernels={"attention": "fast"}))


def test_zero_heads_are_filled_so_that_kernels_show():
    model = timing._network(Cost(TINY, 8, 3, 5), torch.device("cpu"))
    x = torch.randn(1, 3, 8, 8)
    assert model(x, torch.tensor([3]), torch.tensor([1])).abs().max() > 0
