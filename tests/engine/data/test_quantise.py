"""The shared quantiser against numpy in float64."""

import numpy as np
import pytest
import torch

from experiments.engine.data.quantise import from_uint8, to_uint8


def test_every_level_survives_the_way_there_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    values = from_uint8(levels)
    assert (values.dtype, values[0].item(), values[-1].item()) == (torch.float32, -1, 1)
    assert torch.equal(to_uint8(values), levels)


def test_it_rounds_half_up_and_clips():
    values = np.random.default_rng(0).uniform(-1.3, 1.3, (7, 3, 5, 11))
    expected = np.clip(
        np.floor(127.5 * values.astype(np.float32).astype(np.float64) + 127.5 + 0.5), 0, 255
    )
    got = to_uint8(torch.from_numpy(values).float())
    assert (
        got.dtype == torch.uint8
        and (got.numpy() == expected).mean() > 0.9999
        and np.abs(got.numpy() - expected).max() <= 1
    )
    assert to_uint8(torch.tensor([-1, 0, 1, 9.0, -9.0])).tolist() == [0, 128, 255, 255, 0]


def test_a_batch_is_not_changed_and_half_precision_is_widened():
    images = torch.tensor([0.5, -0.5], dtype=torch.bfloat16)
    assert to_uint8(images).tolist() == [191, 64] and images.tolist() == [0.5, -0.5]
    whole = torch.zeros(2)
    to_uint8(whole)
    assert not whole.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float):
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.tensor([0.0, bad]))
