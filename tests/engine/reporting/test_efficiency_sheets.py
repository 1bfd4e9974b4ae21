"""Sheets of throughput, sweeps and runtimes, and verdicts on speed, from made-up records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.declared import speed_claims, timings
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.claims import claims_sheet, judge_speed, ratios
from experiments.engine.reporting.efficiency.details import runtime_sheet, sweep_sheet
from experiments.engine.reporting.efficiency.speed import Acceleration, speed_sheet
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Ceilings, Cost
from experiments.main_results import TABLE_1
from experiments.related import AUTOREGRESSIVE, SMALL_SPEED
from tests.support.timings import record_values, timing_values

DICO = TABLE_1.row("DiCo-S")
CLAIM = dict(
    subject="DiCo-XL@256",
    baseline="DiT-XL/2@256",
    value="2.7",
    metric="throughput",
    relation="ratio",
)


def sheet_of(
    store: Store,
    device: str,
    task: str,
    rows: list[Row] | None = None,
    acceleration: Acceleration | None = None,
) -> Sheet:
    """Return the speed sheet of some rows of Table 1, by default of DiCo-S."""
    how = acceleration or Acceleration()
    return speed_sheet(timings.timed_table(TABLE_1, rows or [DICO], device, task, how), store)


def texts(sheet: Sheet) -> list[str]:
    return [note.text for note in sheet.notes]


# ---- Throughput


def test_a_network_is_timed_in_every_mode_of_a_gpu():
    stages = timings.stages(TABLE_1, [DICO], "cuda", "forward", named=False)
    assert [stage.precision for stage in stages] == ["fp32", "tf32", "bf16", "as_published"]
    # In the authors' mode layers stay what they are called, and tensors lie as PyTorch has them.
    kernels = {"linear": "reference", "pointwise": "reference"}
    assert [stage.kernels for stage in stages] == [{}] * 3 + [kernels]
    assert [stage.layout for stage in stages] == ["channels_last"] * 3 + ["contiguous"]


def test_a_speed_sheet_sets_every_mode_beside_the_devices_ceiling_and_the_paper(tmp_path: Path):
    """A row shows its rate, its shares of what the device can do, and the paper's numbers."""
    store = Store(tmp_path)
    stage = timings.stages(TABLE_1, [DICO], "cuda", "forward", named=False)[0]
    record_values(store, Cost(Backbone("dico_s"), 32, 4, 1000), macs_core=4e9)
    record_values(store, Ceilings("cuda", "fp32"), macs_per_s=20e12, bytes_per_s=3e12)
    moved = stage.batch * 12 * 10**8
    record_values(store, stage, **timing_values(1000.0, 1.4), bytes_moved=moved)

    # Every cell as it is printed.
    sheet = sheet_of(store, "cuda", "forward")
    (row,) = sheet.rows
    printed = {column.key: cell.text(column.digits) for column, cell in sheet.cells(row)}
    expected = {
        "row": "DiCo-S",
        "core": "4.00",
        "fp32_rate": "1000.0 ±1.0",
        "fp32_relative": "1.40 ±0.00",
        "fp32_matmul": "20",
        "fp32_copy": "40",
        "fp32_memory": "2.0",
        "fp32_energy": "0.50",
        "paper_rate": "1695.7",
        "paper_relative": "1.37",
        "paper_peak": "74",
    }
    assert {key: printed[key] for key in expected} == expected
    assert {text for key, text in printed.items() if key not in expected} == {"-"}


@pytest.mark.parametrize("task, rate, share", [("training", 100.0, 30), ("sampling", 10.0, 8)])
def test_training_counts_three_passes_and_sampling_two_a_step(
    task: str, rate: float, share: float, tmp_path: Path
):
    store = Store(tmp_path)
    record_values(store, Cost(Backbone("dico_s"), 32, 4, 1000), macs_core=1e9)
    record_values(store, Ceilings("cpu", "fp32"), macs_per_s=1e12, bytes_per_s=1e10)
    (stage,) = timings.stages(TABLE_1, [DICO], "cpu", task, named=False)
    record_values(store, stage, **timing_values(rate, 1.0))
    (cell,) = sheet_of(store, "cpu", task).values("fp32_matmul")
    assert cell.value == pytest.approx(share)


