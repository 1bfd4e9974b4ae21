"""What is timed, as declarations and sheets. No torch.

A row is timed in every numeric mode of a device, its batch and input as the paper's, with the kernels that the suite
chooses; in the authors' mode linear layers and 1x1 convolutions stay what they are called, since the mode treats them differently,
and tensors are laid out as PyTorch's default has them. `fast` are `compile` and `graphs` of a Timing,
which that mode does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experiments.engine.jobs.pool import Job, Sweep
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.caveats import timing_caveats
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone, Ceilings, Profile, Timing
from experiments.engine.specs.stages import cost_stages, timed_rows, timing_stage

MODES = {"cpu": ("fp32",), "cuda": ("fp32", "tf32", "bf16", "as_published")}
TASKS = ("forward", "training", "sampling")
STEPS = {
    "cpu": 4,
    "cuda": 250,
}  # of a sampling loop; on a CPU a part of it, whose steps cost the same
WRITTEN_OUT = ("adm", "ldm", "udit")  # families whose attention is none of the suite's kernels
UNFUSED = {  # what runs in plain PyTorch where a GPU has a fused kernel, as records name it
    ("selective_scan", "loop"): "the scan as a loop over tokens",
    ("selective_scan", "reference"): "the scan as a loop over tokens",
    ("gated_linear", "chunked"): "gated linear attention in chunks of plain PyTorch",
    ("gated_linear", "reference"): "gated linear attention as a loop over tokens",
    ("attention", "reference"): "attention written out",
}
A100_FP32 = 19.5e12  # operations a second without tensor cores (NVIDIA A100 data sheet)


def modes_of(device: str, **fast: bool) -> tuple[str, ...]:
    """In which a device is timed: nothing compiled or recorded is as published."""
    return tuple(
        mode for mode in MODES[device] if not (any(fast.values()) and mode == "as_published")
    )


def how_fast(compile: bool = False, graphs: bool = False) -> str:
    """In words that follow others; nothing of what is neither."""
    return ", networks compiled" * compile + ", by CUDA graphs" * graphs


def in_mode(stage: Timing, mode: str, what: str = "forward", **fast: bool) -> Timing:
    """The stage timed in a numeric mode; with what a kernel of the authors' needs installed is no part of it, but the record says which ran."""
    stage = replace(
        stage,
        precision=mode,
        kernels={},
        what=what,
        num_steps=STEPS[stage.device] if what == "sampling" else stage.num_steps,
        **fast,
    )
    return (
        replace(
            stage, kernels={"linear": "reference", "pointwise": "reference"}, layout="contiguous"
        )
        if mode == "as_published"
        else stage
    )


def stages(
    table: Table,
    rows: Sequence[Row],
    device: str,
    what: str,
    named: bool,
    modes: Sequence[str] | None = None,
    **fast: bool,
) -> list[Timing]:
    """Each network of the rows once in every mode, or in these of the device's, beside the table's baseline."""
    chosen = {str(row.backbone): row for row in timed_rows(table, rows, device, named)}.values()
    if unknown := sorted(set(modes or ()) - set(known := modes_of(device, **fast))):
        raise ValueError(
            f"{', '.join(unknown)} is no numeric mode of {device}{how_fast(**fast)}; known: {', '.join(known)}"
        )
    return [
        in_mode(timing_stage(row, table.baseline, device), mode, what, **fast)
        for row in chosen
        for mode in modes or known
    ]


def jobs(
    table: Table,
    rows: Sequence[Row],
    device: str,
    what: str,
    named: bool,
    modes: Sequence[str] | None = None,
    **fast: bool,
) -> tuple[Job, ...]:
    """A job a network: its modes are timed on one machine."""
    timed = stages(table, rows, device, what, named, modes, **fast)
    labels = {str(row.backbone): row.label for row in reversed(rows)}
    return tuple(
        Job(labels[network], tuple(stage for stage in timed if str(stage.backbone) == network))
        for network in dict.fromkeys(str(stage.backbone) for stage in timed)
    )


