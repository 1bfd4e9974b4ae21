"""What a cluster gives to a job: `slurm/site.toml`, overridden by variables DICO_SLURM_<KEY>.

Nothing here names a run: the same row has the same id on every site.
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

from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.tree import REPOSITORY

PREFIX = "DICO_SLURM_"
SITE_VARIABLE = f"{PREFIX}SITE"
FILE = REPOSITORY / "slurm" / "site.toml"
MIN_WORK_SECONDS = 60  # of a job before it is told to save

# Options of sbatch that the suite sets itself, beside those that are keys of the site file.
RESERVED_OPTIONS = {
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
}


@dataclass(frozen=True)
class Site:
    """Resources of one job. Empty strings are not passed on to sbatch."""

    nodes: int = 1
    # 0 trains on CPUs.
    gpus_per_node: int = 8
    # The scheduler's name of the GPUs, where a node has several kinds.
    gpu_type: str = ""
    # 0: one process per GPU, or one on a CPU node.
    tasks_per_node: int = 0
    cpus_per_task: int = 8
    # Memory per node, for example "400GB".
    mem: str = ""
    # The time limit as [days-]hours:minutes:seconds.
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    # Jobs of one submission that run side by side.
    concurrent: int = 8
    # Seconds before the time limit or a preemption at which a run is told to save; 0: never.
    signal_seconds: int = 180
    # Steps between checkpoints.
    checkpoint_every: int = 2000
    # How many of the newest checkpoints stay.
    keep: int = 2
    # Checkpoints at multiples of this step stay for good; 0: none.
    milestones: int = 0
    # Training samples that a process takes at a time; 0: its whole share of the batch.
    micro_batch: int = 0
    # Images that a process samples at a time.
    sample_batch: int = 250
    # Seconds after which a process that waits for the others gives up.
    collective_seconds: int = 1800
    # Whether each process keeps only its part of the optimiser's state.
    shard_optimizer: bool = False
    # Whether each process keeps only its part of weights, averages, gradients and optimiser.
    fully_shard: bool = False
    # Whether activations inside blocks are computed again in the backward pass, to save memory.
    recompute: bool = False
    # Whether networks are compiled with torch.compile.
    compile: bool = False
    # Whether samplers, and trainings by one process, run their steps as CUDA graphs.
    graphs: bool = False
    # Further options of sbatch.
    options: dict[str, str | int | bool] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """The number of processes per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """The number of processes of a job."""
        return self.nodes * self.tasks

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_node else "cpu"

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def alone(self) -> Site:
        """Return the resources of a timing: one process on one GPU, one job after another."""
        return replace(
            self, nodes=1, tasks_per_node=1, gpus_per_node=min(1, self.gpus_per_node), concurrent=1
        )


MAY_BE_0 = {"gpus_per_node", "tasks_per_node", "signal_seconds", "milestones", "micro_batch"}
TYPES: dict[str, type] = {
    key.name: dict if key.name == "options" else type(key.default) for key in fields(Site)
}


