"""A long sampling is announced before its first image, with its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.group import ALONE, Group
from experiments.engine.sampling import forecast, samples
from experiments.engine.sampling.forecast import announce_sampling
from experiments.engine.sampling.networks import Decoder
from experiments.engine.sampling.samples import ImageSource, fill_sample_folder
from experiments.engine.specs.spec import Diffusion, Evaluate, Sampler
from experiments.engine.training.networks import build
from tests.support.sampling import CPU, SPEC, TINY, levels_of

FLOW = replace(SPEC.train, diffusion=Diffusion("flow"))


class SlowNetwork:
    """A network whose first call takes ten minutes of a clock that it sets, and others less."""

    def __init__(self, seconds: float, copies: int) -> None:
        """Predict a velocity, and a variance if `copies` is 2, that bends within small steps."""
        self.now = 100.0
        self.calls: list[int] = []
        self.seconds = seconds
        self.copies = copies

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.now += self.seconds if self.calls else 600.0
        self.calls.append(len(x))
        return 30 * torch.sin(30 * x).repeat(1, self.copies, 1, 1)


def announced(
    spec: Evaluate, seconds: float, left: int, group: Group, monkeypatch: pytest.MonkeyPatch
) -> SlowNetwork:
    network = SlowNetwork(seconds, copies=1 if spec.train == FLOW else 2)
    clock = SimpleNamespace(perf_counter=lambda: network.now)
    monkeypatch.setattr(forecast, "time", clock)
    announce_sampling(spec, network, left, 25, CPU, group)
    return network


@pytest.mark.parametrize(
    ("sampler", "seconds", "left", "group", "hours"),
    [
        (Sampler(num_steps=250), 36.0, 50_000, ALONE, "31,250.0"),
        (Sampler(num_steps=100), 36.0, 4, ALONE, "1.0"),
        (Sampler(num_steps=100), 35.9, 4, ALONE, None),
        (Sampler(num_steps=100), 36.0, 100, Group(0, 2), "12.5"),
        (Sampler(num_steps=100), 36.0, 100, Group(1, 2), None),
        (Sampler(num_steps=100), 36.0, 0, ALONE, None),
        (Sampler("euler", num_steps=1), 36.0, 100_000, ALONE, None),
    ],
)
def test_an_hour_or_more_is_said_before_the_first_image(
    sampler: Sampler,
    seconds: float,
    left: int,
    group: Group,
    hours: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """One step tells how long a set of images takes; short times are not announced."""
    train = FLOW if sampler.name == "euler" else SPEC.train
    spec = replace(SPEC, train=train, sampler=replace(sampler, channels=None))
    network = announced(spec, seconds, left, group, monkeypatch)
    assert set(network.calls) <= {4}

    # One line, or none.
    printed = capsys.readouterr().err
    if hours is None:
        assert printed == ""
    else:
        assert printed == (
            f"sampling: about {hours} h for {left} images, judged by one step of 4; decoding and "
            "scores come on top\n"
        )


def test_an_adaptive_solver_says_what_its_step_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A step of dopri5 calls the network six times: 6 minutes for 4 images, 150 hours for 6,000."""
    spec = replace(SPEC, train=FLOW, sampler=Sampler("dopri5", channels=None))
    announced(spec, 60.0, 6000, ALONE, monkeypatch)
    assert "about 150.0 h for each of dopri5's steps, with 6000 images" in capsys.readouterr().err


def test_a_set_on_disk_announces_what_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Five images a chunk, of which the first two are there the second time."""
    monkeypatch.setattr(samples, "CHUNK", 5)
    monkeypatch.setattr(forecast, "LONG", 0.0)
    source = ImageSource(build(TINY, 0, CPU).eval(), Decoder(lambda x: x, {}), {})
    context = RunContext(tmp_path, Resources(sample_batch=4))
    whole = levels_of(fill_sample_folder(SPEC, tmp_path, source, context))
    assert "for 23 images" in capsys.readouterr().err

    # All chunks but the first two are made again, and are the same.
    for counts in sorted((tmp_path / samples.COUNTS).iterdir())[2:]:
        counts.unlink()
    again = levels_of(fill_sample_folder(SPEC, tmp_path, source, context))
    assert "for 15 images" in capsys.readouterr().err
    assert (again == whole).all()
