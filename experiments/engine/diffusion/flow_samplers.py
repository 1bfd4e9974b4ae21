"""Samplers of flows, as iterators over their own steps: an ordinary and a stochastic equation.

Sources: SiT (arXiv:2401.08740); github.com/MCG-NJU/FlowDCN at aa48042 for a short last step and for
multistep methods; Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving Ordinary Differential
Equations I, sections II.4, II.5 and III.1.

A sampler is built with its settings and called with (model, y, noise). It yields x (N,C,H,W) after
each step; the last x is the sample.

N images, C channels; t runs from 0 (noise) to 1 (data); y (N,) labels
noise   a source of noise, or a plain tensor (N,C,H,W) to start from
launch  makes of a step, a function of tensors alone, what is called in its place
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from experiments.engine.diffusion.flow import Flow, velocity
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.noise import NoiseSource, noise_source
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly

# Dormand & Prince's pair of orders 5 and 4: nodes, stages, and the difference of the two results.
# The last row of stages is the result of order 5, so the last evaluation of a step is the first of
# the next.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

# Control of the step size: the factor on the estimate, bounds of its change, the smallest step.
SAFETY = 0.9
SMALLEST_FACTOR = 0.2
LARGEST_FACTOR = 10.0
SMALLEST_STEP = 1e-7

# Noise of the stochastic equation as a function of s and t: SiT's forms, without the one that is
# infinite at t = 0.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda s, t: torch.ones_like(s),
    "sigma": lambda s, t: s,
    "linear": lambda s, t: 1 - t,
    "half-linear": lambda s, t: 0.5 * (1 - t),  # FlowDCN's
    "decreasing": lambda s, t: 0.25 * ((math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda s, t: (math.pi * t).sin() ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler")


@dataclass(frozen=True)
class Euler:
    """Steps of one evaluation each, even or shifted.

    num_steps: number of steps.
    launch: see above.
    shift: each time t of the even grid becomes shift t / (1 + (shift - 1) t).
    """

    num_steps: int
    launch: Launch = run_eagerly
    shift: float = 1.0

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step."""
        num_steps = self.num_steps

        def step(x: Tensor, t: Tensor, after: Tensor, y: Tensor) -> Tensor:
            v = velocity(model, x, t.repeat(len(x)), y)
            # Even steps divide, which rounds otherwise than a product with the step's length.
            return x + v / num_steps if self.shift == 1 else x + v * (after - t)

        launched = self.launch(step)
        x = noise_source(noise).draw()
        even = (i / num_steps for i in range(num_steps + 1))
        grid = (self.shift * t / (1 + (self.shift - 1) * t) for t in even)
        for t, after in pairwise(_times(x, grid)):
            x = launched(x, t, after, y)
            yield x


@dataclass(frozen=True)
class Heun:
    """Even steps of two evaluations each.

    num_steps: number of steps.
    launch: see above.
    """

    num_steps: int
    launch: Launch = run_eagerly

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step."""
        num_steps = self.num_steps

        def step(x: Tensor, t: Tensor, after: Tensor, y: Tensor) -> Tensor:
            here = velocity(model, x, t.repeat(len(x)), y)
            there = velocity(model, x + here / num_steps, after.repeat(len(x)), y)
            return x + (here + there) / (2 * num_steps)

        launched = self.launch(step)
        x = noise_source(noise).draw()
        for t, after in pairwise(_times(x, (i / num_steps for i in range(num_steps + 1)))):
            x = launched(x, t, after, y)
            yield x


@dataclass(frozen=True)
class ShortLast:
    """Even steps to 1 - last_size and a last one of Euler from there, one evaluation each.

    num_steps: number of steps.
    last_size: size of the last step.
    corrects: whether the even steps are Heun's with one evaluation: the slope at the end of a step
        is also that at the start of the next.
    """

    num_steps: int
    last_size: float
    corrects: bool = False

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step; ValueError for settings that do not exist."""
        if self.num_steps < 2 or not 0 < self.last_size < 1:
            raise ValueError(
                "a sampler with a short last step takes two steps or more and a size between 0 "
                f"and 1, got {self.num_steps} and {self.last_size}"
            )

        # The slope at the start of a step is known from the step before.
        dt = (1 - self.last_size) / (self.num_steps - 1)
        x = noise_source(noise).draw()
        times = _times(x, (i * dt for i in range(self.num_steps)))
        slope = velocity(model, x, times[0].repeat(len(x)), y)
        for t in times[1:]:
            ahead = x + dt * slope
            if self.corrects:
                slope_ahead = velocity(model, ahead, t.repeat(len(x)), y)
                x = x + dt * (slope + slope_ahead) / 2
                slope = slope_ahead
            else:
                x = ahead
                slope = velocity(model, x, t.repeat(len(x)), y)
            yield x

        # The last step is Euler's.
        yield x + self.last_size * slope


