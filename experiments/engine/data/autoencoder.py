"""The VAE between pixels and latents in fp32: diffusers' AutoencoderKL, or VA-VAE from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.data.autoencoders.spaces import denormalise, space_of_config
from experiments.engine.data.autoencoders.vavae import NAME as VAVAE_NAME
from experiments.engine.data.autoencoders.vavae import load_vavae
from experiments.engine.data.image_files import file_sha256
from experiments.engine.machine.system_errors import explain, is_of_files, naming
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.records.files import read_json
from experiments.engine.specs.latent_space import SD_SPACE, LatentSpace, space_of
from experiments.engine.specs.spec import Data

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
UNKNOWN = "unknown"  # the name of every VAE whose hash is not a published one


@dataclass(frozen=True)
class Publication:
    """Where a VAE is published, and how its weights are known again."""

    # On the hub.
    repository: str
    # Commit of the repository.
    revision: str
    # Digest of its file of weights; None if it is not known here, so that only the hub's cache,
    # which names each file by its digest, can vouch for it.
    sha256: str | None


PUBLISHED = {
    "sd-vae-ft-ema": Publication(
        "stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a", None
    ),
    "sd-vae-ft-mse": Publication(
        "stabilityai/sd-vae-ft-mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
}


class Autoencoder:
    """Encodes images to posterior moments and decodes latents.

    Every forward pass has `batch` rows, so that no bit depends on how many images come at a time.
    A CPU takes one row at a time, which is as fast, and encodes in one thread: its convolutions
    round by the size of the batch and by the number of threads. Several processes use its cores.

    name: a published name if the weights are published ones, else UNKNOWN.
    channels: channels of a latent.
    factor: pixels for each place of a latent.
    space: how a network sees its latents; None: by the statistics of each set.
    encoder: hash of the encoder's weights, 16 hexadecimal digits.
    weights: hash of all weights, 16 hexadecimal digits.
    warnings: what a record must say of the stored weights.
    """

    warnings: tuple[str, ...] = ()
    space: LatentSpace | None = SD_SPACE

    def __init__(self, vae: Any, name: str, device: torch.device, batch: int) -> None:
        """Freeze diffusers' AutoencoderKL on a device; `batch` is for GPUs."""
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.name = name
        self.device = device
        self.batch = 1 if device.type == "cpu" else batch
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

        parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
        present = {name: part for name, part in parts.items() if part is not None}
        self.encoder = digest(nn.ModuleDict(present))
        self.weights = digest(vae)

    def moments(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1].

        Returns:
            Means, then deviations, of the posteriors (N, 2C, h, w), unscaled, on the CPU.
        """

        def encode(rows: Tensor) -> Tensor:
            posterior = self.vae.encode(rows).latent_dist
            return torch.cat([posterior.mean, posterior.std], 1)

        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.device.type == "cpu" else threads)
        try:
            return self._forward(encode, images)
        finally:
            torch.set_num_threads(threads)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) as a network sees them to images (N, 3, H, W) on the CPU."""
        space = self.space
        assert space is not None, "latents without a scale are decoded in the space of their set"
        return self._forward(lambda rows: self.vae.decode(denormalise(rows, space)).sample, latents)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] and decode the means of their posteriors."""

        def pass_through(rows: Tensor) -> Tensor:
            result: Tensor = self.vae.decode(self.vae.encode(rows).latent_dist.mean).sample
            return result

        return self._forward(pass_through, images)

    @torch.inference_mode()
    def _forward(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Run a network over inputs, padding the last batch with copies of its last row."""
        outputs = []
        for rows in inputs.float().split(self.batch):
            padding = rows[-1:].expand(self.batch - len(rows), -1, -1, -1)
            padded = torch.cat([rows, padding])
            with precision("fp32", self.device):
                outputs.append(network(padded.to(self.device))[: len(rows)].cpu())
        return torch.cat(outputs)


def missing_vae(source: str) -> str:
    """Say in one line what this machine lacks of a VAE, or return ''.

    A published VAE that is missing would be downloaded.
    """
    if source in PUBLISHED:
        if _is_cached(PUBLISHED[source]):
            return ""
        return f"the VAE {source}, which the run would download; $DICO_VAE can name a folder"
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_file():
            return ""
        return f"VAE {source} is neither {' nor '.join(PUBLISHED)} nor a folder with {_files()}"
    absent = [name for name in FILES if not (folder / name).is_file()]
    if not absent:
        return ""
    return f"VAE {source} lacks {' and '.join(absent)}; a folder with {_files()} is needed"


def _require_whole(folder: Path) -> None:
    """Raise ValueError with the file that is at fault unless both files of a VAE are whole."""
    from safetensors import SafetensorError, safe_open

    config, weights = (folder / name for name in FILES)
    read_json(config, "copy the VAE again")
    try:
        with naming("read", weights), safe_open(weights, "pt"):
            pass
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights}: damaged or cut short ({reason}); copy it again") from None


def _is_cached(publication: Publication) -> bool:
    from huggingface_hub import try_to_load_from_cache

    paths = [
        try_to_load_from_cache(publication.repository, name, revision=publication.revision)
        for name in FILES
    ]
    return all(isinstance(path, str) for path in paths)


