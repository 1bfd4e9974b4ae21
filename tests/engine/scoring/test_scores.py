"""Scores of synthetic features against independent computations, their warnings, and models compared on common seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from scipy.special import rel_entr

from experiments.engine.scoring import metrics, scores
from experiments.engine.scoring import reference as scoring_reference
from experiments.engine.scoring.frechet import (
    frechet,
    frechet_influence,
    frechet_se,
    influence_se,
)
from experiments.engine.scoring.measure import Measured, measure
from experiments.engine.scoring.metrics import kid, mind
from experiments.engine.scoring.moments import Moments, moments_of, split_into_blocks
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
    monkeypatch.setattr(scores, "POOL", DIM)


def drawn(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Measured:
    draw = np.random.default_rng(seed)
    p = draw.dirichlet(np.ones(5) / 3, n)
    return Measured(
        *((shift + scale * draw.standard_normal((n, DIM))).astype(np.float32) for _ in range(2)), p
    )


def against(sample: Measured) -> Reference:
    return Reference(
        {layer: moments_of(getattr(sample, layer)) for layer in ("pool", "spatial")},
        sample.pool,
        {},
    )


def moments(x: ndarray) -> Moments:
    total = Moments(x.shape[1])
    total.update(x)
    return total


def test_blocks_merge_to_the_whole_and_share_every_class():
    x, labels = (
        np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32),
        np.sort(np.arange(1000) % 4),
    )
    whole = moments_of(x)
    np.testing.assert_allclose(whole.cov, np.cov(x.astype(float), rowvar=False), rtol=1e-10)
    parts = split_into_blocks(
        np.column_stack([labels == c for c in range(4)]).astype(float), labels
    )
    assert [part.n for part in parts] == [100] * 10
    np.testing.assert_allclose([part.mean for part in parts], 0.25)


def test_every_score_equals_its_own_routine():
    sample, real = drawn(900, 1, 0.2, 1.1), drawn(500, 2)
    values = score(sample, against(real), half=True)
    assert (
        values["num"] == 900
        and values["num_reference"] == 500
        and values["warnings"] == ["KID is over subsets of 500, not 1000"]
    )
    assert values["fid"] == pytest.approx(
        frechet(moments(sample.pool), moments(real.pool)), rel=1e-9
    )
    assert values["sfid"] == pytest.approx(
        frechet(moments(sample.spatial), moments(real.spatial)), rel=1e-9
    )
    assert values["fid_se"] == pytest.approx(
        frechet_se(sample.pool, moments(sample.pool), moments(real.pool)), rel=1e-6
    )
    assert (
        values["fid_corrected"] < values["fid"]
        and abs(values["fid_corrected"] - values["fid"]) < 4 * values["fid_corrected_se"]
    )
    p = sample.probabilities
    assert values["is"] == pytest.approx(np.exp(rel_entr(p, p.mean(0)).sum(1).mean()), rel=1e-9)
    assert (values["precision"], values["recall"]) == precision_recall(
        reference=real.pool, samples=sample.pool
    )
    assert (values["precision_half"], values["recall_half"]) == precision_recall_half(
        reference=real.pool, samples=sample.pool
    )
    assert (
        values["mind"] == mind(samples=sample.pool, reference=real.pool)
        and values["mind_rows"] == 500
    )
    shares = neighbour_shares(reference=real.pool, samples=sample.pool)
    assert (values["density"], values["density_se"], values["coverage"]) == (
        shares.density,
        shares.density_se,
        shares.coverage,
    )
    assert values["coverage_se"] == pytest.approx(
        np.sqrt(shares.coverage * (1 - shares.coverage) / 500)
    )
    assert values["kid"] == kid(samples=sample.pool, reference=real.pool, size=500)[0]


def test_row_order_changes_no_score_but_the_ordered_inception_score():
    sample, real, order = (
        drawn(600, 3),
        against(drawn(300, 4)),
        np.random.default_rng(5).permutation(600),
    )
    first = score(sample, real)
    second = score(
        Measured(sample.pool[order], sample.spatial[order], sample.probabilities[order]), real
    )
    for name in ("fid", "sfid", "precision", "recall", "density", "coverage", "is"):
        assert second[name] == pytest.approx(first[name], rel=1e-6)


def test_a_set_twice_keeps_its_mean_and_shrinks_its_covariance_as_it_must():
    x = drawn(50, 6).pool
    once, twice = moments_of(x), moments_of(np.concatenate([x, x]))
    np.testing.assert_allclose(twice.mean, once.mean, atol=1e-12)
    np.testing.assert_allclose(twice.cov, once.cov * 2 * 49 / 99, rtol=1e-9)


def test_statistics_alone_give_distances_and_no_neighbours():
    real = drawn(500, 7)
    values = score(drawn(900, 8), Reference({"pool": moments_of(real.pool)}, None, {}))
    assert "fid" in values and not {"sfid", "precision", "recall", "kid"} & set(values)


def test_a_reference_of_half_the_statistics_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = drawn(40, 7)
    moments = moments_of(real.pool)
    (tmp_path / "half.npz").write_bytes(b"")
    monkeypatch.setattr(scoring_reference, "statistics", lambda path: {"pool": moments})
    reference = reference_of(tmp_path / "half.npz", real)
    assert reference.warnings == [
        "half.npz holds no statistics (mu_s, sigma_s): distances by them are to those of its 40 images"
    ]
    assert (
        reference.identity["statistics"] is False
        and {"pool", "spatial"} == set(reference.moments)
        and np.array_equal(reference.moments["pool"].cov, moments.cov)
    )
    assert reference_of(tmp_path / "half.npz", None).warnings == [
        "half.npz holds no statistics (mu_s, sigma_s): there is no sFID"
    ]


def test_class_order_is_warned_of_and_shuffled_files_are_not(monkeypatch: pytest.MonkeyPatch):
    labels = np.sort(np.arange(800) % 8)
    ordered = drawn(800, 9)
    ordered.probabilities = np.eye(8)[labels] * 0.9 + 0.1 / 8
    real, order = against(drawn(300, 10)), np.random.default_rng(0).permutation(800)
    shuffled = Measured(ordered.pool, ordered.spatial, ordered.probabilities[order])
    values, mixed = score(ordered, real, labels), score(shuffled, real, labels[order])
    (warning,) = [text for text in values["warnings"] if "ordered by class" in text]
    assert (
        "IS of 800 is one block" in warning
        and values["is"] == pytest.approx(mixed["is"], rel=1e-9)
        and values["is_se"] > 3 * mixed["is_se"]
    )  # what it says
    assert not any("order" in text for text in score(shuffled, real, labels[order])["warnings"])
    by_block = metrics.inception_score
    monkeypatch.setattr(scores, "IS_BLOCK", 100)
    monkeypatch.setattr(scores, "inception_score", lambda p: by_block(p, block=100))
    (warning,) = [
        text for text in score(ordered, real, labels)["warnings"] if "ordered by class" in text
    ]
    assert "IS over blocks of 100 in file order is far too low" in warning
    assert any(
        "samples are ordered" in text
        for text in score(ordered, real, np.random.default_rng(1).permutation(labels))["warnings"]
    )  # labels of another order
    unlabelled = score(ordered, real)
    assert unlabelled["is"] < 0.5 * unlabelled["is_shuffled"] and any(
        "samples are ordered" in text for text in unlabelled["warnings"]
    )


@pytest.mark.parametrize(
    "n, words, error",
    [
        (5, "fewer than the 6 feature dimensions", False),
        (20, "no sampling error", False),
        (24, "", True),
    ],
)
def test_few_samples_are_warned_of(n: int, words: str, error: bool):
    values = score(drawn(n, 11), against(drawn(300, 12)))
    assert (
        any(words in text for text in values["warnings"]) and np.isfinite(values["fid_se"]) == error
    )
    assert np.isfinite(values["fid_corrected"]) == (n >= 2 * DIM)


def test_balanced_labels_lower_the_error():
    labels = np.arange(1000) % 10
    centres = 2 * np.random.default_rng(13).standard_normal((10, DIM))
    sample = drawn(1000, 14)
    sample.pool = (sample.pool + centres[labels]).astype(np.float32)
    real = against(drawn(500, 15))
    assert (
        score(sample, real, labels, balanced=True)["fid_se"]
        < 0.8 * score(sample, real, labels)["fid_se"]
    )


def test_common_seeds_resolve_what_independent_ones_do_not():
    """Monte Carlo: the paired error is the spread of the difference over redraws of the common rows."""
    real, labels, found = against(drawn(2000, 16)), np.zeros(800, int), []
    for seed in range(60):
        a = drawn(800, 100 + seed, 0.1, 1.1)
        b = Measured(a.pool * np.float32(1.01) + np.float32(0.002), a.spatial, a.probabilities)
        found.append(paired(a, b, real, labels, False))
    spread = np.std([one["fid_difference"] for one in found], ddof=1)
    assert np.mean([one["fid_difference_se"] for one in found]) == pytest.approx(spread, rel=0.3)
    assert found[0]["fid_difference_se"] < 0.2 * found[0]["fid_difference_se_unpaired"]
    assert {one["verdict"] for one in found} == {"resolved"}
    assert paired(a, a, real, labels, False)["verdict"] == "not resolved"
    with pytest.raises(ValueError, match="as many"):
        paired(a, drawn(10, 0), real, None, False)


def test_the_error_of_the_influences_is_the_error_of_the_distance():
    a, b = moments(drawn(200, 17).pool), moments(drawn(300, 18).pool)
    assert influence_se(frechet_influence(drawn(200, 17).pool, a, b)) == frechet_se(
        drawn(200, 17).pool, a, b
    )


def test_kernel_distance_equals_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = (
        np.random.default_rng(19).standard_normal((300, 17)) + 0.3,
        np.random.default_rng(20).standard_normal((250, 17)),
    )
    theirs = kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=7,
        kid_subset_size=100,
        rng_seed=2020,
        verbose=False,
    )
    mean, spread = kid(samples=x, reference=y, subsets=7, size=100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_the_shuffled_inception_score_equals_torch_fidelitys():
    """Its ten parts are blocks of a tenth, as ADM's of 5000 are at 50,000 images."""
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * np.random.default_rng(22).standard_normal((730, 9))
    theirs = isc_features_to_metric(
        torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020
    )
    p = torch.from_numpy(logits).softmax(1).numpy()[np.random.RandomState(2020).permutation(730)]
    assert metrics.inception_score(p, block=73)[0] == pytest.approx(
        theirs["inception_score_mean"], rel=1e-9
    )


