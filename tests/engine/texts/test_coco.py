"""MS-COCO's path on a few pictures: captions and latents are prepared, trained on and scored."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import prepare, text_to_image
from experiments.declared.protocols import COCO256, COCO256_REPA, COCO256_UVIT
from experiments.engine.cli import run_command, run_table
from experiments.engine.data import locate
from experiments.engine.data.captioned.pictures import CaptionedLatents, captions_folder, read_index
from experiments.engine.data.pictures import Crop
from experiments.engine.data.sets import load
from experiments.engine.records.comparison import incomparable
from experiments.engine.runtime.context import RunContext
from experiments.engine.sampling.generate import labels_of
from experiments.engine.scoring import reference
from experiments.engine.scoring import stage as scoring
from experiments.engine.scoring.files.folders import open_images
from experiments.engine.scoring.files.references import write_reference
from experiments.engine.scoring.reference import Layer
from experiments.engine.specs.spec import Backbone, Data, Evaluate, Train
from experiments.engine.texts.encoder import load_text_encoder
from experiments.engine.texts.states import MappedStates
from experiments.engine.texts.tables import give_captions, table_of
from experiments.engine.training.networks import build
from experiments.engine.training.stage import run_training
from tests.support.coco import (
    CONFIG,
    NUM_CAPTIONS,
    TRAIN,
    VALIDATION,
    write_annotations,
    write_encoder,
    write_images,
)
from tests.support.extractors import Grey
from tests.support.latent_sets import write_vae

CPU = torch.device("cpu")
SIDE = 8  # of the latents of 64 pixels
SHAPE = dict(input_size=SIDE, in_channels=4, num_classes=NUM_CAPTIONS, context_dim=12)
NETWORK = Backbone("dico_cross_s_t2i", SHAPE | dict(context_tokens=9, dim=8, depths=(1,) * 5))
NETWORK = NETWORK.but(head_dim=8)
SOURCES = "--train train.json --validation val.json --encoder clip"


class Tree:
    """A folder of sources, in which the command runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setattr(locate, "ROOT", folder / "data")
        write_annotations(folder / "train.json", TRAIN)
        write_annotations(folder / "val.json", VALIDATION)
        write_images(folder / "train", TRAIN)
        write_images(folder / "val", VALIDATION)
        self.encoder = load_text_encoder(write_encoder(folder / "clip"))

    def prepare(self, line: str) -> int:
        """Run the command that prepares data."""
        self.monkeypatch.setattr(sys, "argv", ["prepare.py", *line.split(), "--device", "cpu"])
        return prepare.main()

    def declare(self) -> dict[str, Data]:
        """Declare both protocols for the few captions, the small encoder and a small VAE."""
        vae = write_vae(self.folder / "vae")
        self.monkeypatch.setenv("DICO_VAE", str(vae))
        from experiments.engine.data.autoencoder import load_autoencoder

        changes = dict(
            size=SIDE,
            num_classes=NUM_CAPTIONS,
            captions=self.encoder.name,
            vae=load_autoencoder(str(vae)).encoder,
        )
        protocols = {
            name: replace(protocol, data=replace(protocol.data, **changes))
            for name, protocol in COCO256.items()
        }
        self.monkeypatch.setattr(prepare, "LATENT_PROTOCOLS", protocols)
        return {name: protocol.data for name, protocol in protocols.items()}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


def test_captions_become_states_that_a_stopped_run_goes_on_with(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert tree.prepare(f"captions {SOURCES}") == 0
    printed = capsys.readouterr().out
    assert "15 captions of 4 images that are trained on and 3 that are scored" in printed
    assert "has 616767 captions" in printed
    assert f"Data(captions={tree.encoder.name!r})" in printed

    # Captions of a picture follow each other, pictures are sorted, and the last row is the null.
    index = read_index()
    assert index.images == ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "v0.jpg", "v1.jpg", "v2.jpg")
    assert index.starts.tolist() == [0, 2, 5, 7, 9, 11, 13, 15]
    texts = (captions_folder() / "texts.txt").read_text().splitlines()
    assert texts[:3] == ["the dog", "a dog at a cat", "a red cat"]
    states = MappedStates(captions_folder())
    assert states.shape == (16, 9, 12)
    y = torch.tensor([15, 1, 4])
    expected = tree.encoder.states(["", texts[1], texts[4]], batch=1)
    torch.testing.assert_close(states.take(y).float(), expected, rtol=2e-3, atol=2e-3)

    # What a stopped run has done stays, and the rest is as it would have been.
    before = {path.name: path.read_bytes() for path in captions_folder().glob("shard*")}
    (captions_folder() / "manifest.json").unlink()
    (captions_folder() / "shard-00000.json").unlink()
    assert tree.prepare(f"captions {SOURCES}") == 0
    assert before == {path.name: path.read_bytes() for path in captions_folder().glob("shard*")}

    # Another encoder does not fill up this folder.
    write_encoder(tree.folder / "other", seed=1)
    assert tree.prepare(f"captions {SOURCES}".replace("clip", "other")) == 2
    assert "is being filled otherwise" in capsys.readouterr().err


