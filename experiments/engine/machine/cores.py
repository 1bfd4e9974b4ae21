"""How many cores this process may use, and what decides that. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.machine.environment import read_number, read_variable

# Names of limits, as records keep them.
AFFINITY = "affinity"
QUOTA = "cgroup quota"
THREADS = "OMP_NUM_THREADS"
SHARE = "SLURM_CPUS_PER_TASK"

MICROSECONDS = 100_000  # the kernel's default period of a quota


@dataclass(frozen=True)
class Cores:
    """The cores of this process."""

    # Every limit that was found, in cores. A quota may be a fraction.
    limits: dict[str, float]

    @property
    def decided_by(self) -> str:
        """Return the name of the lowest limit."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def number(self) -> int:
        """Return how many cores fit wholly within the lowest limit, and at least 1.

        More threads than a quota has cores would be halted by the kernel in turn.
        """
        return max(1, int(self.limits[self.decided_by]))


def find_cores(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Cores:
    """Return what limits the cores of this process.

    Args:
        root: where `proc` and the mounted cgroups lie.
    """
    limits: dict[str, float] = {AFFINITY: _affinity()}
    quota = _quota(root)
    if quota is not None:
        limits[QUOTA] = quota
    threads = _first_level(environment)
    if threads is not None:
        limits[THREADS] = threads

    # The tasks of a step share a node. A shell outside of any step has the variable too.
    share = read_number(SHARE, environment)
    if share is not None and read_variable("SLURM_STEP_ID", environment):
        limits[SHARE] = share
    return Cores(limits)


def _affinity() -> int:
    """Return how many processors the kernel lets this process run on. Cpusets count here."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_level(environment: Mapping[str, str]) -> int | None:
    """Return the threads of OMP_NUM_THREADS, which may list more for nested regions."""
    value = (read_variable(THREADS, environment) or "").partition(",")[0].strip()
    # OpenMP itself ignores what is not a positive number.
    return int(value) if value.isdecimal() and int(value) > 0 else None


# ---- Quotas of control groups


def _quota(root: Path) -> float | None:
    """Return the lowest quota of this process's groups and their parents, in cores."""
    quotas = [quota for folder in _groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _quota_of(group: Path) -> float | None:
    """Return the quota of one group, or None. Version 2 has one file for it, version 1 two."""
    with suppress(OSError, ValueError, IndexError):
        quota, *period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period[0] if period else MICROSECONDS)
    with suppress(OSError, ValueError):
        limit = int((group / "cpu.cfs_quota_us").read_text())
        length = int((group / "cpu.cfs_period_us").read_text())
        return limit / length if limit > 0 and length > 0 else None
    return None


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that may bear a quota, and of their parents."""
    groups = _memberships(root)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind[0])
        if controller is None or (controller and controller not in kind[2].split(",")):
            continue
        if controller in groups:
            mounted, folder = _unescape(fields[3]), root / _unescape(fields[4]).lstrip("/")
            yield from _up_to(folder, _below(groups[controller], mounted))


def _memberships(root: Path) -> dict[str, str]:
    """Return this process's group by controller. The hierarchy of version 2 has the name ""."""
    groups: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        groups |= dict.fromkeys(controllers.split(","), group)
    return groups


def _below(group: str, mounted: str) -> str:
    """Return the path of a group below the group that is mounted.

    A container may see a mount of its own group under the path that the host knows, or a group
    outside of its name space. In both cases the mount itself is all that it can read.
    """
    prefix = mounted.rstrip("/")
    if ".." in group.split("/") or not f"{group}/".startswith(f"{prefix}/"):
        return ""
    return group[len(prefix) :].strip("/")


def _up_to(folder: Path, below: str) -> Iterator[Path]:
    """Yield the group at a path below a folder, then its parents, and the folder itself last."""
    group = folder / below
    while group != folder:
        yield group
        group = group.parent
    yield folder


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(field: str) -> str:
    """Return a field of mountinfo, in which blanks are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)