# Adams and Bashforth's weights of the slopes, the newest first, by order.
ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class Adams:
    """Even steps of Adams and Bashforth's explicit method; the first ones have lower orders.

    num_steps: number of steps, one evaluation each.
    order: from 1 to 4.
    """

    num_steps: int
    order: int

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step."""
        x = noise_source(noise).draw()
        slopes: list[Tensor] = []  # the newest first
        for t in _times(x, (i / self.num_steps for i in range(self.num_steps))):
            slopes = [velocity(model, x, t.repeat(len(x)), y), *slopes][: self.order]
            x = x + _weighted_sum(ADAMS_BASHFORTH[len(slopes) - 1], slopes) / self.num_steps
            yield x


def _times(x: Tensor, times: Iterable[float]) -> list[Tensor]:
    """Times as tensors (1,), on the device of x."""
    return list(torch.tensor(list(times), device=x.device).split(1))


@dataclass(frozen=True)
class Dopri5:
    """Dormand and Prince's adaptive steps.

    Every image has a time, a step size and an error of its own. So an image takes the same steps in
    any batch, up to what rounding does to a decision. The error of an image is the root mean square
    over its entries, where other solvers take it over the batch. Images that have arrived are not
    evaluated any more.

    atol: absolute tolerance.
    rtol: tolerance relative to the entries of x.
    """

    atol: float
    rtol: float

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each attempted step; ValueError if the step size of an image vanishes."""
        x = noise_source(noise).draw()
        t = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        slope = velocity(model, x, t.float(), y)
        h = self._first_step(model, x, slope, y)  # (N,) float64
        rejected = torch.zeros_like(t, dtype=torch.bool)

        while len(active := (t < 1).nonzero()[:, 0]):
            # The next step of the n images under way; the last one ends at 1 exactly.
            last = h[active] >= 1 - t[active]
            step = torch.where(last, 1 - t[active], h[active])  # (n,)
            if not (step > SMALLEST_STEP).logical_or(last).all():
                raise ValueError(
                    f"dopri5 does not reach its tolerance (atol {self.atol}, rtol {self.rtol}) at "
                    f"t = {t[active].min():.4f}; the velocity is not smooth or not finite there"
                )

            # The stages of the step; the last one is the result.
            width = step.to(x.dtype).reshape(-1, 1, 1, 1)
            old = x[active]
            slopes = [slope[active]]  # (n,C,H,W) each
            for node, weights in zip(NODES, STAGES, strict=True):
                new = old + width * _weighted_sum(weights, slopes)
                slopes.append(velocity(model, new, (t[active] + node * step).float(), y[active]))

            # Accept or reject, and size the next step; it does not grow after a rejection.
            scale = self.atol + self.rtol * torch.maximum(old.abs(), new.abs())
            error = _rms(width * _weighted_sum(ERROR, slopes) / scale)  # (n,)
            good = error < 1
            factor = _next_factor(error)
            h[active] = step * torch.where(rejected[active] & good, factor.clamp(max=1), factor)
            rejected[active] = ~good

            # Move the images whose step was accepted.
            arrived = active[good]
            x = x.index_copy(0, arrived, new[good])
            slope = slope.index_copy(0, arrived, slopes[-1][good])
            t[arrived] = torch.where(last[good], 1.0, t[arrived] + step[good])
            yield x

    def _first_step(self, model: Model, x: Tensor, slope: Tensor, y: Tensor) -> Tensor:
        """Size the first step of each image, (N,) float64, from the curvature at its start.

        Source: Hairer et al., section II.4.
        """
        # A trial step that moves x little.
        scale = self.atol + self.rtol * x.abs()
        size = _rms(x / scale)  # (N,)
        speed = _rms(slope / scale)  # (N,)
        h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1)

        # The change of the slope over it bounds the first step.
        ahead = velocity(model, x + h.to(x.dtype).reshape(-1, 1, 1, 1) * slope, h.float(), y)
        bend = _rms((ahead - slope) / scale) / h
        fast = torch.maximum(speed, bend)
        cautious = (h * 1e-3).clamp(min=1e-6)
        bounded = torch.where(fast <= 1e-15, cautious, (0.01 / fast) ** 0.2)
        return bounded.minimum(100 * h).clamp(max=1)


