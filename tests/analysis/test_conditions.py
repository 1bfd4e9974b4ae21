"""What stands beside the paper's own conditions: differences, batches, kernels that were not fused, and protocols that clash."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import PathCollection

from analysis.claims.judge import judge
from analysis.figures.modes import numeric_modes
from analysis.figures.runtime import runtime
from analysis.figures.throughput import fid_against_throughput
from analysis.figures.training import scores_over_training
from analysis.query import ReferenceStore, at_one_batch, gpu_timings
from analysis.tables.conditions import progress_row, stopped
from analysis.tables.paper import SHEETS
from experiments.ablation import TABLE_4
from experiments.declared import timings as speed
from experiments.declared.protocols import IMAGENET256
from experiments.engine.records.manifest import manifest
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Timing, canonical
from experiments.engine.specs.stages import Protocol, evaluate_stage, timing_stage
from experiments.main_results import TABLE_1

PROVENANCE = {
    "device": "a GPU",
    "cpu": "a",
    "cpu_count": 2,
    "torch": "b",
    "python": "3",
    "dirty": False,
    "commit": "c" * 40,
    "precision_flags": {"cudnn_tf32": False, "matmul_tf32": False},
}
SPEED = {
    "images_per_s": 50.0,
    "images_per_s_spread": 1.0,
    "relative": 1.0,
    "relative_spread": 0.0,
    "peak_memory_bytes": None,
    "joules_per_image": None,
}


def sources(store: Store) -> ReferenceStore:
    (store.root / "records").rename(store.root / "reference")
    return ReferenceStore(store.root)


def timed(
    store: Store, name: str, side: int, batch: int, rate: float = 50.0, **kernels: list[str]
) -> None:
    store.append(
        Timing(Backbone(name), side, 4, 1000, batch, "cuda"),
        "done",
        SPEED | {"images_per_s": rate},
        PROVENANCE | {"kernels": kernels},
    )


def scored(
    store: Store, row: Row, protocol: Protocol, fid: float, quantiser: str = "rounds"
) -> None:
    stage = evaluate_stage(row, protocol, 0)
    values = {
        "fid": fid,
        "fid_se": 0.1,
        "fid_corrected": fid,
        "sfid": 9.0,
        "is": 20.0,
        "precision": 0.5,
        "recall": 0.5,
    }
    store.append(
        stage,
        "done",
        values | {"manifest": manifest(canonical(stage, full=True), {}, {"quantiser": quantiser})},
        PROVENANCE,
    )


def shown(sheet: Sheet, label: str) -> dict[tuple[str, str], str]:
    (row,) = [row for row in sheet.rows if row[0].label == label]
    return dict(zip(sheet.columns, (cell.text() for cell in row), strict=True))


def test_what_ran_unfused_on_a_gpu_is_a_footnote(tmp_path: Path):
    store = Store(tmp_path)
    timed(store, "dis_h_2", 64, 16, selective_scan=["loop"])
    timed(store, "dico_xl", 64, 64, selective_scan=["triton"])
    timed(store, "uvit_h_4", 64, 64, attention=["reference"])
    notes = SHEETS["table2"](sources(store)).notes
    assert (
        "the scan as a loop over tokens, without a fused kernel: DiS-H/2 (fp32, TF32 off)." in notes
    )
    assert "attention written out, without a fused kernel: U-ViT-H/4 (fp32, TF32 off)." in notes
    assert "timed at batch 16, not 64: DiS-H/2 (fp32, TF32 off)." in notes and not any(
        "DiCo-XL" in note and "fused kernel" in note for note in notes
    )


def test_what_a_stage_asked_for_stands_in_its_mode_and_in_no_footnote(tmp_path: Path):
    store = Store(tmp_path)
    store.append(
        timing_stage(TABLE_4.row("CM->Self-Attn"), TABLE_4.baseline, "cuda"),
        "done",
        SPEED,
        PROVENANCE | {"kernels": {"attention": ["reference"]}},
    )
    sheet = SHEETS["table4"](sources(store))
    assert ("ours, a GPU", "img/s, fp32, TF32 off, attention unfused") in sheet.columns and not any(
        "without a fused kernel" in note for note in sheet.notes
    )


def test_attention_that_its_authors_wrote_out_is_a_footnote(tmp_path: Path):
    store = Store(tmp_path)
    timed(store, "ldm_4", 64, 64)
    store.append(
        replace(Timing(Backbone("ldm_4"), 64, 3, 1000, 64, "cuda")), "done", SPEED, PROVENANCE
    )
    assert (
        "attention written out as in the authors' code, without a fused kernel: LDM-4."
        in SHEETS["table1"](sources(store)).notes
    )


def test_the_sheet_of_throughput_names_what_ran_unfused(tmp_path: Path):
    store, row = Store(tmp_path), TABLE_1.row("DiG-S/2")
    for mode, kernel in (("fp32", "chunked"), ("bf16", "fla")):
        store.append(
            speed.in_mode(timing_stage(row, TABLE_1.baseline, "cuda"), mode),
            "done",
            SPEED,
            PROVENANCE | {"kernels": {"gated_linear": [kernel]}},
        )
    notes = SHEETS["speed_forward"](sources(store)).notes
    assert (
        "gated linear attention in chunks of plain PyTorch, without a fused kernel: DiG-S/2 (fp32)."
        in notes
    )


def test_rows_of_two_protocols_are_named_with_what_clashes(tmp_path: Path):
    store = Store(tmp_path)
    for label, quantiser in (
        ("DiT-S/2", "rounds"),
        ("DiG-S/2", "truncates"),
        ("DiCo-S", "rounds"),
        ("DiCo-B", "truncates"),
    ):
        scored(store, TABLE_1.row(label), IMAGENET256, 50.0, quantiser)
    found = sources(store)
    assert [note for note in SHEETS["table1"](found).notes if note.startswith("ours: ")] == [
        "ours: DiG-S/2, DiCo-B: not ranked against DiT-S/2, scored by another protocol (quantiser)."
    ]
    assert (
        "ours: DiCo-B after 400000 steps: not ranked against DiCo-S after 400000 steps, scored by another protocol (quantiser)."
        in SHEETS["table7"](found).notes
    )
    assert not any(
        note.startswith("ours: ") and "not ranked" in note for note in SHEETS["table4"](found).notes
    )


def test_every_metric_with_the_papers_beside_it_has_its_difference(tmp_path: Path):
    store = Store(tmp_path)
    scored(store, TABLE_4.row("DiCo-S"), IMAGENET256, 54.967)
    store.append(
        timing_stage(TABLE_4.row("DiCo-S"), TABLE_4.baseline, "cuda"),
        "done",
        SPEED | {"images_per_s": 1695.73 * 1.5},
        PROVENANCE,
    )
    row = shown(SHEETS["table4"](sources(store)), "DiCo-S")
    ours = {
        name: float(row["ours, same protocol", f"{name} diff. %"])
        for name in ("FID", "IS", "P", "R")
    }
    assert ours == {
        name: round(100 * (value / paper - 1), 2)
        for name, value, paper in (
            ("FID", 54.967, 49.97),
            ("IS", 20.0, 31.38),
            ("P", 0.5, 0.48),
            ("R", 0.5, 0.58),
        )
    }
    assert row["ours, a GPU", "diff. %, fp32, TF32 off, attention unfused"] == "50.00"


def test_table_5_gives_the_difference_of_its_ratio():
    row = shown(SHEETS["table5"](ReferenceStore()), "DiCo-S")
    paper, ours, off = (
        float(row["Gflops over DiT's", name]) for name in ("paper", "ours", "diff. %")
    )
    assert off == pytest.approx(100 * (ours / paper - 1), abs=0.1)


@pytest.mark.parametrize(
    "name, column, claim",
    [
        ("table1.csv", "fid", "fid-dig-ratio"),
        ("dico_logs.csv", "lines", "scaling-order"),
        ("table7.csv", "sfid", "scaling-order"),
    ],
)
def test_a_published_zero_that_is_divided_by_is_named(
    name: str, column: str, claim: str, tmp_path: Path
):
    published = shutil.copytree(REPOSITORY / "results" / "published", tmp_path / "published")
    head, first, *rest = (published / name).read_text().splitlines()
    cells = (
        first.split(",")
        if name != "table1.csv"
        else rest.pop(
            rest.index(next(line for line in rest if line.startswith("XL,DiCo-XL")))
        ).split(",")
    )
    cells[head.split(",").index(column)] = "0"
    (published / name).write_text(
        "\n".join([head, *([first] if name == "table1.csv" else []), ",".join(cells), *rest]) + "\n"
    )
    store = ReferenceStore(None, published)
    found = judge(next(row for row in store.rows("claims.csv") if row["id"] == claim), store)
    assert (
        found.verdict == "open"
        and f"{column} is 0, which is not above 0; leave a gap empty" in found.basis
    )


def rates(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_networks_are_compared_at_one_batch(tmp_path: Path):
    """The one that most have, up to the paper's 64; the largest of several."""
    store = Store(tmp_path)
    for name, batches in (
        ("dico_xl", (16, 64, 128)),
        ("dit_xl_2", (16, 128)),
        ("dis_h_2", (16, 64)),
    ):
        for batch in batches:
            timed(store, name, 32, batch, float(batch))
    found = sources(store)
    timings = {
        name: gpu_timings(Backbone(name), 32, found) for name in ("dico_xl", "dit_xl_2", "dis_h_2")
    }
    assert {key: sorted(at) for key, at in at_one_batch(timings).items()} == {
        ("fp32, TF32 off", "a GPU", 16): ["dico_xl", "dis_h_2", "dit_xl_2"]
    }
    timings.pop("dit_xl_2")
    assert [key[2] for key in at_one_batch(timings)] == [64]


