"""Samplers of discrete diffusions, as iterators over their own steps, and samplers by name.

A sampler is the algorithm alone: it turns noise into samples with a network that somebody else
built. `engine/sampling` runs samplers over many images and keeps the results.

Sources: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), and ADM (arXiv:2105.05233) for the
classifier's gradient.

A sampler is built with its settings and called with (model, y, noise). It yields x (N,C,H,W) after
each step; the last x is the sample.

N images, C channels; y (N,) labels
noise   a source of noise, or a plain tensor (N,C,H,W) to start from; with a tensor, the noise of
        later steps comes from PyTorch's global generator
launch  makes of a step, a function of tensors alone, what is called in its place
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.engine.diffusion.build import DiffusionProcess
from experiments.engine.diffusion.dpm_solvers import DiffusersDPMSolver, DPMSolver, DPMSolver3S
from experiments.engine.diffusion.flow import Flow
from experiments.engine.diffusion.flow_samplers import SDE, Adams, Dopri5, Euler, Heun, ShortLast
from experiments.engine.diffusion.guidance import guides_every_step
from experiments.engine.diffusion.iddpm import IDDPM, Model, at
from experiments.engine.diffusion.noise import NoiseSource, noise_source
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly
from experiments.engine.specs.spec import Sampler

# (network, labels, noise) -> x after each step.
BoundSampler = Callable[[Model, Tensor, NoiseSource | Tensor], Iterator[Tensor]]


@dataclass(frozen=True)
class Ancestral:
    """DDPM's algorithm 2 with the network's variance.

    diffusion: already respaced to the steps to take.
    clip: whether estimates of clean data are kept within the pixels' [-1, 1].
    gradient: (x, t, y) -> (N,C,H,W), the gradient of a log-probability to sample by; the mean moves
        by the variance times it (ADM algorithm 1).
    launch: see above.
    """

    diffusion: IDDPM
    clip: bool = False
    gradient: Model | None = None
    launch: Launch = run_eagerly

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step."""

        def step(x: Tensor, i: Tensor, y: Tensor, z: Tensor) -> Tensor:
            t = self.diffusion.timesteps[i].repeat(len(x))  # (N,)
            mean, log_variance, _ = self.diffusion.posterior(x, i, model(x, t, y), self.clip)
            if self.gradient is not None:
                mean = mean + log_variance.exp() * self.gradient(x, t, y)
            return torch.where(i > 0, mean + (0.5 * log_variance).exp() * z, mean)

        launched = self.launch(step)
        source = noise_source(noise)
        x = source.draw()
        for i in _indices_backwards(self.diffusion):
            # Noise is drawn at i = 0 too, as in the field: T + 1 draws for each image.
            x = launched(x, i, y, source.draw())
            yield x


