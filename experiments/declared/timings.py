"""What is timed. No torch.

A row is timed in every numeric mode of a device, with the paper's batch and input. The suite
chooses the kernels. The authors' mode is an exception: it treats linear layers and 1x1 convolutions
differently, so both stay what they are called, and tensors have PyTorch's default layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments.declared.families import family_of
from experiments.engine.jobs.job import Job, Sweep
from experiments.engine.reporting.efficiency.details import SweptRow
from experiments.engine.reporting.efficiency.inference.predicted import LatencyRow
from experiments.engine.reporting.efficiency.predictions import Declared
from experiments.engine.reporting.efficiency.speed import (
    AS_PUBLISHED,
    EAGER,
    Acceleration,
    TimedRow,
    TimedTable,
)
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone, Ceilings, Latency, Profile, Timing
from experiments.engine.specs.stages import timed_rows, timing_stage

TASKS = ("forward", "training", "sampling")
# In place of a task: one image at a time, and the memory of inference.
LATENCY = "latency"
MODES = {"cpu": ("fp32",), "cuda": ("fp32", "tf32", "bf16", AS_PUBLISHED)}

# Steps of a sampling loop. A CPU times a part of the loop, whose steps cost the same.
SAMPLING_STEPS = {"cpu": 4, "cuda": 250}

# Tables whose networks the paper timed with attention written out.
UNFUSED_TABLES = (3, 4)

# Families whose attention is none of the suite's kernels.
WRITTEN_OUT = ("adm", "ldm", "udit")

# Exponents of the largest batch of a sweep.
MAX_POWER = {"cpu": 4, "cuda": 10}

FIGURE_3_LATENTS = {"cpu": (32, 64), "cuda": (32, 64, 128)}
FIGURE_3_SIZES = {"cpu": ("s",), "cuda": ("s", "b", "l", "xl")}
FIGURE_3_FAMILIES = (("dit", "_2"), ("dis", "_2"), ("dig", "_2"), ("dico", ""))


# ---- One timing


def modes_of(device: str, acceleration: Acceleration = EAGER) -> tuple[str, ...]:
    """Return the numeric modes of a device. The authors compiled nothing and captured no graph."""
    return tuple(mode for mode in MODES[device] if not (acceleration and mode == AS_PUBLISHED))


def in_mode(
    stage: Timing, mode: str, task: str = "forward", acceleration: Acceleration = EAGER
) -> Timing:
    """Return the timing of a task in a numeric mode.

    The record says which kernels ran; which libraries must be installed is no part of the spec.
    """
    num_steps = SAMPLING_STEPS[stage.device] if task == "sampling" else stage.num_steps
    stage = replace(
        stage,
        precision=mode,
        kernels={},
        what=task,
        num_steps=num_steps,
        compile=acceleration.compile,
        graphs=acceleration.graphs,
    )

    # The authors' networks ran with plain kernels and contiguous tensors.
    if mode == AS_PUBLISHED:
        kernels = {"linear": "reference", "pointwise": "reference"}
        stage = replace(stage, kernels=kernels, layout="contiguous")
    return stage


def ceilings(device: str) -> list[Ceilings]:
    """Return the measurements of what a device can do, in every mode but the authors'."""
    return [Ceilings(device, mode) for mode in MODES[device] if mode != AS_PUBLISHED]


def ceilings_job(device: str) -> Job:
    return Job("ceilings", tuple(ceilings(device)))


# ---- Tables


def timed_table(
    table: Table,
    rows: Sequence[Row],
    device: str,
    task: str,
    acceleration: Acceleration = EAGER,
) -> TimedTable:
    """Return the timings of all rows that have a network, in every mode of the device."""
    modes = modes_of(device, acceleration)
    networks = [row for row in rows if row.backbone]

    # Each row is timed once in every mode.
    timed = []
    for row in networks:
        stage = timing_stage(row, table.baseline, device)
        stages = {mode: in_mode(stage, mode, task, acceleration) for mode in modes}
        timed.append(TimedRow(row, stages))

    return TimedTable(
        table,
        tuple(timed),
        device,
        task,
        modes,
        acceleration,
        num_steps=SAMPLING_STEPS[device],
        has_heavy_rows=any(row.heavy for row in timed_rows(table, networks, device, named=True)),
        written_out=tuple(row.label for row in networks if is_written_out(row)),
    )


def is_written_out(row: Row) -> bool:
    """Return whether the attention of a row's network is none of the suite's kernels."""
    return row.backbone is not None and family_of(row.backbone.name) in WRITTEN_OUT


def stages(
    table: Table,
    rows: Sequence[Row],
    device: str,
    task: str,
    named: bool,
    acceleration: Acceleration = EAGER,
) -> list[Timing]:
    """Return the timings of each network once, in all modes of the device.

    Args:
        named: whether the user named the rows, so that a CPU times heavy ones.
    """
    # Rows of one network share its timing; the last one's is taken.
    by_network = {str(row.backbone): row for row in timed_rows(table, rows, device, named)}

    timed = []
    for row in by_network.values():
        stage = timing_stage(row, table.baseline, device)
        for mode in modes_of(device, acceleration):
            timed.append(in_mode(stage, mode, task, acceleration))
    return timed


def require_modes(modes: Sequence[str], device: str, acceleration: Acceleration = EAGER) -> None:
    """Raise ValueError if a mode is not one of the device's."""
    known = modes_of(device, acceleration)
    unknown = sorted(set(modes) - set(known))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no numeric mode of {device}{acceleration}; "
            f"known: {', '.join(known)}"
        )


