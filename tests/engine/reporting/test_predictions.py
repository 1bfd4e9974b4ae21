"""The roofline by closed forms, and tables of predictions from files written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import efficiency
from experiments.declared import speed_claims, timings
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.inference.predicted import read_latencies
from experiments.engine.reporting.efficiency.inference.sheets import (
    inference_sheet,
    predicted_latency_sheet,
)
from experiments.engine.reporting.efficiency.predicted_sheets import (
    cpu_sheet,
    predicted_claims_sheet,
    predicted_sheet,
)
from experiments.engine.reporting.efficiency.predictions import (
    CPU,
    Prediction,
    read_cards,
    read_predictions,
    write_predictions,
)
from experiments.engine.reporting.efficiency.roofline import (
    LAUNCH,
    Device,
    Sample,
    Shares,
    Unit,
    Work,
    fit_shares,
    predict_seconds,
)
from experiments.engine.specs.spec import Backbone, Latency
from experiments.engine.timing.meta.predict import write_latency
from experiments.main_results import TABLE_1
from tests.support.timings import timing_values

CARD = Device("a card", 1e6, 1e6, macs_tf32=6e6, macs_bf16=10e6)
DICO = TABLE_1.row("DiCo-S")
CLAIM = dict(
    id="speed", subject="DiCo-XL@256", baseline="DiT-XL/2@256", value="2.7", metric="throughput"
)


@pytest.mark.parametrize(
    ("unit", "mode", "seconds"),
    [
        (Unit.LINEAR, "fp32", 60),
        (Unit.LINEAR, "as_published", 60),
        (Unit.LINEAR, "tf32", 10),
        (Unit.LINEAR, "bf16", 6),
        (Unit.CONVOLUTION, "fp32", 60),
        (Unit.CONVOLUTION, "as_published", 10),
        # Fused attention in float32 takes three products in TF32.
        (Unit.ATTENTION, "fp32", 30),
        (Unit.ATTENTION, "bf16", 6),
        (Unit.PLAIN, "bf16", 60),
    ],
)
def test_the_mode_and_the_unit_decide_which_peak_counts(unit: Unit, mode: str, seconds: float):
    work = [Work(unit, macs=60_000_000, bytes=8, bytes_bf16=4)]
    assert predict_seconds(work, CARD, mode) == pytest.approx(seconds)


def test_an_operator_takes_the_longer_of_its_work_and_its_bytes():
    """bf16 has casts of its own, and half the bytes; shares make everything slower."""
    work = [
        Work(Unit.LINEAR, 2_000_000, 5_000_000, 2_500_000, calls=3),
        Work(Unit.PLAIN, 0, 0, 1_000_000),
    ]
    assert predict_seconds(work, CARD, "fp32") == pytest.approx(3 * 5)
    assert predict_seconds(work, CARD, "bf16") == pytest.approx(3 * 2.5 + 1)
    shares = Shares(memory=0.5)
    assert predict_seconds(work, CARD, "fp32", shares) == pytest.approx(3 * 10)


def test_small_operators_take_the_time_of_their_launches():
    assert predict_seconds([Work(Unit.PLAIN, 1, 1, 1, calls=7)], CARD, "fp32") == 7 * LAUNCH


def test_a_fit_finds_the_shares_that_made_the_times():
    shares = Shares(plain=0.9, tensor=0.5, memory=0.3)
    tasks = [
        [Work(Unit.LINEAR, 9_000_000, 8, 4)],
        [Work(Unit.CONVOLUTION, 9_000_000, 8, 4)],
        [Work(Unit.PLAIN, 0, 9_000_000, 4)],
    ]
    samples = [Sample(work, predict_seconds(work, CARD, "as_published", shares)) for work in tasks]
    assert fit_shares(samples, CARD, "as_published") == shares


def test_every_card_has_the_peaks_that_the_model_reads():
    cards = {card.name: card for card in read_cards(Store())}
    assert list(cards) == ["A100", "H100", "H200", "RTX 4090"]
    # A multiply-accumulate is two operations.
    assert cards["A100"] == Device("A100", 9.75e12, 2.039e12, 78e12, 156e12)


def predicted(root: Path, *lines: tuple[str, str, str, str, float, float]) -> None:
    """Write forward predictions: table, row, mode, card, bound and attained images per second."""
    write_predictions(
        root,
        [Prediction(t, row, "forward", mode, 64, card, b, a) for t, row, mode, card, b, a in lines],
        Shares(1.0, 0.7, 0.3),
        "20261129T000000Z",
        "0123456789abcdef",
    )


def test_a_sheet_sets_predictions_beside_the_paper_and_the_measured_card(tmp_path: Path):
    store = Store(tmp_path)
    predicted(
        tmp_path,
        ("1", "DiCo-S", "as_published", "A100", 4000.0, 1600.0),
        ("1", "DiCo-S", "as_published", "H200", 9000.0, 3000.0),
    )
    declared = timings.predicted(TABLE_1, DICO, "cuda", published=1695.73)
    stage = declared[0].stages["as_published"]
    store.append(stage, "done", timing_values(2500.0, 1.0), {"device": "NVIDIA H200"})
    sheet = predicted_sheet("forward", declared, read_predictions(tmp_path), tmp_path, store.here)

    a100, h200 = sheet.rows
    assert a100["paper_attained"].text() == "0.94"
    assert "as_published_measured" not in a100
    assert "paper_rate" not in h200
    assert h200["as_published_measured"].value == 2500.0
    notes = " ".join(note.text for note in sheet.notes)
    assert "DiCo, predicted over published: attained 0.94, bound 2.36." in notes
    assert "made 20261129T000000Z by commit 0123456789ab" in notes


def test_the_ablations_are_predicted_with_attention_written_out():
    table = efficiency.PREDICTED[2]
    (forward, *_) = timings.predicted(table, table.rows[0], "cuda")
    assert {mode: stage.kernels["attention"] for mode, stage in forward.stages.items()} == (
        dict.fromkeys(timings.MODES["cuda"], "reference")
    )
    # Elsewhere the suite chooses, and a record of the timing command is of the same stage.
    (forward, *_) = timings.predicted(TABLE_1, DICO, "cuda")
    assert list(forward.stages.values()) == timings.stages(TABLE_1, [DICO], "cuda", "forward", True)


def test_a_claim_is_called_predicted_and_needs_both_networks(tmp_path: Path):
    modes = timings.MODES["cuda"]
    one = [("claims", "DiCo-XL@256", mode, "A100", 400.0, 200.0) for mode in modes]
    predicted(tmp_path, *one)
    alone = predicted_claims_sheet([CLAIM], read_predictions(tmp_path), tmp_path)
    assert not alone.rows

    both = [*one, *(("claims", "DiT-XL/2@256", mode, "A100", 100.0, 80.0) for mode in modes)]
    predicted(tmp_path, *both)
    (row,) = predicted_claims_sheet([CLAIM], read_predictions(tmp_path), tmp_path).rows
    assert row["tf32_bound"].value == 4.0
    assert row["tf32_attained"].value == 2.5
    assert row["verdict"].text() == "predicted"
    assert [each.label for each in speed_claims.predicted([CLAIM])] == [
        "DiCo-XL@256",
        "DiT-XL/2@256",
    ]


def test_a_cpu_has_its_own_ceilings_and_nothing_fitted(tmp_path: Path):
    store = Store(tmp_path)
    predicted(tmp_path, ("1", "DiCo-S", "fp32", CPU, 40.0, 40.0))
    declared = timings.predicted(TABLE_1, DICO, "cpu")
    store.append(declared[0].stages["fp32"], "done", timing_values(25.0, 1.0), {"device": "cpu"})
    (row,) = cpu_sheet(declared, read_predictions(tmp_path), store.here).rows
    assert row["ratio"].value == 1.6


def test_latency_is_predicted_by_the_shares_of_throughput_and_once_for_equal_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A row of two tables is traced once; its bounds follow the cards' peaks."""
    store = Store(tmp_path)
    (row,) = timings.latency_rows(TABLE_1, [DICO], "cuda")
    tiny = dict(dim=8, depths=(1, 1, 1, 1, 1))
    stages = {
        mode: Latency(replace(stage.timing, backbone=Backbone("dico_s", tiny), size=8))
        for mode, stage in row.stages.items()
    }
    rows = [replace(row, table=table, stages=stages) for table in ("1", "4")]
    with pytest.raises(ValueError, match=r"run experiments/efficiency.py --predict"):
        write_latency(rows, store, print)

    predicted(tmp_path, ("1", "DiCo-S", "fp32", "A100", 2.0, 1.0))
    told: list[str] = []
    write_latency(rows, store, told.append)
    assert told == ["latency: DiCo-S at 8x8"]
    latencies = read_latencies(tmp_path)
    assert len(latencies) == 2 * len(timings.MODES["cuda"]) * 4
    assert all(p.bound <= p.attained for p in latencies.values())

    # Sheets show them beside a record, which ends all predictions.
    values = dict(latency_s=0.5, peak_memory_bytes_one=10**9, peak_memory_bytes_batch=2 * 10**9)
    store.append(stages["fp32"], "done", values, {"device": "NVIDIA H200"})
    sheet = predicted_latency_sheet(rows, tmp_path, store.here)
    measured = [cells["fp32_measured"].value for cells in sheet.rows if "fp32_measured" in cells]
    assert measured == [500.0, 500.0]
    memory = inference_sheet(rows, tmp_path, store.here)
    assert [cells["fp32_measured_batch"].value for cells in memory.rows] == [2.0, 2.0]
    assert memory.rows[0]["bf16_one"].value > memory.rows[0]["bf16_weights"].value
    assert efficiency.main(["--predict", "--task", "latency", "--results", str(tmp_path)]) == 2
    assert "predictions must come before" in capsys.readouterr().err


def test_nothing_is_predicted_once_a_gpu_was_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stage = timings.predicted(TABLE_1, DICO, "cuda")[0].stages["fp32"]
    Store(tmp_path).append(stage, "done", timing_values(1.0, 1.0), {"device": "NVIDIA H200"})
    assert efficiency.main(["--predict", "--results", str(tmp_path)]) == 2
    assert "predictions must come before" in capsys.readouterr().err
    assert not read_predictions(tmp_path)
