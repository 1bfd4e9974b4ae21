"""A file or a folder of images holds one set, or nothing yet."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.engine.data.image_files import write_images
from experiments.engine.records import files
from experiments.engine.records.files import require_space
from experiments.engine.sampling.samples import describe_set, set_id
from experiments.engine.sampling.targets import (
    SET,
    hold_folder,
    require_own_file,
    require_own_folder,
)
from experiments.engine.specs.spec import Sampler
from tests.support.sampling import SPEC

NAMES = {"000000-0.png", "000001-1.png"}


def write_png(path: Path, set_id: str | None) -> None:
    text = PngInfo()
    if set_id:
        text.add_text(SET, set_id)
    Image.new("RGB", (2, 2)).save(path, pnginfo=text)


@pytest.mark.parametrize(
    "fill",
    [
        lambda folder: write_png(folder / "000001-1.png", "other"),
        lambda folder: write_png(folder / "000001-1.png", None),
        lambda folder: write_png(folder / "000002-2.png", "mine"),
        lambda folder: (folder / "000001-1.png").write_bytes(b"cut"),
        lambda folder: (folder / "000001-1.png").mkdir(),
        lambda folder: (folder / "notes.txt").touch(),
        lambda folder: (folder / ".hidden.7.tmp").touch(),
    ],
)
def test_a_folder_with_anything_else_is_refused_and_kept(
    fill: Callable[[Path], object], tmp_path: Path
):
    write_png(tmp_path / "000000-0.png", "mine")
    fill(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds 1 files that are not of these images"):
        require_own_folder(tmp_path, NAMES, "mine")
    assert sorted(tmp_path.iterdir()) == before


def test_an_earlier_part_of_the_set_is_welcome(tmp_path: Path):
    require_own_folder(tmp_path / "new", NAMES, "mine")
    write_png(tmp_path / "new" / "000000-0.png", "mine")
    (tmp_path / "new" / ".000001-1.png.7.tmp").touch()
    require_own_folder(tmp_path / "new", NAMES, "mine")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["000000-0.png"]


def test_what_is_no_file_or_no_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for check in (
        lambda: require_own_file(tmp_path, {}, 1),
        lambda: require_own_file(Path("/dev/null"), {}, 1),
        lambda: require_own_file(tmp_path / "file" / "a.npz", {}, 1),
        lambda: require_own_folder(tmp_path / "file", NAMES, "mine"),
        lambda: require_own_folder(tmp_path / "file" / "png", NAMES, "mine"),
    ):
        with pytest.raises(ValueError, match="name another --(out|png)"):
            check()


# ---- Files

ORIGIN = {"network": "0123456789abcdef", "key": "ema", "sampler": {"name": "ancestral"}}
ABOUT = describe_set(SPEC, ORIGIN)


def write_set(path: Path, num: int = 3, **changes: object) -> None:
    zeros, places = np.zeros(num, int), np.arange(num)
    about = ABOUT | {"nfe": 3.0} | changes
    write_images(path, [np.zeros((num, 2, 2, 3), np.uint8)], (num, 2, 2, 3), zeros, places, about)


@pytest.mark.parametrize(
    "fill",
    [
        lambda path: write_set(path, network="f" * 16),
        lambda path: write_set(path, key="model"),
        lambda path: write_set(path, sampler={"name": "ddim"}),
        lambda path: write_set(path, seed=1),
        lambda path: write_set(path, data="cifar10"),
        lambda path: write_set(path, num=4),
        lambda path: np.savez(path, arr_0=np.zeros((3, 2, 2, 3), np.uint8)),
        lambda path: np.savez(path, mu=np.zeros(3)),
        lambda path: path.write_bytes(b"a paper"),
        lambda path: path.write_bytes(b"PK"),
    ],
)
def test_a_file_of_anything_else_is_refused_and_kept(
    fill: Callable[[Path], object], tmp_path: Path
):
    path = tmp_path / "a.npz"
    fill(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds other content; remove it or name another --out"):
        require_own_file(path, ABOUT, 3)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("fill", [write_set, Path.touch, lambda path: None])
def test_this_very_set_and_nothing_are_welcome(fill: Callable[[Path], object], tmp_path: Path):
    fill(tmp_path / "a.npz")
    require_own_file(tmp_path / "a.npz", ABOUT, 3)


def test_other_weights_and_another_spec_are_other_sets():
    sets = [
        (SPEC, ORIGIN),
        (SPEC, ORIGIN | {"network": "f" * 16}),
        (replace(SPEC, seed=1), ORIGIN),
        (replace(SPEC, num=24), ORIGIN),
        (replace(SPEC, sampler=Sampler(num_steps=4, channels=None)), ORIGIN),
    ]
    assert len({set_id(spec, origin) for spec, origin in sets}) == len(sets)
    assert set_id(SPEC, ORIGIN) == set_id(SPEC, dict(ORIGIN))


# ---- Room

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("option", ["--png", "--out", "--results"])
@pytest.mark.parametrize(
    ("needed", "fits"), [(0, True), (1999, True), (2000, True), (2001, False), (3e9, False)]
)
def test_free_space_is_compared_with_what_will_be_written(
    option: str, needed: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Usage(9000, 7000, 2000))
    if fits:
        require_space(tmp_path / "new", needed, option)
        assert (tmp_path / "new").is_dir()
    else:
        with pytest.raises(ValueError, match=f"has 0.0 GB free; name another {option}$"):
            require_space(tmp_path / "new", needed, option)


def test_a_folder_is_one_commands_at_a_time(tmp_path: Path):
    """The lock is of the folder itself, so that it leaves no file among the images."""
    with hold_folder(tmp_path):
        second = hold_folder(tmp_path)
        with pytest.raises(ValueError, match="another command is writing into"):
            second.__enter__()
        assert list(tmp_path.iterdir()) == []
    with hold_folder(tmp_path):
        pass
