"""A system of networks: a base model, a classifier that guides it, and an upsampler after it.

Source: Dhariwal & Nichol, ADM (arXiv:2105.05233), sections 4 and 4.4, and the authors' code.

N images, C channels, K classes
x_t noisy image, t (N,) timestep, y (N,) label, low_res the small image that an upsampler enlarges
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.diffusion.iddpm import IDDPM, Model

Classifier = Callable[[Tensor, Tensor], Tensor]  # (x_t, t): (N,C,H,W), (N,) -> logits (N,K)


class System(nn.Module):
    """Hold the networks of a system; each is called by itself."""

    def __init__(
        self, base: nn.Module, classifier: nn.Module | None, upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.base = base
        self.classifier = classifier
        self.upsampler = upsampler


class NoisyClassification(IDDPM):
    """The training objective of a classifier of noisy images."""

    def losses(
        self,
        model: Classifier,  # type: ignore[override]  # a classifier takes no label
        x0: Tensor,
        y: Tensor,
        t: Tensor,
        eps: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the cross-entropy (N,) in nats with the label of the clean image."""
        x_t = self.q_sample(x0, t, eps)  # (N,C,H,W)
        logits = model(x_t, self.timesteps[t])  # (N,K)
        return {"loss": F.cross_entropy(logits.float(), y, reduction="none")}


class Upsampling(IDDPM):
    """The training objective of an upsampler, which also sees the clean image at side `low_res`."""

    def __init__(
        self, betas: Tensor, timesteps: Tensor, learned: bool = True, *, low_res: int
    ) -> None:
        super().__init__(betas, timesteps, learned)
        self.low_res = low_res

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses of `IDDPM`; the small image holds averages over areas of x0."""
        low_res = F.interpolate(x0, self.low_res, mode="area")
        return super().losses(condition_on_low_res(model, low_res), x0, y, t, eps)


def condition_on_low_res(model: Model, low_res: Tensor) -> Model:
    """Bind an upsampler to small images (N, C, h, w); the result is called like any network."""
    return lambda x, t, y: model(append_low_res(x, low_res), t, y)


def append_low_res(x: Tensor, low_res: Tensor) -> Tensor:
    """Enlarge small images to the size of x and append their channels.

    Args:
        x: noisy images (N, C, H, W).
        low_res: small images (N, C, h, w) in [-1, 1].

    Returns:
        The upsampler's input (N, 2C, H, W).
    """
    resized = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([x, resized.to(x.dtype)], dim=1)


class ClassifierGradient:
    """Compute scale times the gradient of log p(y | x_t) with respect to x_t.

    Classifier-free guidance wraps the network, this does not: ADM first clips the network's
    estimate of the clean image and only then moves the mean of the step. Samplers therefore
    take the gradient as an argument of their own.
    """

    def __init__(self, classifier: Classifier, scale: float) -> None:
        self.classifier = classifier
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_probabilities = self.classifier(x, t).float().log_softmax(dim=-1)  # (N,K)
            of_labels = log_probabilities[torch.arange(len(x), device=x.device), y]  # (N,)
            return self.scale * torch.autograd.grad(of_labels.sum(), x)[0]
