"""A roofline: how long a device takes for counted operators. No torch.

An operator takes as long as its multiply-accumulates at the peak of the unit that does them, or as
its bytes at the memory's bandwidth, whichever is longer. Operators run one after the other. The
host launches them meanwhile, each in `LAUNCH` seconds; the slower of the two decides.

Peaks are those of data sheets, so the result bounds what a device can reach. `Shares` say how much
of each peak is attained; they are fitted to published throughput.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

# Seconds in which PyTorch's eager mode launches an operator. Assumed, not measured.
LAUNCH = 5e-6
# Products of fused float32 attention are made of this many TF32 products each, in every mode
# (CUTLASS's OpMultiplyAddFastF32, which PyTorch's memory-efficient attention names).
TF32_PRODUCTS = 3


class Unit(Enum):
    """What does the multiply-accumulates of an operator."""

    LINEAR = "linear"  # products of matrices
    CONVOLUTION = "convolution"  # without depthwise ones
    ATTENTION = "attention"  # fused, in float32 or less
    PLAIN = "plain"  # everything else, on no tensor core


@dataclass(frozen=True)
class Work:
    """Equal operators of a task."""

    unit: Unit
    # Multiply-accumulates of one operator.
    macs: int
    # Bytes that one operator reads and writes in float32; 0 for a cast, which bf16 alone needs.
    bytes: int
    # The same under autocast to bf16.
    bytes_bf16: int
    calls: int = 1

    def times(self, number: int) -> Work:
        """Return the work of so many runs."""
        return Work(self.unit, self.macs, self.bytes, self.bytes_bf16, number * self.calls)


@dataclass(frozen=True)
class Device:
    """Peaks of a device."""

    name: str
    # Multiply-accumulates per second of plain float32 arithmetic.
    macs_fp32: float
    # Bytes per second of the memory.
    bytes_per_s: float
    # Multiply-accumulates per second of tensor cores on dense matrices; None: it has none.
    macs_tf32: float | None = None
    macs_bf16: float | None = None


@dataclass(frozen=True)
class Shares:
    """Which part of a peak is attained."""

    plain: float = 1.0
    tensor: float = 1.0
    memory: float = 1.0


PEAKS = Shares()
# The shares that are tried in a fit.
TRIED = {
    "plain": [x / 100 for x in range(80, 101, 5)],
    "tensor": [x / 100 for x in range(20, 101, 5)],
    "memory": [x / 100 for x in range(20, 101, 5)],
}


def predict_seconds(
    work: Iterable[Work], device: Device, mode: str, shares: Shares = PEAKS
) -> float:
    """Return the seconds of a task in a numeric mode."""
    busy = 0.0
    launches = 0
    low = mode == "bf16"
    for each in work:
        moved = each.bytes_bf16 if low else each.bytes
        if not moved:
            continue
        computing = each.macs / _macs_per_s(each.unit, device, mode, shares)
        moving = moved / (device.bytes_per_s * shares.memory)
        busy += each.calls * max(computing, moving)
        launches += each.calls
    return max(busy, launches * LAUNCH)


def _macs_per_s(unit: Unit, device: Device, mode: str, shares: Shares) -> float:
    """Return the attained multiply-accumulates per second of a unit."""
    plain = device.macs_fp32 * shares.plain
    if unit is Unit.PLAIN or device.macs_tf32 is None or device.macs_bf16 is None:
        return plain

    # Tensor cores take what a mode lets them; attention has them in float32 too.
    if mode == "bf16":
        return device.macs_bf16 * shares.tensor
    if unit is Unit.ATTENTION:
        return device.macs_tf32 / TF32_PRODUCTS * shares.tensor
    on_tensor_cores = mode == "tf32" or (mode == "as_published" and unit is Unit.CONVOLUTION)
    return device.macs_tf32 * shares.tensor if on_tensor_cores else plain


@dataclass(frozen=True)
class Sample:
    """A task of which the time is known."""

    work: Sequence[Work]
    seconds: float


def fit_shares(samples: Sequence[Sample], device: Device, mode: str) -> Shares:
    """Return the shares with the least mean distance of logarithms to the samples."""

    def distance(shares: Shares) -> float:
        ratios = (
            predict_seconds(sample.work, device, mode, shares) / sample.seconds
            for sample in samples
        )
        return statistics.fmean(abs(math.log(ratio)) for ratio in ratios)

    tried = itertools.product(*TRIED.values())
    return min((Shares(*values) for values in tried), key=distance)
