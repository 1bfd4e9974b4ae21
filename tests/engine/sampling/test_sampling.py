"""Sampling by index, the digits classifier, and scoring end to end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.ablation import DICO_S
from experiments.declared.protocols import DIGITS_WHOLE
from experiments.engine.data.sets import load
from experiments.engine.judges.classifiers import digits_classifier, extract
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling import batches
from experiments.engine.sampling.generate import generate_images, image_labels, image_seeds
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import Evaluate, Sampler
from experiments.engine.specs.stages import evaluate_stage
from experiments.engine.training import stage as training_stage
from experiments.engine.training.networks import build

CPU = torch.device("cpu")


def tiny() -> Evaluate:
    """DiCo at width 8 for a few steps, 7 images in 4 sampling steps."""
    stage = evaluate_stage(
        replace(DICO_S, small=dict(dim=8, depths=(1, 1, 1, 1, 1))), DIGITS_WHOLE, 0
    )
    recipe = replace(stage.train.recipe, steps=3, batch=8, warmup=1)
    return replace(
        stage,
        train=replace(stage.train, recipe=recipe),
        sampler=Sampler(num_steps=4, channels=None),
        num=7,
    )


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the trained digits classifier, which takes seconds to train."""
    cache = tmp_path_factory.mktemp("classifiers")
    digits_classifier(load(DIGITS_WHOLE.data), cache)
    return cache


def sampled(spec: Evaluate, batch: int) -> torch.Tensor:
    model = build(spec.train.backbone, 0, CPU).eval()
    torch.nn.init.normal_(
        model.final_layer.out_proj.weight, std=0.1, generator=torch.Generator().manual_seed(1)
    )
    return torch.cat([x for x, _ in generate_images(spec, model, CPU, batch)])


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_an_image_depends_on_its_seed_and_not_on_the_batch(sampler: str, scale: float):
    spec = replace(tiny(), sampler=Sampler(sampler, num_steps=4, scale=scale, channels=None))
    whole = sampled(spec, 7)
    for batch in (1, 3):
        torch.testing.assert_close(sampled(spec, batch), whole, rtol=1e-4, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1
    assert not torch.allclose(sampled(replace(spec, seed=1), 7), whole)


def test_seeds_differ_within_a_set_and_between_sets():
    first, second = image_seeds(0, 5000), image_seeds(1, 5000)
    assert len(set(first)) == 5000 and not set(first) & set(second)
    assert image_seeds(0, 7) == first[:7] and max(first) < 2**32


def test_label_policies():
    assert image_labels("balanced", 25, 10, 0).bincount(minlength=10).tolist() == [3] * 5 + [2] * 5
    random = image_labels("random", 4000, 10, 0)
    assert torch.equal(random[:9], image_labels("random", 9, 10, 0)) and not torch.equal(
        random, image_labels("random", 4000, 10, 1)
    )
    assert (random.bincount(minlength=10) - 400).abs().max() < 5 * math.sqrt(360)
    with pytest.raises(ValueError, match="balanced, random"):
        image_labels("sorted", 4, 10, 0)


def test_unknown_sampler_lists_the_known():
    spec = replace(tiny(), sampler=Sampler("euler", num_steps=4))
    with pytest.raises(ValueError, match="ancestral, ddim"):
        next(generate_images(spec, build(spec.train.backbone, 0, CPU), CPU, 7))


def test_the_classifier_is_cached_by_content_and_scores_are_named_for_what_they_are(
    tmp_path: Path, classifiers: Path
):
    """A second evaluation takes the classifier from its file, and has the same scores."""
    spec = tiny()
    context = RunContext(tmp_path / "run")
    training_stage.run_training(spec.train, context)
    first = evaluate.run_evaluation(spec, classifiers, context)
    (file,) = classifiers.glob("*.safetensors")
    written = file.stat().st_mtime_ns

    # By other batches of samples.
    smaller = RunContext(tmp_path / "run", Resources(sample_batch=3))
    again = evaluate.run_evaluation(spec, classifiers, smaller)
    assert file.stat().st_mtime_ns == written
    assert list(classifiers.glob("*.safetensors")) == [file]
    assert first["classifier_sha256"] == again["classifier_sha256"]
    assert repr(again) == repr(first)

    # Scores on digits do not bear the names of Inception's. Seven images have no error.
    scores = {"fd_digits", "is_digits", "precision_digits", "recall_digits", "agreement"}
    assert scores <= set(first)
    assert not {"fid", "is", "precision", "recall"} & set(first)
    assert first["classifier_accuracy"] > 0.95
    assert math.isfinite(first["fd_digits"])
    assert math.isnan(first["fd_digits_se"])

    # The manifest names what ran, and diffusers only where it did.
    run = first["manifest"]["run"]
    assert run["batch"] == batches.BATCH_ON_CPU
    assert set(run["cores"]) == {"number", "decided_by", "limits"}
    other = replace(spec, sampler=replace(spec.sampler, name="dpm_solver_diffusers"))
    by_diffusers = evaluate.run_evaluation(other, classifiers, context)
    assert "diffusers" not in first["manifest"]["measure"]["versions"]
    assert "diffusers" in by_diffusers["manifest"]["measure"]["versions"]


def test_real_digits_score_as_real(classifiers: Path):
    data = load(DIGITS_WHOLE.data)
    x, y = data.take(torch.arange(len(data)))
    classifier, _ = digits_classifier(data, classifiers)
    features, probabilities = extract(classifier, x)
    assert features.shape == (len(data), 64) and (features >= 0).all()
    assert (probabilities.argmax(1) == y.numpy()).mean() > 0.98


def test_scoring_needs_a_finished_run(tmp_path: Path, classifiers: Path):
    spec = tiny()
    with pytest.raises(ValueError, match="no finished checkpoint"):
        evaluate.run_evaluation(spec, classifiers, RunContext(tmp_path / "run"))
    with pytest.raises(ValueError, match="inception features"):
        evaluate.run_evaluation(
            replace(spec, features="inception"), classifiers, RunContext(tmp_path / "run")
        )
