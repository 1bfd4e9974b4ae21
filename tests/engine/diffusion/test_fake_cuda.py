"""A step of every sampler on a GPU that is not here: nothing waits for it, nothing is elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import backbones
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import ClassifierGradient
from experiments.engine.diffusion.guidance import ALWAYS, Guided, RisingScale
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.samplers import OF_FLOW, OF_IDDPM, BoundSampler, bind_sampler
from experiments.engine.specs.spec import Diffusion, Sampler
from tests.support.fake_cuda import CUDA, Watch, fake_cuda, move, on_cuda, really

NOISE, FLOW = Diffusion(), Diffusion("flow")
SAMPLERS = [
    (NOISE, Sampler("ancestral")),
    (NOISE, Sampler("ancestral", clip=True)),
    (NOISE, Sampler("ddim", eta=0.5)),
    (NOISE, Sampler("dpm_solver")),
    (NOISE, Sampler("dpm_solver_3s")),
    (FLOW, Sampler("euler")),
    (FLOW, Sampler("euler", shift=0.3)),
    (FLOW, Sampler("heun")),
    (FLOW, Sampler("euler_short_last")),
    (FLOW, Sampler("heun_short_last")),
    (FLOW, Sampler("adams2")),
    (FLOW, Sampler("adams4")),
    *((FLOW, Sampler("sde", last_step=end)) for end in ("mean", "tweedie", "euler")),
]
# Steps that look at the images, and steps that another library takes on the host.
WAITING = {"dopri5": "adaptive", "dpm_solver_diffusers": "of another library"}
NUM_STEPS = 7


def bind(diffusion: Diffusion, spec: Sampler, gradient: object = None) -> BoundSampler:
    """Bind a sampler on the host, and move the tables of its schedule."""
    process = really(build_diffusion)(diffusion)
    sampler = really(bind_sampler)(spec, process, gradient)
    if isinstance(process, IDDPM):
        sampler.diffusion.to(CUDA)
    return sampler


def guided(
    diffusion: Diffusion, interval: tuple[float, float] = ALWAYS, power: float | None = None
):
    """A network that every sampler takes, under guidance of three of four channels."""

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = x * t.float().reshape(-1, 1, 1, 1)
        return out if diffusion is FLOW else torch.cat([out, out], dim=1)

    times = (0.0, 1.0) if diffusion is FLOW else (0, 999)
    scale = RisingScale(1.5, power, times[1]) if power else 1.5
    return Guided(network, scale, 10, channels=3, interval=interval, times=times)


def step_all(sampler: BoundSampler, model: object) -> Watch:
    """Start, then take all further steps under watch."""
    x = torch.empty(2, 4, 8, 8, device=CUDA)
    steps = sampler(model, torch.zeros(2, dtype=torch.long, device=CUDA), x)
    next(steps)
    with Watch() as watch:
        for out in steps:
            assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.float32, x.shape)
    assert watch.num_operators
    return watch


@pytest.mark.parametrize(("diffusion", "spec"), SAMPLERS, ids=[str(s.name) for _, s in SAMPLERS])
def test_no_step_of_a_sampler_waits_for_the_gpu(diffusion: Diffusion, spec: Sampler):
    spec = Sampler(**vars(spec) | {"num_steps": NUM_STEPS})
    with fake_cuda():
        step_all(bind(diffusion, spec), guided(diffusion))


def test_a_rising_scale_does_not_wait_either():
    with fake_cuda():
        step_all(bind(NOISE, Sampler("ddim", num_steps=NUM_STEPS)), guided(NOISE, power=2.0))


def test_every_sampler_is_watched_or_named_as_waiting():
    watched = {spec.name for _, spec in SAMPLERS}
    assert not watched & set(WAITING)
    assert watched | set(WAITING) == {*OF_IDDPM, *OF_FLOW}


def test_an_adaptive_sampler_waits_and_so_does_guidance_in_an_interval():
    """The exceptions are true, so the watch sees what it is for."""
    with fake_cuda():
        x, y = torch.empty(2, 4, 8, 8, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
        with Watch(), pytest.raises(AssertionError, match="waits for the GPU"):
            next(bind(FLOW, Sampler("dopri5"))(guided(FLOW), y, x))
        with Watch(), pytest.raises(AssertionError, match="waits for the GPU"):
            guided(FLOW, interval=(0.1, 0.5))(x, torch.zeros(2, device=CUDA), y)


def test_a_classifiers_gradient_does_not_wait():
    tiny = backbones.tiny_options_of("adm_classifier_64")
    classifier = backbones.build("adm_classifier_64", **tiny | dict(num_classes=10))
    x, t, y = torch.zeros(2, 3, 16, 16), torch.tensor([3, 5]), torch.tensor([0, 9])
    with fake_cuda():
        gradient = ClassifierGradient(move(classifier), 2.0)
        x, t, y = map(on_cuda, (x, t, y))
        with Watch():
            out = gradient(x, t, y)
        assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.float32, x.shape)
