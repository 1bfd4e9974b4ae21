"""Training and sampling steps of this suite beside those of another implementation: `python experiments/benchmark_steps.py`.

    python experiments/benchmark_steps.py --against dico_s=dico_models.py:DiCo_S dit_s_2=models.py:DiT_S_2
    python experiments/benchmark_steps.py --networks dico_xl dit_xl_2 --device cuda --precision tf32 bf16 --compile --graphs

FILE:NAME is a constructor without arguments in a file of yours. Up to four things run in turn, so that the machine's drift cancels:
`ours`, the trainer or the sampler as runs use them; `bare`, our network in the shortest loop, model, backward, step, whose excess
is the suite's overhead; and beside another implementation `plain`, our network in a plain loop (iDDPM loss, PyTorch's default AdamW,
EMA by parameter), and `theirs`, the other network in that same loop, which is this suite's own around either, not a file of the
other authors. A loop of sampling is ten guided steps on a GPU, two on a CPU, which cost what those of 250 do. `bare` is
eager, and is left out where ours is compiled or recorded. Beside `ours` of a training stands the share of the device's measured matrix
product that it reaches, a step being three forward passes. What the suite asks of itself (`ASKED`, `SHARE`, `MOST`), and by what part
each is missed, is printed and recorded. Where the batch does not fit a GPU's memory, half of it is tried. Every comparison is a record
of kind `steps`, whose spec has the batch that fitted; one that fits with none, or whose kernels, compiled or recorded network is
refused (`timing.check`), is a failed one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.cli import Parser, acceleration_flags, require_device, run_command
from experiments.engine.records.store import Store, provenance
from experiments.engine.specs.spec import Backbone, Ceilings, Cost, Timing

if TYPE_CHECKING:
    import torch
    from torch import nn

OTHERS, OVERHEAD, PRODUCT = "theirs / ours", "overhead, ours / bare", "share_of_matmul"
SHOWN = (
    (OTHERS, "theirs", "ours"),
    ("theirs / plain", "theirs", "plain"),
    (OVERHEAD, "ours", "bare"),
)
ASKED = {  # by task, device and numeric mode: how many times as long as ours the other implementation takes at least
    ("training", "cpu", "fp32"): 1.3,
    ("sampling", "cpu", "fp32"): 1.3,
    ("training", "cuda", "tf32"): 1.5,
    ("training", "cuda", "bf16"): 2.0,
    ("sampling", "cuda", "tf32"): 2.0,
    ("sampling", "cuda", "bf16"): 2.0,
}
SHARE = {
    "dit_xl_2": 0.5,
    "dico_xl": 0.4,
}  # of the device's matrix product, at least, in training in bf16 on a GPU
MOST = 1.02  # times as long as the bare step
BATCH = {"cpu": 8, "cuda": 64}
SAMPLED = {"cpu": 2, "cuda": 10}  # steps of a loop of sampling


@dataclass(frozen=True)
class Steps:
    """What is compared: a network's step on one device in one numeric mode; `other` is the SHA-256 of the other implementation's file."""

    network: str
    what: str
    batch: int
    device: str
    precision: str
    compile: bool = False
    graphs: bool = False
    other: str | None = None


def main() -> int:
    return run_command(_main)


def _main() -> int:
    import backbones

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["dico_s", "dit_s_2"], metavar="BACKBONE")
    parser.add_argument(
        "--against",
        nargs="*",
        default=[],
        metavar="BACKBONE=FILE:NAME",
        help="other implementations",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "tf32", "bf16"), default=["fp32"]
    )
    parser.add_argument("--batch", type=int, default=None, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument(
        "--tasks", nargs="+", choices=("training", "sampling"), default=["training", "sampling"]
    )
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile")
    parser.add_argument("--graphs", action="store_true", help="ours by CUDA graphs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder (default: results)",
    )
    args = parser.parse_args()
    others, store = dict(_other(text) for text in args.against), Store(args.results)
    if args.rounds < 3 or (args.batch or 1) < 1:
        parser.error("--rounds must be at least 3 and --batch at least 1")
    acceleration_flags(args, args.device)  # refuses graphs on a CPU
    store.check_writable()
    require_device(args.device)
    for name in args.networks:
        backbones.options_of(name)  # refuses a name that it does not know
        if name not in others:
            print(
                f"{name}: without --against {name}=FILE:NAME no step of another implementation is measured",
                flush=True,
            )
    good = True
    for mode in args.precision:
        for name in args.networks:
            for what in args.tasks:
                spec = Steps(
                    name,
                    what,
                    args.batch or BATCH[args.device],
                    args.device,
                    mode,
                    args.compile,
                    args.graphs,
                )
                good &= measure(spec, others.get(name), args.rounds, store)
    return 0 if good else 1


def _other(text: str) -> tuple[str, tuple[Path, str]]:
    name, _, where = text.partition("=")
    file, _, constructor = where.rpartition(":")
    if not constructor.isidentifier() or not Path(file).is_file():
        raise ValueError(f"--against takes BACKBONE=FILE:NAME with an existing file, got {text!r}")
    return name, (Path(file), constructor)


def measure(spec: Steps, other: tuple[Path, str] | None, rounds: int, store: Store) -> bool:
    """Time the tasks of a comparison in turn, at the batch or the first half of a half of it that fits, print and record it; False where none was timed."""
    import torch

    from experiments.engine.numerics.device import describe_device
    from experiments.engine.numerics.precision import read_tf32_flags
    from experiments.engine.timing.clock import free_memory

    device = torch.device(spec.device)
    if other:
        spec = replace(spec, other=hashlib.sha256(other[0].read_bytes()).hexdigest())
    about = describe_device(device)
    what, asked, found, error = (
        f"{spec.network} {spec.what}, {spec.precision}, {spec.device}",
        spec,
        None,
        None,
    )
    ceiling = _ceiling(spec, store) if spec.what == "training" else {}
    while found is None and spec.batch:
        free_memory(device)
        try:
            if error := _refusal(spec, device):
                break
            found = _compare(spec, other, rounds, device)
        except torch.cuda.OutOfMemoryError as failure:
            error = str(failure).splitlines()[0]
            print(f"{what}, batch {spec.batch}: {error}", flush=True)
            spec = replace(spec, batch=spec.batch // 2)
    if found is None:
        store.append(asked, "failed", {}, provenance() | about, error)
        print(f"{what}: not timed: {error}", flush=True)
        return False
    values, ran = found
    if ceiling:
        values |= ceiling | {
            PRODUCT: 3
            * ceiling["macs_core"]
            * spec.batch
            / values["ours_s"]
            / ceiling["ceiling_macs_per_s"]
        }
    values |= judged(spec, values)
    print(f"{what}, batch {spec.batch}: {_words(values)}", flush=True)
    in_force = {name: values[name] for name in read_tf32_flags()}
    store.append(
        spec, "done", values, provenance() | about | {"kernels": ran, "precision_flags": in_force}
    )
    return True


def judged(spec: Steps, values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What is `asked` of the values that were measured, and by what part of it those that do not reach it have `missed` it."""
    share = SHARE.get(spec.network) if (spec.device, spec.precision) == ("cuda", "bf16") else None
    asked = {
        OTHERS: ASKED.get((spec.what, spec.device, spec.precision)),
        OVERHEAD: MOST,
        PRODUCT: share,
    }
    asked = {label: number for label, number in asked.items() if number and label in values}
    short = {
        label: (values[label] / number - 1) * (1 if label == OVERHEAD else -1)
        for label, number in asked.items()
    }
    return {"asked": asked, "missed": {label: part for label, part in short.items() if part > 0}}


