"""VA-VAE from a file of its authors, under the surface that diffusers' AutoencoderKL has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import backbones

NAME = "va-vae"
# Of the network, where they are not those of the published one: 32 channels, 16 pixels a side.
OPTIONS: dict[str, Any] = {}


class Adapted(nn.Module):
    """The network with diffusers' names for its config, its parts and its results."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.quant_conv = network.quant_conv
        self.post_quant_conv = network.post_quant_conv
        self.network = [network]  # in a list, so that its parts are registered once
        levels = network.factor.bit_length()
        self.config = SimpleNamespace(
            latent_channels=network.channels, block_out_channels=(0,) * levels
        )

    def encode(self, images: Tensor) -> SimpleNamespace:
        posterior = self.network[0].encode(images)
        deviation = torch.exp(0.5 * posterior.log_variance)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=posterior.mean, std=deviation))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network[0].decode(latents))


def load_vavae(path: Path) -> tuple[Adapted, list[str]]:
    """Load VA-VAE from a .pt or .safetensors file; return it and what a record must say of it.

    Raises:
        ValueError: in one line, if the file holds another network, such as Stable Diffusion's VAE.
    """
    with torch.random.fork_rng(devices=[]):
        network = backbones.build(backbones.PUBLISHED_AUTOENCODER, **OPTIONS)
    notes: list[str] = []
    try:
        backbones.load_published(network, path, warn=notes.append)
    except ValueError as error:
        raise ValueError(
            f"{error}; a file is read as VA-VAE, and an AutoencoderKL of diffusers is a folder"
        ) from None
    return Adapted(network), notes
