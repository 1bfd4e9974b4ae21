"""Declared numeric modes: flags are set, read back and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MODES = ("fp32", "tf32", "bf16", "as_published")


@contextmanager
def precision(mode: str, device: torch.device) -> Iterator[None]:
    """Run in 'fp32' (no TF32 anywhere), 'tf32' (everywhere), 'bf16' (autocast; weights stay fp32) or 'as_published'.

    The last are PyTorch's own defaults, which the paper's throughput was measured under: convolutions in TF32, linear layers in fp32,
    convolutions chosen by cuDNN's guess; in the others cuDNN tries which of its own is the fastest.
    Weights that autocast keeps in bf16 end with the block, also inside another one, where PyTorch would go on with those of before a step.
    """
    if mode not in MODES:
        raise ValueError(f"unknown precision {mode!r}; known: {', '.join(MODES)}")
    before, tried = read_tf32_flags(), torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    torch.backends.cudnn.allow_tf32 = mode in ("tf32", "as_published")
    torch.backends.cudnn.benchmark = mode != "as_published"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16"):
            yield
    finally:
        torch.clear_autocast_cache()
        torch.backends.cuda.matmul.allow_tf32 = before["matmul_tf32"]
        torch.backends.cudnn.allow_tf32 = before["cudnn_tf32"]
        torch.backends.cudnn.benchmark = tried


def read_tf32_flags() -> dict[str, bool]:
    """The TF32 flags as they are in force."""
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }
