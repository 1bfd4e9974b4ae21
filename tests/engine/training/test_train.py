"""The trainer against naive loops and stored loss traces.

`python -m tests.engine.training.test_train --write` writes the traces anew. Do so only for a
change that means to change numbers.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.engine.data.sets import batch_indices, load
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.specs.spec import Data, Diffusion, Recipe, Train
from experiments.engine.training.log import curve
from experiments.engine.training.optimiser import lr_at
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from tests.support.paths import DATA
from tests.support.trainings import DICO, DIGITS, FAMILIES, FLOW, OBJECTIVES, SPEC, STEPS

TRACES = DATA / "loss_traces.json"


def recipe(**changes: Any) -> Train:
    """A training of a tiny network, by a recipe with these changes."""
    fields = dict(steps=STEPS, batch=16, lr=1e-3) | changes
    return Train(DICO, DIGITS, Recipe(**fields))


def losses(spec: Train, micro_batch: int | None = None) -> list[float]:
    """The loss of every step."""
    trainer = Trainer(spec, Resources(micro_batch=micro_batch))
    return [loss.item() for loss in trainer.steps(load(spec.data))]


class Batch(NamedTuple):
    """What the loss is given in a step."""

    x0: Tensor
    y: Tensor
    t: Tensor
    eps: Tensor


def batches(spec: Train, steps: int, micro_batch: int | None = None) -> list[Batch]:
    """The batches of the first steps, each whole however it is cut."""
    trainer = Trainer(spec, Resources(micro_batch=micro_batch))
    parts: list[tuple[Tensor, ...]] = []

    def record(model: Any, *inputs: Tensor) -> dict[str, Tensor]:
        parts.append(inputs)
        return {"loss": next(trainer.model.parameters()).sum() * torch.zeros(len(inputs[0]))}

    # A step gives all of its parts to the losses.
    trainer.objective.losses = record
    stepping = trainer.steps(load(spec.data))
    whole = []
    for _ in range(steps):
        next(stepping)
        whole.append(Batch(*(torch.cat(part) for part in zip(*parts, strict=True))))
        parts.clear()
    return whole


# ---- Stored losses


def trace(name: str) -> list[float]:
    """Return the losses of five steps from weights that are zero nowhere.

    Behind closed gates a change could not be seen.
    """
    objective = OBJECTIVES.get(name, Diffusion())
    trainer = Trainer(Train(FAMILIES[name], DIGITS, Recipe(steps=5, batch=16, lr=1e-3), objective))
    draw = torch.Generator().manual_seed(0)
    for weight in trainer.model.parameters():
        if weight.requires_grad and not weight.any():
            nn.init.normal_(weight, std=0.1, generator=draw)
    return [loss.item() for loss in trainer.steps(load(DIGITS))]


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_the_stored_ones(name: str):
    stored = json.loads(TRACES.read_text())
    if not torch.__version__.startswith(stored["torch"]):
        pytest.skip(
            f"the traces are torch {stored['torch']}'s; other versions draw other initial weights"
        )
    assert trace(name) == pytest.approx(stored[name], rel=1e-4)


def test_stored_losses_tell_the_families_apart():
    """No two families end within twice the tolerance of the test above."""
    stored = json.loads(TRACES.read_text())
    last = sorted(values[-1] for name, values in stored.items() if name != "torch")
    assert len(last) == len(FAMILIES)
    assert min(np.diff(last) / last[1:]) > 2e-4


def test_the_loss_decreases():
    values = losses(recipe(steps=60, lr=5e-3))
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


@pytest.mark.parametrize(
    ("num", "every", "points"),
    [(0, 50, 0), (1, 50, 1), (100, 50, 100), (101, 100, 51), (8000, 4000, 100)],
)
def test_a_records_loss_curve_is_short_and_keeps_the_mean(num: int, every: int, points: int):
    means = [float(number) for number in range(num)]
    short = curve(means, 50)
    assert short["every"] == every
    assert len(short["losses"]) == points

    # Every whole window is the mean of its part.
    width = every // 50
    starts = range(0, num - num % width, width)
    expected = [sum(means[start : start + width]) / width for start in starts]
    assert short["losses"][: num // width] == expected


# ---- Learning rate, clipping, epsilon


@pytest.mark.parametrize(
    "decay, steps, rates",
    [
        ("constant", (0, 4, 9, 10, 99), (0.2, 1.0, 2.0, 2.0, 2.0)),
        ("cosine", (0, 4, 9, 10), (0.2, 1.0, 2.0, 2.0)),
        ("linear", (9, 10, 60, 110), (2.0, 2.0, 1.0, 0.0)),
    ],
)
def test_the_learning_rate_warms_up_and_decays_as_declared(
    decay: str, steps: tuple[int, ...], rates: tuple[float, ...]
):
    declared = Recipe(steps=110, batch=1, lr=2.0, warmup=10, decay=decay)
    assert [lr_at(declared, step) for step in steps] == pytest.approx(rates)


def test_cosine_decay_in_closed_form():
    cosine = Recipe(steps=110, batch=1, lr=2.0, warmup=10, decay="cosine")
    for quarter, step in enumerate((10, 35, 60, 85, 110)):
        angle = quarter * math.pi / 4
        assert lr_at(cosine, step) == pytest.approx(2 * math.cos(angle / 2) ** 2, abs=1e-12)
    for step in range(10, 109):
        assert lr_at(cosine, step) > lr_at(cosine, step + 1)


def test_an_unknown_decay_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="known: constant, linear, cosine"):
        lr_at(Recipe(steps=1, batch=1, decay="quadratic"), 0)


def test_the_learning_rate_ends_where_it_is_declared():
    declared = Recipe(steps=110, batch=1, lr=2.0, lr_min=0.5, warmup=10, decay="cosine")
    rates = [lr_at(declared, step) for step in (9, 10, 60, 110)]
    assert rates == pytest.approx([2.0, 2.0, 1.25, 0.5])


def gradient_norm(limit: float | None) -> float:
    """The norm of all gradients with which the first step is made."""
    trainer = Trainer(recipe(grad_clip=limit))
    norms: list[float] = []

    def measure() -> None:
        gradients = [weight.grad.flatten() for weight in trainer.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    trainer.optimizer.step = measure
    next(trainer.steps(load(DIGITS)))
    (norm,) = norms
    return norm


def test_gradients_are_clipped_to_the_declared_norm():
    free = gradient_norm(None)
    assert free > 1e-2
    assert gradient_norm(1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert gradient_norm(1e9) == free


def test_the_optimisers_epsilon_is_the_declared_one():
    default = losses(recipe(steps=3))
    assert losses(recipe(steps=3, eps=1e-8)) == default
    assert losses(recipe(steps=3, eps=1e-2)) != default


# ---- Batches


def test_flows_draw_times_between_0_and_1_and_leave_the_rest_as_it_is():
    flow = batches(replace(SPEC, diffusion=FLOW), 1)[0]
    assert flow.t.dtype == torch.float32
    assert flow.t.min() >= 0
    assert flow.t.max() < 1
    assert len(flow.t.unique()) == len(flow.t)

    # Images are the same as those of discrete steps, and labels and noise have their shapes.
    discrete = batches(SPEC, 1)[0]
    assert discrete.t.dtype == torch.long
    assert torch.equal(flow.x0, discrete.x0)
    assert flow.eps.shape == flow.x0.shape
    assert flow.y.shape == discrete.y.shape


def test_labels_are_dropped_one_by_one_at_the_declared_rate():
    spec = recipe(batch=64, steps=60, label_dropout=0.25)
    drawn = batches(spec, 60, micro_batch=24)
    dropped = torch.stack([batch.y == 10 for batch in drawn])  # (60, 64)

    # The share over all images, and its spread over batches, are those of independent draws.
    deviation = math.sqrt(0.25 * 0.75)
    assert abs(dropped.double().mean() - 0.25) < 4 * deviation / math.sqrt(dropped.numel())
    assert dropped.double().mean(1).std() < 2 * deviation / math.sqrt(64)
    assert not dropped.all(1).any()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_label_or_every_label_is_dropped_at_the_ends(rate: float):
    (batch,) = batches(recipe(label_dropout=rate), 1)
    assert (batch.y == 10).double().mean() == rate


def test_a_batch_is_drawn_whole_however_it_is_cut():
    whole = batches(SPEC, 3)
    cut = batches(SPEC, 3, micro_batch=5)
    for one, other in zip(whole, cut, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def test_every_image_has_its_own_noise_and_time():
    drawn = batches(SPEC, 3)
    eps = torch.cat([batch.eps for batch in drawn])
    t = torch.cat([batch.t for batch in drawn])
    assert len(eps.flatten(1).unique(dim=0)) == 48
    assert t.min() >= 0
    assert t.max() < 1000
    assert len(t.unique()) > 40


def test_half_of_the_images_are_flipped_where_declared():
    flipped = Train(DICO, Data("digits", 8, 1, 10, flip=True), SPEC.recipe)
    straight = torch.cat([batch.x0 for batch in batches(SPEC, STEPS)])
    mirrored = torch.cat([batch.x0 for batch in batches(flipped, STEPS)])
    kept = (mirrored == straight).flatten(1).all(1)
    assert torch.equal(mirrored[~kept], straight[~kept].flip(-1))
    assert 0.35 < kept.double().mean() < 0.65


# ---- Gradients and averages


def first_gradients(micro_batch: int | None) -> dict[str, Tensor]:
    """The gradients of the first step, from weights that are zero nowhere."""
    trainer = Trainer(recipe(lr=1e-2), Resources(micro_batch=micro_batch))
    for weight in trainer.model.parameters():
        draw = torch.Generator().manual_seed(weight.numel())
        nn.init.normal_(weight, std=0.1, generator=draw)

    # The optimiser keeps the gradients, and updates nothing.
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        for name, weight in trainer.model.named_parameters():
            gradients[name] = weight.grad.clone()

    trainer.optimizer.step = keep
    next(trainer.steps(load(DIGITS)))
    return gradients


def test_gradients_accumulate_to_those_of_the_whole_batch():
    whole = first_gradients(None)
    cut = first_gradients(5)
    scale = max(gradient.norm() for gradient in whole.values())
    for name, gradient in whole.items():
        assert gradient.any(), name
        assert (cut[name] - gradient).norm() < 1e-5 * scale, name


def test_a_batch_that_is_cut_trains_like_a_whole_one():
    assert losses(SPEC, micro_batch=5) == pytest.approx(losses(SPEC), rel=1e-5)


@pytest.mark.parametrize("mixer", ["conv", "window"])
def test_the_average_of_the_weights_is_that_of_a_naive_loop(mixer: str):
    trainer = Trainer(Train(FAMILIES[f"hourglass {mixer}"], DIGITS, recipe(ema=0.7).recipe))
    expected = copy.deepcopy(dict(trainer.model.named_parameters()))
    for _, _ in zip(trainer.steps(load(DIGITS)), range(5), strict=False):
        for name, value in trainer.model.named_parameters():
            expected[name] = 0.7 * expected[name] + (1 - 0.7) * value.detach()

        averaged = dict(trainer.ema.named_parameters())
        assert averaged.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(averaged[name], value, rtol=1e-5, atol=1e-7), name

    # Buffers are copied, not averaged.
    for own, averaged in zip(trainer.model.buffers(), trainer.ema.buffers(), strict=True):
        assert torch.equal(own, averaged)


def test_the_average_starts_at_the_weights_and_is_not_trained():
    trainer = Trainer(SPEC)
    assert digest(trainer.ema) == digest(trainer.model)
    assert not any(weight.requires_grad for weight in trainer.ema.parameters())


# ---- Seeds and failures


def test_the_seed_decides_everything():
    first = losses(recipe(steps=3))

    # The process's own generator has no part in it, and is left as it was.
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert losses(recipe(steps=3)) == first
    assert torch.equal(torch.get_rng_state(), state)

    assert losses(replace(recipe(steps=3), seed=1)) != first


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    lr: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def infinite_loss(self: IDDPM, model: nn.Module, x: Tensor, y: Tensor, t: Tensor, eps: Tensor):
        return {"loss": model(x, t, y).sum(dim=(1, 2, 3)) * lr * math.inf}

    monkeypatch.setattr(IDDPM, "losses", infinite_loss)
    complaint = "^the loss is .* at step 1; lower the learning rate"
    with pytest.raises(ValueError, match=complaint) as failure:
        run_training(recipe(lr=lr), RunContext(tmp_path))
    assert "\n" not in str(failure.value)

    # The record of the failure names step and batch, and no checkpoint holds the weights.
    diagnosis = failure.value.values.pop("diagnosis")
    assert diagnosis["passes"]["fp32"]["module"] == "loss"
    assert failure.value.values == {
        "stopped_at": 1,
        "batch": batch_indices(len(load(DIGITS)), 16, 0, 0).tolist(),
        "last_checkpoint": 0,
    }
    assert not list(tmp_path.glob("checkpoints/*"))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.engine.training.test_train --write")
    torch.set_num_threads(1)
    version = {"torch": ".".join(torch.__version__.split(".")[:2])}
    TRACES.write_text(
        json.dumps(version | {name: trace(name) for name in FAMILIES}, indent=1) + "\n"
    )
