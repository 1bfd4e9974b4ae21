"""Moments and the Fréchet distance against closed forms, other routines and Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy import ndarray
from scipy.linalg import sqrtm

from experiments.engine.scoring.frechet import (
    frechet,
    frechet_influence,
    frechet_jackknife,
    frechet_se,
    influence_se,
)
from experiments.engine.scoring.moments import Moments, moments_of, split_into_blocks


def moments(*batches: ndarray) -> Moments:
    total = Moments(batches[0].shape[1])
    for batch in batches:
        total.update(batch)
    return total


def gaussian(mean: ndarray, cov: ndarray, n: int = 1000) -> Moments:
    known = Moments(len(mean))
    known.n, known.mean, known.scatter = n, mean, cov * (n - 1)
    return known


def spd(rng: np.random.Generator, dim: int) -> ndarray:
    root = rng.standard_normal((dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


def test_moments_equal_one_shot_in_any_order():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1003, 13)) @ rng.standard_normal((13, 13)) + 1e3
    parts = np.split(x, [1, 8, 8, 300, 777])
    streams = [
        moments(x),
        moments(*parts),
        moments(*parts[::-1]),
        moments(*parts[:3]) + moments(*parts[3:]),
        moments(*parts[4:]) + moments(*parts[:4]),
        Moments(13) + moments(x) + Moments(13),
    ]
    for stream in streams:
        assert stream.n == len(x)
        np.testing.assert_allclose(stream.mean, x.mean(0), rtol=1e-10)
        np.testing.assert_allclose(
            stream.cov, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10 * x.var()
        )


def test_moments_accumulate_float32_in_float64_and_leave_operands_alone():
    x = (np.random.default_rng(1).standard_normal((5000, 6)) + 100).astype(np.float32)
    first, second = moments(x[:2000]), moments(x[2000:])
    before = first.n, first.mean.copy(), first.scatter.copy()
    np.testing.assert_allclose(
        (first + second).cov, np.cov(x.astype(float), rowvar=False), rtol=1e-10, atol=1e-10
    )
    second.update(x)
    assert (
        first.n == before[0]
        and (first.mean == before[1]).all()
        and (first.scatter == before[2]).all()
    )


def test_known_moments_return_their_covariance_unchanged():
    cov = spd(np.random.default_rng(20), 7) / 3
    known = Moments.known(np.arange(7.0), cov)
    assert np.array_equal(known.cov, cov)
    assert np.array_equal(known.mean, np.arange(7.0))


def test_blocks_merge_to_the_whole_and_share_every_class():
    x = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    np.testing.assert_allclose(moments_of(x).cov, np.cov(x.astype(float), rowvar=False), rtol=1e-10)

    # Rows that name their class: every block has all classes in equal shares.
    labels = np.sort(np.arange(1000) % 4)
    blocks = split_into_blocks(np.eye(4)[labels], labels)
    assert [block.n for block in blocks] == [100] * 10
    np.testing.assert_allclose([block.mean for block in blocks], 0.25)


def test_a_set_twice_keeps_its_mean_and_shrinks_its_covariance_as_it_must():
    x = np.random.default_rng(6).standard_normal((50, 6))
    once, twice = moments_of(x), moments_of(np.concatenate([x, x]))
    np.testing.assert_allclose(twice.mean, once.mean, atol=1e-12)
    np.testing.assert_allclose(twice.cov, once.cov * 2 * 49 / 99, rtol=1e-9)


def test_frechet_closed_forms():
    rng = np.random.default_rng(2)
    mean1, mean2, s1, s2 = *rng.standard_normal((2, 9)), *rng.uniform(0.2, 2, (2, 9))
    commuting = np.square(mean1 - mean2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    assert frechet(gaussian(mean1, np.diag(s1)), gaussian(mean2, np.diag(s2))) == pytest.approx(
        commuting, rel=1e-9
    )
    c1, c2 = spd(rng, 9), spd(rng, 9)
    general = np.square(mean1 - mean2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    a, b = gaussian(mean1, c1), gaussian(mean2, c2)
    assert frechet(a, b) == pytest.approx(general, rel=1e-9)
    assert frechet(b, a) == pytest.approx(general, rel=1e-9)


def test_frechet_of_a_set_with_itself_moved():
    x = np.random.default_rng(3).standard_normal((500, 20))
    shift = np.linspace(-1, 2, 20)
    assert abs(frechet(moments(x), moments(x))) < 1e-9
    assert frechet(moments(x), moments(x + shift)) == pytest.approx(shift @ shift, abs=1e-9)


def test_frechet_rank_deficient_equals_nuclear_norm():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((40, 150)), 1.5 * rng.standard_normal((60, 150)) + 0.3
    xc, yc = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(xc @ yc.T, "nuc") / np.sqrt(39 * 59)
    truth = (
        np.square(x.mean(0) - y.mean(0)).sum()
        + np.square(xc).sum() / 39
        + np.square(yc).sum() / 59
        - 2 * cross
    )
    assert (
        frechet(moments(x), moments(y))
        == pytest.approx(truth, abs=1e-9)
        == frechet(moments(y), moments(x))
    )
    known = Moments.known(y.mean(0), np.cov(y, rowvar=False))
    assert (known.cov == np.cov(y, rowvar=False)).all() and frechet(
        moments(x), known
    ) == pytest.approx(truth, abs=1e-6)


def test_frechet_of_features_like_inceptions():
    """Non-negative, mostly small, spectrum over ten decades; truth by scipy's matrix root."""
    rng = np.random.default_rng(16)
    decay = np.logspace(0, -5, 60)
    x, y = (
        np.maximum(
            rng.standard_normal((n, 60)) * decay @ spd(np.random.default_rng(17), 60) + shift, 0
        )
        for n, shift in ((900, 0.1), (700, 0.15))
    )
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    truth = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet(moments(x), moments(y)) == pytest.approx(truth, rel=1e-6)


