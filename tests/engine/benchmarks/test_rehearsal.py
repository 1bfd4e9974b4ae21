"""The GPU session, every part in order, on a CPU that stands in for the GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from experiments.declared.benchmarks import gpu_parts
from experiments.engine.records.store import Record, Store
from tests.support.paths import ROOT
from tests.support.stand_in import NAME

# The second call begins with this part.
SECOND = "table 1, forward"
# Parts that meet the full card.
FAILING = ("training beside the ceilings", "table 1, training")


@pytest.mark.slow
def test_a_session_measures_every_part_outlasts_a_failure_and_continues(tmp_path: Path):
    """In the first call one training does not fit the card; the second call has another card."""
    results, bundle = tmp_path / "results", tmp_path / "all.tar.gz"
    common = ["gpu", "--minutes", "60", "--results", str(results)]
    first = ["--full-card", *common, "--bundle", str(bundle)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.rehearsal", *first, "--then", *common]
        + ["--from", SECOND],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    # Every part ended, in order, and the failure is said at its parts and by the exit status.
    parts = list(gpu_parts("cuda", []))
    calls = done.stdout.split("rehearsal: exit status ")
    expected = [(part, "ended with 1" if part in FAILING else "done") for part in parts]
    assert _ends(calls[0]) == expected, done.stdout + done.stderr
    assert calls[1].startswith("1")
    assert "DiCo-XL, tf32: OutOfMemoryError: the card is full" in calls[0]

    # The second call does the rest, which is the failed training.
    left = parts[parts.index(SECOND) :]
    assert _ends(calls[1]) == [(part, "done") for part in left], done.stdout + done.stderr
    assert calls[2].startswith("0")
    records = Store(results).here.all()
    _check_records(records)

    # The bundle has what there was at the end of the first call.
    with tarfile.open(bundle) as archive:
        bundled = {Path(name).stem for name in archive.getnames()}
    later = [record for record in records if _is_none_of(bundled, record)]
    assert [(r.kind, r.status, r.spec["precision"]) for r in later] == [("timing", "done", "tf32")]


def _is_none_of(stems: set[str], record: Record) -> bool:
    beginning = record.name.partition("/")[2]
    return not any(stem.startswith(beginning) for stem in stems)


def _ends(printed: str) -> list[tuple[str, str]]:
    """Return how every part of a call ended, in order."""
    return re.findall(r"^== (.+?): (.*?) after \d+ s$", printed, re.M)


def _check_records(records: list[Record]) -> None:
    """Check that each measurement is recorded once and names its card; two attempts failed."""
    failed = [record for record in records if record.status == "failed"]
    assert [record.spec["what"] for record in failed] == ["training", "training"]
    assert all("OutOfMemoryError" in str(record.error) for record in failed)

    # What a later part of the session also needs is not measured again.
    finished = [record for record in records if record.status == "done"]
    once = {"timing", "latency", "profile", "ceilings", "cost"}
    counts = Counter(record.id for record in finished if record.kind in once)
    assert set(counts.values()) == {1}
    assert {record.kind for record in finished} == once | {"kernel", "steps", "neighbours"}
    on_card = [record for record in finished if record.kind != "cost"]
    assert {record.provenance["device"] for record in on_card} == {NAME}

    # Energy, memory, compilation and graphs are asked of the card.
    timings = [record.values for record in finished if record.kind == "timing"]
    assert all(values["joules_per_image"] > 0 for values in timings)
    assert all(values["peak_memory_bytes"] for values in timings)
    assert any(values["graphs"] for values in timings)
    steps = [record for record in finished if record.kind == "steps"]
    ways = {(record.spec.get("compile"), record.spec.get("graphs")) for record in steps}
    assert ways == {(False, False), (False, True), (True, True), (True, False)}
