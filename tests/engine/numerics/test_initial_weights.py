"""Weights drawn by name are equal where names are, nested over sizes, and the family's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import backbones
from backbones.registry import shared_name_of
from experiments.engine.numerics.initial_weights import build_by_name, nested_numbers
from experiments.engine.specs.spec import Backbone
from experiments.engine.training.networks import build

SHAPE = dict(input_size=8, in_channels=1, num_classes=10)
SMALL = dict(dim=16, depths=(1, 1, 1, 1, 1)) | SHAPE


def hourglass(seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    """The weights of a small hourglass, drawn by name."""
    network = build_by_name(lambda: backbones.build("hourglass", **SMALL, **options), seed)
    return network.state_dict()


def test_weights_depend_on_the_seed_and_not_on_the_generator():
    torch.manual_seed(1)
    first = hourglass()
    torch.manual_seed(2)
    again, other = hourglass(), hourglass(seed=1)

    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "middle.0.mixer.depthwise.weight"
    assert not torch.equal(first[name], other[name])


def test_rows_that_share_names_share_weights_whatever_is_built_between():
    full, without = hourglass(), hourglass(mixer_options=dict(channel="none"))
    shared = set(full) & set(without)

    assert "final.adaLN_modulation.1.weight" in shared and set(full) - shared
    assert all(torch.equal(full[name], without[name]) for name in shared)


def test_a_larger_kernel_holds_the_smaller_one_in_its_middle_at_its_own_scale():
    small = hourglass()["middle.0.mixer.depthwise.weight"]
    large = hourglass(mixer_options=dict(kernel=7))["middle.0.mixer.depthwise.weight"]

    # convolutions draw from +-1 / sqrt(inputs of a number), 9 and 49 here
    assert torch.allclose(large[..., 2:-2, 2:-2], small * 3 / 7, rtol=1e-6)


@pytest.mark.parametrize(
    "narrow, wide",
    [
        (lambda: nn.Linear(5, 7), lambda: nn.Linear(9, 11)),
        (lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(8, 9, 5)),
        (lambda: nn.Embedding(4, 3), lambda: nn.Embedding(6, 8)),
    ],
)
def test_a_wider_layer_holds_the_narrower_ones_part(narrow, wide):
    small, large = (build_by_name(layer, 3).weight.detach() for layer in (narrow, wide))
    part = large[tuple(slice(size) for size in small.shape[:2])]
    if small.dim() == 4:
        part = part[..., 1:-1, 1:-1]

    ratio = small / part
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5)


@pytest.mark.parametrize("distribution, truth", [("uniform", "uniform"), ("normal", "norm")])
@pytest.mark.parametrize("shape", [(3001,), (61, 53), (31, 11, 3, 3), (3, 7, 101)])
def test_nested_numbers_follow_their_distribution(
    distribution: str, truth: str, shape: tuple[int, ...]
):
    numbers = nested_numbers("a key", shape, distribution)
    assert stats.kstest(numbers.ravel(), truth).pvalue > 1e-3
    assert len(np.unique(numbers)) == numbers.size, "two numbers come from one place of a stream"


@pytest.mark.parametrize(
    "name", ["dico_s", "dit_s_2", "uvit_h_2", "dig_b_2", "diffussm_xl", "dim_h"]
)
def test_a_family_keeps_its_own_distribution(name: str):
    options = backbones.tiny_options_of(name) | SHAPE
    drawn = build_by_name(lambda: backbones.build(name, **options), 0).state_dict()
    torch.manual_seed(0)
    usual = backbones.build(name, **options).state_dict()

    for key, weight in usual.items():
        if weight.numel() > 200 and weight.is_floating_point() and weight.std() > 0:
            ours, theirs = drawn[key].flatten(), weight.flatten()
            assert stats.ks_2samp(ours, theirs).pvalue > 1e-6, key
        elif weight.is_floating_point() and (weight == weight.flatten()[0]).all():
            assert torch.equal(drawn[key], weight), f"{key} is a constant of the family"


def test_a_constructor_that_draws_otherwise_is_refused():
    def shuffled() -> nn.Module:
        layer = nn.Linear(3, 3)
        layer.weight.data = layer.weight.data[torch.randperm(3)]
        return layer

    with pytest.raises(
        ValueError, match="cannot be drawn by name: a constructor calls aten.randperm"
    ):
        build_by_name(shuffled, 0)


@pytest.mark.parametrize(
    "published, controlled",
    [
        (
            ("dico_s", dict(dim=16, depths=(2, 1, 1, 1, 1))),
            ("hourglass", dict(dim=16, depths=(2, 1, 1, 1, 1), mixer="conv")),
        ),
        (
            ("dit_s_2", dict(dim=24, depth=2, heads=3)),
            (
                "isotropic",
                dict(
                    dim=24,
                    depth=2,
                    mlp_ratio=4.0,
                    mixer="softmax",
                    mixer_options=dict(heads=3),
                    gelu="tanh",
                ),
            ),
        ),
    ],
    ids=["dico", "dit"],
)
def test_a_published_family_starts_where_the_same_controlled_network_does(published, controlled):
    first, second = (
        build(Backbone(name, options | SHAPE), 3, torch.device("cpu"), "by_name")
        for name, options in (published, controlled)
    )
    renamed = {shared_name_of(published[0], name): p for name, p in first.named_parameters()}
    expected = dict(second.named_parameters())

    assert renamed.keys() == expected.keys()
    for name in expected:
        assert torch.equal(renamed[name].flatten(), expected[name].flatten()), name