def _next_factor(error: Tensor) -> Tensor:
    """Change of the step size by an error (n,) relative to the tolerance; NaN shrinks it most."""
    factor = (SAFETY * error**-0.2).nan_to_num(nan=SMALLEST_FACTOR)
    return factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)


def _rms(value: Tensor) -> Tensor:
    """Root mean square of each image's entries: (N,C,H,W) -> (N,) float64."""
    return value.double().square().mean(dim=(1, 2, 3)).sqrt()


def _weighted_sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Sum of the slopes whose weight is not 0."""
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms, start=torch.zeros(()))


@dataclass(frozen=True)
class SDE:
    """Euler-Maruyama on dx = (v + w score) dt + sqrt(2 w) dW.

    Velocity and score share an evaluation; the authors' code makes two.

    flow: the path.
    num_steps: number of steps; all but the last are even and end at 1 - last_size.
    form: name of the noise w, a key of `FORMS`.
    last_step: where the last step, which is free of noise, leads: 'mean' along the drift, 'euler'
        along the velocity, 'tweedie' to the expected data.
    last_size: size of the last step.
    launch: see above.
    """

    flow: Flow
    num_steps: int
    form: str = "sigma"
    last_step: str = "mean"
    last_size: float = 0.04
    launch: Launch = run_eagerly

    @torch.no_grad()
    def __call__(self, model: Model, y: Tensor, noise: NoiseSource | Tensor) -> Iterator[Tensor]:
        """Yield x after each step; ValueError for settings that do not exist."""
        self._check()
        dt = (1 - self.last_size) / (self.num_steps - 1)

        def step(x: Tensor, t: Tensor, y: Tensor, z: Tensor) -> Tensor:
            v, score, w = self._slopes(model, x, t, y)
            return x + (v + w * score) * dt + (2 * w * dt).sqrt() * z

        # Even steps with noise.
        launched = self.launch(step)
        source = noise_source(noise)
        x = source.draw()
        *times, end = _times(x, (i * dt for i in range(self.num_steps)))
        for t in times:
            x = launched(x, t, y, source.draw())
            yield x

        # The last step, without noise.
        v, score, w = self._slopes(model, x, end, y)
        if self.last_step == "tweedie":
            a, s, _, _ = self.flow.coefficients(end.repeat(len(x)))
            yield (x + s**2 * score) / a
        elif self.last_step == "mean":
            yield x + (v + w * score) * self.last_size
        else:
            yield x + v * self.last_size

    def _check(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}; known: {', '.join(FORMS)}")
        if self.last_step not in LAST_STEPS or not 0 < self.last_size < 1 or self.num_steps < 2:
            raise ValueError(
                f"an sde takes two steps or more, the last {', '.join(LAST_STEPS)} and of a size "
                f"between 0 and 1, got {self.num_steps}, {self.last_step!r}, {self.last_size}"
            )

    def _slopes(
        self, model: Model, x: Tensor, t: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity and score, each (N,C,H,W), and noise w (N,1,1,1), all at one time t (1,)."""
        t = t.repeat(len(x))
        _, s, _, _ = self.flow.coefficients(t)  # (N,1,1,1)
        v = velocity(model, x, t, y)
        return v, self.flow.score(v, x, t), FORMS[self.form](s, t.reshape(-1, 1, 1, 1))
