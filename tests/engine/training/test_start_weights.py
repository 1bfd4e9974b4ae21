"""Trainings that start from a file: what is kept, drawn, computed anew and interpolated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import backbones
from backbones.diffusers_format import write_pipeline
from backbones.dit import DiT
from experiments.declared.protocols import DIGITS
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.records.weight_files import own_weights, require_weights
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train, spec_id
from experiments.engine.specs.stages import train_stage
from experiments.engine.specs.weights import Weights
from experiments.engine.training.networks import build, load_ema
from tests.support.networks import randomise
from tests.support.trainings import CPU

TINY = dict(in_channels=1, dim=24, depth=2, heads=3)
DIT = Backbone("dit_s_2", TINY | dict(input_size=8, num_classes=10))
# With a learning rate of zero, a training ends with the weights that it started from.
STILL = Recipe(steps=2, batch=4, lr=0.0, ema=0.5)
TABLE = "y_embedder.embedding_table.weight"


def network(name: str = "dit_s_2", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(backbones.build(name, **TINY | dict(input_size=8, num_classes=10) | options))


def write(path: Path, model: nn.Module) -> Path:
    torch.save({"ema": model.state_dict()}, path)
    return path


def training(start: Weights, backbone: Backbone = DIT, num_classes: int = 10) -> Train:
    size = backbone.options["input_size"]
    data = Data("digits", size, 1, num_classes)
    return Train(backbone, data, STILL, init_from=start)


def run(spec: Train, root: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights at the end of a training, and what its record says of the start."""
    store = Store(root)
    record = execute(spec, store, Resources())
    assert record.status == "done", record.error
    return load_ema(spec, store.run_dir(spec), CPU).state_dict(), record.values["start"]


def test_a_training_starts_from_a_file_and_its_record_says_so(tmp_path: Path):
    model = network()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    start = own_weights(tmp_path / "net.safetensors")
    weights, said = run(training(start), tmp_path / "results")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())

    # All of the network came from the file.
    total = sum(p.numel() for p in model.parameters())
    assert said["sha256"] == start.sha256
    assert (said["parameters"], said["parameters_from_file"]) == (total, total)
    assert said["tensors_kept"] == len(weights)
    assert not said["redrawn"] + said["recomputed"] + said["interpolated"] + said["warnings"]


def test_a_resumed_training_still_says_where_it_started(tmp_path: Path):
    spec = training(own_weights(write(tmp_path / "net.pt", network())))
    first = replace(spec, recipe=replace(STILL, steps=1))
    store = Store(tmp_path / "results")
    assert execute(first, store, Resources()).status == "done"

    # The longer training finds the shorter one's checkpoint in its folder, and the file is gone.
    store.run_dir(first).rename(store.run_dir(spec))
    (tmp_path / "net.pt").unlink()
    assert run(spec, tmp_path / "results")[1]["key"] == "ema"


@pytest.mark.parametrize("labels", ["keep", "redraw"])
def test_another_number_of_classes_keeps_or_redraws_the_table(labels: str, tmp_path: Path):
    model = network(num_classes=13)
    old = model.state_dict()[TABLE]
    start = own_weights(write(tmp_path / "net.pt", model), labels=labels)
    weights, said = run(training(start), tmp_path / "results")

    # The network as it would be drawn without a file.
    drawn = build(DIT, 0, CPU).state_dict()[TABLE]
    if labels == "keep":
        expected = torch.cat([old[:10], old[13:]])
        assert said["label_rows_kept"] == {TABLE: 11}
    else:
        expected = drawn
        assert said["redrawn"] == [TABLE]
    assert torch.equal(weights[TABLE], expected)
    left = 0 if labels == "keep" else drawn.numel()
    assert said["parameters"] - said["parameters_from_file"] == left


def test_rows_of_further_classes_are_drawn(tmp_path: Path):
    old = network(num_classes=4).state_dict()
    model = network(num_classes=10)
    drawn = model.state_dict()[TABLE].clone()
    result = backbones.Fit()
    table = backbones.fit(model, old, backbones.Labels.KEEP, "net.pt", result)[TABLE]
    assert torch.equal(table[:4], old[TABLE][:4])
    assert torch.equal(table[4:10], drawn[4:10])
    assert torch.equal(table[10], old[TABLE][4])
    assert result.num_parameters - result.num_from_file == 6 * 24


def test_a_network_without_classes_leaves_the_table_out(tmp_path: Path):
    path = write(tmp_path / "net.pt", network())
    free = network(num_classes=0)
    with pytest.raises(ValueError, match="has a label table and this network has none; a training"):
        backbones.load_fitted(free, path)
    assert backbones.load_fitted(free, path, labels=backbones.Labels.REDRAW).redrawn == [TABLE]

    # The way back draws one.
    write(path, free)
    with pytest.raises(
        ValueError, match="has no label table .* and this network has 10; a training"
    ):
        backbones.load_fitted(network(), path)
    assert backbones.load_fitted(network(), path, labels=backbones.Labels.REDRAW).redrawn == [TABLE]


def test_another_size_computes_a_sinusoidal_table_anew(tmp_path: Path):
    start = own_weights(write(tmp_path / "net.pt", network(input_size=6)))
    weights, said = run(training(start), tmp_path / "results")
    assert torch.equal(weights["pos_embed"], network().state_dict()["pos_embed"])
    assert said["recomputed"] == ["pos_embed"]
    assert said["interpolated"] == []


