"""Time every kernel against its reference and the device's memory, forward and backward: `python experiments/benchmark_kernels.py [--device cuda]`.

All implementations that take the device's tensors and keep gradients run in turn in one process, at T = 256 and D = 384: on a CPU
the fast paths, on CUDA also the kernels in Triton and what is installed of mamba-ssm, causal-conv1d, fla and flash-attn. Each is compared
with the reference first, and not timed where it is another function. Bandwidth counts the least that any implementation has
to move: forward reads the inputs and writes the output, backward reads the inputs and the output's gradient and writes a
gradient of every input; beside it stands what a plain copy reads and writes, and for the Triton scan whether it reaches 40 % of that.
One record each goes to results/records/kernel. To add a kernel: a line in CASES and the function that makes its inputs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.cli import Parser, require_device, run_command
from experiments.engine.records.store import Store, provenance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from backbones.kernels.op import Op

TOKENS, DIM = 256, 384
LIMITS = {
    "fp32": 1e-4,
    "tf32": 1e-2,
    "bf16": 4e-2,
}  # relative RMS error of the output and of every gradient

TF32 = {("gated_linear", "fla")}  # their products are TF32 in every mode, and are judged so
LEAST = {("selective_scan", "triton"): 0.4}  # of a copy's bandwidth


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation in a case's shapes, forward and backward; 'bf16' are inputs of that type under autocast."""

    op: str
    choice: str
    device: str
    batch: int
    precision: str = "fp32"
    tokens: int = TOKENS
    dim: int = DIM


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        help="which to time (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(LIMITS),
        default=None,
        help="numeric modes (default: fp32; on CUDA all)",
    )
    parser.add_argument("--batch", type=int, default=None, help="default: 1 on a CPU, 64 on CUDA")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    args = parser.parse_args()
    store, batch = Store(args.results), args.batch or {"cpu": 1, "cuda": 64}[args.device]
    if args.runs < 2 or batch < 1:
        parser.error("--runs must be at least 2 and --batch at least 1")
    store.check_writable()
    require_device(args.device)
    return (
        0
        if run(
            args.kernels,
            args.device,
            args.precision or {"cpu": ["fp32"], "cuda": list(LIMITS)}[args.device],
            batch,
            args.runs,
            store,
        )
        else 1
    )


def run(
    names: Sequence[str], device: str, modes: Sequence[str], batch: int, runs: int, store: Store
) -> bool:
    """Measure, print and record; whether every implementation computes what its reference does."""
    import torch

    import backbones.kernels
    from experiments.engine.numerics.device import keep_memory
    from experiments.engine.numerics.precision import precision
    from experiments.engine.timing.ceilings import measure_copy_rates

    keep_memory()
    copied, good = max(measure_copy_rates(torch.device(device))), True
    print(
        f"T = {TOKENS}, D = {DIM}, batch {batch}, {device}, {torch.get_num_threads()} threads, median of {runs} runs; a copy moves {copied / 1e9:.1f} GB/s"
    )
    print(
        "GB/s: inputs read twice, the output written, its gradient read and those of the inputs written, over the time of forward + backward"
    )
    for name in names:
        op, make = getattr(backbones.kernels, name), CASES[name]
        for mode in modes:
            torch.manual_seed(0)
            inputs = [part.to(device) for part in make(batch)]
            if mode == "bf16":
                inputs = [
                    part.bfloat16() if part.ndim > 2 and len(part) == batch else part
                    for part in inputs
                ]  # parameters stay
            with precision(mode, torch.device(device)):
                measured = compare(op, inputs, LIMITS[mode], runs)
            for choice, values in measured.items():
                good &= "error" not in values
                _record(store, Kernel(name, choice, device, batch, mode), values, copied)
    return good