def test_latents_are_cropped_by_the_rule_and_a_visit_draws_a_caption(tree: Tree):
    data = tree.declare()["coco256_uvit"]
    with pytest.raises(ValueError, match=r"lacks captions .*prepare.py captions .*; and latents"):
        load(data)
    assert tree.prepare(f"captions {SOURCES}") == 0
    with pytest.raises(ValueError, match="prepare.py latents --protocol coco256_uvit") as refusal:
        load(data)
    assert "lacks captions" not in str(refusal.value)

    line = "latents --protocol coco256_uvit --images train --vae vae --reconstructions 0"
    assert tree.prepare(line) == 0
    latents = load(data)
    assert isinstance(latents, CaptionedLatents)
    assert latents.manifest["crop"] == Crop.SQUARE.value
    assert latents.manifest["vae"]["scale"] == 0.2301
    assert len(latents) == 4

    # Every caption of a picture is drawn, and no other one.
    indices = torch.arange(4).repeat(50)
    _, y = latents.take(indices, 0, torch.arange(200))
    for picture, (first, end) in enumerate([(0, 2), (2, 5), (5, 7), (7, 9)]):
        assert y[indices == picture].unique().tolist() == list(range(first, end))
    assert torch.equal(y[17:30], latents.take(indices[17:30], 0, torch.arange(17, 30))[1])

    # Captions that were prepared anew no longer fit.
    write_annotations(tree.folder / "train.json", TRAIN | {"d.jpg": ["dog cat", "red"]})
    for path in captions_folder().iterdir():
        path.unlink()
    assert tree.prepare(f"captions {SOURCES}") == 0
    with pytest.raises(ValueError, match="prepared with other captions"):
        load(data)


def test_both_protocols_train_sample_and_score(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    declared = tree.declare()
    assert tree.prepare(f"captions {SOURCES}") == 0
    monkeypatch.setattr(scoring, "load_inception", lambda *_: Grey())
    monkeypatch.setattr(scoring, "require_features", lambda spec: None)
    layers = (Layer("pool", "mu", "sigma", 6), Layer("spatial", "mu_s", "sigma_s", 5))
    monkeypatch.setattr(reference, "LAYERS", layers)
    manifests = []
    for protocol in (COCO256_UVIT, COCO256_REPA):
        data = declared[protocol.name]
        line = f"latents --protocol {protocol.name} --images train --vae vae --reconstructions 0"
        assert tree.prepare(line) == 0
        path = locate.reference_path(data)
        images = open_images(tmp_path / "val", lossy=True, crop=8 * SIDE, rule=Crop.SQUARE)
        write_reference(Grey(), images, path)

        # Three steps by the protocol's rules, and three images of three pictures' captions.
        recipe = replace(protocol.recipe, steps=3, batch=4, precision="fp32", warmup=0)
        train = Train(NETWORK, data, recipe, protocol.diffusion)
        sampler = replace(protocol.sampler, num_steps=4)
        spec = Evaluate(train, sampler, 3, protocol.features, protocol.labels)
        folder = tmp_path / "runs" / protocol.name
        values = run_training(train, RunContext(folder))
        assert values["captions_sha256"] == table_of(data).digest()
        assert np.isfinite(values["loss"])
        labels = labels_of(spec)
        assert sorted((labels - 9).div(2, rounding_mode="floor").tolist()) == [0, 1, 2]
        scores = scoring.run_evaluation(spec, tmp_path, RunContext(folder))
        assert np.isfinite(scores["fid"])
        manifests.append(scores["manifest"])

    # A manifest holds every choice, and the two differ in those of the papers.
    measure = manifests[0]["measure"]
    assert measure["captions"]["encoder"] == tree.encoder.name
    assert measure["captions"]["part"] == "validation"
    assert measure["reference"]["crop"] == Crop.SQUARE.value
    assert measure["reference"]["num_pictures"] == 3
    assert measure["selection"] == "the last average"
    differing = incomparable(*manifests)
    for field in ("data", "decoder.scale", "sampler.name"):
        assert f"measure.{field}" in differing
    assert "measure.captions.sha256" not in differing

    # A reference of another crop is refused before anything is sampled.
    images = open_images(tmp_path / "val", lossy=True, crop=8 * SIDE)
    write_reference(Grey(), images, path)
    with pytest.raises(ValueError, match="were cropped otherwise"):
        scoring.require_reference(data)


@pytest.mark.parametrize(
    ("name", "captions", "words"),
    [
        ("train.json", {"a.jpg": ["the dog"], "b.jpg": []}, "1 of 2 images have no caption"),
        ("train.json", {}, "holds no caption"),
        ("val.json", {"a.jpg": ["the dog"]}, "both describe a.jpg"),
        (
            "val.json",
            {"v.jpg": ["a dog at the red cat at the dog"]},
            "longer than the context of 9",
        ),
    ],
)
def test_bad_captions_are_one_line(
    tree: Tree,
    name: str,
    captions: dict[str, list[str]],
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    write_annotations(tree.folder / name, captions)
    assert tree.prepare(f"captions {SOURCES}") == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not captions_folder().exists()
    if "longer" in words:
        assert tree.prepare(f"captions {SOURCES} --long cut") == 0
        assert "1 cut" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b'{"images": []}', b'{"images": [{"id": "x"}]}'])
