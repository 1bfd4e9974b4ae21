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


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """The part of a record's provenance that torch knows, with freed memory kept from now on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "memory_kept": keep_memory(),
    }


# The energy a GPU has used, as its driver counts it.
def read_joules(device: torch.device) -> float | None:
    """Joules since the driver was loaded, of all work launched so far; None on a CPU and where the driver does not tell."""
    if (
        device.type != "cuda"
        or (driver := _driver(torch.cuda.get_device_properties(device).uuid)) is None
    ):
        return None
    library, handle = driver
    torch.cuda.synchronize(device)
    used = ctypes.c_ulonglong()
    failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used))
    return None if failed else used.value / 1000


@cache
def _driver(uuid: object) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML and the device of this identity, whatever number it has among the visible ones."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
        f"GPU-{uuid}".encode(), ctypes.byref(handle)
    ):
        return None
    return library, handle
