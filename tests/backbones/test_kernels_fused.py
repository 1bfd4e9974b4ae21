"""Fused adaLN and convolution with GELU equal formulas written out, forward and backward."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from backbones import kernels
from experiments.engine.timing.operators import Operators
from tests.support.interpreter import INTERPRETED, outside, passes
from tests.support.kernels import with_gradients

CPU = torch.device("cpu")
HERE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
CHOICES = ["reference"] + ["triton"] * (INTERPRETED or torch.cuda.is_available())


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def adaln_written_out(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def depthwise_written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Shifted copies, weighted and added, times the normal distribution function."""
    half, (height, width) = weight.shape[-1] // 2, x.shape[-2:]
    padded = torch.nn.functional.pad(x, [half] * 4)
    taps = [(i, j) for i in range(2 * half + 1) for j in range(2 * half + 1)]
    z = bias[:, None, None] + sum(
        weight[:, :, i, j, None] * padded[..., i : i + height, j : j + width] for i, j in taps
    )
    return z * torch.special.ndtr(z)


def run(choice: str, op: str, *inputs: Tensor) -> Tensor:
    """Run the named implementation; Triton's runs on a CPU in its interpreter."""
    if choice == "triton" and op == "adaln":
        from backbones.kernels.adaln_triton import adaln

        return adaln(*inputs, 1e-6)
    if choice == "triton":
        from backbones.kernels.depthwise_triton import depthwise_gelu

        return depthwise_gelu(*inputs)
    with kernels.use(**{op: choice}):
        return getattr(kernels, op)(*inputs)


def agree(op: str, choice: str, inputs: list[Tensor], truth: list[Tensor]) -> None:
    values = with_gradients(
        lambda *args: run(choice, op, *args), [part.to(HERE, torch.float32) for part in inputs]
    )
    for value, expected in zip(values, truth, strict=True):
        assert (
            value.shape == expected.shape
            and (value.cpu() - expected).norm() < 2e-6 * expected.norm()
        )


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("n", "tokens", "dim"), [(1, 1, 5), (2, 17, 24), (3, 33, 100)])
def test_fused_adaln_is_its_formula(choice: str, n: int, tokens: int, dim: int):
    inputs = normal((n, tokens, dim), (n, 1, dim), (n, 1, dim))
    agree("adaln", choice, inputs, with_gradients(adaln_written_out, inputs))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("n", "channels", "size", "kernel"), [(1, 3, (1, 1), 3), (2, 70, (5, 7), 3), (2, 13, (9, 4), 5)]
)
def test_fused_depthwise_is_its_formula(
    choice: str, n: int, channels: int, size: tuple[int, int], kernel: int
):
    inputs = normal((n, channels, *size), (channels, 1, kernel, kernel), (channels,))
    agree("depthwise_gelu", choice, inputs, with_gradients(depthwise_written_out, inputs))


@pytest.mark.parametrize(("n", "channels", "out", "size"), [(1, 3, 5, (1, 1)), (2, 70, 33, (5, 7))])
def test_pointwise_gelu_is_its_formula(n: int, channels: int, out: int, size: tuple[int, int]):
    def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = torch.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0]) + bias[:, None, None]
        return z * torch.special.ndtr(z)

    inputs = normal((n, channels, *size), (out, channels, 1, 1), (out,))
    agree("pointwise_gelu", "reference", inputs, with_gradients(written_out, inputs))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has nothing to do with it")
@pytest.mark.parametrize(("op", "groups"), [("depthwise_gelu", 150), ("pointwise_gelu", 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_wide_convolutions_without_gradients_apply_gelu_themselves(
    op: str, groups: int, layout: torch.memory_format
):
    side = 3 if groups > 1 else 1
    exact = normal((2, 150, 5, 7), (150, 150 // groups, side, side), (150,))
    z = torch.nn.functional.conv2d(*exact, padding=side // 2, groups=groups)
    x, weight, bias = (part.float() for part in exact)
    x = x.to(memory_format=layout)
    kernels.reset_used()
    with torch.no_grad(), Operators(CPU) as operators:
        y = getattr(kernels, op)(x, weight, bias)
    assert kernels.used() == {op: ["onednn"]}
    assert (y - z * torch.special.ndtr(z)).norm() < 2e-6 * y.norm()
    kind = "depthwise convolution" if groups > 1 else "convolution"
    assert operators.classes[kind]["macs"] == y.numel() * weight[0].numel()

    # A narrow convolution keeps its bits, and one with gradients does not run on oneDNN.
    with torch.no_grad():
        getattr(kernels, op)(x[:, :36], weight[:36, : 36 if groups == 1 else 1], bias[:36])
    assert kernels.used()[op] == ["onednn", "reference"]
    kernels.reset_used()
    getattr(kernels, op)(x, weight.requires_grad_(), bias)
    assert "onednn" not in kernels.used()[op]


@pytest.mark.slow
@outside
def test_fused_kernels_run_in_the_interpreter():
    passes(__file__, "formula", 14)


ADALN = ("adaln_triton", dict(ROWS=16, BLOCK=2048))
DEPTHWISE = ("depthwise_triton", dict(K=3, PIXELS=64, CHANNELS=64))


def argument_type(name: str, constants: dict[str, int]) -> str:
    """Return the type of a kernel's argument, as Triton writes it."""
    if name in constants:
        return "constexpr"
    if name.endswith(("ptr", "terms")):
        return "*fp32"
    return "fp32" if name == "eps" else "i32"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("module", "constants", "name"),
    [
        (*ADALN, "_forward"),
        (*ADALN, "_backward"),
        (*DEPTHWISE, "_forward"),
        (*DEPTHWISE, "_backward_z"),
        (*DEPTHWISE, "_backward_x"),
    ],
)
def test_fused_kernels_compile_for_a_gpu_that_is_not_here(
    module: str, constants: dict[str, int], name: str
):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    kernel = getattr(import_module(f"backbones.kernels.{module}"), name)
    types = {argument: argument_type(argument, constants) for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, types, values)
    target = GPUTarget("cuda", 90, 32)
    assert triton.compile(source, target=target, options={"num_warps": 4}).asm["cubin"]
