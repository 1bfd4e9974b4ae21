"""Stochastic depth as an input of the network, and trainings that start from other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.layers import timestep_sinusoid, unpatchify
from experiments.declared.protocols import DIGITS, IMAGENET256_OWN, PROTOCOLS
from experiments.engine.data.sets import load
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Data, Diffusion, Recipe, Train, spec_id
from experiments.engine.specs.stages import Protocol, evaluate_stage, train_stage
from experiments.engine.training.networks import load_ema
from experiments.engine.training.stochastic_depth import increment_weights
from experiments.engine.training.trainer import Trainer
from experiments.main_results import DIMSUM_L, DIS_H, TABLES
from tests.support.networks import randomise, relative_rms

CPU = torch.device("cpu")
NAMES = ("dis_s_2", "dimsum_l_2")


def network(name: str) -> nn.Module:
    """A network of six blocks, zero nowhere, in float64."""
    shape = dict(input_size=8, in_channels=1, num_classes=5, depth=6)
    return randomise(backbones.build(name, **backbones.tiny_options_of(name) | shape)).double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Three images, their times and their labels."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=draw, dtype=torch.float64)
    return x, torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 3, 5])


def dis_by_sums(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """Compute DiS with the stream as an explicit sum of weighted increments.

    The sum starts with the first block's input, and K increments follow.
    """
    # Label and time are the first two tokens.
    time = model.time_embed(timestep_sinusoid(t, model.pos_embed.shape[-1]).double())
    label = model.label_emb(y)
    tokens = torch.cat([label[:, None], time[:, None], model.patch_embed(x)], dim=1)
    increments = [tokens + model.pos_embed]
    weights = torch.cat([torch.ones(len(x), 1, dtype=kept.dtype), kept], dim=1)

    def stream() -> Tensor:
        return sum(weights[:, k, None, None] * increment for k, increment in enumerate(increments))

    # The first half leaves its increments to the second half.
    skips = []
    half = len(model.in_blocks)
    for k, block in enumerate([*model.in_blocks, model.mid_block, *model.out_blocks]):
        if k > half:
            increments[-1] = block.skip_linear(torch.cat([increments[-1], skips.pop()], dim=-1))
        increments.append(block.mixer(block.norm(stream())))
        if k < half:
            skips.append(increments[-1])
    patches = model.final_layer(model.norm_f(stream()), time + label)[:, 2:]
    return unpatchify(patches, model.grid, model.patch)


def dimsum_by_sums(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """DiMSUM likewise; a block is asked for its answer to a stream that is handed to it whole."""
    increments = [model.x_embedder(x) + model.pos_embed]
    c = model.t_embedder(t) + model.y_embedder(y)
    weights = torch.cat([torch.ones(len(x), 1, dtype=kept.dtype), kept], dim=1)
    for k, block in enumerate(model.blocks):
        stream = sum(weights[:, j, None, None] * part for j, part in enumerate(increments))
        h, _ = block(stream, None, c)
        increments.append(model.attn_block(h, c) if (k + 1) % model.attention_every == 0 else h)
    return unpatchify(model.final_layer(increments[-1], c), model.grid, model.patch)


BySums = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_weights_of_one_change_nothing(name: str):
    model = network(name)
    x, t, y = inputs()
    ones = torch.ones(3, len(model.drop_rates(0.1)), dtype=torch.float64)
    assert torch.equal(model(x, t, y, ones), model(x, t, y))


@pytest.mark.parametrize("name, by_sums", zip(NAMES, (dis_by_sums, dimsum_by_sums), strict=True))
@torch.no_grad()
def test_increments_are_weighed_sample_by_sample(name: str, by_sums: BySums):
    model = network(name)
    x, t, y = inputs()
    kept = increment_weights(model, 0.6, 3, torch.Generator().manual_seed(2)).double()
    assert 0 in kept
    assert kept.max() > 1

    # The stream is float32 or wider, and norms are as wide as the weights.
    out = model(x, t, y, kept)
    assert relative_rms(out, by_sums(model, x, t, y, kept)) < 1e-6

    # A sample alone has the same output.
    alone = model(x[1:2], t[1:2], y[1:2], kept[1:2])
    assert relative_rms(alone[0], out[1]) < 1e-9


@pytest.mark.parametrize(
    "name, count, middle, last",
    [("dis_h_2", 49, 0.1 * 24 / 47, 0.1), ("dimsum_l_2", 15, 0.1 * 7 / 15, 0.1 * 14 / 15)],
)
def test_rates_are_the_authors(name: str, count: int, middle: float, last: float):
    """The largest rate is 0.1, over 48 + 1 blocks of DiS and 16 of DiMSUM.

    The first block adds nothing to drop, and the next drops nothing.
    """
    with torch.device("meta"):
        rates = backbones.build(name).drop_rates(0.1)
    assert len(rates) == count
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[count // 2] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(last)


def test_increments_are_dropped_at_their_rates_and_kept_in_the_mean():
    draw = torch.Generator().manual_seed(0)
    weights = increment_weights(network("dis_s_2"), 0.5, 4000, draw)
    rates = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert (weights.mean(0) - 1).abs().max() < 0.06
    assert ((weights == 0).float().mean(0) - rates).abs().max() < 0.03


def test_a_network_without_stochastic_depth_is_refused():
    with pytest.raises(ValueError, match="DiT has no stochastic depth"):
        increment_weights(backbones.build("dit_s_2", depth=1), 0.1, 2, torch.Generator())


def with_drop_path(spec: Train, rate: float) -> Train:
    return replace(spec, recipe=replace(spec.recipe, drop_path=rate))


def losses(spec: Train, micro_batch: int | None = None) -> list[float]:
    trainer = Trainer(spec, Resources(micro_batch=micro_batch))
    return [loss.item() for loss in trainer.steps(load(spec.data))]


@pytest.mark.parametrize(
    "row", [DIS_H, pytest.param(DIMSUM_L, marks=pytest.mark.slow)], ids=lambda row: row.label
)
def test_training_drops_by_position_however_the_batch_is_cut(row: Row):
    spec = train_stage(row, DIGITS, 0)
    spec = replace(spec, recipe=replace(spec.recipe, steps=2, batch=4))
    plain = losses(spec)
    dropped = losses(with_drop_path(spec, 0.7))
    assert dropped != plain
    assert losses(with_drop_path(spec, 0.7), micro_batch=3) == pytest.approx(dropped, rel=1e-4)

    # What is drawn for it moves no other draw.
    assert losses(with_drop_path(spec, 1e-9)) == plain


@pytest.mark.parametrize("row", [DIS_H, DIMSUM_L], ids=lambda row: row.label)
def test_only_a_papers_own_recipe_drops(row: Row):
    assert train_stage(row, IMAGENET256_OWN, 0).recipe.drop_path == 0.1
    assert train_stage(row, DIGITS, 0).recipe.drop_path == 0


def test_dim_at_512_starts_from_its_256_pixel_model():
    stage = evaluate_stage(TABLES[2].row("DiM-H"), PROTOCOLS["imagenet512_own"], 1)
    first, second = stage.trainings
    assert second is stage.train
    assert first is second.init_from

    # The first training is that of the 256-pixel model, with the same seed.
    assert first.data.name == "imagenet256"
    assert first.backbone.options["input_size"] == 32
    assert first.recipe.steps == 425_000
    assert first.seed == 1

    # The second one is short, on the larger latents.
    assert second.data.name == "imagenet512"
    assert second.recipe.steps == 64_000
    assert second.recipe.lr == 1e-4
    assert second.backbone.options["raster_padding"] is True


@pytest.mark.parametrize("protocol", [DIGITS, PROTOCOLS["imagenet512"]], ids=lambda p: p.name)
def test_under_a_common_recipe_dim_starts_from_nothing(protocol: Protocol):
    stage = evaluate_stage(TABLES[2].row("DiM-H"), protocol, 0)
    assert stage.train.init_from is None


def test_position_embeddings_are_interpolated_and_everything_else_is_kept():
    tiny = backbones.tiny_options_of("dim_h") | dict(in_channels=1, num_classes=5)
    small = randomise(backbones.build("dim_h", **tiny, input_size=6))
    large = backbones.build("dim_h", **tiny, input_size=12, raster_padding=True)
    old = small.state_dict()
    new = large.resized(old)
    large.load_state_dict(new)
    for key, value in old.items():
        if key != "additional_embed":
            assert torch.equal(new[key], value), key

    # The first two tokens are label and time; the others form a grid, whose corners stay.
    assert torch.equal(new["additional_embed"][:, :2], old["additional_embed"][:, :2])
    grid = old["additional_embed"][0, 2:].view(3, 3, -1)
    wide = new["additional_embed"][0, 2:].view(6, 6, -1)
    assert relative_rms(wide[0, 0], grid[0, 0]) < 1e-6
    assert relative_rms(wide[5, 0], grid[2, 0]) < 1e-6

    # A place a quarter of a step from the corner, by hand.
    left = 0.75 * grid[0, 0] + 0.25 * grid[1, 0]
    right = 0.75 * grid[0, 1] + 0.25 * grid[1, 1]
    assert relative_rms(wide[1, 1], 0.75 * left + 0.25 * right) < 1e-6

    # At its own size nothing changes.
    assert torch.equal(large.resized(new)["additional_embed"], new["additional_embed"])


def test_a_training_starts_from_anothers_averaged_weights(tmp_path: Path):
    store = Store(tmp_path)
    network = Backbone("dim_h", dict(dim=20, depth=3, in_channels=1, num_classes=10))
    objective = Diffusion(betas="stable_diffusion", variance="fixed", first_step=1)
    recipe = Recipe(steps=2, batch=4, lr=1e-2, ema=0.5)
    first = Train(network.but(input_size=4), Data("digits", 4, 1, 10), recipe, objective)
    second = Train(
        network.but(input_size=8, raster_padding=True),
        Data("digits", 8, 1, 10),
        replace(recipe, lr=0.0),
        objective,
        init_from=first,
    )

    # Where it starts from is part of its name.
    others = (None, replace(first, seed=1))
    names = {spec_id(replace(second, init_from=other)) for other in others}
    assert len({spec_id(second)} | names) == 3

    # It cannot start before the other one has ended.
    refused = execute(second, store, Resources())
    assert refused.status == "failed"
    assert f"run {spec_id(first)} has no finished checkpoint" in refused.error
    for stage in second.trainings:
        assert execute(stage, store, Resources()).status == "done"

    # With a learning rate of zero, it ends with the weights that it started from.
    start = load_ema(first, store.run_dir(first), CPU)
    end = load_ema(second, store.run_dir(second), CPU)
    expected = end.resized(start.state_dict())
    for key, value in end.state_dict().items():
        assert torch.equal(value, expected[key]), key
