"""From declared rows and records to a sheet of cells: paper, reference and this machine side by side. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from experiments.engine.caveats import evaluations, run_caveats, timing_caveats
from experiments.engine.manifest import clashes, machines, not_recorded, score_name
from experiments.engine.rows import Row, Table
from experiments.engine.spec import Stage, spec_id
from experiments.engine.spread import LEVEL, agree, made_by_few, pooled, reach, scaled
from experiments.engine.store import Record, Store
from experiments.protocols import Protocol, cost_stages, evaluate_stage, timed_rows, timing_stage

SCORES = {
    "digits": {
        "fd_digits": "lower",
        "is_digits": "higher",
        "precision_digits": "higher",
        "recall_digits": "higher",
        "agreement": "higher",
    },
    "cifar_classifier": {
        "fd_cifar_classifier": "lower",
        "is_cifar_classifier": "higher",
        "precision_cifar_classifier": "higher",
        "recall_cifar_classifier": "higher",
        "agreement": "higher",
    },
    "inception": {
        "fid": "lower",
        "fid_corrected": "lower",
        "is": "higher",
        "precision": "higher",
        "recall": "higher",
    },
}
PAPER_SCORES = {"fid": "FID", "is": "IS", "precision": "P", "recall": "R"}
PAPER_CONDITIONS = {"steps": "train_steps", "guided": "cfg"}
REFERENCE_SEEDS = range(10)


@dataclass(frozen=True)
class Cell:
    """A value with an optional error, or words ('failed'); neither is a gap.

    `records` are the records it was computed from; `best` marks what is better than every other row, resolved.
    """

    value: float | None = None
    error: float | None = None
    digits: int = 2
    words: str = ""
    records: tuple[Record, ...] = ()
    best: bool = False

    def text(self) -> str:
        if self.words:
            return self.words
        if self.value is None or math.isnan(self.value):
            return "-"
        error = (
            ""
            if self.error is None or math.isnan(self.error)
            else f" ±{self.error:.{self.digits}f}"
        )
        return f"{self.value:z.{self.digits}f}{error}"  # no minus before a zero


@dataclass
class Sheet:
    """Columns are (group, name); rows hold one cell a column; notes stand below."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main_sheet(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
    where: str = "records",
) -> Sheet:
    """Counts, throughput and scores of this machine (or of the reference) beside the paper's."""
    scores = [] if table.counts_only else list(SCORES[protocol.features])
    published = store.published(table.published, table.key)
    given = next(iter(published.values())).keys()  # a published table has the columns that it has
    params = next((name for name in ("params_m", "params") if name in given), None)
    machine = "this machine" if where == "records" else "reference"
    columns = [("", "row")] + [("", name) for name in ("type",) if name in given]
    columns += [("params, M", "paper")] * (params is not None) + [
        ("params, M", "ours"),
        ("Gflops", "paper"),
        ("Gflops", "ours"),
        ("Gflops", "core"),
    ]
    if not table.counts_only:
        columns += [
            (f"throughput, {machine}", "img/s"),
            (f"throughput, {machine}", "rel."),
            ("paper, A100", "img/s"),
            ("paper, A100", "rel."),
        ] * table.timed
        columns += [
            (f"{protocol.name} ({machine}, {_seed_words(seeds)})", _score_header(name, protocol))
            for name in scores
        ]
        columns += [
            (f"paper: {table.conditions}", name)
            for name in ("steps", "guided")
            if PAPER_CONDITIONS[name] in given
        ]
        columns += [(f"paper: {table.conditions}", name) for name in PAPER_SCORES.values()]
    sheet = Sheet(f"Table {table.number}: {table.title} ({table.source})", columns)
    first = published[table.baseline.published] if table.baseline.published else {}
    for row in rows:
        paper = published[row.published] if row.published else {}
        cells = [Cell(words=row.label)] + [
            Cell(words=paper.get("type", "")) for name in ("type",) if name in given
        ]
        cells += [_paper(paper, params)] * (params is not None) + [
            _count(store, row, where, "params_trainable", 1e6, 1)
        ]
        cells += [
            _paper(paper, "gflops"),
            _count(store, row, where, "macs_torchprofile", 1e9, 2),
            _count(store, row, where, "macs_core", 1e9, 2),
        ]
        if not table.counts_only:
            if table.timed:
                timed = (
                    _latest(store, timing_stage(row, table.baseline, device), where)
                    if timed_rows(table, [row], device, named=True)
                    else None
                )
                cells += [
                    _of(timed, "images_per_s", 1),
                    _of(timed, "relative", 2),
                    _paper(paper, "throughput_img_s"),
                    _relative(paper, first),
                ]
            cells += [_score(store, row, protocol, seeds, name, where) for name in scores]
            cells += [
                Cell(words=paper.get(name) or "-")
                for name in PAPER_CONDITIONS.values()
                if name in given
            ]
            cells += [_paper(paper, key) for key in PAPER_SCORES]
        sheet.rows.append(cells)
    sheet.notes += _notes(table, rows, protocol, seeds, device, store, where)
    return sheet


