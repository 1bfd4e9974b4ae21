"""Measure where a network looks, per layer, head and timestep, beside uniform weights.

The measurement streams. A layer's weights are made for a few queries at a time while the network
runs, reduced to sums and dropped. Neither a T x T map nor the weights of two layers are ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.probes.declared import series_of
from analysis.probes.gradients import Estimator, Gradients
from analysis.probes.implied import KINDS, Weights
from analysis.probes.measures import MEASURES, distances, locality, radii, uniform
from analysis.probes.watch import Call, Grid, Layer, num_tokens, watching
from experiments.engine.numerics.randomness import generator_at

MIXER_GRADIENT = "input gradient"
NETWORK_GRADIENT = "network gradient"
ALL_KINDS = (*KINDS, MIXER_GRADIENT, NETWORK_GRADIENT)
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """How much of a network's weights is measured."""

    # Tokens of each grid whose weights are measured.
    queries: int
    # (row, column) fractions of a grid; the maps of the tokens there are kept.
    anchors: tuple[tuple[float, float], ...]
    # Tokens whose gradients are taken, each at the cost of backward passes; 0 for none.
    gradient_queries: int
    # Images whose gradients are taken.
    gradient_images: int
    # Random directions per gradient.
    directions: int
    # What a chunk of weights may take, in MiB.
    memory: int = 512


@dataclass(frozen=True)
class Source:
    """Where weights come from in a forward pass."""

    # Position among the calls of watched layers.
    index: int
    name: str
    grid: Grid


@dataclass
class Series:
    """One kind of weights of one source over the timesteps."""

    source: Source
    # The tokens that are measured.
    queries: Tensor
    # Per timestep: MEASURES (h, 3), masses (h, K) and maps (h, A, T).
    values: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)


