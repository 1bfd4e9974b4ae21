"""The iDDPM diffusion of the DiT recipe: schedule, training losses and the moments of a reverse step.

Sources: DDPM (arXiv:2006.11239) and iDDPM (arXiv:2102.09672), with the choices of DiT (arXiv:2212.09748): linear
schedule, eps prediction, learned-range variance, mean squared error plus the bound unscaled, no clipping of x0.

N batch, C channels of the data, T steps
beta_i variance added by step i;  A_i = prod_{j<=i} (1 - beta_j), A_{-1} = 1;  v_i variance of q(x_{i-1} | x_i, x0)
i  index into the tables of this schedule, 0..T-1;  t  the original integer timestep that the network is given
x0 clean, eps noise, x_t = sqrt(A_i) x0 + sqrt(1 - A_i) eps;  u variance logits;  a prediction is [eps, u], (N,2C,H,W)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]   # (x, t, y): (N,C,H,W), (N,) long, (N,) long -> (N,2C,H,W)


class IDDPM:
    """A schedule and what follows from it; `t` and `i` are long (N,) in training, a plain int in a sampler.

    Tables are float64 (T,) and are cast to float32 only once gathered.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor):
        """betas: float64 (T,), T > 1; timesteps: long (T,), the original timestep behind every index."""
        cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)         # DDPM eq. 7
        variance[0] = variance[1]                                 # v_0 is 0, and its logarithm is needed
        self.num_steps = len(betas)
        self.timesteps = timesteps
        self.betas = betas
        self.alphas_cumprod = cumprod
        self.signal = cumprod.sqrt()                              # x_t = signal x0 + noise eps, DDPM eq. 4
        self.noise = (1 - cumprod).sqrt()
        self.inverse_signal = (1 / cumprod).sqrt()                # x0 = inverse_signal x_t - inverse_noise eps
        self.inverse_noise = (1 / cumprod - 1).sqrt()
        self.posterior_x0 = betas * previous.sqrt() / (1 - cumprod)
        self.posterior_x_t = (1 - previous) * (1 - betas).sqrt() / (1 - cumprod)
        self.log_beta = betas.log()
        self.log_posterior = variance.log()

    @classmethod
    def linear(cls, num_steps: int = 1000) -> "IDDPM":
        """Betas evenly spaced from 1e-4 to 2e-2, DDPM section 4."""
        return cls(torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64), torch.arange(num_steps))

    def respaced(self, num_steps: int) -> "IDDPM":
        """The same marginals at `num_steps` of the timesteps, both ends included: iDDPM eq. 19."""
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"respacing {self.num_steps} steps takes 2 to {self.num_steps} of them, not {num_steps}")
        last, intervals = self.num_steps - 1, num_steps - 1
        taken = torch.tensor([round(i * last / intervals) for i in range(num_steps)])     # a half rounds to even
        cumprod = self.alphas_cumprod.cpu()[taken]
        betas = 1 - cumprod / torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        return IDDPM(betas, self.timesteps.cpu()[taken]).to(self.betas.device)

    def to(self, device: torch.device | str) -> "IDDPM":
        """Moves the tables in place, so that a gather costs no transfer; returns self."""
        vars(self).update({name: table.to(device) for name, table in vars(self).items() if isinstance(table, Tensor)})
        return self

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t given x0: (N,C,H,W), (N,), (N,C,H,W) -> (N,C,H,W). DDPM eq. 4."""
        return _at(self.signal, t) * x0 + _at(self.noise, t) * eps

    def posterior(self, x_t: Tensor, i: int | Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log variance of p(x_{i-1} | x_i) and the clean estimate, each (N,C,H,W). iDDPM eq. 15."""
        eps, u = split_prediction(prediction, x_t)
        x0_hat = _at(self.inverse_signal, i) * x_t - _at(self.inverse_noise, i) * eps
        fraction = (u + 1) / 2                                    # neither squashed nor clipped
        log_variance = fraction * _at(self.log_beta, i) + (1 - fraction) * _at(self.log_posterior, i)
        return self._posterior_mean(x0_hat, x_t, i), log_variance, x0_hat

    def losses(self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Per-sample 'loss' = 'mse' + 'vb', each (N,), at the indices `t` (N,). iDDPM eq. 16.

        vb is in bits per dimension and trains the variance alone. Its weight is 1: iDDPM's 0.001 multiplies a sum over
        1000 steps, of which one uniform draw is the thousandth part.
        """
        x_t = self.q_sample(x0, t, eps)                                       # (N,C,H,W)
        eps_hat, u = split_prediction(model(x_t, self.timesteps[t], y), x_t)  # (N,C,H,W) twice
        mse = _mean((eps - eps_hat) ** 2)                                     # (N,)
        vb = self._bound(x0, x_t, t, torch.cat([eps_hat.detach(), u], dim=1))
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, i: int | Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x0): DDPM eq. 7."""
        return _at(self.posterior_x0, i) * x0 + _at(self.posterior_x_t, i) * x_t

    def _bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The term of the variational bound at `t`, bits per dimension, (N,): DDPM eq. 5."""
        mean, log_variance, _ = self.posterior(x_t, t, prediction)
        true_mean, true_log_variance = self._posterior_mean(x0, x_t, t), _at(self.log_posterior, t)
        kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -_discretised_log_likelihood(x0, mean, log_variance)
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def split_prediction(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(eps, u), each (N,C,H,W), of a prediction (N,2C,H,W) for x (N,C,H,W), in the precision of x."""
    channels = x.shape[1]
    if prediction.shape[1] != 2 * channels:
        raise ValueError(f"learned variance needs {2 * channels} output channels for {channels} of data, "
                         f"the prediction has {prediction.shape[1]}")
    eps, u = prediction.to(x.dtype).chunk(2, dim=1)
    return eps, u


def _at(table: Tensor, i: int | Tensor) -> Tensor:
    """Entries of a table as float32 that broadcast over images: (N,) -> (N,1,1,1), an int -> (1,1,1,1)."""
    return table[i].float().reshape(-1, 1, 1, 1)


def _mean(value: Tensor) -> Tensor:
    """Mean over everything but the batch: (N,C,H,W) -> (N,)."""
    return value.mean(dim=(1, 2, 3))


def _gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
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
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
