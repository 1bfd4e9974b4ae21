"""Diffusion in discrete steps: schedules, training losses and the moments of a reverse step.

Sources: DDPM (arXiv:2006.11239) and iDDPM (arXiv:2102.09672), with the choices of DiT
(arXiv:2212.09748): linear schedule, eps prediction, learned-range variance, mean squared error plus
the bound unscaled, no clipping of x0. Networks that predict eps alone have the posterior's variance
and no bound.

N batch, C channels of the data, T steps
beta_i variance added by step i;  A_i = prod_{j<=i} (1 - beta_j), A_{-1} = 1
v_i variance of q(x_{i-1} | x_i, x0)
i index into the tables of this schedule, 0..T-1
t original integer timestep, as the network is given it
x0 clean, eps noise, x_t = sqrt(A_i) x0 + sqrt(1 - A_i) eps;  u variance logits
a prediction is [eps, u], (N,2C,H,W), or eps alone, (N,C,H,W)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from experiments.engine.diffusion.respacing import spaced_timesteps

# (x, t, y): (N,C,H,W), (N,), (N,) long -> (N,C or 2C,H,W)
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def _linear(num_steps: int) -> Tensor:
    """DDPM, section 4."""
    return torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64)


def _cosine(num_steps: int) -> Tensor:
    """iDDPM, eq. 17; each beta is at most 0.999."""
    fractions = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    angles = (fractions + 0.008) / 1.008 * math.pi / 2
    return (1 - (angles[1:].cos() / angles[:-1].cos()) ** 2).clamp(max=0.999)


def _between_roots(first: float, last: float) -> Callable[[int], Tensor]:
    """Make a schedule of betas whose square roots are evenly spaced."""
    return lambda num_steps: (
        torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64) ** 2
    )


# Schedules by name: number of steps -> betas, float64 (T,).
BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "stable_diffusion": _between_roots(0.00085, 0.012),
    "ldm_imagenet": _between_roots(0.0015, 0.0195),  # LDM's cin256-v2
}


class IDDPM:
    """A schedule, its training losses and the moments of its reverse steps.

    `t` and `i` are long (N,) in training and long (1,) in a sampler. Tables are float64 (T,) and
    are cast to float32 only once gathered.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor, learned: bool = True) -> None:
        """Tabulate a schedule.

        Args:
            betas: variances of the steps, float64 (T,), T > 1.
            timesteps: the original timestep behind every index, long (T,).
            learned: whether the network predicts the variance of a reverse step.
        """
        self.num_steps = len(betas)
        self.learned = learned
        self.timesteps = timesteps
        # The first and the last timestep that the network is given.
        self.times = (timesteps[0].item(), timesteps[-1].item())

        # Marginals, DDPM eq. 4: x_t = signal x0 + noise eps, and back to x0.
        cumprod = (1 - betas).cumprod(0)
        self.betas = betas
        self.alphas_cumprod = cumprod
        self.signal = cumprod.sqrt()
        self.noise = (1 - cumprod).sqrt()
        self.inverse_signal = (1 / cumprod).sqrt()  # x0 = inverse_signal x_t - inverse_noise eps
        self.inverse_noise = (1 / cumprod - 1).sqrt()
        # Solvers make their grids of it on the host, which so waits for no GPU.
        self.log_signal: np.ndarray = 0.5 * cumprod.log().cpu().numpy()

        # Moments of the posterior, DDPM eq. 7. v_0 is 0, but its logarithm is needed: take v_1.
        previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)
        variance[0] = variance[1]
        self.posterior_x0 = betas * previous.sqrt() / (1 - cumprod)
        self.posterior_x_t = (1 - previous) * (1 - betas).sqrt() / (1 - cumprod)
        self.log_beta = betas.log()
        self.log_posterior = variance.log()

    @classmethod
    def linear(cls, num_steps: int = 1000) -> IDDPM:
        """Build the diffusion of DiT and its descendants."""
        return cls(BETAS["linear"](num_steps), torch.arange(num_steps))

    def respaced(self, spacing: int | str | Sequence[int]) -> IDDPM:
        """Build the diffusion with the same marginals at fewer timesteps: iDDPM eq. 19.

        Args:
            spacing: a count, which takes both ends in; counts of equally long sections, as
                [10, 15, 20] or "10,15,20"; or "ddim50", every k-th timestep from the first on.

        Raises:
            ValueError: the schedule has no such timesteps.
        """
        taken = torch.tensor(spaced_timesteps(self.num_steps, spacing))
        cumprod = self.alphas_cumprod.cpu()[taken]
        betas = 1 - cumprod / torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        return IDDPM(betas, self.timesteps.cpu()[taken], self.learned).to(self.betas.device)

    def to(self, device: torch.device | str) -> IDDPM:
        """Move the tables in place, so that a gather costs no transfer; return self."""
        for name, table in vars(self).items():
            if isinstance(table, Tensor):
                setattr(self, name, table.to(device))
        return self

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what training calls in the place of a network: here the network itself."""
        return network

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw uniform indices (n,) on the generator's device."""
        return torch.randint(self.num_steps, (n,), generator=generator, device=generator.device)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add noise: x0 (N,C,H,W), t (N,), eps (N,C,H,W) -> x_t (N,C,H,W). DDPM eq. 4."""
        return at(self.signal, t) * x0 + at(self.noise, t) * eps

    def posterior(
        self, x_t: Tensor, i: int | Tensor, prediction: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a reverse step p(x_{i-1} | x_i): iDDPM eq. 15.

        Args:
            x_t: noisy images (N,C,H,W).
            i: index of the step, of all images or of each.
            prediction: the network's output at x_t.
            clip: whether to keep the clean estimate in the pixels' [-1, 1], as ADM does.

        Returns:
            Mean, log variance and clean estimate, each (N,C,H,W) or broadcasting to it.
        """
        eps, u = split_prediction(prediction, x_t, self.learned)
        x0_hat = at(self.inverse_signal, i) * x_t - at(self.inverse_noise, i) * eps
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)

        # A learned variance lies between the posterior's and beta, in logarithms; the fraction is
        # neither squashed nor clipped.
        log_variance = at(self.log_posterior, i)
        if u is not None:
            fraction = (u + 1) / 2
            log_variance = fraction * at(self.log_beta, i) + (1 - fraction) * log_variance
        return self._posterior_mean(x0_hat, x_t, i), log_variance, x0_hat

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute 'loss' = 'mse' + 'vb' of each sample, each (N,): iDDPM eq. 16.

        'vb' is in bits per dimension, trains the variance alone, and is absent where the variance
        is fixed. Its weight is 1: iDDPM's 0.001 multiplies a sum over 1000 steps, of which one
        uniform draw is the thousandth part.

        Args:
            model: the network.
            x0: clean images (N,C,H,W).
            y: labels (N,).
            t: indices (N,) into this schedule.
            eps: noise (N,C,H,W).
        """
        x_t = self.q_sample(x0, t, eps)  # (N,C,H,W)
        prediction = model(x_t, self.timesteps[t], y)  # (N,C or 2C,H,W)
        eps_hat, u = split_prediction(prediction, x_t, self.learned)  # (N,C,H,W) twice
        mse = _mean((eps - eps_hat) ** 2)  # (N,)
        if u is None:
            return {"loss": mse, "mse": mse}

        # The bound must not train eps.
        vb = self._bound(x0, x_t, t, torch.cat([eps_hat.detach(), u], dim=1))
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, i: int | Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x0): DDPM eq. 7."""
        return at(self.posterior_x0, i) * x0 + at(self.posterior_x_t, i) * x_t

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The term of the variational bound at `t`, bits per dimension, (N,): DDPM eq. 5."""
        mean, log_variance, _ = self.posterior(x_t, t, prediction)
        true_mean = self._posterior_mean(x0, x_t, t)
        true_log_variance = at(self.log_posterior, t)

        # The first step is a likelihood of pixels, every other a divergence of Gaussians.
        nats = _mean(_gaussian_kl(true_mean, true_log_variance, mean, log_variance))
        first = _first_steps(t)
        if first is None:
            nll = -_mean(_discretised_log_likelihood(x0, mean, log_variance))
            nats = torch.where(t == 0, nll, nats)
        elif len(first):
            nll = -_mean(_discretised_log_likelihood(x0[first], mean[first], log_variance[first]))
            nats = nats.index_copy(0, first, nll)
        return nats / math.log(2)


def _first_steps(t: Tensor) -> Tensor | None:
    """Return the positions of the first step in t (N,), or None where nobody may wait for them.

    A likelihood takes ten times as many operations as a divergence, and few samples need one. A
    fake tensor has no values and stands for a batch without a first step, as most are.
    """
    if not t.is_cpu or torch.compiler.is_compiling():
        return None
    is_first = t == 0
    found = t.new_empty(0, 1) if isinstance(t, FakeTensor) else is_first.nonzero()
    return found[:, 0]


def split_prediction(
    prediction: Tensor, x: Tensor, learned: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Split a prediction into eps and variance logits u, each (N,C,H,W), in the precision of x.

    Args:
        prediction: the network's output, (N,2C,H,W), or (N,C,H,W) unless `learned`.
        x: the network's input (N,C,H,W).
        learned: whether there are variance logits; u is None otherwise.

    Raises:
        ValueError: the prediction has another number of channels.
    """
    channels = x.shape[1]
    needed = 2 * channels if learned else channels
    if prediction.shape[1] != needed:
        raise ValueError(
            f"{'learned' if learned else 'fixed'} variance needs {needed} output channels "
            f"for {channels} of data, the prediction has {prediction.shape[1]}"
        )

    # Sampling goes on in the precision of x, whatever the network's own is.
    prediction = prediction.to(x.dtype)
    if not learned:
        return prediction, None
    eps, u = prediction.split(channels, dim=1)
    return eps, u


