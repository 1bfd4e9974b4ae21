"""A long sampling is announced after its first steps, with its time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.group import ALONE, Group
from experiments.engine.sampling import forecast, samples
from experiments.engine.sampling.forecast import watch_sampling
from experiments.engine.sampling.networks import Decoder
from experiments.engine.sampling.samples import ImageSource, fill_sample_folder
from experiments.engine.specs.spec import Sampler
from experiments.engine.training.trainer import build
from tests.support.sampling import CPU, SPEC, TINY, levels_of

X = torch.zeros(2, 1, 4, 4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one number."""
    now = [100.0]
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.mark.parametrize(
    ("sampler", "seconds", "num", "batch", "group", "hours"),
    [
        (Sampler(num_steps=250), 36.0, 50_000, 25, ALONE, "5,000.0"),
        (Sampler(num_steps=100), 36.0, 25, 25, ALONE, "1.0"),
        (Sampler(num_steps=100), 35.9, 25, 25, ALONE, None),
        (Sampler(num_steps=100), 36.0, 26, 25, ALONE, "2.0"),
        (Sampler(num_steps=100), 36.0, 100, 25, Group(0, 2), "2.0"),
        (Sampler(num_steps=100), 36.0, 100, 25, Group(1, 2), None),
        (Sampler("dopri5", num_steps=100), 36.0, 100, 25, ALONE, None),
    ],
)
def test_an_hour_or_more_is_said_once(
    sampler: Sampler,
    seconds: float,
    num: int,
    batch: int,
    group: Group,
    hours: str | None,
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
):
    """The first step takes ten minutes, which no other does."""
    watch = watch_sampling(sampler, num, batch, group)
    for step in range(5):
        clock[0] += seconds if step else 600.0
        watch(X)
    said = capsys.readouterr().err
    if hours is None:
        assert said == ""
    else:
        assert said == (
            f"sampling: about {hours} h for {num} images, judged by one step; "
            "decoding and scores come on top\n"
        )


def test_a_set_on_disk_announces_what_is_left_of_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Five images a chunk, of which the first two are there the second time."""
    monkeypatch.setattr(samples, "CHUNK", 5)
    monkeypatch.setattr(forecast, "LONG", 0.0)
    source = ImageSource(build(TINY, 0, CPU).eval(), Decoder(lambda x: x, {}), {})
    context = RunContext(tmp_path, Resources(sample_batch=4))
    whole = levels_of(fill_sample_folder(SPEC, tmp_path, source, context))
    assert "for 23 images" in capsys.readouterr().err

    for counts in sorted((tmp_path / samples.COUNTS).iterdir())[2:]:
        counts.unlink()
    again = levels_of(fill_sample_folder(SPEC, tmp_path, source, context))
    assert "for 15 images" in capsys.readouterr().err
    assert (again == whole).all()