def ceilings_job(device: str) -> Job:
    return Job("ceilings", tuple(ceilings(device)))


def ceilings(device: str) -> list[Ceilings]:
    return [Ceilings(device, mode) for mode in MODES[device] if mode != "as_published"]


def sweeps(row: Row, baseline: Row, device: str, what: str, **fast: bool) -> list[Sweep]:
    """The row alone at growing batches, a job a mode, in the order of `modes_of`."""
    alone = replace(timing_stage(row, baseline, device), baseline=None, baseline_input=None)
    batches = [2**power for power in range(11 if device == "cuda" else 5)]
    at = {mode: in_mode(alone, mode, what, **fast) for mode in modes_of(device, **fast)}
    return [
        Sweep(
            f"{row.label}, {mode}",
            tuple(replace(stage, batch=batch) for batch in batches),
            row=row.label,
        )
        for mode, stage in at.items()
    ]


def figure_3(device: str, **fast: bool) -> list[Timing]:
    """DiT, DiS, DiG and DiCo at latents of side 32, 64 and 128 (images of 256 to 1024 pixels); on a CPU size S at the first two."""
    networks = [
        f"{family}_{size}{patch}"
        for size in ("s", "b", "l", "xl")
        for family, patch in (("dit", "_2"), ("dis", "_2"), ("dig", "_2"), ("dico", ""))
    ]
    known = [
        name.replace("dis_xl", "dis_h")
        for name in networks
        if device == "cuda" or name.split("_")[1] == "s"
    ]
    sides = (32, 64, 128) if device == "cuda" else (32, 64)
    timed = [
        Timing(
            Backbone(name), side, 4, 1000, 64 * 32**2 // side**2 if device == "cuda" else 1, device
        )
        for side in sides
        for name in known
    ]
    return [in_mode(stage, mode, **fast) for stage in timed for mode in modes_of(device, **fast)]


def figure_3_jobs(device: str, **fast: bool) -> tuple[Job, ...]:
    timed = figure_3(device, **fast)
    return tuple(
        Job(name, tuple(stage for stage in timed if stage.backbone.name == name))
        for name in dict.fromkeys(stage.backbone.name for stage in timed)
    )


def profile_job(row: Row, device: str, what: str) -> Job:
    return Job(row.label, tuple(profiles(row, device, what)))


def profiles(row: Row, device: str, what: str) -> list[Profile]:
    """A row's own network in every mode; of sampling one step."""
    stage = replace(timing_stage(row, row, device), baseline=None, baseline_input=None, parts=())
    return [Profile(replace(in_mode(stage, mode, what), num_steps=2)) for mode in MODES[device]]


def profile_sheets(
    row: Row, device: str, what: str, store: Store, source: RecordFolder | None = None
) -> list[Sheet]:
    """Time per class of operator against what the device's ceilings allow, a sheet a mode."""
    source = source or store.here
    sheets = []
    for stage in profiles(row, device, what):
        mode = stage.timing.precision
        sheet = Sheet(
            f"{row.label}: where {what} spends its time on this {device}, {mode}, batch {stage.timing.batch}",
            [
                ("", "operators"),
                ("", "calls"),
                ("", "ms"),
                ("", "% of them"),
                ("", "GMAC"),
                ("", "GB"),
                ("", "roofline, ms"),
                ("", "% of it"),
            ],
        )
        record, top = (
            source.latest(stage),
            source.latest(Ceilings(device, "fp32" if mode == "as_published" else mode)),
        )
        sheets.append(sheet)
        if record is None or top is None:
            sheet.notes.append("not profiled yet")
            continue
        classes = record.values["classes"]
        total = sum(one["seconds"] for one in classes.values())
        for name, one in sorted(classes.items(), key=lambda item: -item[1]["seconds"]):
            least = max(
                one["macs"] / top.values["macs_per_s"], one["bytes"] / top.values["bytes_per_s"]
            )
            numbers = (
                (1e3 * one["seconds"], 1),
                (100 * one["seconds"] / total, 0),
                (1e-9 * one["macs"], 2),
                (1e-9 * one["bytes"], 2),
                (1e3 * least, 1),
                (100 * least / one["seconds"], 0),
            )
            sheet.rows.append(
                [Cell(label=name), Cell(label=str(one["calls"]))]
                + [Cell(value, None, digits, records=(record, top)) for value, digits in numbers]
            )
        sheet.notes.append(
            f"a call takes {1e3 * record.values['seconds']:.1f} ms; its operators, each timed alone, {1e3 * total:.1f} ms. Its trace: {record.kind}'s folder runs/{record.id}, {record.values['trace']}."
        )
        sheet.notes.append(
            "roofline: the least time that the operators' multiply-accumulates at the rate of a large product, and their bytes at that of a copy, can take; caches let small tensors exceed it."
        )
    return sheets


