"""The model of memory by closed forms and by search, its file, its table and its words."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import efficiency
from experiments.ablation import DICO_S
from experiments.declared.protocols import IMAGENET256
from experiments.engine.cluster import slurm
from experiments.engine.jobs import plan
from experiments.engine.records.store import Store
from experiments.engine.reporting.efficiency.memory import (
    FILE,
    Gradients,
    Line,
    Needs,
    Parts,
    Settings,
    Sharding,
    highest_lines,
    largest_micro_batch,
    network_id,
    read_needs,
    split_needs,
    write_needs,
)
from experiments.engine.reporting.efficiency.memory_sheet import Card, MemoryRow, memory_sheet
from experiments.engine.reporting.efficiency.predictions import FOLDER
from experiments.engine.specs.stages import train_stage
from tests.support.plans import two_rows

TRAIN = train_stage(DICO_S, IMAGENET256, seed=0)
MB = 10**6
LINES = {
    Gradients.COMING: (Line(790 * MB, 10 * MB), Line(100 * MB, 60 * MB)),
    Gradients.APART: (Line(100 * MB, 60 * MB),),
}
NEEDS = Needs(
    network_id(TRAIN.backbone),
    "dico_s",
    32,
    "fp32",
    False,
    1000 * MB,
    800 * MB,
    80 * MB,
    40 * MB,
    LINES,
)
ROW = MemoryRow("4", "DiCo-S", TRAIN, batch=1000)


def known(*needs: Needs) -> dict:
    return {each.key: each for each in needs}


def parts_of(settings: Settings, images: int) -> Parts:
    return split_needs(NEEDS, settings, images)


def test_only_lines_that_are_the_highest_somewhere_are_kept():
    """All sums of up to 12 random lines are looked at one by one."""
    draw = random.Random(0)
    for _ in range(200):
        lines = [Line(draw.randrange(50), draw.randrange(9)) for _ in range(draw.randrange(1, 12))]
        kept = highest_lines(lines)
        assert set(kept) <= set(lines)
        highest = [max(line.at(images) for line in lines) for images in range(1, 80)]
        assert [max(line.at(images) for line in kept) for images in range(1, 80)] == highest
        for left_out in kept[1:]:
            rest = [line for line in kept if line != left_out]
            assert max(line.at(10**6) for line in rest) <= max(line.at(10**6) for line in kept)


def test_alone_a_process_has_gradients_as_they_come():
    assert parts_of(Settings(), 1) == Parts(1000 * MB, 800 * MB, 1600 * MB, 1000 * MB, 0)
    assert parts_of(Settings(), 100).activations == (100 + 6000 - 800) * MB
    assert parts_of(Settings(averages=3), 1).averages == 3000 * MB


def test_micro_batches_and_several_processes_have_them_all_the_time():
    for settings in (Settings(accumulates=True), Settings(8)):
        assert parts_of(settings, 10) == Parts(1000 * MB, 800 * MB, 1600 * MB, 1000 * MB, 700 * MB)


def test_what_is_sharded_is_divided_and_gathered_by_blocks():
    optimiser = parts_of(Settings(8, Sharding.OPTIMISER), 10)
    assert optimiser == Parts(1000 * MB, 800 * MB, 200 * MB, 1000 * MB, 700 * MB)
    gathered = (5 * 80 + 40) * MB
    everything = parts_of(Settings(8, Sharding.ALL), 10)
    assert everything == Parts(125 * MB, 100 * MB, 200 * MB, 125 * MB, 700 * MB + gathered)


@pytest.mark.parametrize("gigabytes", [4.55, 4.56, 4.62, 5.0, 17.3])
def test_the_largest_micro_batch_fits_and_one_more_image_does_not(gigabytes: float):
    settings = Settings(8)
    images = largest_micro_batch(NEEDS, settings, gigabytes * 1e9)
    assert images == int((gigabytes * 1e9 - 4500 * MB) // (60 * MB))
    assert parts_of(settings, images + 1).total > gigabytes * 1e9


def test_what_is_written_is_read(tmp_path: Path):
    others = [replace(NEEDS, precision="bf16"), replace(NEEDS, recompute=True, block=1)]
    write_needs(tmp_path, [NEEDS, *others])
    assert read_needs(tmp_path) == known(NEEDS, *others)
    assert read_needs(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("old", "new"), [("100000000", "many"), ("coming", "gone"), ("fixed", "f")]
)
def test_a_damaged_file_is_one_line(old: str, new: str, tmp_path: Path):
    write_needs(tmp_path, [NEEDS])
    file = tmp_path / FOLDER / FILE
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"memory.csv, line \d is not what was traced; remove"):
        read_needs(tmp_path)


def test_the_table_says_in_words_what_fits():
    """Recomputed, a block keeps a tenth. Of 5 GB, 4.5 GB are free, which DDP's states take."""
    lines = {kind: (Line(100 * MB, 6 * MB),) for kind in LINES}
    needs = known(NEEDS, replace(NEEDS, recompute=True, lines=lines))
    sheet = memory_sheet([ROW, replace(ROW, label="again")], needs, "DiCo-S", Card(5))
    assert [row["row"].text() for row in sheet.rows] == ["4: DiCo-S"]
    (row,) = sheet.rows
    assert row["activations_kept"].value == pytest.approx(0.1 + 8 * 0.06)
    assert (row["NOTHING_kept"].value, row["NOTHING_recomputed"].value) == (0, 0)
    assert (row["OPTIMISER_kept"].value, row["OPTIMISER_recomputed"].value) == (23, 233)

    answers = [note.text for note in sheet.notes if note.text.startswith("Does")]
    question = "Does DiCo-S train on 8 cards of 5 GB?"
    assert answers == [
        f"{question} DDP: no, one image needs at least 4.5 GB, and 4.5 GB of a card are free.",
        f"{question} ZeRO-1: yes, in fp32 with activations kept, 23 images at once and 6 passes "
        "per step; in fp32 with activations recomputed, 125 images at once and 1 pass per step.",
        f"{question} fully sharded: yes, in fp32 with activations kept, "
        "56 images at once and 3 passes per step; in fp32 with activations recomputed, 125 images "
        "at once and 1 pass per step.",
    ]


