"""The scan and the causal convolution equal their definitions in float64 on awkward sizes."""

import pytest
import torch
from torch import Tensor

from backbones.kernels import causal_conv, selective_scan, use
from experiments.engine.timing.cost import MacCounter
from tests.support.interpreter import INTERPRETED, outside, passes
from tests.support.networks import relative_rms

SIZES = {  # samples, channels, steps, states
    "odd": (2, 5, 37, 3),
    "two steps": (1, 3, 2, 2),
    "a whole chunk": (1, 2, 16, 4),
    "many states": (1, 3, 18, 17),
}


def scan_inputs(size: str) -> list[Tensor]:
    """Draw inputs whose states are kept long or forgotten at once.

    Steps reach from e^-8 to beyond 20, where softplus passes its argument through.
    """
    samples, channels, steps, states = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, z, delta = (
        draw(samples, channels, steps),
        draw(samples, channels, steps),
        3 * draw(samples, channels, steps) - 2,
    )
    delta[..., -1:] = 21
    a, d, bias = -torch.exp(draw(channels, states)), draw(channels), draw(channels)
    return [u, delta, a, draw(samples, states, steps), draw(samples, states, steps), d, z, bias]


def conv_inputs(taps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 5, 37), (5, 1, taps), (5,))
    ]


def results(op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradient of every input."""
    inputs = [part.to(dtype).requires_grad_() for part in inputs]
    out = op(*inputs)
    assert out.dtype == dtype
    return [
        out.detach(),
        *torch.autograd.grad(
            out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        ),
    ]


def scan_by_hand(u, delta, a, b, c, d, z, bias):
    """Sum over the past of every step: the definition, written apart from the kernels."""
    dt = torch.log1p(torch.exp(-(delta + bias[:, None]).abs())) + (delta + bias[:, None]).clamp(
        min=0
    )
    past = dt.cumsum(-1)
    span = past[:, :, :, None] - past[:, :, None, :]  # dt_{s+1} + ... + dt_t
    now = torch.ones(span.shape[-2:], dtype=torch.bool).tril()
    decay = (
        torch.exp(span.where(now, 0)[..., None] * a[:, None, None]) * now[..., None]
    )  # (N, D, t, s, S)
    y = torch.einsum("ndtsk,nks,nds,nkt->ndt", decay, b, dt * u, c) + d[:, None] * u
    return y * z * torch.sigmoid(z)


@pytest.mark.parametrize("size", SIZES)
def test_scan_reference_is_the_sum_over_the_past(size: str):
    with use(selective_scan="reference"):
        for value, truth in zip(
            results(selective_scan, scan_inputs(size), torch.float64),
            results(scan_by_hand, scan_inputs(size), torch.float64),
            strict=True,
        ):
            assert (
                relative_rms(value, truth) < 1e-8
            )  # torch's softplus is the identity above 20, which is 2e-9 off


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_scan_loop_agrees_with_the_reference(size: str, dtype: torch.dtype, bound: float):
    with use(selective_scan="reference"):
        truths = results(selective_scan, scan_inputs(size), torch.float64)
    with use(selective_scan="loop"):
        for value, truth in zip(
            results(selective_scan, scan_inputs(size), dtype), truths, strict=True
        ):
            assert value.dtype == dtype and relative_rms(value, truth) < bound


def test_scan_loop_keeps_its_state_in_float32():
    """bfloat16 inputs, also under autocast, cost no more than their own rounding."""
    inputs = [
        part.bfloat16() if i not in (2, 5, 7) else part.float()
        for i, part in enumerate(scan_inputs("odd"))
    ]
    with use(selective_scan="reference"):
        truth = selective_scan(*(part.double() for part in inputs))
    with use(selective_scan="loop"), torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(*inputs)
    assert out.dtype == torch.bfloat16 and relative_rms(out, truth) < 2.5e-3
    assert (
        torch.equal(out, truth.float().bfloat16())
        or relative_rms(out, truth.float().bfloat16()) < 1e-3
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="the test below runs this one in Triton's interpreter",
)
@pytest.mark.parametrize("size", SIZES)
def test_scan_in_triton_agrees_with_the_reference(size: str):
    from backbones.kernels import selective_scan_triton

    with use(selective_scan="reference"):
        truths = results(selective_scan, scan_inputs(size), torch.float64)
    inputs = [
        part.to("cpu" if INTERPRETED else "cuda", torch.float32) for part in scan_inputs(size)
    ]
    values = results(selective_scan_triton.selective_scan, inputs, torch.float32)
    for value, truth in zip(values, truths, strict=True):
        assert value.dtype == torch.float32 and relative_rms(value.cpu(), truth) < 3e-6
    with torch.no_grad():
        assert torch.equal(selective_scan_triton.selective_scan(*inputs), values[0])


@pytest.mark.slow
@outside
def test_scan_in_triton_runs_in_the_interpreter():
    passes(__file__, "scan_in_triton_agrees", len(SIZES))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name, flags", [("_forward", {"KEEP": True}), ("_backward", {})])
def test_scan_in_triton_compiles_for_a_gpu_that_is_not_here(name: str, flags: dict[str, bool]):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from backbones.kernels import selective_scan_triton

    kernel, constants = (
        getattr(selective_scan_triton, name),
        flags | selective_scan_triton._blocks(3072, 16),
    )
    types = {
        arg: "constexpr" if arg in constants else "i32" if arg in "DST" else "*fp32"
        for arg in kernel.arg_names
    }
    source = triton.compiler.ASTSource(
        kernel, types, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    )
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8}).asm[
        "cubin"
    ]


@pytest.mark.parametrize("taps", [3, 4])
def test_causal_convolution_agrees_with_the_reference_and_sees_no_future(taps: int):
    with use(causal_conv="reference"):
        truths = results(causal_conv, conv_inputs(taps), torch.float64)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        with use(causal_conv="conv1d"):
            for value, truth in zip(
                results(causal_conv, conv_inputs(taps), dtype), truths, strict=True
            ):
                assert value.dtype == dtype and relative_rms(value, truth) < bound
    x, weight, bias = conv_inputs(taps)
    by_hand = sum(weight[:, 0, taps - 1 - back] * x[:, :, 20 - back] for back in range(taps)) + bias
    assert relative_rms(truths[0][:, :, 20], by_hand * torch.sigmoid(by_hand)) < 1e-14


def test_counts_are_the_closed_form_on_any_device_and_choice():
    u, *rest = scan_inputs("odd")
    counts = set()
    for device, choice in (
        ("cpu", "reference"),
        ("cpu", "loop"),
        ("meta", "shape"),
        ("meta", "reference"),
    ):
        with MacCounter() as counter, use(selective_scan=choice), torch.no_grad():
            out = selective_scan(u.to(device), *(part.to(device) for part in rest))
            matrix = torch.ones(2, 3, device=device) @ torch.ones(3, 4, device=device)
        assert out.shape == u.shape and matrix.shape == (2, 4)
        counts.add((counter.core, counter.extra))
    assert counts == {(2 * 2 * 5 * 37 * 3 + 2 * 3 * 4, 0)}
    with MacCounter() as counter:
        causal_conv(*conv_inputs(3))
    assert (counter.core, counter.extra) == (2 * 5 * 37 * 3, 0)


def test_counting_ends_with_its_context():
    with pytest.raises(RuntimeError, match="stop"), MacCounter() as counter:
        raise RuntimeError("stop")
    causal_conv(*conv_inputs(3))
    assert counter.core == 0
