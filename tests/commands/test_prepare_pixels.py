"""A folder of pictures becomes the set of pixels that ADM's rows ask for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import prepare_pixels
from experiments.engine.data import locate as sources
from experiments.engine.data import sets as data
from experiments.engine.data.pictures import read_picture
from experiments.engine.specs.spec import Data


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
    monkeypatch.setattr(sources, "ROOT", tmp_path / "data")
    wanted = Data("imagenet16_pixels", 16, 3, 2)
    with pytest.raises(
        ValueError, match="needs images.npy and labels.npy in data/imagenet16_pixels"
    ):
        sources.require_data(wanted)
    assert prepare_pixels.prepare(pictures, sources.folder_of(wanted), 16, 2, workers=2) == (3, "")
    images, labels = data.load_data(wanted).take(torch.arange(3))
    assert labels.tolist() == [0, 1, 1] and images.shape == (3, 3, 16, 16)
    for place, name in enumerate(("a/0.png", "b/0.png", "b/1.png")):
        crop = torch.from_numpy(read_picture(pictures / name, 16)[0].copy()).permute(2, 0, 1)
        assert torch.equal(images[place], crop.float() / 127.5 - 1)
    with pytest.raises(ValueError, match="there already"):
        prepare_pixels.prepare(pictures, sources.folder_of(wanted), 16, 2, workers=2)


def test_a_broken_picture_leaves_nothing_behind(pictures: Path, tmp_path: Path):
    (pictures / "b" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be decoded"):
        prepare_pixels.prepare(pictures, tmp_path / "out", 16, 2, workers=2)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_wrong_folder_is_one_line(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        sys, "argv", ["prepare_pixels.py", "--size", "64", "--images", str(pictures)]
    )
    assert prepare_pixels.main() == 2
    assert capsys.readouterr().err == f"error: {pictures} holds 2 class folders, 1000 are needed\n"
