"""Runs on a real Slurm that lose their nodes or their time, and go on in a later attempt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime.heartbeat import read_heartbeat
from tests.support.slurm import NEEDS_CLUSTER, Cluster, write_table

pytestmark = NEEDS_CLUSTER


def test_an_element_of_an_array_goes_back_alone(slurm: Cluster, tmp_path: Path):
    """An element of an array that makes room is requeued; the other element runs on."""
    command = write_table(slurm, tmp_path, 100_000, "good", "last")
    jobs = command.send()
    slurm.wait_until(lambda: command.count_training() == 2, "both runs train")

    # To its own process, the job id of the last element is the id of the array.
    slurm.client("scancel", "--signal=USR2", jobs["last"])
    slurm.wait_until(
        lambda: slurm.restarts_of(jobs["last"]) == 1,
        "the element that was asked to make room is requeued",
    )
    assert slurm.restarts_of(jobs["good"]) == 0
    assert slurm.state_of(jobs["good"]) == "RUNNING"

    # Leave an empty queue.
    assert command.call("--cancel").returncode == 0
    slurm.wait_until_empty()


def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(slurm: Cluster, tmp_path: Path):
    """A job that loses its nodes to a higher partition goes on where it stopped.

    A cancelled job gets the same signal, and ends.
    """
    command = write_table(slurm, tmp_path, 100_000, "good")
    job = command.send()["good"]
    slurm.wait_until(lambda: command.count_training("[1-9]") == 1, "the run trains")

    # A job of the higher partition takes both nodes for a second.
    nodes = ("--partition=high", "--nodes=2", "--exclusive")
    slurm.submit(*nodes, "--output=/dev/null", "--wrap", "sleep 1")
    slurm.wait_until(lambda: command.counts_of_attempts() == [2], "the run goes on")
    ((first, second),) = command.attempts()
    assert first["reason"] == "asked to stop (SIGTERM), to make room"
    assert 0 < first["end"] == second["start"]
    slurm.wait_until(lambda: command.reached_step() > second["start"], "the run trains again")

    # A cancelled job has no third attempt and no failed record.
    assert command.call("--cancel").stdout == f"cancelled job {job}: good, seed 0\n"
    slurm.wait_until_empty()
    ((_, second),) = command.attempts()
    assert second["reason"] == "asked to stop (SIGTERM)"
    assert slurm.state_of(job, "-t", "all") == "CANCELLED"
    assert not [state for _, state in command.records() if state == "failed"]
    assert "last heard of: asked to stop (SIGTERM)" in command.status()


def test_a_run_whose_slurmd_died_is_not_made_twice(slurm: Cluster, tmp_path: Path):
    """While a process that Slurm lost still trains, the next attempt waits for it."""
    command = write_table(slurm, tmp_path, 100_000, "good")
    job = command.under(DICO_SLURM_CHECKPOINT_EVERY="5").send()["good"]
    slurm.wait_until(
        lambda: any(command.results.glob("runs/*/checkpoints/step-*.pt")),
        "the run keeps a checkpoint",
    )

    # Without its daemon, the node is lost to Slurm, which starts the job elsewhere.
    node = slurm.client("squeue", "-h", "-j", job, "-o", "%N").strip()[-1]
    slurm.control("slurmd-kill", node)
    slurm.wait_until(
        lambda: slurm.state_of(job) == "RUNNING" and slurm.restarts_of(job) == 1,
        "the job runs elsewhere",
    )

    # The process that nobody hears of trains on, and the second attempt waits.
    run = command.run_folder()
    before = read_heartbeat(run)
    slurm.wait_until(lambda: command.reached_step() > before["step"], "the lost process trains on")
    assert read_heartbeat(run)["pid"] == before["pid"]
    assert command.counts_of_attempts() == [1]

    # Once the node is back, Slurm ends the lost process and the second attempt goes on.
    slurm.control("node-start", node)
    slurm.wait_until(lambda: command.counts_of_attempts() == [2], "the other attempt goes on")
    ((first, second),) = command.attempts()
    assert 0 < second["start"] <= first["end"]
    assert read_heartbeat(run)["pid"] != before["pid"]

    # Leave an empty queue and two idle nodes.
    assert command.call("--cancel").returncode == 0
    slurm.wait_until_empty()
    idle = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
    slurm.wait_until(lambda: len(slurm.client(*idle).split()) == 2, "both nodes are idle")


def test_a_time_limit_is_survived_with_a_signal_before_it_and_without(
    slurm: Cluster, tmp_path: Path
):
    """A run goes on after its time limit, whether or not a signal announced the limit."""
    # The site's file gives the row "last" no signal.
    site = tmp_path / "site.toml"
    site.write_text('time = "0:02:00"\nsignal_seconds = 30\n[rows."last"]\nsignal_seconds = 0\n')
    command = write_table(slurm, tmp_path, 1_000_000, "good", "last")
    environment = dict(command.environment)
    del environment["DICO_SLURM_TIME"], environment["DICO_SLURM_SIGNAL_SECONDS"]
    command = replace(command, environment=environment).under(
        DICO_SLURM_SITE=str(site), DICO_SLURM_CHECKPOINT_EVERY="50"
    )

    # Both runs reach a limit of one minute, and go on.
    jobs = command.send()
    slurm.wait_until(lambda: command.count_training("[1-9]") == 2, "both runs train")
    for job in jobs.values():
        slurm.client("scontrol", "update", f"jobid={job}", "TimeLimit=1")
    slurm.wait_until(lambda: command.counts_of_attempts() >= [2, 2], "both runs go on")

    # Each attempt starts at the step where the one before it ended.
    attempts = command.attempts()
    reasons = {run[0]["reason"] for run in attempts}
    assert reasons == {"asked to make room (SIGUSR2)", "asked to stop (SIGTERM), to make room"}
    assert all(0 < run[0]["end"] == run[1]["start"] for run in attempts)

    # Leave an empty queue.
    assert command.call("--cancel").returncode == 0
    slurm.wait_until_empty()


def test_a_training_survives_faults(slurm: Cluster):
    """tests/fault_test.py reports that a training survived three faults, bit for bit.

    The shared cluster lends no more than its environment: the script starts a cluster of its own.
    """
    script = str(REPOSITORY / "tests" / "fault_test.py")
    command = [sys.executable, script, "--faults", "3", "--seed", "78", "--steps", "400"]
    environment = dict(slurm.environment)
    del environment["SLURM_CONF"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    printed = done.stdout + done.stderr

    # The seed draws these faults for root, who has one kind more to draw from.
    faults = set(re.findall(r"^fault .*: (.*)$", done.stdout, re.M))
    if os.geteuid() == 0:
        assert faults == {"kill node", "requeue", "restart controller"}, printed
    assert done.returncode == 0, printed
    assert "faults injected: 3; survived: 3" in done.stdout, printed
