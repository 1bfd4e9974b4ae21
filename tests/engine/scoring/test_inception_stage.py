"""The Evaluate stage with Inception's scores, from weights in a file to the values of a record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.engine.data.sets import ImageSet, load
from experiments.engine.machine.cores import find_cores
from experiments.engine.records.comparison import incomparable
from experiments.engine.records.manifest import has_unknown_features
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling import samples
from experiments.engine.scoring import inception
from experiments.engine.scoring import stage as evaluation_stage
from experiments.engine.specs.spec import Data, Evaluate, Recipe, Sampler, Train
from experiments.engine.training import stage as training_stage
from tests.support.sampling import TINY

PIXELS = Data("pixels", size=8, channels=3, num_classes=10)


@pytest.mark.slow
def test_the_inception_stage_runs_from_weights_to_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Untrained Inception in a file, pixels of three channels, training images as reference."""
    pytest.importorskip("torch_fidelity")

    # Nine images, and weights that are not the published ones.
    pixels = np.random.default_rng(0).uniform(-1, 1, (9, 3, 8, 8)).astype(np.float32)
    images = ImageSet(pixels, np.arange(9), PIXELS)
    for module in (training_stage, evaluation_stage):
        monkeypatch.setattr(module, "load", lambda data: images if data == PIXELS else load(data))
    torch.save(inception.build_network().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "weights.pth"))

    # A training of two steps.
    train = Train(TINY.but(in_channels=3), PIXELS, Recipe(steps=2, batch=4))
    spec = Evaluate(train, Sampler(num_steps=2), 11, "inception", "balanced")
    run = tmp_path / "runs" / "a"
    training_stage.run_training(train, RunContext(run))
    monkeypatch.setattr(samples, "CHUNK", 5)
    steps: list[int] = []
    resources = Resources(sample_batch=4)
    context = RunContext(run, resources, report=lambda progress: steps.append(progress.step))
    values = evaluation_stage.run_evaluation(spec, tmp_path, context)
    assert steps == [5, 10, 11]

    # Every score is a number; errors and warnings tell that eleven images are few.
    assert values["num"] == 11
    assert values["num_reference"] == 9
    for name in ("fid", "sfid", "is", "precision", "recall", "kid"):
        assert np.isfinite(values[name]), name
    assert values["fid"] > 0
    assert np.isnan(values["fid_se"])
    assert any("fewer than the 2048" in text for text in values["warnings"])

    # The manifest names what decided the scores, and survives a record.
    measure = values["manifest"]["measure"]
    assert measure["extractor"]["sha256"]
    assert measure["reference"]["num_images"] == 9
    assert measure["quantiser"] == samples.QUANTISER
    assert json.loads(json.dumps(values["manifest"])) == values["manifest"]

    # The scores are of unknown features, and compare with none of the published.
    assert has_unknown_features(values)
    assert any("unknown Inception weights" in text for text in values["warnings"])
    published = json.loads(json.dumps(values["manifest"]))
    published["measure"]["extractor"]["name"] = inception.PUBLISHED
    assert incomparable(values["manifest"], published) == ["measure.extractor.name"]

    # The decision on cores stands in the part that does not enter the hash.
    assert values["manifest"]["run"]["cores"]["number"] == find_cores().number
    assert "cores" not in values["manifest"]["measure"]
