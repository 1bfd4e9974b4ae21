"""The paper's scores of a network beside ours, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from experiments.declared.protocols import PROTOCOLS
from experiments.engine.records.manifest import has_unknown_features
from experiments.engine.records.score_names import (
    FID,
    FID_CORRECTED,
    INCEPTION,
    IS,
    KID,
    PRECISION,
    RECALL,
    SFID,
    TABLE_SCORES,
    counted_name,
)
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row, Table, TableName
from experiments.engine.specs.spec import Evaluate, Sampler
from experiments.engine.specs.stages import sampler_of

# Tables of scores by the set of images. Where the second has a row of the first, it is rounded.
PAPERS = {"imagenet256": (1, 8), "imagenet512": (2, 9)}
INCEPTION_SCORES = (FID, FID_CORRECTED, SFID, IS, PRECISION, RECALL, KID)


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables."""

    # What is declared of it.
    row: Row
    # What is published, by the columns of the table.
    values: dict[str, str]
    # Whether its images were guided.
    guided: bool

    @property
    def networks(self) -> list[str]:
        """Return the names of the row's networks: more than one if the row is a system."""
        rows = (self.row, self.row.classifier, self.row.upsampler)
        return [row.backbone.name for row in rows if row and row.backbone]

    @property
    def steps(self) -> int:
        """Return the published number of training steps; 0 if there is none."""
        return int(self.values.get("train_steps") or 0)

    def describe(self) -> str:
        """Return source, model, training and guidance of the row."""
        texts = [self.values["source"], self.values["model"]]
        if self.steps:
            texts.append(f"{self.steps:,} training steps")
        return ", ".join([*texts, _guidance(self.guided)])


def lines_beside_paper(
    values: dict[str, Any],
    backbone: str,
    spec: Evaluate,
    store: Store,
    tables: Mapping[TableName, Table],
) -> list[str]:
    """Return our scores in lines, each with the paper's value if it has one.

    The paper's row is of the same network, guided if our images were.

    Args:
        values: our scores.
        backbone: name of the network.
        spec: the evaluation that gave the scores.
        store: reads the published tables.
        tables: the tables that declare the paper's rows.
    """
    rows = paper_rows(backbone, spec, store, tables)
    guided = spec.sampler.scale != 1
    alike = [row for row in rows if row.guided == guided and len(row.networks) == 1]
    by_unknown_features = has_unknown_features(values)
    paper = alike[0] if alike and not by_unknown_features else None

    lines = _score_lines(values, spec, paper)
    if "nfe" in values:
        lines.append(f"  network evaluations per image: {values['nfe']:.4g}")
    if paper:
        notes = [f"paper: {paper.describe()}", *_notes_on(paper.row, spec)]
    elif by_unknown_features:
        notes = ["scored by unknown features, which compare with no value of the paper"]
    else:
        notes = [_why_no_row(rows, guided)]
    lines += [f"  {note}" for note in notes]
    return lines + [f"  warning: {warning}" for warning in values.get("warnings", [])]


def paper_rows(
    backbone: str, spec: Evaluate, store: Store, tables: Mapping[TableName, Table]
) -> list[PaperRow]:
    """Return the paper's rows of a network at a resolution, the longest trained first."""
    found = []
    for number in PAPERS.get(spec.data.name, ()):
        published = store.published(tables[number].published, tables[number].key)
        for row in tables[number].rows:
            if row.backbone and row.published:
                values = published[row.published]
                found.append(PaperRow(row, values, _is_guided(row, values)))
    of_network = [row for row in found if backbone in row.networks]
    return sorted(of_network, key=lambda row: -row.steps)


def _is_guided(row: Row, values: dict[str, str]) -> bool:
    """Return whether a row is guided: by its table, else by the sampler of its own paper."""
    if values.get("cfg"):
        return values["cfg"] == "yes"
    if row.method is None:
        return False
    sampler = row.method.sampler
    return sampler.scale != 1 or sampler.classifier_scale != 0


def _score_lines(values: dict[str, Any], spec: Evaluate, paper: PaperRow | None) -> list[str]:
    inception = spec.features == INCEPTION
    scores = INCEPTION_SCORES if inception else TABLE_SCORES[spec.features]

    lines = []
    for score in scores:
        name = counted_name(score, values["num"]) if inception else score.key
        value = values.get(score.key)
        if value is None or math.isnan(value):
            continue
        text = f"  {name:14} {value:.4f}"
        error = values.get(score.error)
        if error is not None and not math.isnan(error):
            text += f" ± {error:.4f}"
        if score is FID_CORRECTED:
            text += ", without its finite-N bias"
        if paper and paper.values.get(score.key):
            text += f"   paper {paper.values[score.key]}"
        lines.append(text)
    return lines


def _notes_on(row: Row, spec: Evaluate) -> list[str]:
    """Return what is to be known of a row, and how our sampler differs from its own paper's."""
    notes = [f"{row.label}: {row.note}"] if row.note else []
    if row.method is None:
        return notes

    own_protocol = f"{spec.data.name}_own"
    own = sampler_of(row, PROTOCOLS[own_protocol])
    changes = []
    for name in (field.name for field in fields(Sampler)):
        ours, theirs = getattr(spec.sampler, name), getattr(own, name)
        if ours != theirs:
            changes.append(f"{name} {ours}, not {theirs}")
    if changes:
        notes.append(
            f"drawn otherwise than its own recipe says: {', '.join(changes)} "
            f"(--protocol {own_protocol} follows it)"
        )
    return notes


def _why_no_row(rows: list[PaperRow], guided: bool) -> str:
    """Say why no value of the paper stands beside ours."""
    if not rows:
        return "the paper has no such row"
    first = rows[0]
    if len(first.networks) == 1:
        return f"the paper has no {_guidance(guided)} row of this network, only {first.describe()}"
    scores = [
        f"{counted_name(score, 50_000)} {first.values[score.key]}"
        for score in INCEPTION_SCORES
        if first.values.get(score.key)
    ]
    return (
        "the paper has this network only within a system of "
        f"{', '.join(first.networks)}: {first.describe()}: {', '.join(scores)}"
    )


def _guidance(guided: bool) -> str:
    return "guided" if guided else "unguided"
