"""Scores of CIFAR-10 rows on a classifier trained here, of quantised images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.declared.protocols import CIFAR10, CIFAR10_SMALL
from experiments.engine.data import locate as sources
from experiments.engine.data.locate import require_features
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.data.sets import load_cifar10
from experiments.engine.judges import classifiers as features
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
    wave = (
        np.sin(np.arange(32) * (1 + labels[:, None] % 5) / 3)
        * np.where(labels < 5, 60, -60)[:, None]
    )
    levels = 128 + wave[:, None, :, None] * (1, 0.5, -1) + draw.normal(0, 15, (num, 32, 32, 3))
    write_parquet(
        folder / f"{split}.parquet",
        [file_of(image) for image in levels.clip(0, 255).astype(np.uint8)],
        labels.tolist(),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the classifier of the images that `folder` writes is kept for all tests."""
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    accept_small_sets(monkeypatch)
    monkeypatch.setattr(features, "CIFAR", replace(features.CIFAR, steps=25, batch=24))
    write(tmp_path / "cifar10", "train", 200, 0)
    write(tmp_path / "cifar10", "test", 50, 1)
    return tmp_path


def test_the_classifier_learns_is_cached_by_its_data_and_tested_on_other_images(
    folder: Path, cache: Path
):
    test = load_cifar10(CIFAR10.data, "test")
    model, identity = cifar_classifier(CIFAR10.data, test, cache)
    assert identity["classifier_accuracy"] > 0.6
    assert not model.training
    assert cifar_classifier(CIFAR10.data, test, cache)[1] == identity
    assert len(list(cache.glob("*.safetensors"))) == 1
    write(folder / "cifar10", "train", 200, 2)
    assert (
        cifar_classifier(CIFAR10.data, test, cache)[1]["classifier_sha256"]
        != identity["classifier_sha256"]
    )


def test_scores_are_of_quantised_images_against_the_test_images(folder: Path, cache: Path):
    training_stage.run_training(SPEC.train, RunContext(folder / "run"))
    values = evaluate.run_evaluation(
        SPEC, cache, RunContext(folder / "run", Resources(sample_batch=3))
    )
    assert {name for name in values if "fid" in name} == set()
    assert {
        *SCORES,
        *(f"{name}_se" for name in SCORES),
    } <= set(values)
    test = load_cifar10(CIFAR10.data, "test")
    classifier, identity = cifar_classifier(CIFAR10.data, test, cache)
    network = train.load_ema(SPEC.train, folder / "run", torch.device("cpu"))
    x = torch.cat([x for x, _ in generate_images(SPEC, network, torch.device("cpu"), 7)])
    real, fake = (
        extract(classifier, part)[0]
        for part in (test.take(torch.arange(50))[0], from_uint8(to_uint8(x)))
    )
    sides = [Moments(64), Moments(64)]
    for side, rows in zip(sides, (fake, real), strict=True):
        side.update(rows)
    assert values["fd_cifar_classifier"] == pytest.approx(frechet(*sides), rel=1e-4)
    assert values["classifier_accuracy"] == identity["classifier_accuracy"]
    assert values["nfe"] == 2
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
        require_features(replace(SPEC, num=CIFAR10_SMALL.num))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="CIFAR-10's test images are not in data/cifar10"):
        load_cifar10(CIFAR10.data, "test")
