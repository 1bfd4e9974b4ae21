"""Scores of CIFAR-10 rows on a classifier trained here, of quantised images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.declared.protocols import CIFAR10, CIFAR10_16
from experiments.engine.data import locate as sources
from experiments.engine.data.locate import require_features
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import load_cifar10
from experiments.engine.judges import classifiers
from experiments.engine.judges.classifiers import cifar_classifier, extract
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling.generate import generate_images
from experiments.engine.sampling.samples import QUANTISER
from experiments.engine.scoring import stage as evaluate
from experiments.engine.scoring.frechet import frechet
from experiments.engine.scoring.moments import Moments
from experiments.engine.specs.spec import Backbone, Evaluate, Recipe, Sampler, Train
from experiments.engine.training import stage as training_stage
from experiments.engine.training import trainer as train
from tests.support.cifar import accept_small_sets, file_of, write_parquet

SMALL = Backbone(
    "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=32, in_channels=3, num_classes=10)
)
SPEC = Evaluate(
    Train(SMALL, CIFAR10.data, Recipe(steps=1, batch=4)),
    Sampler("ddim", num_steps=2),
    7,
    "cifar_classifier",
    "balanced",
)
SCORES = (
    "fd_cifar_classifier",
    "is_cifar_classifier",
    "precision_cifar_classifier",
    "recall_cifar_classifier",
    "agreement",
)


def write(folder: Path, split: str, num: int, seed: int) -> None:
    """Images whose colours and stripes tell their class, with noise."""
    draw = np.random.default_rng(seed)
    labels = np.arange(num) % 10
    stripes = np.sin(np.arange(32) * (1 + labels[:, None] % 5) / 3)
    wave = stripes * np.where(labels < 5, 60, -60)[:, None]
    levels = 128 + wave[:, None, :, None] * (1, 0.5, -1) + draw.normal(0, 15, (num, 32, 32, 3))
    pictures = [file_of(image) for image in levels.clip(0, 255).astype(np.uint8)]
    write_parquet(folder / f"{split}.parquet", pictures, labels.tolist())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the classifier of the images that `folder` writes is kept for all tests."""
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    accept_small_sets(monkeypatch)
    monkeypatch.setattr(classifiers, "CIFAR", replace(classifiers.CIFAR, steps=25, batch=24))
    write(tmp_path / "cifar10", "train", 200, 0)
    write(tmp_path / "cifar10", "test", 50, 1)
    return tmp_path


def test_the_classifier_learns_and_is_cached_by_its_data(folder: Path, cache: Path):
    test = load_cifar10(CIFAR10.data, "test")
    model, identity = cifar_classifier(CIFAR10.data, test, cache)
    assert identity["classifier_accuracy"] > 0.6
    assert not model.training

    # The second time it comes from its file.
    _, again = cifar_classifier(CIFAR10.data, test, cache)
    assert again == identity
    assert len(list(cache.glob("*.safetensors"))) == 1

    # Other training images give another classifier.
    write(folder / "cifar10", "train", 200, 2)
    _, other = cifar_classifier(CIFAR10.data, test, cache)
    assert other["classifier_sha256"] != identity["classifier_sha256"]


def moments_of(classifier: nn.Module, images: Tensor) -> Moments:
    """Mean and covariance of the classifier's features."""
    features, _ = extract(classifier, images)
    moments = Moments(64)
    moments.update(features)
    return moments


def test_scores_are_of_quantised_images_against_the_test_images(folder: Path, cache: Path):
    run = folder / "run"
    training_stage.run_training(SPEC.train, RunContext(run))
    context = RunContext(run, Resources(sample_batch=3))
    values = evaluate.run_evaluation(SPEC, cache, context)
    assert {*SCORES, *(f"{name}_se" for name in SCORES)} <= set(values)
    assert not [name for name in values if "fid" in name]
    assert values["nfe"] == 2

    # The distance is that of quantised samples from the test images.
    test = load_cifar10(CIFAR10.data, "test")
    classifier, identity = cifar_classifier(CIFAR10.data, test, cache)
    network = train.load_ema(SPEC.train, run, torch.device("cpu"))
    x = torch.cat([x for x, _ in generate_images(SPEC, network, torch.device("cpu"), 7)])
    images, _ = test.take(torch.arange(50))
    real = moments_of(classifier, images)
    fake = moments_of(classifier, from_uint8(to_uint8(x)))
    assert values["fd_cifar_classifier"] == pytest.approx(frechet(fake, real), rel=1e-4)
    assert values["classifier_accuracy"] == identity["classifier_accuracy"]

    # The manifest says by what was scored, and against what.
    measure = values["manifest"]["measure"]
    assert measure["extractor"] == {
        "name": "cifar_classifier",
        "sha256": identity["classifier_sha256"],
        "dtype": "fp32",
    }
    assert measure["quantiser"] == QUANTISER
    assert measure["reference"].pop("sha256") == test.identity["data_sha256"]
    assert measure["reference"] == {"name": "cifar10", "num_images": 50, "split": "test"}


def test_without_test_images_one_line_says_what_is_missing(folder: Path):
    (folder / "cifar10" / "test.parquet").unlink()
    with pytest.raises(ValueError, match="test.parquet or cifar-10-batches-py") as caught:
        require_features(replace(SPEC, num=CIFAR10_16.num))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="CIFAR-10's test images are not in data/cifar10"):
        load_cifar10(CIFAR10.data, "test")
