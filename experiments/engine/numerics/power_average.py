"""Averages of weights by a power of time, and any of them from stored ones, after the training.

An average of exponent g at time t weighs the weights at time s by (g + 1) / t (s / t)^g. The
standard deviation of that profile over t names it: its relative width, below 0.2887. Averages of
two widths, stored now and then, span others, by a least-squares fit of the profiles.
Source: Karras et al. 2024 (EDM2), section 3 and appendix C. All arithmetic is float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

WIDEST = 12**-0.5  # the width of the plain mean, which no power reaches


@functools.cache
def exponent_of(width: float) -> float:
    """Return the exponent of the average of a relative width.

    Raises:
        ValueError: no average has this width.
    """
    if not 0 < width < WIDEST:
        raise ValueError(
            f"a power-function average has a relative width above 0 and below {WIDEST:.4f}, "
            f"not {width:g}"
        )
    s = float(width) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def width_of(exponent: float) -> float:
    """Return the relative width of the average of an exponent."""
    return float(np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))))


def decay_at(width: float, time: float, length: float = 1.0) -> float:
    """Return the share of the average that a step keeps.

    Args:
        width: of the average.
        time: at which the step ends, in steps or images.
        length: of the step, in the same unit. The first step keeps nothing.
    """
    return float((1 - length / time) ** (exponent_of(width) + 1))


@dataclass(frozen=True)
class Stored:
    """An average that was stored."""

    time: float
    width: float


@dataclass(frozen=True)
class Rebuilt:
    """How an average is rebuilt from stored ones."""

    # The stored averages that take part, and the weight of each, (n,).
    stored: tuple[Stored, ...]
    coefficients: ndarray
    # Norm of the difference between the rebuilt profile and the wanted one, over the latter's.
    error: float


def rebuild(stored: Sequence[Stored], time: float, width: float) -> Rebuilt:
    """Return how to rebuild the average of a width at a time.

    Args:
        stored: averages at any times; those after `time` are left out.
        time: that of a stored average.
        width: of the average that is wanted.

    Raises:
        ValueError: nothing was stored at the time, or no average has the width.
    """
    if time not in {one.time for one in stored}:
        times = ", ".join(f"{t:g}" for t in sorted({one.time for one in stored}))
        raise ValueError(f"no average was stored at {time:g}; stored: {times or 'none'}")
    kept = tuple(one for one in stored if one.time <= time)
    target = Stored(time, width)

    # Least squares in the space of profiles. Rounding and the fit leave a sum that is not quite 1.
    products = np.array([[_inner_product(a, b) for b in kept] for a in kept])
    towards = np.array([_inner_product(a, target) for a in kept])
    coefficients = np.linalg.solve(products, towards)
    coefficients /= coefficients.sum()

    own = _inner_product(target, target)
    squared = own - 2 * coefficients @ towards + coefficients @ products @ coefficients
    return Rebuilt(kept, coefficients, float(np.sqrt(max(squared, 0.0) / own)))


def _inner_product(a: Stored, b: Stored) -> float:
    """Return the integral over time of the product of two profiles."""
    if a.time > b.time:
        a, b = b, a
    g, h = exponent_of(a.width), exponent_of(b.width)
    return (g + 1) * (h + 1) / (g + h + 1) * (a.time / b.time) ** h / b.time
