"""Attention locality of diffusers' DiT, PixArt and Flux transformers, from a folder or from memory.

Each model is adapted to (x, t, y) -> prediction on a grid of tokens or patches. In Flux's joint
attention only the image tokens count.

N images, C channels (of a packed token in Flux), (H, W) grid of latents (of packed tokens in Flux).
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

import backbones
from analysis.probes.declared import DiffusersLocality
from analysis.probes.layers import read_attention
from analysis.probes.watch import Grid, Layer, num_tokens
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.samplers import DDIM
from experiments.engine.machine.system_errors import explain, is_of_files
from experiments.engine.numerics.randomness import ImageNoise
from experiments.engine.sampling.generate import image_seeds

TEXT_TOKENS = 16  # of the zeros that stand in for missing text embeddings
FLUX_GRID = (32, 32)  # 512 pixels
FLUX_GUIDANCE = 3.5


def load(folder: Path) -> nn.Module:
    """Load a transformer from its folder, or from the `transformer` folder of a pipeline.

    Nothing is downloaded and no code from the folder is run.

    Raises:
        ValueError: if the folder holds no model that this probe takes.
    """
    folder = _transformer_folder(folder)
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except OSError as error:
        raise ValueError(explain(error, "read", folder / "config.json")) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder / 'config.json'} is not that of a diffusers model; "
            "name the folder of a model or a pipeline"
        ) from None
    if name not in ADAPTERS:
        raise ValueError(f"{folder.name} holds a {name}; this probe takes {', '.join(ADAPTERS)}")

    import diffusers

    options = dict(local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    try:
        model: nn.Module = getattr(diffusers, name).from_pretrained(folder, **options).eval()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error)) from None
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder.name} cannot be loaded: {reason}") from None
    backbones.check_values(model, model.state_dict(), folder.name)
    return model


def digest(folder: Path) -> str:
    """Return the SHA-256 of all weight files of a model's folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(_transformer_folder(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _transformer_folder(folder: Path) -> Path:
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def conditioning_from(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read the text embeddings of one prompt.

    Returns:
        The embeddings by the names of the model's arguments, encoder_hidden_states (1, S, E) and,
        for Flux, pooled_projections (1, P); and the file's SHA-256.
    """
    try:
        packed = path.read_bytes()
        with np.load(path, allow_pickle=False) as stored:
            embeddings = {name: torch.from_numpy(stored[name]).float() for name in stored.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        if isinstance(error, OSError) and is_of_files(error):
            raise ValueError(explain(error, "read", path)) from None
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not an .npz file of plain arrays ({reason})") from None
    return embeddings, hashlib.sha256(packed).hexdigest()


class Adapted(nn.Module):
    """A diffusers transformer as a network: (N, C, H, W), (N,), (N,) -> (N, C_out, H, W).

    Args:
        model: the transformer.
        conditioning: text embeddings of one prompt. Zeros stand in for what is missing.
        grid: of latents; must be the model's own, if the model has one.
    """

    def __init__(
        self,
        model: Any,
        conditioning: dict[str, Tensor] | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self.channels: int = self.config.in_channels
        self.input_grid: Grid = self._input_grid(grid)
        patch: int = self.config.patch_size
        self.grid: Grid = (self.input_grid[0] // patch, self.input_grid[1] // patch)

        shapes = self.conditioning_shapes()
        self.conditioning = {
            name: (conditioning or {}).get(name, torch.zeros(shape))
            for name, shape in shapes.items()
        }
        for name, shape in shapes.items():
            _check_shape(name, self.conditioning[name], shape)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the text embeddings that the model takes, by argument."""
        return {}

    def layers(self) -> list[Layer]:
        """Return the self-attention of every block."""
        return [
            self._layer(f"transformer_blocks.{i}", block.attn1)
            for i, block in enumerate(self.model.transformer_blocks)
        ]

    @property
    def num_classes(self) -> int:
        return 1

    def _input_grid(self, grid: Grid | None) -> Grid:
        side = self.config.sample_size
        if grid and tuple(grid) != (side, side):
            raise ValueError(
                f"this {type(self.model).__name__} takes latents of {side}x{side}, "
                f"not {grid[0]}x{grid[1]}"
            )
        return side, side

    def _layer(self, name: str, attention: nn.Module, text: int = 0) -> Layer:
        """Return an attention whose sequence holds `text` tokens before those of the grid."""
        place = text + torch.arange(num_tokens(self.grid))
        return Layer(name, attention, read_attention, self.grid, place)

    def _conditioning(self, x: Tensor) -> dict[str, Any]:
        """Return the text embeddings for every image of a batch."""
        return {
            name: value.to(x).expand(len(x), *value.shape[1:])
            for name, value in self.conditioning.items()
        }


class AdaptedDiT(Adapted):
    """DiT, conditioned on classes."""

    @property
    def num_classes(self) -> int:
        return self.config.num_embeds_ada_norm

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, timestep=t, class_labels=y, return_dict=False)[0]


