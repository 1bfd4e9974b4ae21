"""Scores of synthetic features: each against its own routine, their warnings, and paired models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from scipy.special import rel_entr

from experiments.engine.reporting.verdict import Verdict
from experiments.engine.scoring import reference as scoring_reference
from experiments.engine.scoring import scores
from experiments.engine.scoring.frechet import frechet, frechet_se
from experiments.engine.scoring.measure import Measured, measure
from experiments.engine.scoring.metrics import inception_score, kid, mind
from experiments.engine.scoring.moments import Moments, moments_of
from experiments.engine.scoring.neighbours import (
    neighbour_shares,
    precision_recall,
    precision_recall_half,
)
from experiments.engine.scoring.reference import Reference, read_reference, reference_of
from experiments.engine.scoring.scores import paired, score
from tests.support.extractors import Grey

DIM = 6


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch):
    """Features are DIM wide, and few directions of MIND suffice."""
    monkeypatch.setattr(scores, "POOL", DIM)
    monkeypatch.setattr(scores, "mind", few_directions)


def few_directions(**arguments) -> float:
    return mind(**arguments, directions=50)


def drawn(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Measured:
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(5) / 3, n)
    pool, spatial = (
        (shift + scale * draw.standard_normal((n, DIM))).astype(np.float32) for _ in range(2)
    )
    return Measured(pool, spatial, probabilities)


def as_reference(sample: Measured) -> Reference:
    moments = {"pool": moments_of(sample.pool), "spatial": moments_of(sample.spatial)}
    return Reference(moments, sample.pool, {})


def moments(x: ndarray) -> Moments:
    total = Moments(x.shape[1])
    total.update(x)
    return total


def test_every_score_equals_its_own_routine():
    sample, real = drawn(900, 1, 0.2, 1.1), drawn(500, 2)
    values = score(sample, as_reference(real), half=True)
    assert (values["num"], values["num_reference"], values["mind_rows"]) == (900, 500, 500)
    assert values["warnings"] == ["KID is over subsets of 500, not 1000"]

    # Distances.
    fake_moments, real_moments = moments(sample.pool), moments(real.pool)
    spatial = frechet(moments(sample.spatial), moments(real.spatial))
    error = frechet_se(sample.pool, fake_moments, real_moments)
    assert values["fid"] == pytest.approx(frechet(fake_moments, real_moments), rel=1e-9)
    assert values["sfid"] == pytest.approx(spatial, rel=1e-9)
    assert values["fid_se"] == pytest.approx(error, rel=1e-6)
    assert values["fid_corrected"] < values["fid"]
    assert abs(values["fid_corrected"] - values["fid"]) < 4 * values["fid_corrected_se"]

    # The inception score.
    p = sample.probabilities
    whole = np.exp(rel_entr(p, p.mean(0)).sum(1).mean())
    assert values["is"] == pytest.approx(whole, rel=1e-9)

    # Neighbours.
    rows = dict(samples=sample.pool, reference=real.pool)
    shares = neighbour_shares(**rows)
    half = precision_recall_half(**rows)
    assert (values["precision"], values["recall"]) == precision_recall(**rows)
    assert (values["precision_half"], values["recall_half"]) == half
    assert (values["density"], values["density_se"]) == (shares.density, shares.density_se)
    assert values["coverage"] == shares.coverage
    binomial = np.sqrt(shares.coverage * (1 - shares.coverage) / 500)
    assert values["coverage_se"] == pytest.approx(binomial)

    # Kernel and Monge distance.
    assert values["kid"] == kid(**rows, size=500)[0]
    assert values["mind"] == few_directions(**rows)


def test_row_order_changes_no_score_but_the_ordered_inception_score():
    sample, real = drawn(600, 3), as_reference(drawn(300, 4))
    order = np.random.default_rng(5).permutation(600)
    shuffled = Measured(sample.pool[order], sample.spatial[order], sample.probabilities[order])
    first, second = score(sample, real), score(shuffled, real)
    for name in ("fid", "sfid", "precision", "recall", "density", "coverage", "is"):
        assert second[name] == pytest.approx(first[name], rel=1e-6), name


def test_statistics_alone_give_distances_and_no_neighbours():
    real = drawn(500, 7)
    values = score(drawn(900, 8), Reference({"pool": moments_of(real.pool)}, None, {}))
    assert "fid" in values
    assert not {"sfid", "precision", "recall", "kid"} & set(values)


def test_a_reference_of_half_the_statistics_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file without spatial statistics takes those of its images, or there is no sFID."""
    real = drawn(40, 7)
    known = moments_of(real.pool)
    path = tmp_path / "half.npz"
    np.savez(path, mu=known.mean, sigma=known.cov)
    monkeypatch.setattr(scoring_reference, "statistics", lambda path: {"pool": known})

    # With images.
    lacking = "half.npz holds no statistics (mu_s, sigma_s)"
    reference = reference_of(path, real)
    assert reference.warnings == [f"{lacking}: distances by them are to those of its 40 images"]
    assert reference.identity["statistics"] is False
    assert {"pool", "spatial"} == set(reference.moments)
    assert np.array_equal(reference.moments["pool"].cov, known.cov)

    # Without images.
    assert reference_of(path, None).warnings == [f"{lacking}: there is no sFID"]


def order_warnings(values: dict) -> list[str]:
    return [text for text in values["warnings"] if "ordered" in text]