def speed_sheet(
    table: Table,
    rows: Sequence[Row],
    device: str,
    what: str,
    store: Store,
    source: RecordFolder | None = None,
    **fast: bool,
) -> Sheet:
    """Images a second in every mode, relative to the baseline, as a share of the device's own matrix product; of a forward pass the paper's too."""
    source = source or store.here
    published = store.published(table.published, table.key)
    columns, modes = [("", "row"), ("Gflops", "core")], modes_of(device, **fast)
    for mode in modes:
        columns += [(mode, name) for name in ("img/s", "rel.", "% of matmul", "% of copy")] + [
            (mode, "GiB"),
            (mode, "J/img"),
        ] * (device == "cuda")
    beside = what == "forward"  # all that the paper timed
    columns += [("paper, A100", name) for name in ("img/s", "rel.", "% of fp32 peak")] * beside
    sheet = Sheet(
        f"Table {table.number}: {what} on this {device.upper().replace('CUDA', 'GPU')}{how_fast(**fast)}, by numeric mode ({table.source})",
        columns,
    )
    base = _number(published[table.baseline.published], "throughput_img_s")
    for row in rows:
        if row.backbone is None:
            continue
        macs = [source.latest(cost) for cost in cost_stages(row)]
        core = sum(record.values["macs_core"] for record in macs) if all(macs) else None
        cells = [
            Cell(label=row.label),
            Cell(core / 1e9 if core else None, records=tuple(filter(None, macs))),
        ]
        for mode in modes:
            cells += _timed(
                in_mode(timing_stage(row, table.baseline, device), mode, what, **fast),
                core,
                store,
                source,
            )
        paper = published[row.published] if row.published else {}
        speed, gflops = _number(paper, "throughput_img_s"), _number(paper, "gflops")
        cells += [
            Cell(speed, None, 1),
            Cell(speed / base if speed and base else None),
            Cell(100 * 2e9 * speed * gflops / A100_FP32 if speed and gflops else None, None, 0),
        ] * beside
        sheet.rows.append(cells)
    sheet.notes += _notes(table, rows, device, what, store, source, **fast)
    return sheet


