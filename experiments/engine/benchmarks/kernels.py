"""Time every implementation of an operation beside its reference and beside a plain copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backbones import kernels
from experiments.engine.benchmarks import kernel_cases
from experiments.engine.benchmarks.kernel_cases import CASES
from experiments.engine.benchmarks.spec import Kernel
from experiments.engine.benchmarks.targets import Targets, describe_copy_share
from experiments.engine.numerics.device import describe_device, keep_memory
from experiments.engine.numerics.precision import precision
from experiments.engine.records.store import Store, provenance
from experiments.engine.timing.ceilings import measure_copy_rates
from experiments.engine.timing.clock import half_interquartile_range, time_call

# The largest relative RMS error of the output and of every gradient.
LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 4e-2}
# Implementations whose products are TF32 in every mode, and which are judged by that limit.
ALWAYS_TF32 = {("gated_linear", "fla")}
# On a GPU so many calls are timed in a row, so that their launches overlap as in use.
GPU_REPEATS = 10


@dataclass
class Result:
    """What was measured of one implementation."""

    # Fields of the record.
    values: dict[str, Any] = field(default_factory=dict)
    # Why the implementation was not timed.
    error: str | None = None


@dataclass(frozen=True)
class Setup:
    """How kernels are timed."""

    device: str
    # Samples of every input.
    batch: int
    # Timed runs; one more warms up.
    runs: int


def measure_kernels(
    names: Sequence[str], modes: Sequence[str], setup: Setup, store: Store, targets: Targets
) -> bool:
    """Measure operations in numeric modes, print and record each implementation.

    Returns:
        Whether every implementation computes what its reference does.
    """
    device = torch.device(setup.device)
    keep_memory()
    copy_rate = max(measure_copy_rates(device))
    print(
        f"T = {kernel_cases.TOKENS}, D = {kernel_cases.DIM}, batch {setup.batch}, {device}, "
        f"{torch.get_num_threads()} threads, median of {setup.runs} runs; "
        f"a copy moves {copy_rate / 1e9:.1f} GB/s"
    )
    print(
        "GB/s: bytes moved over the time of forward + backward. The inputs are read twice, "
        "the output is written, its gradient is read, and the inputs' gradients are written."
    )

    agreed = True
    for name in names:
        for mode in modes:
            inputs = _make_inputs(name, mode, setup)
            op = getattr(kernels, name)
            with precision(mode, device):
                results = compare(op, inputs, LIMITS[mode], setup.runs)
            for choice, result in results.items():
                agreed = agreed and result.error is None
                spec = Kernel(name, choice, setup.device, setup.batch, mode)
                record_kernel(store, spec, result, copy_rate, targets)
    return agreed


def _make_inputs(name: str, mode: str, setup: Setup) -> list[Tensor]:
    """Draw an operation's inputs; in bf16 its activations have that type, parameters do not."""
    torch.manual_seed(0)
    inputs = [x.to(setup.device) for x in CASES[name](setup.batch)]
    if mode != "bf16":
        return inputs
    return [x.bfloat16() if x.ndim > 2 and len(x) == setup.batch else x for x in inputs]


def compare(op: kernels.Op, inputs: list[Tensor], limit: float, runs: int) -> dict[str, Result]:
    """Check and time every implementation that takes the inputs and keeps gradients.

    Args:
        op: the operation.
        inputs: its arguments; they are given gradients.
        limit: largest relative RMS error of the output and of every gradient.
        runs: timed runs; one more warms up.

    Returns:
        A result for each implementation. One that differs from the reference is not timed.
    """
    inputs = [x.requires_grad_() for x in inputs]
    choices = [choice.name for choice in op.choices.values() if choice.supports(*inputs)]
    truths = _run_reference(op, inputs)
    results = {choice: _check(op, choice, inputs, truths, limit) for choice in choices}

    # Time in turn those that computed the right thing.
    timed = [choice for choice, result in results.items() if result.error is None]
    times = _time_in_turn(op, timed, inputs, runs)
    reference_times = times.get(_reference_of(op), [])
    bytes_moved = _count_bytes(inputs, truths[0])
    for choice in timed:
        results[choice].values |= _summarise(times[choice], reference_times, bytes_moved)
    return results


def _reference_of(op: kernels.Op) -> str:
    return list(op.choices)[-1]


def _run_reference(op: kernels.Op, inputs: list[Tensor]) -> list[Tensor]:
    """Return the reference's output and gradients, in float32 or better."""
    exact = [
        x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in inputs
    ]
    with (
        kernels.use(**{op.name: _reference_of(op)}),
        torch.autocast(inputs[0].device.type, enabled=False),
    ):
        return _run_backward(op, exact)