def test_the_kernel_distance_of_whole_sets_does_not_depend_on_their_order():
    x, y = np.random.default_rng(23).standard_normal((2, 120, 7))
    assert kid(samples=x, reference=y, subsets=1, size=120)[0] == pytest.approx(
        kid(samples=x[::-1], reference=np.roll(y, 5, 0), subsets=1, size=120)[0], rel=1e-9
    )


def half_by_hand(reference: ndarray, samples: ndarray, k: int) -> tuple[float, float]:
    """ADM's arithmetic in numpy, without blocks."""

    def distances(a: ndarray, b: ndarray) -> ndarray:
        u, v = a.astype(np.float16), b.astype(np.float16)
        uu, vv = ((w * w).astype(np.float32).sum(1).astype(np.float16) for w in (u, v))
        product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        near = np.maximum(uu[:, None] - np.float16(2) * product + vv, np.float16(0)).astype(
            np.float32
        )
        return (
            near
            if np.isfinite(near).all()
            else np.square(a[:, None].astype(np.float32) - b.astype(np.float32)).sum(2)
        )

    with np.errstate(over="ignore", invalid="ignore"):
        reach = [np.sort(distances(x, x), 1)[:, k] for x in (reference, samples)]
        cross = distances(reference, samples)
    return (cross <= reach[0][:, None]).any(0).mean(), (cross <= reach[1]).any(1).mean()


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_half_precision_rounds_upward_and_falls_back_where_it_overflows(size: float):
    rng = np.random.default_rng(21)
    reference, samples = (size * np.abs(rng.standard_normal((n, 131))) for n in (211, 307))
    found = precision_recall_half(reference=reference, samples=samples)
    assert found == pytest.approx(half_by_hand(reference, samples, 3), abs=0.005)
    exact = precision_recall(reference=reference, samples=samples)
    assert all(ours >= true - 0.005 for ours, true in zip(found, exact, strict=True)) and (
        size > 1 or found != exact
    )
    if size > 1:
        assert found == pytest.approx(exact, abs=0.005)