def test_sampling_all_scales_of_an_image_counts_two_passes(tmp_path: Path):
    """A row that predicts tokens runs its network once over all scales, and guidance doubles it."""
    store = Store(tmp_path)
    (var,) = (row for row in SMALL_SPEED.rows if row.label == "VAR")
    record_values(store, *var.costs, macs_core=1e6)
    record_values(store, Ceilings("cpu", "fp32"), macs_per_s=1e12, bytes_per_s=1e10)
    (stage,) = timings.stages(SMALL_SPEED, [var], "cpu", "sampling", named=False)
    record_values(store, stage, **timing_values(5e4, 1.0))
    sheet = speed_sheet(timings.timed_table(SMALL_SPEED, [var], "cpu", "sampling"), store)
    assert [cell.value for cell in sheet.values("fp32_matmul")] == [pytest.approx(10)]
    assert [cell.text(2) for cell in sheet.values("core")] == ["0.0010"]


def test_a_speed_sheet_names_attention_that_is_never_fused_and_unstable_timings(tmp_path: Path):
    store = Store(tmp_path)
    rows = [TABLE_1.row(label) for label in ("ADM-U", "LDM-4", "DiT-S/2", "DiCo-S")]
    stages = timings.stages(TABLE_1, rows, "cpu", "forward", named=True)
    stable: list[dict[str, bool]] = [{}, {}, {"stable": True}, {"stable": False}]
    for stage, flags in zip(stages, stable, strict=True):
        record_values(store, stage, **timing_values(10.0, 1.0), **flags)

    notes = texts(sheet_of(store, "cpu", "forward", rows))
    assert any(note.startswith("ADM-U, LDM-4: attention is written out") for note in notes)
    (unstable,) = (note for note in notes if "stable" in note)
    assert "DiCo-S (fp32)" in unstable and "DiT" not in unstable


def test_what_the_paper_timed_stands_beside_a_forward_pass_alone(tmp_path: Path):
    with_paper = {
        task
        for task in timings.TASKS
        if any(
            "paper" in column.group for column in sheet_of(Store(tmp_path), "cuda", task).columns
        )
    }
    assert with_paper == {"forward"}


def test_a_table_that_no_paper_has_is_printed_without_published_speed(tmp_path: Path):
    timed = timings.timed_table(AUTOREGRESSIVE, AUTOREGRESSIVE.rows, "cpu", "forward")
    sheet = speed_sheet(timed, Store(tmp_path))
    assert [row["row"].label for row in sheet.rows] == [row.label for row in AUTOREGRESSIVE.rows]
    assert all(cell.is_gap for key in ("paper_rate", "paper_peak") for cell in sheet.values(key))


def test_what_is_timed_in_another_way_than_in_its_paper_is_said(tmp_path: Path):
    """Notes name the rows whose timing differs from the authors', in the tasks that it concerns."""
    store = Store(tmp_path)
    labels = ("ADM-U", "U-ViT-H/2", "DiMSUM-L/2", "DiCo-S")
    rows = [TABLE_1.row(label) for label in labels]
    for stage in timings.stages(TABLE_1, rows, "cuda", "forward", named=True):
        as_published = stage.precision == "as_published"
        one_condition = as_published and stage.backbone.name != "uvit_h_2"
        record_values(store, stage, **timing_values(10.0, 1.0), one_condition=one_condition)

    # The notes of every task, as one text.
    notes = {task: " ".join(texts(sheet_of(store, "cuda", task, rows))) for task in timings.TASKS}
    assert "U-ViT-H/2, as_published: makes tokens of t and y" in notes["forward"]
    assert notes["forward"].count("makes tokens") == 1
    velocity = [task for task in notes if "DiMSUM-L/2: timed as predictors" in notes[task]]
    assert velocity == ["training", "sampling"]
    unguided = [task for task in notes if "ADM-U: without a null label" in notes[task]]
    assert unguided == ["sampling"]


# ---- Compiled networks and CUDA graphs


