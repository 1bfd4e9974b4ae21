"""What scoring rests on: noise by image, a reproducible classifier, and finite scores."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.declared.protocols import DIGITS
from experiments.engine.data.sets import load
from experiments.engine.judges import classifiers as features
from experiments.engine.judges.classifiers import digits_classifier
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.runtime import preemption
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.pieces import compute_pieces
from experiments.engine.runtime.preemption import Preempted, StopRequest
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images, image_labels, image_seeds
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import Backbone, Evaluate, Recipe, Sampler, Train
from experiments.engine.training import stage as training_stage
from experiments.engine.training.networks import build

CPU = torch.device("cpu")
TINY = Backbone(
    "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
)
SPEC = Evaluate(
    Train(TINY, DIGITS.data, Recipe(steps=5, batch=16, lr=1e-3)),
    Sampler(num_steps=4, channels=None),
    260,
    "digits",
    "balanced",
)


def test_the_noise_of_an_image_is_the_same_to_the_bit_in_every_batch():
    seeds = image_seeds(0, 7)
    whole = ImageNoise(seeds, (1, 8, 8))
    parts = [ImageNoise(seeds[start : start + 3], (1, 8, 8)) for start in (0, 3, 6)]
    for _ in range(5):
        assert torch.equal(whole.draw(), torch.cat([part.draw() for part in parts]))


def test_a_job_that_is_asked_to_stop_stops_within_a_piece_and_keeps_the_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request at the fourth call of the third piece ends the job there."""
    counted = CountingModel(lambda x, t, y: x)

    def compute(piece: int) -> dict[str, np.ndarray]:
        for call in range(5):
            request = StopRequest.STOP if (piece, call) == (2, 3) else StopRequest.NONE
            monkeypatch.setattr(preemption.SIGNALS, "request", request)
            counted(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        return {"piece": np.array(piece)}

    # Two whole pieces are on disk, and three calls of the third one were made.
    with pytest.raises(Preempted, match="SIGTERM"):
        list(compute_pieces(RunContext(tmp_path), tmp_path, 4, compute))
    assert counted.evaluated == 5 + 5 + 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000000.npz", "000001.npz"]


def test_images_come_in_order_with_their_labels():
    spec = replace(SPEC, num=10, labels="random")
    model = build(TINY, 0, CPU).eval()
    parts = list(generate_images(spec, model, CPU, 4))
    assert [len(x) for x, _ in parts] == [4, 4, 2] and {x.dtype for x, _ in parts} == {
        torch.float32
    }
    assert torch.equal(torch.cat([y for _, y in parts]), image_labels("random", 10, 10, 0))


def test_sampling_neither_reads_nor_moves_the_global_generator():
    spec, model = replace(SPEC, num=3), build(TINY, 0, CPU).eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = next(generate_images(spec, model, CPU, 3))[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(next(generate_images(spec, model, CPU, 3))[0], first)


def test_the_classifier_has_the_same_bits_whatever_surrounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither the number of threads nor the global generator changes its weights."""
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=20))
    data = load(DIGITS.data)
    threads = torch.get_num_threads()

    # Train it twice, and leave the threads as they were.
    digests = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            _, identity = digits_classifier(data, tmp_path / str(number))
            digests.append(identity["classifier_sha256"])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def test_a_cached_classifier_is_read_and_another_recipe_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=5))
    data, trained = load(DIGITS.data), []
    train_once = features._train
    monkeypatch.setattr(
        features, "_train", lambda *lesson: trained.append(0) or train_once(*lesson)
    )
    first, again = (digits_classifier(data, tmp_path) for _ in range(2))
    assert first[1] == again[1] and len(trained) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True)
    )

    # What a record must say of the stored weights comes with the classifier.
    assert "classifier_warning" not in first[1]
    (path,) = tmp_path.glob("digits-*.safetensors")
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    warning = digits_classifier(data, tmp_path)[1]["classifier_warning"]
    assert "8 of 8 tensors are stored in fp16: they are rounded" in str(warning)
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=6))
    digits_classifier(data, tmp_path)
    assert len(trained) == 2


def test_scores_are_finite_shares_are_shares_and_every_one_has_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A record of an evaluation holds five scores with errors, and what they were measured by."""
    monkeypatch.setattr(features, "DIGITS", replace(features.DIGITS, steps=40))
    training_stage.run_training(SPEC.train, RunContext(tmp_path / "run"))
    context = RunContext(tmp_path / "run", Resources(sample_batch=100))
    values = evaluate.run_evaluation(SPEC, tmp_path / "cache", context)

    # The manifest names the reference by its content.
    manifest = values.pop("manifest")
    data = load(DIGITS.data)
    content = data.images.tobytes() + data.labels.tobytes()
    assert len(manifest["hash"]) == 16
    assert manifest["measure"]["labels"]["order"] == "as drawn"
    assert manifest["measure"]["reference"]["sha256"] == hashlib.sha256(content).hexdigest()

    # So short a training has hardly moved its average.
    (warning,) = values.pop("warnings")
    assert "of the average are still the weights that the training began with" in warning

    # Every score has an error, and beside them stands how they were made.
    scores = ("fd_digits", "is_digits", "precision_digits", "recall_digits", "agreement")
    made_by = {"num", "nfe", "classifier_accuracy", "classifier_sha256", "initial_share"}
    assert set(values) == {*made_by, *scores, *(f"{name}_se" for name in scores)}
    assert (values["num"], values["nfe"]) == (260, 4)

    # All numbers lie in their ranges.
    values.pop("classifier_sha256")
    assert all(math.isfinite(value) for value in values.values())
    assert all(value >= 0 for value in values.values())
    assert all(values[name] <= 1 for name in scores[2:])
    assert 1 <= values["is_digits"] <= 10
