"""Fused passes over rows of channels in C, for networks on a CPU.

PyTorch's loops cost more than the arithmetic where a layer is small: a product with a gate of every
sample takes ten times as long as a copy. The C files beside this one hold such passes, forward and
backward. Those of rows.c are shared among the threads of PyTorch, the others run in one thread. The
machine's C compiler builds them at first use. Without a compiler that has OpenMP, or on a processor
without AVX2, the references run.

Legend: N batch, T pixels, C channels, (H, W) grid with T = HW. Memory is channels-last throughout.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMES = ("rows.c", "linear.c", "attend.c", "conv3x3.c", "taps.c", "update.c")
SOURCES = tuple(Path(__file__).with_name(name) for name in NAMES)
HEADER = Path(__file__).with_name("rows.h")
FLAGS = ("-O3", "-march=x86-64-v3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
# What a processor's capability adds. Results do not depend on it.
CAPABILITIES = {"AVX2": (), "AVX512": ("-mavx512f",)}
# Channels that a vector of AVX2 holds.
LANES = 8
# Sides of the depthwise kernels that rows.c has.
SIDES = (3, 5, 7)

# Arguments of the functions: a tensor, a number of elements, a real number and an exacter one.
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float, "d": ctypes.c_double}
_FUNCTIONS = {
    "adaln_forward": "pppppp nnnn f",
    "adaln_backward": "pppppppp nnnn",
    "gate_forward": "pppp nnnn",
    "gate_backward": "ppppp nnnn",
    "mean_forward": "pp nnn",
    "mean_backward": "pp nnn",
    "shuffle": "pp nnnnn",
    "unshuffle": "pp nnnnn",
    "gelu_forward": "ppp n",
    "transpose_matrix": "pp nn",
    "linear_forward": "ppppp nnn",
    "linear_backward": "pppppp nnn",
    "enter_forward": "pppppppppp nnnnn f",
    "enter_backward": "pppppppppppppp nnnnn",
    "leave_forward": "ppppppppp nnnnn",
    "leave_backward": "pppppppppppp nnnnn",
    "depthwise_forward": "pppppp nnnnn",
    "depthwise_backward": "pppppppp nnnnn",
    "gather_taps": "pp nnnn",
    "scatter_taps": "pp nnnn",
    "winograd_forward": "pppppp nnnnnn",
    "winograd_backward": "ppppppp nnnnnn",
    "neighbours_forward": "ppppp nnnnn",
    "neighbours_backward": "pppppp nnnnn",
    "lerp_tensors": "ppp n f",
    "adamw_tensors": "pppppp n p ddddd",
    "attend_forward": "ppppppp nnnnn nnnnnn f",
    "attend_backward": "pppppppppp nnnnn nnnnnnnnnnnn f",
}


@cache
def library(whole: bool = True) -> ctypes.CDLL | None:
    """Build and load the C functions, or warn once and return None where that is impossible.

    Args:
        whole: the functions for numbers of channels that are whole vectors, which are faster.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITIES:
        return None
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc"))), None)
    if compiler is None:
        warnings.warn("no C compiler: small networks train more slowly on this CPU", stacklevel=2)
        return None

    # Processes that build at the same time each write a file of their own and rename it.
    command = [compiler, *FLAGS, *CAPABILITIES[capability], *([] if whole else ["-DPARTS"])]
    text = b"".join(path.read_bytes() for path in (HEADER, *SOURCES)) + repr(command).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dico_kernels"
    built = folder / f"rows-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not built.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = Path(scratch) / built.name
                command += [*map(str, SOURCES), "-o", str(output)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                output.replace(built)
        except (OSError, subprocess.CalledProcessError) as failure:
            reason = getattr(failure, "stderr", None) or str(failure)
            warnings.warn(
                f"{compiler} did not build the passes in C, so small networks train more slowly: "
                f"{reason.strip().splitlines()[-1]}",
                stacklevel=2,
            )
            return None

    # Every function knows the types of its arguments.
    functions = ctypes.CDLL(str(built))
    for name, letters in _FUNCTIONS.items():
        function = getattr(functions, name)
        function.argtypes = [_TYPES[x] for x in letters.replace(" ", "")]
        function.restype = None
    functions.threads.restype = ctypes.c_long
    return functions


def pays(*args: Tensor | None, **kwargs: Tensor | None) -> bool:
    """Tell whether the passes are worth it: in training, in one thread, and not compiled."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and torch.get_num_threads() == 1
    )


def pays_in_threads(*args: Tensor | None, **kwargs: Tensor | None) -> bool:
    """Tell whether passes that threads share are worth it: in training, and not compiled."""
    return (
        not torch.compiler.is_compiling() and torch.is_grad_enabled() and _shares_torchs_threads()
    )


def _shares_torchs_threads() -> bool:
    """Tell whether the passes use as many threads as PyTorch.

    Both use PyTorch's OpenMP, unless PyTorch was built with another one than the compiler has.
    """
    count = torch.get_num_threads()
    return count == 1 or (functions := library()) is not None and functions.threads() == count


def fits(x: Tensor) -> bool:
    """Tell whether a tensor is plain, in float32 on a CPU.

    A compiled graph would break at the look for the library, so there it never is.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


def is_image(x: Tensor) -> bool:
    """Tell whether a tensor holds images that `fits` takes, channels last."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and fits(x)


def call(name: str, *args: Any, channels: tuple[int, ...]) -> None:
    """Call a C function; tensors go by address.

    Args:
        name: of the function.
        args: its arguments: tensors, arrays of ctypes, numbers or None.
        channels: every number of channels that it goes through by vectors.
    """
    whole = True
    for number in channels:
        whole = whole and number % LANES == 0
    function = getattr(library(whole), name)
    function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in args])


def transposed(x: Tensor) -> Tensor:
    """Return a matrix transposed and contiguous: (M, N) -> (N, M).

    A pass in C does it in less than half the time of PyTorch's copy.
    """
    if not (x.is_contiguous() and fits(x) and _shares_torchs_threads()):
        return x.t().contiguous()
    y = x.new_empty(x.shape[::-1])
    call("transpose_matrix", x, y, *x.shape, channels=())
    return y


# adaLN: x (N, T, C), shift and scale (N, 1, C)


def supports_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> bool:
    """Tell whether `adaln` takes the tensors."""
    wanted = (len(x), 1, x.shape[-1])
    return x.ndim == 3 and shift.shape == scale.shape == wanted and fits(x)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        n, t, c = x.shape
        x = x.contiguous()
        # Both are usually parts of one matrix, whose rows they are read from.
        stride = scale.stride(0)
        if shift.stride() != scale.stride() or scale.stride(2) != 1:
            shift, scale, stride = shift.contiguous(), scale.contiguous(), c
        y = torch.empty_like(x)
        mean = x.new_empty(n * t)
        rstd = x.new_empty(n * t)
        call("adaln_forward", x, shift, scale, y, mean, rstd, n, t, c, stride, eps, channels=(c,))
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        n, t, c = x.shape
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        grad_shift = x.new_empty(n, 1, c)
        grad_scale = x.new_empty(n, 1, c)
        tensors = (x, scale, grad, mean, rstd, grad_x, grad_shift, grad_scale)
        call("adaln_backward", *tensors, n, t, c, ctx.stride, channels=(c,))
        return grad_x, grad_shift, grad_scale, None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalise rows, scale and shift."""
    return _AdaLN.apply(x, shift, scale, eps)


# Gates: x and b (N, C, H, W), gate (N, C, 1, 1)


def supports_scale(b: Tensor, gate: Tensor) -> bool:
    """Tell whether `scale` takes the tensors."""
    return is_image(b) and gate.shape == (*b.shape[:2], 1, 1) and gate.dtype == b.dtype


def supports_gate(x: Tensor, gate: Tensor, b: Tensor) -> bool:
    """Tell whether `gate` takes the tensors."""
    return x.shape == b.shape and supports_scale(b, gate) and is_image(x)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, gate: Tensor, b: Tensor) -> Tensor:
        n, c, h, w = b.shape
        if gate.stride(1) != 1:
            gate = gate.contiguous()
        y = torch.empty_like(b)
        call("gate_forward", x, gate, b, y, n, h * w, c, gate.stride(0), channels=(c,))
        ctx.save_for_backward(gate, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, b = ctx.saved_tensors
        n, c, h, w = b.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_gate = b.new_empty(n, c, 1, 1)
        grad_b = torch.empty_like(b)
        tensors = (gate, b, grad, grad_gate, grad_b)
        call("gate_backward", *tensors, n, h * w, c, gate.stride(0), channels=(c,))
        return grad if ctx.needs_input_grad[0] else None, grad_gate, grad_b


def gate(x: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """Compute x + gate b."""
    return _Gate.apply(x, gate, b)


def scale(b: Tensor, gate: Tensor) -> Tensor:
    """Compute gate b."""
    return _Gate.apply(None, gate, b)


# Mean over pixels: (N, C, H, W) -> (N, C, 1, 1)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = ctx.shape = x.shape
        y = x.new_empty(n, c, 1, 1)
        call("mean_forward", x, y, n, h * w, c, channels=(c,))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        n, c, h, w = ctx.shape
        grad = grad.contiguous()
        grad_x = grad.new_empty(n, h, w, c)
        call("mean_backward", grad, grad_x, n, h * w, c, channels=(c,))
        return grad_x.permute(0, 3, 1, 2)


mean = _Mean.apply
supports_mean = is_image


# Exact GELU, of any shape whose memory is dense


def supports_gelu(x: Tensor) -> bool:
    """Tell whether `gelu` takes the tensor."""
    dense = x.is_contiguous() or (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return dense and fits(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        slope = torch.empty_like(x)
        call("gelu_forward", x, y, slope, x.numel(), channels=(x.numel(),))
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


gelu = _Gelu.apply


# Depthwise convolution: x (N, C, H, W), weight (C, 1, k, k), bias (C,) or None


def supports_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether the depthwise convolutions take the tensors."""
    return is_image(x) and len(weight) == x.shape[1] and weight.shape[-1] in SIDES


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool
    ) -> Tensor:
        n, c, h, w = x.shape
        side = weight.shape[-1]
        taps = weight.flatten(1).t().contiguous()  # (k k, C)
        y = torch.empty_like(x)
        slope = torch.empty_like(x) if with_gelu else None
        frame = x.new_zeros((h + side - 1) * (w + side - 1) * c)
        tensors = (x, taps, bias, y, slope, frame)
        call("depthwise_forward", *tensors, n, h, w, c, side, channels=(c,))
        ctx.save_for_backward(x, taps, slope)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, slope = ctx.saved_tensors
        n, c, h, w = x.shape
        side = int(len(taps) ** 0.5)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        grad_taps = torch.empty_like(taps)
        grad_bias = x.new_empty(c)
        frames = x.new_zeros((2 * (h + side - 1) * (w + side - 1) + h * w) * c)
        tensors = (x, taps.flip(0), slope, grad, grad_x, grad_taps, grad_bias, frames)
        call("depthwise_backward", *tensors, n, h, w, c, side, channels=(c,))
        grad_weight = grad_taps.t().reshape(c, 1, side, side)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel."""
    return _Depthwise.apply(x, weight, bias, False)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel, then apply GELU."""
    return _Depthwise.apply(x, weight, bias, True)
