"""Statistics of latents by channel, compared with those of the published VAE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.engine.data.pictures import describe_left_out, describe_modes, show_name

# Of unscaled latents of ImageNet's training set at 256 pixels under sd-vae-ft-ema and -mse, whose
# encoders are the same. Source: the constants of improved MeanFlow's ImageNet-256 code. EDM2's
# differ: its training/encoders.py gives the VAE pixels in [0, 1].
MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
DEVIATION = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
LARGEST = 0.25  # tolerance, in expected deviations


def sum_moments(moments: np.ndarray) -> np.ndarray:
    """Sum the latent and the expectation of its square over rows and places.

    Args:
        moments: means, then deviations, (n, 2C, h, w).

    Returns:
        Both sums for each channel, (2, C), float64.
    """
    mean, deviation = np.split(moments.astype(np.float64), 2, axis=1)
    return np.stack([mean.sum((0, 2, 3)), (mean**2 + deviation**2).sum((0, 2, 3))])


def compare_statistics(
    mean: np.ndarray,
    deviation: np.ndarray,
    num_images: int,
    pixels: int | None,
    known: bool = True,
) -> dict[str, Any]:
    """Put the statistics of each channel beside sd-vae-ft's and tell whether they agree.

    Latents of another space than sd-vae-ft's stand alone.

    The tolerance, in expected deviations, is 0.05 at the 256 pixels of the published values and
    0.15 at other sizes. Four standard errors of a mean over `num_images` come on top; means of
    single images stray by less than one deviation. The tolerance is at most 0.25: a few hundred
    pictures are too few to tell. Other photographs than ImageNet's have this tolerance too.

    Args:
        mean: of each channel, (C,).
        deviation: of each channel, (C,).
        num_images: number of images behind them.
        pixels: side of the images; None: they are photographs of another set.
        known: whether the latents have the scale and the channels of sd-vae-ft's.
    """
    ours = {
        "mean": [round(float(value), 5) for value in mean],
        "deviation": [round(float(value), 5) for value in deviation],
    }
    if not known:
        return ours | {"as_expected": False}

    published = 0.05 if pixels == 256 else 0.15
    tolerance = min(published + 4 / math.sqrt(num_images), LARGEST) if pixels else LARGEST
    off = math.inf
    if len(mean) == len(MEAN):
        differences = np.concatenate([mean - MEAN, deviation - DEVIATION])
        off = max(np.abs(differences) / np.tile(DEVIATION, 2))
    return ours | {
        "expected_mean": list(MEAN),
        "expected_deviation": list(DEVIATION),
        "tolerance": round(tolerance, 4),
        "as_expected": bool(off <= tolerance),
    }


def describe_statistics(statistics: dict[str, Any]) -> str:
    """Say in one line how latents compare with sd-vae-ft's."""
    ours = "; ".join(f"{name} {_digits(statistics[name])}" for name in ("mean", "deviation"))
    if "tolerance" not in statistics:
        return f"latent statistics ({ours})"
    verdict = "agree with" if statistics["as_expected"] else "differ from"
    expected = "; ".join(_digits(statistics[f"expected_{name}"]) for name in ("mean", "deviation"))
    return (
        f"latent statistics ({ours}) {verdict} sd-vae-ft's ({expected}; "
        f"tolerance {statistics['tolerance']} deviations)"
    )


def _digits(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def describe_manifest(manifest: dict[str, Any]) -> str:
    """Say in lines what became of the pictures of a folder of latents."""
    lines = [f"skipped {show_name(name)}: {why}" for name, why in manifest["skipped"].items()]
    if manifest.get("unreadable"):
        lines.append(f"cannot be decoded: {describe_left_out(manifest['unreadable'])}")
    converted = "unknown, older shards do not say"
    if "converted" in manifest:
        converted = describe_modes(manifest["converted"]) or "none"
    lines.append(
        f"{manifest['num_images']} images in {len(manifest['shards'])} shards, "
        f"{len(manifest['skipped'])} skipped; converted to RGB: {converted}"
    )
    lines.append(describe_statistics(manifest["statistics"]))
    return "\n".join(lines)
