"""Figures 2, 3, 8 and 9 of the paper from published numbers, ours beside them where a record exists. No torch.

The docstring of a figure is its caption. Open marks are the paper's, filled marks are this project's records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.figures.style import (
    FAMILIES,
    MARKS,
    PUBLISHED,
    SIZES,
    below,
    colour,
    errors,
    family_colour,
    figure,
    note,
)
from analysis.query import (
    ReferenceStore,
    at_one_batch,
    gpu_timings,
    numeric_mode,
    rankable,
    runtime_of,
)
from analysis.tables.progress import progress_curve, progress_score
from analysis.tables.recipes import CONFIGURATIONS
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.declared.systems import SYSTEMS
from experiments.declared.timings import figure_3, unfused
from experiments.engine.records.manifest import clashes
from experiments.engine.records.store import Record
from experiments.engine.reporting.cells import mean_cell
from experiments.engine.specs.stages import cost_stages, train_stage
from experiments.main_results import TABLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALES = ("S", "B", "L", "XL", "H")


def fid_against_throughput(store: ReferenceStore) -> Figure:
    """Figure 2: FID-50K on ImageNet 256 after 400K steps without guidance against inference throughput, the published (Table 1) on an
    A100; the bubble's area is the Gflops. Ours, filled, where a network has both a score and a GPU timing here: in each numeric mode at
    the one batch that most of them were timed at, its Gflops counted here, with the errors of both. Which numeric modes published throughput can be in, the figure of modes shows."""
    made, axes = figure(6.6, 4.4)
    every = [row for row in store.rows("table1.csv") if row["train_steps"] == "400000"]
    rows = [row for row in every if row["throughput_img_s"]]
    for place, family in enumerate(dict.fromkeys(row["model"].partition("-")[0] for row in rows)):
        own = [row for row in rows if row["model"].partition("-")[0] == family]
        x, y = ([float(row[name]) for row in own] for name in ("throughput_img_s", "fid"))
        axes.plot(x, y, "-", lw=1, color=family_colour(family))
        areas = [6 * float(row["gflops"]) for row in own]
        axes.scatter(
            x,
            y,
            s=areas,
            ec=family_colour(family),
            fc=(*family_colour(family), 0.15),
            lw=1.4,
            label=family,
            zorder=3,
        )
        side = -1 if place % 2 else 1  # neighbouring families' names on opposite sides
        for row, left, up, area in zip(own, x, y, areas, strict=True):
            away = (side * (area**0.5 / 2 + 3), 0)
            axes.annotate(
                row["model"].split("-")[1].removesuffix("/2"),
                (left, up),
                xytext=away,
                textcoords="offset points",
                fontsize=7.5,
                ha="left" if side > 0 else "right",
                va="center",
                color=family_colour(family),
            )
    drawn = _own_scores_and_speeds(axes, store)
    without = [row["model"] for row in every if not row["throughput_img_s"]]
    said = [f"no published throughput: {', '.join(without)}"] if without else []
    below(made, [*said, drawn])
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_xlabel("throughput, images/s (published: on an A100; log scale)")
    axes.set_ylabel("FID-50K, ImageNet 256, 400K steps (lower is better)")
    axes.legend(title="area: Gflops", markerscale=0.5, loc="upper left")
    return made


def _own_scores_and_speeds(axes: Axes, store: ReferenceStore) -> str:
    """Draws Figure 2's networks of ours; in words, how many have what it takes, and whose scores are of another protocol than the first's."""
    table = TABLES[1]
    papers = store.published(table.published, table.key)
    wanted = [
        row
        for row in table.rows
        if row.backbone and papers[row.published]["train_steps"] == "400000"
    ]
    found, other = rankable(wanted, IMAGENET256, store)
    scored = {row.label: records for row, records in zip(wanted, found, strict=True) if records}
    timings = {
        row.label: gpu_timings(row.backbone, cost_stages(row)[0].size, store) for row in wanted
    }
    both = set()
    for index, ((mode, device, batch), at) in enumerate(
        sorted(at_one_batch({label: timings[label] for label in scored}).items())
    ):
        label = f"ours: {mode}, {device}, batch {batch}"
        for name, timed in at.items():
            counts = [store.reference.latest(cost) for cost in cost_stages(table.row(name))]
            if all(counts):
                both.add(name)
                rate, fid = (
                    timed.values["images_per_s"],
                    mean_cell("fid", [record.values for record in scored[name]]),
                )
                area = 6 * sum(record.values["macs_torchprofile"] for record in counts) / 1e9
                axes.scatter(
                    rate,
                    fid.value,
                    s=area,
                    color=family_colour(name),
                    marker=MARKS[index % len(MARKS)],
                    alpha=0.5,
                    lw=0,
                    zorder=4,
                    label=label,
                )
                errors(
                    axes,
                    [rate],
                    [fid.value],
                    family_colour(name),
                    xerr=[timed.values.get("images_per_s_spread")],
                    yerr=[fid.error],
                )
                label = None
    words = f"ours: of {len(wanted)} networks {len(scored)} have a score, {sum(map(bool, timings.values()))} a GPU timing, {len(both)} both"
    return words + (f"; left out, scored by another protocol: {', '.join(other)}" if other else "")


def runtime(store: ReferenceStore) -> Figure:
    """Figure 3 as far as it was printed in numbers: runtime of one forward pass an image on ImageNet 512 (Table 2, A100, batch 64) and
    FID with guidance against it. The paper's panel over model sizes has no numbers in print; the third panel holds ours, each network
    timed alone at one batch, on a GPU where any was, else on a CPU, which is no measure of a GPU. Bars: half the interquartile range."""
    made, (left, right, sizes) = figure(11.2, 3.7, columns=3, width_ratios=(1, 1.15, 0.9))
    rows = {row["model"]: row for row in store.rows("table2.csv") if row["throughput_img_s"]}
    if not rows:
        raise ValueError("published data table2.csv: no row has a throughput")
    times = sorted(
        ((1000 / float(row["throughput_img_s"]), name) for name, row in rows.items()), reverse=True
    )
    left.barh(
        [name for _, name in times],
        [time for time, _ in times],
        color=[(*family_colour(name), 0.25) for _, name in times],
        ec=[family_colour(name) for _, name in times],
        lw=1.4,
    )
    for time, name in times:
        left.annotate(
            f"{time:.0f}",
            (time, name),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    left.set_xlabel("ms an image and step, A100 (published)")
    left.set_xlim(right=1.15 * times[0][0])
    guided = {
        row["model"]: row
        for row in store.rows("table2.csv")
        if row["throughput_img_s"] and row["cfg"] != "no"
    }
    for name, row in guided.items():
        time, fid = 1000 / float(row["throughput_img_s"]), float(row["fid"])
        right.plot(time, fid, "o", color=family_colour(name), **PUBLISHED)
        right.annotate(name, (time, fid), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
    below(
        made, [*_own_runtimes(left, store, {name for _, name in times}), *_own_sizes(sizes, store)]
    )
    right.set_xscale("log")
    right.set_xlim(right=2.5 * times[0][0])
    right.margins(y=0.1)
    right.set_xlabel("ms an image and step, A100 (published, log scale)")
    right.set_ylabel("FID-50K, ImageNet 512 (DiT, DiCo: guided)")
    return made


def _own_runtimes(axes: Axes, store: ReferenceStore, names: set[str]) -> list[str]:
    """Draws ours, a mark for every numeric mode and device, each at one batch; in words, what has no timing at it and what ran unfused."""
    systems = [system for system in SYSTEMS if system.resolution == 512 and system.label in names]
    timings = {
        system.label: found
        for system in systems
        if (found := gpu_timings(system.costs[0].backbone, system.costs[0].size, store))
    }
    said: dict[str, list[str]] = {}
    for index, ((mode, device, batch), at) in enumerate(sorted(at_one_batch(timings).items())):
        times, spreads = zip(*map(runtime_of, at.values()), strict=True)
        axes.plot(
            times,
            list(at),
            MARKS[index % len(MARKS)],
            color="black",
            ms=4,
            label=f"{mode}, {device}, batch {batch}",
        )
        errors(axes, times, list(at), "black", xerr=spreads)
        for name, found in timings.items():
            if name not in at and any(
                (numeric_mode(record), record.provenance["device"]) == (mode, device)
                for record in found
            ):
                said.setdefault(f"not timed at batch {batch}", []).append(f"{name} ({mode})")
            for how in unfused(at[name]) if name in at else ():
                said.setdefault(f"{how}, without a fused kernel", []).append(f"{name} ({mode})")
    if timings:
        axes.legend(title="measured here", fontsize=6)
    else:
        note(axes, "no GPU timing\nis committed here")
    return [f"{what}: {', '.join(where)}" for what, where in said.items()]


def _own_sizes(axes: Axes, store: ReferenceStore) -> list[str]:
    """Draws our runtimes over model sizes at 512 pixels in the numeric mode that most networks were timed in; in words, what ran unfused."""
    found = {
        device: [
            (stage, record)
            for stage in figure_3(device)
            if stage.size == 64 and (record := store.reference.latest(stage))
        ]
        for device in ("cuda", "cpu")
    }
    timed = found["cuda"] or found["cpu"]
    axes.set_ylabel("ms an image and step, ImageNet 512 (ours)")
    if not timed:
        note(axes, "no timing over model sizes\nis committed here")
        return []
    modes = [stage.precision for stage, _ in timed]
    mode = max(dict.fromkeys(modes), key=modes.count)
    labels = {label.lower(): label for label in FAMILIES}
    kept = [
        (labels[family], size.upper(), record)
        for stage, record in timed
        if stage.precision == mode
        for family, size in [stage.backbone.name.split("_")[:2]]
    ]
    axes.plot(SCALES, [math.nan] * len(SCALES))  # the sizes in their order, whichever were timed
    for index, label in enumerate(dict.fromkeys(family for family, _, _ in kept)):
        at, times, spreads = zip(
            *((size, *runtime_of(record)) for family, size, record in kept if family == label),
            strict=True,
        )
        axes.plot(at, times, f"-{MARKS[index]}", ms=5, color=family_colour(label), label=label)
        errors(axes, at, times, family_colour(label), yerr=spreads)
    record = kept[0][2]
    axes.set_xlabel(
        f"model size ({mode}, {record.provenance['device' if found['cuda'] else 'cpu']}, batch {record.spec['batch']})"
    )
    axes.set_yscale("log")
    axes.legend()
    plain: dict[str, list[str]] = {}
    for family, size, record in kept:
        for how in unfused(record):
            plain.setdefault(how, []).append(f"{family}-{size}")
    return [
        f"right: {how}, without a fused kernel: {', '.join(names)}" for how, names in plain.items()
    ]


def scores_over_training(store: ReferenceStore) -> Figure:
    """Figure 8 and Table 7: scores of 50K images over training on ImageNet 256 without guidance. Open marks are published, filled ones
    ours, of a training of so many steps under the same protocol, ± their sampling standard error; a note says how many there are."""
    made, axes = figure(8.2, 4.6, 2, 3)
    rows = store.rows("table7.csv")
    panels = {
        "fid": "FID (lower is better)",
        "sfid": "sFID (lower is better)",
        "is": "IS (higher is better)",
        "precision": "precision",
        "recall": "recall",
    }
    ours, other = own_progress(rows, store)
    for panel, (name, label) in zip(axes.flat, panels.items(), strict=False):
        for index, model in enumerate(SIZES):
            own = [row for row in rows if row["model"] == model]
            panel.plot(
                [int(row["train_steps"]) / 1000 for row in own],
                [float(row[name]) for row in own],
                f"-{MARKS[index]}",
                ms=4,
                color=colour(index),
                label=model,
                **PUBLISHED,
            )
            if found := [
                (steps / 1000, record.values[name], record.values.get(f"{name}_se"))
                for (size, steps), record in ours.items()
                if size == model and record.values.get(name) is not None
            ]:
                steps, scores, spreads = zip(*found, strict=True)
                panel.plot(
                    steps,
                    scores,
                    f"--{MARKS[index]}",
                    ms=5,
                    color=colour(index),
                    label=f"{model}, ours",
                )
                errors(panel, steps, scores, colour(index), yerr=spreads)
        panel.set_title(label)
    for panel in axes[1]:
        panel.set_xlabel("training steps, thousands")
    axes[0, 2].set_xlabel("training steps, thousands")
    axes[1, 2].axis("off")
    axes[1, 2].legend(
        *axes[0, 0].get_legend_handles_labels(), loc="center", title="Table 7: open, published"
    )
    below(
        made, [f"ours: {len(ours)} of the {len(rows)} published points are recorded here", *other]
    )
    return made


def own_progress(
    rows: Sequence[dict[str, str]], store: ReferenceStore
) -> tuple[dict[tuple[str, int], Record], list[str]]:
    """Our scores of Table 7's rows by model and steps, all by the first one's protocol, and in words those that are not."""
    found = {(row["model"], int(row["train_steps"])): progress_score(row, store) for row in rows}
    kept = {key: record for key, record in found.items() if record}
    first = list(kept.values())[:1]
    other = {key: fields for key, record in kept.items() if (fields := clashes([record], first))}
    words = [
        f"left out, scored by another protocol: {', '.join(f'{model} after {steps}' for model, steps in other)}"
    ] * bool(other)
    return {key: record for key, record in kept.items() if key not in other}, words


def losses(store: ReferenceStore) -> Figure:
    """Figure 9. Left and middle, theirs: training loss of DiCo on ImageNet 256 from the authors' own logs, means over windows of 1000 steps
    (10 000 beyond step 400 000); the band is two standard errors of a window's mean. Dashed over them, ours by the same recipe, means over
    windows of their own; a note says how many there are. Right, ours: Table 4's rows on the digits protocol, the newest training of seed
    0, another data set at another scale, whose losses do not compare with the others."""
    made, (left, middle, right) = figure(10.6, 3.7, columns=3)
    rows = store.rows("dico_logs.csv")
    for index, model in enumerate(SIZES):
        own = [row for row in rows if row["model"] == model and row["loss_sd"]]
        steps = [(int(row["first_step"]) + int(row["last_step"])) / 2000 for row in own]
        loss = [float(row["loss"]) for row in own]
        error = [2 * float(row["loss_sd"]) / int(row["lines"]) ** 0.5 for row in own]
        for panel in (left, middle):
            panel.plot(steps, loss, lw=1, color=colour(index), label=f"{model} (authors' log)")
            panel.fill_between(
                steps,
                [a - b for a, b in zip(loss, error, strict=True)],
                [a + b for a, b in zip(loss, error, strict=True)],
                color=colour(index),
                alpha=0.2,
                lw=0,
            )
    below(made, [_own_trainings((left, middle), store)])
    left.set_xscale("log")
    left.set_xlim(left=1)
    left.set_ylim(0.138, 0.185)
    left.set_title("theirs, ImageNet 256: whole logs")
    left.set_xlabel("training steps, thousands (log scale)")
    left.set_ylabel("training loss")
    middle.set_xlim(0, 100)
    middle.set_ylim(0.147, 0.185)
    middle.set_title("theirs: first 100 000 steps")
    middle.set_xlabel("training steps, thousands")
    middle.legend()
    _own_losses(right, store)
    return made


def _own_trainings(panels: Sequence[Axes], store: ReferenceStore) -> str:
    """Draws our trainings on ImageNet 256 over the authors', of each size the whole one, else the longest that Table 7 asks for; in words, how many there are."""
    steps, drawn = sorted({int(row["train_steps"]) for row in store.rows("table7.csv")}), 0
    for index, model in enumerate(SIZES):
        whole = store.reference.latest(train_stage(*CONFIGURATIONS[f"{model} 256"], 0))
        record = (
            whole if whole and whole.values.get("curve") else progress_curve(model, steps, store)
        )
        if record:
            drawn += 1
            for panel in panels:
                panel.plot(
                    [step / 1000 for step in _middles(record)],
                    record.values["curve"]["losses"],
                    "--",
                    lw=1,
                    color=colour(index),
                    label=f"{model}, ours",
                )
    return f"ours on ImageNet 256: {drawn} of the {len(SIZES)} trainings are recorded here"


def _middles(record: Record) -> list[float]:
    """Of the windows of a training's curve, in steps; the last may be cut short."""
    curve = record.values["curve"]
    ends = [
        min((number + 1) * curve["every"], record.values["steps"])
        for number in range(len(curve["losses"]))
    ]
    return [(start + end) / 2 for start, end in zip([0, *ends], ends, strict=False)]


def _own_losses(axes: Axes, store: ReferenceStore) -> None:
    axes.set_title(f"ours: Table 4's rows on {DIGITS.name}")
    windows = set()
    for index, row in enumerate(TABLE_4.rows):
        record = store.reference.latest(train_stage(row, DIGITS, 0))
        if record and (curve := record.values.get("curve")):
            axes.plot(
                _middles(record),
                curve["losses"],
                lw=1,
                color=colour(index % 10),
                ls="-" if index < 10 else "--",
                label=row.label,
            )
            windows.add(curve["every"])
    axes.set_xlabel(
        f"training steps (means over {' or '.join(map(str, sorted(windows)))})"
        if windows
        else "training steps"
    )
    if windows:
        axes.legend(fontsize=6, ncols=2)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        note(axes, "no training with a curve\nis committed here")
