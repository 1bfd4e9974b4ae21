"""Figures 4, 5 and 7 of the DiCo paper on digits, from the arrays that probes left. A network without a record is named, not drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.figures.style import colour, figure
from analysis.probes.declared import arrays_of, declared
from experiments.ablation import DICO_S, TABLE_3, TABLE_4
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.main_results import TABLE_1

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIT, WITHOUT_CCA = TABLE_3.row("DiT (iso.)"), TABLE_4.row("w/o CCA")
MIXERS = tuple(
    TABLE_4.row(label)
    for label in ("CM->Self-Attn", "CM->Window Attn", "CM->Focused Linear Attn", "CM->Agent Attn")
)
LOCAL_ROWS = (
    DIT,
    *MIXERS,
    *(TABLE_1.row(label) for label in ("DiG-XL/2", "DiS-H/2", "DiM-H")),
    WITHOUT_CCA,
    DICO_S,
)
CHANNEL_ROWS = (DIT, WITHOUT_CCA, DICO_S)
FEATURE_ROWS = (WITHOUT_CCA, DICO_S)
WEIGHTS = ("attention", "implied attention", "receptive field")
MAPS = 5

Found = list[tuple[str, dict[str, "np.ndarray"], dict[str, Any]]]


def _found(probe: str, rows: tuple[Row, ...], store: Store) -> tuple[Found, str]:
    """(label, arrays, values) of every row with a reference record, and words for the others; ValueError if there is none."""
    records = {
        row.label: store.reference.latest(declared(probe, row, DIGITS, seed=0)) for row in rows
    }
    found = [
        (label, arrays_of(store, record, store.reference), record.values)
        for label, record in records.items()
        if record
    ]
    if not found:
        raise ValueError(f"no reference record of {probe} on {DIGITS.name}")
    missing = [label for label, record in records.items() if not record]
    return found, f"\n(no record: {', '.join(missing)})" if missing else ""


def attention_maps(store: Store) -> Figure:
    """Figure 4, on digits: the weights of each anchor token (red) in up to five layers of each network, mean over heads, images and steps of
    sampling. Attention is the softmax's own; implied attention is what linear, agent and gated linear attention and Mamba multiply
    the values with; of a convolution it is the kernel. Each network at its small size, one training seed."""
    found, missing = _found("locality", LOCAL_ROWS, store)
    anchors = max(len(arrays["anchors_0"]) for _, arrays, _ in found)
    made, axes = figure(
        anchors * MAPS + 0.8, 1.26 * len(found) + 0.5, len(found), MAPS, squeeze=False
    )
    for line, (label, arrays, _) in zip(axes, found, strict=True):
        _draw_maps(line, label, arrays)
    made.suptitle(
        f"Where a token (red) looks, {DIGITS.name}: each map from 0 (white) to its largest weight (dark)\n"
        f"title: layer, grid, mean distance over that of uniform weights{missing}",
        fontsize=9,
    )
    return made


def _draw_maps(line: Sequence[Axes], label: str, arrays: dict[str, np.ndarray]) -> None:
    """A network's maps in a line of panels, one a layer with its anchors side by side, those that are left over empty."""
    import numpy as np
    from matplotlib.patches import Rectangle

    for axis in line:
        axis.set_axis_off()
    parts = [p for p in _parts(arrays, WEIGHTS) if arrays[f"grid_{p}"].min() > 2]
    chosen = [parts[round(i)] for i in np.linspace(0, len(parts) - 1, min(MAPS, len(parts)))]
    for axis, p in zip(line, chosen, strict=False):
        maps = arrays[f"maps_{p}"].astype(float).mean((0, 1))
        count, height, width = maps.shape
        for left, shown, (row, place) in zip(
            np.arange(count) * 1.1 * width, maps, arrays[f"anchors_{p}"], strict=True
        ):
            axis.imshow(shown, cmap="Blues", vmin=0, extent=(left, left + width, height, 0))
            axis.add_patch(
                Rectangle(
                    (left, 0),
                    width,
                    height,
                    fill=False,
                    edgecolor="0.7",
                    linewidth=0.6,
                    clip_on=False,
                )
            )
            axis.add_patch(
                Rectangle((left + place, row), 1, 1, fill=False, edgecolor="red", linewidth=1.2)
            )
        axis.set_xlim(0, (1.1 * count - 0.1) * width)
        relative = (arrays[f"values_{p}"][..., 0] / arrays[f"uniform_{p}"][0]).mean()
        axis.set_title(f"{_short(arrays, p)}\n{height}x{width}, {relative:.2f}", fontsize=7)
    if chosen:
        words = f"{label}\n{arrays[f'kind_{chosen[0]}']}"
        line[0].text(
            -0.1,
            0.5,
            words,
            fontsize=7,
            rotation=90,
            transform=line[0].transAxes,
            ha="right",
            va="center",
            multialignment="center",
        )


