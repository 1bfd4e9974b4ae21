"""From which places of the image the tokens of a caption are read. No torch.

A network without a record is named, not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from analysis.figures.probes import Probed, load_probed
from analysis.figures.style import Style, below, figure, palette
from analysis.probes.declared import declared
from experiments.declared.protocols import DIGITS_TEXT
from experiments.engine.data.captioned import grammar
from experiments.engine.records.store import Store
from experiments.text_to_image import TABLE_V2_3

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = tuple(
    TABLE_V2_3.row(label)
    for label in ("DiCo-CrossAttn", "SD 1.x", "BK-SDM-Base", "BK-SDM-Small", "SDXL", "KOALA-1B")
)
WIDTH = 8.6  # of the figures, in inches


def caption_maps(store: Store) -> Figure:
    """Where each word of a caption is read from, on digits_text: the weight of the word at every
    place of the canvas, as a mean over heads, sampling steps and layers, from 0 (white) to the
    largest weight of the map (dark). The begin stands before the words. Red frames are the cells in
    which captions put the digits of their words. Each network has its small size and one training
    seed."""
    if not _has_records(store):
        return _without_records()
    probed, remarks = load_probed("tokens", ROWS, store, DIGITS_TEXT)
    captions = grammar.captions_of(DIGITS_TEXT.data.name)
    lines = [
        (each, place, captions[caption])
        for each in probed
        for place, caption in enumerate(each.arrays["shown"])
    ]
    drawing, axes = figure(WIDTH, 1.25 * len(lines) + 0.6, len(lines), 7, squeeze=False)

    # A line of panels for each network and caption, one for each token.
    for panels, (each, place, caption) in zip(axes, lines, strict=True):
        for panel in panels:
            panel.set_axis_off()
        maps = _whole_maps(each, place)
        words = ["[begin]", *caption.text.split()]
        corners = iter(caption.corners)
        for panel, word, weights in zip(panels, words, maps, strict=False):
            corner = next(corners) if word in grammar.DIGITS else None
            _draw_word(panel, word, weights, corner)
        middle: Style = dict(rotation=90, ha="right", va="center", fontsize=7)
        panels[0].text(-0.1, 0.5, each.label, transform=panels[0].transAxes, **middle)
    drawing.suptitle(f"From where the words of a caption are read, {DIGITS_TEXT.name}", fontsize=9)
    below(drawing, remarks)
    return drawing


def _has_records(store: Store) -> bool:
    specs = [declared("tokens", row, DIGITS_TEXT, seed=0) for row in ROWS]
    return any(store.reference.latest(spec) for spec in specs)


def _without_records() -> Figure:
    """Return a figure that names the command that makes its records."""
    drawing, axes = figure(WIDTH, 1.2, 1, 1)
    axes.set_axis_off()
    command = "python -m analysis.probes tokens --table v2-3 --protocol digits_text"
    axes.text(0.5, 0.5, f"no records yet: {command} --rows ...", ha="center", va="center")
    return drawing


def _layers(arrays: dict[str, np.ndarray]) -> Iterator[int]:
    """Yield the numbers of a record's layers."""
    yield from range(sum(name.startswith("layer_") for name in arrays))


def _whole_maps(probed: Probed, place: int) -> np.ndarray:
    """Return a caption's maps (L, H, W) on the canvas, as a mean over the layers.

    A place of a coarse grid stands for a square of pixels.
    """
    import numpy as np

    whole = []
    for layer in _layers(probed.arrays):
        maps = probed.arrays[f"maps_{layer}"][place].astype(float)
        times = grammar.SIZE // maps.shape[-1]
        whole.append(np.kron(maps, np.ones((1, times, times))))
    mean: np.ndarray = np.mean(whole, axis=0)
    return mean


def _draw_word(panel: Axes, word: str, weights: np.ndarray, corner: tuple[int, int] | None) -> None:
    from matplotlib.patches import Rectangle

    size = grammar.SIZE
    panel.imshow(weights, cmap="Blues", vmin=0, extent=(0, size, size, 0))
    frame: Style = dict(fill=False, edgecolor="0.7", linewidth=0.6)
    panel.add_patch(Rectangle((0, 0), size, size, **frame))
    if corner:
        row, column = corner
        red: Style = dict(fill=False, edgecolor="red", linewidth=1.2)
        panel.add_patch(Rectangle((column, row), grammar.CELL, grammar.CELL, **red))
    panel.set_title(f"{word} ({weights.mean():.2f})", fontsize=7)


def caption_cells(store: Store) -> Figure:
    """Whether the word of a digit is read from the digit's cell, on digits_text. Left, by layer:
    the share of the word's map in its own cell (filled) and in the cell of the other digit (open),
    as means over heads, steps and captions of two digits; dashed is the share of a uniform map.
    Right: the own cell's share over the sampling, as a mean over layers. Each network has its small
    size and one training seed."""
    if not _has_records(store):
        return _without_records()
    probed, remarks = load_probed("tokens", ROWS, store, DIGITS_TEXT)
    drawing, (left, right) = figure(WIDTH, 3.4, 1, 2, sharey=True)
    for label, color in palette(each.label for each in probed).items():
        (each,) = [each for each in probed if each.label == label]
        layers = each.values["layers"].values()
        places = [number / max(1, len(layers) - 1) for number in range(len(layers))]
        line: Style = dict(color=color, markersize=4)
        left.plot(places, [layer["own"] for layer in layers], "-o", label=label, **line)
        left.plot(places, [layer["other"] for layer in layers], ":o", mfc="none", **line)
        right.plot(*_over_sampling(each), "-o", label=label, **line)

    # The same guess on both sides.
    for panel in (left, right):
        dashed: Style = dict(color="black", linewidth=0.8, linestyle="--")
        panel.axhline(probed[0].values["uniform"], **dashed)
    left.set_xlabel("place of the layer in the network (0: first, 1: last)")
    left.set_ylabel("share of a digit's word in a cell")
    left.set_ylim(0, None)
    right.set_xlabel("sampling (0: noise, 1: image)")
    right.legend(frameon=False, fontsize=7)
    drawing.suptitle(f"Is a digit's word read from its cell? {DIGITS_TEXT.name}", fontsize=9)
    below(drawing, remarks)
    return drawing


def _over_sampling(probed: Probed) -> tuple[list[float], np.ndarray]:
    """Return how far the sampling is at every step, and the own cell's share then."""
    import numpy as np

    arrays = probed.arrays
    pairs = arrays["groups"] != grammar.Group.SINGLE.value
    shares = np.mean([arrays[f"own_{layer}"][:, pairs].mean(1) for layer in _layers(arrays)], 0)
    return [step / max(1, len(shares) - 1) for step in range(len(shares))], shares