def bumpy(rng: np.random.Generator, labels: ndarray) -> ndarray:
    """Class-dependent Gaussian rows (n, 6), whose distance from normal is far above its bias."""
    centres = np.random.default_rng(99).standard_normal((10, 6))
    return 0.5 + 0.8 * centres[labels] + 0.7 * rng.standard_normal((len(labels), 6))


@pytest.mark.parametrize("balanced", [False, True])
def test_influence_se_matches_monte_carlo(balanced: bool):
    rng, reference, n = np.random.default_rng(5), gaussian(np.zeros(6), np.eye(6)), 1000
    values, pooled, within = [], [], []
    for _ in range(300):
        labels = np.arange(n) % 10 if balanced else rng.integers(10, size=n)
        x = bumpy(rng, labels)
        sample = moments(x)
        values.append(frechet(sample, reference))
        pooled.append(frechet_se(x, sample, reference))
        within.append(frechet_se(x, sample, reference, labels))
    spread = np.std(values, ddof=1)
    if balanced:
        assert np.mean(within) == pytest.approx(spread, rel=0.3)
        assert np.mean(within) < 0.8 * np.mean(pooled)
    else:
        assert np.mean(pooled) == pytest.approx(spread, rel=0.25)


def test_influence_se_is_the_derivative():
    rng = np.random.default_rng(6)
    x, reference = rng.standard_normal((60, 4)) + 0.4, gaussian(rng.standard_normal(4), spd(rng, 4))
    sample, value, weight = moments(x), frechet(moments(x), reference), 1e-6

    def tilted(i: int) -> float:
        mean, cov = (1 - weight) * sample.mean + weight * x[i], (1 - weight) * sample.cov
        return frechet(
            gaussian(
                mean, cov + weight * (1 - weight) * np.outer(x[i] - sample.mean, x[i] - sample.mean)
            ),
            reference,
        )

    psi = np.array([(tilted(i) - value) / weight for i in range(60)])
    assert frechet_se(x, sample, reference) == pytest.approx(
        psi.std(ddof=1) / np.sqrt(60), rel=1e-4
    )
    shuffled = rng.permutation(60)
    assert frechet_se(x[shuffled], sample, reference) == pytest.approx(
        frechet_se(x, sample, reference), rel=1e-9
    )