def compare(op: Op, inputs: list[Tensor], limit: float, runs: int) -> dict[str, dict[str, Any]]:
    """By implementation: medians of the times and their half interquartile range, the ratio to the reference in the same run, errors,
    bytes per second; only 'error', in words, where the implementation differs from the reference by more than `limit`, or TF32's."""
    import torch

    from backbones.kernels import use

    inputs = [part.requires_grad_() for part in inputs]
    device, reference = inputs[0].device, list(op.choices)[-1]
    found: dict[str, dict[str, Any]] = {}
    with use(**{op.name: reference}), torch.autocast(device.type, enabled=False):
        truths = _results(
            op,
            [
                part.detach().to(torch.promote_types(part.dtype, torch.float32)).requires_grad_()
                for part in inputs
            ],
        )
    for choice in (choice.name for choice in op.choices.values() if choice.supports(*inputs)):
        with use(**{op.name: choice}):
            errors = [
                _relative(value, truth)
                for value, truth in zip(_results(op, inputs), truths, strict=True)
            ]
        found[choice] = {"error_forward": errors[0], "error_backward": max(errors[1:])}
        most = max(limit, LIMITS["tf32"]) if (op.name, choice) in TF32 else limit
        if not max(errors) <= most:
            found[choice] = {
                "error": f"differs from its reference by {max(errors):.1e} (limit {most:.0e}) and is not timed"
            }
    timed = [choice for choice, values in found.items() if "error" not in values]
    times: dict[str, list[tuple[float, float]]] = {choice: [] for choice in timed}
    for i in range(runs + 1):
        for choice in timed:
            with use(**{op.name: choice}):
                taken = (
                    _seconds(lambda: _forward(op, inputs), device),
                    _seconds(lambda: _results(op, inputs), device),
                )
            if i:  # the first warms up
                times[choice].append(taken)
    moved = (
        sum(3 * part.nbytes for part in inputs) + 2 * truths[0].numel() * inputs[0].element_size()
    )
    for choice, pairs in times.items():
        forward, both = ([pair[i] for pair in pairs] for i in range(2))
        low, _, high = statistics.quantiles(both, n=4)
        found[choice] |= {
            "forward_ms": 1e3 * statistics.median(forward),
            "forward_backward_ms": 1e3 * statistics.median(both),
            "forward_backward_ms_spread": 1e3 * (high - low) / 2,
            "times_as_fast_as_reference": statistics.median(
                slow / fast for (_, slow), (_, fast) in zip(times[reference], pairs, strict=True)
            ),
            "gb_per_s": moved / statistics.median(both) / 1e9,
            "runs": runs,
        }
    return found


def gated_linear(batch: int) -> list[Tensor]:
    """DiG-S/2's: 6 heads, e = 32, f = 64, decays of logits around zero."""
    import torch

    heads, e = DIM // 64, 32
    q, k, logits = (torch.randn(batch, heads, TOKENS, e) for _ in range(3))
    return [
        q,
        k,
        torch.randn(batch, heads, TOKENS, 2 * e),
        torch.nn.functional.logsigmoid(logits) / 16,
    ]


def diagonal_ssm(batch: int) -> list[Tensor]:
    """DiffuSSM's: 64 complex states a channel, A = -1/2 + i pi n, dt in [0.01, 1]."""
    import torch

    a = torch.complex(torch.full((64,), -0.5), math.pi * torch.arange(64.0))
    dt = torch.empty(DIM, 1).uniform_(math.log(0.01), 0).exp()
    return [torch.randn(batch, DIM, TOKENS), dt * a, torch.randn(DIM, 64, dtype=torch.complex64)]


def selective_scan(batch: int) -> list[Tensor]:
    """Mamba's: twice the width in channels, 16 states, A = -1 to -16, steps around softplus(-3)."""
    import torch

    channels, states = 2 * DIM, 16
    u, delta, z = (torch.randn(batch, channels, TOKENS) for _ in range(3))
    b, c = (torch.randn(batch, states, TOKENS) for _ in range(2))
    a = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return [u, delta, a, b, c, torch.ones(channels), z, torch.full((channels,), -3.0)]


def causal_conv(batch: int) -> list[Tensor]:
    """Mamba's: twice the width in channels, 4 taps."""
    import torch

    return [
        torch.randn(batch, 2 * DIM, TOKENS),
        torch.randn(2 * DIM, 1, 4) / 2,
        torch.zeros(2 * DIM),
    ]