def _words(values: dict[str, Any]) -> str:
    def against(label: str) -> str:
        if label not in values["asked"]:
            return ""
        missed = values["missed"].get(label)
        return f" (asked {values['asked'][label]:g}: {'reached' if missed is None else f'missed by {100 * missed:.2g} %'})"

    said = [f"ours {1e3 * values['ours_s']:.1f} ms"]
    said += [
        f"{label} {values[label]:.3f} ±{values[f'{label}, spread']:.3f}{against(label)}"
        for label, _, _ in SHOWN
        if label in values
    ]
    if PRODUCT in values:
        peak = 2e-12 * values["ceiling_macs_per_s"]
        said.append(
            f"ours {100 * values[PRODUCT]:.1f} % of the {peak:.2f} TFLOP/s of a large matrix product{against(PRODUCT)}"
        )
    return "; ".join(said)


def _ceiling(spec: Steps, store: Store) -> dict[str, float]:
    """Multiply-accumulates of a forward pass, by the rule of `efficiency.py --counts`, and the most a second that the device reaches, of its record."""
    from experiments.engine.jobs.execute import execute
    from experiments.engine.runtime.context import Resources
    from experiments.engine.timing import cost

    record = execute(Ceilings(spec.device, spec.precision), store, Resources(spec.device))
    if record.status != "done":
        raise ValueError(f"the device's ceilings could not be measured: {record.error}")
    return {
        "macs_core": cost.count_backbone(_timing(spec)[0])["macs_core"],
        "ceiling_macs_per_s": record.values["macs_per_s"],
    }


