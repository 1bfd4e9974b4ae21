"""Inception score, KID and MIND against closed forms, torch-fidelity and Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy.special import rel_entr

from experiments.engine.scoring.metrics import inception_score, kid, mind, proportion_se


def softmax(logits: ndarray) -> ndarray:
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def test_inception_score_split_rule():
    p = softmax(2 * np.random.default_rng(9).standard_normal((230, 7)))
    scores = [
        np.exp(rel_entr(part, part.mean(0)).sum(1).mean())
        for part in (p[:100], p[100:200], p[200:])
    ]
    assert inception_score(p, block=100)[0] == pytest.approx(np.mean(scores), rel=1e-12)
    assert inception_score(p)[0] == pytest.approx(
        np.exp(rel_entr(p, p.mean(0)).sum(1).mean()), rel=1e-12
    )
    assert np.isnan(inception_score(p[:9])[1])


def test_inception_score_extremes_and_class_order():
    one_hot = np.eye(10)[np.arange(1000) % 10]
    assert inception_score(np.full((50, 8), 1 / 8)) == pytest.approx((1, 0), abs=1e-7)
    assert inception_score(one_hot) == pytest.approx((10, 0), abs=1e-6)
    assert inception_score(one_hot[np.argsort(one_hot.argmax(1), kind="stable")], block=100)[
        0
    ] == pytest.approx(1)


def test_inception_score_error_matches_monte_carlo():
    rng = np.random.default_rng(10)
    runs = np.array(
        [inception_score(softmax(2 * rng.standard_normal((500, 10)))) for _ in range(200)]
    )
    assert runs[:, 1].mean() == pytest.approx(runs[:, 0].std(ddof=1), rel=0.25)


def test_the_shuffled_inception_score_equals_torch_fidelitys():
    """Its ten parts are blocks of a tenth, as ADM's of 5000 are at 50,000 images."""
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.from_numpy(2 * np.random.default_rng(22).standard_normal((730, 9)))
    theirs = isc.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    p = logits.softmax(1).numpy()[np.random.RandomState(2020).permutation(730)]
    value, _ = inception_score(p, block=73)
    assert value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_kid_equals_torch_fidelitys():
    """Mean and deviation over random subsets are those of torch-fidelity with its seed."""
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    x = np.random.default_rng(19).standard_normal((300, 17)) + 0.3
    y = np.random.default_rng(20).standard_normal((250, 17))
    expected = theirs.kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=7,
        kid_subset_size=100,
        rng_seed=2020,
        verbose=False,
    )

    # Our seed is the same.
    mean, spread = kid(samples=x, reference=y, subsets=7, size=100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_kid_of_whole_sets_does_not_depend_on_their_order():
    x, y = np.random.default_rng(23).standard_normal((2, 120, 7))
    value, _ = kid(samples=x, reference=y, subsets=1, size=120)
    turned, _ = kid(samples=x[::-1], reference=np.roll(y, 5, 0), subsets=1, size=120)
    assert value == pytest.approx(turned, rel=1e-9)


def positive_rows(n: int, seed: int, shift: float) -> ndarray:
    rows = np.abs(np.random.default_rng(seed).standard_normal((n, 37)))
    return rows * np.linspace(0.2, 2, 37) + shift


# By torch-fidelity's `mind_features_to_metric` (0.5.0-dev) on these rows in float64, with 200
# directions and seed 2020.
@pytest.mark.parametrize(
    "n, m, theirs",
    [(300, 300, 1.5907465741038322), (500, 217, 2.4297649282962084), (217, 500, 1.918106596916914)],
)
def test_mind_draws_rows_and_directions_as_torch_fidelity_does(n: int, m: int, theirs: float):
    samples, reference = positive_rows(n, 0, 0.0), positive_rows(m, 1, 0.05)
    value = mind(samples=samples, reference=reference, directions=200)
    assert value == pytest.approx(theirs, rel=1e-4)


def test_mind_of_a_moved_set_is_three_times_the_square_of_the_way():
    x, way = positive_rows(150, 2, 0.0), np.linspace(-1, 2, 37)
    moved = mind(samples=x, reference=x + way)
    shuffled = np.random.default_rng(0).permutation(x)
    assert mind(samples=x, reference=x) == 0
    assert moved == pytest.approx(3 * way @ way, rel=0.03)
    assert mind(samples=x, reference=shuffled + way) == pytest.approx(moved, rel=1e-5)


def test_mind_of_two_gaussians_is_the_difference_of_their_deviations():
    x, y = np.random.default_rng(3).standard_normal((2, 4000, 16))
    value = mind(samples=x, reference=1.5 * y, directions=500)
    assert value == pytest.approx(3 * 16 * 0.5**2, rel=0.05)


def test_proportion_se():
    assert proportion_se(0.2, 400) == pytest.approx(0.02)
    assert proportion_se(1.0, 7) == 0


@pytest.mark.parametrize("score", [kid, mind])
def test_samples_and_reference_cannot_be_confused(score: Callable[..., object]):
    with pytest.raises(TypeError):
        score(np.ones((4, 3)), np.ones((4, 3)))


ONES = np.ones((4, 3))
NORMAL = np.random.default_rng(14).standard_normal((40, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: inception_score(NORMAL),
        lambda: inception_score(np.full((20, 4), 0.5)),
        lambda: inception_score(np.full(4, 0.25)),
        lambda: inception_score(np.empty((0, 4))),
        lambda: inception_score(np.full((20, 4), 0.25), block=0),
        lambda: kid(samples=ONES, reference=np.ones((4, 2)), size=2),
        lambda: kid(samples=ONES, reference=ONES, size=5),
        lambda: mind(samples=ONES, reference=np.ones((4, 2))),
        lambda: mind(samples=ONES, reference=np.ones((0, 3))),
        lambda: mind(samples=ONES, reference=ONES, directions=0),
        lambda: mind(samples=np.full((4, 3), np.nan), reference=ONES),
        lambda: proportion_se(1.2, 10),
        lambda: proportion_se(0.5, 0),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object]):
    with pytest.raises(ValueError):
        call()