def linear_attention(batch: int) -> list[Tensor]:
    """Focused linear attention's: 12 heads of 32 features that are not negative."""
    import torch

    q, k, v = (torch.randn(batch, DIM // 32, TOKENS, 32) for _ in range(3))
    return [q.relu(), k.relu(), v]


def attention(batch: int) -> list[Tensor]:
    """DiT-S/2's: 6 heads of 64."""
    import torch

    return [torch.randn(batch, DIM // 64, TOKENS, 64) for _ in range(3)]


def adaln(batch: int) -> list[Tensor]:
    """DiT-S/2's: a shift and a scale a sample."""
    import torch

    return [torch.randn(batch, TOKENS, DIM), torch.randn(batch, 1, DIM), torch.randn(batch, 1, DIM)]


def depthwise_gelu(batch: int) -> list[Tensor]:
    """DiCo's: 3x3, channels-last, as many pixels as tokens elsewhere."""
    import torch

    return [_image(batch), torch.randn(DIM, 1, 3, 3) / 3, torch.zeros(DIM)]


def pointwise_gelu(batch: int) -> list[Tensor]:
    """DiCo's: to twice the width."""
    import torch

    return [_image(batch), torch.randn(2 * DIM, DIM, 1, 1) / DIM**0.5, torch.zeros(2 * DIM)]


def _image(batch: int) -> Tensor:
    import torch

    side = math.isqrt(TOKENS)
    return torch.randn(batch, DIM, side, side).contiguous(memory_format=torch.channels_last)


CASES: dict[str, Callable[[int], list[Tensor]]] = {
    "gated_linear": gated_linear,
    "selective_scan": selective_scan,
    "causal_conv": causal_conv,
    "attention": attention,
    "linear_attention": linear_attention,
    "diagonal_ssm": diagonal_ssm,
    "adaln": adaln,
    "addcmul": lambda batch: [_image(batch), _image(batch)[..., :1, :1].clone(), _image(batch)],
    "pointwise": pointwise_gelu,
    "depthwise_gelu": depthwise_gelu,
    "pointwise_gelu": pointwise_gelu,
}


def _record(store: Store, spec: Kernel, values: dict[str, Any], copied: float) -> None:
    from experiments.engine.numerics.device import describe_device

    about = (
        provenance()
        | describe_device(spec.device)
        | {
            "precision_flags": {
                name: spec.precision == "tf32" for name in ("matmul_tf32", "cudnn_tf32")
            },
            "kernels": {spec.op: [spec.choice]},
        }
    )
    what = f"{spec.op}, {spec.precision}: {spec.choice}"
    if error := values.get("error"):
        store.append(spec, "failed", {}, about, error)
        print(f"{what} {error}", flush=True)
        return
    share = 1e9 * values["gb_per_s"] / copied
    store.append(
        spec, "done", values | {"copy_gb_per_s": copied / 1e9, "share_of_copy": share}, about
    )
    print(
        f"{what} {values['forward_ms']:.2f} ms forward, {values['forward_backward_ms']:.2f} ms forward + backward, {values['times_as_fast_as_reference']:.1f} x the reference's speed, "
        f"{values['gb_per_s']:.2f} GB/s, {100 * share:.1f} % of a copy's{verdict(spec, share)}",
        flush=True,
    )


def verdict(spec: Kernel, share: float) -> str:
    """Whether a share of a copy's bandwidth is what is asked of the implementation, in words."""
    if (least := LEAST.get((spec.op, spec.choice))) is None:
        return ""
    return f", {'reaches' if share >= least else 'misses'} the {100 * least:.0f} % asked of it"


def _forward(op: Op, inputs: Sequence[Tensor]) -> Tensor:
    """As in sampling: nothing is kept for a backward pass."""
    import torch

    with torch.no_grad():
        return op(*inputs)


def _results(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradient of every input, from a gradient of ones."""
    import torch

    out = op(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def _relative(value: Tensor, truth: Tensor) -> float:
    return (
        (
            (value.detach() - truth.detach()).abs().square().mean()
            / truth.detach().abs().square().mean()
        )
        .sqrt()
        .item()
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a synchronised call; on CUDA the mean of ten, so that launches overlap as in use."""
    import torch

    repeats = 10 if device.type == "cuda" else 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    raise SystemExit(main())