@dataclass(frozen=True)
class DDIM:
    """DDIM eq. 12 with the sigma of eq. 16.

    diffusion: already respaced to the steps to take.
    eta: 0 is deterministic after the first draw; 1 is ancestral sampling with the variance of the
        true posterior.
    clip: whether estimates of clean data are kept within the pixels' [-1, 1].
    gradient: as for `Ancestral`; the noise estimate moves against it after clipping (ADM
        algorithm 2).
    launch: see above.
    """

    diffusion: IDDPM
    eta: float = 0.0
    clip: bool = False
    gradient: Model | None = None
    launch: Launch = run_eagerly

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step; ValueError if eta lies outside [0, 1]."""
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta lies between 0 (deterministic) and 1 (ancestral), not {self.eta}"
            )
        diffusion = self.diffusion

        # Coefficients of the clean estimate, of the noise estimate and of the fresh noise.
        here = diffusion.alphas_cumprod
        after = torch.cat([here.new_ones(1), here[:-1]])
        sigma = self.eta * ((1 - after) / (1 - here) * (1 - here / after)).sqrt()
        signal = after.sqrt()
        towards = (1 - after - sigma**2).sqrt()

        def step(x: Tensor, i: Tensor, y: Tensor, z: Tensor) -> Tensor:
            t = diffusion.timesteps[i].repeat(len(x))  # (N,)
            _, _, x0_hat = diffusion.posterior(x, i, model(x, t, y), self.clip)
            eps = (x - at(diffusion.signal, i) * x0_hat) / at(diffusion.noise, i)
            if self.gradient is not None:
                eps = eps - at(diffusion.noise, i) * self.gradient(x, t, y)
                x0_hat = (x - at(diffusion.noise, i) * eps) / at(diffusion.signal, i)
            return at(signal, i) * x0_hat + at(towards, i) * eps + at(sigma, i) * z

        launched = self.launch(step)
        source = noise_source(noise)
        x = source.draw()
        for i in _indices_backwards(diffusion):
            x = launched(x, i, y, source.draw())
            yield x


def _indices_backwards(diffusion: IDDPM) -> list[Tensor]:
    """Indices of the steps from the last to the first, each (1,), where the tables are."""
    indices = torch.arange(diffusion.num_steps, device=diffusion.timesteps.device)
    return list(indices.flip(0).split(1))


# Samplers by the diffusions that have them.
OF_IDDPM = ("ancestral", "ddim", "dpm_solver", "dpm_solver_3s", "dpm_solver_diffusers")
OF_FLOW = (
    "euler",
    "heun",
    "dopri5",
    "sde",
    "euler_short_last",
    "heun_short_last",
    "adams2",
    "adams4",
)
# Samplers whose steps differ from one another, or are another library's.
NOT_UNIFORM = (
    "adams2",
    "adams4",
    "dopri5",
    "dpm_solver_3s",
    "dpm_solver_diffusers",
    "euler_short_last",
    "heun_short_last",
)


def has_uniform_steps(spec: Sampler, times: tuple[float, float]) -> bool:
    """Tell whether all steps do the same operations, so that one CUDA graph serves them all.

    They do not if steps adapt to the images, if another library takes them, or if guidance comes
    and goes between `times`, the first and the last that the network is given.
    """
    if spec.name in NOT_UNIFORM:
        return False
    return spec.scale == 1 or guides_every_step(spec.interval, times)


def bind_sampler(
    spec: Sampler,
    diffusion: DiffusionProcess,
    gradient: Model | None = None,
    launch: Launch = run_eagerly,
) -> BoundSampler:
    """Bind the sampler that a spec declares to its settings; call it with network, labels, noise.

    Args:
        spec: name and settings of the sampler.
        diffusion: the diffusion to sample from, not respaced.
        gradient: a classifier's gradient, for the samplers that take one.
        launch: see above; ignored by samplers without uniform steps (`has_uniform_steps`).

    Raises:
        ValueError: the diffusion has no such sampler (the message lists those it has), or the
            sampler takes no gradient.
    """
    if gradient is not None and spec.name not in ("ancestral", "ddim"):
        raise ValueError(f"a classifier guides the samplers ancestral and ddim, not {spec.name!r}")
    if isinstance(diffusion, IDDPM):
        return _bind_to_iddpm(spec, diffusion, gradient, launch)
    return _bind_to_flow(spec, diffusion, launch)


def _bind_to_iddpm(
    spec: Sampler, diffusion: IDDPM, gradient: Model | None, launch: Launch
) -> BoundSampler:
    match spec.name:
        case "ancestral":
            respaced = diffusion.respaced(spec.num_steps)
            return Ancestral(respaced, spec.clip, gradient, launch)
        case "ddim":
            respaced = diffusion.respaced(spec.num_steps)
            return DDIM(respaced, spec.eta, spec.clip, gradient, launch)
        case "dpm_solver":
            return DPMSolver(diffusion, spec.num_steps, launch)
        case "dpm_solver_3s":
            return DPMSolver3S(diffusion, spec.num_steps)
        case "dpm_solver_diffusers":
            return DiffusersDPMSolver(diffusion, spec.num_steps)
    raise ValueError(f"unknown sampler {spec.name!r}; known: {', '.join(OF_IDDPM)}")


def _bind_to_flow(spec: Sampler, flow: Flow, launch: Launch) -> BoundSampler:
    match spec.name:
        case "euler":
            return Euler(spec.num_steps, launch, spec.shift)
        case "heun":
            return Heun(spec.num_steps, launch)
        case "euler_short_last" | "heun_short_last":
            return ShortLast(spec.num_steps, spec.last_size, spec.name == "heun_short_last")
        case "adams2" | "adams4":
            return Adams(spec.num_steps, order=2 if spec.name == "adams2" else 4)
        case "dopri5":
            return Dopri5(spec.atol, spec.rtol)
        case "sde":
            return SDE(flow, spec.num_steps, spec.form, spec.last_step, spec.last_size, launch)
    raise ValueError(f"unknown sampler {spec.name!r}; known: {', '.join(OF_FLOW)}")
