"""The build of all tables: equal to the byte, committed, and whole where sources are bad."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import build
from experiments.engine.records.tree import REPOSITORY

PUBLISHED = REPOSITORY / "results" / "published"


def run_build(*arguments: str | Path, hash_seed: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analysis.build", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copy_reference(folder: Path) -> Path:
    """A results folder with the committed records and predictions."""
    for part in ("reference", "predictions"):
        shutil.copytree(REPOSITORY / "results" / part, folder / part)
    return folder


@pytest.mark.slow
def test_two_builds_are_equal_to_the_byte_and_their_tables_are_those_committed(tmp_path: Path):
    folders = [copy_reference(tmp_path / name) for name in ("a", "b")]
    for hash_seed, folder in enumerate(folders, 1):
        done = run_build("--results", folder, hash_seed=hash_seed)
        assert done.returncode == 0, done.stdout + done.stderr
    tables, again = (files_in(folder / "tables") for folder in folders)
    assert tables == again == files_in(REPOSITORY / "results" / "tables")
    figures, again = (files_in(folder / "figures") for folder in folders)
    assert figures == again
    assert set(figures) == {f"{name}.{form}" for name in build.FIGURES for form in ("pdf", "png")}


def test_files_are_narrow_and_hold_what_their_names_say(tmp_path: Path):
    tables = REPOSITORY / "results" / "tables"
    assert {path.suffix for path in tables.iterdir()} == {".md", ".csv"}
    for path in tables.glob("*.csv"):
        titles, *rows = csv.reader(path.open(newline=""))
        assert len(titles) <= 16, path.name
        if not rows:
            # Pairs of rows need two whole training seeds.
            assert path.name == "evidence.csv"
            continue
        assert {len(row) for row in rows} == {len(titles)}, path.name
        assert len(set(titles)) == len(titles), path.name
        for at, title in enumerate(titles[1:], 1):
            assert any(row[at] for row in rows), f"{path.name}: {title} is all gaps"


def change_record(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.slow
def test_bad_sources_are_named_and_the_rest_is_built(tmp_path: Path):
    reference = copy_reference(tmp_path / "results") / "reference"
    published = shutil.copytree(PUBLISHED, tmp_path / "published")

    # records of another format, with values that are no numbers, or of no protocol
    paths = sorted((reference / "evaluate").glob("*.json"))
    changes: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda record: record.update(format=99),
        lambda record: record["values"].update(fd_digits=math.nan),
        lambda record: record["spec"].update(num=77),
        lambda record: record["values"].update(agreement="high"),
        lambda record: record["spec"].pop("num"),
    )
    for path, change in zip(paths, changes, strict=False):
        change_record(path, change)
    data = json.loads(paths[2].read_text())["spec"]["train"]["data"]["name"]

    # published numbers without a column, that are no numbers, or that divide by zero
    lines = list(csv.reader((published / "table5.csv").open()))
    without = [",".join(line[:2] + line[3:]) for line in lines]
    (published / "table5.csv").write_text("\n".join(without) + "\n")
    for name, old, new in (("table2.csv", "18.58", "nan"), ("table8.csv", ",118.7,", ",0,")):
        (published / name).write_text((published / name).read_text().replace(old, new))

    done = run_build("--tables", "--results", tmp_path / "results", "--published", published)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for words in (
        paths[0].name,
        "fd_digits is no number",
        "agreement is no number",
        "its spec lacks num",
        f"no declared protocol ({data}, 77",
        "table5.csv: no column gflops",
        "throughput_img_s is 'nan'",
        "gflops is 0, which is not above 0",
    ):
        assert [problem for problem in problems if words in problem], (words, problems)
    built = {path.name for path in (tmp_path / "results" / "tables").iterdir()}
    expected = {"table1.md", "table3_scores.csv", "table4_counts.csv", "evidence.md"}
    assert expected <= built
    assert not {"table5.md", "table2.md"} & built
