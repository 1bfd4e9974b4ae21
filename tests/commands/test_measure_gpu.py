"""The script that measures on a GPU: its order, its ends, and what it leaves behind. The parts themselves are tested where they are."""

from __future__ import annotations

import re
import sys
import tarfile
import time
from pathlib import Path

import pytest

from experiments import measure_gpu
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.specs.spec import Ceilings


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--device", "cpu", *arguments])
    return measure_gpu.main()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that leave a record, fail, and never end."""
    record = "import sys; from pathlib import Path; from experiments.engine.specs.spec import Ceilings; from experiments.engine.records.store import Store; "
    record += "Store(Path(sys.argv[-1])).append(Ceilings('cpu', 'bf16'), 'done', {}, {})"
    stays = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('stays', flush=True); time.sleep(600)"
    monkeypatch.setattr(
        measure_gpu,
        "parts",
        lambda *_: {
            "records": ["-c", record],
            "fails": ["-c", "raise SystemExit(3)"],
            "stays": ["-c", stays],
            "last": ["-c", ""],
        },
    )
    monkeypatch.setattr(measure_gpu, "OFTEN", 0.2)
    monkeypatch.setattr(measure_gpu, "GRACE", 0.2)


def test_what_was_measured_outlasts_parts_that_fail_and_the_end_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None
):
    bundle, left = tmp_path / "out" / "measured.tar.gz", iter([300.0] * 2)
    run = measure_gpu._run

    def short(command: list[str], end: float, *rest: object) -> str:
        return run(command, end if next(left, None) else time.monotonic() + 1.0, *rest)

    monkeypatch.setattr(measure_gpu, "_run", short)
    assert call(monkeypatch, "--results", str(tmp_path / "results"), "--bundle", str(bundle)) == 1
    ends = re.findall(r"== (\w+): (.*?)(?: after|$)", capsys.readouterr().out, re.MULTILINE)
    assert ends == [
        ("records", "done"),
        ("fails", "ended with 3"),
        ("stays", "cut off by the time"),
        ("last", "done"),
    ]
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert Store(tmp_path / "elsewhere").here.latest(Ceilings("cpu", "bf16")).status == "done"


def test_a_later_call_goes_on_with_the_part_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None
):
    assert call(monkeypatch, "--results", str(tmp_path), "--from", "last") == 0
    assert "== last: done" in (out := capsys.readouterr().out) and "fails" not in out
    assert call(monkeypatch, "--results", str(tmp_path), "--from", "middle") == 2
    assert "--from takes a part: records; fails" in capsys.readouterr().err


def test_parts_are_commands_of_this_tree_and_the_tests_of_kernels_come_first():
    for device in ("cuda", "cpu"):
        found = measure_gpu.parts(device, ["dico_xl=models.py:DiCo_XL"])
        for command in found.values():
            assert all((REPOSITORY / word).is_file() for word in command if word.endswith(".py"))
            assert ("--against" in command) == any("benchmark_steps" in word for word in command)
    assert list(measure_gpu.parts("cuda", []))[:3] == ["kernel tests", "scan", "steps"]
    compared = [
        command[command.index("--precision") + 3 :]
        for command in measure_gpu.parts("cuda", []).values()
        if "experiments/benchmark_steps.py" in command
    ]
    assert compared == [[], ["--graphs"], ["--compile", "--graphs"], ["--compile"]]
    loops = {
        name: command
        for name, command in measure_gpu.parts("cuda", []).items()
        if "sampling" in command
    }
    assert (
        [
            command[command.index("--modes") + 1 :] if "--modes" in command else []
            for command in loops.values()
        ]
        == [["bf16", "tf32"], []]
        and ["--graphs" in command for command in loops.values()] == [True, False]
        and list(measure_gpu.parts("cuda", []))[-1] in loops
    )
    assert not any("--graphs" in command for command in measure_gpu.parts("cpu", []).values())