def test_the_speed_up_by_numeric_mode_is_of_one_batch(tmp_path: Path):
    """300 over 100 at batch 16; at 64 and 128 one network alone was timed, or more than the paper's batch."""
    store = Store(tmp_path)
    for name, batch, rate in (
        ("dico_xl", 16, 300.0),
        ("dit_xl_2", 16, 100.0),
        ("dico_xl", 64, 900.0),
        ("dico_xl", 128, 1000.0),
        ("dit_xl_2", 128, 100.0),
    ):
        timed(store, name, 32, batch, rate)
    _, right = numeric_modes(sources(store)).axes
    assert rates(right) == [3.0] and [
        "batch 16" in label.get_text() for label in right.get_yticklabels()
    ] == [True]


def test_our_runtimes_in_figure_3_are_of_one_batch_and_say_what_ran_unfused(tmp_path: Path):
    store = Store(tmp_path)
    timed(store, "dico_xl", 64, 16, 40.0)
    timed(store, "dico_xl", 64, 64, 80.0)
    timed(store, "dit_xl_2", 64, 16, 10.0)
    timed(store, "dis_h_2", 64, 16, 5.0, selective_scan=["loop"])
    timed(store, "dim_h", 64, 32, 5.0)
    made = runtime(sources(store))
    left = made.axes[0]
    assert sorted(float(x) for line in left.lines for x in line.get_xdata()) == [25.0, 100.0, 200.0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "fp32, TF32 off, a GPU, batch 16"
    ]
    assert "the scan as a loop over tokens, without a fused kernel: DiS-H/2" in said(
        made
    ) and "not timed at batch 16: DiM-H" in said(made)


