"""What a system of several networks adds to one: a classifier that guides its sampling, and an upsampler behind it.

Source: Dhariwal & Nichol, ADM (arXiv:2105.05233), sections 4 and 4.4 and their code. N images, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.diffusion.iddpm import IDDPM, Model


class System(nn.Module):
    """The networks of a system; only the parts run."""

    def __init__(
        self, base: nn.Module, classifier: nn.Module | None, upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.base, self.classifier, self.upsampler = base, classifier, upsampler


class NoisyClassification(IDDPM):
    """The objective of a classifier (x_t, t) -> logits: cross-entropy with the label of the clean image, at uniform times."""

    def losses(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        y: Tensor,
        t: Tensor,
        eps: Tensor,
    ) -> dict[str, Tensor]:
        """Per-sample 'loss' (N,) in nats."""
        return {
            "loss": F.cross_entropy(
                model(self.q_sample(x0, t, eps), self.timesteps[t]).float(), y, reduction="none"
            )
        }


class Upsampling(IDDPM):
    """The objective of an upsampler, which is given the clean image at side `low_res`, by averages over areas."""

    low_res: int

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        low = F.interpolate(x0, self.low_res, mode="area")
        return super().losses(condition_on_low_res(model, low), x0, y, t, eps)


def condition_on_low_res(model: Model, low_res: Tensor) -> Model:
    """An upsampler that is called like any other network, for these images (N, C, h, w)."""
    return lambda x, t, y: model(append_low_res(x, low_res), t, y)


def append_low_res(x: Tensor, low_res: Tensor) -> Tensor:
    """Upsampler input: low_res, in [-1, 1], resized and put after x: (N, C, H, W), (N, C, h, w) -> (N, 2C, H, W)."""
    resized = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([x, resized.to(x.dtype)], dim=1)


class ClassifierGradient:
    """scale times the gradient of log p(y | x_t) with respect to x_t, by a classifier of noisy images.

    No wrapper around the network as classifier-free guidance is: ADM clips the network's estimate of the clean image, and
    moves the mean of the step only then. Samplers that take a gradient are given this.
    """

    def __init__(self, classifier: Callable[[Tensor, Tensor], Tensor], scale: float) -> None:
        self.classifier, self.scale = classifier, scale

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = self.classifier(x, t).float().log_softmax(dim=-1)[torch.arange(len(x)), y]
            return self.scale * torch.autograd.grad(chosen.sum(), x)[0]
