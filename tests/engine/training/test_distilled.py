"""A declared student is trained beside its frozen teacher, from the teacher's weights or anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.declared.protocols import DIGITS_TEXT
from experiments.engine.runtime.context import RunContext
from experiments.engine.specs.spec import Train, spec_id
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.training.networks import load_ema
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from experiments.text_to_image import TABLE_DISTILLATION, TEACHER

SHORT = replace(DIGITS_TEXT.recipe, steps=1, batch=2, warmup=0, ema=0.0, power_snapshots=0)
PROTOCOL = replace(DIGITS_TEXT, recipe=SHORT)
STUDENT = TABLE_DISTILLATION.row("BK-SDM-Small (distilled)")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the teacher for a step, in a folder of runs."""
    folder = tmp_path_factory.mktemp("runs")
    spec = train_stage(TEACHER, PROTOCOL, 0)
    context = RunContext(folder / spec_id(spec))
    context.folder.mkdir()
    run_training(spec, context)
    return folder


def test_a_row_names_its_teacher_and_needs_it_first():
    spec = train_stage(STUDENT, DIGITS_TEXT, 1)
    teacher = train_stage(TEACHER, DIGITS_TEXT, 1)
    assert spec.trainings == (teacher, spec)
    assert evaluate_stage(STUDENT, DIGITS_TEXT, 1).trainings == (teacher, spec)
    alone = train_stage(TABLE_DISTILLATION.row("BK-SDM-Small (from scratch)"), DIGITS_TEXT, 1)
    assert replace(spec, distillation=None) == alone and spec_id(spec) != spec_id(alone)


@pytest.mark.parametrize("inherits", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_student_is_trained_beside_its_teacher(runs: Path, inherits: bool):
    spec = train_stage(STUDENT, PROTOCOL, 0)
    spec = replace(spec, distillation=replace(spec.distillation, inherits=inherits))
    context = RunContext(runs / spec_id(spec))
    context.folder.mkdir()
    values = run_training(spec, context)
    teacher = load_ema(spec.distillation.teacher, runs / spec_id(spec.distillation.teacher), CPU)
    student = load_ema(spec, context.folder, CPU)

    # A step from the teacher's weights leaves them near; a step from fresh ones does not.
    own = student.output_blocks[1][0].in_layers[2].weight
    theirs = teacher.output_blocks[2][0].in_layers[2].weight
    assert ((own - theirs).abs().max() < 3 * SHORT.lr) == inherits
    assert values["loss"] > 0


def test_a_distillation_without_a_teacher_or_of_unknown_features_is_refused(runs: Path):
    spec = train_stage(STUDENT, PROTOCOL, 0)
    with pytest.raises(ValueError, match="a distillation needs its teacher"):
        Trainer(spec)
    other: Train = replace(spec, distillation=replace(spec.distillation, features="logits"))
    teacher = load_ema(spec.distillation.teacher, runs / spec_id(spec.distillation.teacher), CPU)
    with pytest.raises(ValueError, match="unknown features 'logits' .* blocks, self_attention"):
        Trainer(other, teacher=teacher)