def test_figure_3_draws_our_model_sizes_on_a_gpu_else_on_a_cpu(tmp_path: Path):
    store = Store(tmp_path)
    stages = {
        (device, stage.backbone.name, stage.precision): stage
        for device in ("cpu", "cuda")
        for stage in speed.figure_3(device)
        if stage.size == 64
    }
    store.append(
        stages["cpu", "dit_s_2", "fp32"],
        "done",
        SPEED | {"images_per_s": 2.0},
        PROVENANCE | {"device": "cpu", "cpu": "a CPU"},
    )
    axes = runtime(sources(store)).axes[2]
    assert axes.get_xlabel() == "model size (fp32, a CPU, batch 1)" and axes.lines[
        1
    ].get_ydata().tolist() == [500.0]
    (tmp_path / "reference").rename(tmp_path / "records")
    for name, mode, rate, kernels in (
        ("dico_s", "bf16", 100.0, {}),
        ("dico_xl", "bf16", 10.0, {}),
        ("dis_b_2", "bf16", 20.0, {"selective_scan": ["loop"]}),
        ("dico_s", "fp32", 50.0, {}),
    ):
        store.append(
            stages["cuda", name, mode],
            "done",
            SPEED | {"images_per_s": rate},
            PROVENANCE | {"kernels": kernels},
        )
    made = runtime(sources(store))
    drawn = {
        line.get_label(): (list(line.get_xdata(orig=True)), line.get_ydata().tolist())
        for line in made.axes[2].lines[1:]
    }
    assert (
        drawn == {"DiCo": (["S", "XL"], [10.0, 100.0]), "DiS": (["B"], [50.0])}
        and made.axes[2].get_xlabel() == "model size (bf16, a GPU, batch 16)"
    )
    assert "right: the scan as a loop over tokens, without a fused kernel: DiS-B" in said(made)


