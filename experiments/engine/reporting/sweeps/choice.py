"""The table of a sweep: every point's score on the selection seeds, and the choice on others."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from experiments.engine.records.score_names import Better, Score, distance_score
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.sheet import (
    GAP,
    Cell,
    Column,
    Kind,
    Note,
    NoteKind,
    Sheet,
    SheetRow,
)
from experiments.engine.specs.spec import Evaluate


@dataclass(frozen=True)
class Point:
    """A point of a grid with its records."""

    # The evaluation, whatever its sampling seed.
    stage: Evaluate
    # Records of the selection seeds that are done, by seed.
    selection: dict[int, Record]

    def score(self, score: Score) -> float:
        """Return the mean over the selection seeds; nan without a record."""
        return mean_score(list(self.selection.values()), score)

    @property
    def evaluations(self) -> float:
        """Return the network evaluations per image; nan without a record."""
        values = [record.values["nfe"] for record in self.selection.values()]
        return statistics.fmean(values) if values else math.nan


def mean_score(records: list[Record], score: Score) -> float:
    """Return the mean of a score over records; nan without one."""
    return statistics.fmean(r.values[score.key] for r in records) if records else math.nan


def read_points(stages: list[Evaluate], seeds: tuple[int, ...], store: Store) -> list[Point]:
    """Return the points with the records that are done."""
    return [Point(stage, _records(stage, seeds, store)) for stage in stages]


def choose(points: list[Point], seeds: tuple[int, ...], score: Score) -> Point | None:
    """Return the best point by its mean over the selection seeds; None until all are scored."""
    if any(len(point.selection) < len(seeds) for point in points):
        return None
    sign = 1 if score.better is Better.LOWER else -1
    return min(points, key=lambda point: sign * point.score(score))


def sweep_sheet(
    title: str,
    points: list[Point],
    chosen: Point | None,
    report_seeds: tuple[int, ...],
    store: Store,
) -> Sheet:
    """Return the sheet of a sweep: a row per point, and the choice in a note."""
    score = distance_score(points[0].stage.features)
    columns = [
        Column("sampler", "sampler", kind=Kind.PROSE),
        Column("steps", "steps", digits=0),
        Column("scale", "scale"),
        Column("interval", "guided times", kind=Kind.PROSE),
        Column("average", "average", kind=Kind.PROSE),
        Column("nfe", "evaluations", digits=1),
        Column("score", f"{score.name}, selection seeds", digits=3),
    ]

    # The chosen point is marked in its row, and its score on other seeds stands in a note.
    rows: list[SheetRow] = [_cells(point, score, point is chosen) for point in points]
    sheet = Sheet(title, columns, rows)
    sheet.notes = [Note(NoteKind.SCORES, text) for text in _notes(chosen, report_seeds, store)]
    return sheet


def reported(chosen: Point, seeds: tuple[int, ...], store: Store) -> list[Record]:
    """Return the records of the choice on the report seeds that are done."""
    return list(_records(chosen.stage, seeds, store).values())


def _records(stage: Evaluate, seeds: tuple[int, ...], store: Store) -> dict[int, Record]:
    found = {seed: store.here.latest(replace(stage, seed=seed)) for seed in seeds}
    return {seed: record for seed, record in found.items() if record is not None}


def _cells(point: Point, score: Score, best: bool) -> dict[str, Cell]:
    sampler, records = point.stage.sampler, tuple(point.selection.values())
    value = point.score(score)
    return {
        "sampler": Cell(label=sampler.name),
        "steps": Cell(sampler.num_steps),
        "scale": Cell(sampler.scale),
        "interval": Cell(label="{} to {}".format(*sampler.interval)),
        "average": Cell(label=name_average(point.stage)),
        "nfe": Cell(point.evaluations, records=records) if records else GAP,
        "score": Cell(value, records=records, best=best) if records else GAP,
    }


def name_average(stage: Evaluate) -> str:
    """Name the average of the weights that a point samples."""
    return "by decay" if stage.average is None else f"width {stage.average:g}"


def describe_point(stage: Evaluate) -> str:
    """Name a point in one phrase."""
    sampler = stage.sampler
    low, high = sampler.interval
    return (
        f"{sampler.name}, {sampler.num_steps} steps, scale {sampler.scale:g} in {low} to {high}, "
        f"average {name_average(stage)}"
    )


def _notes(chosen: Point | None, seeds: tuple[int, ...], store: Store) -> list[str]:
    """Say which point was chosen and what it scores on seeds that did not choose it."""
    if chosen is None:
        return ["Nothing is chosen before every point is scored on every selection seed."]
    score = distance_score(chosen.stage.features)
    records = reported(chosen, seeds, store)
    named = f"The best point on the selection seeds is {describe_point(chosen.stage)}"
    if len(records) < len(seeds):
        return [f"{named}; it is not yet scored on all report seeds."]

    # The choice favours points that were lucky on the selection seeds.
    value = mean_score(records, score)
    values = [record.values[score.key] for record in records]
    spread = f" (deviation {statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return [
        f"{named}. On {len(seeds)} other sampling seeds its {score.name} is {value:.3f}{spread}, "
        f"and {chosen.score(score):.3f} on those that chose it. Report the former."
    ]
