"""Every attempt at a run: where it started, how far it came and why it ended.

The list is `attempts.json` in the run's folder. Standard library only.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.engine.records.files import written_whole
from experiments.engine.runtime.heartbeat import Heartbeat

ATTEMPT_LIMIT = 5  # attempts of one job that may start at the same step

Attempt = dict[str, Any]


def begin_attempt(heartbeat: Heartbeat, step: int) -> None:
    """Note that an attempt starts at `step`, and close the attempt before it if it was killed.

    Raises:
        ValueError: Too many attempts of this job kept no step. Restarting would not end otherwise.
    """
    attempts = read_attempts(heartbeat.folder)
    _close_killed(attempts, heartbeat.previous or {}, step)

    fruitless = _count_fruitless(attempts, heartbeat.fields["job_id"], step)
    if fruitless >= ATTEMPT_LIMIT:
        _write(heartbeat.folder, attempts)
        raise ValueError(
            f"{fruitless} attempts of job {heartbeat.fields['job_id']} started at step {step} "
            f"and kept no later one; the last ended: {attempts[-1]['reason']}"
        )

    attempt = {
        "start": step,
        "end": None,
        "reason": None,
        "started": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
        "job_id": heartbeat.fields["job_id"],
        "host": heartbeat.fields["host"],
        "world_size": heartbeat.fields["world_size"],
    }
    _write(heartbeat.folder, [*attempts, attempt])


def end_attempt(folder: Path, step: int, reason: str) -> None:
    """Close the attempt that is open, if there is one."""
    attempts = read_attempts(folder)
    if attempts and attempts[-1]["end"] is None:
        attempts[-1] |= {"end": step, "reason": reason}
        # On a full disk the next attempt closes it.
        with suppress(OSError):
            _write(folder, attempts)


def read_attempts(folder: Path) -> list[Attempt]:
    """Return all attempts so far, oldest first."""
    try:
        attempts: list[Attempt] = json.loads((folder / "attempts.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    return attempts


def _close_killed(attempts: list[Attempt], previous: dict[str, Any], step: int) -> None:
    """Close an open attempt, which was killed, with what its heartbeat or checkpoint said last."""
    if attempts and attempts[-1]["end"] is None:
        attempts[-1] |= {
            "end": max(previous.get("step") or 0, attempts[-1]["start"], step),
            "reason": previous.get("reason") or "killed",
        }


def _count_fruitless(attempts: list[Attempt], job: str | None, step: int) -> int:
    """Count the latest attempts of a job that all started at `step`."""
    if job is None:
        return 0
    count = 0
    for attempt in reversed(attempts):
        if (attempt["job_id"], attempt["start"]) != (job, step):
            break
        count += 1
    return count


def _write(folder: Path, attempts: list[Attempt]) -> None:
    with written_whole(folder / "attempts.json") as file:
        file.write(json.dumps(attempts, indent=1).encode())
