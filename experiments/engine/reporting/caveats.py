"""What records say about themselves that the reader of a table should know. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from experiments.engine.records.comparison import fields_of_some
from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Note, NoteKind
from experiments.engine.reporting.statistics import Values

# From this share of sampling error in a Fréchet distance, a few images make most of the distance.
OUTLIERS = 0.5


def timing_caveats(timings: Sequence[tuple[str, Record]]) -> list[Note]:
    """Notes on the timings of a table, given by label.

    They name the timings that began before they were stable, and say if images per second of
    different rows do not compare.
    """
    # older records do not say whether they were stable
    early = [label for label, record in timings if not record.values.get("stable", True)]
    texts = []
    if early:
        texts.append(f"The timing of {', '.join(early)} began before its warm-up was stable.")
    texts += _drifting_baselines([record for _, record in timings])
    return [Note(NoteKind.SPEED, text) for text in texts]


def _drifting_baselines(records: Iterable[Record]) -> list[str]:
    """Sentences on baselines whose own rate ranges over more than the printed intervals.

    The baseline is timed beside every row, so its rate should be the same beside all of them.
    """
    # older records do not hold the baseline's rate
    beside: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.values.get("baseline_images_per_s"):
            beside.setdefault(_baseline_conditions(record), []).append(record)

    sentences = []
    for group in beside.values():
        rates = [record.values["baseline_images_per_s"] for record in group]
        low, high = min(rates), max(rates)
        range_share = high / low - 1

        # the printed interval is plus and minus the spread
        width = statistics.median(
            2 * record.values["images_per_s_spread"] / record.values["images_per_s"]
            for record in group
        )
        if range_share > width:
            spec = group[0].spec
            network = f"{spec['baseline']['name']} ({spec['precision']}, batch {spec['batch']})"
            sentences.append(
                f"Compare rows by rel., not by img/s: rel. is the ratio to a baseline timed in "
                f"turn. Beside these {len(group)} rows, the baseline {network} itself ranged from "
                f"{low:.3g} to {high:.3g} img/s ({range_share:.0%}). The printed intervals have a "
                f"median width of {width:.0%}."
            )
    return sentences


def _baseline_conditions(record: Record) -> tuple[str, ...]:
    """What a baseline's rate depends on: network, numeric mode, batch, input, kernels, machine."""
    spec, provenance = record.spec, record.provenance
    shape = list(spec.get("baseline_input") or (spec["size"], spec["channels"]))
    machine = provenance["cpu"] if spec["device"] == "cpu" else provenance["device"]
    conditions = (
        spec["baseline"],
        spec["precision"],
        spec["batch"],
        shape,
        spec["kernels"],
        spec.get("what"),
        machine,
    )
    return tuple(str(condition) for condition in conditions)


def run_caveats(scored: Sequence[Record], shown: Sequence[Record]) -> list[Note]:
    """Notes on where runs were scored, what they warn of, and on records of a changed tree.

    Args:
        scored: the evaluations behind the scores of a table.
        shown: all records behind the table.
    """
    machines = sorted(
        {f"{machine_of(record)}, torch {record.provenance['torch']}" for record in scored}
    )
    notes = []
    if machines:
        notes.append(Note(NoteKind.RECORDS, f"Scored on {'; '.join(machines)}."))

    warnings = {text for record in scored for text in record.values.get("warnings", [])}
    notes += [Note(NoteKind.WARNING, f"Warning: {text}.") for text in sorted(warnings)]

    origins = sorted({str(record.provenance.get("origin") or "") for record in shown} - {""})
    if origins:
        text = f"Some records are contributed, by {', '.join(origins)}."
        notes.append(Note(NoteKind.RECORDS, text))
    if any(record.provenance["dirty"] for record in shown):
        text = "Some records come from a tree with uncommitted changes."
        notes.append(Note(NoteKind.RECORDS, text))
    return notes


def unrecorded_caveats(scored: Sequence[Record]) -> list[Note]:
    """A note on the fields of the protocol that only some of the evaluations hold."""
    fields = fields_of_some(scored)
    if not fields:
        return []
    text = f"not recorded by all, and taken as agreeing: {', '.join(fields)}."
    return [Note(NoteKind.SCORES, text)]


def machine_of(record: Record) -> str:
    """The GPU, or the CPU, that a record comes from."""
    provenance = record.provenance
    return provenance["cpu"] if provenance["device"] == "cpu" else provenance["device"]


def evaluation_counts(scores: Mapping[str, Values]) -> list[Note]:
    """A note on the network evaluations per image of rows given by label."""
    labels: dict[str, list[str]] = {}
    for label, values in scores.items():
        if not values:
            continue

        # records from before evaluations were counted have no number
        counts = [value["nfe"] for value in values if "nfe" in value]
        number = f"{statistics.fmean(counts):.4g}" if counts else "not recorded"
        labels.setdefault(number, []).append(label)

    if not labels:
        return []
    if len(labels) == 1:
        numbers = next(iter(labels))
    else:
        numbers = "; ".join(f"{number}: {', '.join(names)}" for number, names in labels.items())
    return [Note(NoteKind.SCORES, f"Network evaluations per image: {numbers}.")]


def outlier_caveats(name: str, scores: Mapping[str, Values]) -> list[Note]:
    """A note on rows whose Fréchet distance comes mostly from a few images."""
    shares = {label: _error_share(name, values) for label, values in scores.items()}
    few = [
        f"{label}: the sampling error is {share:.0%} of {name}"
        for label, share in shares.items()
        if share > OUTLIERS
    ]
    if not few:
        return []
    text = (
        f"{'; '.join(few)}. A few images far from all others make most of this distance, as "
        "after a sampling that diverged. The other scores do not grow with it."
    )
    return [Note(NoteKind.SCORES, text)]


def _error_share(name: str, values: Values) -> float:
    """The largest sampling error of a score over its value, among a row's seeds."""
    shares = [
        value[f"{name}_se"] / value[name]
        for value in values
        if value.get(f"{name}_se") and value[name] > 0
    ]
    return max(shares, default=0.0)
