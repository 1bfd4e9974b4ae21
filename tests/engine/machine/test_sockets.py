"""Sockets of worker processes fit, whatever the temporary folder, and tables print anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.machine import sockets
from experiments.engine.records.tree import REPOSITORY

START_SERVER = """
import tempfile
from multiprocessing import forkserver, util
from experiments.engine.jobs.pool import _start_server
_start_server()
print(util.get_temp_dir())
print(tempfile.gettempdir())
"""
PRINT_TABLE = """
from experiments.engine.cli import run_command
raise SystemExit(run_command(lambda: print("FID 33.1 \\xb1 0.2 \\u2013 \\udcff") or 0))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: os.environ[name] for name in ("PATH",)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("short", True),
        ("x" * 100, False),
        ('it\'s 100% "odd" #1', True),
        ("é" * 45, False),
        ("a/" * 60 + "b", False),
        ("line\nbreak", True),
    ],
)
def test_the_server_starts_under_any_temporary_folder(name: str, stays: bool, tmp_path: Path):
    base = Path("/tmp") / f"dico-test-{os.getpid()}"
    folder = base / name
    folder.mkdir(parents=True)
    try:
        done = run(START_SERVER, TMPDIR=str(folder))
        assert done.returncode == 0, done.stderr
        used = done.stdout.decode()
        # everything but the sockets stays where the user wants it
        assert used.endswith(f"{folder}\n")
        assert used.startswith(str(folder)) is stays
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["rm", "-r", str(base)], check=True)


def test_a_machine_without_room_for_sockets_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []
    monkeypatch.setattr(sockets, "_takes_sockets", lambda folder: tried.append(folder) or False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="set TMPDIR to a folder with a short name"):
        sockets.prepare_socket_folder()
    assert len(tried) >= 4 and str(tmp_path) in tried


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"FID 33.1 ? 0.2 ? ?"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"FID 33.1 ? 0.2 ? ?"),
        ({"PYTHONIOENCODING": "latin-1"}, b"FID 33.1 \xb1 0.2 ? ?"),
        ({"PYTHONIOENCODING": "utf-8"}, b"FID 33.1 \xc2\xb1 0.2 \xe2\x80\x93 ?"),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            b"FID 33.1 ? 0.2 ? ?",
        ),
        ({"LANG": "C", "PYTHONUTF8": "1"}, b"FID 33.1 \xc2\xb1 0.2 \xe2\x80\x93 ?"),
    ],
)
def test_no_encoding_loses_a_table(environment: dict[str, str], line: bytes):
    done = run(PRINT_TABLE, **environment)
    assert (done.returncode, done.stdout.rstrip(b"\n"), done.stderr) == (0, line, b"")
