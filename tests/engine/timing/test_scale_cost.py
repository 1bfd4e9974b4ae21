"""Counts of VAR and CoDe: the facts' numbers, and closed forms on small networks."""

from __future__ import annotations

from typing import Any

import pytest

import backbones
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.scale_cost import count_declared

TOKENIZER = Backbone("vqvae_ch160")
# Multiply-accumulates of an image: unguided in G with four digits, guided exactly, and one pass
# over all scales in G. From the authors' code at full size.
PUBLISHED = {
    "var_d16": (16, 150.2135, 300_381_208_576, 155.0311),
    "var_d20": (16, 287.6677, 575_284_019_200, 294.8546),
    "var_d24": (16, 490.9425, 981_827_960_832, 500.7924),
    "var_d30": (16, 947.5502, 1_895_035_115_520, 961.7596),
    "var_d36_s": (32, 5701.1003, 11_401_941_123_072, 5990.5545),
}
# Of a guided image of CoDe in G, by drafted scales; and VAR-d30's cost over it.
COLLABORATIONS = {9: (1480.12, 1.28), 8: (1004.13, 1.89), 7: (727.29, 2.61), 6: (551.97, 3.43)}
SIDES, DEPTH, DIM, CHANNELS, VOCABULARY = (1, 2, 4), 3, 24, 6, 40


def tiny(**options: Any) -> Backbone:
    shape = dict(sides=SIDES, vocabulary=VOCABULARY, depth=DEPTH, dim=DIM, heads=3)
    return Backbone("var_d16", shape | options)


def tiny_cost(**fields: Any) -> Cost:
    coder = Backbone("vqvae_ch160", backbones.tiny_options_of("vqvae_ch160") | dict(sides=SIDES))
    values = dict(backbone=tiny(), size=4, channels=CHANNELS, num_classes=7, tokenizer=coder)
    return Cost(**values | fields)


def blocks_by_hand(depth: int, dim: int, calls: list[tuple[int, int]], shared: bool) -> int:
    """Count blocks and head for calls of (tokens, tokens that each sees)."""
    per_call = 6 * dim**2 * (1 if shared else depth) + 2 * dim**2
    per_token = 12 * dim**2 * depth + dim * VOCABULARY
    return sum(per_call + new * per_token + 2 * new * seen * dim * depth for new, seen in calls)


PHIS = len(SIDES) * 4**2 * 9 * CHANNELS**2
STEPS = [(1, 1), (4, 5), (16, 21)]  # tokens of each scale, and of it and coarser ones


@pytest.mark.parametrize("shared", [False, True])
def test_an_image_costs_what_the_closed_form_says(shared: bool):
    counts = count_declared(tiny_cost(backbone=tiny(shared_adaln=shared)))
    row = blocks_by_hand(DEPTH, DIM, STEPS, shared)
    embedding = 20 * CHANNELS * DIM
    assert counts["macs_image"] == row + embedding + PHIS
    assert counts["macs_image_guided"] == 2 * row + embedding + PHIS
    assert counts["macs_core"] == blocks_by_hand(DEPTH, DIM, [(21, 21)], shared) + embedding


@pytest.mark.parametrize("drafted", [1, 2])
def test_two_networks_cost_what_the_closed_form_says(drafted: int):
    """The second one sees all scales so far in its first call, and its head reads all of them."""
    refiner = tiny(depth=1, dim=12)
    counts = count_declared(tiny_cost(refiner=refiner, drafted_scales=drafted))
    prefix = STEPS[drafted][1]
    draft = blocks_by_hand(DEPTH, DIM, STEPS[:drafted], shared=False)
    refine = blocks_by_hand(1, 12, [(prefix, prefix), *STEPS[drafted + 1 :]], shared=False)
    embedding = (prefix - 1) * CHANNELS * DIM + 20 * CHANNELS * 12
    assert counts["macs_image_guided"] == 2 * (draft + refine) + embedding + PHIS
    assert "macs_core" not in counts


def check_published(name: str) -> None:
    size, image, guided, one_pass = PUBLISHED[name]
    counts = count_declared(Cost(Backbone(name), size, 32, 1000, tokenizer=TOKENIZER))
    assert round(counts["macs_image"] / 1e9, 4) == image
    assert counts["macs_image_guided"] == guided
    assert round(counts["macs_core"] / 1e9, 4) == one_pass
    decoder = 196.857 if size == 16 else 791.454
    assert round(counts["macs_decoder"] / 1e9, 3) == decoder


def test_var_d16_costs_what_the_authors_code_costs():
    check_published("var_d16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "var_d16"])
def test_larger_networks_cost_what_the_authors_code_costs(name: str):
    check_published(name)


@pytest.mark.slow
@pytest.mark.parametrize("drafted", COLLABORATIONS)
def test_collaborations_cost_what_the_authors_code_costs(drafted: int):
    refiner = Backbone("var_d16")
    spec = Cost(Backbone("var_d30"), 16, 32, 1000, TOKENIZER, refiner, drafted)
    counts = count_declared(spec)
    guided, ratio = COLLABORATIONS[drafted]
    assert round(counts["macs_image_guided"] / 1e9, 2) == guided
    assert round(PUBLISHED["var_d30"][2] / counts["macs_image_guided"], 2) == ratio
    assert counts["params_total"] == 2_320_303_876


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(tokenizer=None), "needs a tokenizer"),
        (dict(size=8), "ends at 4x4 tokens, and not at 8x8"),
        (dict(refiner=Backbone("dit_s_2"), drafted_scales=1), "kind backbone, not autoregressive"),
        (dict(tokenizer=Backbone("dit_s_2")), "kind backbone, not tokenizer"),
        (dict(refiner=tiny(), drafted_scales=3), "drafts 1 to 2 of 3 scales, got 3"),
    ],
)
def test_counts_that_mean_nothing_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        count_declared(tiny_cost(**fields))
