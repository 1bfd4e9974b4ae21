"""Figures 4, 5 and 7 of the DiCo paper on digits, from the arrays that probes left.

A network without a record is named, not drawn. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.figures.labels import Point, label_lines
from analysis.figures.style import Style, below, figure, palette
from analysis.probes.declared import arrays_of, declared, series_of
from experiments.ablation import DICO_S, TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.stages import Protocol
from experiments.main_results import TABLE_1

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIT = TABLE_3.row("DiT (iso.)")
WITHOUT_CCA = TABLE_4.row("w/o CCA")
LOCAL_ROWS = (
    DIT,
    TABLE_4.row("CM->Self-Attn"),
    TABLE_4.row("CM->Window Attn"),
    TABLE_4.row("CM->Focused Linear Attn"),
    TABLE_4.row("CM->Agent Attn"),
    TABLE_1.row("DiG-XL/2"),
    TABLE_1.row("DiS-H/2"),
    TABLE_1.row("DiM-H"),
    WITHOUT_CCA,
    DICO_S,
)
CHANNEL_ROWS = (DIT, WITHOUT_CCA, DICO_S)
FEATURE_ROWS = (WITHOUT_CCA, DICO_S)
# Kinds of weights that are a mixer's own, and the kinds of series that the locality figure
# compares.
WEIGHTS = ("attention", "implied attention", "receptive field")
COMPARED = {
    "own weights": WEIGHTS,
    "mixer's input gradient": ("input gradient",),
    "whole network's gradient": ("network gradient",),
}
MAPS = 5  # layers of a network whose maps are drawn


@dataclass(frozen=True)
class Probed:
    """A row that was probed."""

    label: str
    arrays: dict[str, np.ndarray]
    # The scalars of the record.
    values: dict[str, Any]

    def relative_distance(self, series: int) -> float:
        """Return the mean distance at which tokens look over that of uniform weights."""
        distance = self.arrays[f"values_{series}"][..., 0]
        return (distance / self.arrays[f"uniform_{series}"][0]).mean()


def load_probed(
    probe: str, rows: tuple[Row, ...], store: Store, protocol: Protocol = DIGITS
) -> tuple[list[Probed], list[str]]:
    """Return the rows with a reference record, and a remark on the others.

    Raises:
        ValueError: if no row has a record.
    """
    probed, missing = [], []
    for row in rows:
        record = store.reference.latest(declared(probe, row, protocol, seed=0))
        if record:
            probed.append(Probed(row.label, arrays_of(store.reference, record), record.values))
        else:
            missing.append(row.label)
    if not probed:
        raise ValueError(f"no reference record of {probe} on {protocol.name}")
    return probed, [f"no record: {', '.join(missing)}"] if missing else []


def attention_maps(store: Store) -> Figure:
    """Figure 4, on digits: the weights of each anchor token (red) in up to five layers of each
    network, as means over heads, images and sampling steps. Attention is the softmax's own. Implied
    attention is the factor that linear, agent and gated linear attention and Mamba put on the
    values.
    A convolution's map is its kernel. Each network has its small size and one training seed."""
    probed, remarks = load_probed("locality", LOCAL_ROWS, store)
    anchors = max(len(each.arrays["anchors_0"]) for each in probed)
    width, height = anchors * MAPS + 0.8, 1.26 * len(probed) + 0.5
    drawing, axes = figure(width, height, len(probed), MAPS, squeeze=False)

    # Each network has a row of panels, one for each map.
    for panels, each in zip(axes, probed, strict=True):
        draw_maps(panels, each)
    drawing.suptitle(
        f"Where a token (red) looks, {DIGITS.name}: "
        "each map from 0 (white) to its largest weight (dark)\n"
        "title: layer, grid, mean distance over that of uniform weights",
        fontsize=9,
    )
    below(drawing, remarks)
    return drawing


def draw_maps(panels: Sequence[Axes], probed: Probed) -> None:
    """Draw a network's maps in a line of panels, one per layer with its anchors side by side.

    Panels that are left over stay empty.
    """
    import numpy as np

    for panel in panels:
        panel.set_axis_off()

    # Layers evenly spaced over the network, from those whose grids are large enough to see.
    arrays = probed.arrays
    layers = [p for p in series_of(arrays, WEIGHTS) if arrays[f"grid_{p}"].min() > 2]
    count = min(MAPS, len(layers))
    shown = [layers[round(place)] for place in np.linspace(0, len(layers) - 1, count)]
    for panel, series in zip(panels, shown, strict=False):
        _draw_layer(panel, probed, series)

    if shown:
        middle: Style = dict(
            rotation=90, ha="right", va="center", multialignment="center", fontsize=7
        )
        text = f"{probed.label}\n{arrays[f'kind_{shown[0]}']}"
        panels[0].text(-0.1, 0.5, text, transform=panels[0].transAxes, **middle)


