"""An executor of submitit whose jobs are children of this process, and end with it."""

from __future__ import annotations

import os
import shlex
import subprocess
import uuid
from pathlib import Path
from typing import Any

from experiments.engine.machine.lifetime import bound


def child_executor(folder: Path, processes: list[subprocess.Popen[bytes]]) -> Any:
    """Return an executor that starts jobs as children, which join `processes`.

    submitit's own executor puts a process between them, which outlives the command and hides every
    GPU but the first. Here a job sees the environment of the command.
    """
    import submitit

    class ChildExecutor(submitit.LocalExecutor):
        def _submit_command(self, command: str) -> Any:
            name = uuid.uuid4().hex[:8]
            log = submitit.core.utils.JobPaths(self.folder, name, 0).stdout
            processes.append(_start(command, name, log))
            return submitit.LocalJob(self.folder, name, tasks=[0], process=processes[-1])

    return ChildExecutor(folder)


def _start(command: str, name: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a job, which then waits for its pickle. Its log holds both streams."""
    environment = os.environ | {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": name,
        "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_GLOBALID": "0",
        "SUBMITIT_LOCAL_LOCALID": "0",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            bound(shlex.split(command)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
