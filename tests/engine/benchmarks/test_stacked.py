"""Stacked seeds train like single ones, whoever is beside them, and only if they are alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import backbones
from experiments.declared.protocols import DIGITS as PROTOCOL
from experiments.engine.benchmarks.small.against import Rounds
from experiments.engine.benchmarks.small.stacked import (
    StackedTraining,
    compare_stacked,
    draw_noise,
    measure_stacked,
)
from experiments.engine.numerics.stacked import Stack
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Recipe, Train
from tests.support.networks import randomise, relative_rms
from tests.support.trainings import DICO, DIGITS

IMAGES = draw_noise(DIGITS)


def trainings(*seeds: int, backbone: Backbone = DICO) -> list[Train]:
    recipe = Recipe(steps=9, batch=5, lr=1e-2, warmup=2, ema=0.5)
    return [Train(backbone, DIGITS, recipe, seed=seed) for seed in seeds]


def test_a_stack_runs_every_member_on_its_own_samples():
    """Forward and backward in float64, at an odd size and batch."""
    networks = [
        randomise(backbones.build(DICO.name, **DICO.options), seed).double() for seed in (1, 2, 3)
    ]
    size, channels = networks[0].input_size, networks[0].in_channels
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3 * 5, channels, size, size, generator=draw, dtype=torch.float64)
    t, y = torch.randint(1000, (15,), generator=draw), torch.randint(10, (15,), generator=draw)
    stack = Stack(networks)
    output = stack(x, t, y)
    weight = torch.randn(output.shape, generator=draw, dtype=torch.float64)
    (output * weight).sum().backward()
    gradients = dict(zip(stack.weights_of(0), (p.grad for p in stack.weights), strict=True))

    for member, network in enumerate(networks):
        part = slice(5 * member, 5 * member + 5)
        alone = network(x[part], t[part], y[part])
        assert relative_rms(output[part], alone) < 1e-12
        (alone * weight[part]).sum().backward()
        for name, p in network.named_parameters():
            assert relative_rms(gradients[name][member], p.grad) < 1e-10, name


def test_stacked_seeds_train_like_single_ones_whoever_is_beside_them():
    assert compare_stacked(trainings(0, 3), IMAGES, Rounds(3, 1))["difference"] < 1e-3
    first, second = (StackedTraining(trainings(0, other), IMAGES) for other in (1, 2))
    for _ in range(3):
        losses = torch.stack([stacked.step() for stacked in (first, second)])
    assert losses[0, 0] == pytest.approx(losses[1, 0].item(), rel=1e-5)
    assert losses[0, 1] != losses[1, 1]
    for name, weight in first.stack.weights_of(0).items():
        torch.testing.assert_close(second.stack.weights_of(0)[name], weight, rtol=1e-3, atol=1e-5)


def test_a_comparison_is_a_record(tmp_path: Path):
    store = Store(tmp_path)
    short = replace(PROTOCOL, recipe=replace(PROTOCOL.recipe, batch=3))
    measure_stacked([Row("row", DICO, {}, None)], short, 2, Rounds(3, 1), store)
    (record,) = store.here.all()
    assert (record.kind, record.spec["members"]) == ("stackedtrainings", 2)
    assert record.values["geometric_mean"] == record.values["rows"]["row"]["ratio"] > 0


def test_members_that_differ_are_refused_in_a_line():
    other = trainings(1, backbone=DICO.but(dim=16))
    with pytest.raises(ValueError, match="member 2 of a stack differs in architecture") as refusal:
        StackedTraining([*trainings(0), *other], IMAGES)
    assert "\n" not in str(refusal.value)
    clipped = [
        replace(each, recipe=replace(each.recipe, grad_clip=1.0)) for each in trainings(0, 1)
    ]
    with pytest.raises(ValueError, match="leave out grad_clip"):
        StackedTraining(clipped, IMAGES)