def locality(store: Store) -> Figure:
    """Figure 4 in numbers, one scale for all mixers, on digits. Left: mean distance at which a token looks over that of uniform weights, by
    the mixers' own weights (Mamba's with its skip), by the gradient of a mixer's output and by that of the whole network's. Right: share
    of an output pixel's gradient within a distance of it. Each network at its small size, one training seed."""
    found, missing = _found("locality", LOCAL_ROWS, store)
    kinds = {
        "own weights": WEIGHTS,
        "mixer's input gradient": ("input gradient",),
        "whole network's gradient": ("network gradient",),
    }
    made, (left, right) = figure(8.6, 0.46 * len(found) + 1.7, 1, 2, width_ratios=(1.25, 1))
    for k, (name, of) in enumerate(kinds.items()):
        for y, (_, arrays, _) in enumerate(found):
            relative = [
                (arrays[f"values_{p}"][..., 0] / arrays[f"uniform_{p}"][0]).mean()
                for p in _parts(arrays, of)
            ]
            offset = y + 0.22 * (k - 1)
            left.plot(
                relative, [offset] * len(relative), "|", color=colour(k), markersize=5, alpha=0.5
            )
            left.plot(
                sum(relative) / len(relative),
                offset,
                "osD"[k],
                color=colour(k),
                markersize=5,
                label=name if y == 0 else None,
            )
    left.axvline(1, color="black", linewidth=0.8, linestyle="--")
    left.set_yticks(
        range(len(found)),
        [
            f"{label}\n({arrays[f'kind_{_parts(arrays, WEIGHTS)[0]}']})"
            for label, arrays, _ in found
        ],
        fontsize=7,
    )
    left.invert_yaxis()
    left.set_xlim(0, None)
    left.set_xlabel(
        "mean distance / that of uniform weights (dashed)\nstrokes: layers; symbols: their mean"
    )
    left.set_title(f"Locality on one scale, {DIGITS.name}, one training seed")
    made.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
    for line, (label, arrays, _) in enumerate(found):
        (p,) = _parts(arrays, ("network gradient",))
        mass = arrays[f"mass_{p}"].mean((0, 1))
        right.plot(range(len(mass)), mass, marker=".", color=colour(line % 10), label=label)
    right.plot(
        range(len(mass)),
        arrays[f"uniform_mass_{p}"],
        color="black",
        linestyle="--",
        linewidth=0.8,
        label="uniform",
    )
    right.set_xlabel("distance from the output pixel, pixels")
    right.set_ylabel("share of its gradient within")
    right.set_ylim(0, 1.02)
    right.set_title("What an output pixel depends on")
    right.legend(loc="lower right")
    if missing:
        made.suptitle(missing.strip(), fontsize=7)
    return made


def channel_activation(store: Store) -> Figure:
    """Figure 5, on digits: activation (ReLU, then the mean over an image) of every channel that the last mixer puts out, sorted, in units of
    the layer's mean; without and with CCA, and in DiT. Each network at its small size, one training seed."""
    found, missing = _found("channels", CHANNEL_ROWS, store)
    import numpy as np

    made, axes = figure(2.7 * len(found) + 0.3, 3.1, 1, len(found), sharey=True, squeeze=False)
    for k, (axis, (label, arrays, values)) in enumerate(zip(axes[0], found, strict=True)):
        mean = arrays["activation"].mean(0)
        relative = np.sort(mean / mean.mean())[::-1]
        axis.bar(range(len(relative)), relative, width=1, color=colour(k), linewidth=0)
        axis.axhline(0.1, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(
            f"{label}, {len(relative)} channels\nnear-dead {values['near_dead']:.0%}, effective rank {values['effective_rank']:.1f}\n"
            f"mean |correlation| {values['correlation']:.2f}",
            fontsize=8,
        )
        axis.set_xlabel("channel, sorted")
        axis.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("mean of relu / the layer's mean")
    made.suptitle(
        f"Channel activation of the last mixer, {DIGITS.name}, mean over images and steps\ndashed: a tenth of the mean; a channel below it in a step counts as near-dead there, shares are means over steps{missing}",
        fontsize=8,
    )
    return made


def feature_maps(store: Store) -> Figure:
    """Figure 7, on digits: all channels that the first stage puts out for one image in the middle of its sampling, without and with CCA, on
    one colour scale a network. Each network at its small size, one training seed."""
    found, missing = _found("features", FEATURE_ROWS, store)
    import numpy as np

    made, _ = figure(4.1 * len(found), 3.6, 1, 1)
    made.clear()
    for part, (label, arrays, values) in zip(
        np.atleast_1d(made.subfigures(1, len(found))), found, strict=True
    ):
        step = len(arrays["timesteps"]) // 2
        maps = arrays["maps"][step].astype(float)
        columns = int(np.ceil(np.sqrt(len(maps) * 1.4)))
        limit = np.quantile(np.abs(maps), 0.99)
        cells: list[Axes] = (
            part.subplots(-(-len(maps) // columns), columns, squeeze=False).ravel().tolist()
        )
        for axis, shown in zip(cells, maps, strict=False):
            axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for axis in cells:
            axis.set_axis_off()
        part.suptitle(
            f"{label}: {len(maps)} channels at t = {arrays['timesteps'][step]:g}\n"
            f"mean |correlation| {values['correlation']:.2f}, effective rank {values['effective_rank']:.1f}",
            fontsize=8,
        )
    made.supxlabel(
        f"Output of the first stage, {DIGITS.name}; colours from -q to q, q the 99th percentile of |x| of the maps shown of each network; figures over all images and steps{missing}",
        fontsize=6.5,
    )
    return made


def _parts(arrays: dict[str, np.ndarray], kinds: tuple[str, ...]) -> list[int]:
    """Numbers of the parts of these kinds, without those on a grid of one token, in the order of the layers."""
    count = sum(name.startswith("kind_") for name in arrays)
    return [
        p
        for p in range(count)
        if str(arrays[f"kind_{p}"]) in kinds and arrays[f"grid_{p}"].prod() > 1
    ]


def _short(arrays: dict[str, np.ndarray], p: int) -> str:
    return re.sub(r"^transformer_|_level|\.(mixer|attn1?)$", "", str(arrays[f"layer_{p}"]))


FIGURES = {
    "figure4_maps": attention_maps,
    "figure4_locality": locality,
    "figure5_channels": channel_activation,
    "figure7_features": feature_maps,
}
