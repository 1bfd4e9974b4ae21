"""What records say about themselves stands under every table that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.claims.judge import claims_sheet
from analysis.query import ReferenceStore
from analysis.tables.paper import SHEETS
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared import timings as speed
from experiments.declared.protocols import DIGITS
from experiments.engine.records.store import Store
from experiments.engine.reporting.notes import timing_caveats
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.spec import Backbone, Cost, Timing
from experiments.engine.specs.stages import cost_stage, timing_stage
from experiments.main_results import TABLE_1

PROVENANCE = {
    "device": "cpu",
    "cpu": "a CPU",
    "cpu_count": 2,
    "torch": "b",
    "python": "3",
    "dirty": False,
    "commit": "c" * 40,
    "precision_flags": {"matmul_tf32": False},
}


def speeds(rate: float = 50.0, spread: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "images_per_s": rate,
        "images_per_s_spread": spread,
        "relative": 1.0,
        "relative_spread": 0.0,
        "peak_memory_bytes": None,
        "joules_per_image": None,
    } | more


def sources(store: Store) -> ReferenceStore:
    (store.root / "records").rename(store.root / "reference")
    return ReferenceStore(store.root)


def pair(
    folder: Path,
    stages: list[Timing],
    values: list[dict[str, Any]],
    cpus: tuple[str, str] = ("a CPU", "a CPU"),
) -> list[tuple[str, Any]]:
    store = Store(folder)
    for stage, found, cpu in zip(stages, values, cpus, strict=True):
        store.append(stage, "done", found, PROVENANCE | {"cpu": cpu})
    return [(stage.backbone.name, store.here.latest(stage)) for stage in stages]


STAGES = [
    Timing(Backbone(name), 32, 4, 1000, 4, "cpu", baseline=Backbone("dit_s_2"))
    for name in ("dit_s_2", "dico_s")
]


@pytest.mark.parametrize(
    "rates, note",
    [
        ((100.0, 103.9), False),
        ((100.0, 104.1), True),
        ((104.1, 100.0), True),
        ((100.0, None), False),
    ],
)
def test_a_baseline_that_ranges_over_more_than_the_intervals_is_a_note(
    rates: tuple[float, float | None], note: bool, tmp_path: Path
):
    """The intervals of 50 ±1 are 4 % wide."""
    notes = timing_caveats(
        pair(tmp_path, STAGES, [speeds(baseline_images_per_s=rate) for rate in rates])
    )
    assert bool(notes) == note
    if note:
        assert (
            "beside 2 rows the baseline dit_s_2 (fp32, batch 4) itself made 100 to 104 img/s, 4% apart; the printed intervals are 4% wide in the median."
            in notes[0]
        )


@pytest.mark.parametrize("other", ["machine", "batch", "input", "mode"])
def test_a_baselines_rates_are_set_side_by_side_under_one_condition_only(
    other: str, tmp_path: Path
):
    values = [speeds(baseline_images_per_s=rate) for rate in (10.0, 20.0)]
    changed = {"batch": dict(batch=1), "input": dict(size=64), "mode": dict(precision="bf16")}.get(
        other, {}
    )
    stages = [STAGES[0], Timing(**{**STAGES[1].__dict__, **changed})]
    assert not timing_caveats(
        pair(tmp_path, stages, values, ("a CPU", "another" if other == "machine" else "a CPU"))
    )


def test_a_baseline_of_an_input_of_its_own_is_one_under_every_row(tmp_path: Path):
    stages = [
        STAGES[0],
        Timing(
            Backbone("ldm_4"),
            64,
            3,
            1000,
            4,
            "cpu",
            baseline=Backbone("dit_s_2"),
            baseline_input=(32, 4),
        ),
    ]
    assert timing_caveats(
        pair(tmp_path, stages, [speeds(baseline_images_per_s=rate) for rate in (10.0, 20.0)])
    )


def test_tables_of_throughput_note_unstable_timings_and_baselines_that_range(tmp_path: Path):
    store = Store(tmp_path)
    for device, table, rates in (("cpu", TABLE_3, (10.0, 20.0)), ("cuda", TABLE_4, (100.0, 300.0))):
        for row, rate, stable in zip(table.rows, rates, (True, False), strict=False):
            store.append(
                timing_stage(row, table.baseline, device),
                "done",
                speeds(baseline_images_per_s=rate, stable=stable),
                PROVENANCE | {"device": "a GPU" if device == "cuda" else "cpu"},
            )
    found = sources(store)
    notes = SHEETS["table3"](found).notes
    assert (
        f"{TABLE_3.rows[1].label}: timed before the warm-up was stable." in notes
        and sum("img/s of different rows do not compare" in note for note in notes) == 1
    )
    notes = SHEETS["table4"](found).notes
    assert (
        f"{TABLE_4.rows[1].label} (fp32, TF32 off, attention unfused): timed before the warm-up was stable."
        in notes
    )
    assert [note for note in notes if "itself made 100 to 300 img/s" in note]


def test_claims_counts_and_speeds_say_of_a_changed_tree(tmp_path: Path):
    store, row = Store(tmp_path), TABLE_1.baseline
    count = dict.fromkeys(
        ("params_total", "params_trainable", "macs_torchprofile", "macs_core", "macs_norms"), 10**9
    )
    for name in ("dit_xl_2", "dico_xl"):
        store.append(Cost(Backbone(name), 32, 4, 1000), "done", count, PROVENANCE | {"dirty": True})
    store.append(cost_stage(row), "done", count, PROVENANCE)
    store.append(
        speed.in_mode(timing_stage(row, row, "cpu"), "fp32"),
        "done",
        speeds(),
        PROVENANCE | {"dirty": True},
    )
    found = sources(store)
    for sheet, dirty in (
        (claims_sheet(found), 2),
        (SHEETS["counts"](found), 2),
        (SHEETS["speed_forward"](found), 1),
    ):
        assert [note.partition(":")[0] for note in sheet.notes if "uncommitted" in note] == [
            f"{dirty} of these records come from a tree with uncommitted changes"
        ]


def test_a_timing_of_a_changed_tree_marks_this_machines_table(tmp_path: Path):
    store, row = Store(tmp_path), TABLE_4.rows[0]
    store.append(
        timing_stage(row, TABLE_4.baseline, "cpu"), "done", speeds(), PROVENANCE | {"dirty": True}
    )
    assert (
        "some records come from a tree with uncommitted changes"
        in main_sheet(TABLE_4, [row], DIGITS, (0,), "cpu", store).notes
    )


def test_table_1_says_which_gaps_were_timed_in_another_mode(tmp_path: Path):
    def said(store: ReferenceStore) -> str:
        (note,) = [
            note
            for note in SHEETS["table1"](store).notes
            if note.startswith("A gap in our columns")
        ]
        return note.partition(". The paper")[0]

    store, rows = Store(tmp_path), [TABLE_1.row(label) for label in ("DiT-S/2", "DiC-S", "DiCo-B")]
    assert said(ReferenceStore(tmp_path)) == "A gap in our columns is what has not been run here"
    for row in rows:
        store.append(
            speed.in_mode(timing_stage(row, TABLE_1.baseline, "cpu"), "fp32"),
            "done",
            speeds(),
            PROVENANCE,
        )
    store.append(timing_stage(rows[0], TABLE_1.baseline, "cpu"), "done", speeds(), PROVENANCE)
    found = sources(store)
    assert said(found).endswith(
        "; the throughput of DiC-S, DiCo-B was timed with fused attention and stands in speed_forward"
    )
    assert {"DiC-S", "DiCo-B"} <= {row[0].text() for row in SHEETS["speed_forward"](found).rows}
    assert not any("fused attention" in note for note in SHEETS["table2"](found).notes)
