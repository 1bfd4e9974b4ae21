"""Numeric modes by name: the flags are set, read back and written to every record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MODES = ("fp32", "tf32", "bf16", "as_published")


@contextmanager
def precision(mode: str, device: torch.device) -> Iterator[None]:
    """Run the block in a numeric mode.

    'fp32' uses TF32 nowhere and 'tf32' uses it everywhere. 'bf16' is autocast; weights stay fp32.
    'as_published' is PyTorch's default, under which the paper measured its throughput:
    convolutions in TF32, linear layers in fp32, and cuDNN guesses the fastest convolution.
    In the other modes cuDNN tries its convolutions and takes the fastest.

    Autocast's cached bf16 weights are dropped at the end of the block, also if it is inside
    another block: PyTorch would continue with the weights from before an optimiser step.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"unknown precision {mode!r}; known: {', '.join(MODES)}")

    # Remember the process-wide flags, and set those of the mode.
    tf32_before = read_tf32_flags()
    benchmark_before = torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    torch.backends.cudnn.allow_tf32 = mode in ("tf32", "as_published")
    torch.backends.cudnn.benchmark = mode != "as_published"

    # Restore them whatever happens in the block.
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16"):
            yield
    finally:
        torch.clear_autocast_cache()
        torch.backends.cuda.matmul.allow_tf32 = tf32_before["matmul_tf32"]
        torch.backends.cudnn.allow_tf32 = tf32_before["cudnn_tf32"]
        torch.backends.cudnn.benchmark = benchmark_before


def read_tf32_flags() -> dict[str, bool]:
    """Read PyTorch's TF32 flags as they are now."""
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }
