"""Samplers on Gaussian data: the optimal network is affine, so every chain is known exactly."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import backbones
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import IDDPM, Model
from experiments.engine.diffusion.samplers import (
    DDIM,
    Ancestral,
    BoundSampler,
    DiffusersDPMSolver,
    bind_sampler,
)
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.specs.spec import Diffusion, Sampler
from tests.support.flows import labels, sample
from tests.support.networks import randomise

MEAN, STD = 0.3, 0.7
SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM}


def gaussian(u: float, mean: float = MEAN, std: float = STD) -> Model:
    """The optimal eps of data N(mean, std^2), with constant variance logits u."""
    cumprod = IDDPM.linear().alphas_cumprod

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = cumprod[t].reshape(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        return torch.cat([eps, torch.full_like(x, u)], dim=1)

    return model


class Impulses:
    """Draw k is 1 for image k and 0 for other images.

    So image k ends on offset + gain of draw k, and the last image on the offset.
    """

    def __init__(self, num_steps: int):
        self.num, self.drawn = num_steps + 2, 0

    def draw(self) -> Tensor:
        noise = torch.zeros(self.num, 1, 1, 1, dtype=torch.float64)
        noise[self.drawn] = 1
        self.drawn += 1
        return noise


class Waves:
    """Draws in closed form, (2,2,3,5)."""

    def __init__(self):
        self.drawn = 0

    def draw(self) -> Tensor:
        self.drawn += 1
        phase = torch.arange(1, 61, dtype=torch.float64) * (0.7 + 0.618034 * self.drawn)
        return (math.sqrt(2) * phase.sin()).float().reshape(2, 2, 3, 5)


def probe(sampler, num_steps: int, model: Model, **options) -> tuple[Tensor, Tensor]:
    """The affine map of a chain: gains of its num_steps + 1 draws, and its offset."""
    noise = Impulses(num_steps)
    bound = sampler(IDDPM.linear().respaced(num_steps), **options)
    last = sample(bound, model, labels(noise.num), noise)
    assert noise.drawn == num_steps + 1
    last = last.flatten()
    return last[:-1] - last[-1], last[-1]


def moments_by_recursion(timesteps: list[int], fraction: float) -> tuple[float, float]:
    """Mean and variance after the ancestral chain from N(0, 1), from conditional expectations."""
    cumprod = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[timesteps]
    previous = np.concatenate([[1.0], cumprod[:-1]])
    betas = 1 - cumprod / previous
    mean = 0.0
    variance = 1.0
    for i in reversed(range(len(timesteps))):
        # The slope of E[x0 | x], and the posterior mean's weights of x0 and x.
        gain = cumprod[i] ** 0.5 * STD**2 / (cumprod[i] * STD**2 + 1 - cumprod[i])
        c1 = betas[i] * previous[i] ** 0.5 / (1 - cumprod[i])
        c2 = (1 - previous[i]) * (1 - betas[i]) ** 0.5 / (1 - cumprod[i])
        slope = c1 * gain + c2
        offset = c1 * MEAN * (1 - gain * cumprod[i] ** 0.5)

        # The step's noise lies between the true variance and beta; the last step has none.
        true = betas[i] * (1 - previous[i]) / (1 - cumprod[i])
        noise = betas[i] ** fraction * true ** (1 - fraction) if i > 0 else 0.0
        mean = slope * mean + offset
        variance = slope**2 * variance + noise
    return mean, variance


@pytest.mark.parametrize("num_steps", [10, 50, 250])
@pytest.mark.parametrize("u", [-1.0, 0.3, 1.4])
def test_ancestral_follows_the_recursion(num_steps: int, u: float):
    timesteps = IDDPM.linear().respaced(num_steps).timesteps.tolist()
    mean, variance = moments_by_recursion(timesteps, (u + 1) / 2)
    gains, offset = probe(Ancestral, num_steps, gaussian(u))
    assert gains[-1] == 0  # the last draw is masked
    assert offset.item() == pytest.approx(mean, rel=1e-5)
    assert gains.square().sum().item() == pytest.approx(variance, rel=1e-5)


def test_ancestral_reaches_the_data():
    gains, offset = probe(Ancestral, 1000, gaussian(-1.0))
    assert offset.item() == pytest.approx(MEAN, rel=1e-3)
    assert gains.square().sum().item() == pytest.approx(STD**2, rel=0.02)


def test_ancestral_yields_every_step_and_ends_on_the_clean_estimate():
    diffusion, model = IDDPM.linear().respaced(7), gaussian(0.0)
    steps = list(Ancestral(diffusion)(model, labels(2), ImageNoise([0, 1], (2, 3, 5))))
    t = diffusion.timesteps[0].repeat(2)
    _, _, x0_hat = diffusion.posterior(steps[-2], 0, model(steps[-2], t, labels(2)))
    assert len(steps) == 7
    torch.testing.assert_close(steps[-1], x0_hat)


def test_ddim_converges_to_the_probability_flow():
    """The flow of Gaussian data: (x - sqrt(A) mean) / deviation is constant in time."""
    cumprod = IDDPM.linear().alphas_cumprod[-1].item()
    slope = STD / math.sqrt(cumprod * STD**2 + 1 - cumprod)
    offset = MEAN * (1 - slope * math.sqrt(cumprod))
    errors = []
    for num_steps in (10, 50, 250, 1000):
        gains, start = probe(DDIM, num_steps, gaussian(0.0))
        assert gains[1:].count_nonzero() == 0  # eta 0 uses the first draw alone
        errors.append(math.hypot(gains[0].item() - slope, start.item() - offset))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 18 * errors[3] and errors[3] < 3e-3, errors


@pytest.mark.parametrize("num_steps", [20, 1000])
def test_ddim_at_eta_1_is_ancestral_with_the_posterior_variance(num_steps: int):
    gains, offset = probe(DDIM, num_steps, gaussian(0.0), eta=1.0)
    expected_gains, expected_offset = probe(Ancestral, num_steps, gaussian(-1.0))
    torch.testing.assert_close(gains, expected_gains, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(offset, expected_offset, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "sampler, options, expected",
    [
        ("ancestral", {}, [0.2710633, 0.2454858, 0.3100594, 0.3169348]),
        ("ddim", {}, [0.9213606, -0.2717592, -0.3931387, -0.5058284]),
        ("ddim", {"eta": 0.5}, [0.4392892, 0.1612971, 0.1236946, 0.1209899]),
    ],
)
def test_samples_are_those_of_the_authors(
    sampler: str, options: dict[str, float], expected: list[float]
):
    """Numbers from facebookresearch/DiT ed81ce2: create_diffusion("250"), same draws."""
    base = gaussian(0.0)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        eps, _ = base(x.double(), t, y).float().chunk(2, dim=1)
        return torch.cat([eps + 0.1 * x.flip(1).sin(), 1.2 * x.cos()], dim=1)

    bound = SAMPLERS[sampler](IDDPM.linear().respaced(250), **options)
    values = sample(bound, model, labels(2), Waves()).flatten()[[0, 7, 31, 59]]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_impossible_eta_is_refused(eta: float):
    with pytest.raises(ValueError, match="between 0"):
        sampler = DDIM(IDDPM.linear().respaced(5), eta=eta)
        next(sampler(gaussian(0.0), labels(1), ImageNoise([0], (1, 3, 5))))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_sampling_records_no_gradient(sampler):
    net = torch.nn.Conv2d(3, 6, 1)
    bound = sampler(IDDPM.linear().respaced(2))
    steps = bound(lambda x, t, y: net(x), labels(1), ImageNoise([0], (3, 3, 5)))
    for x in steps:
        assert not x.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("parts", [[5], [1, 4], [2, 3], [1, 1, 1, 1, 1]])
def test_noise_of_an_image_ignores_its_batch(parts: list[int]):
    seeds, shape = [11, 7, 2**32 - 1, 0, 7], (4, 5, 7)
    whole = ImageNoise(seeds, shape)
    expected = torch.stack([whole.draw() for _ in range(3)])
    pieces = [ImageNoise(part.tolist(), shape) for part in torch.tensor(seeds).split(parts)]
    drawn = torch.stack([torch.cat([piece.draw() for piece in pieces]) for _ in range(3)])
    assert torch.equal(drawn, expected)
    assert torch.equal(expected[:, 1], expected[:, 4])  # equal seeds, equal images
    assert expected.unique().numel() == expected[:, :4].numel()
    assert abs(expected[:, :4].mean()) < 0.1 and abs(expected[:, :4].std() - 1) < 0.1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_repeat_another_is_refused(seed: int):
    with pytest.raises(ValueError, match="seeds must be from"):
        ImageNoise([0, seed], (1, 3, 5))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_sample_of_an_image_ignores_its_batch(sampler):
    bound = sampler(IDDPM.linear().respaced(8))
    model = gaussian(0.0)
    seeds = [3, 1, 4, 1, 5]
    whole = sample(bound, model, labels(5), ImageNoise(seeds, (2, 3, 5)))
    first = sample(bound, model, labels(1), ImageNoise(seeds[:1], (2, 3, 5)))
    rest = sample(bound, model, labels(4), ImageNoise(seeds[1:], (2, 3, 5)))
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-6, atol=1e-6)


class Recorder:
    """A network of 4 data channels whose output depends on the label; it records its calls."""

    def __init__(self):
        torch.manual_seed(0)
        self.net, self.table, self.calls = (
            torch.nn.Conv2d(4, 8, 3, padding=1),
            torch.nn.Embedding(11, 8),
            [],
        )

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((len(x), y.tolist()))
        return self.net(x) * (1 + self.table(y)[:, :, None, None]) + 1e-3 * t.reshape(-1, 1, 1, 1)


def call_inputs(t: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    return x, torch.full((3,), t), torch.tensor([2, 9, 0])


@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize("scale", [0.0, 1.4, 4.0])
def test_guidance_algebra(channels: int | None, scale: float):
    model, (x, t, y) = Recorder(), call_inputs()
    guided = Guided(model, scale, 10, channels=channels)
    output, k = guided(x, t, y), channels or 4
    assert model.calls == [(6, [2, 9, 0, 10, 10, 10])]
    conditional, null = model(x, t, y), model(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(
        output[:, :k], scale * conditional[:, :k] + (1 - scale) * null[:, :k]
    )
    torch.testing.assert_close(output[:, k:], conditional[:, k:])
    output.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.net.parameters())


def test_scale_1_is_the_plain_network():
    model, inputs = Recorder(), call_inputs()
    guided = Guided(model, 1.0, 10, channels=3)
    assert torch.equal(guided(*inputs), model(*inputs))
    assert model.calls[0] == (3, [2, 9, 0])


@pytest.mark.parametrize("t, doubled", [(199, False), (200, True), (699, True), (700, False)])
def test_guidance_acts_inside_its_interval(t: int, doubled: bool):
    model, inputs = Recorder(), call_inputs(t)
    guided = Guided(model, 1.5, 10, channels=3, interval=(200, 700))
    output = guided(*inputs)
    assert model.calls[0][0] == 3 * (1 + doubled)
    assert torch.equal(output, model(*inputs)) != doubled


def test_guidance_tells_the_times_of_a_batch_apart():
    model, (x, _, y) = Recorder(), call_inputs()
    t = torch.tensor([100, 300, 800])
    output = Guided(model, 1.5, 10, channels=3, interval=(200, 700))(x, t, y)
    conditional, null = model(x, t, y), model(x, t, torch.full_like(y, 10))
    expected = conditional.clone()
    expected[1, :3] = 1.5 * conditional[1, :3] - 0.5 * null[1, :3]
    torch.testing.assert_close(output, expected)


def test_nfe_of_a_run_counts_both_halves():
    counted = CountingModel(Recorder())
    sample(
        Ancestral(IDDPM.linear().respaced(10)),
        Guided(counted, 1.5, 10, channels=3, interval=(0, 500)),
        labels(2),
        ImageNoise([0, 1], (4, 5, 7)),
    )
    assert counted.evaluated / 2 == 10 + 5  # 0, 111, ..., 444 of 0, 111, ..., 999 are guided


def test_guiding_channels_that_do_not_exist_is_refused():
    with pytest.raises(ValueError, match="cannot guide 5 channels of data that have 4"):
        Guided(Recorder(), 1.5, 10, channels=5)(*call_inputs())


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_clipped_estimates_keep_a_wild_network_within_pixels(name: str):
    """Cosine betas amplify an error of the first step by 1 / sqrt(A), about 1e4."""
    cosine = build_diffusion(Diffusion(betas="cosine"))
    wild = lambda x, t, y: torch.full((len(x), 2 * x.shape[1], *x.shape[2:]), 0.3)  # noqa: E731
    highest = {}
    for clip in (False, True):
        noise = ImageNoise([3, 4], (2, 5, 3))
        *_, x = bind_sampler(Sampler(name=name, num_steps=20, clip=clip), cosine)(
            wild, torch.zeros(2, dtype=torch.long), noise
        )
        highest[clip] = x.abs().max().item()
    assert highest[True] <= 1 < highest[False]


def test_guided_channels_default_to_what_the_family_declares():
    shape = dict(input_size=8, in_channels=4, num_classes=10)
    expected = {"dit_s_2": 3, "dico_s": 3, "uvit_l_2": None, "ldm_4": None, "dimsum_l_2": None}
    for name, channels in expected.items():
        network = backbones.build(name, **backbones.tiny_options_of(name) | shape)
        assert Guided(network, 1.5, 10).channels == channels, name
    with pytest.raises(ValueError, match="declares its guided channels"):
        Guided(Recorder(), 1.5, 10)


def test_a_family_that_guides_three_channels_guides_all_of_fewer():
    name = "dit_s_2"
    shape = dict(input_size=8, in_channels=1, num_classes=10)
    network = randomise(backbones.build(name, **backbones.tiny_options_of(name) | shape))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = x, torch.tensor([3, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        output = Guided(network, 1.5, 10)(*inputs)
        assert torch.equal(output, Guided(network, 1.5, 10, channels=None)(*inputs))
        with pytest.raises(ValueError, match="cannot guide 3 channels"):
            Guided(network, 1.5, 10, channels=3)(*inputs)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(IDDPM.linear().respaced(5)), DiffusersDPMSolver(IDDPM.linear(), 5)],
    ids=["ddim", "dpm"],
)
def test_a_tensor_of_initial_noise_gives_the_image_of_its_seed(sampler: BoundSampler):
    seeds, shape = [3, 4], (2, 3, 5)
    start = ImageNoise(seeds, shape).draw()
    from_tensor = sample(sampler, gaussian(0.0), labels(2), start)
    assert torch.equal(
        from_tensor, sample(sampler, gaussian(0.0), labels(2), ImageNoise(seeds, shape))
    )


def test_after_a_tensor_the_noise_of_steps_comes_from_the_global_generator():
    sampler = Ancestral(IDDPM.linear().respaced(5))
    start = torch.ones(2, 2, 3, 5)
    images = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images.append(sample(sampler, gaussian(0.0), labels(2), start))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert torch.equal(start, torch.ones(2, 2, 3, 5))
