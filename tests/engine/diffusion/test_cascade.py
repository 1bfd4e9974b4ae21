"""ADM's classifier of noisy images, its gradient in samplers, and the upsampler."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.checkpoint import load_published
from experiments.declared.protocols import DIGITS
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import load
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import ClassifierGradient, System
from experiments.engine.diffusion.samplers import DDIM, Ancestral, bind_sampler
from experiments.engine.jobs.execute import execute
from experiments.engine.judges import classifiers as features
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.spec import Data, Diffusion, Sampler
from experiments.engine.specs.stages import evaluate_stage
from experiments.engine.timing.cost import MacCounter
from experiments.main_results import TABLE_1
from tests.support.flows import sample
from tests.support.networks import randomise, relative_rms

CLASSES = 7
# Measured on the authors' modules: parameters, core Gmacs, entries of the state_dict, and a digest
# of their names and shapes.
PUBLISHED = {
    "adm_classifier_64": (65_438_568, 19.0790, 307, "0b7fc9917ffd8325"),
    "adm_classifier_128": (42_568_040, 21.0403, 221, "e717337216e06448"),
    "adm_classifier_256": (54_096_360, 73.3486, 249, "bc098f973cf9f8b9"),
    "adm_classifier_512": (54_448_360, 112.7669, 281, "2a24b6c641814825"),
}
# Logits of the second sample, from the authors' module in float64 with these weights and inputs.
THEIRS = [
    0.369861287336,
    0.044598441025,
    -0.581038882315,
    -0.163559649637,
    0.401689026692,
    0.086816576303,
    -0.651386296362,
]
every_name = pytest.mark.parametrize("name", PUBLISHED)


def classifier(name: str = "adm_classifier_64", **options: object) -> nn.Module:
    return backbones.build(
        name, **backbones.tiny_options_of(name) | dict(num_classes=CLASSES) | options
    )


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [0, 37, 999]
    )


def test_classifiers_are_built_and_listed_apart():
    assert backbones.list_classifiers() == sorted(PUBLISHED)
    assert not set(PUBLISHED) & set(backbones.list_backbones())
    with pytest.raises(ValueError, match="adm_classifier_64"):
        backbones.build("adm_classifier_32")


@every_name
def test_classifier_counts_and_names_are_the_authors(name: str):
    import hashlib

    params, core, entries, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = backbones.build(name)
        side = int(name.rpartition("_")[2])
        with MacCounter() as macs:
            assert model(torch.empty(1, 3, side, side), torch.empty(1)).shape == (1, 1000)
    lines = sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == params
    assert abs(macs.core / 1e9 - core) < 0.51e-4
    assert len(lines) == entries
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == keys


def test_classifier_output_is_that_of_the_authors_module_and_of_each_sample():
    model = randomise(classifier()).double()
    x, t = inputs()
    with torch.no_grad():
        out = model(x.double(), t)
        assert relative_rms(out[1], torch.tensor(THEIRS, dtype=torch.float64)) < 1e-9
        for i in range(3):
            assert relative_rms(model(x[i : i + 1].double(), t[i : i + 1])[0], out[i]) < 1e-12
        assert relative_rms(model.float()(x, t), out) < 1e-5


def test_classifier_gradients_reach_every_parameter():
    model = randomise(
        classifier(multipliers=(1, 1, 2))
    ).double()  # a norm's group of one channel would take away its bias
    x, t = inputs()
    model(x.double(), t).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 1e-6 * p.norm()
        for p in model.parameters()
    )


def test_classifier_checkpoints_load_strictly(tmp_path: Path):
    model = randomise(classifier())
    other = classifier()
    torch.save(model.state_dict(), tmp_path / "classifier.pt")
    load_published(other, tmp_path / "classifier.pt")
    assert all(
        torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items()
    )
    with pytest.raises(ValueError, match="missing"):
        load_published(classifier(num_res_blocks=2), tmp_path / "classifier.pt")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"input_size": 18}, "divisible by 4"),
        ({"dim": 48}, "divisible by 32"),
        ({"head_dim": 24}, "head_dim 24"),
    ],
)
def test_classifier_sizes_are_refused_in_a_line(options: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words):
        classifier(**options)
    with pytest.raises(ValueError, match="takes inputs of 16x16, got 8x8"):
        classifier()(torch.zeros(1, 3, 8, 8), torch.zeros(1))


def logits(x: Tensor, t: Tensor) -> Tensor:
    """Not linear in x, and another at every time: (N, K)."""
    flat = x.flatten(1)
    table = torch.randn(
        3, flat.shape[1], generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    return torch.tanh(flat @ table.T.to(x.dtype)) * (1 + t[:, None] / 1000)


def log_probability(x: Tensor, t: float, y: int) -> Tensor:
    """log p(y | x) of one image, from the definition."""
    scores = logits(x[None], torch.tensor([t]))[0]
    return scores[y] - torch.log(torch.exp(scores).sum())


def test_the_gradient_is_that_of_the_log_probability_by_finite_differences():
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([10.0, 700.0])
    y = torch.tensor([2, 0])
    with torch.no_grad():
        found = ClassifierGradient(lambda x, t: logits(x.double(), t), 2.5)(x, t, y)
    for i in range(2):
        for place in range(9):
            step = torch.zeros(9, dtype=torch.float64)
            step[place] = 1e-6
            rise = log_probability(
                x[i] + step.view(1, 3, 3), t[i].item(), int(y[i])
            ) - log_probability(x[i] - step.view(1, 3, 3), t[i].item(), int(y[i]))
            assert (
                abs(found[i].flatten()[place] - 2.5 * rise / 2e-6) < 1e-4
            )  # the probabilities are taken in float32


def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A network with noise estimates beyond what clipping lets pass, and a variance of its own."""
    return torch.cat([1.5 * torch.sin(3 * x) + 0.1 * y[:, None, None, None], torch.cos(x)], dim=1)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_guided_step_against_the_paper_written_out(name: str, clip: bool):
    """ADM algorithms 1 and 2, in float64, from the schedule's own numbers."""
    scale = 3.0
    y = torch.tensor([1, 2])
    diffusion = build_diffusion(Diffusion()).respaced(5)
    gradient = ClassifierGradient(logits, scale)
    kind = {"ancestral": Ancestral, "ddim": DDIM}[name]
    sampler = kind(diffusion, clip=clip, gradient=gradient)
    steps = sampler(predict, y, ImageNoise([5, 6], (1, 3, 3)))
    drawn = ImageNoise([5, 6], (1, 3, 3))
    x = drawn.draw()
    for i, found in zip(reversed(range(5)), steps, strict=True):
        t = diffusion.timesteps[i].repeat(2)
        z = drawn.draw()
        a = diffusion.alphas_cumprod[i].item()
        before = diffusion.alphas_cumprod[i - 1].item() if i else 1.0
        beta = 1 - a / before
        leaf = x.double().requires_grad_()
        sum(log_probability(leaf[n], t[n].item(), int(y[n])) for n in range(2)).backward()
        eps, u = predict(x, t, y).double().chunk(2, dim=1)
        clean = (x.double() - math.sqrt(1 - a) * eps) / math.sqrt(a)
        clean = clean.clamp(-1, 1) if clip else clean
        if name == "ddim":
            eps = (x.double() - math.sqrt(a) * clean) / math.sqrt(1 - a) - math.sqrt(
                1 - a
            ) * scale * leaf.grad
            clean = (x.double() - math.sqrt(1 - a) * eps) / math.sqrt(a)
            truth = math.sqrt(before) * clean + math.sqrt(1 - before) * eps
        else:
            floor = max(i, 1)
            a1 = diffusion.alphas_cumprod[floor].item()
            b1 = diffusion.alphas_cumprod[floor - 1].item()
            posterior = (1 - a1 / b1) * (1 - b1) / (1 - a1)
            variance = torch.exp((u + 1) / 2 * math.log(beta) + (1 - u) / 2 * math.log(posterior))
            mean = (
                math.sqrt(before) * beta / (1 - a) * clean
                + math.sqrt(a / before) * (1 - before) / (1 - a) * x.double()
            )
            truth = mean + variance * scale * leaf.grad + (variance.sqrt() * z.double() if i else 0)
        assert relative_rms(found, truth) < 1e-5
        x = found


