"""The probe of a caption's tokens: whose maps lie where, against loops and attention by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.figures import captions as figures
from analysis.probes.__main__ import main
from analysis.probes.captioned import tokens
from analysis.probes.declared import Tokens, arrays_of, declared
from backbones import dico_text
from experiments.declared.protocols import DIGITS, DIGITS_TEXT
from experiments.engine.data.captioned import grammar
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Train, spec_id
from experiments.engine.texts.tables import give_captions
from experiments.engine.training import checkpoint
from experiments.engine.training.networks import build
from experiments.text_to_image import TABLE_V2_3

CPU = torch.device("cpu")
CROSS = TABLE_V2_3.row("DiCo-CrossAttn")
UNET = TABLE_V2_3.row("SD 1.x")
OPTIONS = ("--table", "v2-3", "--protocol", "digits_text", "--images", "12", "--steps", "2")


def training(row: Row) -> Train:
    return declared("tokens", row, DIGITS_TEXT, 0).train


def network(row: Row) -> nn.Module:
    """A network with the captions of digits, whose weights are all drawn."""
    model = build(training(row).backbone, 0, CPU)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    give_captions(model, DIGITS_TEXT.data)
    return model.eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with finished runs of two networks, which have random weights."""
    root = tmp_path_factory.mktemp("results")
    for row in (CROSS, UNET):
        spec = training(row)
        folder = Store(root).run_dir(spec) / "checkpoints"
        checkpoint.save(folder, spec.recipe.steps, {"ema": network(row).state_dict()})
    return root


def test_digits_have_the_places_of_their_words_and_cells():
    captions = grammar.captions_of(grammar.NAME)
    named = tokens.named_digits((captions[7], captions[82], captions[182]))
    assert [captions[place].text for place in (7, 82, 182)] == [
        "a seven",
        "a seven left of a two",
        "a seven above a two",
    ]
    assert [(each.image, each.token) for each in named] == [(0, 2), (1, 2), (1, 6), (2, 2), (2, 5)]
    assert named[0].other is None
    assert (named[1].corner, named[1].other) == (grammar.LEFT, grammar.RIGHT)
    assert (named[2].corner, named[2].other) == (grammar.RIGHT, grammar.LEFT)
    assert (named[4].corner, named[4].other) == (grammar.BOTTOM, grammar.TOP)


