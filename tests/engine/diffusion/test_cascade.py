"""A classifier's gradient in samplers, and the cascade of a base network and its upsampler."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.declared.protocols import DIGITS
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import load
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import ClassifierGradient, System
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.samplers import DDIM, Ancestral, bind_sampler
from experiments.engine.jobs.execute import execute
from experiments.engine.judges import classifiers
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.spec import Data, Diffusion, Sampler
from experiments.engine.specs.stages import evaluate_stage
from experiments.main_results import TABLE_1
from tests.support.flows import sample
from tests.support.networks import randomise, relative_rms

CPU = torch.device("cpu")
SCALE = 3.0  # of the classifier's gradient


# ---- A classifier and a network in closed form


def logits(x: Tensor, t: Tensor) -> Tensor:
    """Not linear in x, and another at every time: (N, 3)."""
    flat = x.flatten(1)
    draw = torch.Generator().manual_seed(4)
    table = torch.randn(3, flat.shape[1], generator=draw, dtype=torch.float64)
    return torch.tanh(flat @ table.T.to(x.dtype)) * (1 + t[:, None] / 1000)


def log_probability(x: Tensor, t: float, y: int) -> Tensor:
    """log p(y | x) of one image, from the definition."""
    scores = logits(x[None], torch.tensor([t]))[0]
    return scores[y] - torch.log(torch.exp(scores).sum())


def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A network with noise estimates beyond what clipping lets pass, and a variance of its own."""
    return torch.cat([1.5 * torch.sin(3 * x) + 0.1 * y[:, None, None, None], torch.cos(x)], dim=1)


# ---- Guidance by the classifier


def test_the_gradient_is_that_of_the_log_probability_by_finite_differences():
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([10.0, 700.0])
    y = torch.tensor([2, 0])
    with torch.no_grad():
        gradient = ClassifierGradient(lambda x, t: logits(x.double(), t), 2.5)(x, t, y)

    # Each pixel is moved a little up and down; the probabilities are taken in float32.
    for i in range(2):
        for place in range(9):
            step = torch.zeros(9, dtype=torch.float64)
            step[place] = 1e-6
            step = step.view(1, 3, 3)
            above = log_probability(x[i] + step, t[i].item(), int(y[i]))
            below = log_probability(x[i] - step, t[i].item(), int(y[i]))
            slope = (above - below) / 2e-6
            assert gradient[i].flatten()[place] == pytest.approx(2.5 * slope.item(), abs=1e-4)


def classifier_gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The gradient of log p(y | x) by x, in float64."""
    leaf = x.double().requires_grad_()
    for n in range(len(x)):
        log_probability(leaf[n], t[n].item(), int(y[n])).backward()
    assert leaf.grad is not None
    return leaf.grad


def clean_image(x: Tensor, eps: Tensor, a: float, clip: bool) -> Tensor:
    """The image that the estimated noise leaves."""
    clean = (x.double() - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return clean.clamp(-1, 1) if clip else clean


def ddim_step(diffusion: IDDPM, i: int, x: Tensor, y: Tensor, clip: bool) -> Tensor:
    """ADM's algorithm 2: the gradient moves the estimated noise."""
    t = diffusion.timesteps[i].repeat(len(x))
    a = diffusion.alphas_cumprod[i].item()
    before = diffusion.alphas_cumprod[i - 1].item() if i else 1.0

    eps, _ = predict(x, t, y).double().chunk(2, dim=1)
    clean = clean_image(x, eps, a, clip)
    eps = (x.double() - math.sqrt(a) * clean) / math.sqrt(1 - a)
    eps = eps - math.sqrt(1 - a) * SCALE * classifier_gradient(x, t, y)
    clean = clean_image(x, eps, a, clip=False)
    return math.sqrt(before) * clean + math.sqrt(1 - before) * eps


