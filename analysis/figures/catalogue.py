"""Every figure by the name of its file. A figure's docstring is its caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from analysis.figures import (
    captions,
    efficiency,
    field,
    modes,
    probes,
    runtime,
    throughput,
    tradeoffs,
    training,
)
from analysis.query import ReferenceStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[ReferenceStore], Figure]] = {
    "figure2_fid_throughput": throughput.fid_against_throughput,
    "figure3_runtime": runtime.runtime,
    "figure8_scores_over_training": training.scores_over_training,
    "figure9_losses": training.losses,
    "table3_score_speed": tradeoffs.table3_score_speed,
    "table4_score_speed": tradeoffs.table4_score_speed,
    "seed_spread": tradeoffs.seed_spread,
    "training_efficiency": efficiency.training_efficiency,
    "pareto": tradeoffs.pareto,
    "field_map": field.field_map,
    "numeric_modes": modes.numeric_modes,
    "figure4_maps": probes.attention_maps,
    "figure4_locality": probes.locality,
    "figure5_channels": probes.channel_activation,
    "figure7_features": probes.feature_maps,
    "caption_maps": captions.caption_maps,
    "caption_cells": captions.caption_cells,
}
