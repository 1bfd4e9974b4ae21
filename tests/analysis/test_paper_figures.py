"""Figures of the paper with ours in them, from synthetic records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import PathCollection

from analysis.figures import probes as figures_probes
from analysis.figures.catalogue import FIGURES
from analysis.figures.modes import numeric_modes
from analysis.figures.runtime import runtime
from analysis.figures.throughput import fid_against_throughput
from analysis.figures.tradeoffs import front
from analysis.figures.training import losses, scores_over_training
from analysis.query import ReferenceStore
from analysis.tables.progress import progress_row, stopped
from experiments.ablation import TABLE_4
from experiments.declared import timings as speed
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Timing
from experiments.engine.specs.stages import Protocol, evaluate_stage, train_stage
from experiments.main_results import TABLE_1
from tests.support.references import (
    GPU_PROVENANCE,
    commit_records,
    imagenet_values,
    reopen_records,
    timing_values,
)


def timed(
    store: Store, name: str, side: int, batch: int, rate: float = 50.0, **kernels: list[str]
) -> None:
    """Append the timing of a network on a GPU, with the kernels that ran."""
    stage = Timing(Backbone(name), side, 4, 1000, batch, "cuda")
    store.append(stage, "done", timing_values(rate), GPU_PROVENANCE | {"kernels": kernels})


def scored(
    store: Store, row: Row, protocol: Protocol, fid: float, quantiser: str = "rounds"
) -> None:
    """Append the scores of a row."""
    stage = evaluate_stage(row, protocol, 0)
    values = imagenet_values(stage, fid, quantiser=quantiser)
    store.append(stage, "done", values, GPU_PROVENANCE)


def remarks(drawing: Any) -> str:
    """Return the sentences under a figure."""
    return drawing.get_supxlabel().replace("\n", " ")


def rates(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_the_speed_up_by_numeric_mode_is_of_one_batch(tmp_path: Path):
    """300 over 100 at batch 16: at 64 one network alone was timed, and 128 is above the paper's."""
    store = Store(tmp_path)
    timed(store, "dico_xl", 32, 16, 300.0)
    timed(store, "dit_xl_2", 32, 16, 100.0)
    timed(store, "dico_xl", 32, 64, 900.0)
    timed(store, "dico_xl", 32, 128, 1000.0)
    timed(store, "dit_xl_2", 32, 128, 100.0)
    _, right = numeric_modes(commit_records(tmp_path)).axes
    assert rates(right) == [3.0]
    assert ["batch 16" in label.get_text() for label in right.get_yticklabels()] == [True]


def test_our_runtimes_in_figure_3_are_of_one_batch_and_say_what_ran_unfused(tmp_path: Path):
    """Runtimes at batch 16 are drawn, and the figure names what is left out or ran unfused."""
    store = Store(tmp_path)
    timed(store, "dico_xl", 64, 16, 40.0)
    timed(store, "dico_xl", 64, 64, 80.0)
    timed(store, "dit_xl_2", 64, 16, 10.0)
    timed(store, "dis_h_2", 64, 16, 5.0, selective_scan=["loop"])
    timed(store, "dim_h", 64, 32, 5.0)

    # A thousand milliseconds over 40, 10 and 5 images per second.
    drawing = runtime(commit_records(tmp_path))
    left = drawing.axes[0]
    runtimes = [float(x) for line in left.lines for x in line.get_xdata()]
    assert sorted(runtimes) == [25.0, 100.0, 200.0]
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["fp32, TF32 off, a GPU, batch 16"]

    # The sentences under the figure.
    unfused = "the scan as a loop over tokens, without a fused kernel: DiS-H/2"
    assert unfused in remarks(drawing)
    assert "not timed at batch 16: DiM-H" in remarks(drawing)


def test_figure_3_draws_our_model_sizes_on_a_gpu_else_on_a_cpu(tmp_path: Path):
    """Timings on a CPU are drawn until there is one on a GPU."""
    stages = {}
    for device in ("cpu", "cuda"):
        for stage in speed.figure_3(device):
            if stage.size == 64:
                stages[device, stage.backbone.name, stage.precision] = stage

    # One timing on a CPU.
    store = Store(tmp_path)
    on_cpu = stages["cpu", "dit_s_2", "fp32"]
    store.append(on_cpu, "done", timing_values(2.0), GPU_PROVENANCE | {"device": "cpu"})
    axes = runtime(commit_records(tmp_path)).axes[2]
    assert axes.get_xlabel() == "model size (fp32, a CPU, batch 1)"
    assert axes.lines[1].get_ydata().tolist() == [500.0]

    # Four on a GPU, of which bf16 is drawn.
    store = reopen_records(tmp_path)
    loop = {"selective_scan": ["loop"]}
    for name, mode, rate, kernels in (
        ("dico_s", "bf16", 100.0, {}),
        ("dico_xl", "bf16", 10.0, {}),
        ("dis_b_2", "bf16", 20.0, loop),
        ("dico_s", "fp32", 50.0, {}),
    ):
        provenance = GPU_PROVENANCE | {"kernels": kernels}
        store.append(stages["cuda", name, mode], "done", timing_values(rate), provenance)
    drawing = runtime(commit_records(tmp_path))
    axes = drawing.axes[2]
    drawn = {}
    for line in axes.lines[1:]:
        drawn[line.get_label()] = (list(line.get_xdata(orig=True)), line.get_ydata().tolist())
    assert drawn == {"DiCo": (["S", "XL"], [10.0, 100.0]), "DiS": (["B"], [50.0])}
    assert axes.get_xlabel() == "model size (bf16, a GPU, batch 16)"
    unfused = "right: the scan as a loop over tokens, without a fused kernel: DiS-B"
    assert unfused in remarks(drawing)


