"""Which timesteps a sampler visits: respacing as iDDPM's `space_timesteps` defines it.

Sources: iDDPM (arXiv:2102.09672), section 4, and the code that ADM and DiT took over from it.
A count takes both ends in. A list of counts cuts the timesteps into sections of equal length and
takes evenly spaced ones of each. "ddim50" takes every k-th timestep from 0 on, as DDIM's authors.
"""

from __future__ import annotations

from collections.abc import Sequence

DDIM = "ddim"


def spaced_timesteps(num_steps: int, spacing: int | str | Sequence[int]) -> list[int]:
    """List the indices, in rising order, of the timesteps that a spacing takes.

    Args:
        num_steps: number of timesteps to choose from.
        spacing: a count, counts of sections as [10, 15, 20] or "10,15,20", or "ddim50". The text
            "250" is one section, whose halves may round otherwise than those of the count 250.

    Raises:
        ValueError: the spacing is not to be had, or is no spacing.
    """
    if isinstance(spacing, int):
        return _even(num_steps, spacing)
    if isinstance(spacing, str) and spacing.startswith(DDIM):
        return _strided(num_steps, _count(spacing.removeprefix(DDIM), spacing))
    if isinstance(spacing, str):
        return _sectioned(num_steps, [_count(text, spacing) for text in spacing.split(",")])
    return _sectioned(num_steps, spacing)


def _count(text: str, spacing: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"spacing {spacing!r} is no count, no list as 10,15,20 and no ddim50")
    return int(text)


def _even(num_steps: int, count: int) -> list[int]:
    """Both ends and evenly spaced timesteps between them; a half rounds to even."""
    if not 2 <= count <= num_steps:
        raise ValueError(f"respacing {num_steps} steps takes 2 to {num_steps} of them, not {count}")
    last = num_steps - 1
    intervals = count - 1
    return [round(i * last / intervals) for i in range(count)]


def _strided(num_steps: int, count: int) -> list[int]:
    """Every k-th timestep from 0 on, for the smallest k that takes `count` of them."""
    for stride in range(1, num_steps):
        taken = range(0, num_steps, stride)
        if len(taken) == count:
            return list(taken)
    raise ValueError(f"no whole stride takes {count} of {num_steps} timesteps; take another count")


def _sectioned(num_steps: int, counts: Sequence[int]) -> list[int]:
    """Evenly spaced timesteps of each section, both of its ends included.

    The first sections are one longer where the sections do not come out even. Positions add up the
    stride in floating point, as the authors' code does, which decides how halves round.
    """
    if not counts or min(counts) < 0 or sum(counts) < 2:
        raise ValueError(f"sections take counts from 0 and two timesteps in all, not {counts}")

    # Each section gives its timesteps in turn, and the next one starts where it ends.
    length, longer = divmod(num_steps, len(counts))
    taken = []
    start = 0
    for section, count in enumerate(counts):
        size = length + 1 if section < longer else length
        if count > size:
            raise ValueError(f"a section of {size} timesteps does not hold {count}")

        # The stride is added up as a float, and each position is rounded by itself.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            taken.append(start + round(position))
            position += stride

        start += size
    return sorted(set(taken))
