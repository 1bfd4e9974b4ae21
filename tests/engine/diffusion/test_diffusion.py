"""The schedule against closed forms, the losses against float64 and the authors' numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from experiments.engine.diffusion import iddpm
from experiments.engine.diffusion.iddpm import IDDPM, split_prediction


def waves(frequency: float, shape: tuple[int, ...] = (4, 2, 3, 5)) -> Tensor:
    """Return values in [-1, 1] that no random number generator can change."""
    places = torch.arange(1, np.prod(shape) + 1, dtype=torch.float32)
    return torch.sin(frequency * places).reshape(shape)


def schedule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """beta_t, A_t and A_{t-1} of the original 1000 steps, by plain recursion."""
    betas = 1e-4 + np.arange(1000) * (2e-2 - 1e-4) / 999
    cumprod = [1.0]
    for beta in betas:
        cumprod.append(cumprod[-1] * (1 - beta))
    return betas, np.array(cumprod[1:]), np.array(cumprod[:-1])


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw 64 training inputs of 4x5x7, with the first timesteps over-represented.

    In float64 differences of the normal CDF do not cancel, so the bound can be compared closely.
    """
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (64,), generator=generator)
    t[:16] = 0
    t[16:20] = 1
    t[20] = 999
    x0 = torch.randn(64, 4, 5, 7, generator=generator).to(dtype)
    eps = torch.randn(64, 4, 5, 7, generator=generator).to(dtype)
    return {"x0": x0, "y": torch.zeros(64, dtype=torch.long), "t": t, "eps": eps}