class LocalityProbe:
    """A network (x, t, y) -> prediction whose layers are measured while it runs, unchanged.

    Raises:
        ValueError: if there is nothing to measure: no known layer and no gradients.
    """

    def __init__(self, model: nn.Module, watched: list[Layer], settings: Settings) -> None:
        if not any(layer.read for layer in watched) and not settings.gradient_queries:
            raise ValueError(
                f"{type(model).__name__} has no layer whose weights over tokens are known; "
                "ask for its gradients with --gradients"
            )
        self.model = model
        self.watched = watched
        self.settings = settings
        self.series: dict[tuple[str, int], Series] = {}
        self.timesteps: list[float] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.timesteps.append(float(t[0]))
        # Gradients come first: they need the most memory and may be refused.
        if self.settings.gradient_queries:
            self._network_gradient(x, t, y)
        with watching(self.watched, self._measure_call):
            return self.model(x, t, y)

    def _network_gradient(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Measure the gradient of the whole network's noise prediction."""
        images = slice(self.settings.gradient_images)
        channels = x.shape[1]
        height, width = x.shape[-2:]

        def predict_noise(x: Tensor) -> Tensor:
            copies = len(x) // len(t[images])
            steps = t[images].repeat_interleave(copies)
            labels = y[images].repeat_interleave(copies)
            return self.model(x, steps, labels)[:, :channels]

        source = Source(len(self.watched), "whole network", (height, width))
        self._measure_gradient(NETWORK_GRADIENT, source, predict_noise, x[images], None)

    def _measure_call(self, call: Call) -> None:
        """Measure a layer's own weights, and the gradient of its mixer."""
        x, *others = call.inputs
        source = Source(call.index, call.name, call.grid)
        if call.weights is not None:
            self._measure(source, call.weights, self.settings.queries, x.device)

        mix = call.layer.mix
        if self.settings.gradient_queries and mix is not None:
            self._measure_gradient(
                MIXER_GRADIENT,
                source,
                lambda x: mix(x, *others),
                x[: self.settings.gradient_images],
                None if x.ndim == 4 else call.place,
            )

    def _measure_gradient(
        self,
        kind: str,
        source: Source,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Tensor | None,
    ) -> None:
        generator = generator_at("probe", kind, source.index, len(self.timesteps))
        estimator = Estimator(self.settings.directions, generator)
        weights = Gradients(kind, f, x, place, estimator)
        self._measure(source, weights, self.settings.gradient_queries, x.device)

    def _measure(
        self, source: Source, weights: Weights | Gradients, count: int, device: torch.device
    ) -> None:
        """Append the measures of weights at `count` queries to their series."""
        grid = source.grid
        series = self.series.setdefault(
            (weights.kind, source.index), Series(source, some_queries(grid, count))
        )
        tokens = [anchor_token(grid, anchor) for anchor in self.settings.anchors]
        anchors = torch.tensor(tokens, device=device)
        queries = series.queries.to(device)

        try:
            values, mass = streamed(weights, grid, queries, self.settings.memory)
            maps = [weights.rows(head, anchors).mean(0) for head in range(weights.heads)]
        except ValueError as error:
            raise ValueError(f"{source.name} at t = {self.timesteps[-1]:g}: {error}") from None

        series.values.append(values.cpu())
        series.mass.append(mass.cpu())
        series.maps.append(torch.stack(maps).cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what was measured as flat arrays.

        Over S timesteps: timesteps (S,) and the names of the measures (3,). Of each series p:
        kind_p, layer_p, grid_p (2,), values_p (S, h, 3), mass_p (S, h, K), maps_p (S, h, A, H, W)
        as float16, the uniform weights' uniform_p (3,) and uniform_mass_p (K,), and anchors_p (A,
        2) as row, column.
        """
        out: dict[str, Any] = {
            "timesteps": np.array(self.timesteps),
            "measures": np.array(MEASURES),
        }
        in_order = sorted(self.series, key=lambda key: (ALL_KINDS.index(key[0]), key[1]))
        for p, key in enumerate(in_order):
            kind, _ = key
            arrays = self._series_arrays(self.series[key])
            arrays["kind"] = np.array(kind)
            out |= {f"{name}_{p}": array for name, array in arrays.items()}
        return out

    def _series_arrays(self, series: Series) -> dict[str, np.ndarray]:
        grid = series.source.grid
        values, mass = uniform(grid, series.queries)
        tokens = [anchor_token(grid, anchor) for anchor in self.settings.anchors]
        return {
            "layer": np.array(series.source.name),
            "grid": np.array(grid),
            "values": torch.stack(series.values).float().numpy(),
            "mass": torch.stack(series.mass).float().numpy(),
            "maps": torch.stack(series.maps).half().unflatten(-1, grid).numpy(),
            "uniform": values.float().numpy(),
            "uniform_mass": mass.float().numpy(),
            "anchors": np.array([divmod(token, grid[1]) for token in tokens]),
        }


def streamed(
    weights: Weights | Gradients, grid: Grid, queries: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """Return means over images and queries, made in chunks of `memory` MiB.

    Returns:
        MEASURES (h, 3), and masses (h, K).

    Raises:
        ValueError: if the memory does not hold one row.
    """
    # How many rows of weights fit in a chunk.
    images = len(weights.rows(0, queries[:1]))
    row_bytes = 8 * images * (weights.floats + 6 * num_tokens(grid))
    chunk = memory * MIB // row_bytes
    if chunk < 1:
        raise ValueError(
            f"one row of weights over {grid[0]}x{grid[1]} tokens of {images} images takes "
            f"{-(-row_bytes // MIB)} MiB, and {memory} MiB are allowed; probe fewer images, "
            "allow more with --memory, or take no gradients with --gradients 0"
        )

    # Of each head, the sum over its chunks.
    within = radii(grid).to(queries.device)
    means: list[Tensor] = []
    for head in range(weights.heads):
        sums = []
        for some in queries.split(chunk):
            values, mass = locality(weights.rows(head, some), distances(grid, some), within)
            sums.append(torch.cat([values, mass], dim=-1).mean(0).sum(0))
        means.append(torch.stack(sums).sum(0) / len(queries))

    both = torch.stack(means)
    return both[:, : len(MEASURES)], both[:, len(MEASURES) :]


def some_queries(grid: Grid, count: int) -> Tensor:
    """Return all tokens of a grid, or `count` of them if it has more: always the same ones."""
    tokens = num_tokens(grid)
    if tokens <= count:
        return torch.arange(tokens)
    order = torch.randperm(tokens, generator=generator_at("queries", *grid))
    return order[:count].sort().values


def anchor_token(grid: Grid, anchor: tuple[float, float]) -> int:
    """Return the token at a (row, column) fraction of a grid."""
    row, column = (
        min(int(fraction * length), length - 1)
        for fraction, length in zip(anchor, grid, strict=True)
    )
    return row * grid[1] + column


def summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return, per kind, the mean over timesteps, layers and heads of each measure.

    A measure is divided by its value for uniform weights, so that 1 means as spread as possible.
    `near` is the mass within one token of the query, `near_uniform` the same for uniform weights,
    and `parts` the number of heads. Grids of a single token are left out.
    """
    means: dict[str, Any] = {}
    for kind in ALL_KINDS:
        series = series_of(arrays, (kind,))
        if not series:
            continue

        relative = [
            (arrays[f"values_{p}"] / arrays[f"uniform_{p}"]).reshape(-1, len(MEASURES))
            for p in series
        ]
        # One value per timestep and head, so that a head weighs the same in both means.
        near = [arrays[f"mass_{p}"][..., 1].ravel() for p in series]
        near_uniform = [
            np.full(len(mass), arrays[f"uniform_mass_{p}"][1])
            for p, mass in zip(series, near, strict=True)
        ]

        values = [round(float(value), 5) for value in np.concatenate(relative).mean(0)]
        means[kind] = dict(zip(MEASURES, values, strict=True)) | {
            "near": round(float(np.concatenate(near).mean()), 5),
            "near_uniform": round(float(np.concatenate(near_uniform).mean()), 5),
            "parts": sum(arrays[f"values_{p}"].shape[1] for p in series),
        }
    return means


def probe(
    model: nn.Module,
    watched: list[Layer],
    settings: Settings,
    walk: Callable[[LocalityProbe], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the summary of a network on the way that `walk` takes it."""
    wrapped = LocalityProbe(model, watched, settings)
    walk(wrapped)
    arrays = wrapped.arrays()
    return arrays, summary(arrays)