def images(n: int, seed: int) -> ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_a_reference_without_statistics_is_taken_from_its_images_and_said(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=images(40, 0))
    reference = read_reference(Grey(), tmp_path / "a.npz")
    measured = measure(Grey(), iter([images(40, 0)]))
    assert (
        any("no statistics" in text for text in reference.warnings)
        and reference.identity["num_images"] == 40
    )
    np.testing.assert_allclose(reference.moments["pool"].mean, measured.pool.mean(0), rtol=1e-5)
    assert any("no statistics" in text for text in score(measured, reference)["warnings"])
    assert score(measured, reference)["fid"] == pytest.approx(0, abs=1e-6)


def test_another_size_than_the_references_is_warned_of(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_0=images(40, 0))
    small, reference = (
        measure(Grey(), iter([images(40, 1)[:, :3]])),
        read_reference(Grey(), tmp_path / "a.npz"),
    )
    assert (small.size, reference.size) == ((3, 4), (4, 4))
    assert any(
        "the samples have 3 x 4 pixels and the reference's images 4 x 4" in text
        for text in score(small, reference)["warnings"]
    )
    assert not any(
        "pixels" in text
        for text in score(measure(Grey(), iter([images(40, 1)])), reference)["warnings"]
    )


def test_a_reference_with_nothing_in_it_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", arr_1=np.arange(3))
    with pytest.raises(ValueError, match="neither images"):
        read_reference(Grey(), tmp_path / "a.npz")


def test_images_in_the_wrong_range_and_no_images_are_refused():
    with pytest.raises(ValueError, match="0, 1 are all the levels"):
        measure(Grey(), iter([images(9, 0) // 255]))
    with pytest.raises(ValueError, match="no images"):
        measure(Grey(), iter([]))
