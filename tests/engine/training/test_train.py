"""The trainer against naive loops and stored loss traces.

`python -m tests.engine.training.test_train --write` writes the traces anew. Do so only for a
change that means to change numbers.
"""

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.engine.data.sets import batch_indices, load
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.numerics.precision import MODES, precision, read_tf32_flags
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.specs.spec import Data, Diffusion, Recipe, Train
from experiments.engine.training.log import curve
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer, lr_at
from tests.support.paths import DATA
from tests.support.trainings import (
    CPU,
    DICO,
    DIGITS,
    FAMILIES,
    FLOW,
    OBJECTIVES,
    SPEC,
    STEPS,
)

TRACES = DATA / "loss_traces.json"


def recipe(**changes: Any) -> Train:
    return Train(DICO, DIGITS, Recipe(**(dict(steps=STEPS, batch=16, lr=1e-3) | changes)))


def losses(spec: Train, micro_batch: int | None = None) -> list[float]:
    return [
        loss.item()
        for loss in Trainer(spec, Resources(micro_batch=micro_batch)).steps(load(spec.data))
    ]


def trace(name: str) -> list[float]:
    """Return the losses of five steps from weights that are zero nowhere.

    Behind closed gates a change could not be seen.
    """
    spec = Train(
        FAMILIES[name],
        DIGITS,
        Recipe(steps=5, batch=16, lr=1e-3),
        OBJECTIVES.get(name, Diffusion()),
    )
    trainer = Trainer(spec)
    draw = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    return [loss.item() for loss in trainer.steps(load(DIGITS))]


@pytest.mark.parametrize(
    ("num", "every", "points"),
    [(0, 50, 0), (1, 50, 1), (100, 50, 100), (101, 100, 51), (8000, 4000, 100)],
)
def test_a_records_loss_curve_is_short_and_keeps_the_mean(num: int, every: int, points: int):
    means = [float(number) for number in range(num)]
    found = curve(means, 50)
    assert found["every"] == every
    assert len(found["losses"]) == points
    wide = every // 50
    assert found["losses"][: num // wide] == [
        sum(means[at : at + wide]) / wide for at in range(0, num - num % wide, wide)
    ]


def seen(spec: Train, steps: int, micro_batch: int | None = None) -> list[list[Tensor]]:
    """x0, y, t and eps that the loss is given, a batch a step."""
    trainer = Trainer(spec, Resources(micro_batch=micro_batch))
    parts = []

    def record(model: Any, *inputs: Tensor) -> dict[str, Tensor]:
        parts.append(inputs)
        return {"loss": next(trainer.model.parameters()).sum() * torch.zeros(len(inputs[0]))}

    trainer.diffusion.losses = record
    stepping = trainer.steps(load(spec.data))
    batches = []
    for _ in range(steps):
        next(stepping)
        batches.append([torch.cat(part) for part in zip(*parts, strict=True)])
        parts.clear()
    return batches


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_the_stored_ones(name: str):
    stored = json.loads(TRACES.read_text())
    if not torch.__version__.startswith(stored["torch"]):
        pytest.skip(
            f"the traces are torch {stored['torch']}'s; other versions draw other initial weights"
        )
    assert trace(name) == pytest.approx(stored[name], rel=1e-4)


def test_stored_losses_tell_the_families_apart():
    last = sorted(
        values[-1] for name, values in json.loads(TRACES.read_text()).items() if name != "torch"
    )
    assert len(last) == len(FAMILIES)
    assert min(np.diff(last) / last[1:]) > 2e-4


