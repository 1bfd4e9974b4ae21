"""A stand-in for CUDA graphs that works on a CPU, and a mode that hears which operators run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.engine.numerics.cuda_graphs import Capture, CudaGraph

# Operators that make the host wait for a value of the device.
SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "item",
    "unique",
)


def needs_gpu(test: Any) -> Any:
    """Mark a test that only runs on a GPU."""
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test)
    )


class Rerun(CudaGraph):
    """A graph for a CPU: a replay runs the function again and writes to the memory of the capture.

    As in a real replay, parameters keep their own gradient tensors.
    """

    def __init__(self, function: Callable[..., Tensor], model: nn.Module | None = None) -> None:
        super().__init__(function)
        self.parameters = [p for p in model.parameters() if p.requires_grad] if model else []

    def _capture(self, inputs: tuple[Tensor, ...]) -> Capture:
        output = self.function(*inputs)
        captured_gradients = [p.grad for p in self.parameters]

        def replay() -> None:
            gradients = [p.grad for p in self.parameters]
            output.copy_(self.function(*inputs))
            for p, captured, before in zip(
                self.parameters, captured_gradients, gradients, strict=True
            ):
                captured.copy_(p.grad)
                p.grad = before

        return Capture(replay, inputs, output)


class Heard(TorchDispatchMode):
    """Count the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.names[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))
