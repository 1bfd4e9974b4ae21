"""Copies of training images stand out, and new images do not."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.engine.scoring.copies import Parts, check_copies


def parts(seed: int = 0, dim: int = 7) -> Parts:
    draw = np.random.default_rng(seed)
    return Parts(*(draw.normal(size=(num, dim)) for num in (400, 150, 300)))


def near_by_hand(rows: np.ndarray, known: Parts) -> float:
    """Every distance in turn."""
    count = 0
    for row in rows:
        distances = np.linalg.norm(known.train - row, axis=1)
        training = known.train[distances.argmin()]
        count += distances.min() < np.linalg.norm(known.test - training, axis=1).min()
    return count / len(rows)


def test_the_share_is_that_of_a_plain_loop():
    known = parts()
    samples = np.random.default_rng(1).normal(size=(33, 7))
    values = check_copies(samples, known)
    assert values["near_training"] == pytest.approx(near_by_hand(samples, known))
    heldout = near_by_hand(known.validation[:33], known)
    assert values["near_training_heldout"] == pytest.approx(heldout)
    assert values["near_training_heldout_num"] == 33


def test_copies_with_a_little_noise_are_all_near():
    known = parts()
    copies = known.train[:50] + 1e-6
    assert check_copies(copies, known)["near_training"] == 1.0


def test_images_of_the_same_kind_are_near_as_often_as_held_out_ones():
    known = parts(dim=2)
    samples = np.random.default_rng(2).normal(size=(150, 2))
    values = check_copies(samples, known)
    error = np.hypot(values["near_training_se"], values["near_training_heldout_se"])
    assert abs(values["near_training"] - values["near_training_heldout"]) < 4 * error
