"""Groups of processes: they compute what one process computes, and end together when one fails."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.engine.data.sets import batch_indices, load
from experiments.engine.judges import classifiers as features
from experiments.engine.runtime.attempts import read_attempts
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.heartbeat import read_heartbeat
from experiments.engine.runtime.preemption import LOST, TRY_AGAIN
from experiments.engine.sampling import batches
from experiments.engine.sampling.generate import generate_images
from experiments.engine.scoring import stage as scoring
from experiments.engine.specs.spec import Evaluate, Sampler, spec_id
from experiments.engine.training.networks import build
from tests.support.groups import (
    BOUND,
    TRAIN,
    Fault,
    FaultKind,
    Work,
    finished_record,
    newest_record,
    read_curve,
    run_group,
)
from tests.support.trainings import CPU

SCORE = Evaluate(TRAIN, Sampler(num_steps=3, channels=None), 23, "digits")
SHARDED = Resources(checkpoint_every=5, timeout=BOUND, shard_optimizer=True)
STEPS, BATCH = TRAIN.recipe.steps, TRAIN.recipe.batch


def run_folder(root: Path) -> Path:
    return root / "runs" / spec_id(TRAIN)


def last_heartbeat(root: Path) -> dict[str, Any]:
    heartbeat = read_heartbeat(run_folder(root))
    assert heartbeat is not None, "the run left no heartbeat"
    return heartbeat


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    root = tmp_path_factory.mktemp("alone")
    assert run_group(1, Work(root, keeps_inputs=True)) == [0]
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes."""
    root = tmp_path_factory.mktemp("pair")
    assert run_group(2, Work(root, keeps_inputs=True)) == [0, 0]
    return root