def said(made: Any) -> str:
    return made.get_supxlabel().replace("\n", " ")


def test_figure_2_draws_ours_where_a_network_has_score_and_timing(tmp_path: Path):
    store = Store(tmp_path)
    for label, quantiser in (
        ("DiT-S/2", "rounds"),
        ("DiCo-S", "rounds"),
        ("DiCo-B", "truncates"),
        ("DiG-S/2", "rounds"),
    ):
        scored(store, TABLE_1.row(label), IMAGENET256, 50.0, quantiser)
    for name in ("dit_s_2", "dico_s", "dico_b", "dico_l"):
        timed(store, name, 32, 64, 1000.0)
    shutil.copytree(REPOSITORY / "results" / "reference" / "cost", store.root / "records" / "cost")
    published = len(fid_against_throughput(ReferenceStore(tmp_path / "none")).axes[0].collections)
    made = fid_against_throughput(sources(store))
    (axes,) = made.axes
    ours = [
        mark for mark in axes.collections[published:] if isinstance(mark, PathCollection)
    ]  # the others are error bars
    assert [mark.get_offsets().tolist() for mark in ours] == [[[1000.0, 50.0]]] * 2 and ours[
        0
    ].get_sizes()[0] == pytest.approx(6 * 6.06, rel=0.01)
    assert (
        "ours: of 15 networks 3 have a score, 4 a GPU timing, 2 both; left out, scored by another protocol: DiCo-B"
        in said(made)
    )
    assert (
        "no published throughput: DiC-S, DiC-B, DiC-XL" in said(made)
        and "ours: fp32, TF32 off, a GPU, batch 64" in axes.get_legend_handles_labels()[1]
    )


def test_figure_8_draws_our_scores_over_training(tmp_path: Path):
    """Of one protocol only; without records the figure says how many there are."""
    store = Store(tmp_path)
    for steps, fid, quantiser in (
        (50_000, 100.0, "rounds"),
        (400_000, 50.0, "rounds"),
        (100_000, 80.0, "truncates"),
    ):
        scored(store, progress_row("DiCo-S"), stopped(steps), fid, quantiser)
    bare, drawn = (
        scores_over_training(ReferenceStore(tmp_path / "none")),
        scores_over_training(sources(store)),
    )
    assert [len(axes.lines) for axes in bare.axes] == [4] * 5 + [0] and [
        len(axes.lines) for axes in drawn.axes
    ] == [5] * 5 + [0]
    ours = next(line for line in drawn.axes[0].lines if line.get_label() == "DiCo-S, ours")
    assert ours.get_xdata().tolist() == [50.0, 400.0] and ours.get_ydata().tolist() == [100.0, 50.0]
    assert said(bare) == "ours: 0 of the 32 published points are recorded here"
    assert (
        said(drawn)
        == "ours: 2 of the 32 published points are recorded here left out, scored by another protocol: DiCo-S after 100000"
    )


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert (Cell(-0.001).text(), Cell(-0.01).text(), Cell(-0.004, 0.001).text()) == (
        "0.00",
        "-0.01",
        "0.00 ±0.00",
    )