def load_site(label: str, environment: Mapping[str, str] = os.environ) -> Site:
    """Return the resources of a row.

    Later sources override earlier ones: the defaults, the site file, its [rows."label"] and the
    environment. DICO_SLURM_SITE names another site file.

    Raises:
        ValueError: in one line, for an unknown key, a wrong type or an impossible value.
    """
    path, content = _read_site_file(environment)
    rows = content.pop("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f'{path.name}: a row is a table of its own: [rows."{label}"]')

    # Check the keys of all rows, so that a mistake shows before the row is used.
    _check_keys(content, path.name)
    for row, values in rows.items():
        _check_keys(values, f'{path.name}, rows."{row}"')

    site = Site(**content | rows.get(label, {}) | _values_from(environment))
    _check_values(site, path.name)
    return replace(site, options=_enabled_options(site.options))


def warn_of_unknown_rows(
    labels: Iterable[str], environment: Mapping[str, str] = os.environ
) -> None:
    """Warn on standard error of rows in the site file that are not among `labels`."""
    _, content = _read_site_file(environment)
    unknown = sorted(set(content.get("rows", {})) - set(labels))
    if unknown:
        names = ", ".join(map(repr, unknown))
        print(
            f"warning: the site file has resources for {names}, "
            "which no table of this script declares",
            file=sys.stderr,
        )


def _read_site_file(environment: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of the site file. Without a file the content is empty."""
    named = read_variable(SITE_VARIABLE, environment)
    path = Path(named or FILE)
    if named and not path.is_file():
        raise ValueError(f"{SITE_VARIABLE} names {path}, which is not a file")
    if not os.path.lexists(path):
        return path, {}
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(explain(error, "read", path)) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if the site file has an unknown key or a value of a wrong type."""
    _check_names(values, source)
    for name, value in values.items():
        if type(value) is not TYPES[name]:
            raise ValueError(f"{source}: {name} takes a {TYPES[name].__name__}, not {value!r}")


def _check_names(names: Iterable[str], source: str) -> None:
    unknown = sorted(set(names) - set(TYPES))
    if unknown:
        raise ValueError(f"{source}: unknown {', '.join(unknown)}; known: {', '.join(TYPES)}")


def _values_from(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys that variables DICO_SLURM_<KEY> set, in their types."""
    texts = {
        name.removeprefix(PREFIX).lower(): text
        for name in environment
        if name.startswith(PREFIX) and name != SITE_VARIABLE
        if (text := read_variable(name, environment)) is not None
    }
    _check_names(texts, f"environment {PREFIX}*")
    return {name: _parse(name, text) for name, text in texts.items()}


def _parse(name: str, text: str) -> Any:
    """Return the text of a variable as a value of the key's type."""
    kind = TYPES[name]
    if kind is dict:
        return _parse_options(text)

    # bool() would take any text for true.
    if kind is bool:
        flags = {"true": True, "false": False}
        if text.lower() in flags:
            return flags[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass

    raise ValueError(
        f"environment {PREFIX}{name.upper()}: {name} takes a {kind.__name__}, not {text!r}"
    )


def _parse_options(text: str) -> dict[str, str | bool]:
    """Return options as sbatch takes them: key=value pairs or bare keys, with or without --."""
    options: dict[str, str | bool] = {}
    for word in shlex.split(text):
        key, equals, value = word.removeprefix("--").partition("=")
        options[key] = value if equals else True
    return options


def _check_values(site: Site, source: str) -> None:
    """Raise ValueError if values are too small, contradict each other or leave no time to work."""
    for name, kind in TYPES.items():
        least = 0 if name in MAY_BE_0 else 1
        if kind is int and getattr(site, name) < least:
            raise ValueError(f"{source}: {name} is {least} or more, not {getattr(site, name)}")

    if site.tasks_per_node > site.gpus_per_node > 0:
        raise ValueError(
            f"{source}: {site.tasks_per_node} processes per node need as many GPUs, "
            f"not {site.gpus_per_node}; lower tasks_per_node"
        )

    reserved = sorted(name for name in site.options if _is_reserved(name, site.options[name]))
    if reserved:
        raise ValueError(
            f"{source}: options cannot set {', '.join(reserved)}; "
            "use a key of the site file, or leave it to the suite"
        )

    if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", site.time):
        raise ValueError(f"{source}: time is [days-]hours:minutes:seconds, not {site.time!r}")
    if site.seconds < MIN_WORK_SECONDS + site.signal_seconds:
        raise ValueError(
            f"{source}: a time limit of {site.time} leaves less than a minute before the signal, "
            f"which comes {site.signal_seconds} s before the end"
        )


def _is_reserved(name: str, value: str | int | bool) -> bool:
    """Return whether an option of sbatch is set by a key of the site file or by the suite."""
    dashed = name.replace("_", "-")
    keys = {key.replace("_", "-") for key in TYPES}
    asks_for_gpus = name == "gres" and "gpu" in str(value)
    return dashed in RESERVED_OPTIONS | keys or asks_for_gpus


def _enabled_options(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    """Return the options without those that are switched off."""
    return {name: value for name, value in options.items() if value is not False}
