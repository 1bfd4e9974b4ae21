"""Precision, recall, density and coverage against loops that spell out their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy import ndarray
from scipy.spatial.distance import cdist

from experiments.engine.scoring.neighbours import (
    Shares,
    neighbour_shares,
    precision_recall,
    precision_recall_half,
)

Draw = Callable[[np.random.Generator, int], ndarray]


def squared_radii(x: ndarray, k: int) -> ndarray:
    """Squared distance of each row to its k-th nearest other row."""
    radii = []
    for i, row in enumerate(x):
        others = np.delete(np.square(x - row).sum(1), i)
        radii.append(np.sort(others)[k - 1])
    return np.array(radii)


def by_definition(samples: ndarray, reference: ndarray, k: int) -> Shares:
    """Return the shares pair by pair.

    Balls are closed for precision and recall, and open for density and coverage.
    """
    radii_real = squared_radii(reference, k)
    radii_fake = squared_radii(samples, k)
    in_closed = np.zeros(len(samples), bool)
    reached = np.zeros(len(reference), bool)
    covered = np.zeros(len(reference), bool)
    num_open = np.zeros(len(samples))

    # Compare every distance with the radii of both ends.
    for i, real in enumerate(reference):
        for j, fake in enumerate(samples):
            distance = np.square(real - fake).sum()
            in_closed[j] |= distance <= radii_real[i]
            reached[i] |= distance <= radii_fake[j]
            num_open[j] += distance < radii_real[i]
            covered[i] |= distance < radii_real[i]

    # The density of a sample is the number of open balls around it, over k.
    density = num_open / k
    error = density.std(ddof=1) / np.sqrt(len(samples))
    return Shares(in_closed.mean(), reached.mean(), density.mean(), error, covered.mean())


def cloud(rng: np.random.Generator, n: int) -> ndarray:
    return rng.standard_normal((n, 12))


def offset_cloud(rng: np.random.Generator, n: int) -> ndarray:
    """Norms swamp distances: |a|^2 + |b|^2 - 2ab alone keeps few digits."""
    return rng.standard_normal((n, 5)) + 1e5


def tied_lattice(rng: np.random.Generator, n: int) -> ndarray:
    """Duplicates within and between the sets, and distances that are tied up to rounding."""
    return rng.integers(0, 4, (n, 4)) * 0.1


@pytest.mark.parametrize("draw", [cloud, offset_cloud, tied_lattice])
@pytest.mark.parametrize("k", [1, 3])
def test_shares_equal_their_definition_for_every_block(draw: Draw, k: int):
    rng = np.random.default_rng(11)
    reference, samples = draw(rng, 71), draw(rng, 103)
    truth = by_definition(samples, reference, k)
    for block in (9, 50, 103):
        shares = neighbour_shares(samples=samples, reference=reference, k=k, block=block)
        assert (shares.precision, shares.recall) == (truth.precision, truth.recall)
        assert shares.coverage == truth.coverage
        assert shares.density == pytest.approx(truth.density, rel=1e-12)
        assert shares.density_se == pytest.approx(truth.density_se, rel=1e-9)


def test_a_set_against_itself_has_density_and_coverage_one():
    x = cloud(np.random.default_rng(0), 90)
    for k in (1, 3, 5):
        shares = neighbour_shares(samples=x, reference=x, k=k)
        assert shares.density == pytest.approx(1, rel=1e-12), k
        assert (shares.precision, shares.recall, shares.coverage) == (1, 1, 1), k


def test_a_sample_on_the_surface_counts_for_precision_and_not_for_density():
    line = np.arange(10.0)[:, None]
    on_surface = np.array([[-1.0], [10.0]])  # at distance 1, the radius of the balls of 0 and 9
    shares = neighbour_shares(samples=on_surface, reference=line, k=1)
    assert (shares.precision, shares.density, shares.coverage) == (1, 0, 0)


def test_density_and_coverage_of_one_distribution_and_of_half_its_modes():
    rng = np.random.default_rng(19)
    mode = np.arange(1000) % 4
    whole, again = (20 * np.eye(4)[mode] + rng.standard_normal((1000, 4)) for _ in range(2))
    part = again[mode < 2]

    # Naeem et al. 2020, section 3.2.
    same = neighbour_shares(samples=again, reference=whole, k=5)
    assert same.density == pytest.approx(1, abs=4 * same.density_se)
    assert same.coverage == pytest.approx(1 - 0.5**5, abs=0.03)

    half = neighbour_shares(samples=part, reference=whole, k=5)
    assert half.density == pytest.approx(1, abs=0.15)
    assert half.coverage < 0.5
    assert neighbour_shares(samples=whole, reference=part, k=5).density < 0.6


def test_precision_and_recall_count_ties_and_exclude_the_row_itself():
    line = np.arange(10.0)[:, None]

    # Distance 1 equals the radius of 9.
    shares = precision_recall(samples=np.full((4, 1), 10.0), reference=line, k=1)
    assert shares == (1.0, 0.0)
    shares = precision_recall(samples=np.full((4, 1), 10.0 + 1e-9), reference=line, k=1)
    assert shares == (0.0, 0.0)

    # Were a row its own neighbour, the samples' balls would be points.
    shares = precision_recall(samples=np.array([[4.5], [40.0]]), reference=line, k=1)
    assert shares == (0.5, 1.0)

    # A duplicate is a neighbour at distance 0.
    twins = np.repeat(10 * np.arange(5.0), 2)[:, None]
    assert precision_recall(samples=twins + 1, reference=twins, k=1) == (0.0, 0.0)


def test_samples_of_half_the_modes_have_precision_and_lack_recall():
    rng = np.random.default_rng(12)
    centres = 20 * np.eye(4)
    full, part = (
        centres[rng.integers(modes, size=400)] + rng.standard_normal((400, 4)) for modes in (4, 2)
    )
    precision, recall = precision_recall(samples=part, reference=full)
    assert precision > 0.85
    assert recall < 0.6
    assert precision_recall(samples=full, reference=part) == (recall, precision)


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(13)
    a, b = rng.standard_normal((150, 3)), rng.standard_normal((90, 3)) + 1
    shares = precision_recall(samples=b, reference=a)
    shuffled = precision_recall(samples=rng.permutation(b), reference=rng.permutation(a), block=31)
    assert shares == shuffled
    radii = np.sort(cdist(a, a))[:, 3:4]
    assert shares[0] == (cdist(a, b) <= radii).any(0).mean()


def half_distances(a: ndarray, b: ndarray) -> ndarray:
    """Squared distances in ADM's arithmetic; in single precision if one of them overflows."""
    u, v = a.astype(np.float16), b.astype(np.float16)
    uu, vv = ((w * w).astype(np.float32).sum(1).astype(np.float16) for w in (u, v))
    product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    near = np.maximum(uu[:, None] - np.float16(2) * product + vv, np.float16(0))
    if np.isfinite(near).all():
        return near.astype(np.float32)
    return np.square(a[:, None].astype(np.float32) - b.astype(np.float32)).sum(2)


