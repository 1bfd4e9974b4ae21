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

    # What every channel reads, its gate and its step sizes.
    u = draw(samples, channels, steps)
    z = draw(samples, channels, steps)
    delta = 3 * draw(samples, channels, steps) - 2
    delta[..., -1:] = 21

    # The weights of the channels, and what all channels share.
    a = -torch.exp(draw(channels, states))
    d = draw(channels)
    bias = draw(channels)
    b = draw(samples, states, steps)
    c = draw(samples, states, steps)
    return [u, delta, a, b, c, d, z, bias]


def conv_inputs(taps: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 37), (5, 1, taps), (5,))
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def results(op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradient of every input."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    out = op(*inputs)
    assert out.dtype == dtype
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, probe)]


def scan_by_hand(u, delta, a, b, c, d, z, bias):
    """Sum over the past of every step: the definition, written apart from the kernels."""
    # The softplus of the steps, without overflow.
    step = delta + bias[:, None]
    dt = torch.log1p(torch.exp(-step.abs())) + step.clamp(min=0)

    # A state of step s has decayed over dt_{s+1} + ... + dt_t at step t.
    past = dt.cumsum(-1)
    span = past[:, :, :, None] - past[:, :, None, :]
    now = torch.ones(span.shape[-2:], dtype=torch.bool).tril()
    exponent = span.where(now, 0)[..., None] * a[:, None, None]
    decay = torch.exp(exponent) * now[..., None]  # (N, D, t, s, S)

    # Read the states, skip and gate.
    y = torch.einsum("ndtsk,nks,nds,nkt->ndt", decay, b, dt * u, c) + d[:, None] * u
    return y * z * torch.sigmoid(z)


@pytest.mark.parametrize("size", SIZES)
def test_scan_reference_is_the_sum_over_the_past(size: str):
    """The reference is the definition, forward and backward.

    Above 20, torch's softplus is the identity, which is 2e-9 off.
    """
    truths = results(scan_by_hand, scan_inputs(size), torch.float64)
    with use(selective_scan="reference"):
        values = results(selective_scan, scan_inputs(size), torch.float64)
    for value, truth in zip(values, truths, strict=True):
        assert relative_rms(value, truth) < 1e-8


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_scan_loop_agrees_with_the_reference(size: str, dtype: torch.dtype, bound: float):
    """The loop over steps is as exact as its numbers allow, forward and backward."""
    with use(selective_scan="reference"):
        truths = results(selective_scan, scan_inputs(size), torch.float64)
    with use(selective_scan="loop"):
        values = results(selective_scan, scan_inputs(size), dtype)
    for value, truth in zip(values, truths, strict=True):
        assert value.dtype == dtype
        assert relative_rms(value, truth) < bound


def test_scan_loop_keeps_its_state_in_float32():
    """bfloat16 inputs, also under autocast, cost no more than their own rounding."""
    # The weights a, d and bias stay in float32.
    u, delta, a, b, c, d, z, bias = scan_inputs("odd")
    u, delta, b, c, z = (tensor.bfloat16() for tensor in (u, delta, b, c, z))
    a, d, bias = (tensor.float() for tensor in (a, d, bias))
    inputs = [u, delta, a, b, c, d, z, bias]
    with use(selective_scan="reference"):
        truth = selective_scan(*(tensor.double() for tensor in inputs))
    with use(selective_scan="loop"), torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(*inputs)

    # The output is the truth, rounded; its last bit may differ.
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, truth) < 2.5e-3
    assert relative_rms(out, truth.float().bfloat16()) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="the test below runs this one in Triton's interpreter",
)
@pytest.mark.parametrize("size", SIZES)
def test_scan_in_triton_agrees_with_the_reference(size: str):
    """Triton's scan is as exact as float32 allows, and the same without gradients."""
    from backbones.kernels import selective_scan_triton

    # The truth, in float64.
    with use(selective_scan="reference"):
        truths = results(selective_scan, scan_inputs(size), torch.float64)

    # The kernels, forward and backward.
    device = "cpu" if INTERPRETED else "cuda"
    inputs = [tensor.to(device, torch.float32) for tensor in scan_inputs(size)]
    values = results(selective_scan_triton.selective_scan, inputs, torch.float32)
    for value, truth in zip(values, truths, strict=True):
        assert value.dtype == torch.float32
        assert relative_rms(value.cpu(), truth) < 3e-6

    # Without gradients, nothing is kept for them.
    with torch.no_grad():
        assert torch.equal(selective_scan_triton.selective_scan(*inputs), values[0])


@pytest.mark.slow
@outside
def test_scan_in_triton_runs_in_the_interpreter():
    passes(__file__, "scan_in_triton_agrees", len(SIZES))


@pytest.mark.parametrize("taps", [3, 4])
def test_causal_convolution_agrees_with_the_reference_and_sees_no_future(taps: int):
    """Both choices agree, and an output is the weighted sum of the inputs up to its step."""
    with use(causal_conv="reference"):
        truths = results(causal_conv, conv_inputs(taps), torch.float64)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        with use(causal_conv="conv1d"):
            values = results(causal_conv, conv_inputs(taps), dtype)
        for value, truth in zip(values, truths, strict=True):
            assert value.dtype == dtype
            assert relative_rms(value, truth) < bound

    # Step 20, by its definition.
    x, weight, bias = conv_inputs(taps)
    by_hand = sum(weight[:, 0, taps - 1 - back] * x[:, :, 20 - back] for back in range(taps)) + bias
    assert relative_rms(truths[0][:, :, 20], by_hand * torch.sigmoid(by_hand)) < 1e-14


def test_counts_are_the_closed_form_on_any_device_and_choice():
    """A scan counts two operations per channel, step and state, whatever computes it."""
    inputs = scan_inputs("odd")
    choices = (("cpu", "reference"), ("cpu", "loop"), ("meta", "shape"), ("meta", "reference"))
    counts = set()
    for device, choice in choices:
        with MacCounter() as counter, use(selective_scan=choice), torch.no_grad():
            out = selective_scan(*(tensor.to(device) for tensor in inputs))
            matrix = torch.ones(2, 3, device=device) @ torch.ones(3, 4, device=device)
        assert out.shape == inputs[0].shape
        assert matrix.shape == (2, 4)
        counts.add((counter.core, counter.extra))
    assert counts == {(2 * 2 * 5 * 37 * 3 + 2 * 3 * 4, 0)}

    # A convolution counts one operation per channel, step and tap.
    with MacCounter() as counter:
        causal_conv(*conv_inputs(3))
    assert (counter.core, counter.extra) == (2 * 5 * 37 * 3, 0)


def test_counting_ends_with_its_context():
    with pytest.raises(RuntimeError, match="stop"), MacCounter() as counter:
        raise RuntimeError("stop")
    causal_conv(*conv_inputs(3))
    assert counter.core == 0
