"""Throughput and latency in every numeric mode, timed and predicted, and memory. No torch."""

from __future__ import annotations

from analysis.query import ReferenceStore, latest
from analysis.tables.caveats import add_caveats
from experiments import efficiency, main_results, related
from experiments.declared import memory, timings
from experiments.engine.reporting.efficiency.inference.sheets import (
    inference_sheet,
    latency_sheet,
    predicted_latency_sheet,
)
from experiments.engine.reporting.efficiency.inference.stored import stored_sheet
from experiments.engine.reporting.efficiency.memory import read_needs
from experiments.engine.reporting.efficiency.memory_sheet import memory_sheet
from experiments.engine.reporting.efficiency.predicted_sheets import (
    cpu_sheet,
    predicted_claims_sheet,
    predicted_sheet,
)
from experiments.engine.reporting.efficiency.predictions import read_predictions
from experiments.engine.reporting.efficiency.speed import speed_sheet
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.rows import Row


def throughput_sheet(task: str, store: ReferenceStore) -> Sheet:
    """The rows that were timed on a GPU or, as long as none was, on a CPU; else gaps.

    Args:
        task: one of the declared TASKS.
        store: the committed records.
    """
    table = main_results.TABLE_1
    device = "cuda" if rows_in_modes("cuda", task, store) else "cpu"
    rows = rows_in_modes(device, task, store)
    if not rows:
        rows = [row for row in table.rows if row.backbone and not row.heavy]
    timed = timings.timed_table(table, rows, device, task)
    return add_caveats(speed_sheet(timed, store, store.reference))


def rows_in_modes(device: str, task: str, store: ReferenceStore) -> list[Row]:
    """Table 1's rows that were timed in some numeric mode of a device."""
    table = main_results.TABLE_1
    timed = []
    for row in table.rows:
        if row.backbone:
            stages = timings.stages(table, [row], device, task, named=True)
            if any(latest(stages, store)):
                timed.append(row)
    return timed


def predicted_throughput_sheet(task: str, store: ReferenceStore) -> Sheet:
    """What was predicted on GPUs, beside the paper and what was measured."""
    rows = efficiency.predicted_rows(store)
    predictions = read_predictions(store.root)
    return predicted_sheet(task, rows, predictions, store.root, store.reference)


def predicted_memory_sheet(store: ReferenceStore) -> Sheet:
    """What memory trainings need, and what fits a card."""
    needs = read_needs(store.root)
    rows = memory.memory_rows(efficiency.PREDICTED)
    return memory_sheet(rows, needs, efficiency.MEMORY_ASKED)


def measured_latency_sheet(store: ReferenceStore) -> Sheet:
    """One image's latency on a GPU or, as long as none was measured, on a CPU; else gaps."""
    for device in ("cuda", "cpu"):
        declared = efficiency.latency_rows(device)
        rows = [row for row in declared if any(latest(list(row.stages.values()), store))]
        if rows:
            break
    return add_caveats(latency_sheet(rows or declared, device, store.root, store.reference))


def stored_weights_sheet(store: ReferenceStore) -> Sheet:
    """Memory and time of ternary networks, in full precision and packed."""
    table = related.TERNARY
    declared = timings.latency_rows(table, table.rows, "cpu")
    stages = {row.label: row.stages["fp32"] for row in declared}
    return add_caveats(stored_sheet(table, stages, store, store.reference))


def small_speed_sheet(task: str, store: ReferenceStore) -> Sheet:
    """The speed of small networks of related systems, as they are trained."""
    table = related.SMALL_SPEED
    timed = timings.timed_table(table, table.rows, "cpu", task)
    return add_caveats(speed_sheet(timed, store, store.reference))


def predicted_latencies_sheet(store: ReferenceStore) -> Sheet:
    """One image's latency as predicted on GPUs, beside what was measured."""
    rows = efficiency.latency_rows()
    return predicted_latency_sheet(rows, store.root, store.reference)


def predicted_inference_sheet(store: ReferenceStore) -> Sheet:
    """What memory inference needs, beside what was measured."""
    return inference_sheet(efficiency.latency_rows(), store.root, store.reference)


def predicted_cpu_sheet(store: ReferenceStore) -> Sheet:
    """The same model on the CPU of the committed timings."""
    rows = efficiency.predicted_on_cpu(store)
    return cpu_sheet(rows, read_predictions(store.root), store.reference)


def predicted_speed_ups_sheet(store: ReferenceStore) -> Sheet:
    """The paper's speed-ups as predicted, in equal numeric modes too."""
    claims = [claim for claim in store.rows("claims.csv") if claim["metric"] == "throughput"]
    return predicted_claims_sheet(claims, read_predictions(store.root), store.root)