def jobs(rows: Sequence[Row], timed: Sequence[Timing]) -> tuple[Job, ...]:
    """Return one job per network, so that all its modes are timed on one machine.

    Args:
        rows: give each job the label of the first row with its network.
        timed: the timings of these rows.
    """
    labels = {str(row.backbone): row.label for row in reversed(rows)}
    by_network: dict[str, list[Timing]] = {}
    for stage in timed:
        by_network.setdefault(str(stage.backbone), []).append(stage)
    return tuple(Job(labels[network], tuple(group)) for network, group in by_network.items())


# ---- Latency


def latency_rows(
    table: Table,
    rows: Sequence[Row],
    device: str,
    named: bool = True,
    acceleration: Acceleration = EAGER,
    modes: Sequence[str] | None = None,
) -> list[LatencyRow]:
    """Return the latency of every network of a table once.

    The suite chooses the kernels in all tables, because the paper prints no latency.

    Args:
        named: whether the user named the rows, so that a CPU measures heavy ones.
        modes: numeric modes; None: all of the device.
    """
    declared: dict[str, LatencyRow] = {}
    for row in timed_rows(table, rows, device, named):
        stage = timing_stage(row, row, device)
        alone = replace(stage, baseline=None, baseline_input=None)
        stages = {
            mode: Latency(in_mode(alone, mode, acceleration=acceleration))
            for mode in modes or modes_of(device, acceleration)
        }
        declared.setdefault(
            str((row.backbone, alone.parts)),
            LatencyRow(str(table.number), row.network_label, stages),
        )
    return list(declared.values())


def latency_jobs(rows: Sequence[LatencyRow]) -> tuple[Job, ...]:
    """Return one job per network, so that all its modes are measured on one machine."""
    return tuple(Job(row.label, tuple(row.stages.values())) for row in rows)


# ---- Sweeps


def swept_row(
    row: Row, baseline: Row, device: str, task: str, acceleration: Acceleration = EAGER
) -> SweptRow:
    """Return a row's timings alone, without the baseline, at growing batches in every mode."""
    alone = replace(timing_stage(row, baseline, device), baseline=None, baseline_input=None)
    batches = [2**power for power in range(MAX_POWER[device] + 1)]
    by_mode = {}
    for mode in modes_of(device, acceleration):
        stage = in_mode(alone, mode, task, acceleration)
        by_mode[mode] = tuple(replace(stage, batch=batch) for batch in batches)
    return SweptRow(row.label, device, task, by_mode, acceleration)


def sweeps(swept: SweptRow) -> list[Sweep]:
    """Return one job per mode."""
    return [
        Sweep(f"{swept.label}, {mode}", batches, row=swept.label)
        for mode, batches in swept.stages.items()
    ]


# ---- Figure 3


def figure_3(device: str, acceleration: Acceleration = EAGER) -> list[Timing]:
    """Return the timings of DiT, DiS, DiG and DiCo at growing latents.

    A GPU times all sizes for images of 256, 512 and 1024 pixels, a CPU size S for the first two.
    """
    names = []
    for size in FIGURE_3_SIZES[device]:
        for family, patch in FIGURE_3_FAMILIES:
            name = f"{family}_{size}{patch}"
            # The figure's DiS-XL was never described.
            names.append(name.replace("dis_xl", "dis_h"))

    timed = []
    for side in FIGURE_3_LATENTS[device]:
        batch = 64 * 32**2 // side**2 if device == "cuda" else 1
        for name in names:
            stage = Timing(Backbone(name), side, 4, 1000, batch, device)
            timed += [
                in_mode(stage, mode, acceleration=acceleration)
                for mode in modes_of(device, acceleration)
            ]
    return timed


def figure_3_jobs(device: str, acceleration: Acceleration = EAGER) -> tuple[Job, ...]:
    """Return one job per network."""
    by_name: dict[str, list[Timing]] = {}
    for stage in figure_3(device, acceleration):
        by_name.setdefault(stage.backbone.name, []).append(stage)
    return tuple(Job(name, tuple(group)) for name, group in by_name.items())


# ---- Profiles


def profiles(row: Row, device: str, task: str) -> list[Profile]:
    """Return the profiles of a row's own network in every mode; of sampling, of one step."""
    stage = timing_stage(row, row, device)
    alone = replace(stage, baseline=None, baseline_input=None, parts=())
    return [Profile(replace(in_mode(alone, mode, task), num_steps=2)) for mode in MODES[device]]


def profile_job(row: Row, device: str, task: str) -> Job:
    return Job(row.label, tuple(profiles(row, device, task)))


# ---- Predictions


def predicted(
    table: Table, row: Row, device: str, published: float | None = None
) -> list[Declared]:
    """Return what is predicted of a row: every task, in every mode of the device.

    Args:
        published: images per second that the paper prints.
    """
    stage = timing_stage(row, table.baseline, device)
    # The paper's ablations write attention out (section 4.3); its other tables do not.
    unfused = stage.kernels if table.number in UNFUSED_TABLES else {}

    declared = []
    for task in TASKS:
        stages = {}
        for mode in MODES[device]:
            moded = in_mode(stage, mode, task)
            stages[mode] = replace(moded, kernels=unfused | moded.kernels)
        printed = published if task == "forward" else None
        declared.append(Declared(str(table.number), row.label, task, stages, printed))
    return declared
