"""A GPU session: its order, its ends, and what it leaves behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from experiments import benchmark, efficiency
from experiments.declared.benchmarks import BENCHMARK, EFFICIENCY, gpu_parts
from experiments.engine.benchmarks import session
from experiments.engine.benchmarks.session import Session
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.spec import Ceilings
from tests.support.commands import hear_interrupts, is_running

# Writes a record to the folder of the last argument.
RECORD = """
import sys
from pathlib import Path
from experiments.engine.specs.spec import Ceilings
from experiments.engine.records.store import Store
Store(Path(sys.argv[-1])).append(Ceilings('cpu', 'bf16'), 'done', {}, {})
"""
# Ignores SIGTERM and never ends.
STAYS = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
PARTS = {
    "records": ["-c", RECORD],
    "fails": ["-c", "raise SystemExit(3)"],
    "stays": ["-c", STAYS],
    "last": ["-c", ""],
}


@pytest.fixture(autouse=True)
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.declared, "gpu_parts", lambda *_: PARTS)
    monkeypatch.setattr(session, "BUNDLE_EVERY", 0.2)
    monkeypatch.setattr(session, "GRACE", 0.2)


def test_records_outlast_parts_that_fail_and_the_end_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The third part gets a second, the others have time."""
    run_part = Session.run_part

    def run_part_briefly(self: Session, command: list[str]) -> str:
        seconds = 1.0 if command == PARTS["stays"] else 300.0
        return run_part(Session(time.monotonic() + seconds, self.store, self.bundle), command)

    monkeypatch.setattr(Session, "run_part", run_part_briefly)
    # Four parts, of which two fail.
    bundle = tmp_path / "out" / "measured.tar.gz"
    results = ["--results", str(tmp_path / "results")]
    assert benchmark.main(["gpu", "--device", "cpu", *results, "--bundle", str(bundle)]) == 1
    ends = re.findall(r"== (\w+): (.*?)(?: after|$)", capsys.readouterr().out, re.MULTILINE)
    assert ends == [
        ("records", "done"),
        ("fails", "ended with 3"),
        ("stays", "cut off by the time"),
        ("last", "done"),
    ]

    # The records of the parts that ended are in the bundle.
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert Store(tmp_path / "elsewhere").here.latest(Ceilings("cpu", "bf16")).status == "done"


# A parent that runs a command as one of the benchmarks does; the command tells its number.
PARENTS = {
    "session": """
import sys, time
from pathlib import Path
from experiments.engine.benchmarks.session import Session
from experiments.engine.records.store import Store
Session(time.monotonic() + 120, Store(Path(sys.argv[1]))).run_part(["-c", sys.argv[2]])
""",
    "footprint": """
import sys
from experiments.engine.benchmarks.footprint import measure_footprint
measure_footprint([sys.executable, "-c", sys.argv[2]])
""",
}
CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"


@pytest.mark.parametrize("parent", list(PARENTS))
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_part_outlives_its_session(parent: str, sign: signal.Signals, tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENTS[parent], str(tmp_path), CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_interrupts,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(sign)
    process.wait(60)

    # The kernel sends the child's end just after that of its parent.
    end = time.monotonic() + 60
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(child)


def test_without_time_no_part_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["gpu", "--device", "cpu", "--minutes", "0", "--results", str(tmp_path)]
    assert benchmark.main(command) == 1
    assert capsys.readouterr().out.count("not begun, the time is over") == len(PARTS)


def test_a_later_call_continues_with_the_part_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["gpu", "--device", "cpu", "--results", str(tmp_path), "--from"]
    assert benchmark.main([*command, "last"]) == 0
    out = capsys.readouterr().out
    assert "== last: done" in out
    assert "fails" not in out
    assert benchmark.main([*command, "middle"]) == 2
    assert "--from takes a part: records; fails" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_are_commands_of_this_tree(device: str):
    for command in gpu_parts(device, ["dico_xl=models.py:DiCo_XL"]).values():
        assert all((REPOSITORY / word).is_file() for word in command if word.endswith(".py"))
        assert ("--against" in command) == (command[:2] == [BENCHMARK, "steps"])
        if device == "cpu":
            assert "--graphs" not in command
            assert "pytest" not in command


@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_parts_have_arguments_that_their_scripts_take(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Every part's command line is parsed and planned; nothing is run."""
    names = ("_run_loop", "_run_loader", "_run_steps", "_run_kernels")
    for name in names:
        monkeypatch.setattr(benchmark, name, lambda args: 0)
    for command in gpu_parts(device, []).values():
        if command[0] == BENCHMARK:
            assert benchmark.main(command[1:]) == 0
        if command[0] == EFFICIENCY:
            results = ["--results", str(tmp_path)]
            assert efficiency.main([*command[1:], "--dry-run", *results]) == 0
            assert capsys.readouterr().out


def test_the_tests_of_kernels_come_first_and_loops_of_minutes_last():
    parts = gpu_parts("cuda", [])
    assert list(parts)[:3] == ["kernel tests", "scan", "steps"]
    assert list(parts)[-1] == "sampling loops, eager"
    compared = [
        command[command.index("--precision") + 3 :]
        for command in parts.values()
        if command[:2] == [BENCHMARK, "steps"]
    ]
    assert compared == [[], ["--graphs"], ["--compile", "--graphs"], ["--compile"]]
    assert parts["sampling loops"][-4:] == ["--graphs", "--modes", "bf16", "tf32"]
    assert "--graphs" not in parts["sampling loops, eager"]
    assert "--modes" not in parts["sampling loops, eager"]
