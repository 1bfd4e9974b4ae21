"""The boards that show a training: TensorBoard, and Weights & Biases if it is asked for."""

from __future__ import annotations

import importlib.util
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from experiments.engine.machine.environment import read_variable
from experiments.engine.records.files import written_whole

WANDB = "DICO_WANDB"  # environment variable: the Weights & Biases project that runs go to
TOKEN = "board-token"  # file in a run's folder


class Board(Protocol):
    """Takes the lines of a training's log."""

    def write(self, entry: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def require_boards() -> None:
    """Raise ValueError if Weights & Biases is asked for and not installed."""
    if read_variable(WANDB) and not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"${WANDB} asks for Weights & Biases, which is not installed: "
            f"pip install wandb, or unset {WANDB}"
        )


def open_boards(folder: Path, first: int) -> list[Board]:
    """Open the boards of a run that goes on after step `first`."""
    boards: list[Board] = []
    with suppress(ImportError):
        boards.append(_TensorBoard(folder, first))
    if read_variable(WANDB):
        require_boards()
        boards.append(_Wandb(folder))
    return boards


class _TensorBoard:
    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first + 1)

    def write(self, entry: dict[str, Any]) -> None:
        for name in entry.keys() - {"step"}:
            self.writer.add_scalar(name, entry[name], entry["step"])

    def close(self) -> None:
        self.writer.close()


def board_id(folder: Path) -> str:
    """Return a run's id on a shared board: its spec's, and a random token kept in its folder.

    A run that resumes keeps its id. The same spec in another results folder is another run, whose
    steps a board would drop under a common id.
    """
    path = folder / TOKEN
    token = path.read_text(errors="replace").strip() if path.exists() else ""

    # A damaged token is no one's.
    if not re.fullmatch("[0-9a-f]{8}", token):
        token = uuid.uuid4().hex[:8]
        with written_whole(path) as file:
            file.write(f"{token}\n".encode())
    return f"{folder.name}-{token}"


class _Wandb:
    """A run's page, which stays the same after every restart."""

    def __init__(self, folder: Path) -> None:
        import wandb

        self.run = wandb.init(
            project=read_variable(WANDB),
            id=board_id(folder),
            name=folder.name,
            dir=str(folder),
            resume="allow",
        )

    def write(self, entry: dict[str, Any]) -> None:
        values = {name: value for name, value in entry.items() if name != "step"}
        self.run.log(values, step=entry["step"])

    def close(self) -> None:
        self.run.finish()
