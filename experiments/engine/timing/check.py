"""The gate before every timing: what is timed must compute what the reference kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from backbones import kernels
from experiments.engine.numerics.cuda_graphs import accelerate
from experiments.engine.numerics.randomness import generator_at
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing.clock import free_memory
from experiments.engine.timing.networks import build_network, draw_inputs, draw_scale_inputs
from experiments.engine.timing.tasks import build_sampling, build_trainer, require_task

# The largest relative RMS error of an output, by numeric mode.
LIMITS = {"fp32": 1e-4, "bf16": 2e-2, "tf32": 5e-3, "as_published": 5e-3}
# A backward pass, or a second step of sampling, loses digits: twice the error is allowed.
SECOND_PASS = 2

# What a network is given of one image, each with a batch axis of one: x, t and y of diffusion.
Sample = tuple[Tensor, ...]
# Runs a task at a sample's values and returns the tensors to compare.
Run = Callable[[Cost, Timing, torch.device, Sample], list[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """One tensor of the timed network beside the same tensor of the reference."""

    # What the tensor is, for the error message.
    name: str
    value: Tensor
    truth: Tensor
    # How many times the limit of the numeric mode is allowed.
    tolerance: int = 1

    @property
    def error(self) -> float:
        """Return the relative RMS error."""
        difference = (self.value - self.truth).float().square().mean().sqrt()
        return (difference / self.truth.float().square().mean().sqrt().clamp_min(1e-12)).item()


def check_against_reference(network: Cost, spec: Timing, device: torch.device) -> None:
    """Refuse to time a network that does not compute what the reference kernels compute.

    The relative RMS error of one sample's output counts. For training, the concatenated gradients
    are checked too, with twice the tolerance. A compiled or captured network is checked as it is
    timed, at the timed batch. For training that is the trainer's passes; for captured sampling it
    is a loop of two steps.

    Raises:
        ValueError: an error exceeds its limit.
    """
    limit = LIMITS.get(spec.precision, LIMITS["fp32"])
    for comparison in _compare(network, spec, device):
        allowed = comparison.tolerance * limit
        error = comparison.error
        # NaN compares as false with everything, and must be refused.
        if not error <= allowed:
            raise ValueError(
                f"{_describe(network, spec)}: its {comparison.name} differs from its reference "
                f"by {error:.1e} (limit {allowed:.0e}); it is not timed"
            )


def _compare(network: Cost, spec: Timing, device: torch.device) -> list[Comparison]:
    """Run the timed network and the reference on the same sample."""
    require_task(network, spec)
    accelerated = spec.compile or spec.graphs
    if spec.what == "training" and accelerated:
        (loss, gradient), (true_loss, true_gradient) = _run_both(_run_passes, network, spec, device)
        return [
            Comparison("loss", loss, true_loss),
            Comparison("gradient", gradient, true_gradient, SECOND_PASS),
        ]
    if spec.what == "sampling" and spec.graphs:
        (image,), (true_image,) = _run_both(_run_loop, network, spec, device)
        return [Comparison("output", image, true_image, SECOND_PASS)]
    if accelerated:
        return _compare_accelerated(network, spec, device)
    return _compare_eager(network, spec, device)


def _draw(network: Cost, spec: Timing, device: torch.device) -> Sample:
    """Draw what the network is given of one batch."""
    draw = draw_scale_inputs if network.tokenizer else draw_inputs
    return draw(network, spec, device)


def _describe(network: Cost, spec: Timing) -> str:
    """Name the network, its kernels and how it runs."""
    name = f"{network.backbone.name} with kernels {spec.kernels or 'auto'}"
    if spec.compile:
        name += ", compiled"
    if spec.graphs:
        name += ", by CUDA graphs"
    return name


def _compare_eager(network: Cost, spec: Timing, device: torch.device) -> list[Comparison]:
    """Compare the output of one sample and, for training, the gradient of every parameter."""
    model = build_network(network, spec, device)
    sample = tuple(tensor[:1] for tensor in _draw(network, spec, device))
    run = _run_backward if spec.what == "training" else _run_forward
    with kernels.use(**kernels.references()):
        truths = run(model, sample)
    values = run(model, sample)

    comparisons = [Comparison("output", values[0], truths[0])]
    if spec.what == "training":
        comparisons.append(Comparison("gradient", values[1], truths[1], SECOND_PASS))
    return comparisons


def _compare_accelerated(network: Cost, spec: Timing, device: torch.device) -> list[Comparison]:
    """Compare the first output of a compiled or captured network at the batch that it is given."""
    model = build_network(network, spec, device)
    inputs = _draw(network, spec, device)
    with kernels.use(**kernels.references()):
        (truth,) = _run_forward(model, tuple(tensor[:1] for tensor in inputs))

    # Guidance doubles the batch.
    copies = 2 if spec.what == "sampling" else 1
    accelerate(model, spec.compile, spec.graphs)
    (value,) = _run_forward(model, tuple(torch.cat([tensor] * copies) for tensor in inputs))
    return [Comparison("output", value[:1], truth)]


def _run_both(
    run: Run, network: Cost, spec: Timing, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a task as it is timed, and eagerly at batch 1 with the reference kernels."""
    x, t, y = draw_inputs(network, spec, device)
    sample = (x[:1], t[:1], y[:1])
    plain = replace(spec, batch=1, compile=False, graphs=False)
    with kernels.use(**kernels.references()):
        truths = run(network, plain, device, sample)
    return run(network, spec, device, sample), truths


def _run_passes(network: Cost, spec: Timing, device: torch.device, sample: Sample) -> list[Tensor]:
    """Return the loss and the gradients of the trainer's passes over copies of one sample.

    Loss and gradients are means over the batch, so they equal those of the single sample.
    """
    free_memory(device)
    trainer = build_trainer(network, spec, device)
    x, t, y = sample
    # The trainer appends an upsampler's low-resolution channels itself.
    x = x[:, : trainer.spec.data.channels]
    eps = torch.randn(x.shape, generator=generator_at("check", device=device), device=device)

    x0, t, y, eps = (torch.cat([tensor] * spec.batch) for tensor in (x, t, y, eps))
    loss = trainer.forward_backward(x0, y, t, eps).clone()
    return [loss, _concatenate_gradients(trainer.model)]


def _run_loop(network: Cost, spec: Timing, device: torch.device, sample: Sample) -> list[Tensor]:
    """Return the first image of a loop of two sampling steps over copies of one sample.

    The noise of the first image does not depend on the batch.
    """
    x, t, y = (torch.cat([tensor] * spec.batch) for tensor in sample)
    loop = build_sampling(network, replace(spec, num_steps=2), device, (x, t, y))
    return [loop.run()[:1]]


@torch.inference_mode()
def _run_forward(model: nn.Module, inputs: Sample) -> list[Tensor]:
    """Return the output alone."""
    return [model(*inputs)]


def _run_backward(model: nn.Module, inputs: Sample) -> list[Tensor]:
    """Return the output, and the gradient of its product with noise by every parameter."""
    model.zero_grad()
    output = model(*inputs)
    generator = generator_at("check", device=output.device)
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    with torch.autocast(output.device.type, enabled=False):
        (output.float() * noise).sum().backward()
    gradients = _concatenate_gradients(model)
    model.zero_grad()
    return [output.detach(), gradients]


def _concatenate_gradients(model: nn.Module) -> Tensor:
    """Return the gradients of all parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
