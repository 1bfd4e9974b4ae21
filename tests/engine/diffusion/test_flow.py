"""Flows on Gaussian data, where velocity, score and every chain are known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from experiments.engine.diffusion.flow import PATHS, Flow
from experiments.engine.diffusion.flow_samplers import FORMS, SDE, Dopri5, Euler, Heun
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.samplers import bind_sampler
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.specs.spec import Sampler
from tests.support.flows import ImpulseNoise, labels, sample

MEAN = 0.3
STD = 0.7
paths = pytest.mark.parametrize("path", PATHS)


def gaussian(path: str) -> Model:
    """Return the expected velocity of data N(MEAN, STD^2)."""
    flow = Flow(path)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a, s, da, ds = flow.coefficients(t.double())
        deviation = (x - a * MEAN) / (a**2 * STD**2 + s**2)
        return da * (MEAN + a * STD**2 * deviation) + ds * s * deviation

    return model


@paths
def test_paths_lead_from_noise_to_data_at_their_own_rates(path: str):
    """A path starts at pure noise and ends at pure data, and its rates are its derivatives."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    a, s, da, ds = PATHS[path](t)
    ends = torch.stack([a[0], s[0], a[-1], s[-1]])
    expected = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)
    assert torch.allclose(ends, expected, atol=1e-12)
    for value, rate in ((a, da), (s, ds)):
        (derivative,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, rate)


@paths
def test_the_loss_is_the_squared_error_of_the_velocity_and_smallest_at_its_expectation(path: str):
    """The loss of an image is the definition's, and no constant added to the velocity lowers it."""
    draw = torch.Generator().manual_seed(0)
    flow = Flow(path)
    t = torch.rand(4000, generator=draw, dtype=torch.float64)
    x0 = MEAN + STD * torch.randn(4000, 1, 3, 5, generator=draw, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
    losses = flow.losses(gaussian(path), x0, labels(4000), t, eps)
    assert torch.equal(losses["loss"], losses["mse"])
    assert losses["loss"].shape == (4000,)

    # Image 7, by the definition.
    a, s, da, ds = PATHS[path](t[7])
    x_t = a * x0[7:8] + s * eps[7:8]
    velocity = da * x0[7:8] + ds * eps[7:8]
    error = gaussian(path)(x_t, t[7:8], labels(1)) - velocity
    assert losses["loss"][7].item() == pytest.approx(error.square().mean().item(), rel=1e-12)

    # A velocity that is off by 0.2 everywhere costs 0.2 squared more.
    for change in (0.2, -0.2):

        def changed(x: Tensor, t: Tensor, y: Tensor, change: float = change) -> Tensor:
            return gaussian(path)(x, t, y) + change

        worse = flow.losses(changed, x0, labels(4000), t, eps)
        excess = worse["loss"].mean() - losses["loss"].mean()
        assert excess.item() == pytest.approx(0.04, abs=0.01)


def test_a_network_with_other_channels_is_refused():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="velocity of 3 channels, the prediction has 6"):
        Flow("linear").losses(lambda x, t, y: torch.cat([x, x], 1), x, labels(2), torch.rand(2), x)


@paths
def test_times_are_uniform_and_reproducible(path: str):
    t = Flow(path).draw_times(4000, torch.Generator().manual_seed(3))
    assert torch.equal(t, Flow(path).draw_times(4000, torch.Generator().manual_seed(3)))
    assert t.min() >= 0
    assert t.max() < 1
    assert (t.histc(10, 0, 1) - 400).abs().max() < 100


@paths
def test_the_score_behind_a_velocity(path: str):
    x = torch.linspace(-2, 2, 30, dtype=torch.float64).reshape(6, 1, 1, 5)
    t = torch.linspace(0, 0.95, 6, dtype=torch.float64)
    a, s, _, _ = Flow(path).coefficients(t)
    expected = -(x - a * MEAN) / (a**2 * STD**2 + s**2)
    torch.testing.assert_close(Flow(path).score(gaussian(path)(x, t, labels(6)), x, t), expected)


