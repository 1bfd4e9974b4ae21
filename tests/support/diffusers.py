"""Small diffusers transformers with random weights."""

from __future__ import annotations

import torch
from torch import nn

SMALL = dict(num_attention_heads=2, attention_head_dim=8)
SMALL_LATENT = SMALL | dict(
    in_channels=4, out_channels=8, num_layers=2, sample_size=6, patch_size=2
)


def transformer(name: str) -> nn.Module:
    """Build a transformer: DiT, PixArt or Flux."""
    import diffusers

    torch.manual_seed(0)
    if name == "DiT":
        return diffusers.DiTTransformer2DModel(**SMALL_LATENT, num_embeds_ada_norm=10)
    if name == "PixArt":
        return diffusers.PixArtTransformer2DModel(
            **SMALL_LATENT, caption_channels=12, cross_attention_dim=16
        )

    # Flux has one block for image and text apart, and two for both in one sequence.
    return diffusers.FluxTransformer2DModel(
        **SMALL,
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
