"""The command line end to end, in processes of its own, on tables small enough to run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.ablation import TABLES
from experiments.declared.protocols import DIGITS, PROTOCOLS
from experiments.engine import cli
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.render import FORMATS, render
from experiments.engine.reporting.sheet import Sheet
from experiments.engine.reporting.tables import report_sheets
from experiments.engine.runtime import heartbeat
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.spec import Stage
from experiments.engine.specs.stages import cost_stage, evaluate_stage, timing_stage, train_stage
from tests.support.commands import TABLE, hear_interrupts
from tests.support.sheets import labelled, note_about, texts

ABLATION = REPOSITORY / "experiments" / "ablation.py"
PROVENANCE = {"device": "cpu", "cpu": "a", "torch": "b", "dirty": False, "seconds": 1.0}


def call(*arguments: object, script: Path = ABLATION) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def error_of(*arguments: object) -> str:
    """The single line on standard error of a call that exits with status 2."""
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--table", 7], "choose from 3, 4, 5"),
        ([], "--table"),
        (["--table", 4, "--rows", "DiCo-Q"], "known: 'DiCo-S', 'GELU->ReLU'"),
        (["--table", 4, "--protocol", "imagenet"], "imagenet256"),
        (["--table", 4, "--protocol", "imagenet256"], "prepare.py latents --protocol imagenet256 "),
        (["--table", 4, "--seeds", 1, 1], "different numbers"),
        (["--table", 4, "--epochs", 3], "--epochs"),
        (["--table", 4, "--cluster", "moon"], "'moon'"),
        (
            ["--table", 4, "--graphs", "--device", "cpu"],
            "CUDA graphs need a GPU, but this command uses cpu; leave out --graphs",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(
    arguments: list[object], words: str, tmp_path: Path
):
    assert words in error_of(*arguments, "--results", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_results_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "choose another folder with --results" in error_of(
        "--table", 5, "--results", tmp_path / "file" / "results"
    )


def test_help_plan_and_report_load_no_torch(tmp_path: Path):
    code = """
import sys
from experiments.ablation import TABLES
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import main

for arguments in sys.argv[1:]:
    main(TABLES, PROTOCOLS, "", arguments.split())
assert "torch" not in sys.modules
"""
    arguments = [
        f"--table 4 {flag} --results {tmp_path}"
        for flag in ("--dry-run", "--report", "--report --format csv")
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "would run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    command = f"{sys.executable} {ABLATION} --table 4 --report --results {tmp_path} | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.stdout.startswith("Table 4")
    assert done.stderr == ""


def records(root: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for path in root.glob("records/*/*.json"):
        record = json.loads(path.read_text())
        found.setdefault(f"{record['kind']} {record['status']}", []).append(record)
    return found


@pytest.mark.slow
def test_a_failing_row_is_shown_and_the_others_run_and_nothing_runs_twice(tmp_path: Path):
    script = tmp_path / "tiny.py"
    root = tmp_path / "results"
    script.write_text(TABLE.format(steps=5))
    first = call("--table", 4, "--results", root, script=script)
    assert first.returncode == 1, first.stderr
    bad = next(line for line in first.stdout.splitlines() if line.startswith("bad"))
    assert "failed" in bad
    assert (
        "bad: train failed: ValueError: window attention needs a grid divisible by its window"
        in first.stdout
    )
    assert {kind: len(found) for kind, found in records(root).items()} == {
        "cost done": 3, "timing done": 3, "train done": 2, "train failed": 1, "evaluate done": 2,
    }  # fmt: skip
    assert not list(root.rglob("*.tmp"))

    kept = call("--table", 4, "--results", root, "--rows", "good", "last", script=script)
    assert kept.returncode == 0
    assert kept.stderr == ""
    plan = call("--table", 4, "--results", root, "--dry-run", script=script).stdout
    assert plan.count("  done") == 10
    assert "failed before, would run again" in plan
    assert len(records(root)["train done"]) == 2


SAMPLED = """
from experiments import sample

