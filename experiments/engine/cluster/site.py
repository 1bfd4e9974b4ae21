"""What a cluster gives to a job: `slurm/site.toml`, overridden by environment variables DICO_SLURM_<KEY>. No torch.

None of it names a run: the same row under another site has the same id.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from experiments.engine.records.store import REPOSITORY

PREFIX = "DICO_SLURM_"
FILE = REPOSITORY / "slurm" / "site.toml"
OURS = {
    "array",
    "error",
    "gpus",
    "gpus-per-task",
    "job-name",
    "no-requeue",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "wrap",
}  # sbatch's, beside the site's own keys


@dataclass(frozen=True)
class Site:
    """Resources of one job. `gpu_type` is the scheduler's name of the GPUs, where a node has several kinds; `tasks_per_node` 0 is one a GPU, or one where there are no GPUs; empty words are not passed on.

    `time` is [days-]hours:minutes:seconds; `signal_seconds` is how long before that limit (or a preemption) a run is told
    to save, 0 for not at all; `concurrent` jobs of a submission run side by side. `options` are further options of sbatch. The
    others are the trainer's (`train.Resources`): steps between checkpoints, how many of the newest are kept and which for
    good (multiples of `milestones`; 0: none), samples at a time on each process in training (`micro_batch`; 0: all of its
    share) and in sampling, seconds after which a collective operation gives up, whether each process keeps only its
    part of the optimiser's state, whether networks are compiled, and whether samplers, and trainings by one process, launch them as CUDA graphs.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_type: str = ""
    tasks_per_node: int = 0
    cpus_per_task: int = 8
    mem: str = ""
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    concurrent: int = 8
    signal_seconds: int = 180
    checkpoint_every: int = 2000
    keep: int = 2
    milestones: int = 0
    micro_batch: int = 0
    sample_batch: int = 250
    collective_seconds: int = 1800
    shard_optimizer: bool = False
    compile: bool = False
    graphs: bool = False
    options: dict[str, str | int | bool] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_node else "cpu"

    @property
    def seconds(self) -> int:
        """The time limit."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def alone(self) -> Site:
        """One process on one GPU, one job after another: what a timing takes."""
        return replace(
            self, nodes=1, tasks_per_node=1, gpus_per_node=min(1, self.gpus_per_node), concurrent=1
        )


MAY_BE_0 = {"gpus_per_node", "tasks_per_node", "signal_seconds", "milestones", "micro_batch"}
KNOWN = {f.name: type(f.default) if f.name != "options" else dict for f in fields(Site)}


def load_site(label: str, environment: Mapping[str, str] = os.environ) -> Site:
    """The resources of a row: defaults, then the file's, then its [rows."label"], then the environment's.

    DICO_SLURM_SITE names another file. Raises ValueError in one line for what is unknown or of the wrong type.
    """
    path, content = _content(environment)
    rows = content.pop("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f'{path.name}: rows are tables, one a row: [rows."{label}"]')
    given = {
        name.removeprefix(PREFIX).lower(): text
        for name, text in environment.items()
        if name.startswith(PREFIX) and name != f"{PREFIX}SITE"
    }
    for row, values in rows.items():
        _require_known(values, f'{path.name}, rows."{row}"')
    _require_known(content, path.name)
    _require_known(given, f"environment {PREFIX}*")
    site = Site(
        **(
            content
            | rows.get(label, {})
            | {name: _parse(name, text) for name, text in given.items()}
        )
    )
    for name in (name for name, kind in KNOWN.items() if kind is int):
        if (value := getattr(site, name)) < (least := 0 if name in MAY_BE_0 else 1):
            raise ValueError(f"{path.name}: {name} is {least} or more, not {value}")
    if site.tasks_per_node > site.gpus_per_node > 0:
        raise ValueError(
            f"{path.name}: {site.tasks_per_node} processes a node need as many GPUs, not {site.gpus_per_node}; lower tasks_per_node"
        )
    ours = OURS | {key.replace("_", "-") for key in KNOWN}
    if taken := sorted(
        name
        for name, value in site.options.items()
        if name.replace("_", "-") in ours or name == "gres" and "gpu" in str(value)
    ):
        raise ValueError(
            f"{path.name}: options cannot set {', '.join(taken)}; a key of the site file sets it, or the suite does"
        )
    site = replace(
        site, options={name: value for name, value in site.options.items() if value is not False}
    )
    if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", site.time):
        raise ValueError(f"{path.name}: time is [days-]hours:minutes:seconds, not {site.time!r}")
    if site.seconds < 60 + site.signal_seconds:
        raise ValueError(
            f"{path.name}: a time limit of {site.time} leaves less than a minute before the signal, {site.signal_seconds} s before its end"
        )
    return site


def _content(environment: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """The site file and what it says, nothing where there is none."""
    path = Path(environment.get(f"{PREFIX}SITE", FILE))
    try:
        content = tomllib.loads(path.read_text()) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if not path.is_file() and f"{PREFIX}SITE" in environment:
        raise ValueError(f"{PREFIX}SITE names {path}, which is no file")
    return path, content


def warn_of_unknown_rows(
    labels: Iterable[str], environment: Mapping[str, str] = os.environ
) -> None:
    """One line on standard error where the site file has resources for rows that are not among `labels`; a run goes on."""
    _, content = _content(environment)
    if unknown := sorted(set(content.get("rows", {})) - set(labels)):
        print(
            f"warning: the site file has resources for {', '.join(map(repr, unknown))}, which no table of this script declares",
            file=sys.stderr,
        )


def _require_known(values: dict[str, Any], where: str) -> None:
    if unknown := sorted(set(values) - set(KNOWN)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(KNOWN)}")
    if not where.startswith("environment"):
        for name, value in values.items():
            if type(value) is not KNOWN[name]:
                raise ValueError(f"{where}: {name} is a {KNOWN[name].__name__}, not {value!r}")


def _parse(name: str, text: str) -> Any:
    kind = KNOWN[name]
    if kind is dict:  # key=value pairs, or bare keys, as sbatch takes them
        pairs = (part.removeprefix("--").partition("=") for part in shlex.split(text))
        return {key: value if equals else True for key, equals, value in pairs}
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return kind(text) if kind is not bool else int("")
    except ValueError:
        raise ValueError(
            f"environment {PREFIX}{name.upper()}: {name} is a {kind.__name__}, not {text!r}"
        ) from None
