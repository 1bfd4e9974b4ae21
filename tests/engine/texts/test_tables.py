"""A set of captioned images is trained on, sampled from, and refused without its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.captions import CaptionTable
from experiments.engine.data import locate
from experiments.engine.runtime.context import RunContext
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.spec import (
    Backbone,
    Data,
    Diffusion,
    Evaluate,
    Recipe,
    Sampler,
    Train,
)
from experiments.engine.texts.tables import FILE, give_captions, read_table, save_table
from experiments.engine.training.networks import build, load_ema
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer

CPU = torch.device("cpu")
DATA = Data("captioned", size=8, channels=3, num_classes=4, captions="abc")
SHAPE = dict(input_size=8, in_channels=3, num_classes=4, context_tokens=9, context_dim=10)
NETWORK = Backbone("dico_dwc_s_t2i", SHAPE | dict(dim=8, depths=(1, 1, 1, 1, 1)))
SPEC = Train(NETWORK, DATA, Recipe(steps=3, batch=4, lr=1e-3), Diffusion(variance="fixed"))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionTable:
    """Lay down eight images with captions and the table of the captions."""
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    folder = tmp_path / DATA.name
    folder.mkdir()
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.integers(0, 256, (8, 3, 8, 8), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(8) % 4)
    context = torch.randn(5, 9, 10, generator=torch.Generator().manual_seed(0))
    table = CaptionTable(context, encoder="abc")
    save_table(table, folder)
    return table


def test_a_table_comes_back_from_its_file(table: CaptionTable, tmp_path: Path):
    again = read_table(tmp_path / DATA.name)
    assert again.digest() == table.digest()
    assert (again.encoder, again.pooled, again.ids) == ("abc", None, None)


def test_a_training_keeps_the_hash_of_its_captions_and_samples_with_them(
    table: CaptionTable, tmp_path: Path
):
    folder = tmp_path / "run"
    folder.mkdir()
    values = run_training(SPEC, RunContext(folder))
    assert values["captions_sha256"] == table.digest()

    # Only weights are stored, and the averaged network reads the same table.
    model = load_ema(SPEC, folder, CPU)
    assert model.captions.table.digest() == table.digest()
    assert not [name for name in model.state_dict() if "captions" in name]

    # Sampling does the text work once per batch, whatever the steps and the guidance.
    batches: list[int] = []
    work = model.text_work
    model.text_work = lambda text: batches.append(len(text.context)) or work(text)
    spec = Evaluate(SPEC, Sampler(num_steps=4, scale=2.0, channels=None), 6, "digits", "balanced")
    images = torch.cat([x for x, _ in generate_images(spec, CountingModel(model), CPU, 4)])
    assert batches == [5, 3]
    model.text_work = work
    plain = CountingModel(model, capture_steps=True)
    plain.launch = lambda step: step
    uncached = torch.cat([x for x, _ in generate_images(spec, plain, CPU, 4)])
    torch.testing.assert_close(images, uncached, rtol=1e-4, atol=1e-4)


def test_a_dropped_caption_trains_as_the_null_caption(table: CaptionTable):
    losses = []
    for y, dropout in ((torch.tensor([0, 1, 2, 3]), 1.1), (torch.full((4,), 4), 0.0)):
        trainer = Trainer(replace(SPEC, recipe=replace(SPEC.recipe, label_dropout=dropout)))
        torch.nn.init.ones_(trainer.model.final_layer.out_proj.weight)
        losses.append(trainer._update(torch.ones(4, 3, 8, 8), y, flip=False))
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (replace(DATA, captions=""), ["reads captions", "captioned declares none"]),
        (replace(DATA, captions="xyz"), ["encoder abc", "not of xyz"]),
        (replace(DATA, name="elsewhere"), ["elsewhere", "no readable table of captions"]),
    ],
)
def test_a_set_without_the_captions_of_its_network_is_refused_in_a_line(
    table: CaptionTable, data: Data, words: list[str]
):
    with pytest.raises(ValueError) as refusal:
        Trainer(replace(SPEC, data=data))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_damaged_table_is_refused_and_a_network_of_labels_needs_none(
    table: CaptionTable, tmp_path: Path
):
    (tmp_path / DATA.name / FILE).write_bytes(b"no table")
    with pytest.raises(ValueError, match="no readable table of captions"):
        give_captions(build(NETWORK, 0, CPU), DATA)
    shape = dict(input_size=8, in_channels=3, num_classes=4)
    give_captions(build(Backbone("dico_s", shape | dict(dim=8, depths=(1,) * 5)), 0, CPU), DATA)