def comparison_sheet(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
) -> Sheet:
    """This machine's scores beside the committed reference's, and whether they agree within their error, where one protocol measured both."""
    scores = [
        name for name in SCORES[protocol.features] if name != "fid_corrected"
    ]  # follows from fid
    columns = [("", "row"), ("throughput, rel.", "reference"), ("throughput, rel.", "here")]
    columns += [
        (score_name(name, protocol.num) if protocol.features == "inception" else name, side)
        for name in scores
        for side in ("reference", "here")
    ] + [("", "reproduced")]
    sheet = Sheet(
        f"Table {table.number} on {protocol.name}: this machine against the reference", columns
    )
    reference = {
        row.label: seed_values(store, row, protocol, REFERENCE_SEEDS, "reference") for row in rows
    }
    here = {row.label: seed_values(store, row, protocol, seeds, "records") for row in rows}
    spread = {name: pooled(name, [records for records in reference.values()]) for name in scores}
    differ = {
        row.label: clashes(
            _records(store, row, protocol, seeds, "records"),
            _records(store, row, protocol, REFERENCE_SEEDS, "reference"),
        )
        for row in rows
    }
    other = {
        label: [field for field in found if not field.startswith(machines(protocol.features))]
        for label, found in differ.items()
    }
    compared = {label for label in other if reference[label] and here[label] and not other[label]}
    comparisons = len(compared) * len(scores)
    for row in rows:
        cells = [Cell(words=row.label)]
        timed = timed_rows(table, [row], device, named=True)
        cells += [
            _of(_latest(store, timing_stage(row, table.baseline, device), where), "relative", 2)
            if timed
            else Cell()
            for where in ("reference", "records")
        ]
        known, off = row.label in compared, []
        for name in scores:
            cells += [
                mean_cell(name, side[row.label], 1 if name.startswith(("fd", "is")) else 2)
                for side in (reference, here)
            ]
            if known and not agree(
                name, reference[row.label], here[row.label], spread[name], comparisons
            ):
                off.append(name)
        verdict = (
            "other protocol"
            if other[row.label]
            else "-"
            if not known
            else "spread unknown"
            if None in spread.values()
            else "no: " + ", ".join(off)
            if off
            else "yes"
        )
        sheet.rows.append([*cells, Cell(words=verdict)])
    sheet.notes.append(
        "reproduced: every score lies within the reference's spread over training seeds, pooled over the rows "
        f"(two-sided {1 - LEVEL:.0%} for all {comparisons} comparisons together, Bonferroni; fd on a log scale)"
    )
    for words, found in (
        ("other protocol: no verdict, for the reference was measured", other),
        (
            "compared all the same: another machine measures",
            {label: differ[label] for label in compared},
        ),
    ):
        if fields := sorted({field for fields in found.values() for field in fields}):
            sheet.notes.append(
                f"{words} with another {', '.join(fields)} (experiments/diff_protocol.py says what that does)"
            )
    sheet.notes += not_recorded(
        [
            record
            for row in rows
            for where, given in (("records", seeds), ("reference", REFERENCE_SEEDS))
            for record in _records(store, row, protocol, given, where)
        ]
    )
    return sheet


def _score_header(name: str, protocol: Protocol) -> str:
    """Scores on a classifier's features say so where they could be taken for Inception's; the others carry their N."""
    if protocol.features == "inception":
        return score_name(name, protocol.num)
    return name if name.startswith("fd_") else name.removesuffix(f"_{protocol.features}")


