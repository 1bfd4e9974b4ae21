"""The command line end to end, in processes of its own, on tables small enough to run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.ablation import TABLES
from experiments.declared.protocols import PROTOCOLS
from experiments.engine import cli
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime import heartbeat
from tests.support.commands import TABLE, hear_interrupts, is_running

ABLATION = REPOSITORY / "experiments" / "ablation.py"


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


# ---- Refusals


@pytest.mark.parametrize(
    "arguments, complaint",
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
    arguments: list[object], complaint: str, tmp_path: Path
):
    assert complaint in error_of(*arguments, "--results", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_results_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    error = error_of("--table", 5, "--results", tmp_path / "file" / "results")
    assert "choose another folder with --results" in error


# ---- Answers without a run


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

    # One process calls the command three times.
    flags = ("--dry-run", "--report", "--report --format csv")
    arguments = [f"--table 4 {flag} --results {tmp_path}" for flag in flags]
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


# ---- Runs


def count_records(root: Path) -> Counter[str]:
    """How many records there are, by kind and status."""
    records = [json.loads(path.read_text()) for path in root.glob("records/*/*.json")]
    return Counter(f"{record['kind']} {record['status']}" for record in records)


@pytest.fixture
def tiny_table(tmp_path: Path) -> Path:
    """A script whose table has two good rows and one that cannot be trained."""
    script = tmp_path / "tiny.py"
    script.write_text(TABLE.format(steps=5))
    return script


@pytest.mark.slow
def test_a_failing_row_is_shown_and_the_others_run_and_nothing_runs_twice(
    tiny_table: Path, tmp_path: Path
):
    root = tmp_path / "results"
    options = ("--table", 4, "--results", root)
    first = call(*options, script=tiny_table)
    assert first.returncode == 1, first.stderr

    # The row says that it failed, and a note says why.
    bad = next(line for line in first.stdout.splitlines() if line.startswith("bad"))
    assert "failed" in bad
    reason = "ValueError: window attention needs a grid divisible by its window"
    assert f"bad: train failed: {reason}" in first.stdout
    assert count_records(root) == {
        "cost done": 3,
        "timing done": 3,
        "train done": 2,
        "train failed": 1,
        "evaluate done": 2,
        "heldout done": 2,
    }
    assert not list(root.rglob("*.tmp"))

    # The good rows alone are done, and nothing of them runs again.
    kept = call(*options, "--rows", "good", "last", script=tiny_table)
    assert kept.returncode == 0
    assert kept.stderr == ""
    assert count_records(root)["train done"] == 2
    plan = call(*options, "--dry-run", script=tiny_table).stdout
    assert plan.count("  done") == 12
    assert "failed before, would run again" in plan


SAMPLED = """
from experiments import sample

sample.TABLES = {4: table}
raise SystemExit(sample.main())
"""


def draw(launcher: Sequence[str], script: Path, root: Path, out: Path) -> list[np.ndarray]:
    """Draw 260 images of the good row; return images and labels."""
    sizes = ("--num", 260, "--batch", 100)
    where = ("--results", root, "--out", out)
    command = [sys.executable, *launcher, script, "--table", 4, "--row", "good", *sizes, *where]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("260 images 8 x 8") == 1, done.stderr

    # The next drawing begins from nothing.
    for folder in root.glob("runs/*/samples"):
        shutil.rmtree(folder)
    with np.load(out) as file:
        return [file["arr_0"], file["arr_1"]]


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(tiny_table: Path, tmp_path: Path):
    root = tmp_path / "results"
    trained = call("--table", 4, "--results", root, "--rows", "good", script=tiny_table)
    assert trained.returncode == 0

    # The same table, with the script that samples in place of the one that trains.
    script = tmp_path / "draw.py"
    table = TABLE.format(steps=5).replace('if __name__ == "__main__":', "if False:")
    script.write_text(table + SAMPLED)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
    alone = draw((), script, root, tmp_path / "one.npz")
    together = draw(torchrun, script, root, tmp_path / "two.npz")
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cluster, sent, status, last_words",
    [
        ("here", signal.SIGINT, 130, "interrupted; run the same command again"),
        ("here", signal.SIGTERM, 143, ""),
        ("local", signal.SIGINT, 130, "interrupted; run the same command again"),
        ("local", signal.SIGTERM, 143, ""),
        ("debug", signal.SIGINT, 130, "interrupted; run the same command again"),
    ],
)
def test_an_interrupt_leaves_nothing_broken_and_nobody_at_work(
    cluster: str, sent: signal.Signals, status: int, last_words: str, tmp_path: Path
):
    """A terminal sends its signal to the command and its children alike."""
    script = tmp_path / "tiny.py"
    root = tmp_path / "results"
    script.write_text(TABLE.format(steps=100_000))
    options = ["--table", "4", "--rows", "good", "--results", str(root), "--cluster", cluster]

    # The signal comes while the training is at work.
    with open(tmp_path / "errors", "w") as errors:
        running = subprocess.Popen(
            [sys.executable, script, *options],
            stderr=errors,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            preexec_fn=hear_interrupts,
        )
        while not list(root.glob("runs/*/log.jsonl")):
            assert running.poll() is None
            time.sleep(0.05)
        os.killpg(running.pid, sent)
        assert running.wait() == status
    errors_text = (tmp_path / "errors").read_text()
    assert not last_words or errors_text.splitlines()[-1].startswith(last_words)
    assert "Traceback" not in errors_text
    assert errors_text.count("interrupted") == bool(last_words), errors_text

    # No worker is left, no file is half written, and no record of the training was made. A worker
    # that is too busy to stop is killed, and its last heartbeat stays.
    for folder in root.glob("runs/*"):
        beat = heartbeat.read_heartbeat(folder)
        if beat is None:
            continue
        for _ in range(600):
            if not is_running(beat["pid"]):
                break
            time.sleep(0.05)
        assert not is_running(beat["pid"])
    assert not list(root.rglob("*.tmp"))
    assert set(count_records(root)) == {"cost done", "timing done"}


# ---- Plans


@pytest.mark.parametrize(
    ("where", "options", "resources"),
    [
        (["--device", "cpu"], [], {}),
        (["--device", "cpu"], ["--compile"], {"compile": True}),
        (["--cluster", "slurm"], ["--compile", "--graphs"], {"compile": True, "graphs": True}),
    ],
)
def test_what_makes_runs_faster_is_a_resource_of_them(
    where: list[str],
    options: list[str],
    resources: dict[str, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    plans: list[cli.Plan] = []
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "8")
    monkeypatch.setattr(cli, "run_plan", lambda plan, *_: plans.append(plan) or True)
    monkeypatch.setattr(cli.slurm, "send", lambda plan, *_: plans.append(plan) or "")
    row = ["--table", "3", "--rows", "DiCo (iso.)", "--results", str(tmp_path)]
    assert cli.main(TABLES, PROTOCOLS, None, [*row, *where, *options]) == 0

    # It is no part of a timing, whose spec would name it.
    (plan,) = plans
    assert plan.resources == resources
    for stage in (stage for job in plan.timings() for stage in job.stages):
        assert not stage.compile
        assert not stage.graphs


def test_the_plan_counts_shared_networks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(TABLES, PROTOCOLS, None, ["--table", "3", "--dry-run", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    # Counts, timing, training, samples and held-out loss of six rows, then memory and time.
    assert len(lines) == 6 * 5 + 2
    assert len({line.split()[0] for line in lines}) == len(lines)
