"""Training objectives of networks that return more than one prediction.

Sources: DiMR (arXiv:2406.09416) and github.com/qihao067/DiMR at fa141ae for several resolutions;
DyDiT (arXiv:2410.03456) and github.com/alibaba-damo-academy/DyDiT at 0ddc509 for gates.

N images, C channels
g side of a prediction at low resolution, k ratio of the image's side to it
K gates of one image
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.diffusion.iddpm import IDDPM, Model

WEIGHT = 2.0  # of the loss that pulls the used share to its target
FULL_STEPS = 100  # first steps in which the target is the whole network
QUARTERS = 4  # of the schedule, from which the images of a batch draw their times in turn


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


class HasGates(Protocol):
    """A network that tells the share of its gated work."""

    num_gates: int
    # Multiply-accumulates of one image that the gates can switch off.
    gated_work: int

    def forward_with_share(
        self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None, complete: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def forward_complete(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    def forward_gathered(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


def has_gates(network: object) -> bool:
    """Return whether routers switch parts of a network off."""
    return hasattr(network, "forward_with_share")


class WithShare(nn.Module):
    """Call a network for its prediction and for the share of its gated work, (N,)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None, complete: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction (N, C_out, H, W) and the share.

        Args:
            x: noisy images (N, C, H, W).
            t: timesteps (N,).
            y: labels (N,).
            noise: logistic noise of the gates (N, K); None: the gates of inference.
            complete: whether to leave the gates out.
        """
        return cast(HasGates, self.network).forward_with_share(x, t, y, noise, complete)


class Gated(IDDPM):
    """DiT's losses of the gated network, and a loss that pulls the used share to a target."""

    def __init__(
        self, betas: Tensor, timesteps: Tensor, share: float, falling: int, complete: int
    ) -> None:
        """Tabulate a schedule with a learned variance.

        Args:
            betas: variances of the steps, float64 (T,).
            timesteps: the original timestep behind every index, long (T,).
            share: of the gated work that the network is to use on average.
            falling: training steps over which the target falls from 1 to that share.
            complete: training steps in which the network without gates has a loss too.
        """
        super().__init__(betas, timesteps)
        self.share = share
        self.falling = falling
        self.complete = complete
        self.step = falling + FULL_STEPS + complete

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what gives a network's prediction and the share of its work.

        Raises:
            ValueError: the network has no gates.
        """
        if not has_gates(network):
            raise ValueError(f"{type(network).__name__} has no gates: leave out `used_share`")
        return WithShare(network)

    @property
    def target(self) -> float:
        """The share that is asked for at the training step."""
        if self.step < FULL_STEPS:
            return 1.0
        if self.step < self.falling:
            return 1 + (self.share - 1) * self.step / self.falling
        return self.share

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw indices (n,), image j from quarter j mod 4, so that every batch spans all times."""
        quarter = self.num_steps // QUARTERS
        device = generator.device
        within = torch.randint(quarter, (n,), generator=generator, device=device)
        return within + quarter * (torch.arange(n, device=device) % QUARTERS)

    def draw_gate_noise(self, network: nn.Module, n: int, generator: torch.Generator) -> Tensor:
        """Draw the logistic noise of the gates of n images, (n, K)."""
        shape = (n, cast(HasGates, network).num_gates)
        u = torch.rand(shape, generator=generator, device=generator.device)
        return u.clamp(1e-6, 1 - 1e-6).logit()

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute IDDPM's losses of the gated network and 'share', each (N,).

        The share's loss is 2 (mean share - target)^2, of the images that run together. In the first
        training steps, 'loss' holds that of the network without gates too.
        """
        shares: list[Tensor] = []

        def gated(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            prediction, share = model(x, t, y)
            shares.append(share)
            return prediction

        losses = super().losses(gated, x0, y, t, eps)
        share = shares[0]
        loss = losses["loss"] + WEIGHT * (share.mean() - self.target).square()

        # The same noisy images, without gates.
        if self.step < self.complete:

            def complete(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                prediction, _ = model(x, t, y, complete=True)  # type: ignore[call-arg]
                return prediction

            loss = loss + super().losses(complete, x0, y, t, eps)["loss"]
        return losses | {"loss": loss, "share": share}