def test_a_file_that_holds_no_annotations_is_one_line(
    tree: Tree, content: bytes, capsys: pytest.CaptureFixture[str]
):
    (tree.folder / "train.json").write_bytes(content)
    assert tree.prepare(f"captions {SOURCES}") == 2
    message = capsys.readouterr().err
    assert "train.json" in message
    assert message.count("\n") == 1


def test_pictures_without_captions_are_refused(tree: Tree, capsys: pytest.CaptureFixture[str]):
    tree.declare()
    assert tree.prepare(f"captions {SOURCES}") == 0
    line = "latents --protocol coco256_repa --images train --vae vae"
    write_images(tree.folder / "more", ["x.jpg"])
    (tree.folder / "more" / "x.jpg").rename(tree.folder / "train" / "x.jpg")
    assert tree.prepare(line) == 2
    assert "1 of 5 images in train have no captions, such as x.jpg" in capsys.readouterr().err
    (tree.folder / "train" / "x.jpg").unlink()
    (tree.folder / "train" / "a.jpg").unlink()
    assert tree.prepare(line) == 2
    assert "train lacks 1 of 4 images that have captions, such as a.jpg" in capsys.readouterr().err


def test_a_table_of_another_encoder_or_width_is_refused(tree: Tree):
    data = tree.declare()["coco256_repa"]
    assert tree.prepare(f"captions {SOURCES}") == 0
    network = build(NETWORK, 0, CPU)
    with pytest.raises(ValueError, match=f"encoder {tree.encoder.name}, not of clip-vit-large"):
        give_captions(network, replace(data, captions="clip-vit-large-patch14"))
    with pytest.raises(ValueError, match="9 tokens of width 12.*is it another text encoder"):
        give_captions(build(NETWORK.but(context_dim=16), 0, CPU), data)
    with pytest.raises(ValueError, match="15 captions and a null one"):
        give_captions(build(NETWORK.but(num_classes=16), 0, CPU), data)

    # The table stays on disk when the network moves to another type.
    give_captions(network, data)
    table = network.captions.table
    assert network.double().captions.table.context is table.context
    assert network(
        torch.zeros(2, 4, SIDE, SIDE).double(), torch.ones(2), torch.tensor([0, 15])
    ).dtype


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no CLIP text encoder"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "damaged or cut short"),
        (lambda folder: (folder / "merges.txt").write_text("#\na t\n"), "holds 1 merges"),
    ],
)
def test_a_damaged_encoder_is_one_line(tmp_path: Path, spoil, words: str):
    folder = write_encoder(tmp_path / "clip")
    spoil(folder)
    with pytest.raises(ValueError, match=words) as refusal:
        load_text_encoder(folder)
    assert "\n" not in str(refusal.value)


def test_weights_of_another_width_than_the_config_are_refused(tmp_path: Path):
    folder = write_encoder(tmp_path / "clip")
    wide = write_encoder(tmp_path / "wide", hidden_size=2 * CONFIG["hidden_size"])
    (wide / "config.json").replace(folder / "config.json")
    with pytest.raises(ValueError, match="where config.json says"):
        load_text_encoder(folder)


def test_a_plan_of_coco_has_the_rows_that_it_is_declared_for(
    tree: Tree, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    line = ["--protocol", "coco256_uvit", "--seeds", "0", "--device", "cpu"]
    line += ["--results", str(tmp_path / "results")]

    def run(*options: str) -> int:
        arguments = ["--table", "v2-3", *line, *options]
        return run_command(lambda: run_table(text_to_image.CHOICES, "", arguments))

    assert run("--dry-run") == 0
    plan = capsys.readouterr().out
    for label in ("U-ViT-S/2 (Deep)", "MMDiT", "DiCo-CrossAttn", "DiCo-DWC"):
        assert plan.count(f"{label}, seed 0 ") == 2
    assert "SDXL" not in plan

    # Without data and for other rows there is one line.
    assert run() == 2
    assert "prepare.py captions" in capsys.readouterr().err
    assert run("--dry-run", "--rows", "SDXL") == 2
    assert "not for SDXL" in capsys.readouterr().err


def test_no_score_is_declared_for_more_pictures_than_there_are(tree: Tree):
    assert tree.prepare(f"captions {SOURCES}") == 0
    with pytest.raises(ValueError, match="the validation part has 3 pictures"):
        read_index().scored(4, 0)
    draws = [tuple(read_index().scored(3, seed).tolist()) for seed in range(20)]
    assert len(set(draws)) > 10
    assert draws[0] == tuple(read_index().scored(3, 0).tolist())


def test_labels_of_captions_need_captions(tree: Tree):
    train = Train(NETWORK, Data("digits", 8, 1, 10), COCO256_REPA.recipe)
    with pytest.raises(ValueError, match="one_an_image are captions of pictures"):
        labels_of(Evaluate(train, COCO256_REPA.sampler, 3, "digits", "one_an_image"))
