"""Samplers as iterators over their own steps, per-image noise, and guidance as a wrapper around the network.

Sources: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), DPM-Solver++ (arXiv:2211.01095), classifier-free guidance
(arXiv:2207.12598), guidance in an interval (arXiv:2404.07724). N images, C channels; a sampler's last x is the sample;
`clip` keeps the estimates of clean data within the pixels' [-1, 1].
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from experiments.engine.diffusion import flow_samplers
from experiments.engine.diffusion.build import DiffusionProcess
from experiments.engine.diffusion.guidance import guides_every_step
from experiments.engine.diffusion.iddpm import IDDPM, Model, at, split_prediction
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.specs.spec import Sampler


@torch.no_grad()
def ancestral(
    diffusion: IDDPM,
    model: Model,
    y: Tensor,
    noise: ImageNoise,
    *,
    clip: bool = False,
    gradient: Model | None = None,
    launch: Launch = run_eagerly,
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step of an already respaced diffusion: DDPM algorithm 2, learned variance.

    gradient: of a log-probability to sample by, (x, t, y) -> (N,C,H,W); the mean moves by the variance times it (ADM algorithm 1).
    """

    def step(x: Tensor, i: Tensor, y: Tensor, z: Tensor) -> Tensor:
        t = diffusion.timesteps[i].repeat(len(x))  # (N,)
        mean, log_variance, _ = diffusion.posterior(x, i, model(x, t, y), clip)
        if gradient is not None:
            mean = mean + log_variance.exp() * gradient(x, t, y)
        return torch.where(i > 0, mean + (0.5 * log_variance).exp() * z, mean)

    step, x = launch(step), noise.draw()
    for i in _backwards(diffusion):
        x = step(
            x, i, y, noise.draw()
        )  # noise is drawn at i = 0 too, as in the field: T + 1 draws an image
        yield x


