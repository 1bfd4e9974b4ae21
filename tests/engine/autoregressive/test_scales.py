"""Drawing scale by scale: the authors' tokens, caches, CoDe's hand-over, cuts and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.engine.autoregressive.scales import (
    Drawing,
    RaceDraw,
    ScaleSystem,
    draw_images,
    keep_likely,
)
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Sampler
from tests.support.authors import build_like_authors
from tests.support.networks import randomise
from tests.support.scales import CASES, InverseDraw, error_of

SIDES = (1, 2, 3, 4)
SHAPE = dict(sides=SIDES, vocabulary=40, channels=6)
TRANSFORMERS = [name for name in CASES if name.startswith("var")]
COLLABORATIONS = [name for name in CASES if name.startswith("code")]


def network(seed: int = 0, **options: Any) -> nn.Module:
    tiny = dict(num_classes=6, depth=2, dim=24, heads=3)
    return randomise(backbones.build("var_d16", **SHAPE | tiny | options), seed)


def tokenizer(**options: Any) -> nn.Module:
    tiny = backbones.tiny_options_of("vqvae_ch160")
    return randomise(backbones.build("vqvae_ch160", **tiny | SHAPE | options), seed=5)


def sampler_of(case: dict[str, Any]) -> Sampler:
    top_k = case["top_k"] if isinstance(case["top_k"], list) else [case["top_k"]]
    temperatures = tuple(case.get("temperature", ()))
    return Sampler(
        "scales",
        scale=1 + case["cfg"],
        top_k=tuple(top_k),
        top_p=case["top_p"],
        temperatures=temperatures,
    )


def tokens_of(drawing: Drawing) -> Tensor:
    return torch.cat(drawing.tokens, dim=1)


# ---- The authors' numbers


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_tokens_and_features_are_those_of_the_authors_code(name: str):
    case = CASES[name]
    coder = build_like_authors(CASES[case["tokenizer"]])
    system = ScaleSystem(build_like_authors(case), coder)
    y = torch.tensor(case["y_sampled"])

    drawing = draw_images(
        system, sampler_of(case), y, InverseDraw(case["uniforms_seed"], coder.sides, len(y))
    )
    assert error_of(case, "tokens", tokens_of(drawing)) == 0
    assert error_of(case, "fhat", drawing.features) < case["tolerance"]
    if "image_every_8th_pixel" in case["outputs"]:
        image = (coder.decode(drawing.features) + 1)[:, :, ::8, ::8] / 2
        assert error_of(case, "image_every_8th_pixel", image) < case["image_tolerance"]


@pytest.mark.parametrize("name", ["var", "var_shared"])
@torch.no_grad()
def test_guided_logits_are_those_of_the_authors_code(name: str):
    """Their tokens are replayed without cuts, so that what is drawn from is guided alone."""
    case = CASES[name]
    coder = build_like_authors(CASES[case["tokenizer"]])
    tokens = torch.tensor(case["outputs"]["tokens"]["values"]).view(2, -1).split(coder.lengths, 1)
    seen = []

    def replay(logits: Tensor, scale: int) -> Tensor:
        seen.append(logits)
        return tokens[scale]

    sampler = Sampler("scales", scale=1 + case["cfg"])
    system = ScaleSystem(build_like_authors(case), coder)
    draw_images(system, sampler, torch.tensor(case["y_sampled"]), replay)
    assert error_of(case, "guided", torch.cat(seen, dim=1)) < case["tolerance"]


@pytest.mark.parametrize("name", COLLABORATIONS)
@torch.no_grad()
def test_collaboration_draws_the_tokens_of_the_authors_code(name: str):
    case = CASES[name]
    drafter, refiner, coder = (
        build_like_authors(case[part]) for part in ("drafter", "refiner", "tokenizer")
    )
    parameters = [sum(p.numel() for p in part.parameters()) for part in (drafter, refiner)]
    assert parameters == case["params"]

    drafted = case["drafted_scales"]
    system = ScaleSystem(drafter, coder, refiner, drafted)
    y = torch.tensor(case["y_sampled"])
    draw = InverseDraw(case["uniforms_seed"], coder.sides, len(y))
    drawing = draw_images(system, sampler_of(case), y, draw)
    assert error_of(case, "tokens", tokens_of(drawing)) == 0
    assert error_of(case, "fhat", drawing.features) < case["tolerance"]

    parts = [coder.contribution(scale, drawing.tokens[scale]) for scale in range(drafted)]
    assert error_of(case, "drafted_fhat", sum(parts)) < case["tolerance"]


# ---- Caches and the hand-over


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_cached_sampling_equals_uncached_sampling_token_for_token(guidance: float, shared: bool):
    """Uncached, every scale has a pass over all tokens of its own, with the mask of training."""
    model, coder = network(shared_adaln=shared), tokenizer()
    y = torch.tensor([0, 3, 5])
    sampler = Sampler("scales", scale=guidance, top_k=(12,), top_p=0.9)
    cached = draw_images(ScaleSystem(model, coder), sampler, y, RaceDraw([1, 2, 3]))

    draw, tokens = RaceDraw([1, 2, 3]), torch.zeros(3, sum(model.lengths), dtype=torch.long)
    for scale, length in enumerate(model.lengths):
        first = sum(model.lengths[:scale])
        inputs = coder.inputs(tokens)
        weight = (guidance - 1) * scale / 3
        null = model(torch.full_like(y, 6), inputs)
        logits = ((1 + weight) * model(y, inputs) - weight * null)[:, first : first + length]
        tokens[:, first : first + length] = draw(keep_likely(logits, 12, 0.9), scale)
    assert torch.equal(tokens_of(cached), tokens)
    assert len(tokens.unique()) > 5


@pytest.mark.parametrize("drafted", [1, 2, 3])
@torch.no_grad()
def test_collaboration_of_a_network_with_itself_is_that_network(drafted: int):
    model, coder = network(), tokenizer()
    y = torch.tensor([0, 3])
    sampler = Sampler("scales", scale=2.5, top_k=(12,), top_p=0.9)
    alone = draw_images(ScaleSystem(model, coder), sampler, y, RaceDraw([4, 5]))
    shared = draw_images(ScaleSystem(model, coder, model, drafted), sampler, y, RaceDraw([4, 5]))
    assert torch.equal(tokens_of(alone), tokens_of(shared))
    torch.testing.assert_close(alone.features, shared.features)

    # Another network takes over where it should, and not before.
    other = network(seed=1, dim=12, depth=1)
    mixed = draw_images(ScaleSystem(model, coder, other, drafted), sampler, y, RaceDraw([4, 5]))
    same = [torch.equal(a, b) for a, b in zip(alone.tokens, mixed.tokens, strict=True)]
    assert all(same[:drafted]) and not all(same)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    model, coder = network(), tokenizer()
    y = torch.tensor([0, 3, 5])
    sampler = Sampler("scales", scale=2.0)
    together = draw_images(ScaleSystem(model, coder), sampler, y, RaceDraw([1, 2, 3]))
    alone = draw_images(ScaleSystem(model, coder), sampler, y[1:2], RaceDraw([2]))
    assert torch.equal(tokens_of(together)[1:2], tokens_of(alone))
    other = draw_images(ScaleSystem(model, coder), sampler, y, RaceDraw([1, 7, 3]))
    same = [torch.equal(*pair) for pair in zip(tokens_of(together), tokens_of(other), strict=True)]
    assert same == [True, False, True]


# ---- Choosing tokens


def test_tokens_of_one_image_are_those_of_torchs_multinomial():
    """The same law, and with a generator in the same state the same bits."""
    logits = 2 * torch.randn(1, 50, 40, generator=torch.Generator().manual_seed(3))
    drawn = RaceDraw([9])(logits, 2)
    generator = generator_at("tokens", 9, 2)
    expected = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)[:, 0]
    assert torch.equal(drawn[0], expected)
    assert not torch.equal(RaceDraw([9])(logits, 1), drawn)


def test_a_token_that_was_cut_is_never_drawn():
    logits = keep_likely(torch.zeros(1, 500, 4) + torch.tensor([0.0, 1.0, 2.0, 3.0]), 2, 0.0)
    drawn = RaceDraw([1])(logits, 0)
    counts = torch.bincount(drawn[0], minlength=4)
    assert counts[:2].tolist() == [0, 0]
    assert counts[3].item() / 500 == pytest.approx(0.731, abs=0.06)


def test_cuts_keep_what_a_loop_keeps():
    """The least likely go while they sum to 1 - p."""
    logits = 2 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(3))
    for top_k, top_p in ((7, 0.0), (0, 0.8), (7, 0.8), (0, 0.0), (100, 1.0)):
        kept = keep_likely(logits, top_k, top_p).isfinite().flatten(0, 1)
        for row, mask in zip(logits.flatten(0, 1).tolist(), kept.tolist(), strict=True):
            assert mask == keep_by_loop(row, top_k, top_p)


def test_ties_with_the_least_of_the_largest_stay():
    kept = keep_likely(torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0, 2.0]), 3, 0.0)
    assert kept.isfinite().tolist() == [True, True, True, False, True, True]


def keep_by_loop(row: list[float], top_k: int, top_p: float) -> list[bool]:
    least = sorted(row, reverse=True)[: top_k or len(row)][-1]
    left = {index: value for index, value in enumerate(row) if value >= least}
    if top_p:
        total = sum(torch.tensor(list(left.values())).double().exp())
        rising = sorted(left, key=lambda index: left[index])
        gone = 0.0
        for index in rising[:-1]:
            gone += torch.tensor(left[index]).double().exp() / total
            if gone > 1 - top_p:
                break
            del left[index]
    return [index in left for index in range(len(row))]


# ---- Refusals


@pytest.mark.parametrize("drafted", [0, 4, -1])
def test_drafted_scales_out_of_range_are_refused(drafted: int):
    model = network()
    with pytest.raises(ValueError, match=f"drafts 1 to 3 of 4 scales, got {drafted}") as refusal:
        ScaleSystem(model, tokenizer(), model, drafted)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vocabulary=41), "40 codes and the tokenizer 41"),
        (dict(channels=5), "6 channels of a code and the tokenizer 5"),
        (dict(sides=(1, 2, 4)), r"sides of scales and the tokenizer \(1, 2, 4\)"),
    ],
)
def test_a_tokenizer_of_other_tokens_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words) as refusal:
        ScaleSystem(network(), tokenizer(**options))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(top_k=(9, 9)), "top_k takes one number for all scales, or one for each of 4, got 2"),
        (dict(temperatures=(1.0,) * 5), "temperatures takes one number"),
        (dict(top_k=(-1,)), "top_k must be at least 0"),
        (dict(temperatures=(0.0,)), "temperatures above 0"),
        (dict(top_p=1.5), "from 0 to 1, got 1.5"),
    ],
)
def test_impossible_samplers_are_refused(options: dict[str, Any], words: str):
    system = ScaleSystem(network(), tokenizer())
    with pytest.raises(ValueError, match=words):
        draw_images(system, Sampler("scales", **options), torch.tensor([0]), RaceDraw([1]))
