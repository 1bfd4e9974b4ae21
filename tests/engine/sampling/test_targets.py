"""A folder of images holds one set, or nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.engine.sampling.targets import SET, require_file, require_own_folder

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
        lambda: require_file(tmp_path),
        lambda: require_file(Path("/dev/null")),
        lambda: require_file(tmp_path / "file" / "a.npz"),
        lambda: require_own_folder(tmp_path / "file", NAMES, "mine"),
        lambda: require_own_folder(tmp_path / "file" / "png", NAMES, "mine"),
    ):
        with pytest.raises(ValueError, match="name another --(out|png)"):
            check()