def test_figure_2_draws_ours_where_a_network_has_score_and_timing(tmp_path: Path):
    """A mark needs a score by the common protocol, a timing and a count, which gives its size."""
    store = Store(tmp_path)
    scored(store, TABLE_1.row("DiT-S/2"), IMAGENET256, 50.0)
    scored(store, TABLE_1.row("DiCo-S"), IMAGENET256, 50.0)
    scored(store, TABLE_1.row("DiCo-B"), IMAGENET256, 50.0, "truncates")
    scored(store, TABLE_1.row("DiG-S/2"), IMAGENET256, 50.0)
    for name in ("dit_s_2", "dico_s", "dico_b", "dico_l"):
        timed(store, name, 32, 64, 1000.0)
    shutil.copytree(REPOSITORY / "results" / "reference" / "cost", tmp_path / "records" / "cost")

    # Our marks follow the published ones, among error bars.
    published = len(fid_against_throughput(ReferenceStore(tmp_path / "none")).axes[0].collections)
    drawing = fid_against_throughput(commit_records(tmp_path))
    (axes,) = drawing.axes
    ours = [mark for mark in axes.collections[published:] if isinstance(mark, PathCollection)]
    assert [mark.get_offsets().tolist() for mark in ours] == [[[1000.0, 50.0]]] * 2
    assert ours[0].get_sizes()[0] == pytest.approx(6 * 6.06, rel=0.01)
    assert "ours: fp32, TF32 off, a GPU, batch 64" in axes.get_legend_handles_labels()[1]

    # The sentences under the figure count what is drawn and what is not.
    counts = "ours: of 15 networks 3 have a score, 4 a GPU timing, 2 both"
    left_out = "left out, scored by another protocol: DiCo-B"
    assert f"{counts}; {left_out}" in remarks(drawing)
    assert "no published throughput: DiC-S, DiC-B, DiC-XL" in remarks(drawing)


def test_figure_8_draws_our_scores_over_training(tmp_path: Path):
    """Only scores of one protocol are drawn, and the figure says how many there are."""
    marks = "open marks: published, Table 7; filled marks: ours"
    bare = scores_over_training(ReferenceStore(tmp_path / "none"))
    assert [len(axes.lines) for axes in bare.axes] == [4, 4, 4, 4, 4, 0]
    assert remarks(bare) == f"{marks} ours: 0 of the 32 published points are recorded here"

    # Two lengths of training by one protocol, and one by another.
    store = Store(tmp_path)
    scored(store, progress_row("DiCo-S"), stopped(50_000), 100.0, "rounds")
    scored(store, progress_row("DiCo-S"), stopped(400_000), 50.0, "rounds")
    scored(store, progress_row("DiCo-S"), stopped(100_000), 80.0, "truncates")
    drawn = scores_over_training(commit_records(store.root))
    assert [len(axes.lines) for axes in drawn.axes] == [5, 5, 5, 5, 5, 0]
    ours = next(line for line in drawn.axes[0].lines if line.get_label() == "DiCo-S, ours")
    assert ours.get_xdata().tolist() == [50.0, 400.0]
    assert ours.get_ydata().tolist() == [100.0, 50.0]
    assert remarks(drawn) == (
        f"{marks} ours: 2 of the 32 published points are recorded here "
        "left out, scored by another protocol: DiCo-S after 100000"
    )


def test_figure_8_labels_every_published_line_at_its_end(tmp_path: Path):
    panels = scores_over_training(ReferenceStore(tmp_path)).axes[:5]
    for axes in panels:
        ends = {line.get_label(): line.get_xydata()[-1].tolist() for line in axes.lines}
        assert {text.get_text(): list(text.xy) for text in axes.texts} == ends


def test_figure_9_draws_our_curves_apart_from_the_authors(tmp_path: Path):
    whole, early, ours = losses(ReferenceStore(tmp_path / "none")).axes
    assert len(whole.lines) == 4
    assert len(early.lines) == 4
    assert not ours.lines
    assert "no training with a curve" in ours.texts[0].get_text()

    # A training with a curve, and one without.
    store = Store(tmp_path / "some")
    values = {"steps": 125, "curve": {"every": 50, "losses": [0.5, 0.25, 0.2]}}
    store.append(train_stage(TABLE_4.rows[3], DIGITS, 0), "done", values, GPU_PROVENANCE)
    store.append(train_stage(TABLE_4.rows[4], DIGITS, 0), "done", {"steps": 650}, GPU_PROVENANCE)
    whole, early, ours = losses(commit_records(store.root)).axes
    assert len(whole.lines) == 4
    assert len(early.lines) == 4
    assert "ImageNet" in whole.get_title()
    assert ours.get_title() == "ours: Table 4's rows on digits"

    # The last window is cut short, so its middle lies nearer to the one before.
    (line,) = ours.lines
    assert line.get_label() == TABLE_4.rows[3].label
    assert line.get_xdata().tolist() == [25, 75, 112.5]
    assert line.get_ydata().tolist() == [0.5, 0.25, 0.2]
    assert ours.get_xlabel() == "training steps (means over 50)"


def test_a_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 3.0), (2.5, 3.0), (0.5, 1.0)]
    assert set(front(points)) == {(3.0, 3.0), (0.5, 1.0)}
    assert set(front(points, lower=True)) == {(0.5, 1.0)}


OF_RECORDS = [name for name, draw in FIGURES.items() if draw.__module__ != figures_probes.__name__]


@pytest.mark.parametrize("name", OF_RECORDS)
def test_every_figure_has_a_caption_and_is_drawn_without_records(name: str, tmp_path: Path):
    draw = FIGURES[name]
    assert len(draw.__doc__ or "") > 80
    assert draw(ReferenceStore(tmp_path)).axes