def _refusal(spec: Steps, device: torch.device) -> str | None:
    """Why `ours` must not be timed, in words."""
    from experiments.engine.numerics.precision import precision
    from experiments.engine.timing.check import check_against_reference
    from experiments.engine.timing.clock import free_memory

    try:
        with precision(spec.precision, device):
            check_against_reference(*_timing(spec), device)
    except ValueError as refusal:
        return str(refusal)
    free_memory(device)
    return None


def _timing(spec: Steps) -> tuple[Cost, Timing]:
    network = Cost(Backbone(spec.network), 32, 4, 1000)
    about = dict(
        precision=spec.precision,
        what=spec.what,
        num_steps=SAMPLED[spec.device],
        compile=spec.compile,
        graphs=spec.graphs,
    )
    return network, Timing(network.backbone, 32, 4, 1000, spec.batch, spec.device, **about)


def _compare(
    spec: Steps, other: tuple[Path, str] | None, rounds: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(values, the kernels of `ours`)."""
    import torch

    from backbones import kernels
    from experiments.engine.numerics.precision import precision, read_tf32_flags
    from experiments.engine.timing.clock import half_interquartile_range, time_call

    with precision(spec.precision, device):
        tasks = _tasks(spec, _load(*other) if other else None, device)
        ran: dict[str, dict[str, list[str]]] = {}
        for name, task in tasks.items():
            kernels.reset_used()
            for _ in range(3):
                task()
            ran[name] = kernels.used()
        repeats = (
            max(1, round(0.2 / time_call(tasks["ours"], device))) if device.type == "cuda" else 1
        )
        found = [
            {name: time_call(task, device, repeats) for name, task in tasks.items()}
            for _ in range(rounds)
        ]
        in_force = read_tf32_flags() | {"cudnn_benchmark": torch.backends.cudnn.benchmark}
    values: dict[str, Any] = (
        {f"{name}_s": statistics.median(one[name] for one in found) for name in tasks}
        | {"rounds": rounds}
        | in_force
    )
    for label, above, below in SHOWN:
        if above in tasks and below in tasks:
            ratios = [one[above] / one[below] for one in found]
            values |= {
                label: statistics.median(ratios),
                f"{label}, spread": half_interquartile_range(ratios),
            }
    return values, ran["ours"]


def _load(file: Path, constructor: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location(f"other_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{file.name} needs {error.name}, which is not installed") from None
    finally:
        sys.path.pop(0)
    if not hasattr(module, constructor):
        raise ValueError(f"{file.name} has no {constructor}")
    return getattr(module, constructor)()


def _tasks(spec: Steps, other: nn.Module | None, device: Any) -> dict[str, Callable[[], Any]]:
    from experiments.engine.timing.networks import draw_network, size_backbone
    from experiments.engine.timing.plain_steps import bare_training, plain_sampling, plain_training
    from experiments.engine.timing.tasks import build_task

    network, timed = _timing(spec)
    tasks = {"ours": build_task(network, timed, device)}
    if spec.what == "training" and not (
        spec.compile or spec.graphs
    ):  # an eager loop beside another network's kernels or launches says nothing
        tasks["bare"] = bare_training(draw_network(size_backbone(network), device), spec.batch)

    def loop(model: nn.Module) -> Callable[[], None]:
        if spec.what == "training":
            return plain_training(model, spec.batch)
        return plain_sampling(model, spec.batch, SAMPLED[spec.device])

    if other is not None:
        tasks["plain"] = loop(draw_network(size_backbone(network), device))
        tasks["theirs"] = loop(other.to(device))
    return tasks


if __name__ == "__main__":
    raise SystemExit(main())
