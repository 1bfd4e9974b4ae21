"""How an autoencoder's latents become what a network sees. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class LatentSpace:
    """What a network sees is (latent - shift) * scale. Each is one number, or one for a channel."""

    scale: tuple[float, ...] = (0.18215,)
    shift: tuple[float, ...] = (0.0,)
    # Pixels per side that one place of a latent stands for.
    factor: int = 8

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it. Stable Diffusion's is said by its scale alone."""
        described: dict[str, Any] = {"scale": _plain(self.scale)}
        if self != SD_SPACE:
            described |= {"shift": _plain(self.shift), "factor": self.factor}
        return described

    @classmethod
    def read(cls, described: dict[str, Any]) -> LatentSpace:
        """Return what `describe` wrote, whatever else stands beside it."""
        return cls(
            _numbers(described.get("scale", 0.18215)),
            _numbers(described.get("shift", 0.0)),
            int(described.get("factor", 8)),
        )

    def __str__(self) -> str:
        described = f"scale {_short(self.scale)}"
        if any(self.shift):
            described += f" after a shift by {_short(self.shift)}"
        return f"{described}, {self.factor} pixels a side"


SD_SPACE = LatentSpace()


class HasSpace(Protocol):
    """A set of latents."""

    @property
    def space(self) -> LatentSpace | None:
        """How a network sees them; None: as Stable Diffusion's."""


def space_of(data: HasSpace) -> LatentSpace:
    """Return how a network sees the latents of a set."""
    return data.space or SD_SPACE


def _plain(values: tuple[float, ...]) -> float | list[float]:
    return values[0] if len(values) == 1 else list(values)


def _numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)


def _short(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{len(values)} numbers, {values[0]:g} ..."
