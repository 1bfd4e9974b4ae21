"""Which rows of a table differ from its baseline by more than noise explains. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.engine.records.comparison import clashes
from experiments.engine.records.score_names import SCORES, Better, ranking_score
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.lookup import (
    REFERENCE_SEEDS,
    Lookup,
)
from experiments.engine.reporting.paired import compare_paired
from experiments.engine.reporting.statistics import (
    LEVEL,
    Spread,
    Values,
    mean_score,
    noise_bound,
    pool_spread,
)
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import spec_id


@dataclass
class Comparison:
    """The rows of a table against its baseline, by label."""

    # the baseline's label
    baseline: str
    # the score that is compared
    name: str
    # over training seeds, or within them if they are paired; None if it is unknown
    spread: Spread | None = None
    # whether rows of one seed share their draws, so that they are compared within seeds
    paired: bool = False
    # whether the spread is the reference's, since these runs have no repeated seeds
    from_reference: bool = False
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    not_resolved: list[str] = field(default_factory=list)
    # scored by another protocol than the baseline, with the fields that differ
    refused: dict[str, list[str]] = field(default_factory=dict)
    # rows for which the score is not defined
    undefined: list[str] = field(default_factory=list)
    # whether there is anything to compare
    comparable: bool = False


def compare_with_baseline(lookup: Lookup, store: Store) -> Comparison:
    """Sort the rows into better than the baseline, worse, and not resolved."""
    selection = lookup.selection
    baseline, features = selection.table.baseline, selection.protocol.features
    paired = selection.protocol.heldout is not None
    comparison = Comparison(baseline.label, ranking_score(features).key, paired=paired)

    # the baseline is looked up apart, since it need not be one of the rows
    base_lookup = Lookup(selection.with_rows([baseline]), lookup.folder)
    base_records = base_lookup.scored(baseline)
    records = {baseline.label: base_records}
    records |= {row.label: lookup.scored(row) for row in selection.networks}

    # networks that predict tokens have no error in noise
    has_score = {label: _have_score(comparison, found) for label, found in records.items()}
    comparison.undefined = [label for label, has in has_score.items() if not has]
    fields = {label: clashes(found, base_records) for label, found in records.items()}
    comparison.refused = {
        label: differing for label, differing in fields.items() if differing and has_score[label]
    }

    # runs that rows share count once, or their spread would seem better known than it is
    distinct = _distinct_labels(lookup, baseline)
    compared = [
        label for label in (baseline.label, *distinct) if has_score[label] and not fields[label]
    ]
    own = {label: records[label] for label in compared}
    if paired:
        own = _at_common_seeds(own)

    # without repeated seeds of our own, the reference's spread stands in
    comparison.spread = _spread(comparison, list(own.values()))
    if comparison.spread is None:
        comparison.spread = _reference_spread(lookup, store, comparison)
        comparison.from_reference = True

    scores: dict[str, Values] = {
        label: [record.values for record in found] for label, found in own.items() if found
    }
    base = scores.pop(baseline.label, [])
    comparison.comparable = bool(base and scores)
    if comparison.spread is not None and comparison.comparable:
        _sort(comparison, scores, base)
    return comparison


def _have_score(comparison: Comparison, records: Sequence[Record]) -> bool:
    return all(comparison.name in record.values for record in records)


def _seed_of(record: Record) -> int:
    return int(record.spec["train"]["seed"])


def _at_common_seeds(records: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
    """The records of the seeds that every row with a record has."""
    seeds = [{_seed_of(record) for record in found} for found in records.values() if found]
    common = set.intersection(*seeds) if seeds else set()
    return {
        label: [record for record in found if _seed_of(record) in common]
        for label, found in records.items()
    }


def _spread(comparison: Comparison, rows: Sequence[list[Record]]) -> Spread | None:
    """The spread of the compared score over seeds; of paired rows, what rows and seeds leave."""
    if not comparison.paired:
        values = [[record.values for record in found] for found in rows]
        return pool_spread(comparison.name, values)
    scores = {
        str(at): {_seed_of(record): record.values[comparison.name] for record in found}
        for at, found in enumerate(rows)
        if found
    }
    if len(scores) < 2 or any(len(by_seed) < 2 for by_seed in scores.values()):
        return None
    fitted = compare_paired(scores)
    return Spread(fitted.residual, fitted.degrees_of_freedom)


def _reference_spread(lookup: Lookup, store: Store, comparison: Comparison) -> Spread | None:
    """The spread of a score in the reference, pooled over all networks of the table."""
    selection = lookup.selection
    networks = [row for row in selection.table.rows if row.backbone]
    every = selection.with_rows(networks).with_seeds(REFERENCE_SEEDS)
    reference = Lookup(every, store.reference)
    records = {row.label: reference.scored(row) for row in networks}
    records = {label: found for label, found in records.items() if _have_score(comparison, found)}
    if comparison.paired:
        records = _at_common_seeds(records)
    return _spread(comparison, list(records.values()))


def _distinct_labels(lookup: Lookup, baseline: Row) -> Sequence[str]:
    """The rows other than the baseline, the first of those that share their runs."""
    selection = lookup.selection
    (base_run,) = selection.with_rows([baseline]).with_seeds([0]).runs_of(baseline)
    seen = {spec_id(base_run.stage)}
    labels = []
    for run in selection.with_seeds([0]).runs:
        name = spec_id(run.stage)
        if name not in seen:
            seen.add(name)
            labels.append(run.row.label)
    return labels


def _sort(
    comparison: Comparison,
    scores: dict[str, Values],
    base: Values,
) -> None:
    """Fill in better, worse and not resolved, at LEVEL for all rows together."""
    assert comparison.spread is not None
    name = comparison.name

    # A difference counts only if it is larger than the bound for all rows together.
    for label, values in scores.items():
        difference = mean_score(name, values) - mean_score(name, base)
        bound = noise_bound(comparison.spread, len(values), len(base), len(scores))
        if abs(difference) <= bound:
            comparison.not_resolved.append(label)
        elif (difference < 0) == (SCORES[name].better is Better.LOWER):
            comparison.better.append(label)
        else:
            comparison.worse.append(label)


def describe_comparison(comparison: Comparison) -> str:
    """The comparison in sentences; '' if there is nothing to say."""
    sentences = _describe(comparison)
    if comparison.undefined:
        labels = ", ".join(comparison.undefined)
        sentences.append(f"Not compared, since it has no {comparison.name}: {labels}.")
    return " ".join(sentences)


def _describe(comparison: Comparison) -> list[str]:
    """The comparison of the rows that have the score, in sentences."""
    refused = "; ".join(
        f"{label} (other {', '.join(fields)})" for label, fields in comparison.refused.items()
    )
    not_compared = f"Not compared, since scored by another protocol: {refused}."
    if comparison.spread is None or not comparison.comparable:
        sentences = []
        if comparison.comparable:
            sentences.append(
                f"No difference in {comparison.name} can be called resolved: the spread over "
                "training seeds is unknown, since there is one seed and no reference."
            )
        if refused:
            sentences.append(not_compared)
        return sentences

    # which rows are better, worse and neither
    source = "the reference" if comparison.from_reference else "these runs"
    over, digits = ("within", ".2") if comparison.paired else ("over", ".0")
    groups = {
        "better": comparison.better,
        "worse": comparison.worse,
        "not resolved": comparison.not_resolved,
    }
    listed = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in groups.items() if labels)
    sentences = [
        f"{comparison.name} against {comparison.baseline}: {listed}.",
        f"A difference is resolved if the spread {over} seeds of {source} "
        f"({comparison.spread.deviation:{digits}%} of the value, pooled) does not explain it, "
        f"at {1 - LEVEL:.0%} over all rows.",
    ]
    return sentences + ([not_compared] if refused else [])
