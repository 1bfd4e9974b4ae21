"""What every operator of a task takes, computes and moves, by class, seen one by one as PyTorch runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.engine.timing.cost import MACS

CLASSES = {  # by the beginning of an operator's name; the first that fits
    "product": ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "_linear_pointwise", "linear"),
    "convolution": ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"),
    "attention": (
        "_scaled_dot_product",
        "scaled_dot_product",
        "_softmax",
        "_flash_attention",
        "_efficient_attention",
    ),
    "normalisation": ("native_layer_norm", "native_group_norm"),
    "optimiser and EMA": ("_fused_adam", "_foreach", "lerp"),
    "copy": (
        "copy",
        "clone",
        "cat",
        "stack",
        "_to_copy",
        "pixel_",
        "index",
        "embedding",
        "constant_pad",
        "new_",
        "zeros",
        "empty",
        "fill",
        "zero",
    ),
    "reduction": ("sum", "mean", "_adaptive_avg_pool2d", "avg_pool2d", "any", "max", "min"),
    "random numbers": ("randn", "rand", "normal", "randint", "uniform"),
}
ELEMENTWISE, DEPTHWISE = "elementwise", "depthwise convolution"


class Operators(TorchDispatchMode):
    """Times every operator, forward and backward, between two synchronisations, and adds up what it computes and moves by class."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.classes: dict[str, dict[str, float]] = {}

    @property
    def moved(self) -> int:
        """Bytes that all of them read and wrote, each its inputs and its output once; kernels outside PyTorch's operators are not seen."""
        return sum(one["bytes"] for one in self.classes.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with self:  # an operator that is only a name for others is these
            if (parts := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return parts
        self._wait()
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._wait()
        seconds = time.perf_counter() - started
        inputs, outputs = _tensors((*args, *(kwargs or {}).values())), _tensors([out])
        if not _is_view(func, inputs, outputs):
            one = self.classes.setdefault(
                classify(func, args), dict(seconds=0.0, macs=0, bytes=0, calls=0)
            )
            one["seconds"] += seconds
            one["macs"] += count_macs(func, args, out)
            one["bytes"] += sum(
                tensor.numel() * tensor.element_size()
                for tensor in {t.data_ptr(): t for t in (*inputs, *outputs)}.values()
            )
            one["calls"] += 1
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def classify(func: Any, args: Sequence[Any]) -> str:
    name = func.name().partition("::")[2].partition(".")[0]
    for found, beginnings in CLASSES.items():
        if name.startswith(beginnings):
            return DEPTHWISE if found == "convolution" and _groups(args) > 1 else found
    return ELEMENTWISE


def count_macs(func: Any, args: Sequence[Any], out: Any) -> int:
    """Multiply-accumulates of a product, a convolution or fused attention; of a backward pass, of each gradient that is asked for."""
    if func in MACS:
        return MACS[func](args, out)
    name = func.name()
    if "convolution_backward" in name:
        grad, weight, wanted = args[0], args[2], args[-1]
        return grad.numel() * math.prod(weight.shape[1:]) * (wanted[0] + wanted[1])
    if "_linear_pointwise" in name:
        return out.numel() * args[0].shape[-1]
    if "_convolution_pointwise" in name:
        return out.numel() * math.prod(args[1].shape[1:])
    if "scaled_dot_product" in name:
        backward = "backward" in name
        q, k = (args[1], args[2]) if backward else (args[0], args[1])
        return (4 if backward else 2) * q.numel() * k.shape[-2]
    return 0


def _groups(args: Sequence[Any]) -> int:
    """Of a convolution, one with an activation, whose name comes last, or a backward pass, whose gradient mask does."""
    if isinstance(args[-1], str):
        return args[6]
    return args[-2] if isinstance(args[-1], list | tuple) else args[-1]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether nothing was computed: the output lies where an input does, and the operator does not write in place."""
    places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    writes = func._schema.is_mutable
    return (
        not writes
        and bool(outputs)
        and all(tensor.untyped_storage().data_ptr() in places for tensor in outputs)
    )


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
