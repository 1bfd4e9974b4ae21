"""Redundancy of channels against matrices of known rank and correlation, and whole networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import backbones
from analysis.probes.channels import (
    Redundancy,
    effective_rank,
    first_stage,
    last_mixer,
    mean_correlation,
    record,
)

BLOCKS = ("DiCoBlock", "DiTBlock", "Block")


def features(n: int, c: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_effective_rank_of_known_matrices():
    """The effective rank is the exponential of the entropy of the singular values."""
    assert effective_rank(torch.eye(5).double()) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 5).double()) == pytest.approx(1, abs=1e-5)

    # Singular values of 3 and 1 are shares of 3/4 and 1/4.
    singular = torch.tensor([3.0, 1.0]).double()
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert effective_rank(torch.diag(singular**2)) == pytest.approx(math.exp(entropy))
    with pytest.raises(ValueError, match="do not vary"):
        effective_rank(torch.zeros(3, 3))


def test_correlation_against_numpy_without_constant_channels():
    x = features(2, 4, 3, 5)
    x[:, 1] = -2 * x[:, 0] + 1
    x[:, 3] = 7
    table = x.movedim(1, -1).reshape(-1, 4).numpy()
    truth = np.abs(np.corrcoef(table[:, :3].T))
    redundancy = Redundancy()
    redundancy.add(x)
    assert mean_correlation(redundancy.covariance()) == pytest.approx((truth.sum() - 3) / 6)
    with pytest.raises(ValueError, match="fewer than two channels vary"):
        mean_correlation(torch.diag(torch.tensor([1.0, 0.0, 0.0])))


def test_streaming_equals_one_shot():
    """Batches of any size and layout give the measures of the whole set."""
    x = features(6, 5, 3, 5)
    whole = Redundancy()
    whole.add(x)
    streamed = Redundancy()
    for batch in (x[:1].flatten(2).mT, x[1:4], x[4:]):
        streamed.add(batch)
    torch.testing.assert_close(streamed.covariance(), whole.covariance())
    torch.testing.assert_close(streamed.activation(), x.clamp(min=0).mean((0, 2, 3)))

    # The rank is that of the centred table of all positions.
    centred = x - x.mean((0, 2, 3), keepdim=True)
    singular = torch.linalg.svdvals(centred.movedim(1, -1).reshape(-1, 5))
    share = singular / singular.sum()
    entropy = -(share * share.log()).sum()
    assert whole.scalars()["effective_rank"] == pytest.approx(math.exp(entropy))


def test_near_dead_channels_are_counted():
    """Two of four channels are hardly ever above zero."""
    x = torch.ones(1, 4, 2, 2) + 0.01 * features(1, 4, 2, 2)
    x[:, 0] = -1 + 0.01 * x[:, 2]
    x[:, 1] = 0.01 * x[:, 3]
    redundancy = Redundancy()
    redundancy.add(x)
    assert redundancy.scalars()["near_dead"] == 0.5
    with pytest.raises(ValueError, match="not finite"):
        redundancy.add(x * torch.nan)


def tiny(name: str, **options: object) -> nn.Module:
    """Build a small network of random weights."""
    torch.manual_seed(0)
    shape = dict(input_size=8, in_channels=3, num_classes=5)
    model = backbones.build(name, **backbones.tiny_options_of(name) | shape | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def walk(model):
    for step in (900, 100):
        model(features(2, 3, 8, 8).float(), torch.tensor([step, step]), torch.tensor([0, 4]))


@pytest.mark.parametrize("name", ["dico_s", "dit_s_2", "hourglass", "isotropic"])
def test_the_last_mixer_is_what_the_last_gate_multiplies(name: str):
    """Silencing the module has the same effect as closing the gate of the last block's mixer."""
    model = tiny(name)
    module = last_mixer(model)
    arrays, values = record(model, module, walk, keep_maps=False)
    assert arrays["activation"].shape[0] == 2
    assert (arrays["activation"] >= 0).all()
    assert set(values) == {"near_dead", "effective_rank", "relative_rank", "correlation"}

    x = features(2, 3, 8, 8).float()
    t = torch.tensor([5, 5])
    y = torch.tensor([0, 4])
    blocks = [part for part in model.modules() if type(part).__name__ in BLOCKS]
    modulation = blocks[-1].adaLN_modulation[1]
    with torch.no_grad():
        handle = module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        silenced = model(x, t, y)
        handle.remove()

        # The third sixth of the modulation is the mixer's gate.
        rows = modulation.weight.shape[0] // 6
        modulation.weight[2 * rows : 3 * rows].zero_()
        modulation.bias[2 * rows : 3 * rows].zero_()
        torch.testing.assert_close(model(x, t, y), silenced)


def test_features_are_the_first_stages_output():
    """The maps of a step are those that the next stage is given."""
    model = tiny("dico_s")
    arrays, _ = record(model, first_stage(model), walk, keep_maps=True)
    maps = torch.from_numpy(arrays["maps"]).float()

    # Keep what reaches the first downsampling.
    inputs = []
    handle = model.down1_2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        walk(model)
    handle.remove()

    # Of every step, the first image's maps are stored in half precision.
    assert maps.shape == (2, 12, 8, 8)
    truth = torch.stack([x[0] for x in inputs])
    torch.testing.assert_close(maps, truth, rtol=2e-3, atol=1e-3)


def test_networks_without_what_is_probed_say_so():
    with pytest.raises(ValueError, match="Isotropic has no first stage"):
        first_stage(tiny("isotropic"))
    with pytest.raises(ValueError, match="has no block whose mixer this probe knows"):
        last_mixer(nn.Conv2d(1, 1, 1))
