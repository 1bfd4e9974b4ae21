"""The command that prepares data: pictures become pixels, latents, and CIFAR-10 is checked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import prepare
from experiments.declared.protocols import IMAGENET256
from experiments.engine.data import locate as sources
from experiments.engine.data import sets as data
from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.data.pixels import write_pixels
from experiments.engine.specs.spec import Data
from tests.support.latent_sets import (
    declared,
    ignore_progress,
    write_pictures,
    write_vae,
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of pictures of odd shapes."""
    draw = np.random.default_rng(0)
    for name, sides in (("b", [(37, 90), (64, 33)]), ("a", [(40, 41)])):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i, (height, width) in enumerate(sides):
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
                tmp_path / "pictures" / name / f"{i}.png"
            )
    return tmp_path / "pictures"


def test_what_is_written_is_what_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pictures become an array of crops, which a training loads scaled to [-1, 1]."""
    monkeypatch.setattr(sources, "ROOT", tmp_path / "data")
    declaration = Data("imagenet16_pixels", 16, 3, 2)
    missing = "needs images.npy and labels.npy in data/imagenet16_pixels"
    with pytest.raises(ValueError, match=missing):
        sources.require_data(declaration)

    # Write the pictures, and load them.
    folder = sources.folder_of(declaration)
    listed = find_pictures(pictures, 2)
    assert not write_pixels(listed, folder, 16, workers=2)
    images, labels = data.load(declaration).take(torch.arange(3))
    assert labels.tolist() == [0, 1, 1]
    assert images.shape == (3, 3, 16, 16)
    for place, name in enumerate(("a/0.png", "b/0.png", "b/1.png")):
        crop = torch.from_numpy(read_picture(pictures / name, 16)[0].copy()).permute(2, 0, 1)
        assert torch.equal(images[place], crop.float() / 127.5 - 1)

    # A second time they are not written.
    with pytest.raises(ValueError, match="exists already"):
        write_pixels(listed, folder, 16, workers=2)


def test_a_broken_picture_leaves_nothing_behind(pictures: Path, tmp_path: Path):
    (pictures / "b" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be decoded"):
        write_pixels(find_pictures(pictures, 2), tmp_path / "out", 16, workers=2)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_wrong_folder_is_one_line(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", "pixels", "--size", "64", "--images", str(pictures)]
    )
    assert prepare.main() == 2
    assert capsys.readouterr().err == f"error: {pictures} holds 2 class folders, 1000 are needed\n"


def test_the_command_prepares_a_protocol_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """The command fills a folder, leaves a full one as it is, and refuses another job for it."""
    vae = write_vae(tmp_path / "vae")
    autoencoder = load_autoencoder(str(vae))
    pictures = write_pictures(tmp_path / "pictures")
    folder = tmp_path / "out"
    protocol = replace(IMAGENET256, data=declared(autoencoder))
    monkeypatch.setattr(prepare, "LATENT_PROTOCOLS", {"imagenet256": protocol})

    def call(shard: int) -> int:
        job = f"latents --protocol imagenet256 --images {pictures} --vae {vae} --out {folder}"
        options = f"--device cpu --shard {shard}"
        monkeypatch.setattr(sys, "argv", ["prepare.py", *job.split(), *options.split()])
        return prepare.main()

    # It says what it made of the pictures, and how far it has come.
    assert call(shard=5) == 0
    printed = capsys.readouterr()
    assert "12 images in 3 shards, 0 skipped; converted to RGB: 1 CMYK, 1 L\n" in printed.out
    assert "differ from sd-vae-ft's" in printed.out
    assert "5 of 12 images, " in printed.err
    assert printed.err.count(" left") == 3
    assert autoencoder.encoder in printed.err

    # Its shards are those of the function.
    job = EncodingJob(find_pictures(pictures, 3), autoencoder, 64, shard=5)
    encode_pictures(job, tmp_path / "expected", ignore_progress)
    for number in range(3):
        name = f"shard-{number:05d}.npy"
        assert (folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()

    # A second call has nothing to do.
    assert call(shard=5) == 0
    assert " left" not in capsys.readouterr().err

    # A shard of an older version does not say what was converted.
    older = folder / "shard-00001.json"
    description = json.loads(older.read_text())
    del description["converted"]
    older.write_text(json.dumps(description))
    assert call(shard=5) == 0
    unknown = "converted to RGB: unknown, older shards do not say"
    assert unknown in capsys.readouterr().out

    # Shards of another size do not belong into the folder.
    assert call(shard=6) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert json.loads((folder / "manifest.json").read_text())["num_images"] == 12


def test_the_data_set_to_prepare_must_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for arguments, message in (([], "cifar10|latents|pixels"), (["mnist"], "'mnist'")):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        assert prepare.main() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
