"""Pictures that cannot be decoded are counted by reason; a machine that fails is no bad picture."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.pictures import (
    Pictures,
    UnreadablePicture,
    find_pictures,
    read_picture,
)
from experiments.engine.data.pixels import write_pixels
from tests.support.latent_sets import ignore_progress, picture


def cut(path: Path) -> None:
    picture(0, 90, 70).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:400])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "of no known kind": lambda path: path.write_bytes(b"<html>no picture</html>"),
    "damaged or cut short": cut,
    "levels that are no bytes": lambda path: Image.new("I;16", (80, 80)).save(path, "PNG"),
    "No such file or directory": lambda path: path.symlink_to("nowhere"),
    "too many pixels": lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Pictures:
    """Three classes of a whole picture; the first also has one of every damage and two more cut."""
    for label in range(3):
        (tmp_path / "images" / f"n{label}").mkdir(parents=True)
        picture(label, 90, 70).save(tmp_path / "images" / f"n{label}" / "whole.png")
    for number, damage in enumerate([*DAMAGES.values(), cut, cut]):
        damage(tmp_path / "images" / "n0" / f"{number}.png")
    return find_pictures(tmp_path / "images", 3)


COUNTS = (
    "8 of 11 pictures cannot be decoded (damaged or cut short: 3, No such file or directory: 1, "
    "empty: 1, levels that are no bytes: 1, of no known kind: 1, too many pixels: 1)"
)


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damage_has_its_reason(reason: str, tmp_path: Path):
    DAMAGES[reason](tmp_path / "a.png")
    with pytest.raises(UnreadablePicture, match=r"a\.png cannot be decoded: ") as failure:
        read_picture(tmp_path / "a.png", 64)
    assert failure.value.reason == reason and "\n" not in str(failure.value)


def test_every_way_counts_all_of_them_by_reason(
    damaged: Pictures, job: EncodingJob, tmp_path: Path
):
    with pytest.raises(ValueError, match=re.escape(f"{COUNTS}; repair them")) as failure:
        write_pixels(damaged, tmp_path / "pixels", 64, 1)
    assert "n0/0.png cannot be decoded" in str(failure.value)
    assert list((tmp_path / "pixels").iterdir()) == []

    encoding = replace(job, pictures=damaged)
    with pytest.raises(ValueError, match=re.escape(f"{COUNTS}; --corrupt skip")):
        encode_pictures(encoding, tmp_path / "latents", ignore_progress)
    manifest = encode_pictures(replace(encoding, skip=True), tmp_path / "latents", ignore_progress)
    assert manifest["unreadable"] == dict.fromkeys(DAMAGES, 1) | {"damaged or cut short": 3}
    assert (manifest["num_images"], len(manifest["skipped"])) == (3, 8)


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT]
)
def test_a_machine_that_fails_is_no_bad_picture(
    number: int, job: EncodingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), os.fspath(path))

    monkeypatch.setattr("experiments.engine.data.pictures.Image.open", fail)
    for skip in (False, True):
        with pytest.raises(ValueError, match=re.escape(os.strerror(number))) as failure:
            encode_pictures(replace(job, skip=skip), tmp_path / f"{skip}", ignore_progress)
        assert not isinstance(failure.value, UnreadablePicture)
        assert re.match(r"cannot read .*n00/0\.JPEG: ", str(failure.value))
        assert not list((tmp_path / f"{skip}").glob("shard-*.json"))

    # Nor is a real picture that looks like a companion file.
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "._real.png").touch()
    with pytest.raises(ValueError, match=re.escape(os.strerror(number))):
        find_pictures(tmp_path / "images", 1)
