"""The loss of DiMR, at every resolution that its network predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.specs.spec import Backbone, Data, Diffusion, Recipe, Train
from experiments.engine.training.trainer import Trainer
from tests.support.authors import CASES, build_like_authors, draw_normal, inputs_of

AUTHORS = {name: case for name, case in CASES.items() if name.startswith("dimr")}


def with_scales(*weights: float) -> Diffusion:
    return Diffusion(betas="stable_diffusion", variance="fixed", first_step=1, scales=weights)


@pytest.mark.parametrize("case", AUTHORS.values(), ids=AUTHORS)
def test_the_loss_is_that_of_the_authors_code(case: dict[str, Any]):
    """The clean image is chosen such that the noisy one is the case's input."""
    model = build_like_authors(case)
    process = build_diffusion(with_scales(*case["loss_weights"]))
    x, t, y = inputs_of(case)
    eps = draw_normal(case["noise_seed"], tuple(case["shape"])).float()
    index = t.long() - 1
    signal, noise = (table[index].reshape(-1, 1, 1, 1) for table in (process.signal, process.noise))
    x0 = ((x - noise * eps) / signal).float()

    losses = process.losses(process.training_entry(model), x0, y, index, eps)
    assert losses["loss"].tolist() == pytest.approx(case["loss"], abs=2 * case["tolerance"])


def test_a_training_reaches_every_parameter_and_spares_some_from_decay():
    """Heads of low resolution have gradients, and parameters of time do not decay."""
    options = backbones.tiny_options_of("dimr_xl_2r")
    network = Backbone("dimr_xl_2r", options | dict(input_size=8, in_channels=1, num_classes=10))
    data = Data("digits", 8, 1, 10)
    recipe = Recipe(steps=1, batch=4, lr=1e-3, weight_decay=0.03)
    trainer = Trainer(Train(network, data, recipe, with_scales(0.25, 1.0)))

    # Two groups of parameters, told apart by their names.
    others, exempt = trainer.optimizer.param_groups
    assert (others["weight_decay"], exempt["weight_decay"]) == (0.03, 0.0)
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert all("nodecay_" in names[p] for p in exempt["params"])
    assert not any("nodecay_" in names[p] for p in others["params"])
    assert len(others["params"]) + len(exempt["params"]) == len(names)

    # One step, of times with and without much noise.
    x0 = draw_normal(1, (4, 1, 8, 8)).float()
    t = torch.tensor([0, 30, 500, 999])
    trainer.forward_backward(x0, torch.tensor([1, 2, 3, 10]), t, torch.randn_like(x0))
    low_head = trainer.model.stages[0].output_layer[2].weight
    assert low_head.grad is not None
    assert low_head.grad.any()


def test_weights_must_fit_the_network():
    x = torch.zeros(2, 1, 4, 4)
    arguments = x, torch.tensor([0, 1]), torch.tensor([5, 7]), x

    def two_scales(x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        return [x[..., ::2, ::2], x]

    process = build_diffusion(with_scales(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="3 weights of losses for 2 resolutions"):
        process.losses(two_scales, *arguments)
    with pytest.raises(ValueError, match="Linear predicts at one resolution: leave out `scales`"):
        process.training_entry(nn.Linear(1, 1))