def test_learning_rate_in_closed_form():
    constant = Recipe(steps=100, batch=1, lr=2.0, warmup=10)
    cosine = Recipe(steps=110, batch=1, lr=2.0, warmup=10, decay="cosine")
    for rates in (constant, cosine):
        assert [lr_at(rates, step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert lr_at(constant, 99) == 2.0
    assert [lr_at(cosine, step) for step in (35, 60, 85, 110)] == pytest.approx(
        [
            2 * math.cos(angle / 2) ** 2
            for angle in (math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi)
        ],
        abs=1e-12,
    )
    assert all(lr_at(cosine, step) > lr_at(cosine, step + 1) for step in range(10, 109))
    linear = Recipe(steps=110, batch=1, lr=2.0, warmup=10, decay="linear")
    assert [lr_at(linear, step) for step in (9, 10, 60, 110)] == pytest.approx([2.0, 2.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="known: constant, linear, cosine"):
        lr_at(Recipe(steps=1, batch=1, decay="quadratic"), 0)


def test_learning_rate_ends_where_it_is_declared():
    rates = Recipe(steps=110, batch=1, lr=2.0, lr_min=0.5, warmup=10, decay="cosine")
    assert [lr_at(rates, step) for step in (9, 10, 60, 110)] == pytest.approx([2.0, 2.0, 1.25, 0.5])


def test_gradients_are_clipped_to_the_declared_norm():
    norms: dict[float | None, float] = {}
    for limit in (None, 1e-3, 1e9):
        trainer = Trainer(recipe(grad_clip=limit))
        trainer.optimizer.step = lambda trainer=trainer, limit=limit: norms.update(
            {limit: torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()}
        )
        next(trainer.steps(load(DIGITS)))
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e9] == norms[None] > 1e-2


def test_the_optimisers_epsilon_is_the_declared_one():
    assert (
        losses(recipe(steps=3))
        == losses(recipe(steps=3, eps=1e-8))
        != losses(recipe(steps=3, eps=1e-2))
    )


def test_flows_draw_times_between_0_and_1_and_leave_the_rest_as_it_is():
    flow = replace(SPEC, diffusion=FLOW)
    (x0, y, t, eps), (x0_other, y_other, steps, _) = seen(flow, 1)[0], seen(SPEC, 1)[0]
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() < 1
    assert len(t.unique()) == len(t)
    assert torch.equal(x0, x0_other)
    assert eps.shape == x0.shape
    assert steps.dtype == torch.long
    assert y.shape == y_other.shape


def test_labels_are_dropped_one_by_one_at_the_declared_rate():
    spec = recipe(batch=64, steps=60, label_dropout=0.25)
    dropped = torch.stack([y == 10 for _, y, _, _ in seen(spec, 60, micro_batch=24)])  # (60, 64)
    assert abs(dropped.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / dropped.numel())
    assert dropped.double().mean(1).std() < 2 * math.sqrt(0.25 * 0.75 / 64)
    assert not dropped.all(1).any()
    for rate, share in ((0.0, 0.0), (1.0, 1.0)):
        assert (seen(recipe(label_dropout=rate), 1)[0][1] == 10).double().mean() == share


def test_a_batch_is_drawn_whole_however_it_is_cut():
    whole = seen(SPEC, 3)
    cut = seen(SPEC, 3, micro_batch=5)
    assert all(
        torch.equal(a, b)
        for one, other in zip(whole, cut, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    eps = torch.cat([batch[3] for batch in whole])
    t = torch.cat([batch[2] for batch in whole])
    assert len(eps.flatten(1).unique(dim=0)) == 48
    assert t.min() >= 0
    assert t.max() < 1000
    assert len(t.unique()) > 40


def test_half_of_the_images_are_flipped_where_declared():
    straight = torch.cat([batch[0] for batch in seen(SPEC, STEPS)])
    mirrored = torch.cat(
        [
            batch[0]
            for batch in seen(Train(DICO, Data("digits", 8, 1, 10, flip=True), SPEC.recipe), STEPS)
        ]
    )
    kept = (mirrored == straight).flatten(1).all(1)
    assert torch.equal(mirrored[~kept], straight[~kept].flip(-1))
    assert 0.35 < kept.double().mean() < 0.65


def test_gradients_accumulate_to_those_of_the_whole_batch():
    gradients: list[dict[str, Tensor]] = []
    for micro_batch in (None, 5):
        trainer = Trainer(recipe(lr=1e-2), Resources(micro_batch=micro_batch))
        for parameter in trainer.model.parameters():
            torch.nn.init.normal_(
                parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel())
            )
        trainer.optimizer.step = lambda trainer=trainer: gradients.append(
            {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        )
        next(trainer.steps(load(DIGITS)))
    whole, cut = gradients
    scale = max(gradient.norm() for gradient in whole.values())
    assert all(
        (cut[name] - gradient).norm() < 1e-5 * scale and gradient.any()
        for name, gradient in whole.items()
    )
    assert losses(SPEC, micro_batch=5) == pytest.approx(losses(SPEC), rel=1e-5)


@pytest.mark.parametrize("mixer", ["conv", "window"])
def test_average_of_the_weights_against_a_naive_loop(mixer: str):
    trainer = Trainer(Train(FAMILIES[f"hourglass {mixer}"], DIGITS, recipe(ema=0.7).recipe))
    expected = copy.deepcopy(dict(trainer.model.named_parameters()))
    for _, _ in zip(trainer.steps(load(DIGITS)), range(5), strict=False):
        for name, value in trainer.model.named_parameters():
            expected[name] = 0.7 * expected[name] + (1 - 0.7) * value.detach()
        averaged = dict(trainer.ema.named_parameters())
        assert averaged.keys() == expected.keys()
        assert all(
            torch.allclose(averaged[name], expected[name], rtol=1e-5, atol=1e-7)
            for name in expected
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.model.buffers(), trainer.ema.buffers(), strict=True)
    )


def test_the_average_starts_at_the_weights_and_is_not_trained():
    trainer = Trainer(SPEC)
    assert digest(trainer.ema) == digest(trainer.model)
    assert not any(parameter.requires_grad for parameter in trainer.ema.parameters())


def test_the_seed_decides_everything():
    first = losses(recipe(steps=3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert losses(recipe(steps=3)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(Train(DICO, DIGITS, recipe(steps=3).recipe, seed=1)) != first


def test_the_loss_decreases():
    values = losses(recipe(steps=60, lr=5e-3))
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    lr: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        IDDPM,
        "losses",
        lambda self, model, x, y, t, eps: {
            "loss": model(x, t, y).sum(dim=(1, 2, 3)) * lr * math.inf
        },
    )
    with pytest.raises(
        ValueError, match="^the loss is .* at step 1; lower the learning rate"
    ) as failure:
        run_training(recipe(lr=lr), RunContext(tmp_path))
    assert "\n" not in str(failure.value)
    assert failure.value.values == {
        "stopped_at": 1,
        "batch": batch_indices(len(load(DIGITS)), 16, 0, 0).tolist(),
        "last_checkpoint": 0,
    }
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Sets both TF32 flags for a test."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32

    def allow(value: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = value

    yield allow
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def both(value: bool) -> dict[str, bool]:
    return {"matmul_tf32": value, "cudnn_tf32": value}


IN_FORCE = {
    "fp32": both(False),
    "tf32": both(True),
    "bf16": both(False),
    "as_published": {"matmul_tf32": False, "cudnn_tf32": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [True, False])
def test_precision_is_set_inside_and_restored(
    mode: str, before: bool, tf32: Callable[[bool], None]
):
    tf32(before)
    with pytest.raises(RuntimeError, match="inside"), precision(mode, CPU):
        assert read_tf32_flags() == IN_FORCE[mode]
        assert torch.is_autocast_enabled("cpu") == (mode == "bf16")
        raise RuntimeError("inside")
    assert read_tf32_flags() == both(before)
    assert not torch.is_autocast_enabled("cpu")


def test_unknown_precision_lists_the_known():
    with pytest.raises(ValueError, match="fp32, tf32, bf16"), precision("fp16", CPU):
        pass


@pytest.mark.parametrize("mode", ["fp32", "tf32"])
def test_the_backward_pass_runs_in_the_declared_precision(mode: str, tf32: Callable[[bool], None]):
    tf32(mode != "tf32")
    trainer = Trainer(recipe(precision=mode))
    found = []
    next(trainer.model.parameters()).register_hook(lambda gradient: found.append(read_tf32_flags()))
    next(trainer.steps(load(DIGITS)))
    assert found == [both(mode == "tf32")]


def test_bf16_trains_fp32_weights():
    trainer = Trainer(recipe(steps=4, precision="bf16"))
    values = [loss.item() for loss in trainer.steps(load(DIGITS))]
    assert values == pytest.approx(losses(recipe(steps=4)), rel=0.05)
    assert values != losses(recipe(steps=4))
    assert {
        parameter.dtype for parameter in (*trainer.model.parameters(), *trainer.ema.parameters())
    } == {torch.float32}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.engine.training.test_train --write")
    torch.set_num_threads(1)
    version = {"torch": ".".join(torch.__version__.split(".")[:2])}
    TRACES.write_text(
        json.dumps(version | {name: trace(name) for name in FAMILIES}, indent=1) + "\n"
    )
