"""The authors' loss logs as an alarm: which trainings they are of, and what leaves their band."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_GUIDED, IMAGENET512
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.stages import train_stage
from experiments.engine.training.log import Log, bands_of
from experiments.main_results import TABLES

SPEC = train_stage(TABLE_4.row("DiCo-S"), IMAGENET256, 0)


def test_the_declared_rows_of_the_authors_logs_have_bands():
    for label, protocol in (
        ("DiCo-S", IMAGENET256),
        ("DiCo-B", IMAGENET256),
        ("DiCo-L", IMAGENET256),
        ("DiCo-XL", IMAGENET256_GUIDED),
    ):
        first, last, loss, room = bands_of(train_stage(TABLES[1].row(label), protocol, 3))[150]
        assert last - first == 999 and 0.13 < loss < 0.17 and 0.02 * loss < room < 0.04 * loss


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


def test_a_window_out_of_its_band_is_said_when_it_is_over_and_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (first, last, loss, room), (_, later, usual, _) = bands = bands_of(SPEC)[:2]
    with Log(tmp_path, 0, bands) as log:
        for step in range(50, later + 1, 50):
            log.write(
                step=step,
                loss=loss + 1.01 * room if step <= last else usual,
                lr=1e-4,
                images_per_s=1.0,
            )
            assert bool(log.warnings()) == (step >= last)
    words = f"the loss of steps {first} to {last} is {loss + 1.01 * room:.4f}, the authors' log has {loss:.4f} ± {room:.4f}"
    assert [line.startswith(words) for line in log.warnings()["warnings"]] == [
        True
    ] and capsys.readouterr().err.count(words) == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == later // 50
    assert Log(tmp_path, later, bands).warnings() == log.warnings()


def test_a_training_within_the_bands_has_no_warning(tmp_path: Path):
    bands = bands_of(SPEC)[:3]
    with Log(tmp_path, 0, bands) as log:
        for number, (_, last, loss, room) in enumerate(bands):
            for step in range(last - 950, last + 1, 50):
                log.write(
                    step=step, loss=loss + (-1) ** number * 0.9 * room, lr=1e-4, images_per_s=1.0
                )
    assert log.warnings() == {}
