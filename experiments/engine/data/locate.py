"""Where data lies, and what a protocol lacks on this machine. Standard library only."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.engine.specs.spec import Data, Evaluate, is_latent

ROOT = Path(os.environ.get("DICO_DATA", Path(__file__).resolve().parents[3] / "data"))
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
REFERENCES = {
    "imagenet256": "VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": "VIRTUAL_imagenet512.npz",
}


def folder_of(data: Data) -> Path:
    """A set's folder: fixed latents lie beside the moments that they could have been drawn from."""
    return ROOT / (data.name + ("_fixed" if data.latents == "fixed" else ""))


def require_data(data: Data) -> None:
    """Raise ValueError in one line, saying how to provide it, where a set is not on this machine."""
    folder = folder_of(data)
    where = f"data/{folder.name} (or $DICO_DATA/{folder.name})"
    if data.name == "digits":
        return
    if data.name == "cifar10":
        if not find_cifar10(folder, "train"):
            raise ValueError(
                f"protocol cifar10 needs train.parquet (columns img and label) or torchvision's cifar-10-batches-py in {where}; "
                "where the network allows it, python experiments/prepare_cifar10.py downloads the latter"
            )
    elif data.name.startswith("imagenet") and is_latent(data):
        if not (folder / "manifest.json").is_file():
            raise ValueError(
                f"protocol {folder.name} needs VAE latents in {where}; "
                f"python experiments/prepare_latents.py --protocol {folder.name} --images FOLDER makes them from a folder of {data.num_classes} class folders"
            )
        read_manifest(folder, data)
    elif not (folder / "manifest.json").is_file():
        if missing := [
            name for name in ("images.npy", "labels.npy") if not (folder / name).is_file()
        ]:
            made = (
                f"; python experiments/prepare_pixels.py --size {data.size} --images FOLDER makes them"
                if data.name.endswith("_pixels")
                else ""
            )
            raise ValueError(
                f"set {data.name} needs {' and '.join(missing)} in {where}: images.npy, pixels (M, {data.channels}, {data.size}, {data.size}), "
                f"uint8 or float32 in [-1, 1], and labels.npy integers (M,) below {data.num_classes}{made}"
            )


def find_cifar10(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split ('train' or 'test'), or torchvision's folder; empty where there is neither."""
    if found := sorted(folder.glob(f"{split}*.parquet")):
        return found
    return [folder / "cifar-10-batches-py"] if (folder / "cifar-10-batches-py").is_dir() else []


def has_manifest(data: Data) -> bool:
    """Whether finished latents of the set are on this machine."""
    return (folder_of(data) / "manifest.json").is_file()


def read_manifest(folder: Path, data: Data) -> dict[str, Any]:
    """What is known of a folder of latents. ValueError in one line where they are not the latents that the spec declares."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {name: manifest[name] for name in ("latents", "shape", "num_classes")}
        as_expected, encoder, vae = (
            manifest["statistics"]["as_expected"],
            manifest["vae"]["encoder"],
            manifest["vae"]["name"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder.name}/manifest.json cannot be read ({type(error).__name__}: {error}); prepare the latents again"
        ) from None
    channels = data.channels * (2 if data.latents == "moments" else 1)
    declared = {
        "latents": data.latents,
        "shape": [2, channels, data.size, data.size],
        "num_classes": data.num_classes,
    }
    if other := [
        f"{name} {found[name]}, not {value}"
        for name, value in declared.items()
        if found[name] != value
    ]:
        raise ValueError(
            f"the latents in {folder.name} do not fit protocol {data.name}: {'; '.join(other)}; prepare them again elsewhere ($DICO_DATA)"
        )
    if not (as_expected if data.vae == "sd-vae-ft" else encoder == data.vae):
        raise ValueError(
            f"the latents in {folder.name} were made with another VAE ({vae}, encoder {encoder}); this run declares {data.vae}"
        )
    return manifest


def inception_path() -> Path:
    """Where the Inception weights are expected: $DICO_INCEPTION, or in the data folder."""
    return Path(os.environ.get("DICO_INCEPTION", ROOT / INCEPTION))


def reference_path(data: Data) -> Path | None:
    """ADM's reference file of a latent set, in the set's folder, which serves ImageNet's pixels too; None for another set of pixels, which is its own."""
    name = data.name.removesuffix("_pixels")
    return (
        ROOT / name / REFERENCES.get(name, "reference.npz")
        if is_latent(data) or name in REFERENCES
        else None
    )


def vae_source() -> str:
    """The VAE that decodes latents: $DICO_VAE (a name or a folder), or the one that the papers use."""
    return os.environ.get("DICO_VAE", "sd-vae-ft-ema")


def missing_features(spec: Evaluate) -> list[str]:
    """What scoring lacks on this machine, each with how to provide it."""
    if spec.features == "digits":
        return []
    if spec.features == "cifar_classifier":
        return (
            []
            if find_cifar10(folder_of(spec.data), "test")
            else [
                "CIFAR-10's test images (test.parquet or cifar-10-batches-py) in data/cifar10 (or $DICO_DATA/cifar10)"
            ]
        )
    missing = []
    if find_spec("torch_fidelity") is None:
        missing.append("the package torch-fidelity")
    if not inception_path().is_file():
        missing.append(
            f"the Inception weights {INCEPTION} in data/ (or $DICO_INCEPTION; calibrate.py --download fetches them)"
        )
    if (reference := reference_path(spec.data)) and not reference.is_file():
        missing.append(
            f"the reference {reference.name} of ADM's evaluator in data/{reference.parent.name} (or $DICO_DATA/{reference.parent.name})"
        )
    if is_latent(spec.data) and find_spec("diffusers") is None:
        missing.append(
            "the package diffusers for the VAE (and $DICO_VAE, a folder, where it cannot be downloaded)"
        )
    return missing


def require_features(spec: Evaluate) -> None:
    """Raise ValueError in one line where a protocol's score features are not to be had."""
    if missing := missing_features(spec):
        otherwise = "its networks can be built, counted and timed (--protocol digits, --table 5)"
        if (spec.data.name, spec.features) == ("cifar10", "inception"):
            otherwise = (
                "protocol cifar10_classifier scores the same trainings on a classifier's features"
            )
        raise ValueError(
            f"protocol {spec.data.name} is scored on {spec.features} features and lacks {'; '.join(missing)}. Without them {otherwise}"
        )
