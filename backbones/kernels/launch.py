"""Launches of Triton kernels, and tensors for which there is nothing to launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Tell whether a tensor has a shape and no memory, on whatever device it says it is."""
    return isinstance(x, FakeTensor)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument.

    Nothing runs for a fake tensor: the outputs are what the caller has allocated.

    Args:
        kernel: a function under `triton.jit`.
        grid: numbers of programs.
        args: the kernel's arguments, a tensor first.
        options: constants of the kernel, and options of Triton.
    """
    if is_fake(args[0]):
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)
