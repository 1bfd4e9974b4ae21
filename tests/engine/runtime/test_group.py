"""Ranks, shards and ports of a group, and how its processes meet."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from experiments.engine.machine.lifetime import LAUNCHED
from experiments.engine.runtime import group
from experiments.engine.runtime.group import (
    Group,
    group_from_environment,
    join_group,
    master_port,
)
from experiments.engine.runtime.preemption import LOST

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
}
LAUNCHER = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


def test_ranks_come_from_the_launcher_or_else_from_the_schedulers_step():
    assert group_from_environment({}) == Group()
    assert group_from_environment(STEP) == Group(5, 8, 1)
    assert group_from_environment(STEP | LAUNCHER) == Group(2, 4, 2)


def test_a_job_without_a_step_is_one_process():
    job = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    assert group_from_environment(job) == Group()
    shell = {
        "SLURM_STEP_ID": "4294967290",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_LOCALID": "0",
    }
    assert group_from_environment(STEP | shell) == Group()


def test_the_port_changes_with_the_restart_and_stays_below_the_ephemeral_range():
    ports = [
        master_port(str(job), "0", str(restart)) for job in range(1000) for restart in range(3)
    ]
    assert all(20000 <= port < 30000 for port in ports)
    assert len(set(ports)) > 2500
    assert len({master_port("7", step, restart) for step in "01" for restart in "01"}) == 4


def test_a_batch_is_cut_into_equal_shards():
    shards = [Group(rank, 4).shard(20) for rank in range(4)]
    assert shards == [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20)]


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    message = "^3 processes do not divide a batch of 16; choose a number of processes that does$"
    with pytest.raises(ValueError, match=message):
        Group(0, 3).shard(16)


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch):
    """Declares rank 0 of two, at a port that another process has."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield port


def test_a_taken_port_is_one_line_and_asks_for_a_restart(
    taken_port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit) as end:
        join_group("cpu", 2.0)
    assert end.value.code == LOST
    message = f"^error: rank 0 cannot join the others at 127.0.0.1:{taken_port}: .*\n$"
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def stray(monkeypatch: pytest.MonkeyPatch) -> str:
    """Declares two ranks at an address where nobody is, and returns the address."""
    for name in ("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(group, "SAID_AFTER", 0.2)
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_left_over_says_for_whom_it_waits_and_ends(
    rank: int, stray: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The collective operations themselves may wait for half an hour."""
    monkeypatch.setattr(group, "COMING", 1.0)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as end:
        join_group("cpu", 1800.0)
    assert end.value.code == LOST

    # One line when it begins to wait, and one when it gives up.
    advice = "unset RANK and WORLD_SIZE to run one process alone"
    waiting, error = capsys.readouterr().err.splitlines()
    assert waiting == (
        f"rank {rank} of 2 (RANK, WORLD_SIZE) waits for the others at {stray} "
        f"(MASTER_ADDR, MASTER_PORT); {advice}"
    )
    assert error.startswith(f"error: rank {rank} cannot join the others at {stray}: ")
    assert error.endswith(advice)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "unset RANK and WORLD_SIZE"),
        (STEP, "unset SLURM_STEP_ID"),
    ],
)
def test_ranks_without_an_address_are_refused_at_once(
    variables: dict[str, str], names: str, stray: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"without MASTER_ADDR.*{names}"):
        join_group("cpu", 1800.0)


@pytest.mark.parametrize(
    ("variables", "seconds", "bound"),
    [
        ({}, 1800.0, 60.0),
        ({}, 20.0, 20.0),
        ({"SLURM_STEP_ID": "0"}, 1800.0, 1800.0),
        ({LAUNCHED: "none"}, 1800.0, 1800.0),
        ({LAUNCHED: ""}, 1800.0, 60.0),
    ],
)
def test_ranks_without_a_launcher_have_a_minute_to_come(
    variables: dict[str, str],
    seconds: float,
    bound: float,
    stray: str,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert group._bound_of_coming(seconds) == bound


def test_an_unknown_host_is_one_line_and_asks_for_a_restart(
    taken_port: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Slurm that does not know the first host is no reason to fail for good."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a,b")

    # The line names the program that Slurm was asked with.
    with pytest.raises(SystemExit) as end:
        join_group("cpu", 2.0)
    assert end.value.code == LOST
    message = f"^error: rank 0 cannot join the others at the first host:{taken_port}: .*scontrol"
    assert re.search(message, capsys.readouterr().err)
