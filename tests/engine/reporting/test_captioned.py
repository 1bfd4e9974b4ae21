"""What captions add to a table: the row of real images and the step of binding."""

from __future__ import annotations

from pathlib import Path

from experiments.declared.protocols import DIGITS_TEXT
from experiments.engine.records.score_names import DIGITS_TEXT as FEATURES
from experiments.engine.records.score_names import TABLE_SCORES
from experiments.engine.records.store import Store
from experiments.engine.reporting.captioned.binding import REAL
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.specs.selection import Run, Selection
from experiments.text_to_image import TABLE_V2_3

SCORES = TABLE_SCORES[FEATURES]
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}


def record(store: Store, label: str, step: int | None) -> None:
    """Append the evaluation of a row, with all scores at 0.5 and those of real images at 0.9."""
    run = Run.of(TABLE_V2_3.row(label), DIGITS_TEXT, 0)
    values = {"num": 1050, "nfe": 40.0, "binding_step": step, "course": {"steps": [100, 2000]}}
    for score in SCORES:
        values |= {score.key: 0.5, score.error: 0.1}
        values |= {f"{score.key}_real": 0.9, f"{score.error}_real": 0.1}
    store.append(run.stage, "done", values, PROVENANCE)


def test_a_report_shows_real_images_and_when_words_bind(tmp_path: Path):
    store = Store(tmp_path)
    record(store, "DiCo-DWC", 1400)
    record(store, "MMDiT", None)
    rows = [TABLE_V2_3.row(label) for label in ("DiCo-DWC", "MMDiT", "U-ViT-S/2", "U-Net")]
    main, binding, *_ = report_sheets(Selection(TABLE_V2_3, rows, DIGITS_TEXT, [0], "cpu"), store)

    # Ours and the paper's stand apart, and real images come last.
    assert main.rows[0]["all_held_out"].value == 0.5 and main.rows[0]["paper_fid"].value == 4.93
    assert main.rows[-1]["row"].label == REAL and main.rows[-1]["all_held_out"].value == 0.9
    assert "paper_fid" not in main.rows[-1]
    steps = [binding.rows[n].get("seed_0") for n in range(3)]
    assert steps[0].value == 1400 and steps[1].label == "not in 2000" and steps[2].is_gap