def _files() -> str:
    return " and ".join(FILES)


def load_autoencoder(
    source: str, device: torch.device | str = "cpu", batch: int = 32
) -> Autoencoder:
    """Load a VAE.

    Args:
        source: a published name, which is downloaded if the network allows it; a diffusers folder
            with safetensors; or a file of VA-VAE's authors.
        device: where it runs.
        batch: rows of a forward pass on a GPU.

    Raises:
        ValueError: the VAE cannot be loaded, or its config does not say what its latents are.
    """
    if source not in PUBLISHED and Path(source).is_file():
        network, notes = load_vavae(Path(source))
        autoencoder = Autoencoder(network, VAVAE_NAME, torch.device(device), batch)
        autoencoder.space = None
    else:
        vae, folder = _load_diffusers_vae(source)
        notes = _judge_stored(folder / FILES[1], source)
        backbones.check_values(vae, vae.state_dict(), f"VAE {source}")
        name = identify_vae(folder / FILES[1], source)
        autoencoder = Autoencoder(vae, name, torch.device(device), batch)
        autoencoder.space = space_of_config(folder / FILES[0])

    # Rounded weights are said here and in what is made of them.
    autoencoder.warnings = tuple(notes)
    for text in notes:
        backbones.print_warning(text)
    return autoencoder


def require_latents_of(data: Data, autoencoder: Autoencoder, source: str) -> None:
    """Raise ValueError unless an autoencoder makes latents of the shape and space of a set.

    The rule of a captioned set scales them by a factor of its own.
    """
    space, made = space_of(data), autoencoder.space
    fits = (autoencoder.channels, autoencoder.factor) == (data.channels, space.factor)
    if fits and (made in (None, space) or data.captions):
        return
    raise ValueError(
        f"VAE {source} makes latents of {autoencoder.channels} channels with "
        f"{made or f'no scale, {autoencoder.factor} pixels a side'}; set {data.name} needs "
        f"{data.channels} channels with {space}; name another VAE, or prepare a set of your own "
        "with --classes"
    )


def _judge_stored(path: Path, source: str) -> list[str]:
    """Return warnings about the types in which a file keeps weights, before diffusers converts.

    Raises:
        ValueError: a tensor holds no floating-point numbers.
    """
    from safetensors.torch import load_file

    stored = load_file(path)
    others = [name for name, value in stored.items() if not value.is_floating_point()]
    if others:
        raise ValueError(
            f"VAE {source}: {others[0]} is stored as {stored[others[0]].dtype}, which is no "
            "floating-point type; save fp32 tensors"
        )
    notes: list[str] = []
    backbones.convert_stored(stored, f"VAE {Path(source).name}", notes.append)
    return notes


def identify_vae(weights: Path, source: str) -> str:
    """Return the published name of a file of weights by its SHA-256, or UNKNOWN.

    Args:
        weights: the file.
        source: the published name for which the hub's client gave it, or the folder.
    """
    digest = file_sha256(weights)
    for name, publication in PUBLISHED.items():
        if digest == publication.sha256:
            return name

    # The hub's client keeps a file under its digest on the hub, and links to it.
    unlisted = source in PUBLISHED and PUBLISHED[source].sha256 is None
    if unlisted and weights.resolve().name == digest:
        return source
    return UNKNOWN


def _require_all_weights(loaded: dict[str, list[Any]], source: str) -> None:
    """Raise ValueError if diffusers left weights of a file unread, or drew some by itself."""
    missing, unexpected = loaded["missing_keys"], loaded["unexpected_keys"]
    if missing or unexpected:
        named = [f"missing {name}" for name in sorted(missing)[:2]]
        named += [f"unexpected {name}" for name in sorted(unexpected)[:2]]
        raise ValueError(
            f"VAE {source}: its weights are those of another autoencoder than its config's "
            f"({len(missing) + len(unexpected)} keys differ): {'; '.join(named)}"
        )


def _load_diffusers_vae(source: str) -> tuple[Any, Path]:
    """Return diffusers' network, and the folder of its files."""
    try:
        from diffusers import AutoencoderKL
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError("the VAE needs diffusers: pip install -e .[latents]") from None

    if source not in PUBLISHED:
        missing = missing_vae(source)
        if missing:
            raise ValueError(missing)
        _require_whole(Path(source))
        space_of_config(Path(source) / FILES[0])
    try:
        folder = source
        if source in PUBLISHED:
            publication = PUBLISHED[source]
            folder = snapshot_download(
                publication.repository,
                revision=publication.revision,
                allow_patterns=list(FILES),
            )
        vae, loaded = AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error)) from None

        # diffusers raises half a dozen kinds here, and each means the same to the user.
        message = str(error).strip()
        reason = message.splitlines()[0] if message else type(error).__name__
        advice = (
            f"; name a folder with its {_files()} (--vae, or $DICO_VAE)"
            if source in PUBLISHED
            else ""
        )
        raise ValueError(f"VAE {source} cannot be loaded{advice} ({reason})") from None
    _require_all_weights(loaded, source)
    return vae, Path(folder)
