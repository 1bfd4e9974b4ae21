"""Steps in the plainest loops: what the suite's own steps are timed beside.

The loops run around the suite's networks and around those of other implementations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import IDDPM

NUM_CLASSES = 1000
EMA_DECAY = 0.9999


def bare_training(model: nn.Module, batch: int) -> Callable[[], None]:
    """Return the shortest training step: the network on noise, backward, AdamW."""
    x, t, y = _draw_batch(model, batch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-4, fused=True)
    model.train()

    def step() -> None:
        loss = model(x, t, y).float().square().mean()
        _descend(loss, optimizer)

    return step


def plain_training(model: nn.Module, batch: int) -> Callable[[], None]:
    """Return a plain training step: iDDPM's loss, backward, AdamW, and EMA by parameter."""
    ema = copy.deepcopy(model).requires_grad_(False)
    x, t, y = _draw_batch(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0)
    diffusion = IDDPM.linear().to(x.device)
    model.train()

    def step() -> None:
        loss = diffusion.losses(model, x, y, t, torch.randn_like(x))["loss"].mean()
        _descend(loss, optimizer)
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(EMA_DECAY).add_(parameter.data, alpha=1e-4)

    return step


def plain_sampling(model: nn.Module, batch: int, steps: int) -> Callable[[], None]:
    """Return a loop of `steps` guided ancestral steps, from the middle of 250."""
    model.eval()
    x, t, y = _draw_batch(model, batch)
    diffusion = IDDPM.linear().respaced(250).to(x.device)
    guided = Guided(model, 1.5, NUM_CLASSES, channels=None)

    @torch.no_grad()
    def loop() -> None:
        image = torch.randn_like(x)
        for i in range(steps):
            mean, log_variance, _ = diffusion.posterior(image, 200 - i, guided(image, t, y))
            image = mean + (0.5 * log_variance).exp() * torch.randn_like(x)

    return loop


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step of the optimiser."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
    optimizer.step()
    # Autocast's cached weights are those from before the step.
    torch.clear_autocast_cache()
    optimizer.zero_grad()


def _draw_batch(model: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x of the latents' shape, one time and labels."""
    device = next(model.parameters()).device
    x = torch.randn(batch, 4, 32, 32, device=device)
    t = torch.full((batch,), 400, device=device)
    y = torch.arange(batch, device=device)
    return x, t, y
