"""What a process knows of its machine: memory settings, software versions and energy used."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

# Parameters of mallopt(3), by their numbers in malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
MALLOPT_VALUES = {
    TRIM_THRESHOLD: 2**31 - 1,  # bytes of free memory that the process keeps
    TOP_PAD: 2**26,  # bytes that the process requests beyond its need
    MMAP_MAX: 0,  # large blocks that are mapped one by one
}


@cache
def keep_memory() -> bool:
    """Make glibc keep up to 2 GiB of freed memory and grow by at least 64 MiB.

    glibc returns large blocks and faults them in again, so timings depend on what ran before.

    Returns:
        False if the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(parameter, value) for parameter, value in MALLOPT_VALUES.items()]
    return all(accepted)


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """Return what torch knows of the machine, for a record's provenance.

    The process keeps freed memory from now on.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "memory_kept": keep_memory(),
    }


def read_joules(device: torch.device) -> float | None:
    """Read the energy that a GPU has used since its driver was loaded.

    The GPU finishes all launched work first, so that the figure contains it.

    Returns:
        Joules, or None on a CPU, without the package `nvidia-ml-py`, or if the driver cannot tell.
    """
    if device.type != "cuda":
        return None
    handle = _open_nvml(str(torch.cuda.get_device_properties(device).uuid))
    if handle is None:
        return None

    import pynvml

    torch.cuda.synchronize(device)
    try:
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return float(millijoules / 1000)


@cache
def _open_nvml(uuid: str) -> Any | None:
    """Return NVML's handle of a GPU.

    The UUID names the GPU whatever its number among the visible ones.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None
