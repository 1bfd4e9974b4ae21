"""Where data lies, and what this machine lacks of it. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.engine.data.captioned import folders
from experiments.engine.data.captioned.grammar import NAMES as CAPTIONED
from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.system_errors import explain, naming
from experiments.engine.records.files import file_sha256, written_whole
from experiments.engine.records.measured import measure_once
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.latent_space import SD_SPACE, LatentSpace, space_of
from experiments.engine.specs.spec import LATENT_CHANNELS, Data, Evaluate, is_latent

ROOT = Path(read_variable("DICO_DATA") or REPOSITORY / "data")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
DINOV2 = "dinov2_vitl14_pretrain.pth"
JUDGE_WEIGHTS = REPOSITORY / "results" / "weights" / "cifar_judge.safetensors"
REFERENCES = {
    "imagenet256": "VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": "VIRTUAL_imagenet512.npz",
}

# Sets that a package bears.
BUNDLED = ("digits", *CAPTIONED)
SEAL = "data.json"
# Folders of one's own by the digest of their content, as far as this process has declared them.
_OWN: dict[str, Path] = {}


def own_data(folder: Path | str, *, split: str = "whole", flip: bool = False) -> Data:
    """Declare the set in a folder that `prepare.py` has prepared.

    Its content names the set; the path does not. A set of latents cannot be split.

    Raises:
        ValueError: the folder is not prepared, or its content has changed since.
    """
    folder = Path(folder).resolve()
    path = folder / SEAL
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {SEAL}; prepare it with python experiments/prepare.py pixels, "
            "latents or arrays, and --classes"
        )
    try:
        sealed = json.loads(path.read_text())
        sha256, num_classes = str(sealed["sha256"]), int(sealed["num_classes"])
        channels, size = (int(number) for number in sealed["shape"])
        latents, vae = sealed["latents"], sealed["vae"]
        space = LatentSpace.read(sealed["space"]) if sealed.get("space") else None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read; prepare the folder again") from None

    _OWN[sha256] = folder
    name = f"own_{sha256[:8]}"
    data = Data(name, size, channels, num_classes, flip, split=split, sha256=sha256)
    if latents:
        data = replace(data, latents=latents, vae=vae, space=space)
    require_content(data)
    return data


def seal_folder(folder: Path, num_classes: int) -> str:
    """Write data.json, which holds shape, classes and the digest of a prepared folder's content.

    Returns:
        The digest.

    Raises:
        ValueError: the folder holds neither images.npy nor latents, or images that are not square.
    """
    latents, vae, space = None, None, None
    if (folder / "manifest.json").is_file():
        manifest = json.loads((folder / "manifest.json").read_text())
        latents, (_, channels, height, width) = manifest["latents"], manifest["shape"]
        channels = channels // 2 if latents == "moments" else channels
        expected = manifest["statistics"]["as_expected"]
        vae = "sd-vae-ft" if expected else manifest["vae"]["encoder"]
        if LatentSpace.read(manifest["vae"]) != SD_SPACE or channels != LATENT_CHANNELS:
            space = LatentSpace.read(manifest["vae"]).describe()
    else:
        import numpy as np

        if not (folder / "images.npy").is_file():
            raise ValueError(f"{folder} holds neither images.npy nor latents; prepare it first")
        shape = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False).shape
        if len(shape) != 4 or shape[1] == LATENT_CHANNELS:
            raise ValueError(
                f"images.npy in {folder} holds {shape}; pixels are (M, C, size, size) with C other "
                f"than {LATENT_CHANNELS}"
            )
        _, channels, height, width = shape
    if height != width:
        raise ValueError(f"{folder} holds images of {height} x {width}; crop them to squares")

    sha256 = _content_of(folder)
    stored: dict[str, Any] = dict(
        sha256=sha256, num_classes=num_classes, shape=[channels, height], latents=latents, vae=vae
    )
    if space:
        stored["space"] = space
    with written_whole(folder / SEAL) as file:
        file.write(json.dumps(stored, indent=1).encode() + b"\n")
    return sha256


def require_content(data: Data) -> None:
    """Raise ValueError if the content of a folder of one's own is not what is declared."""
    if data.sha256 and _content_of(folder_of(data)) != data.sha256:
        raise ValueError(
            f"the content of {folder_of(data)} has changed since it was prepared; restore it, or "
            "prepare it again, which makes it another set"
        )


def _content_of(folder: Path) -> str:
    """Digest the arrays and classes of a folder by name and content. A file is read once."""
    names = ["images.npy", "labels.npy", "classes.txt"]
    files = [folder / name for name in names if (folder / name).is_file()]
    total = hashlib.sha256()
    for path in (*files, *sorted(folder.glob("shard-*.npy"))):
        total.update(
            f"{path.name} {measure_once([path], 'sha256', partial(file_sha256, path))}\n".encode()
        )
    return total.hexdigest()


