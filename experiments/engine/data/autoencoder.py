"""The VAE between pixels and latents: diffusers' AutoencoderKL in fp32, by name or from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.engine.data.latents import SCALE
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.specs.spec import FACTOR, LATENT_CHANNELS

PUBLISHED = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")}
FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Autoencoder:
    """Encodes to posterior moments and decodes. Every forward pass has `batch` rows, so no bit depends on how many are asked for.

    A CPU takes one row at a time, which is as fast, and encodes in one thread: its convolutions round by the size of the batch
    and by the number of threads. Several processes use its cores.
    `encoder` and `weights` are hashes of the encoder's and of all weights, 16 hexadecimal digits; `factor` is pixels a latent.
    """

    def __init__(self, vae: nn.Module, name: str, device: torch.device, batch: int) -> None:
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.name, self.device, self.batch = name, device, 1 if device.type == "cpu" else batch
        self.channels, self.factor = (
            vae.config.latent_channels,
            2 ** (len(vae.config.block_out_channels) - 1),
        )
        parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
        self.encoder, self.weights = (
            digest(nn.ModuleDict({name: part for name, part in parts.items() if part is not None})),
            digest(vae),
        )

    def moments(self, images: Tensor) -> Tensor:
        """Means and deviations (N, 2C, h, w) of the posteriors of images (N, 3, H, W) in [-1, 1], unscaled, on the CPU."""

        def encode(part: Tensor) -> Tensor:
            posterior = self.vae.encode(part).latent_dist
            return torch.cat([posterior.mean, posterior.std], 1)

        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.device.type == "cpu" else threads)
        try:
            return self._run(encode, images)
        finally:
            torch.set_num_threads(threads)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W), about [-1, 1], on the CPU, of latents (N, C, h, w) that carry the factor 0.18215."""
        return self._run(lambda part: self.vae.decode(part / SCALE).sample, latents)

    @torch.inference_mode()
    def _run(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        outputs = []
        for part in inputs.float().split(self.batch):
            padded = torch.cat([part, part[-1:].expand(self.batch - len(part), -1, -1, -1)])
            with precision("fp32", self.device):
                outputs.append(network(padded.to(self.device))[: len(part)].cpu())
        return torch.cat(outputs)


def missing_vae(source: str) -> str:
    """What is not on this machine of a VAE, in a line, or ''. A published one that is missing would be downloaded."""
    if source not in PUBLISHED:
        here = (Path(source) / FILES[0]).is_file()
        return (
            ""
            if here
            else f"VAE {source} is neither {' nor '.join(PUBLISHED)} nor a folder with {' and '.join(FILES)}"
        )
    from huggingface_hub import try_to_load_from_cache

    here = all(isinstance(try_to_load_from_cache(PUBLISHED[source], name), str) for name in FILES)
    return (
        ""
        if here
        else f"the VAE {source}, which the run would download; $DICO_VAE names a folder instead"
    )


def load_autoencoder(
    source: str, device: torch.device | str = "cpu", batch: int = 32
) -> Autoencoder:
    """A published VAE by name (downloaded where the network allows it), or a diffusers folder with its weights as safetensors.

    ValueError in one line if it is not to be had, scales its latents by another factor or makes them of another size.
    """
    try:
        from diffusers import AutoencoderKL
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError("the VAE needs diffusers: pip install -e .[latents]") from None

    device, folder = torch.device(device), Path(source)
    if source not in PUBLISHED and (lacking := missing_vae(source)):
        raise ValueError(lacking)
    try:
        if source in PUBLISHED:
            folder = snapshot_download(PUBLISHED[source], allow_patterns=list(FILES))
        vae = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except (
        Exception
    ) as error:  # diffusers raises half a dozen kinds here, and each means the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            f"; give --vae a folder with its {' and '.join(FILES)}" if source in PUBLISHED else ""
        )
        raise ValueError(f"VAE {source} cannot be loaded{advice} ({reason})") from None
    if vae.config.scaling_factor != SCALE or vae.config.shift_factor:
        raise ValueError(
            f"VAE {source} scales its latents by {vae.config.scaling_factor} and shifts them by {vae.config.shift_factor}; only {SCALE} without a shift is known"
        )
    found = Autoencoder(
        vae, source if source in PUBLISHED else Path(source).resolve().name, device, batch
    )
    if (found.factor, found.channels) != (FACTOR, LATENT_CHANNELS):
        raise ValueError(
            f"VAE {source} makes {found.channels} channels of {found.factor} pixels a side; the latents of every protocol are {LATENT_CHANNELS} of {FACTOR}"
        )
    return found
