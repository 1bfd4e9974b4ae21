"""A stand-in for the recording of CUDA graphs, and what hears the operators that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.engine.numerics.cuda_graphs import CudaGraph

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
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test)
    )


class Rerun(CudaGraph):
    """A recording that a CPU can make: it runs the function again where it recorded, and as a replay writes to the same memory and runs no Python."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module | None = None) -> None:
        super().__init__(function)
        self.parameters = [p for p in model.parameters() if p.requires_grad] if model else []

    def _record(self, places: tuple[Tensor, ...]) -> tuple[Any, ...]:
        out = self.function(*places)
        gradients = [p.grad for p in self.parameters]

        def replay() -> None:
            seen = [p.grad for p in self.parameters]
            out.copy_(self.function(*places))
            for parameter, gradient, before in zip(self.parameters, gradients, seen, strict=True):
                gradient.copy_(parameter.grad)
                parameter.grad = before

        return replay, places, out


class Heard(TorchDispatchMode):
    """Names of the operators that ran."""

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
