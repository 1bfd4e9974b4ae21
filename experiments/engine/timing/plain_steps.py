"""Steps in the plainest loops, beside which the suite's own are timed: around its own networks, and around those of other implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.iddpm import IDDPM


def bare_training(model: nn.Module, batch: int) -> Callable[[], None]:
    """The least that a training step can be: the network on noise, backward, AdamW."""
    x, t, y = _batch(model, batch)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-4, fused=True
    )
    model.train()

    def step() -> None:
        loss = model(x, t, y).float().square().mean()
        with torch.autocast(x.device.type, enabled=False):
            loss.backward()
        optimizer.step()
        torch.clear_autocast_cache()  # its weights are those of before the step
        optimizer.zero_grad()

    return step


def plain_training(model: nn.Module, batch: int, _: int) -> Callable[[], None]:
    """iDDPM's loss, backward, PyTorch's default AdamW, and the EMA by parameter."""
    ema = copy.deepcopy(model).requires_grad_(False)
    x, t, y = _batch(model, batch)
    optimizer, diffusion = (
        torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0),
        IDDPM.linear().to(x.device),
    )
    model.train()

    def step() -> None:
        loss = diffusion.losses(model, x, y, t, torch.randn_like(x))["loss"].mean()
        with torch.autocast(x.device.type, enabled=False):
            loss.backward()
        optimizer.step()
        torch.clear_autocast_cache()  # its weights are those of before the step
        optimizer.zero_grad()
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(0.9999).add_(parameter.data, alpha=1e-4)

    return step


def plain_sampling(model: nn.Module, batch: int, steps: int) -> Callable[[], None]:
    """So many of 250 guided ancestral steps, from the middle of the way."""
    model.eval()
    x, t, y = _batch(model, batch)
    diffusion, guided = (
        IDDPM.linear().respaced(250).to(x.device),
        Guided(model, 1.5, 1000, channels=None),
    )

    @torch.no_grad()
    def loop() -> None:
        image = torch.randn_like(x)
        for i in range(steps):
            mean, log_variance, _ = diffusion.posterior(image, 200 - i, guided(image, t, y))
            image = mean + (0.5 * log_variance).exp() * torch.randn_like(x)

    return loop


def _batch(model: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    device = next(model.parameters()).device
    return (
        torch.randn(batch, 4, 32, 32, device=device),
        torch.full((batch,), 400, device=device),
        torch.arange(batch, device=device),
    )