@torch.no_grad()
def ddim(
    diffusion: IDDPM,
    model: Model,
    y: Tensor,
    noise: ImageNoise,
    *,
    eta: float = 0.0,
    clip: bool = False,
    gradient: Model | None = None,
    launch: Launch = run_eagerly,
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step of an already respaced diffusion: DDIM eq. 12, sigma of eq. 16.

    eta 0 is deterministic after the first draw; eta 1 is ancestral sampling with the variance of the true posterior. The noise
    estimate moves against `gradient` (ADM algorithm 2), after clipping.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies between 0 (deterministic) and 1 (ancestral), not {eta}")
    here = diffusion.alphas_cumprod
    after = torch.cat([here.new_ones(1), here[:-1]])
    sigma = eta * ((1 - after) / (1 - here) * (1 - here / after)).sqrt()
    signal, towards = after.sqrt(), (1 - after - sigma**2).sqrt()

    def step(x: Tensor, i: Tensor, y: Tensor, z: Tensor) -> Tensor:
        t = diffusion.timesteps[i].repeat(len(x))  # (N,)
        _, _, x0_hat = diffusion.posterior(x, i, model(x, t, y), clip)
        eps = (x - at(diffusion.signal, i) * x0_hat) / at(diffusion.noise, i)
        if gradient is not None:
            eps = eps - at(diffusion.noise, i) * gradient(x, t, y)
            x0_hat = (x - at(diffusion.noise, i) * eps) / at(diffusion.signal, i)
        return at(signal, i) * x0_hat + at(towards, i) * eps + at(sigma, i) * z

    step, x = launch(step), noise.draw()
    for i in _backwards(diffusion):
        x = step(x, i, y, noise.draw())
        yield x


def _backwards(diffusion: IDDPM) -> list[Tensor]:
    """The indices of its steps from the last on, each (1,) and where its tables are."""
    return list(
        torch.arange(diffusion.num_steps, device=diffusion.timesteps.device).flip(0).split(1)
    )


@torch.no_grad()
def dpm_solver(
    diffusion: IDDPM,
    model: Model,
    y: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    launch: Launch = run_eagerly,
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step: DPM-Solver++(2M), algorithm 2 of its paper, the first step of order 1.

    Times are even, from the last of the diffusion's steps to its first, in between as fractions that the network is
    given; there log a, with x = a x0 + s eps, is linear. The noise of the first step stays, as U-ViT and DiM leave it.
    """
    indices = np.linspace(diffusion.num_steps - 1, 0, num_steps + 1)
    log_a = np.interp(
        indices, np.arange(diffusion.num_steps), 0.5 * diffusion.alphas_cumprod.log().cpu().numpy()
    )
    a, s = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
    h = np.diff(log_a - np.log(s))  # of lambda, half the log of the signal-to-noise ratio
    times = indices + diffusion.timesteps[0].item()
    order_2 = np.append(0, h[1:] / h[:-1] / 2)
    rows = np.stack(
        [times[:-1], s[:-1], a[:-1], s[1:] / s[:-1], a[1:] * np.expm1(-h), order_2], axis=1
    )

    def step(x: Tensor, row: Tensor, y: Tensor, before: Tensor) -> Tensor:
        t, s, a, shrink, gain, order_2 = row.unbind()
        eps, _ = split_prediction(model(x, t.repeat(len(x)), y), x, diffusion.learned)
        x0_hat = (x - s * eps) / a  # (N,C,H,W)
        return torch.stack([shrink * x - gain * (x0_hat + order_2 * (x0_hat - before)), x0_hat])

    step, x = launch(step), noise.draw()
    before = torch.zeros_like(x)  # of weight 0 in the first step
    for row in torch.from_numpy(rows).float().to(x.device):
        x, before = step(x, row, y, before)
        yield x


@torch.no_grad()
def dpm_solver_diffusers(
    diffusion: IDDPM, model: Model, y: Tensor, noise: ImageNoise, *, num_steps: int
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step: DPM-Solver++(2M) by diffusers' scheduler as it comes, at whole times and down to no noise.

    `dpm_solver` is U-ViT's and DiM's, which differs in its times and its end. Raises ValueError where diffusers is not installed.
    """
    try:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    except ImportError:
        raise ValueError(
            "sampler dpm_solver_diffusers needs diffusers: pip install -e .[latents]"
        ) from None
    scheduler = DPMSolverMultistepScheduler(
        diffusion.num_steps,
        trained_betas=diffusion.betas.cpu().numpy(),
        solver_order=2,
        algorithm_type="dpmsolver++",
    )
    x = noise.draw()
    scheduler.set_timesteps(num_steps)
    for i in scheduler.timesteps.tolist():
        t = diffusion.timesteps[i].repeat(len(x))  # (N,)
        eps, _ = split_prediction(model(x, t, y), x, diffusion.learned)
        x = scheduler.step(eps, i, x).prev_sample
        yield x


BoundSampler = Callable[[Model, Tensor, ImageNoise], Iterator[Tensor]]


def has_uniform_steps(spec: Sampler, times: tuple[float, float]) -> bool:
    """Whether every step does the same, so that one recording holds them all.

    Not where steps adapt to the images, are another library's, or guidance comes and goes between the `times` that the network is given.
    """
    return spec.name not in ("dopri5", "dpm_solver_diffusers") and (
        spec.scale == 1 or guides_every_step(spec.interval, times)
    )


def bind_sampler(
    spec: Sampler,
    process: DiffusionProcess,
    gradient: Model | None = None,
    launch: Launch = run_eagerly,
) -> BoundSampler:
    """The declared sampler of a process, to be called with a network, labels and noise; ValueError lists the known.

    launch: makes of a step, a function of tensors alone, what is called in its place. Ignored where there is no such step (`recordable`).
    """
    if gradient is not None and spec.name not in ("ancestral", "ddim"):
        raise ValueError(f"a classifier guides the samplers ancestral and ddim, not {spec.name!r}")
    known: dict[str, Callable[[], BoundSampler]]
    if isinstance(process, IDDPM):
        known = {
            "ancestral": lambda: partial(
                ancestral,
                process.respaced(spec.num_steps),
                clip=spec.clip,
                gradient=gradient,
                launch=launch,
            ),
            "ddim": lambda: partial(
                ddim,
                process.respaced(spec.num_steps),
                eta=spec.eta,
                clip=spec.clip,
                gradient=gradient,
                launch=launch,
            ),
            "dpm_solver": lambda: partial(
                dpm_solver, process, num_steps=spec.num_steps, launch=launch
            ),
            "dpm_solver_diffusers": lambda: partial(
                dpm_solver_diffusers, process, num_steps=spec.num_steps
            ),
        }
    else:
        sde = dict(
            num_steps=spec.num_steps,
            form=spec.form,
            last_step=spec.last_step,
            last_size=spec.last_size,
            launch=launch,
        )
        known = {
            "euler": lambda: partial(flow_samplers.euler, num_steps=spec.num_steps, launch=launch),
            "heun": lambda: partial(flow_samplers.heun, num_steps=spec.num_steps, launch=launch),
            "dopri5": lambda: partial(flow_samplers.dopri5, atol=spec.atol, rtol=spec.rtol),
            "sde": lambda: partial(flow_samplers.sde, process, **sde),
        }
    if spec.name not in known:
        raise ValueError(f"unknown sampler {spec.name!r}; known: {', '.join(known)}")
    return known[spec.name]()
