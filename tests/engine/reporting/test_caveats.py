"""What records say about themselves stands under every table that holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.claims.judge import claims_sheet
from analysis.query import ReferenceStore
from analysis.tables.paper import SHEETS
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared import timings
from experiments.declared.protocols import DIGITS_WHOLE
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.caveats import evaluation_counts, timing_caveats
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Backbone, Cost, Timing
from experiments.engine.specs.stages import cost_stage, timing_stage
from experiments.main_results import TABLE_1
from tests.support.references import GPU_PROVENANCE, PROVENANCE, commit_records, timing_values
from tests.support.sheets import note_about, note_texts, texts

STAGES = [
    Timing(Backbone(name), 32, 4, 1000, 4, "cpu", baseline=Backbone("dit_s_2"))
    for name in ("dit_s_2", "dico_s")
]


def pair(
    folder: Path,
    stages: list[Timing],
    baseline_rates: tuple[float | None, ...],
    cpus: tuple[str, str] = ("a CPU", "a CPU"),
) -> list[tuple[str, Record]]:
    """The records of two timings, with the rate of the baseline beside each, by label."""
    store = Store(folder)
    records = []
    for stage, rate, cpu in zip(stages, baseline_rates, cpus, strict=True):
        values = timing_values(baseline_images_per_s=rate)
        record = store.append(stage, "done", values, PROVENANCE | {"cpu": cpu})
        records.append((stage.backbone.name, record))
    return records


@pytest.mark.parametrize(
    "rates, is_noted",
    [
        ((100.0, 103.9), False),
        ((100.0, 104.1), True),
        ((104.1, 100.0), True),
        ((100.0, None), False),
    ],
)
def test_a_baseline_that_ranges_over_more_than_the_intervals_is_noted(
    rates: tuple[float, float | None], is_noted: bool, tmp_path: Path
):
    """The intervals of 50 ±1 are 4 % wide."""
    notes = [note.text for note in timing_caveats(pair(tmp_path, STAGES, rates))]
    assert bool(notes) == is_noted
    if is_noted:
        assert (
            "Beside these 2 rows, the baseline dit_s_2 (fp32, batch 4) itself ranged from 100 to "
            "104 img/s (4%). The printed intervals have a median width of 4%." in notes[0]
        )


@pytest.mark.parametrize("condition", ["machine", "batch", "input", "mode"])
def test_a_baselines_rates_compare_under_one_condition_only(condition: str, tmp_path: Path):
    changes: dict[str, dict[str, Any]] = {
        "batch": dict(batch=1),
        "input": dict(size=64),
        "mode": dict(precision="bf16"),
    }
    stages = [STAGES[0], replace(STAGES[1], **changes.get(condition, {}))]
    cpus = ("a CPU", "another" if condition == "machine" else "a CPU")
    assert not timing_caveats(pair(tmp_path, stages, (10.0, 20.0), cpus))


def test_a_baseline_with_an_input_of_its_own_is_one_under_every_row(tmp_path: Path):
    other = replace(
        STAGES[1], backbone=Backbone("ldm_4"), size=64, channels=3, baseline_input=(32, 4)
    )
    assert timing_caveats(pair(tmp_path, [STAGES[0], other], (10.0, 20.0)))


def test_tables_note_unstable_timings_and_baselines_that_range(tmp_path: Path):
    """A timing that began too early is named, and so is the range of a baseline."""
    store = Store(tmp_path)
    for device, table, rates in (("cpu", TABLE_3, (10.0, 20.0)), ("cuda", TABLE_4, (100.0, 300.0))):
        for row, rate, stable in zip(table.rows, rates, (True, False), strict=False):
            values = timing_values(baseline_images_per_s=rate, stable=stable)
            provenance = GPU_PROVENANCE if device == "cuda" else PROVENANCE
            store.append(timing_stage(row, table.baseline, device), "done", values, provenance)
    committed = commit_records(tmp_path)

    # On a CPU.
    sheet = SHEETS["table3"](committed)
    unstable = note_about(sheet, "before its warm-up was stable")
    assert unstable.startswith(f"The timing of {TABLE_3.rows[1].label} began")
    assert note_about(sheet, "Compare rows by rel., not by img/s")

    # On a GPU.
    sheet = SHEETS["table4"](committed)
    label = f"{TABLE_4.rows[1].label} (fp32, TF32 off, attention unfused)"
    assert label in note_about(sheet, "before its warm-up was stable")
    assert note_about(sheet, "itself ranged from 100 to 300 img/s")


def test_claims_counts_and_speeds_tell_of_a_changed_tree(tmp_path: Path):
    """Every sheet counts those of its own records that a changed tree made."""
    store = Store(tmp_path)
    row = TABLE_1.baseline
    dirty = PROVENANCE | {"dirty": True}
    names = ("params_total", "params_trainable", "macs_torchprofile", "macs_core", "macs_norms")
    count = dict.fromkeys(names, 10**9)

    # Two counts and a timing of a changed tree, and a count of a clean one.
    for name in ("dit_xl_2", "dico_xl"):
        store.append(Cost(Backbone(name), 32, 4, 1000), "done", count, dirty)
    store.append(cost_stage(row), "done", count, PROVENANCE)
    timing = timings.in_mode(timing_stage(row, row, "cpu"), "fp32")
    store.append(timing, "done", timing_values(), dirty)

    # The notes of three sheets.
    committed = commit_records(tmp_path)
    for make_sheet, beginning in (
        (claims_sheet, "2 of these records come"),
        (SHEETS["counts"], "2 of these records come"),
        (SHEETS["speed_forward"], "1 of these records comes"),
    ):
        note = note_about(make_sheet(committed), "uncommitted changes")
        assert note.startswith(f"{beginning} from a tree")


def test_a_timing_of_a_changed_tree_marks_this_machines_table(tmp_path: Path):
    store, row = Store(tmp_path), TABLE_4.rows[0]
    stage = timing_stage(row, TABLE_4.baseline, "cpu")
    store.append(stage, "done", timing_values(), PROVENANCE | {"dirty": True})
    sheet = main_sheet(Selection(TABLE_4, [row], DIGITS_WHOLE, (0,), "cpu"), store, store.here)
    assert "Some records come from a tree with uncommitted changes." in note_texts(sheet)


def test_table_1_says_which_gaps_were_timed_in_another_mode(tmp_path: Path):
    """A gap whose network was timed with fused attention leads to the sheet that shows it."""

    def about_gaps(store: ReferenceStore) -> str:
        return note_about(SHEETS["table1"](store), "A gap in our columns").partition(". The")[0]

    assert about_gaps(ReferenceStore(tmp_path)) == (
        "A gap in our columns is what has not been run here"
    )

    # Three networks are timed with fused attention, and one of them without as well.
    store = Store(tmp_path)
    rows = [TABLE_1.row(label) for label in ("DiT-S/2", "DiC-S", "DiCo-B")]
    stages = [timing_stage(row, TABLE_1.baseline, "cpu") for row in rows]
    for stage in stages:
        store.append(timings.in_mode(stage, "fp32"), "done", timing_values(), PROVENANCE)
    store.append(stages[0], "done", timing_values(), PROVENANCE)

    # Table 1 names the other two, and table 2 none.
    committed = commit_records(tmp_path)
    ending = "; DiC-S, DiCo-B were timed with fused attention, see speed_forward"
    assert about_gaps(committed).endswith(ending)
    forward = SHEETS["speed_forward"](committed)
    assert {"DiC-S", "DiCo-B"} <= set(texts(forward, forward.columns[0].key))
    assert not any("fused attention" in text for text in note_texts(SHEETS["table2"](committed)))


def test_evaluations_are_listed_by_row_only_if_they_differ():
    same = evaluation_counts({"a": [{"nfe": 50.0}], "b": [{"nfe": 50.0}], "c": []})
    assert [note.text for note in same] == ["Network evaluations per image: 50."]
    (note,) = evaluation_counts({"a": [{"nfe": 50.0}, {"nfe": 51.0}], "b": [{"fid": 1.0}]})
    assert note.text == "Network evaluations per image: 50.5: a; not recorded: b."
    assert not evaluation_counts({"a": []})