@paths
@pytest.mark.parametrize("solver, order", [(Euler, 1), (Heun, 2)])
def test_solvers_converge_to_the_flow_at_their_order(solver, order: int, path: str):
    """Twice the steps divide the error by two to the power of the order."""
    first = torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1)
    truth = MEAN + STD * first
    errors = []
    for num_steps in (32, 64, 128):
        x = sample(solver(num_steps), gaussian(path), labels(5), ImpulseNoise(first))
        errors.append((x - truth).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), errors
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1), errors
    assert errors[-1] < 0.02, errors


def curved(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A velocity that couples an image's entries, bends in time and is rougher for some images."""
    rate = (1 + 4 * y.double()).reshape(-1, 1, 1, 1)
    time = t.double().reshape(-1, 1, 1, 1)
    wave = rate * torch.sin(x.flip(-1) * 3 + 5 * rate * time)
    return wave - x * x.mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("atol, rtol", [(1e-6, 1e-3), (1e-8, 1e-6)])
def solve_alone(image: Tensor, label: Tensor, atol: float, rtol: float) -> tuple[np.ndarray, int]:
    """Integrate one image with scipy: return its end and the number of evaluations."""

    def velocity(t: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state).reshape(1, *image.shape)
        return curved(x, torch.tensor([t]).float(), label[None]).flatten().numpy()

    start = image.flatten().numpy()
    solution = solve_ivp(velocity, (0, 1), start, method="RK45", atol=atol, rtol=rtol)
    return solution.y[:, -1], solution.nfev


@pytest.mark.parametrize("atol, rtol", [(1e-6, 1e-3), (1e-8, 1e-6)])
def test_every_image_takes_the_steps_of_a_solver_of_its_own(atol: float, rtol: float):
    """A batch gives every image the result and the evaluations that it has alone in scipy."""
    first = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(4)
    counted = CountingModel(curved)
    ends = sample(Dopri5(atol, rtol), counted, y, ImpulseNoise(first))

    # One image at a time.
    evaluated = 0
    for image, label, ours in zip(first, y, ends, strict=True):
        theirs, evaluations = solve_alone(image, label, atol, rtol)
        evaluated += evaluations
        np.testing.assert_allclose(ours.flatten().numpy(), theirs, rtol=1e-6, atol=1e-6)
    assert counted.evaluated == evaluated > 4 * 14


@paths
def test_dopri5_reaches_the_data_within_its_tolerance(path: str):
    """The error at the end is of the order of the relative tolerance."""
    first = torch.linspace(-2, 2, 5).reshape(5, 1, 1, 1)
    truth = MEAN + STD * first
    for rtol in (1e-2, 1e-4, 1e-6):
        x = sample(Dopri5(1e-7, rtol), gaussian(path), labels(5), ImpulseNoise(first))
        assert (x - truth).abs().max() < 10 * rtol


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_velocity_that_is_no_number_ends_dopri5_in_one_line(bad: float):
    """Where the velocity stops being finite, the solver gives up and says so."""

    def breaking(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t.reshape(-1, 1, 1, 1) > 0.5, bad, x)

    noise = ImpulseNoise(torch.ones(2, 1, 1, 1))
    with pytest.raises(ValueError, match="dopri5 does not reach its tolerance") as failure:
        sample(Dopri5(1e-6, 1e-3), breaking, labels(2), noise)
    assert "\n" not in str(failure.value)


def coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """Return the shares of data and noise at a time, and their rates, by their formulas."""
    if path == "linear":
        return t, 1 - t, 1.0, -1.0
    angle = math.pi * t / 2
    rate = math.pi / 2
    return math.sin(angle), math.cos(angle), rate * math.cos(angle), -rate * math.sin(angle)


def diffusion_weight(form: str, t: float, s: float) -> float:
    """Return the weight of the SDE's noise at a time; s is the share of the path's noise."""
    weights = {
        "constant": 1,
        "sigma": s,
        "linear": 1 - t,
        "half-linear": (1 - t) / 2,
        "decreasing": 0.25 * (math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": math.sin(math.pi * t) ** 2,
    }
    return weights[form]


def sde_by_recursion(
    path: str, form: str, num_steps: int, last_step: str, size: float
) -> tuple[float, float]:
    """Return mean and variance of the chain from N(0, 1), in plain numbers.

    A step maps x - a * MEAN linearly, with a slope, to the new deviation from a centre.
    """
    mean = 0.0
    variance = 1.0
    dt = (1 - size) / (num_steps - 1)
    for i in range(num_steps):
        a, s, da, ds = coefficients(path, i * dt)
        w = diffusion_weight(form, i * dt, s)
        spread = a**2 * STD**2 + s**2
        is_last = i == num_steps - 1

        # The slope of the velocity is the rate, and that of the score -1 / spread.
        rate = (da * a * STD**2 + ds * s) / spread
        if is_last and last_step == "tweedie":
            slope = a * STD**2 / spread
            centre = MEAN
        else:
            step = size if is_last else dt
            follows_score = not is_last or last_step == "mean"
            drift = rate - w / spread if follows_score else rate
            slope = 1 + drift * step
            centre = a * MEAN + da * MEAN * step

        # Every step but the last one adds noise.
        added = 0 if is_last else 2 * w * dt
        variance = slope**2 * variance + added
        mean = centre + slope * (mean - a * MEAN)
    return mean, variance


@paths
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_the_sde_follows_the_recursion(path: str, form: str, last_step: str):
    """The chain's response to each of its draws adds up to the mean and variance by hand."""
    num_steps = 20
    first = torch.zeros(num_steps + 1, 1, 1, 1)
    first[0] = 1
    noise = ImpulseNoise(first)
    sampler = SDE(Flow(path), num_steps, form, last_step, last_size=0.04)
    *steps, x = sampler(gaussian(path), labels(len(first)), noise)
    assert len(steps) == num_steps - 1
    assert noise.num_later_draws == num_steps - 1

    # Image k sees draw k alone, and the last image sees none.
    gains = (x[:-1] - x[-1]).flatten()
    offset = x[-1].item()
    mean, variance = sde_by_recursion(path, form, num_steps, last_step, 0.04)
    assert offset == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert gains.square().sum().item() == pytest.approx(variance, rel=1e-5)


@paths
def test_the_sde_converges_to_the_data(path: str):
    errors = []
    for num_steps in (50, 200, 800):
        mean, variance = sde_by_recursion(path, "sigma", num_steps, "mean", 1 / num_steps)
        errors.append(abs(mean - MEAN) + abs(variance - STD**2))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[2] < 5e-3, errors


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(form="sbdm"), "known: constant, sigma"),
        (dict(last_step="none"), "mean, tweedie, euler"),
        (dict(last_size=0.0), "between 0 and 1"),
        (dict(num_steps=1), "two steps"),
    ],
)
def test_what_an_sde_cannot_be_is_refused(change: dict[str, object], words: str):
    """A wrong option is refused in words that list the right ones."""
    options = dict(num_steps=4, form="sigma", last_step="mean", last_size=0.04) | change
    noise = ImpulseNoise(torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match=words):
        sample(SDE(Flow("linear"), **options), gaussian("linear"), labels(1), noise)


