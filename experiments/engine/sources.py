"""Where data lies, and what a protocol lacks on this machine. Standard library only."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from experiments.engine.spec import Data, Evaluate

ROOT = Path(os.environ.get("DICO_DATA", Path(__file__).resolve().parents[2] / "data"))
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
REFERENCES = {"imagenet256": "VIRTUAL_imagenet256_labeled.npz", "imagenet512": "VIRTUAL_imagenet512.npz"}


def require_data(data: Data) -> None:
    """Raise ValueError in one line, saying how to provide it, where a set is not on this machine."""
    if data.name == "digits":
        return
    if missing := [name for name in ("images.npy", "labels.npy") if not (ROOT / data.name / name).is_file()]:
        shape = f"(M, {data.channels}, {data.size}, {data.size})"
        content = "pixels in [-1, 1]" if data.channels == 3 else "VAE latents times 0.18215"
        raise ValueError(
            f"protocol {data.name} needs {' and '.join(missing)} in data/{data.name} (or $DICO_DATA/{data.name}): "
            f"images.npy float32 {shape}, {content}, and labels.npy integers (M,) below {data.num_classes}"
        )


def inception_path() -> Path:
    """Where the Inception weights are expected: $DICO_INCEPTION, or in the data folder."""
    return Path(os.environ.get("DICO_INCEPTION", ROOT / INCEPTION))


def reference_path(data: Data) -> Path | None:
    """ADM's reference file of a latent set, in the set's folder; None for a set of pixels, which is its own reference."""
    return ROOT / data.name / REFERENCES.get(data.name, "reference.npz") if is_latent(data) else None


def vae_source() -> str:
    """The VAE that decodes latents: $DICO_VAE (a name or a folder), or the one that the papers use."""
    return os.environ.get("DICO_VAE", "sd-vae-ft-ema")


def is_latent(data: Data) -> bool:
    return data.channels == 4


def missing_features(spec: Evaluate) -> list[str]:
    """What scoring lacks on this machine, each with how to provide it."""
    if spec.features == "digits":
        return []
    missing = []
    if find_spec("torch_fidelity") is None:
        missing.append("the package torch-fidelity")
    if not inception_path().is_file():
        missing.append(f"the Inception weights {INCEPTION} in data/ (or $DICO_INCEPTION; calibrate.py --download fetches them)")
    if (reference := reference_path(spec.train.data)) and not reference.is_file():
        missing.append(f"the reference {reference.name} of ADM's evaluator in data/{spec.train.data.name} (or $DICO_DATA/{spec.train.data.name})")
    if is_latent(spec.train.data) and find_spec("diffusers") is None:
        missing.append("the package diffusers for the VAE (and $DICO_VAE, a folder, where it cannot be downloaded)")
    return missing


def require_features(spec: Evaluate) -> None:
    """Raise ValueError in one line where a protocol's score features are not to be had."""
    if missing := missing_features(spec):
        raise ValueError(
            f"protocol {spec.train.data.name} is scored on {spec.features} features and lacks {'; '.join(missing)}. "
            "Without them its networks can be built, counted and timed (--protocol digits, --table 5)"
        )
