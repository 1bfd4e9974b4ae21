"""Every implementation of every op against its reference in float64, forward and backward, on odd sizes and in every numeric mode.

The same code runs on a CPU with what a CPU has, on a GPU with all that is installed, and in Triton's interpreter. The
references themselves are held against independent truths in the other files of kernels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import kernels
from backbones.kernels.op import Op
from experiments.engine.numerics.precision import precision
from tests.support.interpreter import INTERPRETED, outside, passes
from tests.support.kernels import weights_of, with_gradients

LIMITS = {
    "fp32": 1e-5,
    "tf32": 5e-3,
    "bf16": 2e-2,
}  # TF32 keeps 10 bits of a factor, bf16 7, also of what is kept between passes
LIBRARIES = {  # what runs on a GPU alone: the module, and the modes whose arithmetic it has
    "mamba_ssm": ("mamba_ssm", tuple(LIMITS)),
    "causal_conv1d": ("causal_conv1d", tuple(LIMITS)),
    "fla": ("fla", ("tf32", "bf16")),
    "flash": ("flash_attn", ("bf16",)),
    "triton": ("triton", tuple(LIMITS)),
}


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def selective_scan(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, d, t, s = (3, 37, 67, 16) if large else (2, 5, 19, 3)
    u, delta, z, b, c, a, skip, bias = draw(
        (n, d, t), (n, d, t), (n, d, t), (n, s, t), (n, s, t), (d, s), (d,), (d,)
    )
    return [u, delta, b, c, z], [-a.exp(), skip, bias]


def causal_conv(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, d, t, taps = (3, 37, 67, 4) if large else (2, 5, 19, 3)
    x, weight, bias = draw((n, d, t), (d, 1, taps), (d,))
    return [x], [weight, bias]


def attention(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, heads, queries, keys, e = (2, 3, 67, 131, 72) if large else (1, 2, 7, 13, 24)
    return draw((n, heads, queries, e), (n, heads, keys, e), (n, heads, keys, e)), []


def gated_linear(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, heads, t, e, f = (2, 3, 131, 48, 96) if large else (1, 2, 37, 24, 40)
    q, k, v, logits = draw((n, heads, t, e), (n, heads, t, e), (n, heads, t, f), (n, heads, t, e))
    return [q, k, v, F.logsigmoid(logits) / 16], []


def linear_attention(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, heads, t, e = (2, 3, 67, 33) if large else (1, 2, 13, 11)
    q, k, v = draw((n, heads, t, e), (n, heads, t, e), (n, heads, t, e))
    return [q.abs(), k.abs(), v], []


def diagonal_ssm(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, d, t, s = (2, 37, 67, 16) if large else (1, 5, 19, 3)
    u, decay, phase, real, imaginary = draw((n, d, t), (d, s), (d, s), (d, s), (d, s))
    return [u], [torch.complex(-decay.abs() / 10, phase), torch.complex(real, imaginary)]


def linear(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    rows, wide, out = ((3, 41), 129, 67) if large else ((7,), 13, 29)
    x, weight, bias = draw((*rows, wide), (out, wide), (out,))
    return [x], [weight, bias]


def adaln(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, t, d = (3, 67, 200) if large else (2, 17, 24)
    return draw((n, t, d), (n, 1, d), (n, 1, d)), []


def pointwise(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, out, height, width = (3, 70, 131, 9, 7) if large else (2, 13, 29, 5, 3)
    x, weight, bias = draw((n, channels, height, width), (out, channels, 1, 1), (out,))
    return [x.contiguous(memory_format=torch.channels_last)], [weight, bias]


def addcmul(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, height, width = (3, 131, 9, 7) if large else (2, 13, 5, 3)
    x, gate, branch = draw(
        (n, channels, height, width), (n, channels, 1, 1), (n, channels, height, width)
    )
    return [
        x.contiguous(memory_format=torch.channels_last),
        gate,
        branch.contiguous(memory_format=torch.channels_last),
    ], []


def pool(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (x,) = draw((3, 131, 9, 7) if large else (2, 13, 5, 3))
    return [x.contiguous(memory_format=torch.channels_last)], []


def depthwise_gelu(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, side, height, width = (3, 131, 5, 9, 7) if large else (2, 13, 3, 5, 3)
    x, weight, bias = draw((n, channels, height, width), (channels, 1, side, side), (channels,))
    return [x.contiguous(memory_format=torch.channels_last)], [weight, bias]


ORDER = {
    "selective_scan": (0, 1, 5, 2, 3, 6, 4, 7)
}  # of the op's arguments, where parameters stand between activations
CASES = {
    case.__name__: case
    for case in (selective_scan, causal_conv, attention, gated_linear, linear_attention, diagonal_ssm, linear, adaln, addcmul, pool, pointwise, depthwise_gelu)
} | {"pointwise_gelu": pointwise}  # fmt: skip
RUNS = (
    [
        pytest.param(
            "cuda",
            *run,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        )
        for run in (
            (op, choice, mode)
            for op in CASES
            for choice in getattr(kernels, op).choices
            for mode in LIBRARIES.get(choice, (None, LIMITS))[1]
        )
        if run[1] not in ("shape", "onednn", "row")
    ]
    + [  # a CPU has no TF32; oneDNN's GELU, which takes no gradients, is tested with the fused kernels
        pytest.param("cpu", op, choice, mode)
        for op in CASES
        for choice in getattr(kernels, op).choices
        for mode in ("fp32", "bf16")
        if (choice == "triton" if INTERPRETED else choice not in LIBRARIES and choice != "shape")
        and (
            choice not in ("onednn", "row")
            or (op, choice, mode) in (("linear", "onednn", "fp32"), ("pointwise", "row", "fp32"))
        )
    ]
)


def test_every_op_is_tested():
    assert (
        set(CASES)
        == {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Op)}
        == set(kernels.references())
    )


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize(("device", "name", "choice", "mode"), RUNS)
def test_a_choice_computes_what_the_reference_computes(
    device: str, name: str, choice: str, mode: str, large: bool
):
    """Activations are of the mode's type and parameters float32, as in a network; each gradient by itself."""
    op, (activations, parameters) = getattr(kernels, name), CASES[name](large)
    kind = torch.bfloat16 if mode == "bf16" else torch.float32
    inputs = [part.to(kind) for part in activations] + [
        part.to(torch.complex64 if part.is_complex() else torch.float32) for part in parameters
    ]
    inputs = [inputs[i] for i in ORDER.get(name, range(len(inputs)))]
    truths = with_gradients(
        op.choices["reference"].run,
        [part.to(torch.complex128 if part.is_complex() else torch.float64) for part in inputs],
    )
    inputs = [part.to(device) for part in inputs]
    inputs = [part.requires_grad_() for part in inputs]
    if device == "cuda" and choice in LIBRARIES:
        pytest.importorskip(LIBRARIES[choice][0])
    with (
        precision(mode, torch.device(device)),
        kernels.use(**({} if INTERPRETED else {name: choice})),
    ):
        out = (op.choices[choice].run if INTERPRETED else op)(*inputs)
        with torch.autocast(device, enabled=False):  # as the trainer's backward pass
            gradients = torch.autograd.grad(out, inputs, weights_of(out).to(out))
    for value, truth in zip((out.detach(), *gradients), truths, strict=True):
        value = value.to("cpu", truth.dtype)
        assert value.shape == truth.shape and (value - truth).norm() <= LIMITS[mode] * truth.norm()


@pytest.mark.slow
@outside
def test_triton_choices_run_in_the_interpreter():
    passes(__file__, "triton and not (scan and large)", 10)  # the large scan takes minutes there
