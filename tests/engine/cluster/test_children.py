"""Jobs of `--cluster local` see the GPUs that the command sees."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.cluster.children import child_executor

TELL = "import os; print(ascii(os.environ.get('CUDA_VISIBLE_DEVICES')))"


@pytest.mark.parametrize("value", ["0", "3", "1,0", "GPU-8932f937", "-1", "", None])
def test_a_job_keeps_the_gpus_of_the_command(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    processes: list[subprocess.Popen[bytes]] = []
    executor = child_executor(tmp_path, processes)
    job = executor._submit_command(shlex.join([sys.executable, "-c", TELL]))
    (process,) = processes
    assert process.wait(60) == 0
    assert job.paths.stdout.read_text() == f"{value!a}\n"
