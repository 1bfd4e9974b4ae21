"""Updates of all tensors at once equal PyTorch's, tensor by tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import kernels
from backbones.kernels import rows
from experiments.engine.specs.spec import Recipe
from experiments.engine.training.optimiser import build_optimizer, load_optimizer
from tests.support.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED or rows.library() is None, reason="needs a C compiler and AVX2"
)

RECIPE = Recipe(steps=10, batch=2, lr=0.03, betas=(0.8, 0.99), weight_decay=0.1, eps=1e-6)


def network() -> nn.Module:
    """Build layers whose numbers of weights fill no whole vectors, and of both layouts."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(7, 1), nn.Linear(8, 16))
    return layers.to(memory_format=torch.channels_last)


def draw_grads(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(generator=generator)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def assert_close(values: list[Tensor], truths: list[Tensor]) -> None:
    for value, truth in zip(values, truths, strict=True):
        torch.testing.assert_close(value, truth.to(value.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("choice", ["rows", "reference"])
def test_an_average_moves_by_a_share_of_the_distance(choice: str):
    averages, weights = weights_of(network()), weights_of(copy.deepcopy(network()))
    weights = [2 * w for w in weights]
    pairs = zip(averages, weights, strict=True)
    truths = [a.double() + 0.3 * (w.double() - a.double()) for a, w in pairs]
    with kernels.use(lerp=choice):
        kernels.lerp(averages, weights, 0.3)
    assert_close(averages, truths)


def test_the_steps_are_those_of_pytorch_in_float64():
    ours, theirs = network(), network().double()
    optimizer: Any = build_optimizer(ours, RECIPE, is_sharded=False)
    numbers = dict(lr=RECIPE.lr, betas=RECIPE.betas, eps=RECIPE.eps, weight_decay=0.1)
    truth = torch.optim.AdamW(theirs.parameters(), **numbers)
    for step in range(5):
        draw_grads(ours, step)
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.grad = q.grad.double()
        optimizer.param_groups[0]["lr"] = truth.param_groups[0]["lr"] = 0.03 / (1 + step)
        with kernels.use(adamw="rows"):
            optimizer.step()
        truth.step()
    assert_close(weights_of(ours), weights_of(theirs))

    # The state is what PyTorch's optimiser has, so either goes on from the other.
    state = optimizer.state_dict()["state"][0]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 5
    other = build_optimizer(network(), RECIPE, is_sharded=False)
    load_optimizer(other, optimizer.state_dict())
    assert other.state_dict()["state"][0]["step"] == 5


@pytest.mark.parametrize("choice", ["rows", "reference"])
def test_a_bad_step_changes_nothing(choice: str):
    model = network()
    optimizer: Any = build_optimizer(model, RECIPE, is_sharded=False)
    draw_grads(model, 0)
    optimizer.step()
    before = copy.deepcopy((weights_of(model), optimizer.state_dict()["state"]))
    draw_grads(model, 1)
    optimizer.found_inf = torch.ones(())
    with kernels.use(adamw=choice):
        optimizer.step()
    assert_close(weights_of(model), before[0])
    for place, values in optimizer.state_dict()["state"].items():
        assert_close(list(values.values()), list(before[1][place].values()))


def test_tensors_that_lie_otherwise_take_pytorchs_way():
    """A gradient in another order of memory than its weight."""
    weight = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 2, 2)
    assert not kernels.adamw.choices["rows"].supports([weight], [grad])
    assert kernels.adamw.choices["rows"].supports([weight], [torch.empty_like(weight)])