def at(table: Tensor, i: int | Tensor) -> Tensor:
    """Gather float32 entries that broadcast over images: (N,) -> (N,1,1,1), int -> (1,1,1,1)."""
    return table[i].float().reshape(-1, 1, 1, 1)


def _mean(value: Tensor) -> Tensor:
    """Mean over everything but the batch: (N,C,H,W) -> (N,)."""
    return value.mean(dim=(1, 2, 3))


def _gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, .) || N(other_mean, .)) in nats, elementwise."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - ratio - 1 + (mean - other_mean) ** 2 * (-other_log_variance).exp())


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, nats, of the bin of x0 of half width 1/255: DDPM eq. 13.

    Bins beyond +-0.999 are open-ended. This is meant for 8-bit pixels in [-1, 1]. The recipe
    applies it to latents, of which about a third fall in the open bins. It stays, with its tanh
    approximation of the normal CDF, because the reported losses contain it.
    """
    inverse_std = (-0.5 * log_variance).exp()
    below = _approximate_cdf(inverse_std * (x0 - mean - 1 / 255))
    above = _approximate_cdf(inverse_std * (x0 - mean + 1 / 255))

    # The lowest bin reaches to minus infinity, the highest to infinity.
    inner = above - below
    probability = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, inner))
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    """The standard normal CDF to about 3e-4, by a tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
