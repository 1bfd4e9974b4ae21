"""PSNR and SSIM against naive loops, and what is recorded of an autoencoder's reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.encode import EncodingJob
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.scoring.frechet import frechet
from experiments.engine.scoring.inception import Inception
from experiments.engine.scoring.moments import moments_of
from experiments.engine.scoring.reconstruction import reach
from experiments.engine.scoring.reconstruction.reach import describe_reach, record_reach
from experiments.engine.scoring.reconstruction.similarity import psnr, ssim
from tests.support.latent_sets import write_pictures, write_vae

DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (3, 14, 17, 3), dtype=np.uint8)
OTHERS = (IMAGES + DRAW.normal(0, 20, IMAGES.shape)).clip(0, 255).astype(np.uint8)


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, window by window, for images (H, W, C)."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(a.shape[2]):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                x = a[row : row + 11, column : column + 11, channel].astype(float)
                y = b[row : row + 11, column : column + 11, channel].astype(float)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top = (2 * mx * my + c1) * (2 * cov + c2)
                values.append(top / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition():
    expected = [naive_ssim(a, b) for a, b in zip(IMAGES, OTHERS, strict=True)]
    np.testing.assert_allclose(ssim(IMAGES, OTHERS), expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(IMAGES, IMAGES), 1, rtol=1e-12)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(IMAGES[:, :10], IMAGES[:, :10])


def test_psnr_of_a_constant_error_is_known():
    grey = np.full((2, 12, 12, 3), 100, np.uint8)
    brighter = grey + np.array([1, 255 - 100], np.uint8)[:, None, None, None]
    expected = [20 * np.log10(255), 20 * np.log10(255 / 155)]
    np.testing.assert_allclose(psnr(grey, brighter), expected, rtol=1e-12)
    assert psnr(grey, grey).tolist() == [np.inf, np.inf]

    # Bytes do not wrap around, and other types have another peak.
    np.testing.assert_allclose(psnr(brighter, grey), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="are uint8 of one shape"):
        psnr(grey / 255, grey / 255)


class Averages:
    """Stands for Inception: three averages of an image as its features."""

    sha256 = "averages"

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, None, None]:
        return images.mean((1, 2)), None, None


@pytest.mark.slow
def test_what_an_autoencoder_reaches_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reach, "WIDTH", 3)
    vae = load_autoencoder(str(write_vae(tmp_path / "vae")))
    job = EncodingJob(find_pictures(write_pictures(tmp_path / "in", 3, 2), 2), vae, 32)
    inception = cast(Inception, Averages())
    measured = record_reach(job, 4, tmp_path / "out", inception)

    # The pictures are spread over the listing: both ends, and two between them.
    chosen = [job.pictures.root / job.pictures.files[index] for index in (0, 2, 3, 5)]
    pixels = np.stack([read_picture(path, 32)[0] for path in chosen])
    x = np.moveaxis(pixels, 3, 1).astype(np.float32) / 127.5 - 1
    import torch

    with torch.no_grad():
        latents = vae.vae.encode(torch.from_numpy(x)).latent_dist.mean
        images = vae.vae.decode(latents).sample.clamp(-1, 1)
    exact = np.moveaxis((images.numpy() + 1) * 127.5, 1, 3)

    # Quantised values are within one level of the exact ones.
    direct = psnr(pixels, exact.round().astype(np.uint8)).mean()
    assert abs(measured["psnr"]["mean"] - direct) < 0.05
    assert measured["num_measured"] == 4
    expected = frechet(moments_of(exact.mean((1, 2))), moments_of(pixels.mean((1, 2))))
    assert abs(measured["frechet"] - expected) < 0.02 * expected + 0.5
    assert "of 4 pictures: PSNR" in describe_reach(measured)

    # The same question is answered from the file, another one is measured.
    monkeypatch.setattr(reach, "measure_reach", lambda *_: {"num_measured": 0})
    assert record_reach(job, 4, tmp_path / "out", inception) == measured
    assert record_reach(job, 3, tmp_path / "out", inception)["num_measured"] == 0