def _check(
    op: kernels.Op, choice: str, inputs: list[Tensor], truths: list[Tensor], limit: float
) -> Result:
    """Compare an implementation's output and gradients with the truth."""
    with kernels.use(**{op.name: choice}):
        values = _run_backward(op, inputs)
    errors = [_relative_rms(value, truth) for value, truth in zip(values, truths, strict=True)]
    if (op.name, choice) in ALWAYS_TF32:
        limit = max(limit, LIMITS["tf32"])

    # NaN compares as false with everything, and must be refused.
    worst = max(errors)
    if not worst <= limit:
        return Result(
            error=f"differs from its reference by {worst:.1e} (limit {limit:.0e}) and is not timed"
        )
    return Result({"error_forward": errors[0], "error_backward": max(errors[1:])})


def _time_in_turn(
    op: kernels.Op, choices: list[str], inputs: list[Tensor], runs: int
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds of forward, and of forward and backward, of each run of each choice."""
    device = inputs[0].device
    repeats = GPU_REPEATS if device.type == "cuda" else 1
    times: dict[str, list[tuple[float, float]]] = {choice: [] for choice in choices}

    # The choices take turns, so that a slow drift of the clock affects all of them alike.
    for i in range(runs + 1):
        for choice in choices:
            with kernels.use(**{op.name: choice}):
                forward = time_call(_bind(_run_forward, op, inputs), device, repeats)
                both = time_call(_bind(_run_backward, op, inputs), device, repeats)
            # The first run warms up.
            if i > 0:
                times[choice].append((forward, both))
    return times


def _bind(
    run: Callable[[kernels.Op, list[Tensor]], object], op: kernels.Op, inputs: list[Tensor]
) -> Callable[[], object]:
    return lambda: run(op, inputs)


def _summarise(
    times: list[tuple[float, float]], reference_times: list[tuple[float, float]], bytes_moved: int
) -> dict[str, Any]:
    """Return the fields of a record: medians, and the ratio to the reference in the same run."""
    forward = statistics.median(seconds for seconds, _ in times)
    both = [seconds for _, seconds in times]
    ratios = [slow / fast for (_, slow), (_, fast) in zip(reference_times, times, strict=True)]
    return {
        "forward_ms": 1e3 * forward,
        "forward_backward_ms": 1e3 * statistics.median(both),
        "forward_backward_ms_spread": 1e3 * half_interquartile_range(both),
        "times_as_fast_as_reference": statistics.median(ratios),
        "gb_per_s": bytes_moved / statistics.median(both) / 1e9,
        "runs": len(times),
    }


def _count_bytes(inputs: list[Tensor], output: Tensor) -> int:
    """Count the least that an implementation moves, forward and backward.

    Forward reads the inputs and writes the output. Backward reads the inputs and the output's
    gradient, and writes a gradient of every input.
    """
    of_inputs = sum(x.nbytes for x in inputs)
    of_output = output.numel() * inputs[0].element_size()
    return 3 * of_inputs + 2 * of_output


def record_kernel(
    store: Store, spec: Kernel, result: Result, copy_rate: float, targets: Targets
) -> None:
    """Write the record of one implementation and print its line."""
    tf32 = spec.precision == "tf32"
    about = provenance() | describe_device(spec.device)
    about["precision_flags"] = {"matmul_tf32": tf32, "cudnn_tf32": tf32}
    about["kernels"] = {spec.op: [spec.choice]}
    name = f"{spec.op}, {spec.precision}: {spec.choice}"
    if result.error is not None:
        store.append(spec, "failed", {}, about, result.error)
        print(f"{name} {result.error}", flush=True)
        return

    values = result.values
    share = 1e9 * values["gb_per_s"] / copy_rate
    beside_copy = {"copy_gb_per_s": copy_rate / 1e9, "share_of_copy": share}
    store.append(spec, "done", values | beside_copy, about)
    print(
        f"{name} {values['forward_ms']:.2f} ms forward, "
        f"{values['forward_backward_ms']:.2f} ms forward + backward, "
        f"{values['times_as_fast_as_reference']:.1f} x the reference's speed, "
        f"{values['gb_per_s']:.2f} GB/s, {100 * share:.1f} % of a copy's"
        f"{describe_copy_share(spec, share, targets)}",
        flush=True,
    )


@torch.no_grad()
def _run_forward(op: kernels.Op, inputs: Sequence[Tensor]) -> Tensor:
    """Run as in sampling: nothing is kept for a backward pass."""
    return op(*inputs)


def _run_backward(op: kernels.Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output, and the gradient of every input from a gradient of ones."""
    out = op(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def _relative_rms(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach(), truth.detach()
    error = (value - truth).abs().square().mean()
    return (error / truth.abs().square().mean()).sqrt().item()