def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A prediction that depends on x and t and whose variance logits leave [-1, 1]."""
    return torch.cat([0.9 * x + 1e-3 * t.reshape(-1, 1, 1, 1), 1.5 * torch.sin(x)], dim=1)


def test_tables_are_the_closed_forms():
    """Every table of the schedule is its formula in beta_t, A_t and A_{t-1}."""
    betas, cumprod, previous = schedule()
    diffusion = IDDPM.linear()
    expected = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "signal": cumprod**0.5,
        "noise": (1 - cumprod) ** 0.5,
        "inverse_signal": cumprod**-0.5,
        "inverse_noise": (1 / cumprod - 1) ** 0.5,
        "log_beta": np.log(betas),
        "posterior_x0": betas * previous**0.5 / (1 - cumprod),
        "posterior_x_t": (1 - previous) * (1 - betas) ** 0.5 / (1 - cumprod),
    }
    for name, truth in expected.items():
        table = getattr(diffusion, name)
        assert table.dtype == torch.float64
        np.testing.assert_allclose(table, truth, rtol=1e-10, atol=1e-13, err_msg=name)

    # The first variance is zero: its logarithm is that of the second one.
    variance = betas * (1 - previous) / (1 - cumprod)
    np.testing.assert_allclose(diffusion.log_posterior[1:], np.log(variance[1:]), rtol=1e-10)
    assert diffusion.log_posterior[0] == diffusion.log_posterior[1]

    # Without respacing, all timesteps are taken.
    assert diffusion.timesteps.tolist() == list(range(1000))
    assert diffusion.num_steps == 1000


def test_posterior_mean_undoes_q_sample():
    """The posterior mean, averaged over x_t given x0, is sqrt(A_{t-1}) x0."""
    diffusion = IDDPM.linear().respaced(50)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), diffusion.signal[:-1]])
    average = diffusion.posterior_x0 + diffusion.posterior_x_t * diffusion.signal
    torch.testing.assert_close(average, previous)


@pytest.mark.parametrize("num_steps", [2, 3, 25, 250, 1000])
def test_respacing_keeps_the_marginals(num_steps: int):
    """A respaced schedule takes the ends, and has the original A_t at every step it takes."""
    original = IDDPM.linear()
    respaced = original.respaced(num_steps)
    taken = respaced.timesteps.tolist()
    assert taken[0] == 0
    assert taken[-1] == 999
    assert len(set(taken)) == num_steps == respaced.num_steps
    kept = original.alphas_cumprod[taken]
    torch.testing.assert_close(respaced.alphas_cumprod, kept, rtol=1e-12, atol=0)
    assert respaced.posterior_x0[0] == 1
    assert respaced.posterior_x_t[0] == 0


def test_the_250_steps():
    """Steps are taken at rounded even distances; 499.5 rounds to the even 500."""
    taken = IDDPM.linear().respaced(250).timesteps.tolist()
    assert taken[:4] == [0, 4, 8, 12]
    assert taken[62:65] == [249, 253, 257]
    assert taken[-3:] == [991, 995, 999]
    assert IDDPM.linear().respaced(3).timesteps.tolist() == [0, 500, 999]


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_respacing_is_refused(num_steps: int):
    with pytest.raises(ValueError, match="2 to 1000"):
        IDDPM.linear().respaced(num_steps)


def test_network_is_given_original_timesteps():
    """Step i of ten respaced steps reaches the network as timestep 111 i."""
    inputs = batch()
    inputs["t"] = torch.arange(64) % 10
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return predict(x, t, y)

    IDDPM.linear().respaced(10).losses(model, **inputs)
    assert seen[0].dtype == torch.long
    assert seen[0].tolist() == [i % 10 * 111 for i in range(64)]


def float64_moments(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Mean and deviation of the true and the predicted reverse step, from the recursion alone."""
    # The schedule at every image's timestep.
    tables = [torch.from_numpy(table) for table in schedule()]
    betas, cumprod, previous = (table[inputs["t"]].reshape(-1, 1, 1, 1) for table in tables)
    variance = betas * (1 - previous) / (1 - cumprod)

    # The variance of step 0 is zero; that of step 1 stands for it.
    first = slice(1, 2)
    variance_1 = tables[0][first] * (1 - tables[2][first]) / (1 - tables[1][first])
    variance[inputs["t"] == 0] = variance_1.reshape(1, 1, 1, 1)

    # The network sees x_t, from which its eps gives a clean image.
    x0 = inputs["x0"]
    x_t = cumprod.sqrt() * x0 + (1 - cumprod).sqrt() * inputs["eps"]
    eps, u = predict(x_t, inputs["t"].double(), inputs["y"]).chunk(2, dim=1)
    x0_hat = (x_t - (1 - cumprod).sqrt() * eps) / cumprod.sqrt()

    def posterior_mean(clean: Tensor) -> Tensor:
        weighted = betas * previous.sqrt() * clean + (1 - previous) * (1 - betas).sqrt() * x_t
        return weighted / (1 - cumprod)

    # The predicted variance lies between beta and the posterior's, on a logarithmic scale.
    true_deviation = variance.sqrt().expand_as(x0)
    deviation = betas.pow((u + 1) / 4) * variance.pow((1 - u) / 4)
    return posterior_mean(x0), true_deviation, posterior_mean(x0_hat), deviation


def test_bound_is_the_kl_in_bits():
    """Behind the first step, the bound is the divergence of the two reverse steps."""
    inputs = batch(torch.float64)
    true_mean, true_std, mean, std = float64_moments(inputs)
    divergence = kl_divergence(Normal(true_mean, true_std), Normal(mean, std))
    expected = divergence.mean(dim=(1, 2, 3)) / np.log(2)
    later = inputs["t"] > 0
    vb = IDDPM.linear().losses(predict, **inputs)["vb"]
    torch.testing.assert_close(vb[later], expected[later], rtol=1e-5, atol=1e-9)


def test_first_step_is_the_pixel_likelihood_in_bits():
    """At the first step, the bound is the likelihood of a pixel's interval of 2/255."""
    inputs = batch(torch.float64)
    _, _, mean, std = (moment.numpy()[:16] for moment in float64_moments(inputs))
    x0 = inputs["x0"][:16].numpy()

    def cdf(edge: np.ndarray) -> np.ndarray:
        z = (edge - mean) / std
        return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    # The outermost intervals have no outer edge.
    upper = np.where(x0 > 0.999, 1, cdf(x0 + 1 / 255))
    lower = np.where(x0 < -0.999, 0, cdf(x0 - 1 / 255))
    expected = -np.log2(np.maximum(upper - lower, 1e-12)).mean(axis=(1, 2, 3))
    assert 0.25 < np.mean(np.abs(x0) > 0.999) < 0.4
    vb = IDDPM.linear().losses(predict, **inputs)["vb"]
    np.testing.assert_allclose(vb[:16], expected, rtol=1e-5)


