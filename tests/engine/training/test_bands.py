"""The authors' loss logs as an alarm: which trainings they are of, and what leaves their band."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_GUIDED, IMAGENET512
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import train_stage
from experiments.engine.training.bands import bands_of
from experiments.engine.training.log import Log
from experiments.main_results import TABLES

SPEC = train_stage(TABLE_4.row("DiCo-S"), IMAGENET256, 0)


def test_the_declared_rows_of_the_authors_logs_have_bands():
    for label, protocol in (
        ("DiCo-S", IMAGENET256),
        ("DiCo-B", IMAGENET256),
        ("DiCo-L", IMAGENET256),
        ("DiCo-XL", IMAGENET256_GUIDED),
    ):
        band = bands_of(train_stage(TABLES[1].row(label), protocol, 3))[150]
        assert band.last - band.first == 999
        assert 0.13 < band.loss < 0.17
        assert 0.02 * band.loss < band.tolerance < 0.04 * band.loss


@pytest.mark.parametrize(
    "other",
    [
        train_stage(TABLE_4.row("DiCo-S"), IMAGENET512, 0),
        train_stage(TABLE_4.row("DiCo-S"), DIGITS, 0),
        train_stage(TABLES[1].row("DiT-XL/2"), IMAGENET256, 0),
        replace(SPEC, recipe=replace(SPEC.recipe, lr=2e-4)),
        replace(SPEC, backbone=SPEC.backbone.but(dim=64)),
        replace(SPEC, backbone=Backbone("dico_h", SPEC.backbone.options)),
    ],
)
def test_other_trainings_have_none(other):
    assert bands_of(other) == []


def test_a_window_that_leaves_its_band_is_reported_when_it_is_over_and_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bands = bands_of(SPEC)[:2]
    left, kept = bands
    loss = left.loss + 1.01 * left.tolerance

    # The first window lies just above its band, and the second in the middle of its own.
    with Log(tmp_path, 0, bands) as log:
        for step in range(50, kept.last + 1, 50):
            in_first = step <= left.last
            log.write(step, loss if in_first else kept.loss, lr=1e-4, images_per_s=1.0)
            assert bool(log.warnings()) == (step >= left.last)

    # The warning is printed once, and known to a log that goes on.
    message = (
        f"the loss of steps {left.first} to {left.last} is {loss:.4f}, "
        f"the authors' log has {left.loss:.4f} ± {left.tolerance:.4f}"
    )
    (warning,) = log.warnings()
    assert warning.startswith(message)
    assert capsys.readouterr().err.count(message) == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == kept.last // 50
    assert Log(tmp_path, kept.last, bands).warnings() == log.warnings()


def test_a_training_within_the_bands_has_no_warning(tmp_path: Path):
    bands = bands_of(SPEC)[:3]
    with Log(tmp_path, 0, bands) as log:
        for number, band in enumerate(bands):
            loss = band.loss + (-1) ** number * 0.9 * band.tolerance
            for step in range(band.last - 950, band.last + 1, 50):
                log.write(step, loss, lr=1e-4, images_per_s=1.0)
    assert log.warnings() == []