def ancestral_step(diffusion: IDDPM, i: int, x: Tensor, y: Tensor, clip: bool, z: Tensor) -> Tensor:
    """ADM's algorithm 1: the gradient moves the mean, by the variance."""
    t = diffusion.timesteps[i].repeat(len(x))
    a = diffusion.alphas_cumprod[i].item()
    before = diffusion.alphas_cumprod[i - 1].item() if i else 1.0
    beta = 1 - a / before

    # The variance lies between beta and the posterior's; the last step takes that of the one above.
    floor = max(i, 1)
    a1 = diffusion.alphas_cumprod[floor].item()
    b1 = diffusion.alphas_cumprod[floor - 1].item()
    posterior = (1 - a1 / b1) * (1 - b1) / (1 - a1)
    eps, u = predict(x, t, y).double().chunk(2, dim=1)
    variance = torch.exp((u + 1) / 2 * math.log(beta) + (1 - u) / 2 * math.log(posterior))

    # The mean of the step before, moved by the gradient.
    clean = clean_image(x, eps, a, clip)
    mean = math.sqrt(before) * beta / (1 - a) * clean
    mean = mean + math.sqrt(a / before) * (1 - before) / (1 - a) * x.double()
    mean = mean + variance * SCALE * classifier_gradient(x, t, y)
    return mean + variance.sqrt() * z.double() if i else mean


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_guided_step_is_the_papers_written_out(name: str, clip: bool):
    """Every step from the sampler's own x, in float64, from the schedule's own numbers."""
    y = torch.tensor([1, 2])
    diffusion = build_diffusion(Diffusion()).respaced(5)
    kind = {"ancestral": Ancestral, "ddim": DDIM}[name]
    sampler = kind(diffusion, clip=clip, gradient=ClassifierGradient(logits, SCALE))
    steps = sampler(predict, y, ImageNoise([5, 6], (1, 3, 3)))

    # The same noise is drawn again beside the sampler.
    noise = ImageNoise([5, 6], (1, 3, 3))
    x = noise.draw()
    for i, after in zip(reversed(range(5)), steps, strict=True):
        z = noise.draw()
        if name == "ddim":
            expected = ddim_step(diffusion, i, x, y, clip)
        else:
            expected = ancestral_step(diffusion, i, x, y, clip, z)
        assert relative_rms(after, expected) < 1e-5
        x = after


def test_scale_zero_is_no_guidance():
    diffusion = build_diffusion(Diffusion()).respaced(4)
    y = torch.tensor([1, 2])

    def end(gradient: ClassifierGradient | None) -> Tensor:
        sampler = Ancestral(diffusion, clip=True, gradient=gradient)
        return sample(sampler, predict, y, ImageNoise([5, 6], (1, 3, 3)))

    assert torch.equal(end(None), end(ClassifierGradient(logits, 0.0)))


def test_other_samplers_refuse_a_classifier():
    diffusion = build_diffusion(Diffusion(variance="fixed"))
    with pytest.raises(ValueError, match="ancestral and ddim, not 'dpm_solver'"):
        bind_sampler(Sampler("dpm_solver"), diffusion, ClassifierGradient(logits, 1.0))


# ---- Losses


def test_the_classifiers_loss_is_cross_entropy_on_noisy_images():
    """The loss of an image is that of its label at the noise of its timestep."""
    objective = build_diffusion(Diffusion("classify"))
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 1, 3, 3, generator=draw)
    eps = torch.randn(4, 1, 3, 3, generator=draw)
    t = torch.tensor([0, 5, 500, 999])
    y = torch.tensor([0, 1, 2, 0])
    losses = objective.losses(logits, x0, y, t, eps)["loss"]

    # Image by image, from the linear schedule.
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    for n, loss in enumerate(losses):
        a = torch.prod(1 - beta[: t[n] + 1])
        noisy = a.sqrt() * x0[n] + (1 - a).sqrt() * eps[n]
        expected = -log_probability(noisy.float(), t[n].item(), int(y[n])).item()
        assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_an_upsampler_learns_from_means_over_areas():
    inputs: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        inputs.append(x)
        return torch.zeros(len(x), 2, 6, 6)

    x0 = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 900])
    objective = build_diffusion(Diffusion(low_res=3))
    objective.losses(model, x0, torch.tensor([0, 1]), t, torch.zeros_like(x0))
    (given,) = inputs
    assert given.shape == (2, 2, 6, 6)

    # The second channel is the small image: means over 2 x 2 pixels, drawn out bilinearly.
    means = x0.view(2, 1, 3, 2, 3, 2).mean((3, 5))
    small = given[:, 1]

    # The bilinear weights of each pixel add up to 4, and a corner is its nearest pixel.
    assert (small.sum((1, 2)) - 4 * means.sum((1, 2, 3))).abs().max() < 1e-4
    assert relative_rms(small[:, 0, 0], means[:, 0, 0, 0]) < 1e-6