def _draw_layer(panel: Axes, probed: Probed, series: int) -> None:
    """Draw the maps of one layer, a frame around each and a red one around its token."""
    from matplotlib.patches import Rectangle

    arrays = probed.arrays
    maps = arrays[f"maps_{series}"].astype(float).mean((0, 1))  # (A, H, W)
    count, height, width = maps.shape
    frame: Style = dict(fill=False, edgecolor="0.7", linewidth=0.6, clip_on=False)
    red_frame: Style = dict(fill=False, edgecolor="red", linewidth=1.2)
    for number, (weights, anchor) in enumerate(zip(maps, arrays[f"anchors_{series}"], strict=True)):
        left = number * 1.1 * width
        row, column = anchor
        panel.imshow(weights, cmap="Blues", vmin=0, extent=(left, left + width, height, 0))
        panel.add_patch(Rectangle((left, 0), width, height, **frame))
        panel.add_patch(Rectangle((left + column, row), 1, 1, **red_frame))
    panel.set_xlim(0, (1.1 * count - 0.1) * width)

    name = _short_name(str(arrays[f"layer_{series}"]))
    relative = probed.relative_distance(series)
    panel.set_title(f"{name}\n{height}x{width}, {relative:.2f}", fontsize=7)


def _short_name(layer: str) -> str:
    """Return a layer's name without the words that all layers share."""
    return re.sub(r"^transformer_|_level|\.(mixer|attn1?)$", "", layer)


def locality(store: Store) -> Figure:
    """Figure 4 in numbers, one scale for all mixers, on digits. Left: the mean distance at which a
    token looks over that of uniform weights, by the mixers' own weights (Mamba's with its skip), by
    the gradient of a mixer's output and by that of the whole network's output. Right: the share of
    an output pixel's gradient within a distance of it. Each network has its small size and one
    training
    seed."""
    probed, remarks = load_probed("locality", LOCAL_ROWS, store)
    height = 0.46 * len(probed) + 1.7
    drawing, (left, right) = figure(8.6, height, 1, 2, width_ratios=(1.25, 1))
    _draw_distances(left, probed)
    legend: Style = dict(loc="outside lower left", ncols=3, frameon=False)
    drawing.legend(*left.get_legend_handles_labels(), **legend)
    _draw_shares(right, probed)
    below(drawing, remarks)
    return drawing