def test_scale_zero_is_no_guidance_and_other_samplers_refuse_it():
    diffusion = build_diffusion(Diffusion()).respaced(4)
    y = torch.tensor([1, 2])
    ends = [
        sample(
            Ancestral(diffusion, clip=True, gradient=gradient),
            predict,
            y,
            ImageNoise([5, 6], (1, 3, 3)),
        )
        for gradient in (None, ClassifierGradient(logits, 0.0))
    ]
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="ancestral and ddim, not 'dpm_solver'"):
        bind_sampler(
            Sampler("dpm_solver"),
            build_diffusion(Diffusion(variance="fixed")),
            ClassifierGradient(logits, 1.0),
        )


def test_the_classifiers_loss_is_cross_entropy_on_noisy_images():
    objective = build_diffusion(Diffusion("classify"))
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 1, 3, 3, generator=draw)
    eps = torch.randn(4, 1, 3, 3, generator=draw)
    t = torch.tensor([0, 5, 500, 999])
    y = torch.tensor([0, 1, 2, 0])
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    for n, loss in enumerate(objective.losses(logits, x0, y, t, eps)["loss"]):
        a = torch.prod(1 - beta[: t[n] + 1])
        noisy = a.sqrt() * x0[n] + (1 - a).sqrt() * eps[n]
        assert abs(loss + log_probability(noisy.float(), t[n].item(), int(y[n]))) < 1e-5


