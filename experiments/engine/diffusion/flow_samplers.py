"""Samplers of flows, as iterators over their own steps: the ordinary differential equation and SiT's stochastic one.

Sources: SiT (arXiv:2401.08740), Dormand & Prince 1980, Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I,
sections II.4 and II.5. N images, C channels; t runs from 0 (noise) to 1 (data); a sampler's last x is the sample.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from experiments.engine.diffusion.flow import Flow, velocity
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly
from experiments.engine.numerics.randomness import ImageNoise

# Dormand & Prince's pair of orders 5 and 4: nodes, stages, and the difference of the two results. The last row of stages
# is the result of order 5, so the last evaluation of a step is the first of the next.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, SLOWEST, FASTEST, FINEST = 0.9, 0.2, 10.0, 1e-7

# Noise of the stochastic equation as a function of s and t: SiT's, without the one that is infinite at t = 0.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda s, t: torch.ones_like(s),
    "sigma": lambda s, t: s,
    "linear": lambda s, t: 1 - t,
    "decreasing": lambda s, t: 0.25 * ((math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda s, t: (math.pi * t).sin() ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler")


@torch.no_grad()
def euler(
    model: Model, y: Tensor, noise: ImageNoise, *, num_steps: int, launch: Launch = run_eagerly
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each of `num_steps` even steps, one evaluation each."""

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + velocity(model, x, t.repeat(len(x)), y) / num_steps

    step, x = launch(step), noise.draw()
    for t in _times(x, (i / num_steps for i in range(num_steps))):
        x = step(x, t, y)
        yield x


@torch.no_grad()
def heun(
    model: Model, y: Tensor, noise: ImageNoise, *, num_steps: int, launch: Launch = run_eagerly
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each of `num_steps` even steps, two evaluations each."""

    def step(x: Tensor, t: Tensor, after: Tensor, y: Tensor) -> Tensor:
        here = velocity(model, x, t.repeat(len(x)), y)
        there = velocity(model, x + here / num_steps, after.repeat(len(x)), y)
        return x + (here + there) / (2 * num_steps)

    step, x = launch(step), noise.draw()
    for t, after in pairwise(_times(x, (i / num_steps for i in range(num_steps + 1)))):
        x = step(x, t, after, y)
        yield x


def _times(x: Tensor, times: Iterable[float]) -> list[Tensor]:
    """Each (1,), where x is."""
    return list(torch.tensor(list(times), device=x.device).split(1))


@torch.no_grad()
def dopri5(
    model: Model, y: Tensor, noise: ImageNoise, *, atol: float, rtol: float
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each attempted step; every image has a clock, a step size and an error of its own.

    So an image takes the same steps in any batch, up to what rounding does to a decision; the error of an image is the
    root mean square over its entries, where a solver of whole batches takes it over all. Images that have arrived are
    not evaluated any more. Raises ValueError where an image's step size vanishes.
    """
    x = noise.draw()
    t = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    slope = velocity(model, x, t.float(), y)
    h = _first_step(model, x, slope, y, atol, rtol)  # (N,) float64
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while len(active := (t < 1).nonzero()[:, 0]):
        last = h[active] >= 1 - t[active]
        step = torch.where(last, 1 - t[active], h[active])  # (n,) of the n images under way
        if not (step > FINEST).logical_or(last).all():
            raise ValueError(
                f"dopri5 does not reach its tolerance (atol {atol}, rtol {rtol}) at t = {t[active].min():.4f}; the velocity is not smooth or not finite there"
            )
        width, old = step.to(x.dtype).reshape(-1, 1, 1, 1), x[active]
        slopes = [slope[active]]  # (n,C,H,W) each
        for node, weights in zip(NODES, STAGES, strict=True):
            new = old + width * _weighted(weights, slopes)
            slopes.append(velocity(model, new, (t[active] + node * step).float(), y[active]))
        scale = atol + rtol * torch.maximum(old.abs(), new.abs())
        error = _rms(width * _weighted(ERROR, slopes) / scale)  # (n,)
        good = error < 1
        factor = (SAFETY * error**-0.2).nan_to_num(nan=SLOWEST).clamp(SLOWEST, FASTEST)
        h[active] = step * torch.where(rejected[active] & good, factor.clamp(max=1), factor)
        rejected[active] = ~good
        arrived = active[good]
        x, slope = (
            x.index_copy(0, arrived, new[good]),
            slope.index_copy(0, arrived, slopes[-1][good]),
        )
        t[arrived] = torch.where(last[good], 1.0, t[arrived] + step[good])
        yield x


def _first_step(
    model: Model, x: Tensor, slope: Tensor, y: Tensor, atol: float, rtol: float
) -> Tensor:
    """A step size for each image, (N,) float64, from the curvature at its start: Hairer et al., section II.4."""
    scale = atol + rtol * x.abs()
    size, speed = _rms(x / scale), _rms(slope / scale)  # (N,) each
    h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1)
    ahead = velocity(model, x + h.to(x.dtype).reshape(-1, 1, 1, 1) * slope, h.float(), y)
    bend = _rms((ahead - slope) / scale) / h
    fast = torch.maximum(speed, bend)
    return (
        torch.where(fast <= 1e-15, (h * 1e-3).clamp(min=1e-6), (0.01 / fast) ** 0.2)
        .minimum(100 * h)
        .clamp(max=1)
    )


def _rms(value: Tensor) -> Tensor:
    """Root mean square of each image's entries: (N,C,H,W) -> (N,) float64."""
    return value.double().square().mean(dim=(1, 2, 3)).sqrt()


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


@torch.no_grad()
def sde(
    flow: Flow,
    model: Model,
    y: Tensor,
    noise: ImageNoise,
    *,
    num_steps: int,
    form: str,
    last_step: str,
    last_size: float,
    launch: Launch = run_eagerly,
) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each of `num_steps` steps: Euler-Maruyama on dx = (v + w score) dt + sqrt(2 w) dW.

    All but the last are even and end at 1 - last_size; the last is free of noise and leads to 1: 'mean' along the drift,
    'euler' along the velocity, 'tweedie' to the expected data. Velocity and score share an evaluation; the authors'
    code makes two.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if last_step not in LAST_STEPS or not 0 < last_size < 1 or num_steps < 2:
        raise ValueError(
            f"an sde takes two steps or more, the last {', '.join(LAST_STEPS)} and of a size between 0 and 1, got {num_steps}, {last_step!r}, {last_size}"
        )
    dt = (1 - last_size) / (num_steps - 1)

    def slopes(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        t = t.repeat(len(x))
        a, s, _, _ = flow.coefficients(t)  # (N,1,1,1) each
        v = velocity(model, x, t, y)
        return a, s, v, flow.score(v, x, t), FORMS[form](s, t.reshape(-1, 1, 1, 1))

    def step(x: Tensor, t: Tensor, y: Tensor, z: Tensor) -> Tensor:
        _, _, v, score, w = slopes(x, t, y)
        return x + (v + w * score) * dt + (2 * w * dt).sqrt() * z

    step, x = launch(step), noise.draw()
    *times, end = _times(x, (i * dt for i in range(num_steps)))
    for t in times:
        x = step(x, t, y, noise.draw())
        yield x
    a, s, v, score, w = slopes(x, end, y)
    yield (
        (x + s**2 * score) / a
        if last_step == "tweedie"
        else x + (v + (w * score if last_step == "mean" else 0)) * last_size
    )
