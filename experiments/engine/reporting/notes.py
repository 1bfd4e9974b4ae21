from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.engine.records.comparison import clashes, not_recorded
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.lookup import REFERENCE_SEEDS, SCORES, _records, _run, seed_values
from experiments.engine.reporting.statistics import LEVEL, made_by_few, pooled, reach, scaled
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import (
    Protocol,
    cost_stages,
    evaluate_stage,
    timed_rows,
    timing_stage,
)


# What records say about themselves that the reader of a table should know, as its notes. Standard library only.
def timing_caveats(timed: Sequence[tuple[str, Record]]) -> list[str]:
    """Of a table's timings by label: which began before they were stable, and whether images a second of its rows compare.

    They do not where the baseline, timed beside each row, itself ranges over more than the printed intervals, whose median width is taken.
    """
    early = [
        label for label, record in timed if not record.values.get("stable", True)
    ]  # older records do not say, nor hold the baseline's rate
    notes = [f"{', '.join(early)}: timed before the warm-up was stable."] * bool(early)
    beside: dict[tuple[str, ...], list[Record]] = {}
    for _, record in timed:
        if record.values.get("baseline_images_per_s"):
            beside.setdefault(_conditions(record), []).append(record)
    for (_, name, mode, batch, *_), records in beside.items():
        rates = [record.values["baseline_images_per_s"] for record in records]
        low, high = min(rates), max(rates)
        width = statistics.median(
            2 * record.values["images_per_s_spread"] / record.values["images_per_s"]
            for record in records
        )
        if high / low - 1 > width:
            notes.append(
                f"img/s of different rows do not compare, ratios timed in turn (rel.) do: beside {len(records)} rows the baseline {name} ({mode}, batch {batch}) itself "
                f"made {low:.3g} to {high:.3g} img/s, {high / low - 1:.0%} apart; the printed intervals are {width:.0%} wide in the median."
            )
    return notes


def _conditions(record: Record) -> tuple[str, ...]:
    """What a baseline's rate hangs on: the network in full, its name, numeric mode, batch, input, kernels and machine."""
    spec, made = record.spec, record.provenance
    side = list(spec.get("baseline_input") or (spec["size"], spec["channels"]))
    machine = made["cpu"] if spec["device"] == "cpu" else made["device"]
    return tuple(
        map(
            str,
            (
                spec["baseline"],
                spec["baseline"]["name"],
                spec["precision"],
                spec["batch"],
                side,
                spec["kernels"],
                spec.get("what"),
                machine,
            ),
        )
    )


def run_caveats(scored: Sequence[Record], shown: Sequence[Record]) -> list[str]:
    """Where the scored runs ran and what they warn of, and whether any record that is shown is of a changed tree."""
    places = {
        f"{r.provenance['device'] if r.provenance['device'] != 'cpu' else r.provenance['cpu']}, torch {r.provenance['torch']}"
        for r in scored
    }
    notes = [f"run on {'; '.join(sorted(places))}"] * bool(places)
    notes += [
        f"warning: {text}"
        for text in sorted(
            {text for record in scored for text in record.values.get("warnings", [])}
        )
    ]
    return notes + ["some records come from a tree with uncommitted changes"] * any(
        record.provenance["dirty"] for record in shown
    )


def evaluations(scores: dict[str, list[dict[str, float]]]) -> list[str]:
    """A sentence on the network evaluations per image, by row where they differ; records from before they were counted have none."""
    labels: dict[str, list[str]] = {}
    for label, found in scores.items():
        counts = [values["nfe"] for values in found if "nfe" in values]
        if found:
            labels.setdefault(
                f"{statistics.fmean(counts):.4g}" if counts else "not recorded", []
            ).append(label)
    said = (
        next(iter(labels))
        if len(labels) == 1
        else "; ".join(f"{nfe}: {', '.join(names)}" for nfe, names in labels.items())
    )
    return [f"network evaluations per image: {said}."] * bool(labels)


def _notes(
    table: Table,
    rows: Sequence[Row],
    protocol: Protocol,
    seeds: Sequence[int],
    device: str,
    store: Store,
    source: RecordFolder,
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
                if (record := source.latest(timing_stage(row, table.baseline, device)))
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
    scores = {row.label: seed_values(store, row, protocol, seeds, source) for row in rows}
    counts = {label: len(values) for label, values in scores.items()}
    for found in sorted(set(counts.values()) & set(range(1, len(seeds)))):
        notes.append(
            f"{', '.join(label for label, count in counts.items() if count == found)}: {found} of {len(seeds)} seeds"
        )
    if resolved := _resolved(table, rows, protocol, seeds, store, source):
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
            if record := source.latest(stage):
                shown.append(record)
            elif failed := source.latest(stage, status="failed"):
                notes.append(f"{row.label}: {failed.kind} failed: {failed.error}")
    evaluated = [record for row in rows for record in _records(store, row, protocol, seeds, source)]
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
    source: RecordFolder,
) -> str:
    """Which rows differ from the baseline in the first score by more than the spread over training seeds explains."""
    name, better = next(iter(SCORES[protocol.features].items()))
    here = {
        row.label: seed_values(store, row, protocol, seeds, source)
        for row in (table.baseline, *rows)
    }
    first = _records(store, table.baseline, protocol, seeds, source)
    other = {
        row.label: clashes(_records(store, row, protocol, seeds, source), first)
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
                    seed_values(store, row, protocol, REFERENCE_SEEDS, store.reference)
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
