"""Groups of processes: the same run as one process makes, and what becomes of it when a process fails, is stopped or killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.data.sets import batch_indices, load_data
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.runtime import attempts, failures, heartbeat, preemption
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.group import Group, group_from_environment, master_port
from experiments.engine.runtime.preemption import LOST, TRY_AGAIN
from experiments.engine.sampling import generate
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import (
    Backbone,
    Data,
    Evaluate,
    Recipe,
    Sampler,
    Stage,
    Train,
    spec_id,
)
from experiments.engine.training import stage as training_stage
from experiments.engine.training.trainer import Trainer, build

SMALL = dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
TRAIN = Train(
    Backbone("dico_s", SMALL),
    Data("digits", 8, 1, 10),
    Recipe(steps=14, batch=16, lr=1e-3, warmup=4, ema=0.9),
)
SCORE = Evaluate(TRAIN, Sampler(num_steps=3, channels=None), 23, "digits")
BOUND = 180.0  # seconds that no group here may take: far more than any needs, far less than a hang


def member(
    group: Group,
    port: int,
    root: Path,
    spec: Stage,
    resources: Resources,
    fault: tuple[str, int, int] | None,
    seen: bool,
) -> None:
    """One rank at work; at a step of a rank a fault strikes: 'raise', 'kill', 'stop', 'requeue', 'raise while others hang', 'hang' until the others have left, or, from there on, a loss of 'nan' or a 'spike'."""
    torch.set_num_threads(1)
    preemption.listen()
    training_stage.LOG_EVERY, failures.POLL, failures.GRACE, evaluate.ON_CPU = 3, 0.1, 2.0, 5
    if group.world_size > 1:
        names = dict(
            RANK=group.rank,
            WORLD_SIZE=group.world_size,
            LOCAL_RANK=group.rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        os.environ.update({name: str(value) for name, value in names.items()})
    update, losses, inputs = Trainer._update, IDDPM.losses, []

    def faulty(self: Trainer, *batch: Tensor) -> Tensor:
        if (
            fault
            and fault[0] in ("nan", "spike")
            and group.rank == fault[1]
            and self.step >= fault[2]
        ):
            return update(self, *batch) * (math.nan if fault[0] == "nan" else 1000)
        if fault and (group.rank, self.step) == fault[1:]:
            while fault[0] == "hang" and heartbeat.is_live(
                heartbeat.read_heartbeat(Store(root).run_dir(spec))
            ):
                time.sleep(0.1)
            if fault[0].startswith("raise"):
                raise KeyError("boom")
            if fault[0] != "hang":
                os.kill(
                    os.getpid(),
                    dict(kill=signal.SIGKILL, stop=signal.SIGTERM, requeue=signal.SIGUSR2)[
                        fault[0]
                    ],
                )
        if fault and fault[0] == "raise while others hang" and self.step == fault[2]:
            time.sleep(2 * BOUND)
        return update(self, *batch)

    def recording(self: IDDPM, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        inputs.append(batch)
        return losses(self, model, *batch)

    Trainer._update = faulty
    if seen:
        IDDPM.losses = recording
    try:
        record = execute(spec, Store(root), resources)
    except ValueError as refusal:
        (root / f"refusal-{group.rank}").write_text(str(refusal))
        raise SystemExit(1) from None
    if seen:
        torch.save(
            [torch.cat(parts) for parts in zip(*inputs, strict=True)],
            root / f"seen-{group.rank}.pt",
        )
    raise SystemExit(0 if record.status == "done" else 1)


def group(
    world: int,
    root: Path,
    spec: Stage = TRAIN,
    fault: tuple[str, int, int] | None = None,
    seen: bool = False,
    **resources: Any,
) -> list[int]:
    """Exit statuses of a group's ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "experiments.engine.jobs.execute",
            "sklearn.datasets",
            "torch._dynamo",
            "torch.utils.tensorboard",
        ]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = Resources(**dict(checkpoint_every=5, timeout=BOUND) | resources)
    ranks = [
        context.Process(
            target=member, args=(Group(rank, world, rank), port, root, spec, given, fault, seen)
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(BOUND)
        assert rank.exitcode is not None, "a rank hangs"
    return [rank.exitcode for rank in ranks]


def outcome(root: Path, spec: Stage = TRAIN) -> Any:
    """The newest record of a stage, whatever its status."""
    found = Store(root).here.by_id().get(spec_id(spec))
    return found[-1] if found else None


def curve(root: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (root / "runs" / spec_id(TRAIN) / "log.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert group(1, root, seen=True) == [0]
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    assert group(2, root, seen=True) == [0, 0]
    return root


def test_ranks_come_from_the_environment():
    step = dict(
        SLURM_STEP_ID="0",
        SLURM_PROCID="5",
        SLURM_NTASKS="8",
        SLURM_STEP_NUM_TASKS="8",
        SLURM_LOCALID="1",
    )
    assert group_from_environment(step) == Group(5, 8, 1)
    assert group_from_environment(
        {**step, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    ) == Group(2, 4, 2)
    assert (
        group_from_environment(
            {name: value for name, value in step.items() if name != "SLURM_STEP_ID"}
        )
        == Group()
        == group_from_environment({})
    )
    assert (
        group_from_environment(
            step
            | dict(
                SLURM_STEP_ID="4294967290",
                SLURM_PROCID="0",
                SLURM_STEP_NUM_TASKS="1",
                SLURM_LOCALID="0",
            )
        )
        == Group()
    )  # a shell that salloc gives


def test_the_port_changes_with_the_restart_and_stays_below_the_ephemeral_range():
    ports = [
        master_port(str(job), "0", str(restart)) for job in range(1000) for restart in range(3)
    ]
    assert (
        all(20000 <= port < 30000 for port in ports)
        and len({master_port("7", step, restart) for step in "01" for restart in "01"}) == 4
    )
    assert len(set(ports)) > 2500


@pytest.mark.parametrize(
    "kind, words",
    [("port", "127.0.0.1:{port}: "), ("scheduler", "the first host:{port}: .*scontrol")],
)
def test_a_group_that_cannot_meet_says_so_in_one_line_and_asks_for_a_restart(
    kind: str, words: str, tmp_path: Path
):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    code = "from experiments.engine.runtime.group import join_group; join_group('cpu', 2.0)"
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        given = dict(
            RANK="0",
            WORLD_SIZE="2",
            MASTER_PORT=str(taken.getsockname()[1]),
            PATH=f"{tmp_path}:{os.environ['PATH']}",
        )
        given |= (
            dict(SLURM_JOB_NODELIST="a,b") if kind == "scheduler" else dict(MASTER_ADDR="127.0.0.1")
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | given,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
    assert done.returncode == LOST and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        rf"^error: rank 0 cannot join the others at {words.format(port=given['MASTER_PORT'])}",
        done.stderr,
        re.M,
    ), done.stderr


def test_a_batch_is_cut_into_equal_parts_or_refused():
    assert [Group(rank, 4).shard(20) for rank in range(4)] == [
        slice(0, 5),
        slice(5, 10),
        slice(10, 15),
        slice(15, 20),
    ]
    with pytest.raises(
        ValueError,
        match="^3 processes do not divide a batch of 16; choose a number of processes that does$",
    ):
        Group(0, 3).shard(16)


def test_a_group_sees_the_samples_of_one_process_and_has_its_losses(
    alone: Path, pair: Path, tmp_path: Path
):
    assert group(4, tmp_path, seen=True, micro_batch=3) == [0] * 4
    whole = torch.load(alone / "seen-0.pt")
    for root, world in ((pair, 2), (tmp_path, 4)):
        parts = [torch.load(root / f"seen-{rank}.pt") for rank in range(world)]
        for values, *shares in zip(whole, *parts, strict=True):
            together = torch.cat(
                [share.unflatten(0, (14, 16 // world)) for share in shares], dim=1
            ).flatten(0, 1)
            assert torch.equal(together, values)
        assert curve(root) == pytest.approx(curve(alone), rel=1e-5) and len(curve(root)) == 5
        assert outcome(root).provenance["world_size"] == world


@pytest.mark.slow
def test_a_stopped_group_saves_at_one_step_and_goes_on_to_the_same_weights(
    alone: Path, pair: Path, tmp_path: Path
):
    assert group(2, tmp_path, fault=("requeue", 1, 6), shard_optimizer=True) == [TRY_AGAIN] * 2
    folder = tmp_path / "runs" / spec_id(TRAIN)
    (saved,) = [
        int(path.name[5:13])
        for path in (folder / "checkpoints").glob("step-*.pt")
        if int(path.name[5:13]) % 5
    ]
    assert 7 <= saved <= 8 and outcome(tmp_path) is None
    assert (
        heartbeat.read_heartbeat(folder)["state"] == "stopped"
        and "SIGUSR2" in heartbeat.read_heartbeat(folder)["reason"]
    )
    assert group(2, tmp_path, fault=("stop", 0, 11)) == [TRY_AGAIN] * 2
    assert group(2, tmp_path, shard_optimizer=True) == [0, 0]
    values = outcome(tmp_path).values
    assert values["weights_sha256"] == outcome(pair).values["weights_sha256"] and curve(
        tmp_path
    ) == curve(pair)
    assert [attempt["start"] for attempt in values["attempts"]] == [
        0,
        saved,
        values["resumed_at"],
    ] and values["attempts"][-1]["end"] == 14
    assert [attempt["reason"] for attempt in values["attempts"]] == [
        "asked to make room (SIGUSR2)",
        "asked to stop (SIGTERM)",
        "done",
    ]


@pytest.mark.slow
def test_a_sharded_optimiser_goes_on_in_one_process(alone: Path, tmp_path: Path):
    assert group(2, tmp_path, fault=("requeue", 0, 6), shard_optimizer=True) == [TRY_AGAIN] * 2
    assert group(1, tmp_path) == [0]
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-5) and outcome(tmp_path).values[
        "resumed_at"
    ] in (7, 8)


@pytest.mark.parametrize("kind, rank", [("raise", 0), ("raise", 1), ("raise while others hang", 1)])
def test_a_failing_rank_ends_the_group_with_its_error(kind: str, rank: int, tmp_path: Path):
    assert group(2, tmp_path, fault=(kind, rank, 6)) == [1, 1]
    record, beat = outcome(tmp_path), heartbeat.read_heartbeat(tmp_path / "runs" / spec_id(TRAIN))
    assert (
        (record.status, record.error)
        == ("failed", f"rank {rank}: KeyError: 'boom'")
        == (beat["state"], beat["reason"])
    )
    assert record.values["attempts"][-1]["reason"] == record.error


@pytest.mark.slow
def test_a_killed_rank_ends_the_group_and_costs_the_steps_since_the_checkpoint(
    pair: Path, tmp_path: Path
):
    assert group(2, tmp_path, fault=("kill", 1, 12)) == [LOST, -signal.SIGKILL]
    assert outcome(tmp_path) is None and re.match(
        "rank 0 lost another rank",
        heartbeat.read_heartbeat(tmp_path / "runs" / spec_id(TRAIN))["reason"],
    )
    assert group(2, tmp_path, fault=("kill", 0, 13)) == [-signal.SIGKILL, LOST]
    assert group(2, tmp_path) == [0, 0]
    values = outcome(tmp_path).values
    assert (
        values["resumed_at"] == 10
        and values["weights_sha256"] == outcome(pair).values["weights_sha256"]
    )
    assert [attempt["start"] for attempt in values["attempts"]] == [
        0,
        10,
        10,
    ] and attempts.read_attempts(tmp_path / "runs" / spec_id(TRAIN)) == values["attempts"]


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_group_at_the_bound_of_its_collectives(
    pair: Path, tmp_path: Path
):
    assert group(2, tmp_path, fault=("hang", 1, 12), timeout=10.0) == [LOST, LOST]
    beat = heartbeat.read_heartbeat(tmp_path / "runs" / spec_id(TRAIN))
    assert (
        outcome(tmp_path) is None
        and beat["state"] == "stopped"
        and re.match("rank 0 lost another rank", beat["reason"])
    )
    assert group(2, tmp_path) == [0, 0]
    assert (
        outcome(tmp_path).values["resumed_at"] == 10
        and outcome(tmp_path).values["weights_sha256"] == outcome(pair).values["weights_sha256"]
    )


@pytest.mark.parametrize(
    "kind, bad, words",
    [("nan", 35, "the loss is nan at step 36; "), ("spike", 36, "the loss has jumped to ")],
)
def test_a_bad_loss_of_one_rank_is_everybody_s(kind: str, bad: int, words: str, tmp_path: Path):
    spec = replace(TRAIN, recipe=replace(TRAIN.recipe, steps=40))
    assert group(2, tmp_path, spec, fault=(kind, 1, bad)) == [1, 1]
    record = outcome(tmp_path, spec)
    assert record.status == "failed" and f"Diverged: {words}" in record.error
    assert record.values["last_checkpoint"] == 35 and record.values["stopped_at"] >= bad + 1
    assert (
        record.values["batch"]
        == batch_indices(len(load_data(spec.data)), 16, 0, record.values["stopped_at"] - 1).tolist()
    )


def test_every_rank_is_refused_what_another_job_works_on(tmp_path: Path):
    folder = tmp_path / "runs" / spec_id(TRAIN)
    folder.mkdir(parents=True)
    (folder / "heartbeat.json").write_text(
        json.dumps(dict(state="training", updated=0, host="elsewhere", job_id="41"))
    )
    assert group(2, tmp_path) == [1, 1] and outcome(tmp_path) is None
    first, second = (
        re.sub(r"\d+ s ago", "", (tmp_path / f"refusal-{rank}").read_text()) for rank in range(2)
    )
    assert first == second and first.startswith(
        f"run {folder.name} is being worked on by job 41 on elsewhere"
    )


def in_a_job(root: Path, folder: Path, asked: str) -> None:
    """A job of one process that is asked to `stop` or `requeue`; its scheduler's `requeue` ends it by SIGTERM, as Slurm does."""
    os.environ |= {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}
    preemption.requeue.__defaults__ = (0.0, 0.0)
    member(Group(), 0, root, TRAIN, Resources(), (asked, 0, 6), False)


@pytest.mark.parametrize("asked, state", [("requeue", ""), ("stop", "JobState=RUNNING")])
def test_a_job_goes_back_into_the_queue_and_dies_at_once(
    asked: str, state: str, alone: Path, tmp_path: Path
):
    script = tmp_path / "scontrol"
    show = f'[ "$1" = -o ] && {{ echo "{state}"; exit; }}\n'
    script.write_text(
        f'#!/bin/sh\n{show}cp {tmp_path}/runs/{spec_id(TRAIN)}/heartbeat.json {tmp_path}/then\necho "$@" > {tmp_path}/asked\nkill -TERM $PPID\n'
    )
    script.chmod(0o755)
    process = multiprocessing.get_context("forkserver").Process(
        target=in_a_job, args=(tmp_path, tmp_path, asked)
    )
    process.start()
    process.join(BOUND)
    assert process.exitcode == -signal.SIGTERM and (tmp_path / "asked").read_text() == "requeue 7\n"
    assert (json.loads((tmp_path / "then").read_text())["state"], outcome(tmp_path)) == (
        "requeued",
        None,
    )
    assert group(1, tmp_path) == [0]
    assert outcome(tmp_path).values["weights_sha256"] == outcome(alone).values[
        "weights_sha256"
    ] and curve(tmp_path) == curve(alone)
    assert outcome(tmp_path).values["resumed_at"] == 7


@pytest.mark.parametrize(
    "asked, state, last",
    [
        ("requeue", "RUNNING", "the job could not be requeued: no job 7"),
        ("requeue", "COMPLETING", "asked to make room (SIGUSR2), and to end"),
        ("stop", "COMPLETING", "asked to stop (SIGTERM)"),
    ],
)
def test_a_job_that_does_not_go_back_ends_with_the_reason(
    asked: str, state: str, last: str, tmp_path: Path
):
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = requeue ] && {{ echo "no job 7" >&2; exit 1; }}\necho "JobState={state}"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    process = multiprocessing.get_context("forkserver").Process(
        target=in_a_job, args=(tmp_path, tmp_path, asked)
    )
    process.start()
    process.join(BOUND)
    beat = heartbeat.read_heartbeat(tmp_path / "runs" / spec_id(TRAIN))
    assert (
        process.exitcode == TRY_AGAIN
        and (beat["state"], outcome(tmp_path)) == ("stopped", None)
        and beat["reason"].endswith(last)
    )


def test_an_element_of_an_array_asks_for_itself_until_the_controller_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script, asked = tmp_path / "scontrol", tmp_path / "asked"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\n[ $(wc -l < {asked}) -ge 3 ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert preemption.requeue(patience=0.0) == "Unable to contact slurm controller"
    assert preemption.requeue(pause=0.0) is None and asked.read_text() == "requeue 7_1\n" * 3


def test_processes_that_do_not_divide_the_batch_are_refused_in_one_line(tmp_path: Path):
    assert set(group(3, tmp_path)) == {1}
    assert re.fullmatch(
        r"rank \d: ValueError: 3 processes do not divide a batch of 16; choose a number of processes that does",
        outcome(tmp_path).error,
    )


def test_scores_do_not_depend_on_the_group_and_sampling_goes_on_from_finished_batches(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert group(2, alone, SCORE) == [0, 0]
    run, drawn = alone / "runs" / spec_id(TRAIN), []
    assert not list(run.glob("samples-*"))
    sampled = evaluate.generate_images

    def interrupted(*arguments: Any) -> Any:
        drawn.append(arguments[-1])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sampled(*arguments)

    monkeypatch.setattr(evaluate, "generate_images", interrupted)
    monkeypatch.setattr(evaluate, "ON_CPU", 5)
    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(SCORE, alone / "runs" / "classifiers", RunContext(run))
    values = evaluate.run(SCORE, alone / "runs" / "classifiers", RunContext(run))
    assert [part.start for part in drawn] == [0, 5, 10, 10, 15, 20]
    assert {name: repr(value) for name, value in outcome(alone, SCORE).values.items()} == {
        name: repr(value) for name, value in values.items()
    }
    model = build(TRAIN.backbone, 0, torch.device("cpu")).eval()
    images = torch.cat(
        [x for x, _ in generate.generate_images(SCORE, model, torch.device("cpu"), 5)]
    )
    parts = torch.cat(
        [
            x
            for start in range(0, 23, 5)
            for x, _ in generate.generate_images(
                SCORE, model, torch.device("cpu"), 5, range(start, min(start + 5, 23))
            )
        ]
    )
    assert torch.equal(images, parts)
