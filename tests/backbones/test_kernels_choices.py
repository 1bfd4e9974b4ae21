"""Every implementation of every op equals its reference in float64, forward and backward.

Sizes are odd, and every numeric mode is tested. The same code runs on a CPU with what a CPU has,
on a GPU with all that is installed, and in Triton's interpreter. The other files of kernels hold
the references against independent truths.
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

# TF32 keeps 10 bits of a factor and bf16 keeps 7, also of what is kept between passes.
LIMITS = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2}
# Choices that run on a GPU alone: the library, and the modes whose arithmetic it has.
LIBRARIES = {
    "mamba_ssm": ("mamba_ssm", tuple(LIMITS)),
    "causal_conv1d": ("causal_conv1d", tuple(LIMITS)),
    "fla": ("fla", ("tf32", "bf16")),
    "flash": ("flash_attn", ("bf16",)),
    "triton": ("triton", tuple(LIMITS)),
    "efficient": ("torch", tuple(LIMITS)),
}
# Choices of a CPU alone. They take float32 only; oneDNN's GELU, which takes no gradients, is
# tested with the fused kernels. `rows` has a file of its own.
CPU_ONLY = {("linear", "onednn"), ("pointwise", "row")}


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


def channel_attention(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, heads, e, t = (2, 3, 37, 131) if large else (1, 2, 5, 13)
    q, k, v = draw((n, heads, e, t), (n, heads, e, t), (n, heads, e, t))
    norms = [x.norm(dim=-1, keepdim=True) for x in (q, k)]
    return [q, k, v, *norms], draw((heads, 1, 1))


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


def pixel_shuffle(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (x,) = draw((3, 44, 9, 7) if large else (2, 12, 5, 3))
    return [x.contiguous(memory_format=torch.channels_last)], []


def pixel_unshuffle(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (x,) = draw((3, 11, 18, 14) if large else (2, 3, 10, 6))
    return [x.contiguous(memory_format=torch.channels_last)], []


def scale(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (_, gate, branch), _ = addcmul(large)
    return [branch, gate], []


def gelu(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    return draw((3, 131, 9, 7) if large else (2, 13, 5, 3)), []


def depthwise_gelu(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, side, height, width = (3, 131, 5, 9, 7) if large else (2, 13, 3, 5, 3)
    x, weight, bias = draw((n, channels, height, width), (channels, 1, side, side), (channels,))
    return [x.contiguous(memory_format=torch.channels_last)], [weight, bias]


def conv3x3(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, outputs, height, width = (3, 37, 20, 9, 7) if large else (2, 5, 3, 2, 3)
    x, weight, bias = draw((n, channels, height, width), (outputs, channels, 3, 3), (outputs,))
    return [x.contiguous(memory_format=torch.channels_last)], [weight, bias]


def adaln_pointwise(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (x,), parameters = pointwise(large)
    shift, scale = draw((*x.shape[:2], 1, 1), (*x.shape[:2], 1, 1))
    return [x, shift, scale], parameters


def pointwise_gated(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    (h,), parameters = pointwise(large)
    n, _, height, width = h.shape
    out = len(parameters[1])
    x, gate, factor = draw((n, out, height, width), (n, out, 1, 1), (*h.shape[:2], 1, 1))
    return [x.contiguous(memory_format=torch.channels_last), gate, h, factor], parameters


def deformable(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, side, groups, points, width = (2, 9, 3, 9, 8) if large else (2, 5, 2, 4, 3)
    values, places, weights = draw(
        (n, side, side, groups, width),
        (n, side, side, groups, points, 2),
        (n, side, side, groups, points),
    )
    # Points reach beyond the map on all sides.
    return [values, 2 * places, weights], []


def sample_depthwise(large: bool) -> tuple[list[Tensor], list[Tensor]]:
    n, channels, side, taps = (2, 70, 4, 25) if large else (3, 5, 4, 9)
    x, kernels_of_samples = draw((n, channels, side, side), (n, taps, channels))
    return [x.contiguous(memory_format=torch.channels_last), kernels_of_samples], []


# The position of each of the op's arguments among (activations, parameters).
ORDER = {"selective_scan": (0, 1, 5, 2, 3, 6, 4, 7), "pointwise_gated": (0, 1, 2, 4, 5, 3)}
CASES = {
    "selective_scan": selective_scan,
    "causal_conv": causal_conv,
    "attention": attention,
    "channel_attention": channel_attention,
    "gated_linear": gated_linear,
    "linear_attention": linear_attention,
    "diagonal_ssm": diagonal_ssm,
    "linear": linear,
    "adaln": adaln,
    "addcmul": addcmul,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "pool": pool,
    "pointwise": pointwise,
    "scale": scale,
    "gelu": gelu,
    "conv3x3": conv3x3,
    "depthwise": depthwise_gelu,
    "depthwise_gelu": depthwise_gelu,
    "pointwise_gelu": pointwise,
    "adaln_pointwise_gelu": adaln_pointwise,
    "pointwise_gated": pointwise_gated,
    "deformable": deformable,
    "sample_depthwise": sample_depthwise,
}


def gpu_modes(op: str, choice: str) -> tuple[str, ...]:
    """Return the numeric modes in which a choice is tested on a GPU."""
    if choice in ("shape", "onednn", "row", "rows"):
        return ()
    return LIBRARIES[choice][1] if choice in LIBRARIES else tuple(LIMITS)


def cpu_modes(op: str, choice: str) -> tuple[str, ...]:
    """Return the numeric modes in which a choice is tested here; a CPU has no TF32."""
    if INTERPRETED:
        return ("fp32", "bf16") if choice == "triton" else ()
    if choice in LIBRARIES or choice in ("shape", "rows"):
        return ()
    if choice in ("onednn", "row"):
        return ("fp32",) if (op, choice) in CPU_ONLY else ()
    return ("fp32", "bf16")


def list_runs() -> list:
    """List (device, op, choice, mode) of all tests; those of a GPU are skipped without one."""
    marks = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]
    runs = []
    for op in CASES:
        for choice in getattr(kernels, op).choices:
            for mode in gpu_modes(op, choice):
                runs.append(pytest.param("cuda", op, choice, mode, marks=marks))
            for mode in cpu_modes(op, choice):
                runs.append(pytest.param("cpu", op, choice, mode))
    return runs


def test_every_op_is_tested():
    exported = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Op)}
    # `unpack` returns three tensors, and is tested with the other passes in C. Updates have a file.
    assert {*CASES, "unpack", "adamw", "lerp"} == exported == set(kernels.references())


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize(("device", "name", "choice", "mode"), list_runs())
def test_a_choice_computes_what_the_reference_computes(
    device: str, name: str, choice: str, mode: str, large: bool
):
    """Activations have the mode's type and parameters are float32, as in a network."""
    # Round the inputs to the mode's types first, so that reference and choice see the same.
    op = getattr(kernels, name)
    activations, parameters = CASES[name](large)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    inputs = [x.to(dtype) for x in activations]
    inputs += [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in parameters]
    inputs = [inputs[i] for i in ORDER.get(name, range(len(inputs)))]
    exact = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs]
    truths = with_gradients(op.choices["reference"].run, exact)

    if device == "cuda" and choice in LIBRARIES:
        pytest.importorskip(LIBRARIES[choice][0])
    inputs = [x.to(device).requires_grad_() for x in inputs]
    # In the interpreter tensors are on a CPU, which a Triton choice does not support.
    run = op.choices[choice].run if INTERPRETED else op
    forced = {} if INTERPRETED else {name: choice}
    with precision(mode, torch.device(device)), kernels.use(**forced):
        out = run(*inputs)
        # As in the trainer, the backward pass is outside autocast.
        with torch.autocast(device, enabled=False):
            gradients = torch.autograd.grad(out, inputs, weights_of(out).to(out))

    for value, truth in zip((out.detach(), *gradients), truths, strict=True):
        value = value.to("cpu", truth.dtype)
        assert value.shape == truth.shape
        assert (value - truth).norm() <= LIMITS[mode] * truth.norm()


@pytest.mark.slow
@outside
def test_triton_choices_run_in_the_interpreter():
    # The large scan takes minutes there.
    passes(__file__, "triton and not (scan and large)", 14)
