"""The process on its machine: freed memory that it keeps, and what records say of both."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # parameters of mallopt(3)
KEPT = {
    TRIM_THRESHOLD: 2**31 - 1,
    TOP_PAD: 2**26,
    MMAP_MAX: 0,
}  # two in bytes, and how many blocks are asked of the system one by one


@cache
def keep_memory() -> bool:
    """Keep up to 2 GiB of freed memory from now on, and ask for more by 64 MiB at least; False where the C library has no such setting.

    By default glibc gives large blocks back at once and is given the next ones page by page: what a network takes on a CPU then
    hangs on what the process did before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        [mallopt(parameter, value) for parameter, value in KEPT.items()]
    )


def described(device: torch.device | str) -> dict[str, Any]:
    """The part of a record's provenance that torch knows, with freed memory kept from now on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "memory_kept": keep_memory(),
    }