def _seed_words(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _latest(store: Store, stage: Stage, where: str) -> Record | None:
    return store.latest(stage, where) or store.latest(stage, where, status="failed")


def _of(record: Record | None, name: str, digits: int) -> Cell:
    if record is None:
        return Cell()
    if record.status != "done":
        return Cell(words="failed")
    return Cell(
        record.values.get(name), record.values.get(f"{name}_spread"), digits, records=(record,)
    )


def _count(store: Store, row: Row, where: str, name: str, unit: float, digits: int) -> Cell:
    """The sum over the networks of the published system."""
    records = [_latest(store, cost, where) for cost in cost_stages(row)]
    if not all(records):
        return Cell()
    if any(record.status != "done" for record in records):
        return Cell(words="failed")
    return (
        Cell(
            sum(record.values[name] for record in records) / unit,
            None,
            digits,
            records=tuple(records),
        )
        if records
        else Cell()
    )


def _paper(row: dict[str, str], key: str) -> Cell:
    """A published number with the digits that were published; in its own words, a number of millions, where it has a unit (675M)."""
    text = row.get(key, "")
    if text and text[-1] in "MB":
        return Cell(float(text[:-1]) * (1000 if text[-1] == "B" else 1), words=text)
    return Cell(float(text), None, len(text.partition(".")[2])) if text else Cell()


def _relative(paper: dict[str, str], first: dict[str, str]) -> Cell:
    rates = [row.get("throughput_img_s") for row in (paper, first)]
    return Cell(float(rates[0]) / float(rates[1])) if all(rates) else Cell()


def seed_values(
    store: Store, row: Row, protocol: Protocol, seeds: Sequence[int], where: str
) -> list[dict[str, float]]:
    """Scores of a row's training seeds, of those that have a record."""
    return [record.values for record in _records(store, row, protocol, seeds, where)]


def _records(
    store: Store, row: Row, protocol: Protocol, seeds: Sequence[int], where: str
) -> list[Record]:
    found = (store.latest(evaluate_stage(row, protocol, seed), where) for seed in seeds)
    return [record for record in found if record is not None]


def _score(
    store: Store, row: Row, protocol: Protocol, seeds: Sequence[int], name: str, where: str
) -> Cell:
    """`mean_cell` of a row's records, or that it failed."""
    if not row.backbone:
        return Cell()
    records = tuple(_records(store, row, protocol, seeds, where))
    if not records:
        stages = [stage for seed in seeds for stage in _run(row, protocol, seed)]
        failed = any(
            store.latest(stage, where) is None and store.latest(stage, where, status="failed")
            for stage in stages
        )
        return Cell(words="failed") if failed else Cell()
    return replace(
        mean_cell(
            name,
            [record.values for record in records],
            1 if name.startswith(("fd", "is", "fid")) else 2,
        ),
        records=records,
    )


def _run(row: Row, protocol: Protocol, seed: int) -> tuple[Stage, ...]:
    """The trainings of a row and the evaluation that hangs on them."""
    stage = evaluate_stage(row, protocol, seed)
    return *stage.trainings, stage


def mean_cell(name: str, values: list[dict[str, float]], digits: int = 2) -> Cell:
    """Mean over seeds with its standard error, or one seed's value with its sampling error."""
    if not values:
        return Cell()
    if len(values) == 1:
        return Cell(values[0][name], values[0].get(f"{name}_se"), digits)
    numbers = [value[name] for value in values]
    return Cell(
        statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers)), digits
    )


def _notes(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
    where: str,
) -> list[str]:
    size, channels = cost_stages(table.baseline)[0].size, cost_stages(table.baseline)[0].channels
    notes = [
        f"Gflops are multiply-accumulates at batch 1 and {size}x{size}x{channels}. ours: as torchprofile counts, attention written out, which is the paper's for its own rows; "
        "core: convolutions, linear layers, matrix products and recurrences only. params: trainable."
    ]
    if table.counts_only:
        return notes
    if table.timed:
        timed = timed_rows(table, rows, device, named=True)
        own = {(cost.size, cost.channels) for row in timed for cost in cost_stages(row)}
        inputs = (
            " (a system of another input at its own, all its networks)"
            if own - {(size, channels)}
            else ""
        )
        notes.append(
            f"throughput: inference at {size}x{size}x{channels}{inputs}, fp32 without TF32, attention unfused, ± half the interquartile range; rel.: to "
            f"{table.baseline.label}, timed in turn. The paper's ran under PyTorch's defaults, where convolutions use TF32 and linear layers do not."
        )
        notes += timing_caveats(
            [
                (row.label, record)
                for row in timed
                if (record := store.latest(timing_stage(row, table.baseline, device), where))
            ]
        )
    if device != "cuda" and any(row.heavy for row in timed_rows(table, rows, device, named=True)):
        notes.append(
            "large networks take minutes to time on a CPU: there they are timed only where --rows names them, and are gaps otherwise."
        )
    notes.append(_score_note(protocol, seeds))
    noted: dict[str, list[str]] = {}
    for row in (row for row in rows if row.note):
        noted.setdefault(row.note, []).append(row.label)
    notes += [f"{', '.join(labels)}: {note}." for note, labels in noted.items()]
    rows = [row for row in rows if row.backbone]
    if len({spec_id(evaluate_stage(row, protocol, 0)) for row in rows}) < len(rows):
        notes.append(f"rows that are one network on {protocol.name} share its runs and scores.")
    scores = {row.label: seed_values(store, row, protocol, seeds, where) for row in rows}
    counts = {label: len(values) for label, values in scores.items()}
    for found in sorted(set(counts.values()) & set(range(1, len(seeds)))):
        notes.append(
            f"{', '.join(label for label, count in counts.items() if count == found)}: {found} of {len(seeds)} seeds"
        )
    if resolved := _resolved(table, rows, protocol, seeds, store, where):
        notes.append(resolved)
    shown: list[Record] = []
    for row in rows:
        stages = [
            *cost_stages(row),
            *(
                timing_stage(timed, table.baseline, device)
                for timed in timed_rows(table, [row], device, named=True)
            ),
        ]
        stages += [stage for seed in seeds for stage in _run(row, protocol, seed)]
        for stage in stages:
            if record := store.latest(stage, where):
                shown.append(record)
            elif failed := store.latest(stage, where, status="failed"):
                notes.append(f"{row.label}: {failed.kind} failed: {failed.error}")
    evaluated = [record for row in rows for record in _records(store, row, protocol, seeds, where)]
    return (
        notes
        + made_by_few(next(iter(SCORES[protocol.features])), scores)
        + evaluations(scores)
        + not_recorded(evaluated)
        + run_caveats(evaluated, shown)
    )


