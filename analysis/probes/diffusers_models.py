"""Attention locality of diffusers' DiT, PixArt and Flux transformers, from a local folder or a model in memory.

Each is brought to (x, t, y) -> prediction on a grid of tokens or patches; in Flux's joint attention only the image tokens
count. N images, C channels (of a packed token in Flux), (H, W) latent grid, of packed tokens in Flux.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.probes.declared import DiffusersLocality
from analysis.probes.layers import Layer, attention_of
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.samplers import DDIM
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.sampling.generate import image_seeds

CLASSES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")


def load(folder: Path) -> nn.Module:
    """A transformer from a local folder, or from the `transformer` folder of a pipeline. Nothing is downloaded, no code is run."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder.name} holds no config.json of a diffusers model; give a model's folder or a pipeline's"
        ) from None
    if name not in CLASSES:
        raise ValueError(f"{folder.name} holds a {name}; this probe takes {', '.join(CLASSES)}")
    import diffusers

    try:
        return (
            getattr(diffusers, name)
            .from_pretrained(
                folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
            .eval()
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder.name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None


def digest(folder: Path) -> str:
    """SHA-256 of all weight files of a model's folder, in the order of their names."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def conditioning_from(path: Path) -> tuple[dict[str, Tensor], str]:
    """Text embeddings by the names of the model's arguments, one prompt each: encoder_hidden_states (1, S, E) and, for Flux,

    pooled_projections (1, P); and the file's SHA-256.
    """
    try:
        packed = path.read_bytes()
        with np.load(path, allow_pickle=False) as stored:
            found = {name: torch.from_numpy(stored[name]).float() for name in stored.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{path}: no .npz file of plain arrays ({str(error).strip().splitlines()[0]})"
        ) from None
    return found, hashlib.sha256(packed).hexdigest()


class Adapted(nn.Module):
    """A diffusers transformer as (x, t, y) -> prediction: (N, C, H, W), (N,), (N,) -> (N, C_out, H, W).

    `conditioning` holds text embeddings of one prompt; zeros stand in for what is missing, 16 text tokens of them.
    In Flux t is sigma, 0 (data) to 1 (noise).
    """

    def __init__(
        self,
        model: nn.Module,
        conditioning: dict[str, Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name = model, type(model).__name__
        if self.name not in CLASSES:
            raise ValueError(f"{self.name} is not probed; this probe takes {', '.join(CLASSES)}")
        config = model.config
        self.flux = self.name == CLASSES[2]
        side = None if self.flux else config.sample_size
        self.input_grid = (side, side) if side else grid or (32, 32)
        if side and grid and tuple(grid) != (side, side):
            raise ValueError(
                f"this {self.name} takes latents of {side}x{side}, not {grid[0]}x{grid[1]}"
            )
        self.patch = config.patch_size
        self.grid = tuple(length // self.patch for length in self.input_grid)
        self.channels = config.in_channels
        text, width = (
            16,
            config.joint_attention_dim if self.flux else getattr(config, "caption_channels", None),
        )
        needed = {"encoder_hidden_states": (1, text, width)} if self.name != CLASSES[0] else {}
        needed |= {"pooled_projections": (1, config.pooled_projection_dim)} if self.flux else {}
        self.conditioning = {
            name: (conditioning or {}).get(name, torch.zeros(shape))
            for name, shape in needed.items()
        }
        for name, shape in needed.items():
            if (
                self.conditioning[name].ndim != len(shape)
                or self.conditioning[name].shape[-1] != shape[-1]
                or len(self.conditioning[name]) != 1
            ):
                raise ValueError(
                    f"{name} is {tuple(self.conditioning[name].shape)}, this model needs (1, ..., {shape[-1]})"
                )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        given = {
            name: value.to(x).expand(len(x), *value.shape[1:])
            for name, value in self.conditioning.items()
        }
        if self.flux:
            rows, columns = torch.meshgrid(
                *(torch.arange(side, device=x.device) for side in self.grid), indexing="ij"
            )
            places = (
                torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(x)
            )  # (T, 3)
            guidance = (
                torch.full((len(x),), 3.5, device=x.device)
                if self.model.config.guidance_embeds
                else None
            )
            text = x.new_zeros(given["encoder_hidden_states"].shape[1], 3)
            out = self.model(
                x.flatten(2).mT,
                timestep=t.to(x),
                img_ids=places,
                txt_ids=text,
                guidance=guidance,
                **given,
                return_dict=False,
            )[0]
            return out.mT.unflatten(2, self.grid)
        if self.name == CLASSES[0]:
            return self.model(x, timestep=t, class_labels=y, return_dict=False)[0]
        size = None
        if self.model.use_additional_conditions:
            size = {
                "resolution": x.new_tensor(self.input_grid).mul(8).expand(len(x), 2),
                "aspect_ratio": x.new_ones(len(x), 1),
            }
        given["added_cond_kwargs"] = size or {"resolution": None, "aspect_ratio": None}
        return self.model(x, timestep=t, **given, return_dict=False)[0]

    def layers(self) -> list[Layer]:
        """Self-attention of every block; of Flux both the double-stream and the single-stream blocks."""
        text = self.conditioning["encoder_hidden_states"].shape[1] if self.flux else 0
        place = text + torch.arange(self.grid[0] * self.grid[1])
        found = [
            (f"transformer_blocks.{i}", block.attn if self.flux else block.attn1)
            for i, block in enumerate(self.model.transformer_blocks)
        ]
        if self.flux:
            found += [
                (f"single_transformer_blocks.{i}", block.attn)
                for i, block in enumerate(self.model.single_transformer_blocks)
            ]
        return [Layer(name, module, attention_of, self.grid, place) for name, module in found]


def walk(adapted: Adapted, spec: DiffusersLocality) -> Callable[[Any], None]:
    """From noise to latents: DDIM on DiT's schedule, which is PixArt's too, or, for Flux, Euler steps evenly spaced in sigma."""
    device = next(adapted.parameters()).device
    noise = ImageNoise(image_seeds(0, spec.images), (adapted.channels, *adapted.input_grid), device)
    classes = adapted.model.config.num_embeds_ada_norm if adapted.name == CLASSES[0] else 1
    y = torch.arange(spec.images, device=device) % classes

    @torch.no_grad()
    def euler(model: Callable[..., Tensor]) -> None:
        x = noise.draw()
        for i in range(spec.steps, 0, -1):
            x = x - model(x, torch.full((len(x),), i / spec.steps, device=device), y) / spec.steps
        _check(x)

    def denoise(model: Callable[..., Tensor]) -> None:
        for x in DDIM(IDDPM.linear().respaced(spec.steps).to(device))(model, y, noise):
            pass
        _check(x)

    return euler if adapted.flux else denoise


def _check(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(
            "the latents are not finite; the weights have diverged or are of another network"
        )
