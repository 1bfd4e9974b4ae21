"""The held-out loss: fixed draws for all, a geometric mean over bins, and the bound in bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.engine.data.sets import load
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.denoising import step_weights, times_at
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Data, Diffusion, HeldOut, Recipe, Train
from experiments.engine.training import heldout

DIGITS = Data("digits", size=8, channels=1, num_classes=10, split="held_out")
TINY = Backbone(
    "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
)
TRAIN = Train(TINY, DIGITS, Recipe(steps=3, batch=5, ema=0.5, initial="by_name"))
CPU = torch.device("cpu")


@pytest.fixture
def small_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images a batch, so that a part has more than one batch."""
    monkeypatch.setattr(heldout, "CHUNK", 7)


def measure(monkeypatch: pytest.MonkeyPatch, spec: HeldOut, model) -> dict:
    """The values of a network that is given instead of trained."""
    monkeypatch.setattr(heldout, "load_ema", lambda *_: model)
    return heldout.measure_heldout(spec, Path(), CPU)


class Blind(torch.nn.Module):
    """Predicts no noise at all, so its error is the mean square of the noise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros((len(x), self.channels, *x.shape[2:]))


def test_a_training_is_scored_once_and_its_record_says_how(tmp_path: Path, small_profile):
    store = Store(tmp_path)
    execute(TRAIN, store, Resources())
    spec = HeldOut(TRAIN, "test", num=10)
    record = execute(spec, store, Resources())

    # The loss is the geometric mean of nine bins of noise. Digits are not of eight bits.
    assert record.status == "done", record.error
    assert record.kind == "heldout"
    assert record.values["num"] == 10
    assert record.values["initial_share"] == 0.5**3
    profile = dict(map(tuple, record.values["profile"]))
    scored = [profile[bin_] for bin_ in range(-4, 5)]
    assert math.prod(scored) ** (1 / 9) == pytest.approx(record.values["heldout_loss"], rel=1e-12)
    assert "bits_per_dim" not in record.values

    # A second call finds the record.
    assert execute(spec, store, Resources()).utc == record.utc


def test_draws_do_not_depend_on_the_network_or_on_the_number_of_images(
    monkeypatch: pytest.MonkeyPatch, small_profile
):
    seen: dict[int, list[Tensor]] = {}

    class Listener(Blind):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.setdefault(id(self), []).append(x[0].clone())
            return super().forward(x, t, y)

    few, many = Listener(2), Listener(2)
    measure(monkeypatch, HeldOut(TRAIN, "test", num=7), few)
    measure(monkeypatch, HeldOut(replace(TRAIN, seed=5), "test", num=14), many)
    # The first batch of every bin is the same, and a second one follows only for more images.
    assert torch.equal(seen[id(few)][0], seen[id(many)][0])
    assert torch.equal(seen[id(few)][1], seen[id(many)][2])


@pytest.mark.parametrize("name", ["iddpm", "flow"])
def test_a_network_that_sees_nothing_has_the_error_of_its_ignorance(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    """Zero noise misses by 1; zero velocity of a linear path misses by (1 + x0 a / s)^2."""
    train = replace(TRAIN, diffusion=Diffusion(name))
    spec = HeldOut(train, "validation", num=100)
    values = measure(monkeypatch, spec, Blind(2 if name == "iddpm" else 1))
    profile = dict(map(tuple, values["profile"]))
    if name == "iddpm":
        assert values["heldout_loss"] == pytest.approx(1, abs=0.02)
        assert values["objective"] > 0.9
    else:
        # eps implied by v = 0 is x_t / (a + s) at a = t, s = 1 - t, which sum to 1.
        images, _ = load(DIGITS).take(torch.arange(100))
        square = images.square().mean().item()
        t = 1 / (1 + math.exp(-0.25))  # log SNR 0.5, the middle of the bin from 0
        expected = t**2 * (1 + square)
        assert profile[0] == pytest.approx(expected, rel=0.15)


def test_the_weights_of_steps_make_sums_of_means():
    """A mean over uniform log SNRs by weight is a plain sum over the steps."""
    process = build_diffusion(Diffusion())
    terms = torch.linspace(1, 3, process.num_steps, dtype=torch.float64) ** 2
    ends = (heldout.PROFILE.start, heldout.PROFILE.stop)

    # A fine grid of log SNRs stands for the expectation over draws.
    grid = torch.linspace(*ends, 400_001, dtype=torch.float64)
    total = 0.0
    for part in grid.split(20_000):
        t = times_at(process, part)
        total += (terms[t] * step_weights(process, t, ends)).sum().item()
    total *= (ends[1] - ends[0]) / len(grid)
    assert total == pytest.approx(terms.sum().item(), rel=2e-3)


def test_the_bound_in_bits_is_that_of_all_steps_summed(monkeypatch: pytest.MonkeyPatch):
    """Eight-bit images: the estimate by bins agrees with every term computed in turn."""
    monkeypatch.setattr(heldout, "EIGHT_BIT", ("digits",))
    images, y = load(DIGITS, heldout.Part.TEST).take(torch.arange(40))
    process = build_diffusion(Diffusion())
    blind = Blind(2)
    values = measure(monkeypatch, HeldOut(TRAIN, "test", num=40, draws=3), blind)

    # Step by step, with noise of its own.
    total = heldout.prior_bits(process, images)
    generator = torch.Generator().manual_seed(0)
    for step in range(process.num_steps):
        eps = torch.randn(images.shape, generator=generator)
        t = torch.full((len(images),), step)
        total += process.losses(blind, images, y, t, eps)["vb"].mean().item()
    assert values["bits_per_dim"] == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize(
    "spec, message",
    [
        (HeldOut(replace(TRAIN, data=replace(DIGITS, split="whole")), "test"), "used whole"),
        (HeldOut(TRAIN, "exam"), "unknown part 'exam'; known: validation, test"),
        (HeldOut(TRAIN, "test", num=10_000), "has 359 images, and not 10000"),
        (HeldOut(TRAIN, "test", low=-30), "without the bin from -30 to -29"),
        (HeldOut(replace(TRAIN, diffusion=Diffusion("classify")), "test"), "predicts no noise"),
    ],
    ids=["whole", "part", "number", "bins", "classifier"],
)
def test_what_cannot_be_scored_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, spec: HeldOut, message: str
):
    with pytest.raises(ValueError, match=message) as refusal:
        measure(monkeypatch, spec, Blind(2))
    assert "\n" not in str(refusal.value)