def interpolated(grid: Tensor, side: int) -> Tensor:
    """A grid (g, g, D) at another side, place by place: half-pixel centres, clamped at the edge."""
    old = len(grid)
    result = torch.empty(side, side, grid.shape[-1])
    for row in range(side):
        for column in range(side):
            value = torch.zeros(grid.shape[-1])
            y, x = ((place + 0.5) * old / side - 0.5 for place in (row, column))
            for i in range(old):
                for j in range(old):
                    high, wide = min(max(y, 0.0), old - 1.0), min(max(x, 0.0), old - 1.0)
                    weight = max(0.0, 1 - abs(high - i)) * max(0.0, 1 - abs(wide - j))
                    value += weight * grid[i, j]
            result[row, column] = value
    return result


LEARNED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "uvit_l_2": (dict(dim=24, depth=4, heads=3), {"pos_embed": 2}),
    "uvit_s_2_t2i": (
        dict(dim=24, depth=4, heads=3, context_tokens=5, context_dim=10),
        {"pos_embed": 6},
    ),
    "dis_s_2": (dict(dim=20, depth=2), {"pos_embed": 2}),
    "dimsum_l_2": (
        dict(dim=24, depth=4, heads=3, fusion_heads=3, attention_every=2),
        {"pos_embed": 0},
    ),
    "dimr_xl_2r": (
        {},
        {f"stages.{i}.input_layer.3.position_embeddings.weight": 0 for i in (0, 1)},
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_positions_are_interpolated(name: str):
    options, tables = LEARNED[name]
    options = backbones.tiny_options_of(name) | options | dict(in_channels=1, num_classes=5)
    old = randomise(backbones.build(name, **options, input_size=8)).state_dict()
    model = backbones.build(name, **options, input_size=16)
    result = backbones.Fit()
    new = backbones.fit(model, old, backbones.Labels.SAME, "net.pt", result)
    model.load_state_dict(new)

    # Leading rows stay, and the others are a grid.
    assert result.interpolated == list(tables)
    for table, leading in tables.items():
        before, after = old[table].view(-1, old[table].shape[-1]), new[table]
        after = after.view(-1, after.shape[-1])
        assert torch.equal(after[:leading], before[:leading])
        side = round((len(before) - leading) ** 0.5)
        expected = interpolated(before[leading:].view(side, side, -1), 2 * side).flatten(0, 1)
        torch.testing.assert_close(after[leading:], expected, rtol=1e-5, atol=1e-6)


def test_a_folder_of_diffusers_starts_the_network_that_it_was_trained_as(tmp_path: Path):
    trained_there = dict(time_divisor=127, mlp_norm_eps=1e-5)
    model = network(**trained_there)
    assert isinstance(model, DiT)
    write_pipeline(model, tmp_path / "folder")
    start = own_weights(tmp_path / "folder")
    assert own_weights(tmp_path / "folder" / "transformer") == start
    weights, _ = run(training(start, DIT.but(**trained_there)), tmp_path / "results")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())

    # Nothing but the folder knows that it computes otherwise.
    for options, message in (
        ({}, "folder was trained with time_divisor=127, mlp_norm_eps=1e-05; declare this of the"),
        (dict(heads=2, **trained_there), "folder was trained with heads=3; declare"),
    ):
        with pytest.raises(ValueError, match=message):
            backbones.load_fitted(network(**options), tmp_path / "folder")
    with pytest.raises(
        ValueError, match="holds a DiTTransformer2DModel, which is not read into UViT"
    ):
        backbones.load_fitted(network("uvit_l_2"), tmp_path / "folder")


# ---- What a start is refused for


OTHER = {
    "another family": (dict(), "uvit_l_2", "is a checkpoint of another model"),
    "another width": (dict(dim=12), "dit_s_2", "is a checkpoint of another model"),
    "other classes": (dict(num_classes=13), "dit_s_2", "net.pt has 13 classes and this network"),
}


@pytest.mark.parametrize("options, name, message", OTHER.values(), ids=OTHER)
def test_weights_that_do_not_fit_are_refused_in_a_line(
    options: dict[str, int], name: str, message: str, tmp_path: Path
):
    spec = training(own_weights(write(tmp_path / "net.pt", network(name, **options))))
    store = Store(tmp_path / "results")
    record = execute(spec, store, Resources())
    assert record.status == "failed"
    assert message in str(record.error)
    assert "\n" not in str(record.error)
    assert not list(store.run_dir(spec).glob("checkpoints/*"))


def test_a_file_that_is_not_what_was_declared_is_refused(tmp_path: Path):
    path = write(tmp_path / "net.pt", network())
    with pytest.raises(ValueError, match="no such checkpoint"):
        own_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, and 00 is declared"):
        own_weights(path, sha256="00")
    with pytest.raises(ValueError, match="unknown labels 'new' of weights; known: same, keep, "):
        own_weights(path, labels="new")
    with pytest.raises(ValueError, match="which no study of this process declares"):
        require_weights("0" * 64)

    # The file changes after its declaration.
    start = own_weights(path)
    assert require_weights(start.sha256) == path
    write(path, network(num_classes=3))
    with pytest.raises(ValueError, match=r"the content of .*net\.pt has changed"):
        require_weights(start.sha256)


# ---- What names it


def test_content_names_a_start_and_its_path_does_not(tmp_path: Path):
    path = write(tmp_path / "net.pt", network())
    start = own_weights(path)
    path.rename(tmp_path / "other.pt")
    assert own_weights(tmp_path / "other.pt") == start

    # The key and what becomes of the labels decide weights as the content does.
    others = (start, replace(start, key="model"), replace(start, labels="keep"), None)
    assert len({spec_id(training(other)) for other in others}) == len(others)


def test_a_row_starts_from_a_file_under_a_common_recipe():
    start = Weights("0" * 64)
    row = Row("DiT", Backbone("dit_s_2"), start=start)
    stage = train_stage(row, DIGITS, 1)
    assert stage.init_from is start
    assert stage.trainings == (stage,)
    assert replace(stage, init_from=None) == train_stage(replace(row, start=None), DIGITS, 1)
