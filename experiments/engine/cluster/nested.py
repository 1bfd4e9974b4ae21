"""What a command passes on to the jobs that it submits: nothing of a job that it runs in itself.

sbatch gives its whole environment to the job. Inside a job this environment holds the cores, the
memory, the tasks and the step of that job, which srun then reads as options of its own. The manual
pages of srun and sbatch list these variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from experiments.engine.machine.environment import read_number, read_variable

# Every job has one of these.
JOB_MARKS = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURMD_NODENAME")

# Whatever a job or its step writes into the environment, by how the names begin.
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_")

# How the commands of Slurm reach their controller: the same inside of a job and outside.
OF_THE_CLIENT = {
    "SLURM_CLUSTERS",
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_DEBUG_FLAGS",
    "SLURM_JWT",
    "SLURM_TIME_FORMAT",
}

# The GPUs of a job, which Slurm names for every kind of GPU.
GPUS = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}

# The ranks of a launcher such as torchrun.
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def not_for_jobs(environment: Mapping[str, str] = os.environ) -> set[str]:
    """Return the names of the variables that a submitted job must not inherit."""
    inside = any(read_variable(name, environment) for name in JOB_MARKS)
    names = {name for name in environment if name in RANKS}
    if inside:
        names |= {name for name in environment if name in GPUS or name.startswith(OF_A_JOB)}

    # sbatch takes an empty variable for an option without a value.
    empty = {
        name
        for name in environment
        if name.startswith(("SBATCH_", *OF_A_JOB)) and read_variable(name, environment) is None
    }
    return (names | empty) - OF_THE_CLIENT


def require_no_rank(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError if the environment makes this process one of several.

    A command that starts processes of its own would start them once for each rank, or wait for
    ranks that nobody starts.
    """
    ranks = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for name, count in ranks:
        rank, total = read_number(name, environment), read_number(count, environment)
        if name == "SLURM_PROCID" and read_variable("SLURM_STEP_ID", environment) is None:
            continue
        if rank is not None and total is not None and total > 1:
            raise ValueError(
                f"the environment makes this process rank {rank} of {total} ({name}, {count}), but "
                "this command starts its own processes; unset them, or start experiments/run.py "
                "with --row under srun or torchrun"
            )


@contextmanager
def without_ranks() -> Iterator[None]:
    """Take the variables of ranks from this process's environment for a while."""
    taken = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Take from this process's environment what submitted jobs must not inherit, for a while."""
    taken = {name: os.environ.pop(name) for name in not_for_jobs()}
    try:
        yield
    finally:
        os.environ.update(taken)