# ---- Small digits


def test_small_digits_are_means_over_areas():
    whole = load(Data("digits", 8, 1, 10)).images
    half = load(Data("digits", 4, 1, 10)).images
    assert half.shape == (1797, 1, 4, 4)
    assert half[3, 0, 1, 2] == pytest.approx(whole[3, 0, 2:4, 4:6].mean(), abs=1e-6)


def test_a_size_that_does_not_divide_the_digits_is_refused():
    with pytest.raises(ValueError, match="size 1, 2, 4 or 8, not 5"):
        load(Data("digits", 5, 1, 10))


# ---- The cascade


def test_the_upsampler_is_given_the_base_models_8_bit_images():
    stage = replace(evaluate_stage(TABLE_1.row("ADM-U"), DIGITS, 0), num=3)
    quick = replace(
        stage,
        sampler=replace(stage.sampler, num_steps=3),
        upsampling=replace(stage.upsampling, num_steps=4),
    )
    torch.manual_seed(0)
    networks = [
        randomise(backbones.build(training.backbone.name, **training.backbone.options), seed)
        for seed, training in enumerate(stage.trainings)
    ]
    base, classifier, upsampler = networks

    # Every call of the upsampler is kept.
    given: list[Tensor] = []
    upsampler.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    counted = CountingModel(System(*networks))
    x, _ = next(generate_images(quick, counted, CPU, 3))
    assert x.shape == (3, 1, 8, 8)
    assert counted.evaluated == 3 * (3 + 4)
    assert len(given) == 4

    # It sees the base's images as a file of 8 bits would hold them, beside its own noisy image.
    alone = replace(quick, upsampler=None, upsampling=None)
    small, _ = next(generate_images(alone, System(base, classifier, None), CPU, 3))
    expected = nn.functional.interpolate(
        from_uint8(to_uint8(small)), (8, 8), mode="bilinear", align_corners=False
    )
    for step in given:
        assert torch.equal(step[:, 1:], expected)
    assert not torch.equal(given[0][:, :1], given[1][:, :1])

    # Another batch size gives the same images.
    pieces = [piece for piece, _ in generate_images(quick, System(*networks), CPU, 2)]
    assert relative_rms(torch.cat(pieces), x) < 1e-4


def test_a_cascade_runs_from_its_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three trainings and the evaluation that hangs on them, through the records."""
    lesson = replace(classifiers.DIGITS_JUDGE, steps=5)
    monkeypatch.setattr(classifiers, "DIGITS_JUDGE", lesson)
    recipe = replace(DIGITS.recipe, steps=3, batch=8, warmup=0)
    short = replace(DIGITS, recipe=recipe, sampler=replace(DIGITS.sampler, num_steps=3), num=40)
    stage = evaluate_stage(TABLE_1.row("ADM-U"), short, 0)
    store = Store(tmp_path)
    for training in stage.trainings:
        assert execute(training, store, Resources()).status == "done"

    # The record names the parts of the cascade.
    record = execute(stage, store, Resources())
    assert record.status == "done", record.error
    assert record.values["nfe"] == 6
    measure = record.values["manifest"]["measure"]
    assert measure["image"]["size"] == 8
    assert measure["guidance"]["classifier_scale"] == 1.0
    assert measure["upsampling"]["num_steps"] == 3
