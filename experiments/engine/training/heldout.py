"""The HeldOut stage: a network's denoising loss on fixed images, times and noises.

The network predicts the noise in images that its training has not seen, with their true labels.
Every image meets one time and one noise in each bin of log SNR, a unit wide. The score is the
geometric mean, over the scored bins, of the bins' mean squared errors, so that no noise level
dominates. Networks of other objectives are converted to noise at the same signal-to-noise ratio.
A network that predicts tokens has a cross-entropy in its place (`next_scale/heldout.py`).

Beside it stand the profile over all bins, the family's own objective, and the bound in bits per
dimension where that is defined.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.engine.data.sets import ImageSet, Part, load
from experiments.engine.diffusion.build import DiffusionProcess, build_diffusion
from experiments.engine.diffusion.denoising import (
    has_bound,
    log_snr_range,
    noise_mse,
    prior_bits,
    step_weights,
    times_at,
)
from experiments.engine.diffusion.iddpm import IDDPM, Model
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.numerics.weights import digest
from experiments.engine.specs.spec import HeldOut
from experiments.engine.training.averages import initial_share, warn_of_initial_share
from experiments.engine.training.networks import load_ema
from experiments.engine.training.next_scale.heldout import measure_cross_entropy

FORMULA = (
    "geometric mean, over unit bins of log SNR from {low} to {high}, of the bins' mean squared "
    "errors of the predicted noise"
)
# The profile's bins, which hold every noise level that a network is trained at.
PROFILE = range(-11, 10)
# Images whose times and noises come from one generator. They also are one batch.
CHUNK = 250
# Times that every image meets for the family's own objective.
OBJECTIVE_DRAWS = 4
# Sets whose levels are those of 8-bit images, of which the bound counts the bits.
EIGHT_BIT = ("cifar10",)


@dataclass(frozen=True)
class Images:
    """Images that are denoised, with their true labels, on the device."""

    x0: Tensor  # (N, C, H, W)
    y: Tensor  # (N,)
    # Name of the part, which enters the draws.
    part: str

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (number, images, labels), CHUNK images at a time."""
        parts = zip(self.x0.split(CHUNK), self.y.split(CHUNK), strict=True)
        for number, (x0, y) in enumerate(parts):
            yield number, x0, y

    def digest(self) -> str:
        """Return the SHA-256 of images and labels."""
        content = self.x0.cpu().numpy().tobytes() + self.y.cpu().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()


def measure_heldout(spec: HeldOut, folder: Path, device: torch.device) -> dict[str, Any]:
    """Score the EMA network of a finished training.

    Args:
        spec: what is scored.
        folder: of the training.
        device: where the network runs.

    Returns:
        The values of the record: `heldout_loss`, the `profile`, `objective`, `bits_per_dim` where
        it is defined, `used_share` of a network with gates, and what decided them.

    Raises:
        ValueError: the data have no such part, the training has not finished, or the network
            predicts no noise.
    """
    if spec.train.diffusion.name == "classify":
        raise ValueError("a classifier of noisy images predicts no noise, so it has no such loss")
    if spec.train.tokenizer:
        return measure_cross_entropy(spec, folder, device, _take_part(spec))
    images = _take_images(spec, device)
    network = load_ema(spec.train, folder, device)
    process = build_diffusion(spec.train.diffusion).to(device)

    # The bound counts bits of 8-bit images, and needs a variance that the network predicts.
    is_eight_bit = spec.train.data.name in EIGHT_BIT
    bounded = process if has_bound(process) and is_eight_bit else None
    with torch.inference_mode(), precision("fp32", device):
        bins = {
            bin_: _measure_bin(spec, process, network, images, bin_, bounded)
            for bin_ in _bins_of(process, spec)
        }
        objective = _mean_losses(process, process.training_entry(network), images)

    profile = {bin_: error for bin_, (error, _) in bins.items()}
    scored = [profile[bin_] for bin_ in range(spec.low, spec.high)]
    values: dict[str, Any] = {
        "heldout_loss": math.exp(sum(map(math.log, scored)) / len(scored)),
        "profile": [[bin_, error] for bin_, error in profile.items()],
        "objective": objective["loss"],
        "num": len(images.y),
        "part": spec.part,
        "images_sha256": images.digest(),
        "weights_sha256": digest(network),
        "initial_share": initial_share(spec.train.recipe),
        "formula": FORMULA.format(low=spec.low, high=spec.high),
        "draws": f"{spec.draws} of each image in each bin, from (part, bin, draw, image)",
    }
    if "share" in objective:
        values["used_share"] = objective["share"]
    warnings = warn_of_initial_share(values["initial_share"])
    if warnings:
        values["warnings"] = warnings
    if bounded:
        bound = sum(terms for _, terms in bins.values())
        values["bits_per_dim"] = bound + prior_bits(bounded, images.x0)
    return values