@pytest.mark.parametrize("grid", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("corner", [grammar.LEFT, grammar.MIDDLE, grammar.BOTTOM])
def test_the_share_of_a_cell_is_that_of_its_pixels(grid: int, corner: tuple[int, int]):
    maps = torch.rand(3, grid, grid, generator=torch.Generator().manual_seed(grid))
    pixels = maps.repeat_interleave(16 // grid, 1).repeat_interleave(16 // grid, 2)
    row, column = corner
    cell = pixels[:, row : row + 8, column : column + 8].sum((1, 2)) / pixels.sum((1, 2))
    masks = tokens.cell_mask((grid, grid), corner).expand(3, grid, grid)
    torch.testing.assert_close(tokens.share_of_cells(maps, masks), cell)
    torch.testing.assert_close(masks.mean(), torch.tensor(0.25))
    with pytest.raises(ValueError, match="no weight at any place"):
        tokens.share_of_cells(maps * torch.tensor([1.0, 0.0, 1.0])[:, None, None], masks)


def softmax_by_hand(module: dico_text.CrossAttention, x: Tensor, keys_values: Tensor) -> Tensor:
    """Return the weights (N, h, T, L) of a layer, head by head."""
    heads, width = module.heads, x.shape[1] // module.heads
    q = module.q_linear(x.flatten(2).transpose(1, 2))
    k = keys_values.chunk(2, dim=-1)[0]
    weights = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights.append((q[..., part] @ k[..., part].mT / width**0.5).softmax(-1))
    return torch.stack(weights, 1)


def test_maps_are_the_weights_of_every_token():
    model = network(CROSS)
    captions = grammar.captions_of(grammar.NAME)[:12]
    probe = tokens.TokensProbe(model, captions, [7, 11])
    inputs: list[tuple[Tensor, Tensor]] = []
    layer = model.latent[0].text
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    x = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    for t in (900.0, 100.0):
        predicted = probe(x, torch.full((12,), t), torch.arange(12))
    hook.remove()
    unwatched = model(x, torch.full((12,), t), torch.arange(12))
    torch.testing.assert_close(predicted, unwatched, rtol=1e-4, atol=1e-4)

    # The maps of two steps, by hand.
    arrays = probe.arrays()
    (number,) = [n for n in range(5) if str(arrays[f"layer_{n}"]) == "latent.0.text"]
    by_hand = torch.stack([softmax_by_hand(layer, *args).mean(1) for args in inputs])
    maps = by_hand.mT.unflatten(3, (4, 4))  # (S, N, L, H, W)
    kept = torch.from_numpy(arrays[f"maps_{number}"]).float()
    torch.testing.assert_close(kept, maps.mean(0)[[7, 11]], rtol=1e-3, atol=1e-3)
    assert torch.allclose(maps.sum(2), torch.ones(()), atol=1e-5)

    # Caption 10 is "a zero left of a zero", whose first word lies in the four left columns of 8.
    own = arrays[f"own_{number}"]
    first = maps[:, 10, 2]
    np.testing.assert_allclose(own[:, 10], _share(first, slice(1, 3), slice(0, 2)), rtol=1e-4)
    other = arrays[f"other_{number}"]
    np.testing.assert_allclose(other[:, 10], _share(first, slice(1, 3), slice(2, 4)), rtol=1e-4)
    assert np.isnan(other[:, :10]).all()


def _share(maps: Tensor, rows: slice, columns: slice) -> np.ndarray:
    return (maps[:, rows, columns].sum((1, 2)) / maps.sum((1, 2))).detach().numpy()


def test_a_network_that_reads_every_word_from_its_cell_is_found_right():
    named = tokens.named_digits(grammar.captions_of(grammar.NAME)[10:12])
    assert len(named) == 4
    arrays = {
        "groups": np.array([digit.group for digit in named]),
        "layer_0": np.array("a"),
        "own_0": np.array([[0.7, 0.8, 0.6, 0.1]]),
        "other_0": np.array([[0.1, 0.1, 0.2, 0.3]]),
    }
    values = tokens.summarise(arrays)
    assert (values["own"], values["other"], values["right"]) == (0.55, 0.175, 0.75)
    assert values["layers"]["a"]["right"] == 0.75
    assert values["uniform"] == 0.25
    # "a zero left of a one" is held out.
    assert values["right_held_out"] == 0.5


def test_the_command_records_both_kinds_of_networks_and_figures_draw_them(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = ("--rows", CROSS.label, UNET.label)
    assert main(["tokens", *OPTIONS, *rows, "--results", str(results)]) == 0
    records = [record for record in Store(results).here.all() if record.kind == "tokens"]
    assert len(records) == 2
    for record in records:
        assert set(record.values) >= {"own", "other", "right", "right_held_out", "uniform"}
        assert all(0 < layer["own"] < 1 for layer in record.values["layers"].values())
        arrays = arrays_of(Store(results).here, record)
        assert arrays["shown"].tolist() == [7]
        assert arrays["weight_0"].shape == (2, 9)
        np.testing.assert_allclose(arrays["weight_0"].sum(1), 1, rtol=1e-5)
    capsys.readouterr()
    assert main(["tokens", *OPTIONS, *rows, "--results", str(results)]) == 0
    assert capsys.readouterr().out.count("done before") == 2

    # The figures take the probe's own settings, under which nothing is recorded here.
    folder = shutil.copytree(results, tmp_path / "copy")
    store = Store(folder)
    for row, record in zip((CROSS, UNET), records, strict=True):
        spec = declared("tokens", row, DIGITS_TEXT, 0)
        store.append(spec, "done", record.values, record.provenance)
    (folder / "records").rename(folder / "reference")
    drawn = Store(folder, folder / "reference")
    maps = figures.caption_maps(drawn)
    titles = [panel.get_title().partition(" ")[0] for panel in maps.axes[:3]]
    assert titles == ["[begin]", "a", "seven"]
    cells = figures.caption_cells(drawn)
    assert [line.get_label() for line in cells.axes[1].lines[:2]] == [CROSS.label, UNET.label]


def test_what_cannot_be_probed_is_one_line(results: Path, capsys: pytest.CaptureFixture[str]):
    dwc = network(TABLE_V2_3.row("DiCo-DWC"))
    with pytest.raises(ValueError, match="no cross-attention to its caption"):
        tokens.text_layers(dwc)
    spec = declared("tokens", CROSS, DIGITS, 0)
    with pytest.raises(ValueError, match="choose --protocol digits_text"):
        tokens.probe(dwc, spec, lambda probe: None)
    assert main(["tokens", *OPTIONS[:-4], "--images", "5", "--results", str(results)]) == 2
    assert "not trained here" in capsys.readouterr().err
    row = ("--rows", CROSS.label, "--images", "5")
    assert main(["tokens", *OPTIONS[:-4], *row, "--results", str(results)]) == 2
    assert "--images takes 11 to 210, not 5" in capsys.readouterr().err


def test_the_probe_has_an_id_of_its_own_and_others_keep_theirs():
    spec = declared("tokens", CROSS, DIGITS_TEXT, 0)
    assert isinstance(spec, Tokens)
    others = {spec_id(declared(name, CROSS, DIGITS_TEXT, 0)) for name in ("channels", "features")}
    assert spec_id(spec) not in others
    assert spec_id(replace(spec, shown=(7,))) != spec_id(spec)