def folder_of(data: Data) -> Path:
    """Folder of a set; fixed latents have one of their own beside that of the moments."""
    if data.sha256:
        if data.sha256 not in _OWN:
            raise ValueError(
                f"set {data.name} is a folder of one's own; name the study that declares it"
            )
        return _OWN[data.sha256]
    suffix = "_fixed" if data.latents == "fixed" else ""
    return ROOT / f"{data.name}{suffix}"


def require_data(data: Data) -> None:
    """Raise ValueError if a set is not on this machine; the message says how to provide it."""
    if data.name in CAPTIONED:
        folders.require_states(folder_of(data), data)
    if data.name in BUNDLED:
        return
    if data.sha256:
        folder_of(data)
        return
    if data.name == "cifar10":
        _require_cifar10(data)
    elif folders.is_coco(data):
        folders.require_coco(ROOT, folder_of(data), data)
        read_manifest(folder_of(data), data)
    elif data.name.startswith("imagenet") and is_latent(data):
        _require_latents(data)
    elif not has_manifest(data):
        _require_arrays(data)


def _where(folder: Path) -> str:
    """The place of a folder, as messages name it."""
    return f"data/{folder.name} (or $DICO_DATA/{folder.name})"


def _require_cifar10(data: Data) -> None:
    folder = folder_of(data)
    if not find_cifar10(folder, "train"):
        raise ValueError(
            "protocol cifar10 needs train.parquet (columns img and label) or torchvision's "
            f"cifar-10-batches-py in {_where(folder)}; where the network allows it, "
            "python experiments/prepare.py cifar10 downloads the latter"
        )


def _require_latents(data: Data) -> None:
    folder = folder_of(data)
    if not has_manifest(data):
        raise ValueError(
            f"protocol {folder.name} needs VAE latents in {_where(folder)}; "
            f"python experiments/prepare.py latents --protocol {folder.name} --images FOLDER makes "
            f"them from a folder of {data.num_classes} class folders"
        )
    read_manifest(folder, data)


def _require_arrays(data: Data) -> None:
    folder = folder_of(data)
    files = ("images.npy", "labels.npy")
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return

    # Prepared sets of pixels have a command that makes them.
    command = ""
    if data.name.endswith("_pixels"):
        command = (
            f"; python experiments/prepare.py pixels --size {data.size} --images FOLDER makes them"
        )
    raise ValueError(
        f"set {data.name} needs {' and '.join(missing)} in {_where(folder)}: images.npy, pixels "
        f"(M, {data.channels}, {data.size}, {data.size}), uint8 or float32 in [-1, 1], and "
        f"labels.npy, integers (M,) below {data.num_classes}{command}"
    )


def find_cifar10(folder: Path, split: str) -> list[Path]:
    """List the parquet files of a split ('train' or 'test'), or else torchvision's folder.

    Raises:
        ValueError: parts are missing or doubled.
    """
    tables = sorted(folder.glob(f"{split}*.parquet"))
    if tables:
        _require_every_part(tables)
        return tables
    batches = folder / "cifar-10-batches-py"
    return [batches] if batches.is_dir() else []


def _require_every_part(tables: list[Path]) -> None:
    """Raise ValueError unless files named '-00000-of-00002' are one table, each part once."""
    matches = [re.search(r"-([0-9]+)-of-([0-9]+)", path.name) for path in tables]
    parts = [(int(match[1]), int(match[2])) for match in matches if match]
    if not parts:
        return
    total = parts[0][1]
    whole = [(part, total) for part in range(total)]
    if len(parts) == len(tables) and sorted(parts) == whole:
        return
    names = ", ".join(path.name for path in tables)
    raise ValueError(
        f"data/{tables[0].parent.name} holds {names}: parts are missing, doubled or of different "
        f"tables; parts 0 to {total - 1} of {total} are needed, and no other table of that split"
    )


def has_manifest(data: Data) -> bool:
    """Tell whether finished latents of a set are on this machine."""
    return (folder_of(data) / "manifest.json").is_file()


