"""What tables and figures are made from: the committed records and the published numbers, looked through before use. No torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiments import ablation, main_results
from experiments.declared.protocols import DIGITS, PROTOCOLS
from experiments.engine.records.comparison import clashes
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone, Spec, Stage, canonical
from experiments.engine.specs.stages import Protocol, evaluate_stage

TRAINED = {
    number: table
    for number, table in sorted((ablation.TABLES | main_results.TABLES).items())
    if not table.counts_only
}
SCORES = "fid is precision recall"
SCORED = (
    "fd",
    "fid",
    "sfid",
    "is_",
    "precision_",
    "recall_",
    "density",
    "coverage",
    "kid",
    "mind",
    "agreement",
)  # how the names of our scores begin
COLUMNS = {  # of every published file: columns of words, columns of numbers
    "table1.csv": ("group model cfg", f"train_steps gflops throughput_img_s {SCORES}"),
    "table2.csv": ("group model cfg", f"train_steps gflops throughput_img_s {SCORES}"),
    "table3.csv": ("model structure", f"params_m gflops throughput_img_s {SCORES}"),
    "table4.csv": ("group variant", f"params_m gflops throughput_img_s {SCORES}"),
    "table5.csv": ("model", "params_m gflops gflops_ratio_to_dit"),
    "table6.csv": ("model optimizer lr_schedule precision gpus augmentation vae sampler", "resolution beta1 beta2 weight_decay peak_lr warmup_steps "
                   "global_batch_size training_steps training_hours sampling_steps"),
    "table7.csv": ("model", f"gflops train_steps sfid {SCORES}"),
    "table8.csv": ("type model params", f"gflops {SCORES}"),
    "table9.csv": ("type model params", f"gflops {SCORES}"),
    "claims.csv": ("id claim metric subject baseline relation value", ""),
    "dico_logs.csv": ("model", "first_step last_step lines loss loss_sd hours"),
}  # fmt: skip
POSITIVE = {
    "gflops",
    "throughput_img_s",
    "params_m",
    "gflops_ratio_to_dit",
    "lines",
    "sfid",
    *SCORES.split(),
}  # numbers that others are divided by
PAPER_BATCH = 64  # of its throughput


class ScreenedFolder(RecordFolder):
    """A folder of records without those that no table may use.

    `problems` collects a sentence on every record that was left out; `note` hears which records are
    looked up.
    """

    def __init__(
        self,
        folder: Path,
        problems: list[str],
        note: Callable[[Sequence[Record]], None] = lambda records: None,
    ) -> None:
        super().__init__(folder)
        self._problems = problems
        self._note = note
        self._files: dict[str, str] = {}

    def latest(self, spec: Spec, status: str = "done") -> Record | None:
        record = super().latest(spec, status)
        self._note([record] if record else [])
        return record

    def file_of(self, record: Record) -> str:
        """Return a record's file, relative to this folder."""
        self.by_id()
        return self._files[record.name]

    def _read(self) -> dict[str, list[Record]]:
        found = super()._read()

        # Report the files that are no records.
        read = {record.name for records in found.values() for record in records}
        for path in sorted(self.folder.glob("*/*.json")):
            name = f"{path.parent.name}/{path.stem.rpartition('-')[0]}"
            self._files[name] = f"{path.parent.name}/{path.name}"
            if name not in read:
                self._problems.append(
                    f"record {path.parent.name}/{path.name}: "
                    "not of this version of the suite, or damaged; left out"
                )

        # Leave out the records that no table may use.
        screened = {
            name: [record for record in records if self._fits(record)]
            for name, records in found.items()
        }
        return {name: records for name, records in screened.items() if records}

    def _fits(self, record: Record) -> bool:
        reason = _unfit(record)
        if reason:
            self._problems.append(f"record {record.name}: {reason}; left out")
        return not reason


