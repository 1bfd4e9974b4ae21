"""Where a network looks: statistics of its weights over tokens, per layer, head and timestep, beside uniform weights.

Streaming: a layer's weights are made a few queries at a time while the network runs, reduced to sums and dropped, so that
neither a T x T map nor two layers are ever held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.probes.gradients import Gradients
from analysis.probes.implied import KINDS, Weights
from analysis.probes.layers import Call, Grid, Layer, watching
from analysis.probes.measures import MEASURES, distances, locality, radii, uniform
from experiments.engine.numerics.randomness import generator_at

MIXER_GRADIENT, NETWORK_GRADIENT = "input gradient", "network gradient"
ALL_KINDS = (*KINDS, MIXER_GRADIENT, NETWORK_GRADIENT)
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """`queries` tokens of a grid are asked, `gradient_queries` of `gradient_images` images where a query costs a backward
    pass; `memory` is what a chunk of weights may take, in MiB.
    """

    queries: int
    anchors: tuple[tuple[float, float], ...]
    gradient_queries: int
    gradient_images: int
    directions: int
    memory: int = 512


@dataclass
class _Part:
    """A kind of weights of a layer: per step, MEASURES (h, 3), masses (h, K) and maps (h, A, T)."""

    name: str
    grid: Grid
    queries: Tensor
    values: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)


class LocalityProbe:
    """A network (x, t, y) -> prediction that behaves as the one it wraps and reduces what its layers do.

    ValueError where there is nothing to probe: no layer with weights over tokens and no gradients asked for.
    """

    def __init__(self, model: nn.Module, watched: list[Layer], settings: Settings) -> None:
        if not watched and not settings.gradient_queries:
            raise ValueError(
                f"{type(model).__name__} has no layer whose weights over tokens are known; ask for its gradients"
            )
        self.model, self.watched, self.settings = model, watched, settings
        self.parts: dict[tuple[str, int], _Part] = {}
        self.timesteps: list[float] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.timesteps.append(float(t[0]))
        if (
            self.settings.gradient_queries
        ):  # first, since it needs the most memory and may be refused
            some, channels = slice(self.settings.gradient_images), x.shape[1]

            def noise_of(x: Tensor) -> Tensor:
                each = len(x) // len(t[some])
                return self.model(
                    x, t[some].repeat_interleave(each), y[some].repeat_interleave(each)
                )[:, :channels]

            self._gradients(
                NETWORK_GRADIENT,
                len(self.watched),
                "whole network",
                tuple(x.shape[-2:]),
                noise_of,
                x[some],
                None,
            )
        with watching(self.watched, self._see):
            return self.model(x, t, y)

    def _see(self, call: Call) -> None:
        layer = call.layer
        self._reduce(
            call.weights.kind,
            call.index,
            call.name,
            call.grid,
            call.weights,
            self.settings.queries,
            call.inputs[0].device,
        )
        if self.settings.gradient_queries and layer.mix is not None:
            x, *rest = call.inputs
            mix = lambda x: layer.mix(x, *rest)  # noqa: E731
            self._gradients(
                MIXER_GRADIENT,
                call.index,
                call.name,
                call.grid,
                mix,
                x[: self.settings.gradient_images],
                None if x.ndim == 4 else call.place,
            )

    def _gradients(
        self,
        kind: str,
        index: int,
        name: str,
        grid: Grid,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        place: Tensor | None,
    ) -> None:
        generator = generator_at("probe", kind, index, len(self.timesteps))
        weights = Gradients(kind, f, x, place, self.settings.directions, generator)
        self._reduce(kind, index, name, grid, weights, self.settings.gradient_queries, x.device)

    def _reduce(
        self,
        kind: str,
        index: int,
        name: str,
        grid: Grid,
        weights: Weights | Gradients,
        count: int,
        device: torch.device,
    ) -> None:
        part = self.parts.setdefault((kind, index), _Part(name, grid, some_queries(grid, count)))
        anchors = torch.tensor(
            [anchor_token(grid, anchor) for anchor in self.settings.anchors], device=device
        )
        try:
            values, mass = streamed(weights, grid, part.queries.to(device), self.settings.memory)
            maps = torch.stack(
                [weights.rows(head, anchors).mean(0) for head in range(weights.heads)]
            )
        except ValueError as error:
            raise ValueError(f"{name} at t = {self.timesteps[-1]:g}: {error}") from None
        part.values.append(values.cpu())
        part.mass.append(mass.cpu())
        part.maps.append(maps.cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """timesteps (S,), measures (3,) by name; and for part p: kind_p, layer_p, grid_p (2,), values_p (S, h, 3), mass_p (S, h, K),

        maps_p (S, h, A, H, W) as float16, uniform_p (3,), uniform_mass_p (K,); anchors_p (A, 2) row and column.
        """
        out: dict[str, Any] = {
            "timesteps": np.array(self.timesteps),
            "measures": np.array(MEASURES),
        }
        for p, ((kind, _), part) in enumerate(
            sorted(self.parts.items(), key=lambda item: (ALL_KINDS.index(item[0][0]), item[0][1]))
        ):
            even, even_mass = uniform(part.grid, part.queries)
            tokens = [anchor_token(part.grid, anchor) for anchor in self.settings.anchors]
            out |= {
                f"kind_{p}": np.array(kind),
                f"layer_{p}": np.array(part.name),
                f"grid_{p}": np.array(part.grid),
                f"values_{p}": torch.stack(part.values).float().numpy(),
                f"mass_{p}": torch.stack(part.mass).float().numpy(),
                f"maps_{p}": torch.stack(part.maps).half().unflatten(-1, part.grid).numpy(),
                f"uniform_{p}": even.float().numpy(),
                f"uniform_mass_{p}": even_mass.float().numpy(),
                f"anchors_{p}": np.array([divmod(token, part.grid[1]) for token in tokens]),
            }
        return out


def streamed(
    weights: Weights | Gradients, grid: Grid, queries: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """Means over images and queries of MEASURES (h, 3) and masses (h, K), a chunk of `memory` MiB at a time."""
    images = len(weights.rows(0, queries[:1]))
    row = 8 * images * (weights.floats + 6 * grid[0] * grid[1])  # bytes a query
    chunk = memory * MIB // row
    if chunk < 1:
        raise ValueError(
            f"one row of weights over {grid[0]}x{grid[1]} tokens of {images} images takes {-(-row // MIB)} MiB and {memory} are allowed; "
            "probe fewer images, allow more with --memory, or take no gradients with --gradients 0"
        )
    within = radii(grid).to(queries.device)
    totals: dict[int, list[Tensor]] = defaultdict(list)
    for head in range(weights.heads):
        for some in queries.split(chunk):
            values, mass = locality(weights.rows(head, some), distances(grid, some), within)
            totals[head].append(torch.cat([values, mass], dim=-1).mean(0).sum(0))
    both = torch.stack(
        [torch.stack(parts).sum(0) / len(queries) for _, parts in sorted(totals.items())]
    )
    return both[:, : len(MEASURES)], both[:, len(MEASURES) :]


def some_queries(grid: Grid, count: int) -> Tensor:
    """All tokens of a grid, or `count` drawn from it, always the same ones."""
    tokens = grid[0] * grid[1]
    return (
        torch.arange(tokens)
        if tokens <= count
        else torch.randperm(tokens, generator=generator_at("queries", *grid))[:count].sort().values
    )


def anchor_token(grid: Grid, anchor: tuple[float, float]) -> int:
    row, column = (
        min(int(fraction * side), side - 1) for fraction, side in zip(anchor, grid, strict=True)
    )
    return row * grid[1] + column


def summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Per kind: mean over steps, layers and heads of each measure, over its value for uniform weights (1: as spread as can be).

    Grids of one token are left out; `near` is the mass within one token of the query, `near_uniform` what uniform weights give.
    """
    found: dict[str, Any] = {}
    parts = range(sum(name.startswith("kind_") for name in arrays))
    for kind in ALL_KINDS:
        own = [
            p for p in parts if str(arrays[f"kind_{p}"]) == kind and arrays[f"grid_{p}"].prod() > 1
        ]
        if own:
            relative = np.concatenate(
                [
                    (arrays[f"values_{p}"] / arrays[f"uniform_{p}"]).reshape(-1, len(MEASURES))
                    for p in own
                ]
            )
            near = [
                arrays[f"mass_{p}"][..., 1].ravel() for p in own
            ]  # as many values as a part has steps, layers and heads
            uniform = [
                np.full(len(mass), arrays[f"uniform_mass_{p}"][1])
                for p, mass in zip(own, near, strict=True)
            ]
            found[kind] = dict(
                zip(MEASURES, (round(float(value), 5) for value in relative.mean(0)), strict=True)
            ) | {
                "near": round(float(np.concatenate(near).mean()), 5),
                "near_uniform": round(float(np.concatenate(uniform).mean()), 5),
                "parts": sum(arrays[f"values_{p}"].shape[1] for p in own),
            }
    return found


def probe(
    model: nn.Module,
    watched: list[Layer],
    settings: Settings,
    walk: Callable[[LocalityProbe], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and summary of a network on the way that `walk` takes it."""
    wrapped = LocalityProbe(model, watched, settings)
    walk(wrapped)
    arrays = wrapped.arrays()
    return arrays, summary(arrays)