sample.TABLES = {4: table}
raise SystemExit(sample.main())
"""


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(tmp_path: Path):
    script = tmp_path / "tiny.py"
    drawing = tmp_path / "draw.py"
    root = tmp_path / "results"
    script.write_text(TABLE.format(steps=5))
    drawing.write_text(
        TABLE.format(steps=5).replace('if __name__ == "__main__":', "if False:") + SAMPLED
    )
    assert call("--table", 4, "--results", root, "--rows", "good", script=script).returncode == 0
    drawn = {}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]),
    ):
        command = [
            sys.executable,
            *launcher,
            drawing,
            "--table",
            4,
            "--row",
            "good",
            "--num",
            260,
            "--batch",
            100,
            "--results",
            root,
            "--out",
            tmp_path / f"{name}.npz",
        ]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("260 images 8 x 8") == 1, done.stderr
        with np.load(tmp_path / f"{name}.npz") as file:
            drawn[name] = file["arr_0"], file["arr_1"]
        for folder in root.glob("runs/*/samples"):
            shutil.rmtree(folder)
    for one, two in zip(drawn["one"], drawn["two"], strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_broken_and_nobody_at_work(
    sent: signal.Signals, status: int, tmp_path: Path
):
    script = tmp_path / "tiny.py"
    root = tmp_path / "results"
    script.write_text(TABLE.format(steps=100_000))
    command = [sys.executable, script, "--table", "4", "--rows", "good", "--results", str(root)]
    with open(tmp_path / "errors", "w") as errors:
        running = subprocess.Popen(
            command,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            preexec_fn=hear_interrupts,
        )
        while not list(root.glob("runs/*/log.jsonl")):
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(sent)
        assert running.wait() == status
    assert sent == signal.SIGTERM or (tmp_path / "errors").read_text().splitlines()[-1].startswith(
        "interrupted; run the same command again"
    )
    assert not any(
        heartbeat.is_live(heartbeat.read_heartbeat(folder)) for folder in root.glob("runs/*")
    )
    assert not list(root.rglob("*.tmp"))
    assert set(records(root)) == {"cost done", "timing done"}


def fill(store: Store, where: str, seeds: int, shift: float = 0.0) -> None:
    """Write records of Table 4: fd 10 with some spread over seeds, and `shift` more in row two."""
    table = TABLES[4]
    for number, row in enumerate(table.rows):
        store.append(
            cost_stage(row),
            "done",
            {"params_trainable": 33e6, "macs_torchprofile": 4.25e9, "macs_core": 4.2e9},
            PROVENANCE,
        )
        store.append(
            timing_stage(row, table.baseline, "cpu"),
            "done",
            {"images_per_s": 20.0, "relative": 1.0},
            PROVENANCE,
        )
        for seed in range(seeds):
            score = 10 + 0.1 * ((seed + number) % 3) + (shift if number == 1 else 0)
            values = {
                "fd_digits": score,
                "is_digits": 8 + 0.01 * seed,
                "precision_digits": 0.6,
                "recall_digits": 0.8 + 0.001 * seed,
                "agreement": 0.9,
            }
            store.append(evaluate_stage(row, DIGITS, seed), "done", values, PROVENANCE)
    if where == "reference":
        (store.root / "records").rename(store.root / "reference")
    store.refresh()


def sheets(store: Store, seeds: int = 1) -> list[Sheet]:
    """The table of this machine, and its comparison with the reference."""
    return report_sheets(Selection(TABLES[4], TABLES[4].rows, DIGITS, range(seeds), "cpu"), store)


def test_gaps_and_failures_are_shown_as_such(tmp_path: Path):
    store = Store(tmp_path)
    row = labelled(sheets(store)[0], TABLES[4].rows[0].label)
    keys = ("params", "gflops_paper", "gflops", "gflops_core")
    assert [row[key] for key in keys] == ["-", "4.25", "-", "-"]
    stage: Stage = train_stage(TABLES[4].rows[2], DIGITS, 0)
    store.append(stage, "failed", {}, PROVENANCE, "ValueError: the loss is nan after 50 steps")
    main, _ = sheets(store)
    assert "failed" in labelled(main, TABLES[4].rows[2].label).values()
    assert "failed" not in labelled(main, TABLES[4].rows[1].label).values()
    assert note_about(main, "the loss is nan")


@pytest.mark.parametrize("shift, verdict", [(0.0, "yes"), (5.0, "no: fd_digits")])
def test_a_reference_is_shown_beside_and_never_instead(shift: float, verdict: str, tmp_path: Path):
    store = Store(tmp_path)
    fill(store, "reference", seeds=3)
    main, comparison = sheets(store)
    assert texts(main, "fd_digits")[0] == "-"
    assert set(texts(comparison, "reproduced")) == {"-"}
    fill(store, "records", seeds=1, shift=shift)
    assert texts(sheets(store)[1], "reproduced")[:3] == ["yes", verdict, "yes"]


def test_a_difference_is_resolved_only_beyond_the_spread_over_seeds(tmp_path: Path):
    alone = Store(tmp_path / "alone")
    fill(alone, "records", seeds=1, shift=5.0)
    assert note_about(sheets(alone)[0], "can be called resolved")
    repeated = Store(tmp_path / "repeated")
    fill(repeated, "records", seeds=3, shift=5.0)
    note = note_about(sheets(repeated, 3)[0], "fd_digits against DiCo-S")
    assert "worse: GELU->ReLU;" in note
    assert "not resolved: DWC 5x5" in note


def test_every_format_says_the_same(tmp_path: Path):
    store = Store(tmp_path)
    fill(store, "records", seeds=1)
    main = sheets(store)[0]
    texts = {form: render([main], form) for form in FORMATS}
    assert all(
        row.label in texts[form] for form in ("text", "markdown", "csv") for row in TABLES[4].rows
    )
    rows = list(csv.reader(io.StringIO(texts["csv"])))
    assert len({len(row) for row in rows}) == 1
    assert rows[1][rows[0].index("Gflops: ours")] == repr(4.25)
    assert texts["latex"].count("{") == texts["latex"].count("}")
    assert texts["latex"].count("\\\\") == len(TABLES[4].rows) + 2
    assert (
        len({line.count("|") for line in texts["markdown"].splitlines() if line.startswith("|")})
        == 1
    )


@pytest.mark.parametrize(
    ("where", "options", "given"),
    [
        (["--device", "cpu"], [], {}),
        (["--device", "cpu"], ["--compile"], {"compile": True}),
        (["--cluster", "slurm"], ["--compile", "--graphs"], {"compile": True, "graphs": True}),
    ],
)
def test_what_makes_runs_faster_is_a_resource_of_them(
    where: list[str],
    options: list[str],
    given: dict[str, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[cli.Plan] = []
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    monkeypatch.setattr(cli, "run_plan", lambda plan, *_: seen.append(plan) or True)
    monkeypatch.setattr(cli.slurm, "send", lambda plan, *_: seen.append(plan) or "")
    assert (
        cli.main(
            TABLES,
            PROTOCOLS,
            None,
            ["--table", "3", "--rows", "DiCo (iso.)", *where, *options, "--results", str(tmp_path)],
        )
        == 0
    )
    (plan,) = seen
    assert plan.resources == given
    assert not any(stage.compile or stage.graphs for job in plan.timings() for stage in job.stages)


def test_the_plan_counts_shared_networks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(TABLES, PROTOCOLS, None, ["--table", "3", "--dry-run", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 * 4 + 1
    assert len({line.split()[0] for line in lines}) == len(lines)
