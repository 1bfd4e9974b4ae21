"""Records of what ran, published numbers, and where everything lies. Standard library only.

`results/records` holds what was run here, and `results/reference` what this project committed. A
record is one JSON file, written whole and never changed.
"""

from __future__ import annotations

import csv
import functools
import json
import platform
import sys
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.engine.machine.cores import find_cores
from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.system_errors import explain
from experiments.engine.records.files import locked, written_whole
from experiments.engine.records.tree import REPOSITORY, tree_commit, tree_digest
from experiments.engine.specs.spec import Spec, canonical, kind_of, spec_id

FORMAT = 1
SCORES = "scores"  # kind of the records that evaluate.py writes, which no spec names
ID_DIGITS = 16


@dataclass(frozen=True)
class Record:
    """One execution of a stage. The fields are those of the JSON file."""

    # The id of the spec, and its kind.
    id: str
    kind: str
    # 'done' or 'failed'.
    status: str
    # What was measured; empty if the stage failed.
    values: dict[str, Any]
    # What produced the record: code, machine, time.
    provenance: dict[str, Any]
    # When the record was written, as `timestamp` gives it.
    utc: str
    # Full canonical form of the spec.
    spec: dict[str, Any]
    # Why the stage failed.
    error: str | None = None

    @property
    def name(self) -> str:
        """Return folder and beginning of the file's name, which a suffix makes unique."""
        return f"{self.kind}/{self.id}-{self.utc}"


class RecordFolder:
    """The records in one folder, read when they are first asked for and then kept.

    The folder holds one JSON file per record, under `<kind>/<id>-<utc>-<suffix>.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_id: dict[str, list[Record]] | None = None

    def by_id(self) -> dict[str, list[Record]]:
        """Return the intact records by id, oldest first; report the other files and skip them."""
        if self._by_id is None:
            self._by_id = self._read()
        return self._by_id

    def all(self) -> list[Record]:
        """Return the intact records, those of one id after each other."""
        return [record for records in self.by_id().values() for record in records]

    def latest(self, spec: Spec, status: str = "done") -> Record | None:
        """Return the newest record of a stage with this status, or None."""
        records = self.by_id().get(spec_id(spec), [])
        matching = [record for record in records if record.status == status]
        return matching[-1] if matching else None

    def refresh(self) -> None:
        """Forget what was read, so that new records are seen."""
        self._by_id = None

    def paths(self) -> list[Path]:
        """Return the files of records, oldest first."""
        return sorted(self.folder.glob("*/*.json"), key=lambda path: path.name.partition("-")[2])

    def _read(self) -> dict[str, list[Record]]:
        records: dict[str, list[Record]] = {}
        for path in self.paths():
            record = _read_own_record(path)
            if record is not None:
                records.setdefault(record.id, []).append(record)
        return records


class Store:
    """A results folder, and the reference records that its runs are compared with.

    Attributes:
        root: the results folder.
        here: the records of what ran here, in `root/records`.
        reference: the committed records; by default those in `root/reference`.
    """

    here: RecordFolder
    reference: RecordFolder

    def __init__(self, root: Path | None = None, reference: Path | None = None) -> None:
        self.root = Path(root) if root else REPOSITORY / "results"
        self.here = RecordFolder(self.root / "records")
        self.reference = RecordFolder(reference or self.root / "reference")

    def check_writable(self) -> None:
        """Write and remove a probe, so that a read-only or full folder is known before any work.

        Raises:
            ValueError: if the folder cannot be written.
        """
        try:
            probe = self.here.folder / f".probe-{uuid.uuid4().hex}"
            with written_whole(probe) as file:
                file.write(b"\0" * 65536)
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write results to {self.root}: {explain(error)}; "
                "or choose another folder with --results"
            ) from None

    def append(
        self,
        spec: Spec,
        status: str,
        values: dict[str, Any],
        provenance: dict[str, Any],
        error: str | None = None,
    ) -> Record:
        """Write a new record of what ran here; nothing is ever overwritten."""
        utc = timestamp()
        record = Record(
            spec_id(spec),
            kind_of(spec),
            status,
            values,
            provenance,
            utc,
            canonical(spec, full=True),
            error,
        )

        # The name has a random part, since two machines may finish in the same second.
        name = f"{record.id}-{utc}-{uuid.uuid4().hex[:6]}.json"
        write_record(self.here.folder / record.kind / name, record)
        self.here.refresh()
        return record

    def run_dir(self, spec: Spec) -> Path:
        """Return the folder of a stage's checkpoints, logs and samples."""
        return self.root / "runs" / spec_id(spec)

    def lock(self, spec: Spec) -> AbstractContextManager[None]:
        """Hold a lock while a stage runs. A second process waits, then finds the record."""
        return locked(self.run_dir(spec) / "lock")

    def refresh(self) -> None:
        """Forget what was read, so that another process's new records are seen."""
        self.here.refresh()
        self.reference.refresh()

    def published(self, name: str, key: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """Return the rows of a published table.

        Args:
            name: file under results/published.
            key: columns that name a row: those that are filled, joined with blanks.
        """
        with open(
            REPOSITORY / "results" / "published" / name, newline="", encoding="utf-8"
        ) as file:
            rows = list(csv.DictReader(file))
        return {" ".join(row[column] for column in key if row[column]): row for row in rows}


def timestamp(seconds: float | None = None) -> str:
    """Return a time as records bear it, which sorts as text.

    Args:
        seconds: unix time; None: now.
    """
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def write_record(path: Path, record: Record) -> None:
    """Write a record to a file."""
    text = json.dumps({"format": FORMAT} | vars(record), indent=1, allow_nan=True)
    with written_whole(path) as file:
        file.write(text.encode() + b"\n")


def read_record(path: Path) -> Record:
    """Return the record in a file, wherever it lies.

    Raises:
        ValueError: if the file is no record of this suite.
    """
    return _read_named(path, path)


def _read_named(path: Path, name: Path) -> Record:
    """Return the record in a file that messages call by a name."""
    try:
        return _parse_record(path.read_bytes())
    except OSError as error:
        raise ValueError(explain(error, "read", name)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}: no record of this suite ({type(error).__name__}: {error})"
        ) from None


def _parse_record(content: bytes) -> Record:
    fields = json.loads(content)
    if fields.pop("format") != FORMAT:
        raise ValueError("another format")
    record = Record(**fields)
    if len(record.id) != ID_DIGITS:
        raise ValueError(f"its id has not {ID_DIGITS} digits")
    objects = (record.values, record.provenance, record.spec)
    if not all(isinstance(part, dict) for part in objects):
        raise ValueError("values, provenance and spec are not all objects")
    return record


def _read_own_record(path: Path) -> Record | None:
    """Return the record in a file whose name fits it; else print a warning and return None."""
    # Messages name the file within its folder of records.
    name = Path(*path.parts[-2:])
    try:
        record = _read_named(path, name)
        if record.kind != path.parent.name or not path.name.startswith(f"{record.id}-"):
            raise ValueError(
                f"{name}: no record of this suite (ValueError: its name does not fit its content)"
            )
        return record
    except ValueError as error:
        print(f"warning: skipped {error}", file=sys.stderr)
        return None


def provenance() -> dict[str, Any]:
    """Return what produces a record, as far as the standard library knows.

    A value is None where it cannot be told.
    """
    commit = tree_commit()
    cores = find_cores()
    return {
        "commit": commit.hash,
        "dirty": commit.dirty,
        "code": tree_digest(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_count": cores.number,
        "cores_decided_by": cores.decided_by,
        "core_limits": cores.limits,
        "job_id": read_variable("SLURM_JOB_ID"),
    }


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
