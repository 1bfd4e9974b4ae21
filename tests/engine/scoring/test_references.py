"""A reference that is not ADM's is warned of, and one that cannot be read ends a run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.declared.protocols import PROTOCOLS
from experiments.engine.data.image_files import file_sha256
from experiments.engine.runtime.context import RunContext
from experiments.engine.scoring import reference, stage
from experiments.engine.scoring.measure import measure
from experiments.engine.scoring.scores import score
from experiments.engine.specs.spec import Backbone, Checkpoint, Evaluate, Sampler
from tests.support.extractors import Grey
from tests.support.score_scripts import IMAGES, NARROW_LAYERS, use_grey_extractor

DATA = PROTOCOLS["imagenet256"].data
ALL = ("mu", "sigma", "mu_s", "sigma_s")


@pytest.mark.parametrize(
    "arrays, complaint",
    [
        (dict(arr_0=IMAGES / 255), "float64"),
        (dict(arr_1=np.arange(3)), "neither images"),
        (dict(arr_0=IMAGES, mu=np.zeros(2048)), "only one of mu"),
    ],
)
def test_a_reference_that_cannot_be_read_is_known_before_anything_is_drawn(
    arrays: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An evaluation names what is wrong with its reference, and generates no image."""
    use_grey_extractor(monkeypatch)
    np.savez(tmp_path / "other.npz", **arrays)
    generated: list[Any] = []
    monkeypatch.setattr(stage, "require_features", lambda spec: None)
    monkeypatch.setattr(stage, "reference_path", lambda data: tmp_path / "other.npz")
    monkeypatch.setattr(stage, "generate_samples", lambda *arguments: generated.append(arguments))

    # The weights would be those of a published checkpoint.
    checkpoint = Checkpoint(Backbone("dico_s"), DATA, "0" * 64)
    spec = Evaluate(checkpoint, Sampler(), 50_000, "inception")
    with pytest.raises(ValueError, match=f"other.npz: .*{complaint}"):
        stage.run_evaluation(spec, tmp_path, RunContext(tmp_path))
    assert not generated


@pytest.mark.parametrize(
    "held, num, is_warned",
    [
        (ALL, 30, False),
        (ALL, 29, True),
        (("mu", "sigma"), 30, True),
        ((), 30, True),
    ],
    ids=["as ADM's", "too few images", "one layer", "no statistics"],
)
def test_a_reference_that_is_not_adms_is_warned_of_in_the_record(
    held: tuple[str, ...],
    num: int,
    is_warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """ADM's holds the statistics of both layers, and so many images."""
    use_grey_extractor(monkeypatch)
    monkeypatch.setattr(reference, "LAYERS", NARROW_LAYERS)
    monkeypatch.setattr(stage, "ADM_REFERENCE", 30)

    # A file with some of the statistics and so many images.
    statistics = dict(mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(5), sigma_s=np.eye(5))
    path = tmp_path / "other.npz"
    np.savez(path, arr_0=IMAGES[:num], **{name: statistics[name] for name in held})
    monkeypatch.setattr(stage, "reference_path", lambda data: path)

    # The reference says what it is, and the scores say what it is not.
    context = RunContext(tmp_path)
    measured = stage._measure_reference(DATA, Grey(), tmp_path / "parts", context)
    assert measured.identity["num_images"] == num
    assert measured.identity["sha256"] == file_sha256(path)
    warnings = score(measure(Grey(), iter([IMAGES])), measured)["warnings"]
    warning = "other.npz is not ADM's reference, which holds statistics and 30 images"
    assert any(warning in text for text in warnings) == is_warned
