"""ADM's crop against resampling by its definition, and folders that are refused."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.engine.data.pictures import (
    Crop,
    centre_crop,
    describe_modes,
    find_pictures,
    read_picture,
)
from tests.support.latent_sets import picture, write_pictures


def resampled(rows: np.ndarray, size: int, kernel: str) -> np.ndarray:
    """Resample the first axis of (n, ...) by antialiased box or bicubic (a = -1/2) weights."""
    n = len(rows)
    step = n / size
    reach = (0.5 if kernel == "box" else 2.0) * max(step, 1.0)
    out = []
    for place in range(size):
        # The rows within reach, and their distances in steps.
        centre = (place + 0.5) * step
        at = np.arange(max(0, int(centre - reach + 0.5)), min(n, int(centre + reach + 0.5)))
        distance = (at + 0.5 - centre) / max(step, 1.0)

        # Their weighted mean.
        if kernel == "box":
            weights = np.where((distance > -0.5) & (distance <= 0.5), 1.0, 0.0)
        else:
            weights = cubic(np.abs(distance))
        out.append(np.tensordot(weights / weights.sum(), rows[at].astype(float), axes=1))
    return np.array(out)


def cubic(d: np.ndarray) -> np.ndarray:
    return np.where(
        d < 1,
        1.5 * d**3 - 2.5 * d**2 + 1,
        np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0.0),
    )


def half_even(value: Fraction) -> int:
    return round(value)


def resize(pixels: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    """Resize (H, W, 3), width first, and round every pass to grey levels."""
    for axis, length in ((1, width), (0, height)):
        if pixels.shape[axis] != length:
            lines = resampled(np.moveaxis(pixels, axis, 0), length, kernel)
            pixels = np.floor(np.moveaxis(lines, 0, axis) + 0.5).clip(0, 255)
    return pixels


def crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return ADM's crop of (H, W, 3)."""
    # Halve while the shorter side is at least twice as long.
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, "box")

    # Bring the shorter side to its length, and cut the middle out.
    short = min(pixels.shape[:2])
    height, width = (half_even(Fraction(length * size, short)) for length in pixels.shape[:2])
    pixels = resize(pixels, height, width, "bicubic")
    top = (height - size) // 2
    left = (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "width, height",
    [
        (64, 64),
        (91, 70),
        (127, 200),
        (128, 128),
        (301, 257),
        (50, 33),
        (65, 64),
        (64, 67),
        (519, 260),
    ],
)
def test_the_crop_is_adms(width: int, height: int):
    image = picture(width, width, height)
    found, expected = centre_crop(image, 64), crop(np.asarray(image), 64)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 0.02


def test_the_cut_is_in_the_middle():
    wide = np.zeros((64, 101, 3), np.uint8)
    wide[:, 18:82] = 255
    assert (centre_crop(Image.fromarray(wide), 64) == 255).all()
    assert math.floor((101 - 64) / 2) == 18


def test_a_resize_in_one_go_is_another_picture():
    image = picture(0, 301, 257)
    direct = np.asarray(image.resize((75, 64), Image.Resampling.BICUBIC))[:, 5:69]
    assert (centre_crop(image, 64) != direct).mean() > 0.2


@pytest.mark.parametrize(("width", "height"), [(101, 64), (64, 101), (90, 133), (65, 64)])
def test_the_square_of_the_short_side_is_cut_before_lanczos(
    tmp_path: Path, width: int, height: int
):
    image = picture(0, width, height)
    image.save(tmp_path / "a.png")
    pixels, _ = read_picture(tmp_path / "a.png", 40, Crop.SQUARE)

    # As U-ViT cuts an array, and not as ADM does.
    side = min(width, height)
    rows = slice((height - side) // 2, (height + side) // 2)
    columns = slice((width - side) // 2, (width + side) // 2)
    square = Image.fromarray(np.asarray(image)[rows, columns])
    assert np.array_equal(pixels, square.resize((40, 40), Image.Resampling.LANCZOS))
    assert (pixels != read_picture(tmp_path / "a.png", 40)[0]).mean() > 0.2


def test_grey_and_cmyk_pictures_become_rgb(tmp_path: Path):
    root = write_pictures(tmp_path)
    colour = centre_crop(picture(10, 64, 64), 64).astype(int)
    for name, change in (("n00/1.JPEG", None), ("n01/0.JPEG", colour)):
        pixels, mode = read_picture(root / name, 64)
        assert mode == ("L" if change is None else "CMYK")
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        if change is None:
            assert (pixels == pixels[..., :1]).all() and pixels.std() > 20
        else:
            assert np.abs(pixels - change).mean() < 12


def test_alpha_and_palettes_are_named_as_what_they_were(tmp_path: Path):
    for mode in ("RGBA", "LA", "P", "RGB"):
        picture(0, 70, 64).convert(mode).save(tmp_path / "a.png")
        pixels, found = read_picture(tmp_path / "a.png", 64)
        assert found == mode and pixels.shape == (64, 64, 3)
    assert describe_modes({"CMYK": 2, "P": 15, "L": 2}) == "15 P, 2 CMYK, 2 L"


def test_pictures_are_listed_by_class_and_name(tmp_path: Path):
    root = write_pictures(tmp_path)
    (root / "n01" / "notes.txt").touch()
    (root / "list.txt").touch()
    found = find_pictures(root, 3)
    assert found.files[:5] == ("n00/0.JPEG", "n00/1.JPEG", "n00/2.png", "n00/3.JPEG", "n01/0.JPEG")
    assert found.labels == (0,) * 4 + (1,) * 4 + (2,) * 4


def test_folders_that_do_not_fit_are_refused_in_a_line(tmp_path: Path):
    root = write_pictures(tmp_path / "train")
    for path, words in (
        (tmp_path / "no", "is no folder"),
        (root, "holds 3 class folders, 1000 are needed"),
        (tmp_path, "did you mean .*train"),
    ):
        with pytest.raises(ValueError, match=words):
            find_pictures(path, 1000)
    (root / "n03").mkdir()
    with pytest.raises(ValueError, match="n03 holds no image"):
        find_pictures(root, 4)


def test_a_class_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, listing = write_pictures(tmp_path), Path.iterdir

    def refuse(path: Path):
        if path.name == "n01":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="cannot list the class folder .*n01: Permission denied"):
        find_pictures(root, 3)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * len(data)],
)
def test_a_damaged_picture_is_named(tmp_path: Path, damage):
    root = write_pictures(tmp_path)
    path = root / "n02" / "0.JPEG"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"n02/0\.JPEG cannot be decoded: ") as failure:
        read_picture(path, 64)
    assert "\n" not in str(failure.value)


def test_sixteen_bits_a_level_are_refused_and_not_clipped_to_white(tmp_path: Path):
    levels = np.random.default_rng(0).integers(0, 2**16, (70, 64), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    with pytest.raises(
        ValueError, match=r"deep\.png cannot be decoded: its levels are no bytes"
    ) as failure:
        read_picture(tmp_path / "deep.png", 64)
    assert "\n" not in str(failure.value)