def _timed(stage: Timing, core: float | None, store: Store, source: RecordFolder) -> list[Cell]:
    record = source.latest(stage)
    wide = 6 if stage.device == "cuda" else 4
    if record is None:
        return [Cell(label="failed") if source.latest(stage, status="failed") else Cell()] + [
            Cell()
        ] * (wide - 1)
    values, own = record.values, (record,)
    top = source.latest(
        Ceilings(stage.device, "fp32" if stage.precision == "as_published" else stage.precision)
    )
    passes = {"forward": 1, "training": 3, "sampling": 2 * stage.num_steps}[stage.what]
    share = (
        100 * passes * core * values["images_per_s"] / top.values["macs_per_s"]
        if core and top
        else None
    )
    moved = values.get("bytes_moved")  # older records have none
    copied = (
        100 * moved / stage.batch * values["images_per_s"] / top.values["bytes_per_s"]
        if moved and top
        else None
    )
    both = own + ((top,) if top else ())
    cells = [
        Cell(values["images_per_s"], values["images_per_s_spread"], 1, records=own),
        Cell(values["relative"], values["relative_spread"], records=own),
    ]
    cells += [Cell(share, None, 0, records=both), Cell(copied, None, 0, records=both)]
    more = [
        Cell(
            values["peak_memory_bytes"] and values["peak_memory_bytes"] / 2**30,
            None,
            1,
            records=own,
        ),
        Cell(values["joules_per_image"], records=own),
    ]
    return cells + more * (stage.device == "cuda")


def _notes(
    table: Table,
    rows: Sequence[Row],
    device: str,
    what: str,
    store: Store,
    source: RecordFolder,
    **fast: bool,
) -> list[str]:
    tasks = {
        "forward": "one forward pass of full batches of x, t and y",
        "training": "a step of the trainer by the common recipe, from loading the batch to the EMA; three forward passes of multiply-accumulates",
        "sampling": f"guided sampling by {STEPS[device]} steps, twice the batch at each, an image being all of them",
    }
    notes = [
        f"{what}: {tasks[what]}. ± half the interquartile range; rel.: to {table.baseline.label}, timed in turn."
    ]
    notes.append(
        "fp32: no TF32; tf32: everywhere; bf16: autocast; as_published: PyTorch's defaults (convolutions in TF32, linear layers in fp32), t and y of one image, no final synchronisation."
    )
    for stage in ceilings(device):
        if top := source.latest(stage):
            notes.append(
                f"measured ceilings, {stage.precision}: {2e-12 * top.values['macs_per_s']:.2f} TFLOP/s in large matrix products, {1e-9 * top.values['bytes_per_s']:.0f} GB/s copying."
            )
    notes.append(
        "% of copy: what its operators, one by one, read and write, at the rate of a copy, which caches let small tensors exceed; the suite's kernels in Triton are not seen."
    )
    if how := how_fast(**fast):
        notes.append(
            f"{what}{how}: the baseline too. as_published, the authors' own, is neither and stands in the table without them; of compiled and recorded operators nothing is seen."
        )
    if device == "cpu":
        notes.append("a CPU has one numeric mode here; its ratios are no GPU's.")
        if any(row.heavy for row in timed_rows(table, rows, device, named=True)):
            notes.append(
                "large networks take minutes on a CPU: there they are timed only where --rows names them, and are gaps otherwise."
            )
    if labels := [
        row.label
        for row in rows
        if row.backbone and row.backbone.name.partition("_")[0] in WRITTEN_OUT
    ]:
        notes.append(
            f"{', '.join(labels)}: attention is written out as in their authors' code, never fused."
        )
    notes += _kinds(rows, what)
    plain: dict[str, list[str]] = {}
    timed: list[tuple[str, Record]] = []
    for row in rows:
        for mode in modes_of(device, **fast) if row.backbone else ():
            stage = in_mode(timing_stage(row, table.baseline, device), mode, what, **fast)
            record = source.latest(stage)
            for how in unfused(record) if record else ():
                plain.setdefault(how, []).append(f"{row.label} ({mode})")
            if record is None and (failed := source.latest(stage, status="failed")):
                notes.append(f"{row.label}, {mode}: {failed.error}")
            timed += [(f"{row.label} ({mode})", record)] * (record is not None)
            if (
                mode == "as_published"
                and record
                and what == "forward"
                and not record.values.get("one_condition", True)
            ):
                notes.append(
                    f"{row.label}, {mode}: makes tokens of t and y, and was given those of all images."
                )
    return (
        notes
        + timing_caveats(timed)
        + [f"{how}, without a fused kernel: {', '.join(labels)}." for how, labels in plain.items()]
    )