def test_class_order_is_warned_of_and_shuffled_files_are_not(monkeypatch: pytest.MonkeyPatch):
    labels = np.sort(np.arange(800) % 8)
    order = np.random.default_rng(0).permutation(800)
    real = as_reference(drawn(300, 10))
    ordered = drawn(800, 9)
    ordered.probabilities = np.eye(8)[labels] * 0.9 + 0.1 / 8
    shuffled = Measured(ordered.pool, ordered.spatial, ordered.probabilities[order])

    # In one block, the order changes the error and not the value.
    values, mixed = score(ordered, real, labels), score(shuffled, real, labels[order])
    (warning,) = order_warnings(values)
    assert "ordered by class" in warning
    assert "IS of 800 is one block" in warning
    assert values["is"] == pytest.approx(mixed["is"], rel=1e-9)
    assert values["is_se"] > 3 * mixed["is_se"]
    assert not order_warnings(mixed)

    # In several blocks, it changes the value.
    monkeypatch.setattr(scores, "IS_BLOCK", 100)
    monkeypatch.setattr(scores, "inception_score", lambda p: inception_score(p, block=100))
    (warning,) = order_warnings(score(ordered, real, labels))
    assert "IS over blocks of 100 in file order is far too low" in warning

    # Without labels, or with labels of another order, the shuffled score tells.
    unlabelled = score(ordered, real)
    assert unlabelled["is"] < 0.5 * unlabelled["is_shuffled"]
    assert "samples are ordered;" in order_warnings(unlabelled)[0]
    mislabelled = score(ordered, real, np.random.default_rng(1).permutation(labels))
    assert "samples are ordered;" in order_warnings(mislabelled)[0]


@pytest.mark.parametrize(
    "n, words, has_error",
    [
        (5, "fewer than the 6 feature dimensions", False),
        (20, "no sampling error", False),
        (24, "", True),
    ],
)
def test_few_samples_are_warned_of(n: int, words: str, has_error: bool):
    values = score(drawn(n, 11), as_reference(drawn(300, 12)))
    assert any(words in text for text in values["warnings"])
    assert np.isfinite(values["fid_se"]) == has_error
    assert np.isfinite(values["fid_corrected"]) == (n >= 2 * DIM)


def test_balanced_labels_lower_the_error():
    labels = np.arange(500) % 10
    centres = 2 * np.random.default_rng(13).standard_normal((10, DIM))
    sample = drawn(500, 14)
    sample.pool = (sample.pool + centres[labels]).astype(np.float32)
    real = as_reference(drawn(300, 15))
    balanced = score(sample, real, labels, balanced=True)
    assert balanced["fid_se"] < 0.8 * score(sample, real, labels)["fid_se"]


def test_common_seeds_resolve_what_independent_ones_do_not():
    """Monte Carlo: the paired error is the spread of the difference over redraws of the rows."""
    real, labels = as_reference(drawn(2000, 16)), np.zeros(800, int)
    comparisons = []
    for seed in range(60):
        a = drawn(800, 100 + seed, 0.1, 1.1)
        b = Measured(a.pool * np.float32(1.01) + np.float32(0.002), a.spatial, a.probabilities)
        comparisons.append(paired(a, b, real, labels, False))
    differences = [comparison.value for comparison in comparisons]
    errors = [comparison.error for comparison in comparisons]
    assert np.mean(errors) == pytest.approx(np.std(differences, ddof=1), rel=0.3)
    assert errors[0] < 0.2 * comparisons[0].error_unpaired
    assert {comparison.verdict for comparison in comparisons} == {Verdict.RESOLVED}


def test_a_model_does_not_differ_from_itself_and_pairs_have_one_size():
    real, a = as_reference(drawn(300, 16)), drawn(200, 100)
    assert paired(a, a, real, None, False).verdict is Verdict.NOT_RESOLVED
    with pytest.raises(ValueError, match="as many"):
        paired(a, drawn(10, 0), real, None, False)


def images(n: int, seed: int) -> ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_a_reference_without_statistics_is_taken_from_its_images_and_said(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=images(40, 0))
    reference = read_reference(Grey(), tmp_path / "a.npz")
    measured = measure(Grey(), iter([images(40, 0)]))
    values = score(measured, reference)
    assert reference.identity["num_images"] == 40
    assert any("no statistics" in text for text in reference.warnings)
    assert any("no statistics" in text for text in values["warnings"])
    np.testing.assert_allclose(reference.moments["pool"].mean, measured.pool.mean(0), rtol=1e-5)
    assert values["fid"] == pytest.approx(0, abs=1e-6)


def test_another_size_than_the_references_is_warned_of(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=images(40, 0))
    reference = read_reference(Grey(), tmp_path / "a.npz")
    small = measure(Grey(), iter([images(40, 1)[:, :3]]))
    same = measure(Grey(), iter([images(40, 1)]))
    assert (small.size, reference.size) == ((3, 4), (4, 4))
    words = "the samples have 3 x 4 pixels and the reference's images 4 x 4"
    assert any(words in text for text in score(small, reference)["warnings"])
    assert not any("pixels" in text for text in score(same, reference)["warnings"])


def test_a_reference_with_nothing_in_it_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_1=np.arange(3))
    with pytest.raises(ValueError, match="neither images"):
        read_reference(Grey(), tmp_path / "a.npz")


def test_images_in_the_wrong_range_and_no_images_are_refused():
    with pytest.raises(ValueError, match="0, 1 are all the levels"):
        measure(Grey(), iter([images(9, 0) // 255]))
    with pytest.raises(ValueError, match="no images"):
        measure(Grey(), iter([]))
