"""Gated linear attention and the diagonal SSM equal independent truths on awkward sizes."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import kernels
from backbones.kernels import diagonal_ssm, gated_linear
from experiments.engine.numerics.precision import precision
from tests.support.kernels import with_gradients
from tests.support.networks import relative_rms

GATES = {"none": 0.0, "mild": 1 / 16, "strong": 8.0, "very strong": 60.0}


def gated_inputs(
    tokens: int, strength: float, batch: int = 2, heads: int = 3, dk: int = 5, dv: int = 7
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, g = (
        torch.randn(batch, heads, tokens, e, generator=generator, dtype=torch.float64)
        for e in (dk, dk, dv, dk)
    )
    return [q, k, v, strength * F.logsigmoid(g)]


def attention_matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Attend without a recurrence.

    o_i = e^-1/2 sum over j <= i of (sum over d of q_id k_jd exp(g_j+1 + ... + g_i)_d) v_j.
    """
    tokens, b = q.shape[2], g.cumsum(dim=2)
    exponent = b[:, :, :, None] - b[:, :, None]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[..., None]
    weights = torch.einsum(
        "nhid,nhjd,nhijd->nhij", q, k, exponent.masked_fill(~seen, -torch.inf).exp()
    )
    return q.shape[-1] ** -0.5 * weights @ v


def forced(op, choice: str):
    def run(*args: Tensor) -> Tensor:
        with kernels.use(**{op.name: choice}):
            return op(*args)

    return run


@pytest.mark.parametrize("strength", GATES.values(), ids=GATES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 37, 100])
def test_gated_linear_is_the_attention_matrix(tokens: int, strength: float):
    inputs = gated_inputs(tokens, strength)
    truth = with_gradients(attention_matrix, inputs)
    for choice in ("reference", "chunked"):
        for value, expected in zip(
            with_gradients(forced(gated_linear, choice), inputs), truth, strict=True
        ):
            assert relative_rms(value, expected) <= 1e-12 if expected.any() else not value.any()


@pytest.mark.parametrize("strength", GATES.values(), ids=GATES)
def test_chunked_gated_linear_in_float32(strength: float):
    """Sums of g reach 32 times the strength; their differences keep float32's relative error."""
    inputs = gated_inputs(131, strength, dk=9, dv=6)
    truth = with_gradients(gated_linear.choices["reference"].run, inputs)
    for value, expected in zip(
        with_gradients(forced(gated_linear, "chunked"), [x.float() for x in inputs]),
        truth,
        strict=True,
    ):
        assert (
            value.dtype == torch.float32
            and relative_rms(value, expected) <= 1e-6 + 1e-8 * 32 * strength
        )


@pytest.mark.parametrize("burst", [slice(0, 16), slice(16, 32), slice(15, 17), slice(31, 33)])
def test_a_burst_of_decay_stays_finite_in_float32(burst: slice):
    """exp(100) is infinite in float32; a bound on a whole chunk's decay lets a half's through."""
    inputs = gated_inputs(64, 0.01)
    inputs[3][:, :, burst] = -100.0 / (burst.stop - burst.start)
    truth = with_gradients(gated_linear.choices["reference"].run, inputs)
    for value, expected in zip(
        with_gradients(forced(gated_linear, "chunked"), [x.float() for x in inputs]),
        truth,
        strict=True,
    ):
        assert value.isfinite().all() and relative_rms(value, expected) <= 2e-5


def test_gated_linear_sees_no_later_token_and_no_other_sample():
    inputs = gated_inputs(40, 0.1)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, 21:] *= 0.5
        x[1] *= 0.5
    before, after = (forced(gated_linear, "chunked")(*x) for x in (inputs, changed))
    assert torch.equal(before[0, :, :21], after[0, :, :21]) and not torch.equal(
        before[0, :, 21], after[0, :, 21]
    )


def test_the_state_stays_in_float32_under_autocast():
    inputs = [x.bfloat16() for x in gated_inputs(200, 0.02)]
    truth = gated_linear.choices["reference"].run(*(x.double() for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_linear(*inputs)
    assert out.dtype == torch.bfloat16 and relative_rms(out, truth) <= 3e-3


def test_choices_are_made_by_device_and_recorded():
    inputs = gated_inputs(4, 1.0)
    kernels.reset_used()
    gated_linear(*inputs)
    assert kernels.used() == {"gated_linear": ["chunked"]}
    assert gated_linear(*(x.to("meta") for x in inputs)).shape == (2, 3, 4, 7)
    assert kernels.used() == {"gated_linear": ["chunked", "shape"]}
    with pytest.raises(ValueError, match="forced to 'fla'"), kernels.use(gated_linear="fla"):
        gated_linear(*inputs)


def test_flas_tf32_is_taken_where_a_flag_allows_it_and_no_decay_is_read_back_from_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
):
    """Where no flag does it is taken by force."""
    fla = gated_linear.choices["fla"]
    q = torch.randn(1, 1, 3, 2)
    taken = {}
    for mode in ("fp32", "tf32", "as_published"):
        with precision(mode, torch.device("cpu")):
            taken[mode] = fla.pays(q, q, q, q)
    assert taken == {"fp32": False, "tf32": True, "as_published": True}
    assert fla.pays(*[q.bfloat16()] * 4)

    # A tensor on a GPU that has no values to be read.
    module = sys.modules[fla.run.__module__]
    monkeypatch.setattr(module, "_fla_installed", lambda: True)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert fla.supports(*[on_gpu] * 4)
    assert not module._decays_mildly(on_gpu)


def ssm_inputs(tokens: int, dt: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    u, w_real, w_imag, decay, phase = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(2, 3, tokens), *[(3, 5)] * 4]
    )
    return [u, dt * torch.complex(-decay.exp(), 20 * phase), torch.complex(w_real, w_imag)]


def toeplitz(u: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The impulse response as a matrix, without a recurrence or a transform."""
    lag = torch.arange(u.shape[-1])[:, None] - torch.arange(u.shape[-1])
    response = (w[..., None, None] * (z[..., None, None] * lag.clamp_min(0)).exp()).sum(
        dim=1
    ).real * (lag >= 0)
    return torch.einsum("dts,nds->ndt", response, u)


@pytest.mark.parametrize("tokens", [1, 2, 37, 64])
@pytest.mark.parametrize("dt", [0.01, 1.0])
def test_diagonal_ssm_is_the_toeplitz_product(tokens: int, dt: float):
    inputs = ssm_inputs(tokens, dt)
    truth = with_gradients(toeplitz, inputs)
    for choice in ("reference", "fft"):
        for value, expected in zip(
            with_gradients(forced(diagonal_ssm, choice), inputs), truth, strict=True
        ):
            assert (value - expected).abs().max() <= 1e-11 * truth[1].abs().max().clamp_min(1)


def test_diagonal_ssm_in_float32_on_a_long_sequence():
    u, z, w = ssm_inputs(1000, 0.05)
    truth = diagonal_ssm.choices["reference"].run(u, z.to(torch.complex64).to(torch.complex128), w)
    assert (
        relative_rms(diagonal_ssm(u.float(), z.to(torch.complex64), w.to(torch.complex64)), truth)
        <= 2e-6
    )
