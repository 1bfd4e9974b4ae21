"""What samples is trained first: the refusal names the command that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from experiments.ablation import TABLE_4, train_command
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Store
from experiments.engine.records.trained import require_trained
from experiments.engine.specs.spec import Train, spec_id
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1

SPEC = evaluate_stage(TABLE_4.rows[0], DIGITS, 0)
CASCADE = evaluate_stage(TABLE_1.rows[0], DIGITS, 0)
assert isinstance(SPEC.train, Train)
STEPS = SPEC.train.recipe.steps
COMMAND = train_command(TABLE_4, ["DiCo-S"], DIGITS, 0)


def leave_checkpoint(
    store: Store, training: Train, steps: int, checksum: str = "0123456789abcdef"
) -> None:
    folder = store.run_dir(training) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"step-{steps:08d}-{checksum}.pt").touch()


@pytest.mark.parametrize(
    ("leave", "complaint"),
    [
        (lambda store: None, "no finished checkpoint of dico_s, training seed 0"),
        (
            lambda store: leave_checkpoint(store, SPEC.train, STEPS - 1),
            f"(step {STEPS - 1} of {STEPS})",
        ),
        (lambda store: leave_checkpoint(store, SPEC.train, STEPS, "staged"), "no finished"),
        (lambda store: leave_checkpoint(store, replace(SPEC.train, seed=1), STEPS), "no finished"),
        (
            lambda store: store.append(SPEC.train, "done", {}, {}),
            f"remove records/train/{spec_id(SPEC.train)}-*.json too",
        ),
    ],
)
def test_an_unfinished_training_is_refused_with_the_command_that_runs_it(
    leave: Callable[[Store], object], complaint: str, store: Store
):
    leave(store)
    with pytest.raises(ValueError, match="no finished checkpoint") as refusal:
        require_trained(SPEC, store, COMMAND)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(
        'train it with: python experiments/ablation.py --table 4 --rows "DiCo-S" '
        "--protocol digits --seeds 0"
    )


def test_a_finished_training_may_be_sampled(store: Store):
    leave_checkpoint(store, SPEC.train, STEPS)
    require_trained(SPEC, store, COMMAND)


def test_a_system_needs_all_of_its_networks(store: Store):
    *others, last = CASCADE.trainings
    for training in others:
        leave_checkpoint(store, training, training.recipe.steps)
    with pytest.raises(ValueError, match=f"of {last.backbone.name}, training seed"):
        require_trained(CASCADE, store, COMMAND)
    leave_checkpoint(store, last, last.recipe.steps)
    require_trained(CASCADE, store, COMMAND)


def test_a_results_folder_is_part_of_the_command(store: Store):
    folder = store.root / "of mine"
    command = train_command(TABLE_1, ["ADM-U", "DiT-XL/2"], DIGITS, 3, folder)
    assert command == (
        'python experiments/main_results.py --table 1 --rows "ADM-U" "DiT-XL/2" '
        f"--protocol digits --seeds 3 --results '{folder}'"
    )


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)