def test_a_gpu_that_does_not_look_for_first_steps_has_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
):
    inputs = batch(torch.float64)

    def gradient() -> Tensor:
        weight = torch.full((8, 1, 1), 0.9, dtype=torch.float64, requires_grad=True)
        losses = IDDPM.linear().losses(lambda *args: weight * predict(*args), **inputs)
        return torch.autograd.grad(losses["loss"].square().sum(), weight)[0]

    looked = gradient()
    monkeypatch.setattr(iddpm, "_first_steps", lambda t: None)
    torch.testing.assert_close(gradient(), looked, rtol=1e-12, atol=1e-12)


def test_losses_are_those_of_the_authors():
    """Numbers from facebookresearch/DiT ed81ce2: training_losses of create_diffusion("")."""
    x0 = 1.5 * waves(0.7)
    eps = 1.3 * waves(1.1)
    t = torch.tensor([0, 1, 500, 999])

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0.9 * x + 1e-3 * t.reshape(-1, 1, 1, 1), torch.sin(x)], dim=1)

    # One number per timestep.
    expected = {
        "loss": [4.816149, 2.994222, 0.3282705, 1.024742],
        "mse": [1.82202, 1.81351, 0.3256803, 1.009875],
        "vb": [2.994129, 1.180712, 0.002590161, 0.01486738],
    }
    losses = IDDPM.linear().losses(model, x0, t, t, eps)
    for name, values in expected.items():
        torch.testing.assert_close(losses[name], torch.tensor(values), rtol=5e-6, atol=0)


def test_bound_trains_the_variance_alone():
    """The bound moves the variance only, the squared error the noise only, the loss both."""
    inputs = batch()
    gradients = {}
    for name in ("vb", "mse", "loss"):
        output = waves(0.3, (64, 8, 5, 7)).requires_grad_()
        losses = IDDPM.linear().losses(lambda x, t, y, output=output: output, **inputs)
        losses[name].mean().backward()
        gradients[name] = output.grad

    # The first four channels are the noise.
    of_noise = {name: gradient[:, :4] for name, gradient in gradients.items()}
    of_variance = {name: gradient[:, 4:] for name, gradient in gradients.items()}
    assert of_noise["vb"].count_nonzero() == 0
    assert of_variance["mse"].count_nonzero() == 0
    assert of_variance["vb"].abs().sum() > 0
    assert of_noise["mse"].abs().sum() > 0
    torch.testing.assert_close(gradients["loss"], gradients["vb"] + gradients["mse"])


def test_a_network_trains_on_an_odd_grid():
    """The loss of 5x7 images reaches every weight of a network, and has one value per image."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(4, 8, 3, padding=1)
    losses = IDDPM.linear().losses(lambda x, t, y: net(x), **batch())
    losses["loss"].mean().backward()
    shapes = {name: value.shape for name, value in losses.items()}
    assert shapes == dict.fromkeys(("loss", "mse", "vb"), (64,))
    for p in net.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0


def test_a_prediction_without_variance_is_refused():
    with pytest.raises(ValueError, match="8 output channels for 4 of data, the prediction has 4"):
        split_prediction(torch.zeros(2, 4, 5, 7), torch.zeros(2, 4, 5, 7))


def test_low_precision_predictions_are_widened():
    prediction = torch.zeros(2, 8, 5, 7, dtype=torch.bfloat16)
    eps, u = split_prediction(prediction, torch.zeros(2, 4, 5, 7))
    assert eps.dtype == u.dtype == torch.float32
