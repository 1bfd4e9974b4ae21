"""The training objective of a network that predicts the noise at several resolutions.

Source: DiMR (arXiv:2406.09416) and github.com/qihao067/DiMR at fa141ae.

N images, C channels, g side of a prediction, k ratio of the image's side to it
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.diffusion.iddpm import IDDPM, Model


class PredictsScales(Protocol):
    """A network whose `multiscale` gives its predictions, low resolution first."""

    def multiscale(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]: ...


class AllScales(nn.Module):
    """Call a network for its predictions at all resolutions, each (N, C, g, g), low first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        return cast(PredictsScales, self.network).multiscale(x, t, y)


class MultiScale(IDDPM):
    """Noise prediction with a loss at every resolution; samplers see the full one alone."""

    def __init__(self, betas: Tensor, timesteps: Tensor, weights: tuple[float, ...]) -> None:
        """Tabulate a schedule with the posterior's variance.

        Args:
            betas: variances of the steps, float64 (T,).
            timesteps: the original timestep behind every index, long (T,).
            weights: of the losses, low resolution first.
        """
        super().__init__(betas, timesteps, learned=False)
        self.weights = weights

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what gives all predictions of a network.

        Raises:
            ValueError: the network predicts at one resolution alone.
        """
        if not hasattr(network, "multiscale"):
            raise ValueError(
                f"{type(network).__name__} predicts at one resolution: leave out `scales`"
            )
        return AllScales(network)

    def losses(
        self,
        model: Model,
        x0: Tensor,
        y: Tensor,
        t: Tensor,
        eps: Tensor,
    ) -> dict[str, Tensor]:
        """Compute 'loss', the weighted sum over resolutions, and 'mse' at the full one, each (N,).

        The target at ratio k is the sum of each k x k block of the noise, divided by k, whose
        variance is 1 again.

        Raises:
            ValueError: the network predicts at another number of resolutions.
        """
        predictions = model(self.q_sample(x0, t, eps), self.timesteps[t], y)
        if len(predictions) != len(self.weights):
            raise ValueError(
                f"{len(self.weights)} weights of losses for {len(predictions)} resolutions"
            )

        # One mean squared error for every resolution.
        errors = []
        for prediction in predictions:
            ratio = eps.shape[-1] // prediction.shape[-1]
            target = ratio * F.avg_pool2d(eps, ratio)  # (N,C,g,g)
            errors.append((prediction - target).square().mean(dim=(1, 2, 3)))
        weighted = [weight * error for weight, error in zip(self.weights, errors, strict=True)]
        return {"loss": torch.stack(weighted).sum(dim=0), "mse": errors[-1]}
