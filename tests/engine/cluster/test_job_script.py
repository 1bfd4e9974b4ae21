"""The scripts under slurm/: what they declare, and what slurm/job.sh does when a run dies."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import run
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cluster.status import batch_script_log
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Train, spec_id
from tests.support.commands import write_programs

SOURCED = ("env.sh", "job.sh")
SCRIPTS = sorted(path for path in (REPOSITORY / "slurm").glob("*.sh") if path.name not in SOURCED)

# A batch script whose run dies, as a killed process makes it.
DYING = """
source slurm/job.sh
bash -c "exit $1"
"""


def options(script: Path) -> dict[str, str]:
    """Return the options of a script's #SBATCH lines."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in line.split()[1:]]
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


def declared_training(script: Path) -> Train:
    """Return the training that a script's command names."""
    words = shlex.split(script.read_text().replace("\\\n", " "), comments=True)
    table, row, protocol = (
        words[words.index(f"--{name}") + 1] for name in ("table", "row", "protocol")
    )
    declared = run.TABLES[int(table)]
    (job,) = TablePlan(
        Selection(declared, [declared.row(row)], PROTOCOLS[protocol], [0], "cuda")
    ).trainings()
    training = job.stages[0]
    assert isinstance(training, Train)
    return training


def test_there_is_a_script_for_every_main_run():
    assert len(SCRIPTS) == 7


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_names_a_declared_run_and_the_processes_that_it_takes(script: Path):
    training, flags = declared_training(script), options(script)
    assert training.backbone.name == script.stem.removesuffix("_512")
    assert training.recipe.batch % (int(flags["nodes"]) * int(flags["ntasks-per-node"])) == 0
    # --status finds a job that waits by its comment, and its log by its name.
    assert flags["comment"] == spec_id(training), "write the training's id into --comment"
    log = flags["output"].replace("%x", "NAME").replace("%j", "7")
    assert log == f"results/{batch_script_log('NAME', '7')}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_requeued_keeps_its_log_and_ends_with_any_process(script: Path):
    flags = options(script)
    assert {"requeue", "job-name"} <= set(flags)
    assert (flags["open-mode"], flags["signal"]) == ("append", "USR2@180")
    assert "--kill-on-bad-exit=1" in script.read_text()


def attempt(folder: Path, number: int, status: int = 137) -> subprocess.CompletedProcess[str]:
    """Run a job that dies, after `number` restarts, with programs in Slurm's place."""
    write_programs(
        folder / "bin",
        squeue="echo RUNNING",
        scontrol=f'echo "$@" >> {folder}/requeued',
        srun="",
        sleep="",
    )

    # As Slurm starts a job that was requeued.
    environment = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "RESULTS": str(folder / "results"),
        "SLURM_RESTART_COUNT": str(number),
    }
    command = ["bash", "-c", DYING, "job", str(status)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def requeued(folder: Path) -> int:
    """Return how often the job went back into the queue."""
    path = folder / "requeued"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("progress", [False, True])
def test_a_job_whose_processes_die_goes_back_five_times_without_progress(
    tmp_path: Path, progress: bool
):
    for number in range(6):
        done = attempt(tmp_path, number)
        if progress:
            # A run that gets on removes this file.
            (tmp_path / "results" / "submissions" / "job-7.restarts").unlink()
    assert ("five restarts without progress" in done.stderr) != progress
    assert requeued(tmp_path) == (6 if progress else 5)


def test_a_job_that_fails_by_itself_stays_ended(tmp_path: Path):
    attempt(tmp_path, 0, status=1)
    assert requeued(tmp_path) == 0


@pytest.mark.parametrize("job, restarts", [("7", 0), ("6", 1)])
def test_a_heartbeat_tells_a_failure_in_any_order_of_its_keys(
    job: str, restarts: int, tmp_path: Path
):
    """A killed run whose heartbeat says that this very job failed is not repeated."""
    (tmp_path / "run").mkdir()
    beat = json.dumps({"job_id": job, "step": 3, "state": "failed"}, indent=1)
    (tmp_path / "run" / "heartbeat.json").write_text(beat)
    (tmp_path / "results" / "submissions").mkdir(parents=True)
    (tmp_path / "results" / "submissions" / "job-7.run").write_text(str(tmp_path / "run"))
    attempt(tmp_path, 0)
    assert requeued(tmp_path) == restarts


def test_the_command_of_a_script_remembers_its_job_before_it_needs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    results = tmp_path / "results"
    arguments = ["--table", "1", "--row", "DiCo-S", "--protocol", "imagenet256"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--results", str(results)])
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "dico_s", "DICO_DATA": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run.main() == 2
    assert re.search("error: protocol imagenet256 needs VAE latents", capsys.readouterr().err)
    (line,) = (results / "submissions" / "jobs.jsonl").read_text().splitlines()
    assert json.loads(line)["job"] == "7"
