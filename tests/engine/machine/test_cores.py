"""Cores: every limit counts, and the record says which one decided."""

import os
from pathlib import Path

import pytest

from experiments.engine.jobs.pool import available_cores
from experiments.engine.machine.cores import AFFINITY, QUOTA, SHARE, THREADS, find_cores
from experiments.engine.records.store import provenance

V1 = "4 1 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V2 = "5 1 0:30 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"


def machine(
    folder: Path, *, mounts: list[str], groups: list[str], files: dict[str, str] | None = None
) -> Path:
    """Write what the kernel shows of control groups."""
    shown = {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": "\n".join(groups)}
    for name, text in (shown | (files or {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def version_1(group: str, quota: int, period: int = 100_000) -> dict[str, str]:
    folder = f"sys/fs/cgroup/cpu,cpuacct/{group}".rstrip("/")
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


@pytest.fixture(autouse=True)
def _many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "quota"),
    [
        ([V2], ["0::/"], {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ([V2], ["0::/"], {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ([V2], ["0::/a/b"], {"sys/fs/cgroup/a/b/cpu.max": "350000 100000"}, 3.5),
        # the lowest quota of a group and its parents holds
        (
            [V2],
            ["0::/a/b/c"],
            {
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/b/c/cpu.max": "800000 100000",
            },
            2,
        ),
        ([V1], ["4:cpu,cpuacct:/"], version_1("", -1), None),
        ([V1], ["4:cpu,cpuacct:/a"], version_1("a", 600_000), 6),
        ([V1], ["4:cpu,cpuacct:/a/b"], version_1("a", 150_000, 50_000) | version_1("a/b", -1), 3),
        # a container sees its own group under the host's name, mounted
        (
            [V1.replace("{root}", "/docker/0f")],
            ["4:cpu,cpuacct:/docker/0f/x"],
            version_1("", 400_000) | version_1("x", -1),
            4,
        ),
        ([V2], ["0::/../../outside"], {"sys/fs/cgroup/cpu.max": "500000 100000"}, 5),
        # both versions are mounted, and one of them has the controller
        ([V1, V2], ["4:cpu,cpuacct:/a", "0::/a"], version_1("a", 700_000), 7),
        (
            ["4 1 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"],
            ["4:cpuset:/"],
            {"sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "100000"},
            None,
        ),
        (
            ["5 1 0:30 / /sys/fs/my\\040groups rw - cgroup2 none rw"],
            ["0::/"],
            {"sys/fs/my groups/cpu.max": "200000 100000"},
            2,
        ),
        ([], [], {}, None),
    ],
)
def test_quotas_of_control_groups(
    mounts: list[str], groups: list[str], files: dict[str, str], quota: float | None, tmp_path: Path
):
    lines = [line.replace("{root}", "/") for line in mounts]
    cores = find_cores({}, machine(tmp_path, mounts=lines, groups=groups, files=files))
    assert cores.limits.get(QUOTA) == quota
    assert cores.number == (64 if quota is None else max(1, int(quota)))
    assert cores.decided_by == (AFFINITY if quota is None else QUOTA)


@pytest.mark.parametrize(
    ("environment", "number", "decided_by"),
    [
        ({}, 64, AFFINITY),
        ({"OMP_NUM_THREADS": "3"}, 3, THREADS),
        ({"OMP_NUM_THREADS": "4,2"}, 4, THREADS),
        ({"OMP_NUM_THREADS": "128"}, 64, AFFINITY),
        ({"OMP_NUM_THREADS": ""}, 64, AFFINITY),
        ({"OMP_NUM_THREADS": "0"}, 64, AFFINITY),
        ({"OMP_NUM_THREADS": "many"}, 64, AFFINITY),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_ID": "0"}, 8, SHARE),
        ({"SLURM_CPUS_PER_TASK": "8"}, 64, AFFINITY),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_ID": "0", "OMP_NUM_THREADS": "2"}, 2, THREADS),
    ],
)
def test_limits_of_the_environment(
    environment: dict[str, str], number: int, decided_by: str, tmp_path: Path
):
    cores = find_cores(environment, tmp_path)
    assert (cores.number, cores.decided_by) == (number, decided_by)


def test_records_say_how_many_cores_there_are_and_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    about = provenance()
    assert available_cores() == about["cpu_count"] == 1
    assert about["core_limits"]["OMP_NUM_THREADS"] == 5 and about["core_limits"]["affinity"] == 1
