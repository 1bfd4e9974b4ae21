"""Triton kernels are compiled for GPUs that are not here; their binaries tell what they need."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import backbones
from backbones import kernels
from experiments.efficiency import PREDICTED
from experiments.engine.specs.spec import Cost
from experiments.engine.specs.stages import timing_stage
from experiments.engine.timing.networks import size_backbone
from tests.support.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

# Compute capabilities: A100; H100 and H200; B200. Activations have the type of the mode that each
# is timed in first.
GPUS = {80: "fp32", 90: "bf16", 100: "bf16"}
WARPS = 4  # Triton's default
# Registers and static shared memory that a multiprocessor gives to a program without being asked.
REGISTERS, SHARED = 65536, 48 * 1024
# Arguments that are float32 in every mode: parameters, states, and terms that are added up.
FLOAT32 = re.compile(r"(a|d|bias|weight|states|grad_a|grad_[bcd]|grad_bias)_ptr|\w+_terms")
# What every kernel gets in Tables 1 to 4 and in the tables of text, but for sizes that it takes as
# they come: numbers of states, blocks of channels, sides of kernels.
STATES, WIDTHS, SIDES, TEXT_SIDES = (16,), (128, 256, 512, 1024, 2048), (3, 5, 7), (3, 9)


class Kernel(NamedTuple):
    """A kernel of one shape class."""

    module: str
    name: str
    constants: dict[str, Any]
    warps: int = WARPS

    @property
    def id(self) -> str:
        values = (f"{key.lower()}{value}" for key, value in self.constants.items())
        return "-".join([self.module, self.name.lstrip("_"), *values])


def list_kernels() -> list[Kernel]:
    """List every kernel in every shape class."""
    pytest.importorskip("triton")
    modules = ("selective_scan", "adaln", "depthwise", "sample_depthwise")
    scan, adaln, depthwise, sample = (
        import_module(f"backbones.kernels.{name}_triton") for name in modules
    )

    # One kernel has one block size for each shape class.
    listed = []
    for states in STATES:
        blocks = scan._blocks(3072, states)
        for name, flags in (
            ("_forward", dict(KEEP=True)),
            ("_forward", dict(KEEP=False)),
            ("_backward", {}),
        ):
            listed.append(Kernel("selective_scan", name, flags | blocks, scan._WARPS))
    for block in WIDTHS:
        for name in ("_forward", "_backward"):
            listed.append(Kernel("adaln", name, dict(ROWS=adaln.ROWS, BLOCK=block)))
    for side in SIDES:
        for name in ("_forward", "_backward_z", "_backward_x"):
            listed.append(Kernel("depthwise", name, depthwise._blocks(side)))
    for side in TEXT_SIDES:
        for sign in (1, -1):
            constants = dict(SIGN=sign) | sample._blocks(side)
            listed.append(Kernel("sample_depthwise", "_correlate", constants))
        listed.append(Kernel("sample_depthwise", "_backward_taps", sample._blocks(side)))
    return listed


def compile_for(kernel: Kernel, gpu: int, folder: Path) -> dict[str, int]:
    """Compile a kernel, and read from its binary what a program of it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    function = getattr(import_module(f"backbones.kernels.{kernel.module}_triton"), kernel.name)
    types = {}
    for argument in function.arg_names:
        if argument.endswith(("_ptr", "_terms")):
            types[argument] = "*fp32" if FLOAT32.fullmatch(argument) else f"*{GPUS[gpu]}"
        else:
            types[argument] = "fp32" if argument == "eps" else "i32"
    types |= dict.fromkeys(kernel.constants, "constexpr")

    # Triton knows constants by their place.
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    values = {places[name]: value for name, value in kernel.constants.items()}
    source = triton.compiler.ASTSource(function, types, values)
    options = {"num_warps": kernel.warps}
    built = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)

    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needs = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return needs | {"SHARED": max(needs["SHARED"], built.metadata.shared)}


def runs() -> list:
    """List kernels and GPUs; all but a scan and a correlation are slow."""
    listed = []
    fast = {("selective_scan", 80), ("sample_depthwise", 90)}
    for kernel in list_kernels():
        for gpu in GPUS:
            is_slow = (kernel.module, gpu) not in fast
            fast.discard((kernel.module, gpu))
            marks = [pytest.mark.slow] if is_slow else []
            listed.append(pytest.param(kernel, gpu, id=f"{kernel.id}-sm_{gpu}", marks=marks))
    return listed


@pytest.mark.parametrize(("kernel", "gpu"), runs())
def test_a_kernel_fits_a_gpu_that_is_not_here(kernel: Kernel, gpu: int, tmp_path: Path):
    """Nothing spills to memory, and a multiprocessor holds one program at least."""
    needs = compile_for(kernel, gpu, tmp_path)
    assert needs["STACK"] == needs["LOCAL"] == 0
    assert 0 < 32 * kernel.warps * needs["REG"] <= REGISTERS
    assert needs["SHARED"] <= SHARED


# ---- The tables' shape classes


def table_shapes() -> dict[str, set[int]]:
    """Run the networks of Tables 1 to 4 on the meta device, and note what kernels get."""
    shapes: dict[str, set[int]] = {"selective_scan": set(), "adaln": set(), "depthwise_gelu": set()}

    def note(name: str, *args: Any) -> None:
        if name == "selective_scan":
            shapes[name].add(args[2].shape[1])
        elif name == "adaln":
            shapes[name].add(args[0].shape[-1])
        elif name == "depthwise_gelu":
            shapes[name].add(args[1].shape[-1])

    networks: dict[str, Cost] = {}
    for table in PREDICTED:
        for row in table.rows:
            if row.backbone:
                stage = timing_stage(row, table.baseline, "cuda")
                own = Cost(stage.backbone, stage.size, stage.channels, stage.num_classes)
                networks |= {str(network): network for network in (own, *stage.parts)}
    for network in networks.values():
        backbone = size_backbone(network)
        with torch.device("meta"):
            model = backbones.build(backbone.name, **backbone.options).eval()
            x = torch.empty(1, network.channels, network.size, network.size)
            t = torch.zeros(1, dtype=torch.long)
        with kernels.observing(note), torch.no_grad():
            model(x, t, t)
    return shapes


@pytest.mark.slow
def test_the_shape_classes_are_those_of_the_tables():
    shapes = table_shapes()
    assert shapes["selective_scan"] == set(STATES)
    assert shapes["depthwise_gelu"] == set(SIDES)
    blocks = {1 << (width - 1).bit_length() for width in shapes["adaln"]}
    assert blocks == set(WIDTHS)
