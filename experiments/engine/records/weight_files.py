"""Files of weights that a study declares: where they lie, and whether they have changed."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from experiments.engine.records.files import file_sha256
from experiments.engine.records.measured import measure_once
from experiments.engine.specs.weights import Weights

# Files and folders of weights by the digest of their content, as far as this process has declared
# them.
_DECLARED: dict[str, Path] = {}
# What a folder of the diffusers library calls a pipeline's network, and holds of it.
PARTS = ("transformer", "unet")
FOLDER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def own_weights(
    path: Path | str, *, labels: str = "same", key: str = "ema", sha256: str | None = None
) -> Weights:
    """Declare the weights in a file, or in a folder of the diffusers library.

    Their content names them; the path does not.

    Args:
        path: a .pt or .safetensors file, or a folder.
        labels: what becomes of the label table, as in Weights.
        key: where the file keeps its weights.
        sha256: the digest that the content must have, where it is known.

    Raises:
        ValueError: there is no such file, its content is another, or `labels` is unknown.
    """
    path = Path(path).resolve()
    found = weights_sha256(path)
    if sha256 not in (None, found):
        raise ValueError(
            f"{path} has SHA-256 {found}, and {sha256} is declared; "
            "name the file that was meant, or declare its digest"
        )
    weights = Weights(found, key, labels)
    _DECLARED[found] = path
    return weights


def require_weights(sha256: str) -> Path:
    """Return where weights of this content lie.

    Raises:
        ValueError: no study has declared them, or their content has changed since.
    """
    path = _DECLARED.get(sha256)
    if path is None:
        raise ValueError(
            f"the training starts from weights with SHA-256 {sha256[:16]}..., which no study of "
            "this process declares; name the study, with the file as it was"
        )
    require_unchanged(path, sha256)
    return path


def require_unchanged(path: Path, sha256: str) -> None:
    """Raise ValueError unless a file or a folder of weights has this content."""
    found = weights_sha256(path)
    if found != sha256:
        raise ValueError(
            f"the content of {path} has changed: its SHA-256 is {found[:16]}..., not "
            f"{sha256[:16]}...; restore it, or declare it anew, which makes it another run"
        )


def weights_sha256(path: Path) -> str:
    """Return the digest of a file, or of the names and digests of a folder's files.

    A pipeline's folder stands for the network in it.

    Raises:
        ValueError: there is no such file, or the folder holds no network of the diffusers library.
    """
    if not path.is_dir():
        return _digest_of(path)
    folder = next((path / part for part in PARTS if (path / part).is_dir()), path)
    lines = [f"{name} {_digest_of(folder / name)}\n" for name in FOLDER_FILES]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    """Digest a file, once as long as it stays as it is."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such checkpoint; give the path of a .pt or .safetensors file, or of a "
            f"folder with {' and '.join(FOLDER_FILES)}"
        )
    digest: str = measure_once([path], "sha256", partial(file_sha256, path))
    return digest