def _draw_distances(axes: Axes, probed: list[Probed]) -> None:
    """Draw the relative distances of all layers (strokes) and their mean (symbol) by kind."""
    colors = palette(COMPARED)
    for number, (name, kinds) in enumerate(COMPARED.items()):
        for place, each in enumerate(probed):
            distances = [each.relative_distance(p) for p in series_of(each.arrays, kinds)]
            height = place + 0.22 * (number - 1)
            strokes: Style = dict(color=colors[name], markersize=5, alpha=0.5)
            axes.plot(distances, [height] * len(distances), "|", **strokes)
            mean = sum(distances) / len(distances)
            label = name if place == 0 else None
            axes.plot(mean, height, "osD"[number], color=colors[name], markersize=5, label=label)

    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    names = [
        f"{each.label}\n({each.arrays[f'kind_{series_of(each.arrays, WEIGHTS)[0]}']})"
        for each in probed
    ]
    axes.set_yticks(range(len(probed)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel(
        "mean distance / that of uniform weights (dashed)\nstrokes: layers; symbols: their mean"
    )
    axes.set_title(f"Locality on one scale, {DIGITS.name}, one training seed")


def _draw_shares(axes: Axes, probed: list[Probed]) -> None:
    """Draw the share of an output pixel's gradient within a distance.

    The curves part at distance 0 and meet at the far end, so their labels stand on the left.
    """
    ends = []
    for label, color in palette(each.label for each in probed).items():
        (each,) = [each for each in probed if each.label == label]
        (series,) = series_of(each.arrays, COMPARED["whole network's gradient"])
        share = each.arrays[f"mass_{series}"].mean((0, 1))
        axes.plot(range(len(share)), share, marker=".", color=color, label=label)
        ends.append(Point(label, 0, share[0], color))
        uniform = each.arrays[f"uniform_mass_{series}"]
    dashed: Style = dict(color="black", linestyle="--", linewidth=0.8)
    axes.plot(range(len(uniform)), uniform, label="uniform", **dashed)
    ends.append(Point("uniform", 0, uniform[0], (0.0, 0.0, 0.0)))
    axes.set_xlabel("distance from the output pixel, pixels")
    axes.set_ylabel("share of its gradient within")
    axes.set_ylim(0, 1.02)
    axes.set_title("What an output pixel depends on")
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    label_lines(axes, ends, side="left")


def channel_activation(store: Store) -> Figure:
    """Figure 5, on digits: activation (ReLU, then the mean over an image) of every channel that the
    last mixer puts out, sorted, in units of the layer's mean; in DiT, without and with CCA. Each
    network has its small size and one training seed."""
    import numpy as np

    probed, remarks = load_probed("channels", CHANNEL_ROWS, store)
    width = 2.7 * len(probed) + 0.3
    drawing, axes = figure(width, 3.1, 1, len(probed), sharey=True, squeeze=False)
    colors = palette(each.label for each in probed)
    for panel, each in zip(axes[0], probed, strict=True):
        mean = each.arrays["activation"].mean(0)
        relative = np.sort(mean / mean.mean())[::-1]
        places = range(len(relative))
        panel.bar(places, relative, width=1, color=colors[each.label], linewidth=0)
        panel.axhline(0.1, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(
            f"{each.label}, {len(relative)} channels\n"
            f"near-dead {each.values['near_dead']:.0%}, "
            f"effective rank {each.values['effective_rank']:.1f}\n"
            f"mean |correlation| {each.values['correlation']:.2f}",
            fontsize=8,
        )
        panel.set_xlabel("channel, sorted")
        panel.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("mean of relu / the layer's mean")
    drawing.suptitle(
        f"Channel activation of the last mixer, {DIGITS.name}, mean over images and steps\n"
        "dashed: a tenth of the mean; a channel below it in a step is near-dead in that step, "
        "and shares are means over steps",
        fontsize=8,
    )
    below(drawing, remarks)
    return drawing


def feature_maps(store: Store) -> Figure:
    """Figure 7, on digits: all channels that the first stage puts out for one image in the middle
    of its sampling, without and with CCA, on one colour scale per network. Each network has its
    small size and one training seed."""
    probed, remarks = load_probed("features", FEATURE_ROWS, store)
    drawing, _ = figure(4.1 * len(probed), 3.6, 1, 1)
    drawing.clear()

    # Each network has a panel of its own, with its own colour scale.
    panels = drawing.subfigures(1, len(probed), squeeze=False)[0]
    for panel, each in zip(panels, probed, strict=True):
        _draw_features(panel, each)
    below(
        drawing,
        [
            f"Output of the first stage, {DIGITS.name}. Colours reach from -q to q, the 99th "
            "percentile of |x| over the maps shown of a network; figures are over all images and "
            "steps.",
            *remarks,
        ],
    )
    return drawing


def _draw_features(panel: Any, probed: Probed) -> None:
    """Draw the first image's channels at the middle timestep, in a grid of maps."""
    import numpy as np

    arrays = probed.arrays
    step = len(arrays["timesteps"]) // 2
    maps = arrays["maps"][step].astype(float)
    columns = int(np.ceil(np.sqrt(len(maps) * 1.4)))
    rows = -(-len(maps) // columns)
    limit = np.quantile(np.abs(maps), 0.99)

    cells = panel.subplots(rows, columns, squeeze=False).ravel().tolist()
    for cell in cells:
        cell.set_axis_off()
    for cell, channel in zip(cells, maps, strict=False):
        cell.imshow(channel, cmap="RdBu_r", vmin=-limit, vmax=limit)
    panel.suptitle(
        f"{probed.label}: {len(maps)} channels at t = {arrays['timesteps'][step]:g}\n"
        f"mean |correlation| {probed.values['correlation']:.2f}, "
        f"effective rank {probed.values['effective_rank']:.1f}",
        fontsize=8,
    )
