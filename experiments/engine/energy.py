"""The energy a GPU has used, as its driver counts it."""

from __future__ import annotations

import ctypes
from functools import cache

import torch


def joules(device: torch.device) -> float | None:
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
