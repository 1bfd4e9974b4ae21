"""What is submitted with a site's resources. Scripts stand in for Slurm's programs."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.declared.protocols import DIGITS
from experiments.engine.cluster import client, local
from experiments.engine.cluster.site import Site, load_site
from experiments.engine.cluster.submit import (
    Array,
    batch_script_text,
    submit,
    submitit_parameters,
    trainer_resources,
)
from experiments.engine.jobs.job import Job
from experiments.engine.records.store import Store
from tests.support.commands import TABLE, call, write_programs
from tests.support.plans import site_file, two_rows


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in Slurm's place: an empty queue, and an sbatch that takes everything as job 7."""
    programs = tmp_path / "bin"
    write_programs(programs, sbatch="echo Submitted batch job 7", squeue="", srun="", scancel="")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return programs


def test_the_trainer_takes_what_the_site_gives_and_has_the_same_defaults(tmp_path: Path):
    from experiments.engine.runtime.context import Resources

    assert Resources(**trainer_resources(Site(gpus_per_node=0))) == Resources()
    text = "keep = 5\nmilestones = 100\nmicro_batch = 8\nsample_batch = 4\ncollective_seconds = 60"
    site = load_site("DiCo-S", site_file(tmp_path, text))
    assert Resources(**trainer_resources(site)) == Resources(
        "cuda", micro_batch=8, sample_batch=4, keep=5, milestones=100, timeout=60.0
    )


def test_a_batch_script_holds_what_the_site_gives(tmp_path: Path):
    site = Site(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        mem="100G",
        partition="p",
        account="a",
        qos="q",
        constraint="c",
        concurrent=3,
        options={"exclusive": True},
    )

    # Five jobs are an array.
    folder = tmp_path / "submissions" / "dico-x"
    text = batch_script_text(site, folder, 5)
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    expected = {
        "array": "0-4%3",
        "signal": "USR2@180",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "6",
        "mem": "100G",
        "time": "1440",
        "partition": "p",
        "account": "a",
        "qos": "q",
        "constraint": "c",
    }
    assert {name: flags[name] for name in expected} == expected
    assert {"requeue", "exclusive"} <= set(flags)
    assert "source slurm/job.sh" in text
    assert re.search(r"^srun .*--cpus-per-task=6 --kill-on-bad-exit=1 .*submitit", text, re.M)

    # A single job is none, and a kind of GPU is asked for by its name.
    assert "array" not in batch_script_text(site, folder, 1)
    kind = batch_script_text(replace(site, gpu_type="a100"), folder, 1)
    assert "#SBATCH --gpus-per-node=a100:4\n" in kind


def test_a_cpu_site_asks_for_no_gpu(tmp_path: Path):
    parameters = submitit_parameters(Site(gpus_per_node=0), tmp_path / "a" / "b")
    assert "gpus_per_node" not in parameters


def test_the_printed_batch_script_is_the_one_that_submitit_submits(
    fake_slurm: Path, tmp_path: Path
):
    """Hold the one use of a private function of submitit to what its public interface does."""
    jobs = tuple(two_rows().trainings())
    store, site = Store(tmp_path / "results"), Site(nodes=2, options={"exclusive": True})
    first, second = submit([Array(site, jobs)], store, "a.py")
    assert [first.job, second.job] == ["7_0", "7_1"]

    folder = store.root.resolve() / "submissions" / first.name
    written = (folder / "7_submission.sh").read_text()
    assert batch_script_text(site, folder, 2).strip() == written.strip()
    assert client.submitted(store.root, [first.stages[0], second.stages[0]]) == [first, second]


def test_an_account_that_the_scheduler_does_not_know_is_refused_in_its_words(
    fake_slurm: Path, tmp_path: Path
):
    message = "Batch job submission failed: Invalid account"
    write_programs(
        fake_slurm,
        sbatch='grep -q "^#SBATCH --account=moon$" "$2" || exit 0\n'
        f'echo "sbatch: error: {message}" >&2; exit 1',
    )
    store = Store(tmp_path / "results")
    array = Array(Site(account="moon"), tuple(two_rows().trainings()))
    with pytest.raises(ValueError, match=f"^sbatch: {message}$"):
        submit([array], store, "a.py")

    # The scheduler judges every script before the first one is submitted.
    assert not list(store.root.glob("submissions/dico-*"))
    assert not client.ledger(store.root).exists()


def test_what_was_submitted_before_a_refusal_is_named(fake_slurm: Path, tmp_path: Path):
    first, second = (
        Array(Site(nodes=n), (job,)) for n, job in enumerate(two_rows().trainings(), 1)
    )
    write_programs(
        fake_slurm,
        sbatch='[ "$1" = --test-only ] && exit 0\n'
        'grep -q "^#SBATCH --nodes=2$" "$1" || { echo Submitted batch job 7; exit 0; }\n'
        'echo "sbatch: error: the queue is full" >&2; exit 1',
    )
    with pytest.raises(ValueError, match="the queue is full; submitted before it: job 7$"):
        submit([first, second], Store(tmp_path / "results"), "a.py")


def test_what_the_scheduler_refuses_only_today_is_a_warning(
    fake_slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    refusal = "Requested node configuration is not available"
    write_programs(
        fake_slurm,
        sbatch='[ "$1" = --test-only ] || { echo Submitted batch job 7; exit 0; }\n'
        f'echo "sbatch: error: {refusal}" >&2; exit 1',
    )
    array = Array(Site(), tuple(two_rows().trainings()[:1]))
    assert len(submit([array], Store(tmp_path / "results"), "a.py")) == 1
    assert f"warning: sbatch: {refusal}; submitted all the same" in capsys.readouterr().err


def test_a_job_here_is_reported_by_what_it_recorded_itself(tmp_path: Path):
    """A job that died is reported by its record, or by its log where it has left none."""
    store = Store(tmp_path)
    job = two_rows(DIGITS, "cpu").trainings()[0]
    old = store.append(job.stages[0], "failed", {}, {}, "an error of long ago")
    log = tmp_path / "log"
    events: list[tuple[str, object]] = []

    def notify(job: Job, event: str, payload: object) -> None:
        events.append((event, payload))

    # The record is older than the job.
    later = old.utc[:-1] + "a"
    local.report_end(job, RuntimeError("killed"), Store(tmp_path), log, later, notify)
    assert events == [("error", f"killed (its log: {log})"), ("end", None)]

    # The record is the job's own.
    events.clear()
    local.report_end(job, RuntimeError("failed"), Store(tmp_path), log, old.utc, notify)
    assert [event for event, _ in events] == ["record", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_on_this_machine_gives_the_same_records(cluster: str, tmp_path: Path):
    script = tmp_path / "tiny.py"
    script.write_text(TABLE.format(steps=5))
    options = ["--table", 4, "--rows", "good", "bad", "--results", tmp_path / "results"]
    done = call(script, *options, "--cluster", cluster)
    assert done.returncode == 1, done.stderr
    assert "bad: train failed: ValueError: window attention" in done.stdout

    plan = call(script, *options, "--dry-run").stdout
    assert len(re.findall(r"  done$", plan, re.M)) == 7
    assert "failed before, would run again" in plan