@pytest.mark.parametrize(
    "acceleration",
    [
        Acceleration(compile=True),
        Acceleration(graphs=True),
        Acceleration(compile=True, graphs=True),
    ],
    ids=str,
)
def test_timings_of_compiled_networks_and_graphs_have_ids_and_sheets_of_their_own(
    acceleration: Acceleration, tmp_path: Path
):
    store = Store(tmp_path)
    titles: list[list[str]] = []
    values: list[list[set[float | None]]] = []
    for how, rate in ((Acceleration(), 10.0), (acceleration, 40.0)):
        stages = timings.stages(TABLE_1, [DICO], "cuda", "sampling", named=False, acceleration=how)
        swept = timings.swept_row(DICO, TABLE_1.baseline, "cuda", "training", how)
        figure = timings.figure_3("cuda", how)
        for stage in (stages[0], swept.stages["fp32"][0], figure[0]):
            assert (stage.compile, stage.graphs) == (how.compile, how.graphs)
            record_values(store, stage, **timing_values(rate, 1.0))
        sheets = [
            sheet_of(store, "cuda", "sampling", acceleration=how),
            sweep_sheet(swept, store.here),
            runtime_sheet(figure, "cuda", store.here, how),
        ]
        titles.append([sheet.title for sheet in sheets])
        values.append(
            [{cell.value for row in sheet.rows for cell in row.values()} for sheet in sheets]
        )

    for title in titles[1]:
        assert ("compiled" in title) == acceleration.compile
        assert ("CUDA graphs" in title) == acceleration.graphs
    assert not set(titles[0]) & set(titles[1])
    # Rates of 10 and 40 images per second are 100 and 25 ms.
    for eager, own in zip(*values, strict=True):
        assert {10.0, 100.0} & eager and not {40.0, 25.0} & eager
        assert {40.0, 25.0} & own and not {10.0, 100.0} & own


def test_nothing_compiled_is_timed_in_the_authors_mode():
    compiled = Acceleration(compile=True)
    eager = timings.figure_3("cuda")
    others = timings.figure_3("cuda", compiled)
    assert [replace(stage, compile=False) for stage in others] == [
        stage for stage in eager if stage.precision != "as_published"
    ]


# ---- Verdicts


@pytest.mark.parametrize(
    "measured, verdict",
    [
        ((2.8, 2.8, 2.7, 3.0), "holds"),
        ((1.4, 1.5, 1.4, 2.66), "holds only as published"),
        ((1.4, 2.7, 1.4, 2.7), "holds only in some modes, tf32 and as_published"),
        ((1.4, 1.5, 1.4, 1.9), "does not hold"),
        ((1.4, 1.5, 1.4), "does not hold, not measured in as_published"),
        ((1.4,), "does not hold, not measured in tf32, bf16, as_published"),
    ],
)
def test_verdicts_name_the_modes_in_which_a_claim_holds_and_those_without_a_record(
    measured: tuple[float, ...], verdict: str, tmp_path: Path
):
    store, stages = Store(tmp_path), speed_claims.claim_stages(CLAIM, "cuda")
    for stage, ratio in zip(stages, measured, strict=False):
        assert stage.baseline and stage.size == 32
        assert (stage.backbone.name, stage.baseline.name) == ("dico_xl", "dit_xl_2")
        record_values(store, stage, **timing_values(100.0, ratio))
    if len(measured) < len(stages):
        store.append(stages[-1], "failed", {}, {}, "RuntimeError: no room")
    assert str(judge_speed(ratios(CLAIM, stages, store.here), stages)) == verdict


def test_an_error_can_carry_a_claim(tmp_path: Path):
    store, stages = Store(tmp_path), speed_claims.claim_stages(CLAIM, "cuda")
    record_values(store, stages[0], **timing_values(100.0, 2.5, 0.1))
    assert [ratio.holds for ratio in ratios(CLAIM, stages, store.here)] == [True]


def test_a_claim_about_a_network_that_nobody_described_is_not_timed():
    assert speed_claims.claim_stages(CLAIM | {"baseline": "DiS-XL@512"}, "cuda") == []


def test_the_committed_counts_judge_the_claims_about_gflops():
    store = Store()
    sheet = claims_sheet(
        "cuda",
        speed_claims.COUNTED,
        lambda claim: speed_claims.claim_stages(claim, "cuda"),
        store,
        store.reference,
    )
    verdicts = {row["claim"].label: row["verdict"].label for row in sheet.rows}
    assert len(verdicts) == 14
    assert verdicts["gflops-xl-256"] == verdicts["gflops-family"] == "holds"
    assert verdicts["gflops-s-1024"] == "holds"
    assert verdicts["speed-dis-xl-512"].startswith("not measurable")
