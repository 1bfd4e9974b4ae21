"""The campaign: every network finds its rate inside a ladder, then trains, and nothing is twice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import campaign
from experiments.ablation import TABLE_4
from experiments.declared import campaign as declared
from experiments.declared import rates
from experiments.declared.campaign import BLOCKS, Block, Ladder
from experiments.declared.protocols import DIGITS, DIGITS_LONG, at_half_length, recipe_of_length
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Evaluate, HeldOut
from experiments.engine.specs.stages import network_id, train_stage
from experiments.related import DIT_PARENT, RELATED_SMALL

ROW = TABLE_4.baseline
LADDER = Ladder(ROW, DIGITS)
ORIGIN = {"commit": None, "dirty": None, "seconds": 1.0, "device": "cpu"}


def record_loss(store: Store, ladder: Ladder, rate: float, loss: float | None) -> None:
    """Record a validation loss, or that the training failed."""
    stage = ladder.stage(rate)
    if loss is None:
        store.append(stage.train, "failed", {}, ORIGIN, "diverged")
    else:
        store.append(stage, "done", {"heldout_loss": loss}, ORIGIN)


@pytest.mark.parametrize(
    "losses, expected",
    [
        ({}, [1.0, 2.0, 4.0]),
        ({1.0: 3.0, 4.0: 2.0}, [2.0]),
        ({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}, []),
        ({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, [8.0]),
        ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, [0.5]),
        ({1.0: 2.0, 2.0: 2.001, 4.0: 2.02}, [0.5]),
        ({1.0: 2.0, 2.0: 2.001, 4.0: 2.004}, []),
        ({1.0: 3.0, 2.0: 2.0, 4.0: math.inf}, []),
        ({1.0: 3.0, 2.0: math.inf, 4.0: math.inf}, [0.5]),
    ],
)
def test_a_ladder_grows_until_its_best_rate_lies_inside(losses, expected):
    scaled = {rate / 1000: loss for rate, loss in losses.items()}
    ladder = (0.001, 0.002, 0.004)
    assert rates.missing_rates(ladder, scaled) == pytest.approx([r / 1000 for r in expected])


@pytest.mark.parametrize(
    "losses, message",
    [
        ({0.1: 2.0, 0.2: 1.0}, "cannot grow further"),
        ({1.5e-5: 1.0, 3e-5: 2.0}, "cannot grow further"),
        ({0.1: math.inf, 0.2: math.inf}, "lower its rates"),
    ],
)
def test_a_ladder_without_a_best_rate_says_so(losses: dict[float, float], message: str):
    with pytest.raises(ValueError, match=message):
        rates.missing_rates(tuple(losses), losses)


def test_of_rates_that_do_as_well_the_lowest_is_taken():
    losses = {0.005: 0.0953, 0.01: 0.0939, 0.02: 0.0937, 0.04: math.inf}
    assert rates.best_rate(losses) == 0.01
    assert rates.best_rate(losses | {0.02: 0.0930}) == 0.02
    assert not rates.missing_rates((0.005, 0.01, 0.02), losses)


def test_the_losses_of_a_ladder_are_read_from_records_of_both_folders(tmp_path: Path):
    store = Store(tmp_path, tmp_path / "committed")
    first, *_, last = DIGITS.ladder
    record_loss(store, LADDER, first, 0.5)
    record_loss(store, LADDER, last, None)
    assert LADDER.losses(store) == {first: 0.5, last: math.inf}

    campaign.export(store)
    committed = Store(tmp_path / "another", tmp_path / "committed")
    assert LADDER.losses(committed) == {first: 0.5, last: math.inf}
    left = [job.stages[-1].train.recipe.lr for job in LADDER.jobs(committed)]
    assert left == list(DIGITS.ladder[1:-1])


def test_a_ladder_trains_at_half_length_and_looks_at_the_validation_part_alone():
    stage = LADDER.stage(0.01)
    assert stage.part == "validation"
    assert stage.train.recipe.steps == DIGITS.recipe.steps // 2
    assert stage.train.recipe.lr == 0.01


def test_a_chosen_rate_enters_the_spec_of_its_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "rates.csv"
    chosen = {("digits", LADDER.network): (ROW.label, 0.0123)}
    rates.write_rates(path, chosen)
    assert rates.read_rates(path) == chosen

    # A campaign trains its rows at the rates that its own ladders have just written.
    monkeypatch.setattr(rates, "PATH", path)
    block = Block(TABLE_4, replace(DIGITS, rates={}), range(1), ())
    trained = {job.row: job.stages[0] for job in block.at_chosen_rates().jobs()}
    assert trained[ROW.label].recipe.lr == 0.0123

    other = TABLE_4.row("DWC 5x5")
    protocol = replace(DIGITS, rates={LADDER.network: 0.0123})
    assert train_stage(ROW, protocol, 0).recipe.lr == 0.0123
    assert train_stage(other, protocol, 0).recipe.lr == DIGITS.recipe.lr
    assert train_stage(ROW, at_half_length(protocol), 0).recipe.lr == 0.0123


@pytest.mark.parametrize(
    "text, message",
    [
        ("protocol,lr\n", "must have the columns protocol, network, row, lr"),
        ("protocol,network,row,lr\na,b,c,fast\n", "line 2: lr is no number"),
        ("protocol,network,row,lr\na,b,c\n", "line 2: lr is no number"),
    ],
)
def test_a_damaged_file_of_rates_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "rates.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        rates.read_rates(path)


@pytest.mark.parametrize("steps", [800, 1600, 4000, 8000])
def test_no_average_holds_more_than_a_hundredth_of_initial_weights(steps: int):
    recipe = recipe_of_length(steps, 1e-3)
    assert recipe.ema**recipe.steps < 0.01


def test_runs_with_scores_are_not_run_again_and_half_length_samples_nothing(tmp_path: Path):
    store = Store(tmp_path, tmp_path / "committed")
    block = Block(replace(TABLE_4, rows=(ROW,)), DIGITS, range(2), range(1))
    jobs = campaign.open_runs(block, store)
    kinds = [[type(stage) for stage in job.stages[1:]] for job in jobs]
    assert kinds == [[Evaluate, HeldOut], [HeldOut], [Evaluate, HeldOut]]

    # A run whose scores are known needs no training.
    for stage in jobs[0].stages[1:]:
        store.append(stage, "done", {"heldout_loss": 1.0}, ORIGIN)
    left = campaign.open_runs(block, store)
    assert [job.stages for job in left] == [job.stages for job in jobs[1:]]


def test_the_best_rate_and_its_neighbours_are_tried_at_full_length_too(tmp_path: Path):
    store = Store(tmp_path, tmp_path / "committed")
    block = Block(replace(TABLE_4, rows=(ROW,)), DIGITS, range(1), (), checked=(ROW.label,))
    chosen = train_stage(ROW, DIGITS, 0).recipe.lr
    run, *checks = campaign.open_runs(block, store)
    assert [job.stages[0].recipe.lr for job in checks] == [chosen / 2, chosen, 2 * chosen]
    assert {job.stages[0].recipe.steps for job in checks} == {DIGITS.recipe.steps}
    assert {job.stages[1].part for job in checks} == {"validation"}

    # The chosen rate's training is the run's own.
    assert checks[1].stages[0] == run.stages[0]


def test_independent_weights_are_another_training_and_score_no_samples(tmp_path: Path):
    store = Store(tmp_path, tmp_path / "committed")
    block = Block(replace(TABLE_4, rows=(ROW,)), DIGITS, range(2), (), independent=(ROW.label,))
    jobs = campaign.open_runs(block, store)
    assert [job.stages[0].recipe.initial for job in jobs] == 2 * ["by_name", "in_order"]
    assert [len(job.stages) for job in jobs] == [3, 2, 3, 2]


def test_networks_that_rows_share_are_searched_once():
    for block in BLOCKS:
        networks = [ladder.network for ladder in declared.ladders_of(block)]
        assert len(networks) == len(set(networks))
        rows = {network_id(row, block.protocol) for row in block.table.rows}
        assert set(networks) == rows


def test_a_fine_tuning_starts_from_a_full_training_at_its_own_rate():
    rates_of_parent = {network_id(DIT_PARENT, DIGITS_LONG): 0.0123}
    protocol = replace(DIGITS_LONG, rates=rates_of_parent)
    row = RELATED_SMALL.row("DyDiT, lambda 0.5")
    stage = Ladder(row, protocol).stage(0.02)
    parent, train = stage.train.trainings
    assert parent == train_stage(DIT_PARENT, protocol, 0)
    assert (parent.recipe.lr, parent.recipe.steps) == (0.0123, 4000)
    assert (train.recipe.lr, train.recipe.steps, train.init_from) == (0.02, 500, parent)

    # At full length it is longer, and its parent is the same.
    full = train_stage(row, protocol, 0)
    assert (full.recipe.steps, full.init_from) == (1000, parent)


def test_a_rate_at_which_gates_stay_open_is_not_compared(tmp_path: Path):
    store = Store(tmp_path, tmp_path / "committed")
    ladder = Ladder(RELATED_SMALL.row("DyDiT, lambda 0.5"), DIGITS_LONG)
    for rate, loss, used in ((2.5e-3, 0.1, 0.9), (5e-3, 0.2, 0.52)):
        values = {"heldout_loss": loss, "used_share": used}
        store.append(ladder.stage(rate), "done", values, ORIGIN)
    assert ladder.losses(store) == {2.5e-3: math.inf, 5e-3: 0.2}


def test_what_is_left_is_said_in_core_hours_and_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--dry-run", "--results", str(tmp_path)]
    assert campaign.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(BLOCKS) + 1
    assert lines[-1].startswith("total: about ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--blocks", "99"], ["--now"]])
def test_a_wrong_call_is_one_line(arguments, capsys: pytest.CaptureFixture[str]):
    assert campaign.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
