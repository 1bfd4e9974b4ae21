"""What an autoencoder can reach: how far its reconstructions of pictures are from them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from experiments.engine.data.encode import EncodingJob
from experiments.engine.data.locate import inception_path
from experiments.engine.data.pictures import UnreadablePicture, read_picture
from experiments.engine.data.quantise import from_uint8, to_uint8
from experiments.engine.records.files import locked, read_json, written_whole
from experiments.engine.scoring.frechet import frechet
from experiments.engine.scoring.inception import Inception, load_inception
from experiments.engine.scoring.moments import Moments
from experiments.engine.scoring.reconstruction.similarity import psnr, ssim

FILE = "reconstruction.json"
WIDTH = 2048  # of Inception's features


def report_reach(job: EncodingJob, num: int, folder: Path) -> str:
    """Measure how near an autoencoder comes to pictures, with Inception if it is here; say it."""
    has_inception = inception_path().is_file() and find_spec("torch_fidelity") is not None
    inception = load_inception(inception_path(), job.vae.device) if has_inception else None
    return describe_reach(record_reach(job, num, folder, inception))


def record_reach(
    job: EncodingJob, num: int, folder: Path, inception: Inception | None
) -> dict[str, Any]:
    """Measure an autoencoder's reconstructions once, and keep the result in a folder.

    Args:
        job: the pictures, the autoencoder and the size.
        num: how many pictures, spread evenly over the listing; at most all.
        folder: of the latents.
        inception: gives the features of the Fréchet distance; None leaves that out.
    """
    path = folder / FILE
    about = {
        "num_images": min(num, len(job.pictures.files)),
        "pixels": job.size,
        "vae": {"name": job.vae.name, "weights": job.vae.weights},
        "latents": "means of the posteriors",
        "features": inception.sha256 if inception else None,
    }

    # Of several processes that share the work, one measures.
    with locked(folder / "plan.lock"):
        if path.exists():
            stored: dict[str, Any] = read_json(path, "remove it")
            if all(stored.get(name) == value for name, value in about.items()):
                return stored
        reach = about | measure_reach(job, num, inception)
        with written_whole(path) as file:
            file.write(json.dumps(reach, indent=1).encode() + b"\n")
    return reach


def measure_reach(job: EncodingJob, num: int, inception: Inception | None) -> dict[str, Any]:
    """Return PSNR, SSIM and the Fréchet distance of reconstructions to their pictures.

    Raises:
        ValueError: a picture cannot be decoded, unless the job leaves such pictures out.
    """
    number = len(job.pictures.files)
    chosen = np.unique(np.linspace(0, number - 1, min(num, number)).round().astype(int))
    ratios: list[float] = []
    likenesses: list[float] = []
    features = Moments(WIDTH), Moments(WIDTH)
    for index in chosen:
        try:
            path = job.pictures.root / job.pictures.files[index]
            pixels, _ = read_picture(path, job.size, job.crop)
        except UnreadablePicture:
            if job.skip:
                continue
            raise
        pair = pixels[None], _reconstruct(job, pixels[None])
        ratios += psnr(*pair).tolist()
        likenesses += ssim(*pair).tolist()
        if inception:
            for moments, images in zip(features, pair, strict=True):
                moments.update(inception(images)[0])

    # Fewer than two pictures have no covariance.
    distance = frechet(*features) if inception and features[0].n > 1 else None
    return {
        "num_measured": len(ratios),
        "psnr": _mean_and_error(ratios),
        "ssim": _mean_and_error(likenesses),
        "frechet": distance,
    }


def _reconstruct(job: EncodingJob, pixels: ndarray) -> ndarray:
    """Encode and decode pictures (N, H, W, 3), uint8, by the means of their posteriors."""
    import torch

    images = from_uint8(torch.tensor(pixels)).permute(0, 3, 1, 2)
    return to_uint8(job.vae.reconstruct(images)).permute(0, 2, 3, 1).numpy()


def _mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Return mean and standard error; None for what so few values, or equal images, leave open."""
    finite = np.array(values)[np.isfinite(values)]
    if not len(finite):
        return {"mean": None, "error": None}
    error = float(finite.std(ddof=1) / len(finite) ** 0.5) if len(finite) > 1 else None
    return {"mean": float(finite.mean()), "error": error}


def describe_reach(reach: dict[str, Any]) -> str:
    """Say in one line what an autoencoder can reach."""
    parts = [
        f"{name.upper()} {_text(reach[name], digits)}{unit}"
        for name, digits, unit in (("psnr", 2, " dB"), ("ssim", 4, ""))
    ]
    distance = "not measured, without Inception's weights"
    if reach["frechet"] is not None:
        distance = f"{reach['frechet']:.3f}, biased upwards for few images"
    return (
        f"the autoencoder's reconstructions of {reach['num_measured']} pictures: "
        f"{', '.join(parts)}, Fréchet distance to them {distance}"
    )


def _text(value: dict[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return "of equal images"
    error = "" if value["error"] is None else f" +- {value['error']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"
