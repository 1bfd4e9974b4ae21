"""Samplers as iterators over their own steps, per-image noise, and guidance as a wrapper around the network.

Sources: DDPM (arXiv:2006.11239), DDIM (arXiv:2010.02502), classifier-free guidance (arXiv:2207.12598), guidance in an
interval (arXiv:2404.07724). N images, C channels; a sampler's last x is the sample.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experiments.engine.diffusion import IDDPM, Model


class ImageNoise:
    """Standard normals; every image has a CPU stream of its own, so batching cannot change an image's noise."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        """seeds: one an image, below 2^32 because the CPU generator drops higher bits; shape: one image's (C, H, W)."""
        if not all(0 <= seed < 2 ** 32 for seed in seeds):
            raise ValueError(f"seeds lie in 0..2^32-1, these span {min(seeds)}..{max(seeds)}")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def draw(self) -> Tensor:
        """The next normals of every image, float32 (N,C,H,W) on the device."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


class Guided:
    """A network with classifier-free guidance, null + scale (conditional - null), called like the network itself.

    Only the first `channels` outputs are guided, None meaning all C of eps; the others are the conditional ones. DiT
    and its descendants guide 3 of 4 latent channels. Guidance acts where interval[0] <= t < interval[1]; elsewhere,
    and at scale 1, the network runs once on the plain batch. `nfe` counts evaluations per image since construction.
    """

    def __init__(self, model: Model, scale: float, num_classes: int, *, channels: int | None = 3,
                 interval: tuple[int, int] = (0, 1000)):
        """num_classes: also the index of the null label; interval: in the timesteps that the network is given."""
        self.model = model
        self.scale = scale
        self.null = num_classes
        self.channels = channels
        self.interval = interval
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N,C,H,W), (N,), (N,) -> (N,C_out,H,W); all t of a batch are equal, as in a sampler."""
        low, high = self.interval
        if self.scale == 1 or not low <= t[0].item() < high:
            self.nfe += 1
            return self.model(x, t, y)
        num_guided = x.shape[1] if self.channels is None else self.channels
        if num_guided > x.shape[1]:
            raise ValueError(f"cannot guide {num_guided} channels of data that have {x.shape[1]}; None guides all")
        self.nfe += 2
        labels = torch.cat([y, torch.full_like(y, self.null)])                        # (2N,)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), labels)               # (2N,C_out,H,W)
        conditional, null = both.chunk(2)                                             # (N,C_out,H,W) twice
        eps_c, eps_u = conditional[:, :num_guided], null[:, :num_guided]
        return torch.cat([eps_u + self.scale * (eps_c - eps_u), conditional[:, num_guided:]], dim=1)


@torch.no_grad()
def ancestral(diffusion: IDDPM, model: Model, y: Tensor, noise: ImageNoise) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step of an already respaced diffusion: DDPM algorithm 2, learned variance."""
    x = noise.draw()
    for i in reversed(range(diffusion.num_steps)):
        t = diffusion.timesteps[i].repeat(len(x))                                     # (N,)
        mean, log_variance, _ = diffusion.posterior(x, i, model(x, t, y))
        z = noise.draw()                           # drawn at i = 0 too, as in the field: T + 1 draws an image
        x = mean + (0.5 * log_variance).exp() * z if i > 0 else mean
        yield x


@torch.no_grad()
def ddim(diffusion: IDDPM, model: Model, y: Tensor, noise: ImageNoise, *, eta: float = 0.0) -> Iterator[Tensor]:
    """Yields x (N,C,H,W) after each step of an already respaced diffusion: DDIM eq. 12, sigma of eq. 16.

    eta 0 is deterministic after the first draw; eta 1 is ancestral sampling with the variance of the true posterior.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies between 0 (deterministic) and 1 (ancestral), not {eta}")
    cumprod = diffusion.alphas_cumprod.tolist()
    x = noise.draw()
    for i in reversed(range(diffusion.num_steps)):
        t = diffusion.timesteps[i].repeat(len(x))                                     # (N,)
        _, _, x0_hat = diffusion.posterior(x, i, model(x, t, y))
        here, after = cumprod[i], cumprod[i - 1] if i > 0 else 1.0
        eps = (x - math.sqrt(here) * x0_hat) / math.sqrt(1 - here)
        sigma = eta * math.sqrt((1 - after) / (1 - here) * (1 - here / after))
        x = math.sqrt(after) * x0_hat + math.sqrt(1 - after - sigma ** 2) * eps + sigma * noise.draw()
        yield x


SAMPLERS = {"ancestral": ancestral, "ddim": ddim}
