"""The device to compute on. Torch is asked for a GPU, once, and loaded here only to compute."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine.machine.cores import find_cores

if TYPE_CHECKING:
    import torch

# What drivers make under /dev: NVIDIA's, WSL2's, AMD's, and those of NVIDIA's embedded boards.
DEVICE_NODES = ("nvidia*", "dxg", "kfd", "nvgpu*", "nvhost*", "nvmap")
DRIVER = "libcuda.so.1"

_QUESTION = """
import json, torch
print(json.dumps([torch.cuda.is_available(), torch.__version__, torch.version.cuda]))
"""


@dataclass(frozen=True)
class Answer:
    """What torch says of GPUs."""

    # Whether it can use one.
    usable: bool
    version: str
    # The version of CUDA that torch was built for, or None.
    cuda: str | None


def choose_device(asked: str | None) -> str:
    """Return the device that was asked for, else "cuda" if torch can use a GPU, else "cpu"."""
    return asked or ("cuda" if has_gpu() else "cpu")


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    # Torch takes seconds to load, and is not needed where there is neither driver nor device.
    if "torch" not in sys.modules and is_certainly_absent():
        return False
    return _ask_torch().usable


def require_device(device: str) -> None:
    """Raise ValueError if a GPU was asked for and torch cannot use one."""
    if device != "cuda":
        return
    answer = _ask_torch()
    if not answer.usable:
        raise ValueError(
            f"no usable GPU: torch {answer.version} was built for CUDA {answer.cuda}; "
            "update the driver or pass --device cpu"
        )


def prepare_torch(device: str) -> torch.device:
    """Give torch no more threads than this process has cores, and return the device.

    Torch itself knows nothing of quotas.

    Raises:
        ValueError: if a GPU was asked for and torch cannot use one.
    """
    require_device(device)
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), find_cores().number))
    return torch.device(device)


def is_certainly_absent(devices: Path = Path("/dev")) -> bool:
    """Return True if this machine has neither a GPU's device nor a driver that torch could load."""
    if any(next(devices.glob(pattern), None) for pattern in DEVICE_NODES):
        return False
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return True
    return False


def _ask_torch() -> Answer:
    """Ask the torch of this process if it is loaded, else one in a process of its own."""
    torch = sys.modules.get("torch")
    if torch is None:
        return _ask_in_a_process()
    return Answer(torch.cuda.is_available(), torch.__version__, torch.version.cuda)


@cache
def _ask_in_a_process() -> Answer:
    # -P keeps a folder called torch in the current folder from being imported.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _QUESTION], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"torch cannot be asked for a GPU: {last_line}")
    return Answer(*json.loads(done.stdout.splitlines()[-1]))