def unfused(record: Record) -> list[str]:
    """In words: what ran without the fused kernel that GPUs have for it, where the stage did not ask for that."""
    ran, asked = record.provenance.get("kernels", {}), record.spec["kernels"]
    return list(
        dict.fromkeys(
            how
            for (op, choice), how in UNFUSED.items()
            if choice in ran.get(op, ()) and asked.get(op) != choice
        )
    )


def _kinds(rows: Sequence[Row], what: str) -> list[str]:
    """Rows whose step or loop is timed as another than their own paper's."""
    if what == "forward":
        return []
    methods = [(row.label, row.method) for row in rows if row.backbone and row.method]
    velocity = ", ".join(label for label, method in methods if method.diffusion.name == "flow")
    unguided = (
        ", ".join(label for label, method in methods if not method.recipe.label_dropout)
        if what == "sampling"
        else ""
    )
    notes = [
        f"{velocity}: timed as predictors of noise, not of a velocity, which takes the same passes of the network."
    ] * bool(velocity)
    return notes + [
        f"{unguided}: without a null label; the second half of a batch has real ones, and the classifier that guides in its place is not timed."
    ] * bool(unguided)


def sweep_sheet(
    row: Row,
    baseline: Row,
    device: str,
    what: str,
    store: Store,
    source: RecordFolder | None = None,
    **fast: bool,
) -> Sheet:
    """Throughput over the batch size, and the best."""
    source = source or store.here
    modes = modes_of(device, **fast)
    sheet = Sheet(
        f"{row.label}: {what} over the batch size on this {device}{how_fast(**fast)}",
        [("", "batch")] + [(mode, "img/s") for mode in modes],
    )
    tried = zip(modes, sweeps(row, baseline, device, what, **fast), strict=True)
    found = {
        mode: [(stage.batch, record) for stage in sweep.stages if (record := source.latest(stage))]
        for mode, sweep in tried
    }
    for batch in sorted({batch for records in found.values() for batch, _ in records}):
        at = [dict(found[mode]).get(batch) for mode in modes]
        sheet.rows.append(
            [Cell(label=str(batch))]
            + [
                Cell(r.values["images_per_s"], r.values["images_per_s_spread"], 1, records=(r,))
                if r
                else Cell()
                for r in at
            ]
        )
    for mode, records in found.items():
        if records:
            batch, best = max(records, key=lambda pair: pair[1].values["images_per_s"])
            sheet.notes.append(
                f"{mode}: best at batch {batch}, {best.values['images_per_s']:.1f} images a second; batches beyond the last were not tried or do not fit."
            )
    return sheet


def runtime_sheet(
    device: str, store: Store, source: RecordFolder | None = None, **fast: bool
) -> Sheet:
    """Milliseconds an image of Figure 3's networks."""
    source = source or store.here
    sheet = Sheet(
        f"Figure 3: runtime of a forward pass on this {device}{how_fast(**fast)}, ms an image",
        [("", "network"), ("", "latent")] + [(mode, "ms") for mode in modes_of(device, **fast)],
    )
    rows: dict[tuple[str, int], list[Cell]] = {}
    for stage in figure_3(device, **fast):
        cells = rows.setdefault(
            (stage.backbone.name, stage.size),
            [Cell(label=stage.backbone.name), Cell(label=str(stage.size))],
        )
        record = source.latest(stage)
        rate = record.values["images_per_s"] if record else None
        cells.append(
            Cell(
                1000 / rate,
                1000 / rate * record.values["images_per_s_spread"] / rate,
                records=(record,),
            )
            if rate
            else Cell()
        )
    sheet.rows += rows.values()
    sheet.notes.append(
        "The paper's figure prints no numbers, and names a DiS-XL that its authors never described: DiS-H/2 stands here."
    )
    return sheet


def _number(row: dict[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None
