"""Jobs that are submitted from inside another job, and from folders with any name."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments.engine.cluster.nested import (
    not_for_jobs,
    outside_of_jobs,
    require_no_rank,
    without_ranks,
)
from experiments.engine.cluster.site import Site
from experiments.engine.cluster.submit import batch_script_text, new_folder, require_plain_path
from experiments.engine.records.tree import REPOSITORY

# What srun gave to a shell of one task, core and GPU, on a cluster with task/affinity.
SHELL = {
    "CUDA_VISIBLE_DEVICES": "0",
    "SLURMD_NODENAME": "n1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_LIST": "0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_NPROCS": "1",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_TRES_PER_TASK": "cpu=1",
    "SRUN_DEBUG": "3",
}
SITE = {
    "SBATCH_ACCOUNT": "mine",
    "SLURM_CLUSTERS": "a",
    "SLURM_CONF": "/etc/slurm.conf",
    "OMP_NUM_THREADS": "2",
    "DICO_DATA": "/data",
}


def test_a_shell_inside_a_job_passes_nothing_of_it_on():
    assert not_for_jobs(SHELL | SITE) == set(SHELL)


@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        (SITE, set()),
        # outside of a job the user has set these
        (SITE | {"SLURM_CPU_BIND": "none", "CUDA_VISIBLE_DEVICES": "1"}, set()),
        (
            {"SLURM_STEP_ID": "0", "SLURM_MEM_PER_NODE": "5"},
            {"SLURM_STEP_ID", "SLURM_MEM_PER_NODE"},
        ),
        ({"SLURM_JOB_ID": "", "SLURM_CPU_BIND": "none"}, {"SLURM_JOB_ID"}),
        (
            {"SBATCH_ACCOUNT": "", "SBATCH_QOS": "x", "SLURM_HINT": ""},
            {"SBATCH_ACCOUNT", "SLURM_HINT"},
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "MASTER_PORT": "1"},
            {"RANK", "WORLD_SIZE", "MASTER_PORT"},
        ),
    ],
)
def test_what_stays_behind(environment: dict[str, str], taken: set[str]):
    assert not_for_jobs(environment) == taken


def test_the_environment_of_the_command_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch):
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with pytest.raises(RuntimeError), outside_of_jobs():
        assert not set(SHELL) & set(os.environ)
        raise RuntimeError
    assert dict(os.environ) == before


@pytest.mark.parametrize("by_hand", [True, False])
def test_batch_scripts_drop_what_sbatch_passed_on(by_hand: bool, tmp_path: Path):
    """slurm/job.sh is read by scripts of this folder too, which sbatch submits without Python."""
    own = {"SLURM_JOB_ID": "8", "SLURM_CPUS_PER_TASK": "4", "SLURM_NTASKS_PER_NODE": "2"}
    environment = {"PATH": os.environ["PATH"]} | SHELL | SITE | own | {"RANK": "0"}
    if not by_hand:
        environment["SUBMITTED_FROM"] = str(tmp_path)
    script = f"RESULTS={shlex.quote(str(tmp_path))}; source slurm/job.sh; trap - EXIT; env"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    left = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: left[name] for name in (*own, *SITE)} == own | SITE

    # What belongs to the job around is gone; what only a submission sets, stays if set by hand.
    prefixes = ("SLURM_CPU_BIND", "SLURM_MEM", "SLURM_STEP")
    always = {name for name in SHELL if name.startswith(prefixes)}
    gone = always | {"SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TRES_PER_TASK", "SRUN_DEBUG", "RANK"}
    if by_hand:
        gone |= {"SLURM_DISTRIBUTION", "SLURM_GPUS_PER_TASK"}
    assert not gone & set(left)


@pytest.mark.parametrize(
    "name",
    ["50%", "%j", "%a %A", "a\nb", "a\\b", "a\tb", "a\rb", os.fsdecode(b"caf\xe9")],
    ids=ascii,
)
def test_folders_that_slurm_would_read_otherwise_are_refused(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="jobs cannot be submitted .*--results") as refusal:
        new_folder(tmp_path / name)
    assert len(str(refusal.value).splitlines()) == 1
    str(refusal.value).encode()


@pytest.mark.parametrize(
    "name",
    ["a b", "it's", 'say "x"', "#1", "$HOME", "a;b&c|d", "[1] {2} *?", "-x", "café", "a'b\"c"],
)
def test_other_folders_come_out_of_the_script_as_they_are(name: str, tmp_path: Path):
    root = tmp_path / name
    require_plain_path(root)
    folder = new_folder(root)
    text = batch_script_text(Site(), folder, 1)
    (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output")]
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--output={folder}/%j_0_log.out"]
    (setup,) = [line for line in text.splitlines() if line.startswith("SUBMITTED_FROM")]
    shown = subprocess.run(
        ["bash", "-c", f'{setup}; printf %s "$SUBMITTED_FROM"'], capture_output=True, text=True
    )
    assert shown.stdout == str(root)


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "rank 0 of 2"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, "rank 3 of 8"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "rank 1 of 4",
        ),
        # a shell of one task, a job without a step, a pod of one process, and half a rank
        (SHELL | {"SLURM_PROCID": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "2"}, None),
    ],
)
def test_a_rank_of_several_is_refused_in_words(environment: dict[str, str], refused: str | None):
    if refused is None:
        require_no_rank(environment)
    else:
        with pytest.raises(ValueError, match=f"^the environment makes this process {refused} "):
            require_no_rank(environment)


def test_workers_inherit_no_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with without_ranks():
        assert not {"RANK", "WORLD_SIZE"} & set(os.environ)
    assert os.environ["RANK"] == "0"