class ReferenceStore(Store):
    """A store whose reference holds only records that a table may use; `problems` says in words what was left out and why.

    `noting` hears which records are looked up, so that every figure and paragraph can name its own.
    """

    def __init__(self, root: Path | None = None, published: Path | None = None) -> None:
        super().__init__(root)
        self.published_folder = published or REPOSITORY / "results" / "published"
        self.problems: list[str] = []
        self._rows: dict[str, list[dict[str, str]]] = {}
        self._notes: list[dict[str, Record]] = []
        self.here = ScreenedFolder(self.here.folder, self.problems)
        self.reference: ScreenedFolder = ScreenedFolder(
            self.reference.folder, self.problems, self.note
        )

    def note(self, records: Sequence[Record]) -> None:
        for noted in self._notes:
            noted.update((record.name, record) for record in records)

    @contextmanager
    def noting(self) -> Iterator[dict[str, Record]]:
        """The committed records that are looked up meanwhile, by name."""
        noted: dict[str, Record] = {}
        self._notes.append(noted)
        try:
            yield noted
        finally:
            self._notes.pop()

    def file_of(self, record: Record) -> str:
        """A committed record's file under the reference folder."""
        return self.reference.file_of(record)

    def all_records(self) -> list[Record]:
        return self.reference.all()

    def rows(self, name: str) -> list[dict[str, str]]:
        """A published table's rows. ValueError where a column is missing, a row has no source or a number is none."""
        if name not in self._rows:
            self._rows[name] = self._checked(name)
        return self._rows[name]

    def _checked(self, name: str) -> list[dict[str, str]]:
        path = self.published_folder / name
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise ValueError(
                f"published data {name}: {error.strerror}; restore it with git checkout results/published"
            ) from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"published data {name}: no CSV in UTF-8 ({error}); restore it with git checkout results/published"
            ) from None
        if not rows:
            raise ValueError(f"published data {name}: holds no rows")
        words, numbers = (columns.split() for columns in COLUMNS[name])
        if missing := [column for column in [*words, *numbers, "source"] if column not in rows[0]]:
            raise ValueError(
                f"published data {name}: no column {', '.join(missing)}; found: {', '.join(rows[0])}"
            )
        for line, row in enumerate(rows, 2):
            if not row["source"]:
                raise ValueError(f"published data {name}, line {line}: no source")
            for column in numbers:
                if row[column] and not _finite(row[column]):
                    raise ValueError(
                        f"published data {name}, line {line}: {column} is {row[column]!r}, not a number; leave a gap empty"
                    )
                if row[column] and column in POSITIVE and float(row[column]) <= 0:
                    raise ValueError(
                        f"published data {name}, line {line}: {column} is {row[column]}, which is not above 0; leave a gap empty"
                    )
        return rows

    def published(self, name: str, key: tuple[str, ...]) -> dict[str, dict[str, str]]:
        return {
            " ".join(filter(None, (row[column] for column in key))): row for row in self.rows(name)
        }


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _all_finite(value: object) -> bool:
    """Whether every float in it is, lists and dictionaries within too."""
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _unfit(record: Record) -> str:
    """Why a done record may not enter a table, or ''."""
    if record.status != "done":
        return ""
    if bad := [name for name, value in record.values.items() if not _all_finite(value)]:
        return f"{', '.join(bad)} is no number"
    if record.kind == "evaluate":
        if bad := [
            name
            for name, value in record.values.items()
            if name.startswith(SCORED) and not isinstance(value, int | float | None)
        ]:
            return f"{', '.join(bad)} is no number"
        if absent := {"train", "num", "features", "labels"} - set(record.spec):
            return f"its spec lacks {', '.join(sorted(absent))}"
        data = (record.spec.get("upsampler") or record.spec["train"])["data"]["name"].removesuffix(
            "_pixels"
        )
        scored = (data, *(record.spec[name] for name in ("num", "features", "labels")))
        if scored not in [(p.data.name, p.num, p.features, p.labels) for p in PROTOCOLS.values()]:
            return f"scores of no declared protocol ({', '.join(map(str, scored))})"
    return ""


def trained_rows(table: Table) -> dict[str, Row]:
    """Rows of a table that have a network to train, by label."""
    return {row.label: row for row in (*table.rows, *table.outside) if row.backbone}


def trained_row(table: Table, label: str) -> Row:
    """ValueError for a label that is unknown or is one of published numbers alone."""
    row = table.row(label)
    if row.backbone is None:
        raise ValueError(
            f"row {label!r} of table {table.number} holds published numbers only: no network is known"
        )
    return row