@pytest.mark.parametrize("name, nfe", [("euler", 6), ("heun", 12), ("sde", 6), ("dopri5", None)])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_an_image_of_a_flow_depends_on_its_seed_and_not_on_the_batch(
    name: str, nfe: int | None, scale: float
):
    """An image alone is that of the batch, and a batch evaluates what its images would alone."""
    sampler = bind_sampler(Sampler(name, num_steps=6), Flow("linear"))
    seeds = [5, 6, 7, 8, 9]
    y = torch.arange(5)

    def sampled(start: int, stop: int) -> tuple[Tensor, float]:
        """Return images of some seeds, and the evaluations per image."""
        counted = CountingModel(lambda x, t, y: curved(x, t, y % 3).float())
        guided = Guided(counted, scale, 10, channels=None)
        x = sample(sampler, guided, y[start:stop], ImageNoise(seeds[start:stop], (1, 3, 3)))
        return x, counted.evaluated / (stop - start)

    # The whole batch, and every image alone.
    whole, evaluations = sampled(0, 5)
    singles = [sampled(i, i + 1) for i in range(5)]
    alone = torch.cat([x for x, _ in singles])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)

    # An adaptive solver evaluates some images more often. Guidance doubles the evaluations.
    if name == "dopri5":
        nfe_alone = [count for _, count in singles]
        assert evaluations == pytest.approx(np.mean(nfe_alone))
        assert len(set(nfe_alone)) > 1
    else:
        assert evaluations == nfe * (2 if scale > 1 else 1)
