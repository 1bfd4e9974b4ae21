"""Heartbeats that another process left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from experiments.engine.runtime.heartbeat import read_heartbeat

OTHER_JOB = dict(
    state="training", step=7, host="elsewhere", job_id="41", owner="other", reason=None, pid=5
)


def leave_heartbeat(folder: Path, age: float = 0.0, **changes: Any) -> None:
    """Write a heartbeat of another job, which is `age` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = OTHER_JOB | dict(updated=time.time()) | changes
    path = folder / "heartbeat.json"
    path.write_text(json.dumps(fields))
    written = time.time() - age
    os.utime(path, (written, written))


def heartbeat_in(folder: Path) -> dict[str, Any]:
    """Return the heartbeat in a folder, which must be there."""
    fields = read_heartbeat(folder)
    assert fields is not None, f"no heartbeat in {folder}"
    return fields
