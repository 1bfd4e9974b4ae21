"""The notes below a table: how its columns were counted, timed and scored. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.engine.records.score_names import (
    DIGITS_TEXT,
    distance_score,
    ranking_score,
)
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.caveats import (
    evaluation_counts,
    outlier_caveats,
    run_caveats,
    timing_caveats,
    unrecorded_caveats,
)
from experiments.engine.reporting.lookup import Lookup
from experiments.engine.reporting.resolution import compare_with_baseline, describe_comparison
from experiments.engine.reporting.sheet import Note, NoteKind
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Stage, spec_id
from experiments.engine.specs.stages import Protocol


def count_notes(selection: Selection) -> list[Note]:
    """How parameters and Gflops were counted."""
    shape = _input_shape(selection)
    text = (
        f"Gflops are multiply-accumulates at batch 1 and {shape}. ours: as torchprofile counts "
        "them, with attention written out, as the paper does for its own rows. core: convolutions, "
        "linear layers, matrix products and recurrences only. params: trainable parameters."
    )
    return [Note(NoteKind.COUNTS, text)]


def speed_notes(lookup: Lookup) -> list[Note]:
    """How rows were timed, and which of the timings compare."""
    selection = lookup.selection
    if not selection.table.timed:
        return []
    timed = [row for row in selection.networks if selection.timing_of(row)]

    # systems whose input differs from the baseline's
    first = selection.costs_of(selection.table.baseline)[0]
    shapes = {(cost.size, cost.channels) for row in timed for cost in selection.costs_of(row)}
    others = ""
    if shapes - {(first.size, first.channels)}:
        others = " A system with another input is timed at its own, with all its networks."
    texts = [
        f"throughput: inference at {_input_shape(selection)} in fp32 without TF32, attention "
        f"unfused, ± half the interquartile range.{others} rel.: the ratio to "
        f"{selection.table.baseline.label}, timed in turn."
    ]
    if selection.table.published:
        texts[0] += (
            " The paper timed under PyTorch's defaults: TF32 in convolutions, but not in linear "
            "layers."
        )
    notes = [Note(NoteKind.SPEED, text) for text in texts]

    # what the timings say about themselves
    records = [(row.label, lookup.timing(row)) for row in timed]
    notes += timing_caveats(
        [(label, record) for label, record in records if record and record.status == "done"]
    )
    if selection.device != "cuda" and any(row.heavy for row in timed):
        text = (
            "Large networks take minutes to time on a CPU. They are timed only if --rows names "
            "them, and are gaps otherwise."
        )
        notes.append(Note(NoteKind.SPEED, text))
    return notes


def _input_shape(selection: Selection) -> str:
    first = selection.costs_of(selection.table.baseline)[0]
    return f"{first.size}x{first.size}x{first.channels}"


def score_notes(lookup: Lookup, store: Store) -> list[Note]:
    """How rows were scored, which differences are resolved, and what the records warn of."""
    selection = lookup.selection
    scores = {row.label: lookup.score_values(row) for row in selection.networks}
    notes = [Note(NoteKind.SCORES, describe_scores(selection.protocol, selection.seeds))]

    # rows that cannot be told apart under this protocol
    stages = {spec_id(run.stage) for run in selection.with_seeds([0]).runs}
    if len(stages) < len(selection.networks):
        text = f"Rows that are one network on {selection.protocol.name} share its runs and scores."
        notes.append(Note(NoteKind.SCORES, text))

    hidden = [row.label for row in selection.networks if lookup.by_unknown_features(row)]
    if hidden:
        text = f"Scored by unknown Inception weights, and not shown: {', '.join(hidden)}."
        notes.append(Note(NoteKind.SCORES, text))

    # what the scores resolve, and on which conditions
    notes += _seed_notes(lookup)
    resolved = describe_comparison(compare_with_baseline(lookup, store))
    if resolved:
        notes.append(Note(NoteKind.SCORES, resolved))
    notes += outlier_caveats(ranking_score(selection.protocol.features).key, scores)
    notes += evaluation_counts(scores)
    return notes + unrecorded_caveats(lookup.all_scored())


HELDOUT = (
    "held-out loss: the averaged network's noise error on test images, as the geometric mean over "
    "nine unit bins of log SNR. It uses no features and no samples."
)

CAPTIONS = (
    "all: every named cell holds its digit, as a judge reads it. digit: the share of right cells. "
    "layout: no named cell is blank, and nothing lies outside of them. swapped: two digits in each "
    "other's place. pairs held out: compositions of which no image is trained on. real images: "
    "canvases of the same captions, made of digits that neither networks nor judge have seen."
)


def describe_scores(protocol: Protocol, seeds: Sequence[int]) -> str:
    """A protocol's scores and their errors, in sentences."""
    if len(seeds) == 1:
        error = "±: the sampling standard error; there is one training seed."
    else:
        error = (
            "±: the standard error of the mean over training seeds; in a row with one seed, the "
            "sampling standard error."
        )

    # FID is known by its name, and a score of another network's features is explained.
    if protocol.features == "inception":
        no_bias = "no bias: FID without what a finite number of images adds."
        return f"{protocol.name}: {protocol.num} images. {error} {no_bias}"
    heldout = "" if protocol.heldout is None else f" {HELDOUT}"
    captions = f" {CAPTIONS}" if protocol.features == DIGITS_TEXT else ""
    distance = distance_score(protocol.features).name
    return (
        f"{protocol.name}: {protocol.recipe.steps} steps of {protocol.recipe.batch}, "
        f"{protocol.num} images.{heldout}{captions} The scores use the features of a small "
        f"classifier, not Inception's: {distance} is no FID, and compares with no other protocol's "
        f"score. {error}"
    )


def _seed_notes(lookup: Lookup) -> list[Note]:
    """Rows with fewer training seeds than were chosen."""
    total = len(lookup.selection.seeds)
    labels: dict[int, list[str]] = {}
    for row in lookup.selection.networks:
        labels.setdefault(len(lookup.scored(row)), []).append(row.label)
    return [
        Note(NoteKind.SEEDS, f"{count} of {total} seeds: {', '.join(labels[count])}.")
        for count in sorted(labels)
        if 0 < count < total
    ]


def row_notes(selection: Selection) -> list[Note]:
    """What the declaration says of single rows, once if it says it of several."""
    labels: dict[str, list[str]] = {}
    for row in selection.rows:
        if row.note:
            labels.setdefault(row.note, []).append(row.label)
    return [Note(NoteKind.ROWS, f"{', '.join(names)}: {note}.") for note, names in labels.items()]


def record_notes(lookup: Lookup, with_measurements: bool, with_scores: bool) -> list[Note]:
    """Failed stages, and what the records behind a table say of their machines and trees.

    Args:
        lookup: where the records are.
        with_measurements: whether the table shows counts and timings.
        with_scores: whether the table shows scores.
    """
    shown: list[Record] = []
    notes: list[Note] = []
    for row in lookup.selection.counted:
        stages: list[Stage] = lookup.measured_stages(row) if with_measurements else []
        if with_scores:
            stages += [stage for run in lookup.selection.runs_of(row) for stage in run.stages]

        # a stage is shown by its latest success, or else reported as failed
        for stage in stages:
            record = lookup.folder.latest(stage)
            failure = lookup.failure(stage)
            if record:
                shown.append(record)
            elif failure:
                text = f"{row.label}: {failure.kind} failed: {failure.error}"
                notes.append(Note(NoteKind.FAILURE, text))
    return notes + run_caveats(lookup.all_scored() if with_scores else [], shown)