def test_influence_se_with_flat_reference_directions_and_few_samples():
    rng = np.random.default_rng(7)
    x, flat = rng.standard_normal((400, 5)), np.diag([1.0, 2.0, 0.5, 0.0, 0.0])
    expected = np.square(x - x.mean(0)) @ (1 - np.sqrt(np.diag(flat))) - 2 * (
        x - x.mean(0)
    ) @ np.ones(5)
    se = frechet_se(x, moments(x), gaussian(x.mean(0) + 1, flat))
    assert se == pytest.approx(expected.std() / 20, rel=0.1)
    assert np.isnan(frechet_se(x[:19], moments(x[:19]), moments(x)))


def test_the_error_of_the_influences_is_the_error_of_the_distance():
    x, y = np.random.default_rng(17).standard_normal((2, 200, 6))
    sample, reference = moments(x), moments(y)
    psi = frechet_influence(x, sample, reference)
    assert influence_se(psi) == frechet_se(x, sample, reference)


def test_jackknife_removes_most_of_the_bias():
    rng, reference, dim = np.random.default_rng(8), gaussian(np.zeros(16), np.eye(16)), 16
    scale = np.linspace(0.6, 1.4, dim)
    truth = np.square(scale - 1).sum()
    raw, fixed, errors = [], [], []
    for _ in range(100):
        blocks = [moments(scale * rng.standard_normal((size, dim))) for size in (50,) * 9 + (25,)]
        value, error = frechet_jackknife(blocks, reference)
        raw.append(frechet(sum(blocks, Moments(dim)), reference))
        fixed.append(value)
        errors.append(error)
    assert np.mean(raw) - truth > 0.1
    assert abs(np.mean(fixed) - truth) < 0.15 * (np.mean(raw) - truth)
    assert np.mean(errors) == pytest.approx(np.std(fixed, ddof=1), rel=0.25)


def test_jackknife_of_equal_blocks_is_the_textbook_formula():
    rng = np.random.default_rng(15)
    blocks, reference = (
        [moments(rng.standard_normal((20, 3))) for _ in range(4)],
        gaussian(np.ones(3), np.eye(3)),
    )
    left = np.array(
        [frechet(sum(blocks[:j] + blocks[j + 1 :], Moments(3)), reference) for j in range(4)]
    )
    value, error = frechet_jackknife(blocks, reference)
    assert value == pytest.approx(
        4 * frechet(sum(blocks, Moments(3)), reference) - 3 * left.mean(), rel=1e-9
    )
    assert error == pytest.approx(np.sqrt(3 / 4 * np.square(left - left.mean()).sum()), rel=1e-9)


X = np.random.default_rng(14).standard_normal((40, 3))
BAD = np.full((4, 3), np.nan)
WIDE = np.ones((40, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: moments(X).update(WIDE),
        lambda: moments(X).update(X[0]),
        lambda: moments(BAD),
        lambda: moments(X) + moments(WIDE),
        lambda: moments(X[:1]).cov,
        lambda: frechet(moments(X[:1]), moments(X)),
        lambda: frechet(moments(X), moments(WIDE)),
        lambda: frechet(moments(X), gaussian(np.zeros(3), np.diag([1, np.inf, 1]))),
        lambda: frechet_se(X[:30], moments(X), moments(X)),
        lambda: frechet_se(X, moments(X), moments(X), np.zeros(30)),
        lambda: frechet_se(X, moments(X), moments(X), np.arange(40)),
        lambda: frechet_jackknife([moments(X)], moments(X)),
        lambda: frechet_jackknife([moments(X), Moments(3)], moments(X)),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object]):
    with pytest.raises(ValueError):
        call()
