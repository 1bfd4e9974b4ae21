"""Diffusion in discrete steps: schedules, training losses and the moments of a reverse step.

Sources: DDPM (arXiv:2006.11239) and iDDPM (arXiv:2102.09672), with the choices of DiT (arXiv:2212.09748): linear
schedule, eps prediction, learned-range variance, mean squared error plus the bound unscaled, no clipping of x0.
Networks that predict eps alone have the posterior's variance and no bound.

N batch, C channels of the data, T steps
beta_i variance added by step i;  A_i = prod_{j<=i} (1 - beta_j), A_{-1} = 1;  v_i variance of q(x_{i-1} | x_i, x0)
i  index into the tables of this schedule, 0..T-1;  t  the original integer timestep that the network is given
x0 clean, eps noise, x_t = sqrt(A_i) x0 + sqrt(1 - A_i) eps;  u variance logits;  a prediction is [eps, u], (N,2C,H,W),
or eps alone, (N,C,H,W)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (x, t, y): (N,C,H,W), (N,), (N,) long -> (N,C or 2C,H,W)


def _between_roots(first: float, last: float) -> Callable[[int], Tensor]:
    """Betas whose square roots are evenly spaced."""
    return lambda num_steps: (
        torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64) ** 2
    )


def _cosine(num_steps: int) -> Tensor:
    """iDDPM eq. 17, each beta at most 0.999."""
    angles = (
        (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + 0.008) / 1.008 * math.pi / 2
    )
    return (1 - (angles[1:].cos() / angles[:-1].cos()) ** 2).clamp(max=0.999)


BETAS: dict[str, Callable[[int], Tensor]] = {  # number of steps -> float64 (T,)
    "linear": lambda num_steps: torch.linspace(
        1e-4, 2e-2, num_steps, dtype=torch.float64
    ),  # DDPM section 4
    "cosine": _cosine,
    "stable_diffusion": _between_roots(0.00085, 0.012),
    "ldm_imagenet": _between_roots(0.0015, 0.0195),  # LDM's cin256-v2
}


class IDDPM:
    """A schedule and what follows from it; `t` and `i` are long (N,) in training, a plain int in a sampler.

    Tables are float64 (T,) and are cast to float32 only once gathered.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor, learned: bool = True):
        """betas: float64 (T,), T > 1; timesteps: long (T,), the original timestep behind every index.

        learned: whether the network predicts the variance of a reverse step.
        """
        cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)  # DDPM eq. 7
        variance[0] = variance[1]  # v_0 is 0, and its logarithm is needed
        self.num_steps = len(betas)
        self.learned = learned
        self.timesteps = timesteps
        self.times = (
            timesteps[0].item(),
            timesteps[-1].item(),
        )  # the first and last that the network is given
        self.betas = betas
        self.alphas_cumprod = cumprod
        self.signal = cumprod.sqrt()  # x_t = signal x0 + noise eps, DDPM eq. 4
        self.noise = (1 - cumprod).sqrt()
        self.inverse_signal = (1 / cumprod).sqrt()  # x0 = inverse_signal x_t - inverse_noise eps
        self.inverse_noise = (1 / cumprod - 1).sqrt()
        self.posterior_x0 = betas * previous.sqrt() / (1 - cumprod)
        self.posterior_x_t = (1 - previous) * (1 - betas).sqrt() / (1 - cumprod)
        self.log_beta = betas.log()
        self.log_posterior = variance.log()

    @classmethod
    def linear(cls, num_steps: int = 1000) -> "IDDPM":
        """The diffusion of DiT and its descendants."""
        return cls(BETAS["linear"](num_steps), torch.arange(num_steps))

    def respaced(self, num_steps: int) -> "IDDPM":
        """The same marginals at `num_steps` of the timesteps, both ends included: iDDPM eq. 19."""
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(
                f"respacing {self.num_steps} steps takes 2 to {self.num_steps} of them, not {num_steps}"
            )
        last, intervals = self.num_steps - 1, num_steps - 1
        taken = torch.tensor(
            [round(i * last / intervals) for i in range(num_steps)]
        )  # a half rounds to even
        cumprod = self.alphas_cumprod.cpu()[taken]
        betas = 1 - cumprod / torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        return IDDPM(betas, self.timesteps.cpu()[taken], self.learned).to(self.betas.device)

    def to(self, device: torch.device | str) -> "IDDPM":
        """Moves the tables in place, so that a gather costs no transfer; returns self."""
        vars(self).update(
            {
                name: table.to(device)
                for name, table in vars(self).items()
                if isinstance(table, Tensor)
            }
        )
        return self

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Uniform indices (n,), on the generator's device."""
        return torch.randint(self.num_steps, (n,), generator=generator, device=generator.device)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t given x0: (N,C,H,W), (N,), (N,C,H,W) -> (N,C,H,W). DDPM eq. 4."""
        return at(self.signal, t) * x0 + at(self.noise, t) * eps

    def posterior(
        self, x_t: Tensor, i: int | Tensor, prediction: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log variance of p(x_{i-1} | x_i) and the clean estimate, each (N,C,H,W). iDDPM eq. 15.

        clip: keep the estimate within the pixels' [-1, 1], as ADM does.
        """
        eps, u = split_prediction(prediction, x_t, self.learned)
        x0_hat = at(self.inverse_signal, i) * x_t - at(self.inverse_noise, i) * eps
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        log_variance = at(self.log_posterior, i)
        if u is not None:
            fraction = (u + 1) / 2  # neither squashed nor clipped
            log_variance = fraction * at(self.log_beta, i) + (1 - fraction) * log_variance
        return self._posterior_mean(x0_hat, x_t, i), log_variance, x0_hat

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Per-sample 'loss' = 'mse' + 'vb', each (N,), at the indices `t` (N,). iDDPM eq. 16. Without vb where u is not learned.

        vb is in bits per dimension and trains the variance alone. Its weight is 1: iDDPM's 0.001 multiplies a sum over
        1000 steps, of which one uniform draw is the thousandth part.
        """
        x_t = self.q_sample(x0, t, eps)  # (N,C,H,W)
        prediction = model(x_t, self.timesteps[t], y)  # (N,C or 2C,H,W)
        eps_hat, u = split_prediction(prediction, x_t, self.learned)  # (N,C,H,W) twice
        mse = _mean((eps - eps_hat) ** 2)  # (N,)
        if u is None:
            return {"loss": mse, "mse": mse}
        vb = self._bound(x0, x_t, t, torch.cat([eps_hat.detach(), u], dim=1))
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, i: int | Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x0): DDPM eq. 7."""
        return at(self.posterior_x0, i) * x0 + at(self.posterior_x_t, i) * x_t

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The term of the variational bound at `t`, bits per dimension, (N,): DDPM eq. 5."""
        mean, log_variance, _ = self.posterior(x_t, t, prediction)
        true_mean, true_log_variance = self._posterior_mean(x0, x_t, t), at(self.log_posterior, t)
        kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -_discretised_log_likelihood(x0, mean, log_variance)
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def split_prediction(
    prediction: Tensor, x: Tensor, learned: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(eps, u), each (N,C,H,W), of a prediction (N,2C,H,W) for x (N,C,H,W), in the precision of x; u is None unless learned."""
    channels, needed = x.shape[1], x.shape[1] * (2 if learned else 1)
    if prediction.shape[1] != needed:
        raise ValueError(
            f"{'learned' if learned else 'fixed'} variance needs {needed} output channels for {channels} of data, "
            f"the prediction has {prediction.shape[1]}"
        )
    eps, *u = prediction.to(x.dtype).split(channels, dim=1)
    return eps, u[0] if u else None


def at(table: Tensor, i: int | Tensor) -> Tensor:
    """Entries of a table as float32 that broadcast over images: (N,) -> (N,1,1,1), an int -> (1,1,1,1)."""
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
    """Log probability, nats, of the 1/255-half-width bin of x0, open-ended beyond +-0.999: DDPM eq. 13.

    Made for 8-bit pixels in [-1, 1]. The recipe applies it to latents, where about a third of the entries fall in the
    open ends; kept, with the tanh approximation of the normal CDF, because the reported losses contain it.
    """
    inverse_std = (-0.5 * log_variance).exp()
    below = _approximate_cdf(inverse_std * (x0 - mean - 1 / 255))
    above = _approximate_cdf(inverse_std * (x0 - mean + 1 / 255))
    probability = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    """The standard normal CDF to about 3e-4, by a tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
