"""Ours under the paper's conditions: differences, batches, unfused kernels, clashing protocols."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.tables.paper import SHEETS
from experiments.ablation import TABLE_4
from experiments.declared import timings
from experiments.declared.protocols import IMAGENET256
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Timing
from experiments.engine.specs.stages import Protocol, evaluate_stage, timing_stage
from experiments.main_results import TABLE_1
from tests.support.references import GPU_PROVENANCE, commit_records, imagenet_values, timing_values
from tests.support.sheets import labelled, note_about, note_texts


def time_network(
    store: Store, name: str, size: int, batch: int, channels: int = 4, **kernels: list[str]
) -> None:
    stage = Timing(Backbone(name), size, channels, 1000, batch, "cuda")
    store.append(stage, "done", timing_values(), GPU_PROVENANCE | {"kernels": kernels})


def score(
    store: Store, row: Row, protocol: Protocol, fid: float, quantiser: str = "rounds"
) -> None:
    """Append the scores of a row."""
    stage = evaluate_stage(row, protocol, 0)
    values = imagenet_values(stage, fid, quantiser=quantiser)
    store.append(stage, "done", values, GPU_PROVENANCE)


def test_what_ran_unfused_on_a_gpu_is_a_footnote(tmp_path: Path):
    store = Store(tmp_path)
    time_network(store, "dis_h_2", 64, 16, selective_scan=["loop"])
    time_network(store, "dico_xl", 64, 64, selective_scan=["triton"])
    time_network(store, "uvit_h_4", 64, 64, attention=["reference"])
    sheet = SHEETS["table2"](commit_records(tmp_path))
    loop = note_about(sheet, "the scan as a loop over tokens")
    assert loop.endswith(": DiS-H/2 (fp32, TF32 off).")
    written = note_about(sheet, "kernel, attention written out")
    assert written.endswith(": U-ViT-H/4 (fp32, TF32 off).")
    assert "Timed at batch 16, not 64: DiS-H/2 (fp32, TF32 off)." in note_texts(sheet)
    assert "DiCo-XL" not in loop + written


def test_what_a_stage_asked_for_stands_in_its_mode_and_in_no_footnote(tmp_path: Path):
    stage = timing_stage(TABLE_4.row("CM->Self-Attn"), TABLE_4.baseline, "cuda")
    provenance = GPU_PROVENANCE | {"kernels": {"attention": ["reference"]}}
    Store(tmp_path).append(stage, "done", timing_values(), provenance)
    sheet = SHEETS["table4"](commit_records(tmp_path))
    titles = [column.full_title for column in sheet.columns]
    assert "ours, a GPU: img/s, fp32, TF32 off, attention unfused" in titles
    assert not any("fused kernel" in text for text in note_texts(sheet))


def test_attention_that_its_authors_wrote_out_is_a_footnote(tmp_path: Path):
    store = Store(tmp_path)
    time_network(store, "ldm_4", 64, 64, channels=3)
    note = note_about(SHEETS["table1"](commit_records(tmp_path)), "as in the authors' code")
    assert note.endswith("attention written out as in the authors' code: LDM-4.")


def test_the_sheet_of_throughput_names_what_ran_unfused(tmp_path: Path):
    store = Store(tmp_path)
    row = TABLE_1.row("DiG-S/2")
    for mode, kernel in (("fp32", "chunked"), ("bf16", "fla")):
        stage = timings.in_mode(timing_stage(row, TABLE_1.baseline, "cuda"), mode)
        provenance = GPU_PROVENANCE | {"kernels": {"gated_linear": [kernel]}}
        store.append(stage, "done", timing_values(), provenance)
    sheet = SHEETS["speed_forward"](commit_records(tmp_path))
    note = note_about(sheet, "gated linear attention in chunks of plain PyTorch")
    assert "DiG-S/2 (fp32)" in note
    assert "bf16" not in note


def test_rows_of_two_protocols_are_named_with_what_clashes(tmp_path: Path):
    """Rows that were scored with another quantiser than the first row are not ranked."""
    store = Store(tmp_path)
    quantisers = {"DiT-S/2": "rounds", "DiG-S/2": "cuts", "DiCo-S": "rounds", "DiCo-B": "cuts"}
    for label, quantiser in quantisers.items():
        score(store, TABLE_1.row(label), IMAGENET256, 50.0, quantiser)
    committed = commit_records(tmp_path)
    clash = "since scored by another protocol (quantiser)"

    # Each table compares the rows that it holds.
    assert note_about(SHEETS["table1"](committed), "not ranked against") == (
        f"ours: not ranked against DiT-S/2, {clash}: DiG-S/2, DiCo-B."
    )
    assert note_about(SHEETS["table7"](committed), "not ranked against") == (
        f"ours: not ranked against DiCo-S after 400000 steps, {clash}: DiCo-B after 400000 steps."
    )
    notes = note_texts(SHEETS["table4"](committed))
    assert not any("not ranked against" in text for text in notes)


def test_every_metric_with_the_papers_beside_it_has_its_difference(tmp_path: Path):
    """Scores and speed of DiCo-S have their differences from the paper in per cent."""
    store = Store(tmp_path)
    row = TABLE_4.row("DiCo-S")
    score(store, row, IMAGENET256, 54.967)
    stage = timing_stage(row, TABLE_4.baseline, "cuda")
    store.append(stage, "done", timing_values(1695.73 * 1.5), GPU_PROVENANCE)
    sheet = SHEETS["table4"](commit_records(tmp_path))
    cells = labelled(sheet, "DiCo-S")

    # Scores: ours, and the paper's.
    for name, ours, paper in (
        ("fid", 54.967, 49.97),
        ("is", 20.0, 31.38),
        ("precision", 0.5, 0.48),
        ("recall", 0.5, 0.58),
    ):
        difference = 100 * (ours / paper - 1)
        assert float(cells[f"ours_{name}_diff"]) == pytest.approx(difference, abs=0.005), name

    # Speed: half as much again as the paper's 1695.73 images per second.
    (speed,) = [column for column in sheet.columns if column.title.startswith("diff. %, fp32")]
    assert cells[speed.key] == "50.00"
