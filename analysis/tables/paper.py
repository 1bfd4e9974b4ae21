"""The tables under results/tables: published numbers beside the committed records'. No torch.

Differences are given if both sides measure the same thing: parameters, Gflops, recipes, a GPU's
throughput, scores under one protocol. Scores on digits and a CPU's throughput stand beside the
paper's without a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from analysis.query import ReferenceStore
from analysis.tables.ablations import (
    ablation_sheet,
    captioned_sheet,
    related_sheet,
    small_savings_sheet,
    small_sheet,
    words_sheet,
)
from analysis.tables.caveats import add_caveats
from analysis.tables.progress import progress_sheet
from analysis.tables.recipes import recipe_sheet
from analysis.tables.speeds import (
    measured_latency_sheet,
    predicted_cpu_sheet,
    predicted_inference_sheet,
    predicted_latencies_sheet,
    predicted_memory_sheet,
    predicted_speed_ups_sheet,
    predicted_throughput_sheet,
    small_speed_sheet,
    stored_weights_sheet,
    throughput_sheet,
)
from analysis.tables.systems import families_sheet, systems_sheet
from experiments import main_results, related
from experiments.ablation import TABLES
from experiments.declared import timings
from experiments.declared.systems import IMAGES, SYSTEMS
from experiments.engine.reporting.efficiency.counts import counts_sheet
from experiments.engine.reporting.efficiency.images import images_sheet
from experiments.engine.reporting.sheet import Sheet
from experiments.text_to_image import TABLE_DISTILLATION, TABLE_V2_3


def committed_counts_sheet(store: ReferenceStore) -> Sheet:
    """Parameters and Gflops of all compared systems."""
    return add_caveats(counts_sheet(SYSTEMS, store, store.reference))


def committed_images_sheet(store: ReferenceStore) -> Sheet:
    """What one guided image costs."""
    return add_caveats(images_sheet(IMAGES, store, store.reference))


SHEETS: dict[str, Callable[[ReferenceStore], Sheet]] = {
    "table1": partial(systems_sheet, main_results.TABLE_1, 256),
    "table2": partial(systems_sheet, main_results.TABLE_2, 512),
    **{f"table{number}": partial(ablation_sheet, table) for number, table in TABLES.items()},
    "table6": recipe_sheet,
    "table7": progress_sheet,
    "table8": partial(systems_sheet, main_results.TABLE_8, 256),
    "table9": partial(systems_sheet, main_results.TABLE_9, 512),
    **{f"table{name}": partial(related_sheet, table) for name, table in related.TABLES.items()},
    "tablerelated_weights": stored_weights_sheet,
    "tablerelated-small": partial(small_sheet, related.RELATED_SMALL),
    "tableautoregressive": partial(small_sheet, related.AUTOREGRESSIVE),
    "tablerelated-small_savings": small_savings_sheet,
    **{f"tablerelated-speed_{task}": partial(small_speed_sheet, task) for task in timings.TASKS},
    "tablev2-3": partial(captioned_sheet, TABLE_V2_3),
    "distillation": partial(captioned_sheet, TABLE_DISTILLATION),
    "tablev2-3_binding": partial(words_sheet, TABLE_V2_3),
    "families": families_sheet,
    "counts": committed_counts_sheet,
    "images": committed_images_sheet,
    **{f"speed_{task}": partial(throughput_sheet, task) for task in timings.TASKS},
    "latency": measured_latency_sheet,
    "predicted_claims": predicted_speed_ups_sheet,
    **{f"predicted_{task}": partial(predicted_throughput_sheet, task) for task in timings.TASKS},
    "predicted_latency": predicted_latencies_sheet,
    "predicted_cpu": predicted_cpu_sheet,
    "memory": predicted_memory_sheet,
    "inference_memory": predicted_inference_sheet,
}