def test_an_upsampler_learns_from_means_over_areas():
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x), 2, 6, 6)

    x0 = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    build_diffusion(Diffusion(low_res=3)).losses(
        model, x0, torch.tensor([0, 1]), torch.tensor([3, 900]), torch.zeros_like(x0)
    )
    means = torch.stack(
        [x0[:, :, r : r + 2, c : c + 2].mean((2, 3)) for r in (0, 2, 4) for c in (0, 2, 4)], dim=-1
    ).view(2, 1, 3, 3)
    assert seen[0].shape == (2, 2, 6, 6)
    assert (
        seen[0][:, 1:].sum((2, 3)) - 4 * means.sum((2, 3))
    ).abs().max() < 1e-4  # the bilinear weights of each pixel add up to 4
    assert (
        relative_rms(seen[0][:, 1, 0, 0], means[:, 0, 0, 0]) < 1e-6
    )  # and a corner is its nearest


def test_small_digits_are_means_over_areas_and_whole_digits_as_they_were():
    whole, half = (load(Data("digits", size, 1, 10)).images for size in (8, 4))
    assert half.shape == (1797, 1, 4, 4)
    assert abs(half[3, 0, 1, 2] - whole[3, 0, 2:4, 4:6].mean()) < 1e-6
    with pytest.raises(ValueError, match="size 1, 2, 4 or 8, not 5"):
        load(Data("digits", 5, 1, 10))


def test_the_upsampler_is_given_the_base_models_8_bit_images():
    stage = replace(evaluate_stage(TABLE_1.row("ADM-U"), DIGITS, 0), num=3)
    torch.manual_seed(0)
    networks = [
        randomise(backbones.build(training.backbone.name, **training.backbone.options), seed)
        for seed, training in enumerate(stage.trainings)
    ]
    given: list[Tensor] = []
    networks[2].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    counted = CountingModel(System(*networks))
    quick = replace(
        stage,
        sampler=replace(stage.sampler, num_steps=3),
        upsampling=replace(stage.upsampling, num_steps=4),
    )
    x, y = next(generate_images(quick, counted, torch.device("cpu"), 3))
    assert x.shape == (3, 1, 8, 8)
    assert counted.evaluated == 3 * (3 + 4)
    assert len(given) == 4
    (base, _), *_ = generate_images(
        replace(quick, upsampler=None, upsampling=None),
        System(networks[0], networks[1], None),
        torch.device("cpu"),
        3,
    )
    expected = nn.functional.interpolate(
        from_uint8(to_uint8(base)), (8, 8), mode="bilinear", align_corners=False
    )
    assert all(torch.equal(part[:, 1:], expected) for part in given)
    assert not torch.equal(given[0][:, :1], given[1][:, :1])
    pieces = torch.cat(
        [part for part, _ in generate_images(quick, System(*networks), torch.device("cpu"), 2)]
    )
    assert relative_rms(pieces, x) < 1e-4


def test_a_cascade_runs_from_its_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three trainings and the evaluation that hangs on them, through the records."""
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=5))
    short = replace(
        DIGITS,
        recipe=replace(DIGITS.recipe, steps=3, batch=8, warmup=0),
        sampler=replace(DIGITS.sampler, num_steps=3),
        num=40,
    )
    stage = evaluate_stage(TABLE_1.row("ADM-U"), short, 0)
    store = Store(tmp_path)
    for training in stage.trainings:
        assert execute(training, store, Resources()).status == "done"
    record = execute(stage, store, Resources())
    assert record.status == "done", record.error
    assert record.values["nfe"] == 6
    assert record.values["manifest"]["measure"]["image"]["size"] == 8
    assert record.values["manifest"]["measure"]["guidance"]["classifier_scale"] == 1.0
    assert record.values["manifest"]["measure"]["upsampling"]["num_steps"] == 3
