"""What a run says of itself while it trains: JSON lines, and what the boards make of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from experiments.engine.records.files import written_whole
from experiments.engine.training.bands import Band, departures
from experiments.engine.training.boards import open_boards
from experiments.engine.training.watch.blocks import Look

BLOCKS = "blocks.jsonl"  # file of a run's looks at its network's blocks


class Log:
    """Writes `log.jsonl`, one line for every few steps, and feeds the boards from it.

    Looks at the network's blocks have a file of their own, `blocks.jsonl`.

    Losses that leave their bands are reported at once, and by `warnings` at the end.

    Attributes:
        steps: Steps of all lines so far, those of earlier attempts included.
        losses: The loss of each of these lines.
    """

    def __init__(self, folder: Path, first: int, bands: Sequence[Band] = ()) -> None:
        """Open the log of a run that goes on after step `first`; later lines are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file, kept = _reopen(folder / "log.jsonl", first)
        self.blocks, _ = _reopen(folder / BLOCKS, first)
        self.steps: list[int] = [entry["step"] for entry in kept]
        self.losses: list[float] = [entry["loss"] for entry in kept]
        self.bands = list(bands)
        self.boards = open_boards(folder, first)

    def write(self, step: int, loss: float, lr: float, images_per_s: float) -> None:
        """Write one line, and warn if a window that ends here is out of its band."""
        self.steps.append(step)
        self.losses.append(loss)
        ending = [band for band in self.bands if band.last == step]
        for line in departures(ending, self.steps, self.losses):
            print(f"warning: {line}", file=sys.stderr, flush=True)

        entry = {"step": step, "loss": loss, "lr": lr, "images_per_s": images_per_s}
        _append(self.file, entry)
        for board in self.boards:
            board.write(entry)

    def write_look(self, look: Look) -> None:
        """Write one look at the network's blocks. Boards show what is finite of it."""
        line = look.line()
        _append(self.blocks, line)
        entry = {"step": look.step, "gradient_norm": line["gradient_norm"]} | {
            f"{name}/{block}": value
            for block, values in line["blocks"].items()
            for name, value in values.items()
        }
        for board in self.boards:
            board.write({name: value for name, value in entry.items() if value is not None})

    def warnings(self) -> list[str]:
        """Return where the loss was ever out of its bands."""
        return departures(self.bands, self.steps, self.losses)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.blocks.close()
        for board in self.boards:
            board.close()


def _reopen(path: Path, first: int) -> tuple[TextIO, list[dict[str, Any]]]:
    """Open a file of lines to append to, and return it with the lines up to step `first`."""
    kept = [entry for entry in _read(path) if entry["step"] <= first]

    # Whatever ends this process, the lines that were kept stay.
    with written_whole(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return path.open("a"), kept


def _append(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log. The last line of a killed run can be cut, and is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def curve(means: Sequence[float], every: int) -> dict[str, Any]:
    """Return the loss over a run in at most 100 points.

    Args:
        means: Mean loss over each `every` steps.
        every: Steps.

    Returns:
        `losses`, each the mean of a window (the last can be shorter), and the steps of a window
        as `every`.
    """
    width = math.ceil(len(means) / 100) or 1
    windows = [means[start : start + width] for start in range(0, len(means), width)]
    losses = [round(sum(window) / len(window), 6) for window in windows]
    return {"every": width * every, "losses": losses}
