"""What was measured of files, kept beside them until their size or time of change differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.engine.machine.system_errors import naming
from experiments.engine.records.files import written_whole


def measure_once(
    paths: Sequence[Path], name: str, measure: Callable[[], Any], version: str = ""
) -> Any:
    """Return what `measure` says of files, from beside the first of them if none has changed.

    Args:
        paths: the files; a folder stands for the files in it.
        name: of what is measured.
        measure: computes it, as something that JSON holds.
        version: of whatever else decides the result, such as a decoder.
    """
    state = [version, *(part for path in paths for part in _state_of(path))]
    kept = paths[0].with_name(f".{paths[0].name}.{name}.json")
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(kept.read_text())
        if stored["state"] == state:
            return stored["value"]

    # Nothing is lost where the folder may only be read: the next call measures again.
    value = measure()
    with suppress(OSError), written_whole(kept) as file:
        file.write(json.dumps({"state": state, "value": value}).encode())
    return value


def _state_of(path: Path) -> list[list[str | int]]:
    """Name, size and times of change of a file, or of every file in a folder."""
    with naming("look at", path):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        states: list[list[str | int]] = []
        for file in files:
            status = file.stat()
            states.append([file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return states