def assert_same_training(alone: Path, root: Path, world_size: int) -> None:
    """Assert that a group saw one process's samples and had its losses."""
    whole = torch.load(alone / "seen-0.pt")
    parts = [torch.load(root / f"seen-{rank}.pt") for rank in range(world_size)]
    for values, *shares in zip(whole, *parts, strict=True):
        by_step = [share.unflatten(0, (STEPS, BATCH // world_size)) for share in shares]
        together = torch.cat(by_step, dim=1).flatten(0, 1)
        assert torch.equal(together, values)
    assert len(read_curve(root)) == 5
    assert read_curve(root) == pytest.approx(read_curve(alone), rel=1e-5)
    assert finished_record(root).provenance["world_size"] == world_size


def test_two_processes_see_the_samples_of_one_and_have_its_losses(alone: Path, pair: Path):
    assert_same_training(alone, pair, 2)


@pytest.mark.slow
def test_four_processes_with_micro_batches_do_so_too(alone: Path, tmp_path: Path):
    resources = Resources(checkpoint_every=5, timeout=BOUND, micro_batch=3)
    assert run_group(4, Work(tmp_path, keeps_inputs=True, resources=resources)) == [0] * 4
    assert_same_training(alone, tmp_path, 4)


@pytest.mark.slow
def test_a_stopped_group_saves_at_one_step_and_resumes_to_the_same_weights(
    pair: Path, tmp_path: Path
):
    # The first attempt has a sharded optimiser, the second has not, the third has again.
    requeue, stop = Fault(FaultKind.REQUEUE, 1, 6), Fault(FaultKind.STOP, 0, 11)
    work = Work(tmp_path, fault=requeue, resources=SHARDED)
    assert run_group(2, work) == [TRY_AGAIN] * 2
    names = [path.name for path in (run_folder(tmp_path) / "checkpoints").glob("step-*.pt")]
    steps = [int(name[5:13]) for name in names]
    (saved,) = [step for step in steps if step % 5]
    assert 7 <= saved <= 8
    assert newest_record(tmp_path) is None
    assert last_heartbeat(tmp_path)["state"] == "stopped"
    assert "SIGUSR2" in last_heartbeat(tmp_path)["reason"]

    assert run_group(2, Work(tmp_path, fault=stop)) == [TRY_AGAIN] * 2
    assert run_group(2, Work(tmp_path, resources=SHARDED)) == [0, 0]
    values = finished_record(tmp_path).values
    assert values["weights_sha256"] == finished_record(pair).values["weights_sha256"]
    assert read_curve(tmp_path) == read_curve(pair)
    attempts = values["attempts"]
    assert [attempt["start"] for attempt in attempts] == [0, saved, values["resumed_at"]]
    assert attempts[-1]["end"] == STEPS
    assert [attempt["reason"] for attempt in attempts] == [
        "asked to make room (SIGUSR2)",
        "asked to stop (SIGTERM)",
        "done",
    ]


@pytest.mark.slow
def test_a_sharded_optimiser_resumes_in_one_process(alone: Path, tmp_path: Path):
    work = Work(tmp_path, fault=Fault(FaultKind.REQUEUE, 0, 6), resources=SHARDED)
    assert run_group(2, work) == [TRY_AGAIN] * 2
    assert run_group(1, Work(tmp_path)) == [0]
    assert read_curve(tmp_path) == pytest.approx(read_curve(alone), rel=1e-5)
    assert finished_record(tmp_path).values["resumed_at"] in (7, 8)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param(FaultKind.RAISE, 0, marks=pytest.mark.slow),
        pytest.param(FaultKind.RAISE, 1, marks=pytest.mark.slow),
        pytest.param(FaultKind.RAISE_WHILE_OTHERS_HANG, 1, marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_the_group_with_its_error(kind: FaultKind, rank: int, tmp_path: Path):
    assert run_group(2, Work(tmp_path, fault=Fault(kind, rank, 6))) == [1, 1]
    record, heartbeat = finished_record(tmp_path), last_heartbeat(tmp_path)
    expected = ("failed", f"rank {rank}: KeyError: 'boom'")
    assert (record.status, record.error) == expected
    assert (heartbeat["state"], heartbeat["reason"]) == expected
    assert record.values["attempts"][-1]["reason"] == record.error


@pytest.mark.slow
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(pair: Path, tmp_path: Path):
    second, first = Fault(FaultKind.KILL, 1, 12), Fault(FaultKind.KILL, 0, 13)
    assert run_group(2, Work(tmp_path, fault=second)) == [LOST, -signal.SIGKILL]
    assert newest_record(tmp_path) is None
    assert re.match("rank 0 lost another rank", last_heartbeat(tmp_path)["reason"])
    assert run_group(2, Work(tmp_path, fault=first)) == [-signal.SIGKILL, LOST]

    assert run_group(2, Work(tmp_path)) == [0, 0]
    values = finished_record(tmp_path).values
    assert values["resumed_at"] == 10
    assert values["weights_sha256"] == finished_record(pair).values["weights_sha256"]
    assert [attempt["start"] for attempt in values["attempts"]] == [0, 10, 10]
    assert read_attempts(run_folder(tmp_path)) == values["attempts"]


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_group_at_the_bound_of_its_collectives(
    pair: Path, tmp_path: Path
):
    """Both ranks end, and another group goes on to the weights of an undisturbed one."""
    resources = Resources(checkpoint_every=5, timeout=10.0)
    work = Work(tmp_path, fault=Fault(FaultKind.HANG, 1, 12), resources=resources)
    assert run_group(2, work) == [LOST, LOST]
    assert newest_record(tmp_path) is None
    heartbeat = last_heartbeat(tmp_path)
    assert heartbeat["state"] == "stopped"
    assert re.match("rank 0 lost another rank", heartbeat["reason"])

    # From the checkpoint of step 10.
    assert run_group(2, Work(tmp_path)) == [0, 0]
    values = finished_record(tmp_path).values
    assert values["resumed_at"] == 10
    assert values["weights_sha256"] == finished_record(pair).values["weights_sha256"]


def assert_diverged(root: Path, work: Work, problem: str, last_checkpoint: int) -> dict[str, Any]:
    """Assert that a bad loss of one rank ends both, and return what the record says of it."""
    assert run_group(2, work) == [1, 1]
    record = finished_record(root, work.stage)
    assert record.status == "failed" and f"Diverged: {problem}" in (record.error or "")
    assert record.values["last_checkpoint"] == last_checkpoint
    step = record.values["stopped_at"]
    assert work.fault is not None and step >= work.fault.step + 1
    batch = batch_indices(len(load(TRAIN.data)), BATCH, 0, step - 1)
    assert record.values["batch"] == batch.tolist()
    return record.values


def test_a_loss_of_one_rank_that_is_no_number_is_everybodys(tmp_path: Path):
    work = Work(tmp_path, fault=Fault(FaultKind.NAN, 1, 11))
    values = assert_diverged(tmp_path, work, "the loss is nan at step 12; ", last_checkpoint=10)

    # Both ranks kept their weights, and the step itself has no fault.
    assert values["diagnosis"]["step"] == 12
    assert values["diagnosis"]["passes"] == {"fp32": {"is_finite": True}}


@pytest.mark.slow
def test_a_spike_of_one_rank_is_everybodys(tmp_path: Path):
    longer = replace(TRAIN, recipe=replace(TRAIN.recipe, steps=40))
    work = Work(tmp_path, longer, Fault(FaultKind.SPIKE, 1, 36))
    assert_diverged(tmp_path, work, "the loss has jumped to ", last_checkpoint=35)


def test_every_rank_is_refused_what_another_job_works_on(tmp_path: Path):
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    other = dict(state="training", updated=0, host="elsewhere", job_id="41")
    (folder / "heartbeat.json").write_text(json.dumps(other))
    assert run_group(2, Work(tmp_path)) == [1, 1]
    assert newest_record(tmp_path) is None

    texts = [(tmp_path / f"refusal-{rank}").read_text() for rank in range(2)]
    first, second = (re.sub(r"\d+ s ago", "", text) for text in texts)
    assert first == second
    assert first.startswith(f"run {folder.name} is being worked on by job 41 on elsewhere")


def test_processes_that_do_not_divide_the_batch_are_refused_in_one_line(tmp_path: Path):
    assert set(run_group(3, Work(tmp_path))) == {1}
    assert re.fullmatch(
        r"rank \d: ValueError: 3 processes do not divide a batch of 16; "
        "choose a number of processes that does",
        finished_record(tmp_path).error or "",
    )


def test_scores_do_not_depend_on_the_group_and_resume_from_finished_batches(
    alone: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_group(2, Work(alone, SCORE)) == [0, 0]
    assert not list(run_folder(alone).glob("samples-*")), "samples are removed in the end"

    # One process scores again. It is interrupted at its third batch, and resumes there.
    drawn: list[range] = []

    def interrupted(*arguments: Any) -> Any:
        drawn.append(next(part for part in arguments if isinstance(part, range)))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return generate_images(*arguments)

    monkeypatch.setattr(batches, "generate_images", interrupted)
    monkeypatch.setattr(batches, "BATCH_ON_CPU", 5)
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=40))
    torch.set_num_threads(1)
    cache, context = alone / "runs" / "classifiers", RunContext(run_folder(alone))
    with pytest.raises(KeyboardInterrupt):
        scoring.run_evaluation(SCORE, cache, context)
    values = scoring.run_evaluation(SCORE, cache, context)
    assert [part.start for part in drawn] == [0, 5, 10, 10, 15, 20]

    # NaN is not equal to itself, but its text is.
    recorded = finished_record(alone, SCORE).values
    assert {name: repr(value) for name, value in recorded.items()} == {
        name: repr(value) for name, value in values.items()
    }


def test_images_do_not_depend_on_the_pieces_that_they_are_drawn_in():
    model = build(TRAIN.backbone, 0, CPU).eval()
    whole = [x for x, _ in generate_images(SCORE, model, CPU, 5)]
    parts = []
    for start in range(0, SCORE.num, 5):
        within = range(start, min(start + 5, SCORE.num))
        parts += [x for x, _ in generate_images(SCORE, model, CPU, 5, within)]
    assert torch.equal(torch.cat(whole), torch.cat(parts))