def read_manifest(folder: Path, data: Data) -> dict[str, Any]:
    """Read the manifest of a folder of latents.

    Raises:
        ValueError: the manifest is damaged, or its latents are not those that `data` declares.
    """
    try:
        with naming("read", folder / "manifest.json"):
            manifest = json.loads((folder / "manifest.json").read_text())
        stored = {name: manifest[name] for name in ("latents", "shape", "num_classes")}
        as_expected = manifest["statistics"]["as_expected"]
        encoder = manifest["vae"]["encoder"]
        vae = manifest["vae"]["name"]
        space = LatentSpace.read(manifest["vae"])
    except OSError as error:
        raise ValueError(explain(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder.name}/manifest.json cannot be read ({type(error).__name__}: {error}); "
            "prepare the latents again"
        ) from None

    # The latents must have the declared kind, shape and classes ...
    channels = 2 * data.channels if data.latents == "moments" else data.channels
    declared = {
        "latents": data.latents,
        "shape": [2, channels, data.size, data.size],
        "num_classes": data.num_classes,
    }
    other = [
        f"{name} {stored[name]}, not {value}"
        for name, value in declared.items()
        if stored[name] != value
    ]
    if space != space_of(data):
        other.append(f"latents with {space}, not {space_of(data)}")
    if other:
        raise ValueError(
            f"the latents in {folder.name} do not fit protocol {data.name}: {'; '.join(other)}; "
            "prepare them again elsewhere ($DICO_DATA)"
        )

    # ... and the declared VAE.
    fits = as_expected if data.vae == "sd-vae-ft" else encoder == data.vae
    if not fits:
        raise ValueError(
            f"the latents in {folder.name} were made with another VAE ({vae}, encoder {encoder}); "
            f"this run declares {data.vae}"
        )
    return manifest


def encoder_path(name: str) -> Path:
    """Return where the weights of an encoder lie: safetensors, or PyTorch's .pth or .pt."""
    paths = [ROOT / "encoders" / f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".pt")]
    return next((path for path in paths if path.is_file()), paths[0])


def inception_path() -> Path:
    """Where the Inception weights are expected: $DICO_INCEPTION, or in the data folder."""
    return Path(read_variable("DICO_INCEPTION") or ROOT / INCEPTION)


def dinov2_path() -> Path:
    """Where DINOv2's weights are expected: $DICO_DINOV2, or in the data folder."""
    return Path(read_variable("DICO_DINOV2") or ROOT / DINOV2)


def reference_path(data: Data) -> Path | None:
    """Where ADM's reference file of a set is expected.

    It lies in the folder of the latents and serves ImageNet's pixels too. Other sets of pixels are
    their own reference and have no file.
    """
    if data.sha256:
        return folder_of(data) / "reference.npz" if is_latent(data) else None
    name = data.name.removesuffix("_pixels")
    if not is_latent(data) and name not in REFERENCES:
        return None
    return ROOT / name / REFERENCES.get(name, "reference.npz")


def vae_source() -> str:
    """The VAE that decodes latents: $DICO_VAE (a name or a folder), or the papers' one."""
    return read_variable("DICO_VAE") or "sd-vae-ft-ema"


def missing_features(spec: Evaluate) -> list[str]:
    """List what scoring lacks on this machine, each with how to provide it."""
    if spec.features in ("digits", "digits_judge", "digits_text"):
        return []
    if spec.features in ("cifar_classifier", "cifar_judge"):
        missing = []
        if not find_cifar10(folder_of(spec.data), "test"):
            missing.append(
                "CIFAR-10's test images (test.parquet or cifar-10-batches-py) in data/cifar10 "
                "(or $DICO_DATA/cifar10)"
            )
        if spec.features == "cifar_judge" and not JUDGE_WEIGHTS.is_file():
            missing.append(
                f"the judge's weights {JUDGE_WEIGHTS.name} in results/weights (restore them with "
                "git, or train a judge with prepare.py judge)"
            )
        return missing

    # Inception features need a package, weights, a reference, and for latents a VAE.
    missing = []
    if find_spec("torch_fidelity") is None:
        missing.append("the package torch-fidelity")
    if not inception_path().is_file():
        missing.append(
            f"the Inception weights {INCEPTION} in data/ (or $DICO_INCEPTION; calibrate.py "
            "--download fetches them)"
        )
    reference = reference_path(spec.data)
    if reference and not reference.is_file():
        adm = f"the reference {reference.name} of ADM's evaluator in {_where(reference.parent)}"
        missing.append(folders.missing_reference(spec.data) if folders.is_coco(spec.data) else adm)
    if is_latent(spec.data) and find_spec("diffusers") is None:
        missing.append(
            "the package diffusers for the VAE (and $DICO_VAE, a folder, where it cannot be "
            "downloaded)"
        )
    return missing


def require_features(spec: Evaluate) -> None:
    """Raise ValueError if this machine cannot compute the features of a protocol's scores."""
    if spec.data.sha256 and spec.features != "inception":
        raise ValueError(
            f"data of one's own are scored on inception features, and {spec.features} are those of "
            "another set; declare features='inception'"
        )
    missing = missing_features(spec)
    if not missing:
        return
    otherwise = "its networks can be built, counted and timed (--protocol digits, --table 5)"
    if (spec.data.name, spec.features) == ("cifar10", "inception"):
        otherwise = (
            "protocol cifar10_classifier scores the same trainings on a classifier's features"
        )
    raise ValueError(
        f"protocol {spec.data.name} is scored on {spec.features} features and lacks "
        f"{'; '.join(missing)}. Without them {otherwise}"
    )
