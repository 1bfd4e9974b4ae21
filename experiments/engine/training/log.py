"""What a run says of itself while it trains: JSON lines, the boards that are fed from them, and the watch over its loss."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.engine.records.files import written_whole
from experiments.engine.records.store import REPOSITORY
from experiments.engine.specs.spec import Backbone, Diffusion, Recipe, Train

WANDB = "DICO_WANDB"  # environment variable: the Weights & Biases project that runs go to
SPIKE, HISTORY, FEWEST = (
    5.0,
    20,
    10,
)  # a spike is SPIKE times the median of the last HISTORY means, of at least FEWEST


class Diverged(ValueError):
    """The loss is not finite or has jumped; `values` say where, for the record."""

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


def trouble(losses: Sequence[float], means: Sequence[float]) -> tuple[int, str] | None:
    """Place of the first bad loss among the latest and what is wrong with it, or None.

    Not finite anywhere is wrong. A spike is wrong only where most of the latest losses are far above what the logged
    means were for long: single bad batches, noise and slow drifts pass.
    """
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            return place, f"is {loss}"
    usual = statistics.median(means[-HISTORY:]) if len(means) >= FEWEST else math.inf
    if losses and statistics.median(losses) > SPIKE * usual:
        place = next(place for place, loss in enumerate(losses) if loss > SPIKE * usual)
        return place, f"has jumped to {statistics.median(losses):.4g}, from {usual:.4g} before,"
    return None


def require_boards() -> None:
    """ValueError in one line if Weights & Biases is asked for and not installed."""
    if os.environ.get(WANDB) and not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"${WANDB} asks for Weights & Biases, which is not installed: pip install wandb, or unset {WANDB}"
        )


class Log:
    """Loss and rate to `log.jsonl`; each line also to TensorBoard and, where asked, Weights & Biases. Lines after `first` are rewritten.

    Losses out of their `bands` are said at once, and by `warnings` at the end.
    """

    def __init__(self, folder: Path, first: int, bands: Sequence[Band] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # the last line of a killed run can be cut
                kept.append(json.loads(line))
        kept = [entry for entry in kept if entry["step"] <= first]
        self.losses, self.steps, self.bands = (
            [entry["loss"] for entry in kept],
            [entry["step"] for entry in kept],
            list(bands),
        )
        with written_whole(path) as file:  # whatever ends this process, the lines stay
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.file = path.open("a")
        self.boards = [board for board in (_tensorboard(folder, first), _wandb(folder)) if board]

    def write(self, **entry: Any) -> None:
        """One line: step, loss, lr, images_per_s."""
        self.steps.append(entry["step"])
        self.losses.append(entry["loss"])
        for words in departures(
            [band for band in self.bands if band[1] == entry["step"]], self.steps, self.losses
        ):
            print(f"warning: {words}", file=sys.stderr, flush=True)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for board in self.boards:
            board.write(entry)

    def warnings(self) -> dict[str, list[str]]:
        """For the record, where the loss was ever out of its bands."""
        found = departures(self.bands, self.steps, self.losses)
        return {"warnings": found} if found else {}

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        for board in self.boards:
            board.close()


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer, self.close = writer, writer.close

    def write(self, entry: dict[str, Any]) -> None:
        for name in entry.keys() - {"step"}:
            self.writer.add_scalar(name, entry[name], entry["step"])


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run, self.close = run, run.finish

    def write(self, entry: dict[str, Any]) -> None:
        self.run.log(
            {name: value for name, value in entry.items() if name != "step"}, step=entry["step"]
        )


def _tensorboard(folder: Path, first: int) -> _TensorBoard | None:
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return _TensorBoard(SummaryWriter(folder / "tensorboard", purge_step=first + 1))
    return None


def _wandb(folder: Path) -> _Wandb | None:
    """The run's page: the same one after every restart."""
    if not os.environ.get(WANDB):
        return None
    require_boards()
    import wandb

    return _Wandb(
        wandb.init(
            project=os.environ[WANDB],
            id=folder.name,
            name=folder.name,
            dir=str(folder),
            resume="allow",
        )
    )


def curve(means: Sequence[float], every: int) -> dict[str, Any]:
    """The loss over a run in at most 100 points: means of windows, of which the last can be shorter, of means over `every` steps."""
    wide = math.ceil(len(means) / 100) or 1
    windows = [means[at : at + wide] for at in range(0, len(means), wide)]
    return {
        "every": wide * every,
        "losses": [round(sum(window) / len(window), 6) for window in windows],
    }


# Where the loss of a published recipe should run: the authors' own logs as an early alarm. Standard library only.
Band = tuple[
    int, int, float, float
]  # first and last step of a window, its mean loss, how far another training's may lie from it
LOGS = REPOSITORY / "results" / "published" / "dico_logs.csv"
SHARE, ERRORS = (
    0.02,
    4,
)  # of the loss, and standard errors of its mean: neighbouring sizes of a network lie 1 to 4 % apart
PUBLISHED = Recipe(steps=0, batch=256)


def bands_of(spec: Train) -> list[Band]:
    """The windows of the authors' log of this training, none where it is not one of theirs: other network, data, objective or recipe."""
    plain = Backbone(spec.backbone.name, dict(input_size=32, in_channels=4, num_classes=1000))
    if (spec.data.name, spec.diffusion, spec.init_from, replace(spec.recipe, steps=0)) != (
        "imagenet256",
        Diffusion(),
        None,
        PUBLISHED,
    ) or spec.backbone != plain:
        return []
    with open(LOGS, newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["model"].lower().replace("-", "_") == spec.backbone.name and row["loss_sd"]
        ]
    return [
        (int(row["first_step"]), int(row["last_step"]), float(row["loss"]), _room(row))
        for row in rows
    ]


def _room(row: dict[str, str]) -> float:
    return SHARE * float(row["loss"]) + ERRORS * float(row["loss_sd"]) / int(row["lines"]) ** 0.5


def departures(bands: list[Band], steps: list[int], losses: list[float]) -> list[str]:
    """A line for each window that is over at the last of `steps` and whose mean loss is out of its band; losses are means up to their steps."""
    found = []
    for first, last, expected, room in bands:
        own = [loss for step, loss in zip(steps, losses, strict=True) if first <= step <= last]
        if own and steps[-1] >= last and abs(fmean(own) - expected) > room:
            found.append(
                f"the loss of steps {first} to {last} is {fmean(own):.4f}, the authors' log has {expected:.4f} ± {room:.4f}: data, latents' scale or recipe differ from theirs"
            )
    return found