def _score_note(protocol: Protocol, seeds: Sequence[int]) -> str:
    error = (
        "± sampling standard error, one training seed"
        if len(seeds) == 1
        else "± standard error of the mean over training seeds, of a row with one seed that of sampling"
    )
    if protocol.features != "inception":
        return (
            f"{protocol.name}: {protocol.recipe.steps} steps of {protocol.recipe.batch}, {protocol.num} images; scores on a small classifier's "
            f"features, which are not Inception's: fd_{protocol.features} is no FID and compares with no other protocol's score. {error}."
        )
    return f"{protocol.name}: {protocol.num} images. {error}. no bias: FID without what a finite number of images adds."


def _resolved(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    store: Store,
    where: str,
) -> str:
    """Which rows differ from the baseline in the first score by more than the spread over training seeds explains."""
    name, better = next(iter(SCORES[protocol.features].items()))
    here = {
        row.label: seed_values(store, row, protocol, seeds, where)
        for row in (table.baseline, *rows)
    }
    first = _records(store, table.baseline, protocol, seeds, where)
    other = {
        row.label: clashes(_records(store, row, protocol, seeds, where), first)
        for row in (table.baseline, *rows)
    }
    spread, whose = (
        pooled(name, [values for label, values in here.items() if not other[label]]),
        "these runs'",
    )
    if spread is None:
        spread, whose = (
            pooled(
                name,
                [
                    seed_values(store, row, protocol, REFERENCE_SEEDS, "reference")
                    for row in table.rows
                    if row.backbone
                ],
            ),
            "the reference's",
        )
    base = [] if other[table.baseline.label] else here[table.baseline.label]
    runs = {
        spec_id(evaluate_stage(row, protocol, 0)): row.label
        for row in (*reversed(rows), table.baseline)
    }  # rows that share runs count once
    refused = [f"{label} (other {', '.join(fields)})" for label, fields in other.items() if fields]
    others = [
        label
        for label in reversed(runs.values())
        if label != table.baseline.label and here[label] and not other[label]
    ]
    if spread is None or not base or not others:
        words = (
            [
                f"{name}: no difference can be called resolved: the spread over training seeds is unknown (one seed, no reference)."
            ]
            if base and others
            else []
        )
        return " ".join(
            words
            + [f"Not compared, measured under another protocol: {'; '.join(refused)}."]
            * bool(refused)
        )
    words: dict[str, list[str]] = {
        "better": [],
        "worse": [],
        "not resolved": [],
        "not compared, measured under another protocol": refused,
    }
    for label in others:
        difference = statistics.fmean(scaled(name, here[label])) - statistics.fmean(
            scaled(name, base)
        )
        if abs(difference) <= reach(spread, len(here[label]), len(base), len(others)):
            words["not resolved"].append(label)
        else:
            words["better" if (difference < 0) == (better == "lower") else "worse"].append(label)
    groups = "; ".join(
        f"{verdict}: {', '.join(labels)}" for verdict, labels in words.items() if labels
    )
    return f"{name} against {table.baseline.label}, {1 - LEVEL:.0%} over all rows, by {whose} pooled spread over seeds ({spread[0]:.0%} of the value): {groups}."
