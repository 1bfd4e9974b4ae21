"""Time, multiply-accumulates and bytes of every operator that PyTorch runs, by class."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.engine.timing.cost import MACS

# The beginnings of the operators' names; the first class that fits is taken.
CLASSES = {
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
CONVOLUTION, DEPTHWISE, ELEMENTWISE = "convolution", "depthwise convolution", "elementwise"


class Operators(TorchDispatchMode):
    """Time every operator between two synchronisations, and add up its work by class.

    Forward and backward operators are both seen. `classes` has the fields `seconds`, `macs`,
    `bytes` and `calls` for each class.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.classes: dict[str, dict[str, float]] = {}

    @property
    def moved(self) -> int:
        """Return the bytes that all operators read and wrote.

        An operator reads each input and writes its output once. Kernels outside PyTorch's
        operators are not seen.
        """
        return sum(int(totals["bytes"]) for totals in self.classes.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # An operator that only stands for other operators is seen as those.
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed

        # Not `time_call`, which returns no result and would run the operator for its time alone.
        self._synchronise()
        started = time.perf_counter()
        out = func(*args, **kwargs)
        self._synchronise()
        seconds = time.perf_counter() - started

        inputs = collect_tensors((*args, *kwargs.values()))
        outputs = collect_tensors([out])
        if not is_view(func, inputs, outputs):
            totals = self.classes.setdefault(
                classify(func, args), dict(seconds=0.0, macs=0, bytes=0, calls=0)
            )
            totals["seconds"] += seconds
            totals["macs"] += count_macs(func, args, out)
            totals["bytes"] += count_bytes(inputs, outputs)
            totals["calls"] += 1
        return out

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def classify(func: Any, args: Sequence[Any]) -> str:
    """Return the class of an operator."""
    name = func.name().partition("::")[2].partition(".")[0]
    for class_name, beginnings in CLASSES.items():
        if name.startswith(beginnings):
            depthwise = class_name == CONVOLUTION and _read_groups(args) > 1
            return DEPTHWISE if depthwise else class_name
    return ELEMENTWISE


def count_macs(func: Any, args: Sequence[Any], out: Any) -> int:
    """Count multiply-accumulates of a product, a convolution or fused attention.

    In a backward pass, each gradient that is requested counts.
    """
    if func in MACS:
        return MACS[func](tuple(args), out)

    # Other operators come in variants that share a part of their names.
    name = func.name()
    if "convolution_backward" in name:
        grad, weight, wanted = args[0], args[2], args[-1]
        return grad.numel() * math.prod(weight.shape[1:]) * (wanted[0] + wanted[1])
    if "_linear_pointwise" in name:
        return out.numel() * args[0].shape[-1]
    if "_convolution_pointwise" in name:
        return out.numel() * math.prod(args[1].shape[1:])
    if "scaled_dot_product" in name:
        # A backward pass has four products, and the output's gradient before q and k.
        backward = "backward" in name
        q, k = (args[1], args[2]) if backward else (args[0], args[1])
        return (4 if backward else 2) * q.numel() * k.shape[-2]
    return 0


def _read_groups(args: Sequence[Any]) -> int:
    """Read a convolution's number of groups from its arguments.

    They end with an activation's name, with a backward pass's gradient mask, or with the groups.
    """
    last = args[-1]
    if isinstance(last, str):
        return args[6]
    if isinstance(last, list | tuple):
        return args[-2]
    return last


def is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Tell whether nothing was computed: all outputs share the inputs' memory, unwritten."""
    if func._schema.is_mutable or not outputs:
        return False
    storages = {storage_of(tensor) for tensor in inputs}
    return all(storage_of(tensor) in storages for tensor in outputs)


def count_bytes(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Count the bytes of all tensors, each address once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in find_distinct(inputs, outputs))


def find_distinct(inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors without those that begin at another one's address."""
    tensors = {(storage_of(x), x.storage_offset()): x for x in (*inputs, *outputs)}
    return list(tensors.values())


def storage_of(tensor: Tensor) -> int:
    """Return what names a tensor's memory among all living tensors, on the meta device too."""
    return tensor.untyped_storage()._cdata


def collect_tensors(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among values and nested lists of values."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += collect_tensors(value)
    return tensors
