"""Declared numeric modes: flags are set, read back and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MODES = ("fp32", "tf32", "bf16")


@contextmanager
def precision(mode: str, device: torch.device) -> Iterator[None]:
    """Run in 'fp32' (no TF32 anywhere), 'tf32' (everywhere) or 'bf16' (autocast; weights stay fp32).

    PyTorch's own defaults put convolutions in TF32 and linear layers in fp32, which is none of these.
    """
    if mode not in MODES:
        raise ValueError(f"unknown precision {mode!r}; known: {', '.join(MODES)}")
    before = flags()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before["matmul_tf32"]
        torch.backends.cudnn.allow_tf32 = before["cudnn_tf32"]


def flags() -> dict[str, bool]:
    """The TF32 flags as they are in force."""
    return {"matmul_tf32": torch.backends.cuda.matmul.allow_tf32, "cudnn_tf32": torch.backends.cudnn.allow_tf32}
