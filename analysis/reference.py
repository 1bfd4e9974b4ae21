"""The committed records and the published numbers, looked through before use. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from analysis.published import read_published
from experiments.declared.protocols import CAPTIONED, PROTOCOLS
from experiments.engine.records.manifest import has_unknown_features
from experiments.engine.records.score_names import SCORES
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Spec

# Values that must be numbers or absent: every score, its error and its deviation.
SCORE_VALUES = {
    key for score in SCORES.values() for key in (score.key, score.error, score.deviation) if key
}


@dataclass(frozen=True)
class Problem:
    """A part of the tables or the page that could not be built or was left out, and why."""

    # such as a table, a figure or a record
    part: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part}: {self.reason}"


class ScreenedFolder(RecordFolder):
    """A folder of which only records are seen that a table may use.

    Attributes:
        problems: what was left out, and why.
        files: by a record's name, its file under the folder.
    """

    def __init__(self, folder: Path, problems: list[Problem]) -> None:
        super().__init__(folder)
        self.problems = problems
        self.files: dict[str, str] = {}
        self._listeners: list[dict[str, Record]] = []

    def latest(self, spec: Spec, status: str = "done") -> Record | None:
        """Return the newest record of a stage, and tell who listens."""
        record = super().latest(spec, status)
        if record is not None:
            self.note([record])
        return record

    def note(self, records: Sequence[Record]) -> None:
        """Tell who listens that these records are looked up."""
        for noted in self._listeners:
            noted.update((record.name, record) for record in records)

    @contextmanager
    def noting(self) -> Iterator[dict[str, Record]]:
        """The records that are looked up meanwhile, by name."""
        noted: dict[str, Record] = {}
        self._listeners.append(noted)
        try:
            yield noted
        finally:
            self._listeners.pop()

    def _read(self) -> dict[str, list[Record]]:
        records = super()._read()
        names = {record.name for group in records.values() for record in group}

        # a file that was not read as a record is a problem
        for path in sorted(self.folder.glob("*/*.json")):
            name = f"{path.parent.name}/{path.stem.rpartition('-')[0]}"
            self.files[name] = f"{path.parent.name}/{path.name}"
            if name not in names:
                self.problems.append(
                    Problem(
                        f"record {path.parent.name}/{path.name}",
                        "not of this version of the suite, or damaged; left out",
                    )
                )

        # so is a record whose numbers cannot stand in a table
        kept: dict[str, list[Record]] = {}
        for spec_id, group in records.items():
            usable = [record for record in group if self._is_usable(record)]
            if usable:
                kept[spec_id] = usable
        return kept

    def _is_usable(self, record: Record) -> bool:
        problem = problem_with(record)
        if problem:
            self.problems.append(Problem(f"record {record.name}", f"{problem}; left out"))
        return not problem


class ReferenceStore(Store):
    """A store of which only records are seen that a table may use.

    Published numbers are checked as well. `noting` hears which committed records are looked up,
    so that every figure and paragraph can name its own.

    Attributes:
        problems: the records that were left out, and why.
    """

    reference: ScreenedFolder

    def __init__(self, root: Path | None = None, published: Path | None = None) -> None:
        super().__init__(root)
        self.problems: list[Problem] = []
        self.here = ScreenedFolder(self.here.folder, self.problems)
        self.reference = ScreenedFolder(self.reference.folder, self.problems)
        self.published_folder = published or REPOSITORY / "results" / "published"
        self._rows: dict[str, list[dict[str, str]]] = {}

    def note(self, records: Sequence[Record]) -> None:
        """Tell who listens that these committed records are looked up."""
        self.reference.note(records)

    @contextmanager
    def noting(self) -> Iterator[dict[str, Record]]:
        """The committed records that are looked up meanwhile, by name."""
        with self.reference.noting() as noted:
            yield noted

    def file_of(self, record: Record) -> str:
        """A committed record's file under the reference folder."""
        self.reference.by_id()
        return self.reference.files[record.name]

    def all_records(self) -> list[Record]:
        """All committed records."""
        return self.reference.all()

    def rows(self, name: str) -> list[dict[str, str]]:
        """A published table's rows.

        Raises:
            ValueError: if a column is missing, a row has no source, or a number is none.
        """
        if name not in self._rows:
            self._rows[name] = read_published(self.published_folder, name)
        return self._rows[name]

    def published(self, name: str, key: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """A published table's rows by their key columns, joined with blanks."""
        return {
            " ".join(row[column] for column in key if row[column]): row for row in self.rows(name)
        }


def problem_with(record: Record) -> str:
    """Why a finished record may not enter a table, or ''."""
    if record.status != "done":
        return ""
    bad = [name for name, value in record.values.items() if not _is_finite(value)]
    if not bad and record.kind == "evaluate":
        bad = [
            name
            for name, value in record.values.items()
            if name in SCORE_VALUES and not isinstance(value, int | float | None)
        ]
    if bad:
        return f"{', '.join(bad)} is no number"
    if has_unknown_features(record.values):
        return "scored by unknown Inception weights, which compare with no other scores"
    return _protocol_problem(record) if record.kind == "evaluate" else ""


def _protocol_problem(record: Record) -> str:
    """Whether an evaluation's spec is incomplete or of no declared protocol, in words, or ''."""
    missing = {"train", "num", "features", "labels"} - set(record.spec)
    if missing:
        return f"its spec lacks {', '.join(sorted(missing))}"

    # data in pixels are of the same protocol as their latents
    training = record.spec.get("upsampler") or record.spec["train"]
    data = training["data"]["name"].removesuffix("_pixels")
    measured = (data, *(record.spec[name] for name in ("num", "features", "labels")))
    declared = [
        (protocol.data.name, protocol.num, protocol.features, protocol.labels)
        for protocol in (PROTOCOLS | CAPTIONED).values()
    ]
    if measured not in declared:
        return f"scores of no declared protocol ({', '.join(map(str, measured))})"
    return ""


def _is_finite(value: object) -> bool:
    """Whether every float in a value is finite, those in lists and dictionaries too."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
