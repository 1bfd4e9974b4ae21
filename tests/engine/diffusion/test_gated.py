"""The objective of a network with gates: its target, its noise, its losses and what it records."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.objectives import Gated, WithShare
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.specs.spec import Backbone, Data, Diffusion, Recipe, Train
from experiments.engine.timing.gates import time_gates
from experiments.engine.training.trainer import Trainer
from tests.support.networks import randomise

DATA = Data("digits", 8, 1, 10)
SHAPE = dict(input_size=8, in_channels=1, num_classes=10, dim=48, depth=2, heads=3)
HALF = Diffusion(used_share=0.5, share_steps=200, complete_steps=1)
DIT = Train(Backbone("dit_s_2", SHAPE), DATA, Recipe(steps=2, batch=8, lr=1e-3))
DYDIT = replace(DIT, backbone=Backbone("dydit_s_2", SHAPE), diffusion=HALF, init_from=DIT)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, y, t and eps of five images."""
    draw = torch.Generator().manual_seed(1)
    x0 = torch.randn(5, 1, 8, 8, generator=draw)
    eps = torch.randn(5, 1, 8, 8, generator=draw)
    return x0, torch.tensor([0, 3, 10, 9, 1]), torch.tensor([0, 250, 500, 750, 999]), eps


def gated(**changes: object) -> Gated:
    process = build_diffusion(replace(HALF, **changes))
    assert isinstance(process, Gated)
    return process


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(backbones.build("dydit_s_2", **SHAPE))


@pytest.mark.parametrize(
    ("step", "target"), [(0, 1.0), (99, 1.0), (100, 0.75), (150, 0.625), (200, 0.5), (900, 0.5)]
)
def test_the_target_is_whole_and_then_on_a_line_to_the_share(step: int, target: float):
    process = gated()
    process.step = step
    assert process.target == pytest.approx(target)


def test_a_batch_draws_its_times_from_all_quarters():
    t = gated().draw_times(403, torch.Generator().manual_seed(0))
    assert torch.equal(t // 250, torch.arange(403) % 4)
    assert len(set((t % 250).tolist())) > 150


def test_the_noise_of_gates_is_logistic():
    """A gate is on with the probability that its logit says."""
    process, model = gated(), network()
    noise = process.draw_gate_noise(model, 2000, torch.Generator().manual_seed(0))
    assert noise.shape == (2000, 2 * (2 + 2 + 16))
    assert (noise + 1 > 0).float().mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_losses_are_those_of_the_gated_network_and_of_its_share():
    """Written out for one step before, and one after, the network without gates has a loss."""
    model = network()
    process, plain = gated(), build_diffusion(Diffusion())
    x0, y, t, eps = batch()
    process.step = 300
    losses = process.losses(WithShare(model), x0, y, t, eps)

    with_gates = plain.losses(model, x0, y, t, eps)
    assert 0.1 < losses["share"].mean() < 0.95
    penalty = 2 * (losses["share"].mean() - 0.5) ** 2
    torch.testing.assert_close(losses["loss"], with_gates["loss"] + penalty)

    # In the first steps the target is the whole network.
    process.step = 0
    complete = plain.losses(model.forward_complete, x0, y, t, eps)
    penalty = 2 * (losses["share"].mean() - 1) ** 2
    expected = with_gates["loss"] + penalty + complete["loss"]
    torch.testing.assert_close(process.losses(WithShare(model), x0, y, t, eps)["loss"], expected)


def test_a_fine_tuning_starts_from_a_dense_network_and_trains_its_routers():
    """At first it computes what the dense network does, and its loss reaches every router."""
    dense = Trainer(DIT).model
    trainer = Trainer(DYDIT)
    trainer.start_from(randomise(dense))
    x0, y, t, eps = batch()
    with torch.no_grad():
        # Gates that are all on change the order of additions on some processors.
        torch.testing.assert_close(trainer.model(x0, t, y), dense(x0, t, y), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trainer.ema(x0, t, y), dense(x0, t, y), rtol=1e-4, atol=1e-4)

    # One step, with the noise of the gates.
    trainer.objective.step = 300
    noise = trainer.objective.draw_gate_noise(trainer.model, 5, torch.Generator().manual_seed(0))
    trainer.forward_backward(x0, y, t, eps, noise)
    for name, p in trainer.model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    named = dict(trainer.model.named_parameters())
    routers = [named[name] for name in named if ".router." in name or ".token_selection." in name]
    assert len(routers) == 2 * 8
    assert all(p.grad is not None and p.grad.any() for p in routers)


def test_sampling_hears_the_share_of_every_evaluation():
    model = network().eval()
    counting = CountingModel(model)
    x0, y, t, _ = batch()
    with torch.no_grad():
        assert torch.equal(counting(x0, t, y), model(x0, t, y))
        _, share = model.forward_with_share(x0, t, y)
    assert torch.equal(torch.cat(counting.shares), share)
    assert CountingModel(backbones.build("dit_s_2", **SHAPE)).with_share is None


def test_every_path_is_timed_at_every_time_of_the_sampler():
    model, process = network().eval(), gated()
    x0, y, *_ = batch()
    values = time_gates(model, process, 3, x0, y % 10)
    assert values["timed_batch"] == 5
    assert all(values[f"{name}_speed_up"] > 0 for name in ("gathered", "masked"))
    assert values["complete_s"] > 0
    # Attention of 16 tokens with its products, and an MLP four times as wide, in two blocks.
    assert model.gated_work == 2 * (4 * 16 * 48**2 + 2 * 16**2 * 48 + 8 * 16 * 48**2)


def test_a_network_without_gates_is_refused():
    with pytest.raises(ValueError, match="DiT has no gates: leave out `used_share`"):
        Trainer(replace(DIT, diffusion=HALF))
