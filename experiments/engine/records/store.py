"""Records of what ran, published numbers, and where everything lies. Standard library only.

`results/records` is what was run here and `results/reference` what this project committed; a record is one JSON file,
written whole and never changed.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.engine.records.files import locked, written_whole
from experiments.engine.specs.spec import Spec, canonical, kind_of, spec_id

REPOSITORY = Path(__file__).resolve().parents[3]
FORMAT = 1
SCORES = "scores"  # kind of a record of two files, which no spec names


@dataclass(frozen=True)
class Record:
    """One execution of a stage; `values` are empty and `error` says why where its status is 'failed'."""

    id: str
    kind: str
    status: str
    values: dict[str, Any]
    provenance: dict[str, Any]
    utc: str
    spec: dict[str, Any]
    error: str | None = None

    @property
    def name(self) -> str:
        """Folder and beginning of the file's name, which a suffix of the file makes unique."""
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
            record = _read(path)
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
                f"cannot write results ({error.strerror}); "
                "free space or choose another folder with --results"
            ) from None

    def append(
        self,
        spec: Spec,
        status: str,
        values: dict[str, Any],
        provenance: dict[str, Any],
        error: str | None = None,
    ) -> Record:
        """Write a new record; nothing is ever overwritten."""
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
        write_record(
            self.here.folder / record.kind / f"{record.id}-{utc}-{uuid.uuid4().hex[:6]}.json",
            record,
        )
        self.here.refresh()
        return record

    def run_dir(self, spec: Spec) -> Path:
        """Folder of a stage's checkpoints, logs and samples."""
        return self.root / "runs" / spec_id(spec)

    def lock(self, spec: Spec) -> AbstractContextManager[None]:
        """Held while a stage runs; a second process waits, then finds the record."""
        return locked(self.run_dir(spec) / "lock")

    def refresh(self) -> None:
        """Forget what was read, so that another process's new records are seen."""
        self.here.refresh()
        self.reference.refresh()

    def published(self, name: str, key: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """Rows of a published table by its key columns, those that are filled, joined with blanks. Every row carries its `source`."""
        with open(REPOSITORY / "results" / "published" / name, newline="") as file:
            return {
                " ".join(row[column] for column in key if row[column]): row
                for row in csv.DictReader(file)
            }


def timestamp(seconds: float | None = None) -> str:
    """A time (unix seconds; None: now) as records bear it, in an order that is the alphabet's."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def write_record(path: Path, record: Record) -> None:
    with written_whole(path) as file:
        file.write(
            json.dumps({"format": FORMAT} | vars(record), indent=1, allow_nan=True).encode() + b"\n"
        )


def read_record(path: Path) -> Record:
    """The record in a file, wherever it lies; ValueError in one line if it is none of this suite."""
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        record = Record(**fields)
        if len(record.id) != 16:
            raise ValueError("its id has not 16 digits")
        if not all(
            isinstance(part, dict) for part in (record.values, record.provenance, record.spec)
        ):
            raise ValueError("values, provenance and spec are not all objects")
        return record
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{Path(*path.parts[-2:])}: no record of this suite ({type(error).__name__}: {error})"
        ) from None


def _read(path: Path) -> Record | None:
    try:
        record = read_record(path)
        if record.kind != path.parent.name or not path.name.startswith(f"{record.id}-"):
            raise ValueError(
                f"{path.parent.name}/{path.name}: no record of this suite (ValueError: its name does not fit its content)"
            )
        return record
    except ValueError as error:
        print(f"warning: skipped {error}", file=sys.stderr)
        return None


def provenance() -> dict[str, Any]:
    """What produced a record, as far as the standard library knows; None where it cannot tell."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD")
        or os.environ.get("DICO_COMMIT"),  # a copied tree may have no history
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpu_count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
    }


@functools.cache
def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
