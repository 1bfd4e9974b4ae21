"""What the benchmarks measure, what is asked of them, and what a GPU measures first."""

from __future__ import annotations

from dataclasses import replace

from experiments.declared.protocols import DIGITS
from experiments.engine.benchmarks.spec import Stall
from experiments.engine.benchmarks.targets import Targets
from experiments.engine.specs.spec import Backbone

# The operations that `benchmark.py kernels` times, in this order.
KERNELS = (
    "gated_linear",
    "selective_scan",
    "causal_conv",
    "attention",
    "linear_attention",
    "diagonal_ssm",
    "adaln",
    "addcmul",
    "pointwise",
    "depthwise_gelu",
    "pointwise_gelu",
    "sample_depthwise",
)
KERNEL_BATCH = {"cpu": 1, "cuda": 64}
KERNEL_MODES = {"cpu": ("fp32",), "cuda": ("fp32", "tf32", "bf16")}

# Training beside which a checkpoint is written, every so many steps as trainings do.
STALLS = {
    "cpu": Stall(Backbone("dico_s"), "cpu", batch=4, every=2000),
    "cuda": Stall(Backbone("dico_s"), "cuda", batch=256, every=2000),
}
# Samples, reference points and features of precision and recall.
NEIGHBOUR_SIZES = {"cpu": (5000, 2000, 2048), "cuda": (50_000, 10_000, 2048)}

STEP_NETWORKS = ("dico_s", "dit_s_2")
STEP_BATCH = {"cpu": 8, "cuda": 64}

TARGETS = Targets(
    times_as_fast={
        ("training", "cpu", "fp32"): 1.3,
        ("sampling", "cpu", "fp32"): 1.3,
        ("training", "cuda", "tf32"): 1.5,
        ("training", "cuda", "bf16"): 2.0,
        ("sampling", "cuda", "tf32"): 2.0,
        ("sampling", "cuda", "bf16"): 2.0,
    },
    matmul_share={"dit_xl_2": 0.5, "dico_xl": 0.4},
    most_overhead=1.02,
    copy_share={("selective_scan", "triton"): 0.4},
)

# Small networks that train beside those of another commit: at the size of protocol digits, and at
# CIFAR-10 with blocks of 2x2 pixels folded into channels.
SMALL_TABLE = 4
SMALL_PROTOCOLS = (
    DIGITS,
    replace(DIGITS, name="folded", data=replace(DIGITS.data, size=16, channels=12)),
)

# Of the GPU session; a CPU rehearses it with small networks.
GPU_NETWORKS = {"cuda": ("dico_xl", "dit_xl_2"), "cpu": STEP_NETWORKS}
GPU_ROWS = {"cuda": ("DiCo-XL", "DiT-XL/2"), "cpu": ("DiCo-S", "DiT-S/2")}
GPU_TESTS = (
    "tests/backbones/test_kernels_choices.py",
    "tests/backbones/test_kernels_ssm.py",
    "tests/engine/training/test_accelerate.py",
)

BENCHMARK = "experiments/benchmark.py"
EFFICIENCY = "experiments/efficiency.py"


def gpu_parts(device: str, against: list[str]) -> dict[str, list[str]]:
    """Return the parts of a GPU session by name, most important first.

    Args:
        device: "cpu" leaves out what needs a GPU.
        against: other implementations, as `--against` takes them.

    Returns:
        For each part, the arguments of the Python interpreter.
    """
    return _cuda_parts(against) if device == "cuda" else _cpu_parts(against)


def _cuda_parts(against: list[str]) -> dict[str, list[str]]:
    device, rows = ["--device", "cuda"], GPU_ROWS["cuda"]
    steps = [*_steps("cuda", against), "--precision", "bf16", "tf32"]
    loops = [*_table(1, "sampling", "cuda"), "--rows", *rows]
    return {
        "kernel tests": _tests("gpu and not slow"),
        "scan": [BENCHMARK, "kernels", *device, "--kernels", "selective_scan", "--batch", "256"],
        "steps": steps,
        "steps by CUDA graphs": [*steps, "--graphs"],
        "steps compiled, by CUDA graphs": [*steps, "--compile", "--graphs"],
        **_ceilings_and_profiles("cuda"),
        "steps compiled": [*steps, "--compile"],
        "sampling loops": [*loops, "--graphs", "--modes", "bf16", "tf32"],
        **_claims_and_tables("cuda"),
        "tests of compiled networks": _tests("gpu and slow"),
        "figure 3": [EFFICIENCY, *device, "--figure", "3"],
        # Last, because a loop takes minutes.
        "sampling loops, eager": loops,
    }


def _cpu_parts(against: list[str]) -> dict[str, list[str]]:
    device, rows = ["--device", "cpu"], GPU_ROWS["cpu"]
    steps = _steps("cpu", against)
    return {
        "scan": [BENCHMARK, "kernels", *device, "--kernels", "selective_scan"],
        "steps": steps,
        **_ceilings_and_profiles("cpu"),
        "steps compiled": [*steps, "--compile"],
        "sampling loops": [*_table(1, "sampling", "cpu"), "--rows", *rows],
        **_claims_and_tables("cpu"),
        "figure 3": [EFFICIENCY, *device, "--figure", "3"],
    }


def _ceilings_and_profiles(device: str) -> dict[str, list[str]]:
    rows = GPU_ROWS[device]
    parts = {"training beside the ceilings": [*_table(1, "training", device), "--rows", *rows]}
    for row in rows:
        profile = ["--profile", row, "--task", "training"]
        parts[f"profile of {row}"] = [EFFICIENCY, "--device", device, *profile]
    return parts


def _claims_and_tables(device: str) -> dict[str, list[str]]:
    return {
        "precision and recall": [BENCHMARK, "loop", "--neighbours", "--device", device],
        "claims": [EFFICIENCY, "--device", device, "--claims"],
        "kernels": [BENCHMARK, "kernels", "--device", device],
        "table 1, forward": _table(1, "forward", device),
        "table 2, forward": _table(2, "forward", device),
        "table 1, training": _table(1, "training", device),
        **{
            f"table {number}, latency": _table(number, "latency", device) for number in (1, 2, 3, 4)
        },
    }


def _steps(device: str, against: list[str]) -> list[str]:
    command = [BENCHMARK, "steps", "--device", device, "--rounds", "3"]
    command += ["--networks", *GPU_NETWORKS[device]]
    if against:
        command += ["--against", *against]
    return command


def _table(number: int, task: str, device: str) -> list[str]:
    return [EFFICIENCY, "--device", device, "--table", str(number), "--task", task]


def _tests(marks: str) -> list[str]:
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", marks]
    return ["-m", "pytest", *GPU_TESTS, *options]
