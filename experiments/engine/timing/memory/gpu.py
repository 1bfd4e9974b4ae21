"""A GPU's rules on a CPU: which operators run, and what autocast makes of them.

No backward pass runs on a fake GPU, so networks are traced as if on a CPU. The forward pass of a
fake GPU runs, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from backbones import kernels

# Kernels that a GPU takes; "shape" stands for a fused kernel that keeps its arguments.
CHOICES = {
    "linear": "reference",
    "pointwise": "reference",
    "attention": "sdpa",
    "causal_conv": "shape",
    "diagonal_ssm": "shape",
    "gated_linear": "shape",
    "selective_scan": "shape",
}
# Functions that CUDA's autocast computes in float32 and CPU's does not (PyTorch,
# aten/src/ATen/autocast_mode.h, AT_FORALL_FP32).
WIDE = (
    "__pow__ __rpow__ acos asin cdist cosh cosine_similarity dist erfinv exp expm1 group_norm "
    "huber_loss kl_div l1_loss layer_norm log log10 log1p log2 logsumexp mse_loss pow reciprocal "
    "renorm rsqrt sinh smooth_l1_loss softplus tan"
)
# Functions whose result is float32 unless its type is named (AT_FORALL_FP32_SET_OPT_DTYPE).
WIDENING = ("cumprod", "cumsum", "log_softmax", "prod", "softmax", "sum")


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Take the operators that a GPU takes, and cast as CUDA's autocast does."""
    with kernels.use(**CHOICES), _Autocast():
        yield


def cast_again(blocks: Iterable[nn.Module]) -> None:
    """Let blocks that are computed again in the backward pass, outside of the rules, obey them."""

    def cast(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with _Autocast():
            return forward(*args, **options)

    for block in blocks:
        block.forward = partial(cast, block.forward)


_WIDE = frozenset(WIDE.split())


class _Autocast(TorchFunctionMode):
    """Widens what CUDA's autocast widens, where CPU's autocast is on."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in _WIDE:
            wide_args, wide_kwargs = tree_map(_widen, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*wide_args, **wide_kwargs)
        if name in WIDENING and args[0].dtype == torch.bfloat16:
            return func(*args, **{"dtype": torch.float32} | kwargs)
        return func(*args, **kwargs)


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