def _take_images(spec: HeldOut, device: torch.device) -> Images:
    x0, y = _take_part(spec)
    return Images(x0.to(device), y.to(device), spec.part)


def _take_part(spec: HeldOut) -> tuple[Tensor, Tensor]:
    """Return the images (N, C, H, W) and labels (N,) that are scored."""
    parts = {part.value: part for part in (Part.VALIDATION, Part.TEST)}
    if spec.part not in parts:
        raise ValueError(f"unknown part {spec.part!r}; known: {', '.join(parts)}")
    part = parts[spec.part]
    image_set = load(spec.train.data, part)
    assert isinstance(image_set, ImageSet)
    num = spec.num or len(image_set)
    if num > len(image_set):
        raise ValueError(
            f"the {part.value} part of {spec.train.data.name} has {len(image_set)} images, "
            f"and not {num}"
        )
    return image_set.take(torch.arange(num))


def _bins_of(process: DiffusionProcess, spec: HeldOut) -> list[int]:
    """Return the bins in which the network is measured, by their lower ends.

    Raises:
        ValueError: the network was not trained at a noise level that is scored.
    """
    low, high = log_snr_range(process)
    inside = [bin_ for bin_ in PROFILE if low <= bin_ + 1 and bin_ <= high]
    missing = sorted(set(range(spec.low, spec.high)) - set(inside))
    if missing:
        raise ValueError(
            f"the training's log SNR lies in {low:.1f} to {high:.1f}, without the bin from "
            f"{missing[0]} to {missing[0] + 1} that is scored"
        )
    return inside


def _measure_bin(
    spec: HeldOut,
    process: DiffusionProcess,
    model: Model,
    images: Images,
    bin_: int,
    bounded: IDDPM | None,
) -> tuple[float, float]:
    """Return a bin's mean squared error of the predicted noise, and its part of the bound.

    `bounded` is the process if the bound is measured. The bound is a sum over all steps. A step is
    drawn by its log SNR, so its term is divided by the probability of being drawn.
    """
    errors, terms = [], []
    for draw in range(spec.draws):
        for number, x0, y in images.chunks():
            log_snr, eps = _draw(images.part, bin_, draw, number, x0)
            t = times_at(process, log_snr)
            if bounded is None:
                errors.append(noise_mse(process, model, x0, y, t.to(x0.device), eps))
                continue
            weights = step_weights(bounded, t, (PROFILE.start, PROFILE.stop))
            losses = bounded.losses(model, x0, y, t.to(x0.device), eps)
            errors.append(losses["mse"])
            terms.append(losses["vb"] * weights.to(x0.device))
    bound = torch.cat(terms).double().mean().item() if terms else 0.0
    return torch.cat(errors).double().mean().item(), bound


def _draw(part: str, bin_: int, draw: int, number: int, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Return log SNRs in a bin, float64 (n,), and noises (n, C, H, W) for a chunk of images."""
    generator = generator_at("held out", part, bin_, draw, number)
    log_snr = bin_ + torch.rand(len(x0), generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator)
    return log_snr, eps.to(x0.device)


def _mean_losses(process: DiffusionProcess, model: Model, images: Images) -> dict[str, float]:
    """Return the means of the family's own losses over times as it is trained with."""
    losses: dict[str, list[Tensor]] = {}
    for draw in range(OBJECTIVE_DRAWS):
        for number, x0, y in images.chunks():
            generator = generator_at("held out objective", images.part, draw, number)
            t = process.draw_times(len(x0), generator).to(x0.device)
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            for name, values in process.losses(model, x0, y, t, eps).items():
                losses.setdefault(name, []).append(values)
    return {name: torch.cat(values).double().mean().item() for name, values in losses.items()}
