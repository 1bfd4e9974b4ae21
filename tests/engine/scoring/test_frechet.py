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
    known.n = n
    known.mean = mean
    known.scatter = cov * (n - 1)
    return known


def spd(rng: np.random.Generator, dim: int) -> ndarray:
    root = rng.standard_normal((dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


def distance_by_root(mean1: ndarray, cov1: ndarray, mean2: ndarray, cov2: ndarray) -> float:
    """Return the Fréchet distance by its formula, with scipy's matrix root."""
    root = sqrtm(cov1 @ cov2).real
    return np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root)


def test_moments_equal_one_shot_in_any_order():
    """Moments of rows far from zero do not depend on how the rows are cut and merged."""
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

    # Against numpy, on the whole set at once.
    cov = np.cov(x, rowvar=False)
    for stream in streams:
        assert stream.n == len(x)
        np.testing.assert_allclose(stream.mean, x.mean(0), rtol=1e-10)
        np.testing.assert_allclose(stream.cov, cov, rtol=1e-10, atol=1e-10 * x.var())


def test_moments_accumulate_float32_in_float64_and_leave_operands_alone():
    """A sum of moments is exact, and shares nothing with its operands."""
    x = (np.random.default_rng(1).standard_normal((5000, 6)) + 100).astype(np.float32)
    first = moments(x[:2000])
    second = moments(x[2000:])
    n, mean, scatter = first.n, first.mean.copy(), first.scatter.copy()
    cov = np.cov(x.astype(float), rowvar=False)
    np.testing.assert_allclose((first + second).cov, cov, rtol=1e-10, atol=1e-10)
    second.update(x)
    assert first.n == n
    assert (first.mean == mean).all()
    assert (first.scatter == scatter).all()


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
    once = moments_of(x)
    twice = moments_of(np.concatenate([x, x]))
    np.testing.assert_allclose(twice.mean, once.mean, atol=1e-12)
    np.testing.assert_allclose(twice.cov, once.cov * 2 * 49 / 99, rtol=1e-9)


def test_frechet_closed_forms():
    """The distance is its formula for covariances that commute and for others, both ways."""
    rng = np.random.default_rng(2)
    mean1, mean2 = rng.standard_normal((2, 9))
    s1, s2 = rng.uniform(0.2, 2, (2, 9))
    commuting = np.square(mean1 - mean2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    distance = frechet(gaussian(mean1, np.diag(s1)), gaussian(mean2, np.diag(s2)))
    assert distance == pytest.approx(commuting, rel=1e-9)

    # Covariances in general.
    c1 = spd(rng, 9)
    c2 = spd(rng, 9)
    general = distance_by_root(mean1, c1, mean2, c2)
    a = gaussian(mean1, c1)
    b = gaussian(mean2, c2)
    assert frechet(a, b) == pytest.approx(general, rel=1e-9)
    assert frechet(b, a) == pytest.approx(general, rel=1e-9)


def test_frechet_of_a_set_with_itself_moved():
    x = np.random.default_rng(3).standard_normal((500, 20))
    shift = np.linspace(-1, 2, 20)
    assert abs(frechet(moments(x), moments(x))) < 1e-9
    assert frechet(moments(x), moments(x + shift)) == pytest.approx(shift @ shift, abs=1e-9)


def test_frechet_rank_deficient_equals_nuclear_norm():
    """With fewer rows than dimensions, the root's trace is a nuclear norm of the centred rows."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((40, 150))
    y = 1.5 * rng.standard_normal((60, 150)) + 0.3
    xc = x - x.mean(0)
    yc = y - y.mean(0)
    cross = np.linalg.norm(xc @ yc.T, "nuc") / np.sqrt(39 * 59)
    traces = np.square(xc).sum() / 39 + np.square(yc).sum() / 59
    truth = np.square(x.mean(0) - y.mean(0)).sum() + traces - 2 * cross
    assert frechet(moments(x), moments(y)) == pytest.approx(truth, abs=1e-9)
    assert frechet(moments(y), moments(x)) == pytest.approx(truth, abs=1e-9)

    # A reference that is known by its covariance alone.
    cov = np.cov(y, rowvar=False)
    known = Moments.known(y.mean(0), cov)
    assert (known.cov == cov).all()
    assert frechet(moments(x), known) == pytest.approx(truth, abs=1e-6)


def inception_like(rng: np.random.Generator, n: int, shift: float) -> ndarray:
    """Draw rows (n, 60), not negative and mostly small, with a spectrum over ten decades."""
    mixing = spd(np.random.default_rng(17), 60)
    decay = np.logspace(0, -5, 60)
    return np.maximum(rng.standard_normal((n, 60)) * decay @ mixing + shift, 0)


def test_frechet_of_features_like_inceptions():
    """A wide spectrum costs no accuracy against scipy's matrix root."""
    rng = np.random.default_rng(16)
    x = inception_like(rng, 900, 0.1)
    y = inception_like(rng, 700, 0.15)
    truth = distance_by_root(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet(moments(x), moments(y)) == pytest.approx(truth, rel=1e-6)


def bumpy(rng: np.random.Generator, labels: ndarray) -> ndarray:
    """Class-dependent Gaussian rows (n, 6), whose distance from normal is far above its bias."""
    centres = np.random.default_rng(99).standard_normal((10, 6))
    return 0.5 + 0.8 * centres[labels] + 0.7 * rng.standard_normal((len(labels), 6))


@pytest.mark.parametrize("balanced", [False, True])
def test_influence_se_matches_monte_carlo(balanced: bool):
    """The error is the spread over samples; classes in equal shares make it smaller."""
    rng = np.random.default_rng(5)
    reference = gaussian(np.zeros(6), np.eye(6))
    n = 1000

    # The distance of 300 samples, and two errors of each.
    distances = []
    pooled = []
    within = []
    for _ in range(300):
        labels = np.arange(n) % 10 if balanced else rng.integers(10, size=n)
        x = bumpy(rng, labels)
        sample = moments(x)
        distances.append(frechet(sample, reference))
        pooled.append(frechet_se(x, sample, reference))
        within.append(frechet_se(x, sample, reference, labels))

    # Of balanced samples, the error within classes is the right one.
    spread = np.std(distances, ddof=1)
    if balanced:
        assert np.mean(within) == pytest.approx(spread, rel=0.3)
        assert np.mean(within) < 0.8 * np.mean(pooled)
    else:
        assert np.mean(pooled) == pytest.approx(spread, rel=0.25)


def test_influence_se_is_the_derivative():
    """The influence of a row is the change of the distance by a little more weight on the row."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((60, 4)) + 0.4
    reference = gaussian(rng.standard_normal(4), spd(rng, 4))
    sample = moments(x)
    weight = 1e-6

    def tilted(row: ndarray) -> float:
        """Return the distance where a row has a little more weight."""
        mean = (1 - weight) * sample.mean + weight * row
        offset = row - sample.mean
        cov = (1 - weight) * sample.cov + weight * (1 - weight) * np.outer(offset, offset)
        return frechet(gaussian(mean, cov), reference)

    # The error is the deviation of the influences.
    distance = frechet(sample, reference)
    influences = np.array([(tilted(row) - distance) / weight for row in x])
    error = frechet_se(x, sample, reference)
    assert error == pytest.approx(influences.std(ddof=1) / np.sqrt(60), rel=1e-4)

    # It does not depend on the order of the rows.
    shuffled = x[rng.permutation(60)]
    assert frechet_se(shuffled, sample, reference) == pytest.approx(error, rel=1e-9)


def test_influence_se_with_flat_reference_directions_and_few_samples():
    """Directions in which the reference does not vary add no error of their own."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((400, 5))
    flat = np.diag([1.0, 2.0, 0.5, 0.0, 0.0])
    centred = x - x.mean(0)
    of_spread = np.square(centred) @ (1 - np.sqrt(np.diag(flat)))
    of_mean = -2 * centred @ np.ones(5)
    error = frechet_se(x, moments(x), gaussian(x.mean(0) + 1, flat))
    assert error == pytest.approx((of_spread + of_mean).std() / 20, rel=0.1)

    # Of 19 rows no error is known.
    assert np.isnan(frechet_se(x[:19], moments(x[:19]), moments(x)))


def test_the_error_of_the_influences_is_the_error_of_the_distance():
    x, y = np.random.default_rng(17).standard_normal((2, 200, 6))
    sample, reference = moments(x), moments(y)
    psi = frechet_influence(x, sample, reference)
    assert influence_se(psi) == frechet_se(x, sample, reference)


def test_jackknife_removes_most_of_the_bias():
    """Of few rows, the distance is too large; the jackknife's is not, and knows its error."""
    rng = np.random.default_rng(8)
    dim = 16
    reference = gaussian(np.zeros(dim), np.eye(dim))
    scale = np.linspace(0.6, 1.4, dim)
    truth = np.square(scale - 1).sum()

    # A hundred samples, in nine blocks of 50 rows and one of 25.
    raw = []
    corrected = []
    errors = []
    for _ in range(100):
        blocks = [moments(scale * rng.standard_normal((size, dim))) for size in (50,) * 9 + (25,)]
        distance, error = frechet_jackknife(blocks, reference)
        raw.append(frechet(sum(blocks, Moments(dim)), reference))
        corrected.append(distance)
        errors.append(error)

    # Both on average, and the error against the spread.
    bias = np.mean(raw) - truth
    assert bias > 0.1
    assert abs(np.mean(corrected) - truth) < 0.15 * bias
    assert np.mean(errors) == pytest.approx(np.std(corrected, ddof=1), rel=0.25)


def test_jackknife_of_equal_blocks_is_the_textbook_formula():
    """Value and error follow from the distances that leave out one of four blocks each."""
    rng = np.random.default_rng(15)
    blocks = [moments(rng.standard_normal((20, 3))) for _ in range(4)]
    reference = gaussian(np.ones(3), np.eye(3))
    whole = frechet(sum(blocks, Moments(3)), reference)
    without = []
    for j in range(4):
        rest = blocks[:j] + blocks[j + 1 :]
        without.append(frechet(sum(rest, Moments(3)), reference))

    # The textbook's formulae.
    mean = np.mean(without)
    error_of_mean = np.sqrt(3 / 4 * np.square(without - mean).sum())
    value, error = frechet_jackknife(blocks, reference)
    assert value == pytest.approx(4 * whole - 3 * mean, rel=1e-9)
    assert error == pytest.approx(error_of_mean, rel=1e-9)


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
