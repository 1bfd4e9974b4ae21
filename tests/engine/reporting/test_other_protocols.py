"""Tables rank and judge only what one protocol measured, and say what they leave out."""

from __future__ import annotations

from pathlib import Path

from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS_WHOLE
from experiments.engine.records.comparison import fields_of_some
from experiments.engine.records.store import Store
from experiments.engine.reporting.comparison import comparison_sheet
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import evaluate_stage
from tests.support.manifests import PROVENANCE, SHARES, write_score
from tests.support.sheets import note_about, note_texts, texts


def first_rows(num: int) -> Selection:
    """The first rows of Table 4 on digits, seed 0."""
    return Selection(TABLE_4, TABLE_4.rows[:num], DIGITS_WHOLE, (0,), "cpu")


def test_tables_refuse_to_rank_across_protocols(tmp_path: Path):
    # A reference with three seeds gives the spread.
    written = Store(tmp_path)
    for row in TABLE_4.rows[:3]:
        for seed in range(3):
            values = {"fd_digits": 10 + seed} | SHARES
            written.append(evaluate_stage(row, DIGITS_WHOLE, seed), "done", values, PROVENANCE)
    (tmp_path / "records").rename(tmp_path / "reference")

    # Two rows are better than the first by far, and one of them was scored by other features.
    store = Store(tmp_path / "here", tmp_path / "reference")
    write_score(store, 0, 10.0)
    write_score(store, 1, 1.0, extractor={"sha256": "cd"})
    write_score(store, 2, 1.0)
    _, refused, ranked = (row.label for row in TABLE_4.rows[:3])
    note = note_about(main_sheet(first_rows(3), store, store.here), "fd_digits against")
    ranking, _, rest = note.partition("Not compared, since scored by another protocol: ")
    assert rest.startswith(f"{refused} (other extractor.sha256)")
    assert refused not in ranking
    assert f"better: {ranked}" in ranking


def test_a_table_names_the_fields_that_not_all_its_records_hold(tmp_path: Path):
    store = Store(tmp_path)
    write_score(store, 0, 1.0, nfe=50, reference={"name": "a", "sha256": "b"})
    write_score(store, 1, 1.0, reference={"name": "a"}, sampler={"eta": 0.0})
    alone = note_texts(main_sheet(first_rows(1), store, store.here))
    both = note_texts(main_sheet(first_rows(2), store, store.here))
    assert not any("not recorded by all" in text for text in alone)
    (note,) = [text for text in both if "not recorded by all" in text]
    assert note.endswith(": nfe, reference.sha256.")


def test_a_declared_field_and_one_of_a_part_of_another_name_are_no_gaps(tmp_path: Path):
    store = Store(tmp_path)
    write_score(store, 0, 1.0, nfe=50, reference={"name": "a", "sha256": "b"})
    write_score(store, 1, 1.0, reference={"name": "a"}, sampler={"eta": 0.0})
    write_score(store, 2, 1.0, nfe=50, decoder={"name": "vae", "scale": 3})
    stages = [evaluate_stage(row, DIGITS_WHOLE, 0) for row in TABLE_4.rows[:3]]
    records = [store.here.latest(stage) for stage in stages]
    assert fields_of_some(records) == ["nfe"]
    assert fields_of_some([]) == []


def test_no_verdict_is_given_across_protocols(tmp_path: Path):
    """Scores are called far off only if one protocol measured them, on whatever machine."""
    store = Store(tmp_path)
    for row in range(2):
        for seed in range(3):
            write_score(store, row, 10.0 + seed, seed)
    (tmp_path / "records").rename(tmp_path / "reference")
    store.refresh()

    # Both rows are far off: one with other flags, one on another machine; the third has no score.
    write_score(store, 0, 90.0, flags={"matmul_tf32": True, "cudnn_tf32": False})
    write_score(store, 1, 90.0, versions={"torch": "3"}, extractor={"sha256": "cd"})
    sheet = comparison_sheet(first_rows(3), store)
    first, second, third = texts(sheet, "reproduced")
    assert first.startswith("other protocol")
    assert second.startswith("no: fd_digits")
    assert third == "-"
    assert "measured with another flags.matmul_tf32." in note_about(sheet, "no verdict")
    assert "another extractor.sha256, versions.torch." in note_about(sheet, "another machine")
    assert note_about(sheet, "all 5 comparisons")
