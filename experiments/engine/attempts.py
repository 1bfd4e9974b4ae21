"""Every attempt at a run, in `attempts.json` of its folder: where it started, how far it came and why it ended. Standard library only."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.engine.files import written_whole
from experiments.engine.heartbeat import Heartbeat

ATTEMPT_LIMIT = 5  # attempts of one job that may start at the same step


def begin_attempt(beat: Heartbeat, step: int) -> None:
    """Note that an attempt starts at `step`; one that was killed is closed with what its heartbeat, or its checkpoint, said last.

    Raises ValueError in one line when too many attempts of this job made no step that was kept: restarting has no end else.
    """
    attempts = read_attempts(beat.folder)
    if attempts and attempts[-1]["end"] is None:
        last = beat.before or {}
        attempts[-1] |= {
            "end": max(last.get("step") or 0, attempts[-1]["start"], step),
            "reason": last.get("reason") or "killed",
        }
    same = 0
    for attempt in reversed(attempts):
        if beat.fields["job_id"] is None or (attempt["job_id"], attempt["start"]) != (
            beat.fields["job_id"],
            step,
        ):
            break
        same += 1
    if same >= ATTEMPT_LIMIT:
        _write_attempts(beat.folder, attempts)
        raise ValueError(
            f"{same} attempts of job {beat.fields['job_id']} started at step {step} and kept no later one; the last ended: {attempts[-1]['reason']}"
        )
    who = {name: beat.fields[name] for name in ("job_id", "host", "world_size")}
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    _write_attempts(
        beat.folder,
        [*attempts, {"start": step, "end": None, "reason": None, "started": started, **who}],
    )


def end_attempt(folder: Path, step: int, reason: str) -> None:
    """Close the attempt that is open, if there is one."""
    attempts = read_attempts(folder)
    if attempts and attempts[-1]["end"] is None:
        attempts[-1] |= {"end": step, "reason": reason}
        with suppress(OSError):  # on a full disk the next attempt closes it
            _write_attempts(folder, attempts)


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """All attempts so far, oldest first."""
    try:
        return json.loads((folder / "attempts.json").read_bytes())
    except (OSError, ValueError):
        return []


def _write_attempts(folder: Path, attempts: list[dict[str, Any]]) -> None:
    with written_whole(folder / "attempts.json") as file:
        file.write(json.dumps(attempts, indent=1).encode())
