"""VA-VAE, the autoencoder of LightningDiT's latents: Yao et al., CVPR 2025.

Source: arXiv:2501.01423 and github.com/hustvl/LightningDiT at 2725fed. Its parts are those of VAR's
tokenizer but for the attention, whose three projections are apart.

An image of 256 pixels becomes 16 x 16 latents of 32 channels. No factor scales them: each channel
is normalised by the mean and deviation of many latents, which belong to the weights.

Legend: N images, C latent channels, (H, W) image, f its ratio to the latent's side, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import kernels
from backbones.registry import register
from backbones.vqvae import Decoder, Encoder, group_norm

# Files hold what training needs beside the autoencoder.
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PUBLISHED = "vavae_f16d32"  # the registered name
COSINE_MARGIN = 0.5
DISTANCE_MARGIN = 0.25
LARGEST_WEIGHT = 1e8  # of the alignment, relative to the reconstruction


class SplitAttention(nn.Module):
    """Attend among all pixels with one head: (N, D, H, W) -> (N, D, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        h = kernels.attention(q, k, v)[:, 0].mT  # (N, D, HW)
        return x + self.proj_out(h.reshape(x.shape))


class Posterior(NamedTuple):
    """The distribution of an image's latents."""

    mean: Tensor  # (N, C, H/f, W/f)
    log_variance: Tensor  # (N, C, H/f, W/f)


class VAVAE(nn.Module):
    """The autoencoder. `dim` is the width of the finest level; `multipliers` are of all levels."""

    def __init__(
        self,
        *,
        channels: int = 32,
        image_channels: int = 3,
        dim: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
    ) -> None:
        super().__init__()
        if dim % 32:
            raise ValueError(f"VA-VAE normalises 32 groups: dim must divide by 32, got {dim}")
        self.channels = channels
        self.image_channels = image_channels
        self.factor = 2 ** (len(multipliers) - 1)

        widths = [dim * multiplier for multiplier in multipliers]
        shape = widths, res_blocks, SplitAttention
        self.encoder = Encoder(image_channels, 2 * channels, *shape)
        self.decoder = Decoder(image_channels, channels, *shape)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of images (N, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the sides do not divide by the factor.
        """
        if any(side % self.factor for side in images.shape[-2:]):
            raise ValueError(
                f"VA-VAE needs sides that divide by {self.factor}, got {tuple(images.shape[-2:])}"
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, H, W), not clamped, of latents (N, C, H/f, W/f) as they are encoded.

        Raises:
            ValueError: the latents are of another autoencoder.
        """
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"this VA-VAE decodes latents of {self.channels} channels, got {latents.shape[1]}"
            )
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images (N, 3, H, W) from the means of their posteriors."""
        return self.decode(self.encode(images).mean)

    def from_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop what a training's file holds beside the autoencoder.

        Raises:
            ValueError: the weights are those of a Stable Diffusion autoencoder.
        """
        own = {name: value for name, value in weights.items() if name.startswith(PARTS)}
        stem = own.get("decoder.conv_in.weight")
        if stem is not None and stem.shape[1] != self.channels:
            raise ValueError(
                f"these are weights of an autoencoder with {stem.shape[1]} latent channels, and "
                f"not of this VA-VAE with {self.channels}"
            )
        return own


def align_features(
    projected: Tensor,
    features: Tensor,
    cosine_margin: float = COSINE_MARGIN,
    distance_margin: float = DISTANCE_MARGIN,
) -> tuple[Tensor, Tensor]:
    """Return the two terms that draw latents to a vision model's features, each 0-d.

    The first compares all pairs of positions: by how much the cosine of two latents is further from
    that of their features than a margin. The second compares each latent with its own feature.
    Source: the paper's section 3.2, with projected latents in both terms as in the code.

    Args:
        projected: latents, projected to the width of the features, (N, D, h, w).
        features: (N, D, h, w).
        cosine_margin: by which a cosine may fall short of 1.
        distance_margin: by which two cosines may differ.
    """
    z = F.normalize(projected.flatten(2), dim=1)  # (N, D, hw)
    f = F.normalize(features.flatten(2), dim=1)
    difference = (z.mT @ z - f.mT @ f).abs()  # (N, hw, hw)
    pairs = (difference - distance_margin).relu().mean()
    own = (1 - cosine_margin - (z * f).sum(dim=1)).relu().mean()
    return pairs, own


def weigh_alignment(
    reconstruction: Tensor, alignment: Tensor, layer: Tensor, weight: float = 0.1
) -> Tensor:
    """Return the weight (0-d) at which both losses pull equally, times `weight`; no gradient.

    Args:
        reconstruction: loss, 0-d.
        alignment: loss, 0-d.
        layer: what both gradients are taken of: the weights of the encoder's last layer.
        weight: of the alignment relative to the reconstruction.
    """
    (pull,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (other,) = torch.autograd.grad(alignment, layer, retain_graph=True)
    ratio = pull.norm() / (other.norm() + 1e-4)
    return weight * ratio.clamp(0, LARGEST_WEIGHT).detach()


register(
    VAVAE,
    {PUBLISHED: {}},
    tiny=dict(channels=4, dim=32, multipliers=(1, 2), res_blocks=1),
    kind="autoencoder",
)
