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
    assert effective_rank(torch.eye(5).double()) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 5).double()) == pytest.approx(1, abs=1e-5)
    singular = torch.tensor([3.0, 1.0]).double()  # p = 3/4, 1/4
    assert effective_rank(torch.diag(singular**2)) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
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
    x = features(6, 5, 3, 5)
    parts = Redundancy()
    whole = Redundancy()
    whole.add(x)
    for some in (x[:1].flatten(2).mT, x[1:4], x[4:]):
        parts.add(some)
    torch.testing.assert_close(parts.covariance(), whole.covariance())
    torch.testing.assert_close(parts.activation(), x.clamp(min=0).mean((0, 2, 3)))
    rank = torch.linalg.svdvals((x - x.mean((0, 2, 3), keepdim=True)).movedim(1, -1).reshape(-1, 5))
    share = rank / rank.sum()
    assert whole.scalars()["effective_rank"] == pytest.approx(
        math.exp(-(share * share.log()).sum())
    )


def test_near_dead_channels_are_counted():
    x = torch.ones(1, 4, 2, 2) + 0.01 * features(1, 4, 2, 2)
    x[:, 0], x[:, 1] = -1 + 0.01 * x[:, 2], 0.01 * x[:, 3]
    redundancy = Redundancy()
    redundancy.add(x)
    assert redundancy.scalars()["near_dead"] == 0.5
    with pytest.raises(ValueError, match="not finite"):
        redundancy.add(x * torch.nan)


def tiny(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = backbones.build(
        name,
        **backbones.tiny_options_of(name)
        | dict(input_size=8, in_channels=3, num_classes=5)
        | options,
    )
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
    model = tiny("dico_s")
    arrays, _ = record(model, first_stage(model), walk, keep_maps=True)
    seen = []
    handle = model.down1_2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        walk(model)
    handle.remove()
    assert arrays["maps"].shape == (2, 12, 8, 8)
    torch.testing.assert_close(
        torch.from_numpy(arrays["maps"]).float(),
        torch.stack([x[0] for x in seen]),
        rtol=2e-3,
        atol=1e-3,
    )


def test_networks_without_what_is_probed_say_so():
    with pytest.raises(ValueError, match="Isotropic has no first stage"):
        first_stage(tiny("isotropic"))
    with pytest.raises(ValueError, match="has no block whose mixer this probe knows"):
        last_mixer(nn.Conv2d(1, 1, 1))
