"""Representation alignment: REPA's loss for any network, from the tokens after a declared block.

The projection and the encoder belong to the training. No averaged weights hold them, and no sampler
sees them.

N images, g side of the grid, T = g^2 its tokens, D width of the network, z of the features
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.autoregressive.objective import NextScale
from experiments.engine.data.quantise import unfold
from experiments.engine.diffusion.build import DiffusionProcess
from experiments.engine.diffusion.distillation.objective import Distilled
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.judges.encoders import load_encoder
from experiments.engine.numerics.network_parts import list_parts
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.spec import Data, Train


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return minus the mean over tokens of the cosine of projection and features, (N,).

    Args:
        projected: of the network's tokens (N, T, z).
        features: of the encoder (N, T, z). A token meets the one at its own place.
    """
    a = F.normalize(projected.float(), dim=-1, eps=1e-12)
    b = F.normalize(features.float(), dim=-1, eps=1e-12)
    return -(a * b).sum(dim=-1).mean(dim=1)


def build_projector(dim: int, hidden: int, width: int) -> nn.Sequential:
    """Build REPA's projection: three linear layers, Xavier weights and biases of zero."""
    projector = nn.Sequential(
        nn.Linear(dim, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, width),
    )
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector


class Aligned(nn.Module):
    """Call a network for its prediction and for the projection of its tokens, (N, T, z)."""

    def __init__(self, entry: nn.Module, network: nn.Module, block: str) -> None:
        """Listen to a block.

        Args:
            entry: what calls the network, or the network itself.
            network: its parts are named as its weights are.
            block: the name of one of them.

        Raises:
            ValueError: the network has no such block, or orders its tokens otherwise there.
        """
        super().__init__()
        self.entry = entry
        parts = list_parts(network)
        if block not in parts:
            raise ValueError(
                f"{type(network).__name__} has no block {block!r} to align; it has "
                f"{', '.join(parts)}"
            )
        in_rows: Callable[[str], bool] = getattr(network, "is_in_rows", lambda block: True)
        if not in_rows(block):
            raise ValueError(
                f"the tokens of {type(network).__name__} after {block} are not in the order of "
                "rows, so they cannot be aligned; name another block"
            )
        self.block = block
        self.state: Any = None
        self.projector: nn.Module = nn.Identity()
        parts[block].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self.state = output

    def forward(self, *inputs: Tensor, **options: Any) -> tuple[Any, Tensor]:
        prediction = self.entry(*inputs, **options)
        state, self.state = self.state, None
        return prediction, self.projector(state_tokens(state, self.block))


def state_tokens(state: Any, block: str) -> Tensor:
    """Return the image's tokens (N, T, D) of a block's output.

    Args:
        state: a map (N, D, g, g), or tokens (N, S, D), of which the last g^2 are the image's.
        block: its name, for the error.

    Raises:
        ValueError: the output is neither.
    """
    if isinstance(state, Tensor) and state.dim() == 4:
        return state.flatten(2).mT
    if isinstance(state, Tensor) and state.dim() == 3:
        return state[:, -(math.isqrt(state.shape[1]) ** 2) :]
    raise ValueError(f"{block} hands on neither tokens nor a map; name another block to align")


class Aligner:
    """The alignment of a training: what the network is called by, the encoder and the loss."""

    def __init__(
        self,
        alignment: Alignment,
        aligned: Aligned,
        data: Data,
        probe: Callable[[Model], None],
        seed: int,
    ) -> None:
        """Build the projection and load the encoder.

        Args:
            alignment: what the spec declares.
            aligned: the network.
            data: what it trains on.
            probe: calls the network once; its tokens then tell their grid and width.
            seed: of the training, from which the projection is drawn.

        Raises:
            ValueError: block, encoder and data do not fit.
        """
        tokens: list[Tensor] = []

        def measure(*inputs: Tensor, **options: Any) -> Any:
            prediction, state = aligned(*inputs, **options)
            tokens.append(state)
            return prediction

        # Its shape alone decides what follows.
        probe(measure)
        device, (_, num, dim) = tokens[0].device, tokens[0].shape
        encoder = load_encoder(alignment, data, math.isqrt(num))
        self.encoder = encoder.to(device)
        self.fold = data.fold
        self.weight = alignment.weight
        self.aligned = aligned

        # The projection is drawn apart, so the network starts as it does without it.
        images = torch.zeros(1, data.channels, data.size, data.size, device=device)
        width = self.features(images).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at("projector", seed))
            projector = build_projector(dim, alignment.hidden, width)
        aligned.projector = projector.to(device)
        self.identity = {
            "encoder": alignment.encoder,
            "encoder_sha256": alignment.sha256,
            "tokens": num,
            "projector_parameters": sum(p.numel() for p in projector.parameters()),
        }

    @torch.no_grad()
    def features(self, x0: Tensor) -> Tensor:
        """Return the encoder's features of clean images as the network sees them, (N, T, z)."""
        return self.encoder(unfold(x0, self.fold))

    def add(self, losses: Tensor, projected: Tensor, x0: Tensor) -> Tensor:
        """Return the losses (N,) with the weighted alignment."""
        return losses + self.weight * alignment_loss(projected, self.features(x0))


def build_aligner(
    spec: Train,
    network: nn.Module,
    entry: nn.Module,
    diffusion: DiffusionProcess | Distilled | NextScale,
) -> Aligner | None:
    """Build what aligns a network's tokens, if its training declares it.

    Args:
        spec: of the training.
        network: its parts are named as its weights are.
        entry: what the losses of `diffusion` call in its place.
        diffusion: the objective.

    Raises:
        ValueError: block, encoder and data do not fit.
    """
    alignment, data = spec.alignment, spec.data
    if alignment is None:
        return None
    assert not isinstance(diffusion, NextScale), "only a network that denoises is aligned"
    device = next(network.parameters()).device

    def probe(model: Model) -> None:
        x = torch.zeros(2, data.channels, data.size, data.size, device=device)
        y = torch.zeros(2, dtype=torch.long, device=device)
        t = diffusion.draw_times(2, generator_at("probe", 0, device=device))
        diffusion.losses(model, x, y, t, x)

    aligned = Aligned(entry, network, alignment.block)
    return Aligner(alignment, aligned, data, probe, spec.seed)
