"""Every network on a GPU that is not here: nothing waits, nothing is elsewhere, types are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import backbones
from backbones import kernels
from experiments.engine.autoregressive.scales import ScaleSystem, draw_images
from experiments.engine.numerics.precision import MODES, precision, read_tf32_flags
from experiments.engine.specs.spec import Sampler
from tests.support.fake_cuda import CUDA, Watch, fake_cuda, move, on_cuda
from tests.support.networks import FAMILIES, Case

# A scan in Triton and a network of text are among the fast ones.
FAST = ("DiS", "CrossDiCo")
# Operations whose state is float32 in every mode.
WIDE = {"gated_linear", "diagonal_ssm"}

# A network that fuses its weights asks for their addresses.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def families() -> list:
    """List the families; all but a few are slow."""
    return [
        pytest.param(case, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, case in FAMILIES.items()
    ]


def run(mode: str, model: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a network under watch, and check the types that its numeric mode declares."""
    kernels.reset_used()
    with precision(mode, CUDA), torch.no_grad(), Watch() as watch:
        out = model(*inputs)
        flags = read_tf32_flags()
    assert out.device.type == "cuda"
    assert flags == {
        "matmul_tf32": mode == "tf32",
        "cudnn_tf32": mode in ("tf32", "as_published"),
    }

    # Products run in the type of the mode, but for those that a recurrence keeps wide.
    low = torch.bfloat16 if mode == "bf16" else torch.float32
    allowed = {low, torch.float32} if WIDE & set(kernels.used()) else {low}
    assert low in watch.products <= allowed
    return out


@pytest.mark.parametrize("case", families())
def test_a_forward_pass_stays_on_the_gpu(case: Case):
    model = case.build().eval()
    inputs = case.inputs()
    with fake_cuda():
        x, t, y = map(on_cuda, inputs)
        move(model)
        # Some networks fuse their weights once, before the first image, in float64.
        if case.exceptions.fuses:
            with torch.no_grad():
                model(x, t, y)
        for mode in ("bf16", "fp32"):
            out = run(mode, model, x, t, y)
            assert out.shape == (len(x), model.out_channels, *x.shape[2:])
            assert out.dtype in (torch.float32, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_every_numeric_mode_has_its_types(mode: str):
    case = FAMILIES["DiT"]
    model, inputs = case.build(), case.inputs()
    with fake_cuda():
        run(mode, move(model), *map(on_cuda, inputs))


def test_tokens_are_drawn_and_learnt_on_the_gpu():
    """An autoregressive network draws every scale, and gives the logits of all in one pass."""
    network, coder = (
        backbones.build(name, **backbones.tiny_options_of(name) | options).eval()
        for name, options in (("var_d16", dict(num_classes=6)), ("vqvae_ch160", {}))
    )
    sampler = Sampler("scales", scale=1.5, top_k=(7,), top_p=0.9)
    with fake_cuda():
        system = ScaleSystem(move(network), move(coder))
        y = torch.zeros(2, dtype=torch.long, device=CUDA)
        with Watch(), torch.no_grad():
            drawing = draw_images(system, sampler, y, lambda logits, scale: logits.argmax(-1))
            image = coder.decode(drawing.features)
        assert image.device.type == "cuda"
        logits = run("bf16", network, y, drawing.all_inputs)
        assert logits.shape == (2, sum(network.lengths), network.vocabulary)


# ---- Kernels


CALLS = {
    "selective_scan": [(2, 6, 9), (2, 6, 9), (6, 3), (2, 3, 9), (2, 3, 9), (6,), (2, 6, 9), (6,)],
    "adaln": [(2, 7, 24), (2, 1, 24), (2, 1, 24)],
    "depthwise_gelu": [(2, 6, 5, 3), (6, 1, 3, 3), (6,)],
    "sample_depthwise": [(2, 6, 5, 3), (2, 9, 6)],
}


@pytest.mark.parametrize("name", CALLS)
def test_triton_is_chosen_and_not_launched(name: str):
    """Outputs and gradients are those that the kernel would fill."""
    pytest.importorskip("triton")
    inputs = [torch.zeros(shape) for shape in CALLS[name]]
    inputs[0] = inputs[0].contiguous(
        memory_format=torch.channels_last if inputs[0].ndim == 4 else torch.contiguous_format
    )
    kernels.reset_used()
    with fake_cuda(), kernels.use(**{name: "triton"}):
        fakes = [on_cuda(x).requires_grad_() for x in inputs]
        with Watch():
            out = getattr(kernels, name)(*fakes)
            out.sum().backward()
        assert out.shape == fakes[0].shape
        for x in fakes:
            assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert kernels.used() == {name: ["triton"]}