class AdaptedPixArt(Adapted):
    """PixArt, conditioned on text; y is ignored."""

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (1, TEXT_TOKENS, self.config.caption_channels)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            pixels = x.new_tensor(self.input_grid).mul(8)
            size = {
                "resolution": pixels.expand(len(x), 2),
                "aspect_ratio": x.new_ones(len(x), 1),
            }
        text = self._conditioning(x)
        return self.model(x, timestep=t, **text, added_cond_kwargs=size, return_dict=False)[0]


class AdaptedFlux(Adapted):
    """Flux, conditioned on text. t is sigma, from 0 (data) to 1 (noise); y is ignored."""

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (1, TEXT_TOKENS, self.config.joint_attention_dim),
            "pooled_projections": (1, self.config.pooled_projection_dim),
        }

    def layers(self) -> list[Layer]:
        """Return the attention of the double-stream and of the single-stream blocks."""
        text = self.conditioning["encoder_hidden_states"].shape[1]
        return [
            self._layer(f"{name}.{i}", block.attn, text)
            for name in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(self.model, name))
        ]

    def _input_grid(self, grid: Grid | None) -> Grid:
        return grid or FLUX_GRID

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Positions of the image tokens on the grid; text tokens all stand at the origin.
        axes = (torch.arange(length, device=x.device) for length in self.grid)
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        embeddings = self._conditioning(x)
        text_places = x.new_zeros(embeddings["encoder_hidden_states"].shape[1], 3)

        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((len(x),), FLUX_GUIDANCE, device=x.device)

        out = self.model(
            x.flatten(2).mT,  # (N, T, C)
            timestep=t.to(x),
            img_ids=places.flatten(0, 1).to(x),  # (T, 3)
            txt_ids=text_places,
            guidance=guidance,
            **embeddings,
            return_dict=False,
        )[0]
        return out.mT.unflatten(2, self.grid)


ADAPTERS: dict[str, type[Adapted]] = {
    "DiTTransformer2DModel": AdaptedDiT,
    "PixArtTransformer2DModel": AdaptedPixArt,
    "FluxTransformer2DModel": AdaptedFlux,
}


def adapt(
    model: nn.Module,
    conditioning: dict[str, Tensor] | None = None,
    grid: Grid | None = None,
) -> Adapted:
    """Return a transformer as a network; arguments as in Adapted.

    Raises:
        ValueError: if this probe does not take the model, the grid or the embeddings.
    """
    name = type(model).__name__
    if name not in ADAPTERS:
        raise ValueError(f"{name} is not probed; this probe takes {', '.join(ADAPTERS)}")
    return ADAPTERS[name](model, conditioning, grid)


def _check_shape(name: str, embeddings: Tensor, shape: tuple[int, ...]) -> None:
    """Check that embeddings are of one prompt and of the model's width; their length is free."""
    fits = (
        embeddings.ndim == len(shape) and len(embeddings) == 1 and embeddings.shape[-1] == shape[-1]
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(embeddings.shape)}; this model needs (1, ..., {shape[-1]})"
        )


def walk(adapted: Adapted, spec: DiffusersLocality) -> Callable[[Any], None]:
    """Return a function that takes a network from noise to latents.

    DiT and PixArt take DDIM steps on DiT's schedule, Flux takes Euler steps evenly spaced in sigma.
    """
    device = next(adapted.parameters()).device
    noise = ImageNoise(image_seeds(0, spec.images), (adapted.channels, *adapted.input_grid), device)
    y = torch.arange(spec.images, device=device) % adapted.num_classes

    @torch.no_grad()
    def take_euler_steps(model: Callable[..., Tensor]) -> None:
        x = noise.draw()
        for i in range(spec.steps, 0, -1):
            sigma = torch.full((len(x),), i / spec.steps, device=device)
            x = x - model(x, sigma, y) / spec.steps
        _check_finite(x)

    def take_ddim_steps(model: Callable[..., Tensor]) -> None:
        sample = DDIM(IDDPM.linear().respaced(spec.steps).to(device))
        for latents in sample(model, y, noise):
            x = latents
        _check_finite(x)

    return take_euler_steps if isinstance(adapted, AdaptedFlux) else take_ddim_steps


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(
            "the latents are not finite; the weights have diverged or are of another network"
        )