def train_command(table: Table, labels: Sequence[str], protocol: Protocol, seed: int) -> str:
    """What trains these rows here."""
    script, named = (
        "main_results" if table.number in main_results.TABLES else "ablation",
        " ".join(f'"{label}"' for label in labels),
    )
    return f"python experiments/{script}.py --table {table.number} --rows {named} --protocol {protocol.name} --seeds {seed}"


def reference_seeds(table: Table, store: Store) -> list[int]:
    """Training seeds that the committed records hold of a table's first row; seed 0 where there are none."""
    return [
        seed
        for seed in REFERENCE_SEEDS
        if store.reference.latest(evaluate_stage(table.baseline, DIGITS, seed))
    ] or [0]


def scores_of(row: Row, protocol: Protocol, store: Store) -> list[Record]:
    """The committed scores of a row under a protocol, one record a training seed."""
    return [
        record
        for seed in REFERENCE_SEEDS
        if (record := store.reference.latest(evaluate_stage(row, protocol, seed)))
    ]


def digits_scores(row: Row, store: Store) -> list[Record]:
    return scores_of(row, DIGITS, store)


def rankable(
    rows: Sequence[Row], protocol: Protocol, store: Store
) -> tuple[list[list[Record]], dict[str, list[str]]]:
    """Every row's scores, none where they are known to be of another protocol than the first row's; and, by label, the fields that differ."""
    scores = [scores_of(row, protocol, store) for row in rows]
    first = next(filter(None, scores), [])
    other = {
        row.label: fields
        for row, found in zip(rows, scores, strict=True)
        if (fields := clashes(found, first))
    }
    return [
        [] if row.label in other else found for row, found in zip(rows, scores, strict=True)
    ], other


def latest(stages: Sequence[Stage], store: Store) -> Iterator[Record]:
    """The committed records of these stages, without the gaps."""
    return (record for stage in stages if (record := store.reference.latest(stage)))


def gpu_timings(backbone: Backbone, size: int, store: ReferenceStore) -> list[Record]:
    """Committed GPU timings of a network's forward pass at a latent size, in every numeric mode that was recorded, oldest first."""
    wanted = canonical(backbone, full=True)
    found = [
        record
        for record in store.all_records()
        if record.kind == "timing" and record.status == "done" and record.spec["device"] == "cuda" and record.spec.get("what", "forward") == "forward"
        and (record.spec["backbone"], record.spec["size"]) == (wanted, size) and not record.spec.get("compile") and not record.spec.get("graphs")
    ]  # fmt: skip
    store.note(found)
    return found


def runtime_of(record: Record) -> tuple[float, float]:
    """Milliseconds an image of a timing, and half their interquartile range."""
    rate = record.values["images_per_s"]
    return 1000 / rate, 1000 / rate * record.values.get("images_per_s_spread", math.nan) / rate


def numeric_mode(record: Record) -> str:
    """Precision and TF32 flags in force, as a label that tells attention written out from whatever kernel was chosen."""
    flags = record.provenance["precision_flags"]
    on = [name.removesuffix("_tf32") for name in sorted(flags) if flags[name]]
    written_out = ", attention unfused" * (record.spec["kernels"].get("attention") == "reference")
    return f"{record.spec['precision']}, TF32 {' and '.join(on) if on else 'off'}{written_out}"


def at_one_batch(
    timings: Mapping[str, Sequence[Record]],
) -> dict[tuple[str, str, int], dict[str, Record]]:
    """The newest timing of each network by numeric mode, device and the one batch up to the paper's at which most of them were timed, the largest of several."""
    found: dict[tuple[str, str], dict[int, dict[str, Record]]] = {}
    for name, records in timings.items():
        for record in records:
            if record.spec["batch"] <= PAPER_BATCH:
                found.setdefault(
                    (numeric_mode(record), record.provenance["device"]), {}
                ).setdefault(record.spec["batch"], {})[name] = record
    best = {
        mode: max(batches, key=lambda batch: (len(batches[batch]), batch))
        for mode, batches in found.items()
    }
    return {(*mode, batch): found[mode][batch] for mode, batch in best.items()}
