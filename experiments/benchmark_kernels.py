"""Time the CPU paths of the recurrences and of linear attention against their references, forward and backward: `python experiments/benchmark_kernels.py`.

Both run in turn in the same process, at T = 256 and D = 384; the ratio of the medians is the figure to compare.
To add a kernel: a line in CASES and the function that makes its inputs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from backbones.kernels.op import Op

TOKENS, DIM = 256, 384


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(CASES), default=list(CASES), help="which to time (default: all)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    import torch

    import backbones.kernels

    torch.manual_seed(0)
    print(f"T = {TOKENS}, D = {DIM}, batch {args.batch}, float32, {torch.get_num_threads()} threads, median of {args.runs} runs, forward + backward")
    for name in args.kernels:
        choice, make = CASES[name]
        _compare(getattr(backbones.kernels, name), choice, make(args.batch), args.runs)
    return 0


def gated_linear(batch: int) -> list[Tensor]:
    """DiG-S/2's: 6 heads, e = 32, f = 64, decays of logits around zero."""
    import torch

    heads, e = DIM // 64, 32
    q, k, logits = (torch.randn(batch, heads, TOKENS, e) for _ in range(3))
    return [q, k, torch.randn(batch, heads, TOKENS, 2 * e), torch.nn.functional.logsigmoid(logits) / 16]


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


def linear_attention(batch: int) -> list[Tensor]:
    """Focused linear attention's: 12 heads of 32 features that are not negative."""
    import torch

    q, k, v = (torch.randn(batch, DIM // 32, TOKENS, 32) for _ in range(3))
    return [q.relu(), k.relu(), v]


CASES: dict[str, tuple[str, Callable[[int], list[Tensor]]]] = {
    "gated_linear": ("chunked", gated_linear),
    "selective_scan": ("loop", selective_scan),
    "linear_attention": ("associated", linear_attention),
    "diagonal_ssm": ("fft", diagonal_ssm),
}


def _compare(op: Op, choice: str, inputs: list[Tensor], runs: int) -> None:
    from backbones.kernels import use

    inputs = [x.requires_grad_() for x in inputs]
    times: dict[str, list[float]] = {choice: [], "reference": []}
    for i in range(runs + 1):
        for name, seconds in times.items():
            with use(**{op.name: name}):
                elapsed = _step(op, inputs)
            if i:  # the first warms up
                seconds.append(elapsed)
    fast, slow = (1e3 * statistics.median(seconds) for seconds in times.values())
    print(f"{op.name}: {choice} {fast:.1f} ms, reference {slow:.1f} ms, {slow / fast:.1f} times as long", flush=True)


def _step(op: Op, inputs: list[Tensor]) -> float:
    import torch

    started = time.perf_counter()
    out = op(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
