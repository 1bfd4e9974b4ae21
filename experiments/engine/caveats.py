"""What records say about themselves that the reader of a table should know, as its notes. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.engine.store import Record


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