def half_by_hand(samples: ndarray, reference: ndarray, k: int) -> tuple[float, float]:
    """ADM's precision and recall in numpy, without blocks."""
    with np.errstate(over="ignore", invalid="ignore"):
        radii_real, radii_fake = (
            np.sort(half_distances(x, x), 1)[:, k] for x in (reference, samples)
        )
        cross = half_distances(reference, samples)
    return (cross <= radii_real[:, None]).any(0).mean(), (cross <= radii_fake).any(1).mean()


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_half_precision_rounds_upward_and_falls_back_where_it_overflows(size: float):
    rng = np.random.default_rng(21)
    reference, samples = (size * np.abs(rng.standard_normal((n, 131))) for n in (211, 307))
    half = precision_recall_half(samples=samples, reference=reference)
    exact = precision_recall(samples=samples, reference=reference)
    assert half == pytest.approx(half_by_hand(samples, reference, 3), abs=0.005)
    assert all(ours >= true - 0.005 for ours, true in zip(half, exact, strict=True))
    if size > 1:
        assert half == pytest.approx(exact, abs=0.005)
    else:
        assert half != exact


X = np.random.default_rng(14).standard_normal((40, 3))
BAD_CALLS = {
    "another width": dict(reference=X, samples=np.ones((40, 4))),
    "too few samples for k": dict(reference=X, samples=X[:3]),
    "no neighbours": dict(reference=X, samples=X, k=0),
    "empty blocks": dict(reference=X, samples=X, block=0),
    "values that are not finite": dict(
        reference=X, samples=np.vstack([X, np.full((4, 3), np.nan)])
    ),
}


@pytest.mark.parametrize("arguments", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_refused(arguments: dict):
    with pytest.raises(ValueError):
        precision_recall(**arguments)


def test_samples_and_reference_cannot_be_confused():
    with pytest.raises(TypeError):
        neighbour_shares(X, X)