def test_rows_that_are_not_traced_are_named():
    sheet = memory_sheet([ROW], {}, "DiCo-S")
    assert not sheet.rows
    assert sheet.notes[-1].text.startswith("Not traced yet: 4: DiCo-S. ")


def test_a_budget_without_room_for_one_image_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_needs(tmp_path, [NEEDS])
    options = ["--memory", "--rows", "DiCo-S", "--report", "--results", str(tmp_path)]
    assert efficiency.main([*options, "--budget", "4"]) == 0
    assert capsys.readouterr().out.count("1: DiCo-S") == 1
    assert efficiency.main([*options, "--budget", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: a budget of 1 GB, of which 0.90 GB are free, holds no image of DiCo-S: 1.15 GB "
        "are the least (fully sharded on 8 processes, fp32, activations kept); raise --budget or "
        "select other rows with --rows\n"
    )


@pytest.mark.parametrize("options", [["--counts", "--budget", "9"], ["--memory", "--budget", "0"]])
def test_a_budget_goes_with_memory_alone(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert efficiency.main(options) == 2
    assert "--budget goes with --memory, and takes gigabytes above 0" in capsys.readouterr().err


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]):
    assert efficiency.main(["--memory", "--report", "--rows", "DiCo-Q"]) == 2
    assert "have no network as any of --rows; known: 'ADM-U', " in capsys.readouterr().err


def test_a_dry_run_tells_the_memory_of_trainings(tmp_path: Path):
    write_needs(tmp_path, [NEEDS])
    selection = two_rows().selection
    one_row = plan.TablePlan(selection.with_rows(selection.rows[:1]))
    text = plan.describe(one_row, Store(tmp_path))
    (line,) = (x for x in text.splitlines() if "train" in x and "DiCo-S, seed 0" in x)
    assert line.endswith("19.1 GB")
    assert (
        "\nmemory: at most 19.1 GB, by DiCo-S, seed 0: parameters 1.00 GB, gradients 800 MB, AdamW "
        "1.60 GB, average 1.00 GB, activations 14.7 GB at 256 images\n"
    ) in text


def test_a_dry_run_on_slurm_follows_the_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_needs(tmp_path, [NEEDS])
    monkeypatch.setenv("DICO_SLURM_MICRO_BATCH", "4")
    monkeypatch.setenv("DICO_SLURM_SHARD_OPTIMIZER", "true")
    assert (
        "\nDiCo-S, seed 0: 3.34 GB per process: parameters 1.00 GB, gradients 800 MB, AdamW 200 "
        "MB, average 1.00 GB, activations 340 MB at 4 images\n"
    ) in slurm.describe(two_rows(), Store(tmp_path))
