"""A small folder of pictures and a small untrained VAE for the tests of the latent path."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.engine.data.autoencoder import Autoencoder, load_autoencoder
from experiments.engine.specs.spec import Data

SIZES = ((70, 91), (64, 64), (131, 200), (90, 77))


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Draw smooth colours with some noise, as photographs have them."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    noisy = smooth + draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_pictures(root: Path, each: int = 4, classes: int = 3) -> Path:
    """Write `classes` folders of `each` pictures: JPEG and PNG, one of them grey and one CMYK."""
    for label in range(classes):
        folder = root / f"n{label:02d}"
        folder.mkdir(parents=True)
        for place in range(each):
            image = picture(10 * label + place, *SIZES[(label + place) % len(SIZES)])
            if (label, place) == (0, 1):
                image = image.convert("L")
            if (label, place) == (1, 0):
                image = image.convert("CMYK")
            suffix = "png" if place == 2 else "JPEG"
            image.save(folder / f"{place}.{suffix}")
    return root


def write_vae(folder: Path, seed: int = 0, **options: object) -> Path:
    """Write a small untrained VAE, with options of diffusers' class."""
    from diffusers import AutoencoderKL

    options.setdefault("latent_channels", 4)
    widths = options.pop("block_out_channels", (4, 4, 8, 8))
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )

    # The weights depend on the seed alone, and leave the global generator as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=widths,
            norm_num_groups=2,
            sample_size=64,
            **blocks,
            **options,
        )
    vae.save_pretrained(folder)
    return folder


def ignore_progress(done: int, total: int) -> None:
    """The report of an encoding that nobody watches."""


def read_shards(folder: Path) -> np.ndarray:
    """Return the rows of the three shards of a folder."""
    return np.concatenate([np.load(folder / f"shard-{number:05d}.npy") for number in range(3)])


def small_vae(folder: Path) -> Autoencoder:
    return load_autoencoder(str(write_vae(folder)))


def declared(autoencoder: Autoencoder, **options: object) -> Data:
    """The set that 64-pixel pictures of three classes become."""
    return replace(
        Data("tiny", size=8, channels=4, num_classes=3, flip=True, vae=autoencoder.encoder),
        **options,
    )
