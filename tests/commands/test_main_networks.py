"""Every network of Tables 1, 2, 8 and 9 trains and samples by its own objective and sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import backbones
from experiments.declared.families import family_of
from experiments.declared.protocols import DIGITS, PROTOCOLS
from experiments.engine.data.sets import load
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import System
from experiments.engine.diffusion.samplers import bind_sampler
from experiments.engine.numerics.weights import digest
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Evaluate, Train
from experiments.engine.specs.stages import Protocol, evaluate_stage
from experiments.engine.training.networks import build
from experiments.engine.training.trainer import Trainer
from experiments.main_results import TABLES
from tests.support.main_rows import SMALL_ROWS, SMALL_TRAININGS
from tests.support.marks import slow_after_first

CPU = torch.device("cpu")
NETWORKS = [
    pytest.param(table, row, id=f"{table.number} {row.label}")
    for table in TABLES.values()
    for row in table.rows
    if row.backbone
]
# Parts of names of weights without a gradient. A softmax is 1 on LDM's one context token and on
# U-DiT's single tokens. The released DiMSUM does not use one of its projections.
DEAD = {
    "ldm": ("attn2.to_q", "attn2.to_k", "norm2"),
    "udit": ("latent.0.attn1.logit_scale", "latent.0.attn2.logit_scale"),
    "dimsum": ("cond_proj",),
}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("table, row", NETWORKS)
def test_network_objective_and_sampler_fit_each_other(table: Table, row: Row, protocol: Protocol):
    stage = evaluate_stage(row, protocol, 0)
    recipe = stage.train.recipe
    bind_sampler(stage.sampler, build_diffusion(stage.train.diffusion))  # raises if it cannot

    # Labels are dropped only by a network that has a null label, and guidance needs dropped labels.
    backbone = stage.train.backbone
    options = backbones.options_of(backbone.name) | backbone.options
    assert recipe.label_dropout == 0 or options.get("null_label", True)
    assert stage.sampler.scale == 1 or recipe.label_dropout > 0

    # Scale and steps are the protocol's, unless the row's paper decides.
    if not protocol.own:
        assert stage.sampler.scale == (protocol.sampler.scale if recipe.label_dropout else 1)
        assert stage.sampler.num_steps <= protocol.sampler.num_steps


def open_gates(model: nn.Module, draw: torch.Generator) -> None:
    """Draw the weights that start at zero, behind which no gradient passes."""
    for weight in model.parameters():
        if weight.requires_grad and not weight.any():
            nn.init.normal_(weight, std=0.1, generator=draw)


@pytest.mark.parametrize("spec", SMALL_TRAININGS.values(), ids=SMALL_TRAININGS)
def test_a_familys_loss_trains_all_of_its_small_network(spec: Train):
    """Every live parameter has a gradient once no gate is closed, and the loss is finite."""
    draw = torch.Generator().manual_seed(0)
    model = build(spec.backbone, 0, CPU)
    open_gates(model, draw)

    # One batch of four images; one label is dropped if the recipe drops any.
    shape = (4, 1, spec.data.size, spec.data.size)
    x0 = torch.randn(shape, generator=draw)
    eps = torch.randn(shape, generator=draw)
    y = torch.tensor([0, 3, 9, 10 if spec.recipe.label_dropout else 1])
    objective = build_diffusion(spec.diffusion)
    loss = objective.losses(model, x0, y, objective.draw_times(4, draw), eps)["loss"]
    loss.mean().backward()
    assert loss.shape == (4,)
    assert loss.isfinite().all()

    known = DEAD.get(family_of(spec.backbone.name), ())
    for name, weight in model.named_parameters():
        if weight.requires_grad and not any(part in name for part in known):
            assert weight.grad is not None, name
            assert weight.grad.any(), name


def train_two_steps(training: Train) -> nn.Module:
    """Return the averaged weights after two steps, which must have moved them."""
    trainer = Trainer(replace(training, recipe=replace(training.recipe, steps=2, batch=4)))
    before = digest(trainer.model)
    losses = [loss.item() for loss in trainer.steps(load(training.data))]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert digest(trainer.ema.eval()) != before
    return trainer.ema


def shorten(stage: Evaluate) -> Evaluate:
    """Two images of three steps."""
    upsampling = stage.upsampling and replace(stage.upsampling, num_steps=3)
    sampler = replace(stage.sampler, num_steps=3)
    return replace(stage, sampler=sampler, upsampling=upsampling, num=2)


@pytest.mark.parametrize(
    "row",
    slow_after_first(
        SMALL_ROWS.values(), lambda row: family_of(row.backbone.name), lambda row: row.label
    ),
)
def test_every_family_trains_and_samples_on_digits(row: Row):
    stage = evaluate_stage(row, DIGITS, 0)
    base = train_two_steps(stage.train)
    classifier = stage.classifier and train_two_steps(stage.classifier)
    upsampler = stage.upsampler and train_two_steps(stage.upsampler)
    is_system = classifier is not None or upsampler is not None

    short = shorten(stage)
    counted = CountingModel(System(base, classifier, upsampler) if is_system else base)
    ((x, y),) = generate_images(short, counted, CPU, 2)
    assert x.shape == (2, 1, 8, 8)
    assert x.isfinite().all()
    assert not torch.equal(x[0], x[1])
    assert y.tolist() == [0, 1]

    # An adaptive sampler decides itself, and takes at least its first step and its choice of one.
    if short.sampler.name == "dopri5":
        assert counted.evaluated >= 2 * 8
    else:
        assert counted.evaluated == 2 * 3 * (2 if upsampler else 1)
