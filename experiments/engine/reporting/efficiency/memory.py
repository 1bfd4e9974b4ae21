"""What memory a training needs in one process, from lines that were traced. No torch.

`results/predictions/memory.csv` holds the lines. At every moment of a step, what is alive is a
number of bytes and so many more per image. The peak is the highest of these lines at the
micro-batch, so a few of them describe all micro-batches.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from experiments.engine.records.files import written_whole
from experiments.engine.reporting.efficiency.predictions import FOLDER
from experiments.engine.specs.spec import Backbone, Recipe, spec_id

FILE = "memory.csv"
GB = 1e9
# Bytes of AdamW's two moments for every byte of a trained parameter.
MOMENTS = 2
# Power-function averages that a training can keep beside its own average.
POWER_AVERAGES = 2


class Gradients(StrEnum):
    """What a line says of gradients."""

    # They come during the backward pass and are a part of the line.
    COMING = "coming"
    # They lie there from the first pass on and are counted apart.
    APART = "apart"


class Sharding(StrEnum):
    """What each of several processes keeps a part of."""

    NOTHING = "DDP"
    OPTIMISER = "ZeRO-1"
    ALL = "fully sharded"


@dataclass(frozen=True)
class Line:
    """Bytes at one moment of a step."""

    fixed: int
    per_image: int

    def at(self, images: int) -> int:
        """Return the bytes at a micro-batch."""
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Settings:
    """How a training runs."""

    # Processes that share a batch.
    processes: int = 1
    sharding: Sharding = Sharding.NOTHING
    # Whether a process takes its share of a batch in several micro-batches.
    accumulates: bool = False
    # Averages of the weights.
    averages: int = 1


@dataclass(frozen=True)
class Needs:
    """The memory of one network's training in a numeric mode, in bytes."""

    # Id of the network without its code.
    network: str
    # Its registered name, and the side of its input, for those who read the file.
    name: str
    size: int
    precision: str
    # Whether blocks are computed again in the backward pass.
    recompute: bool
    # Parameters and buffers, and of these what is trained.
    weights: int
    trained: int
    # Trained parameters of the largest block, and of what is no block.
    block: int
    outside: int
    lines: dict[Gradients, tuple[Line, ...]] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Return what the needs are found by."""
        return self.network, self.precision, self.recompute


# A network's id, a numeric mode, and whether blocks are computed again.
Key = tuple[str, str, bool]


@dataclass(frozen=True)
class Parts:
    """What the bytes of a process are, at the peak of a step."""

    parameters: int
    gradients: int
    optimiser: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.parameters + self.gradients + self.optimiser + self.averages + self.activations


def network_id(backbone: Backbone) -> str:
    """Return the id of a network, whatever study it comes from."""
    return spec_id(Backbone(backbone.name, backbone.options))


def averages_of(recipe: Recipe) -> int:
    """Return the number of averages of the weights that a training keeps."""
    return 1 + (POWER_AVERAGES if recipe.power_snapshots else 0)


def split_needs(needs: Needs, settings: Settings, images: int) -> Parts:
    """Return what a process needs at a micro-batch of so many images."""
    sharded = settings.processes if settings.sharding is Sharding.ALL else 1
    updated = settings.processes if settings.sharding is not Sharding.NOTHING else 1
    fixed = Parts(
        parameters=needs.weights // sharded,
        gradients=needs.trained // sharded,
        optimiser=MOMENTS * needs.trained // updated,
        averages=settings.averages * needs.weights // sharded,
        activations=_gathered(needs) if sharded > 1 else 0,
    )
    return Parts(
        fixed.parameters,
        fixed.gradients,
        fixed.optimiser,
        fixed.averages,
        fixed.activations + _activations(needs, settings, images),
    )


def _gathered(needs: Needs) -> int:
    """Return what a sharded process gathers at most, as measured of PyTorch's fully_shard.

    While a block runs backward, its parameters and gradients are whole, the next block's parameters
    arrive and are copied, and gradients are laid together to be exchanged. Parameters of what is no
    block stay whole; at the end its gradients are laid together too.
    """
    return max(5 * needs.block + needs.outside, 3 * needs.outside)


def _activations(needs: Needs, settings: Settings, images: int) -> int:
    """Return what is alive at the peak beside states and whole gradients."""
    if settings.processes == 1 and not settings.accumulates:
        return max(line.at(images) for line in needs.lines[Gradients.COMING]) - needs.trained
    return max(line.at(images) for line in needs.lines[Gradients.APART])


def largest_micro_batch(needs: Needs, settings: Settings, budget: float) -> int:
    """Return the most images of a micro-batch that fit a number of bytes; 0 if none does."""
    fits = 0
    tried = 1
    while split_needs(needs, settings, tried).total <= budget:
        fits, tried = tried, 2 * tried

    # Between a micro-batch that fits and one that does not, halve the distance.
    while tried - fits > 1:
        middle = (fits + tried) // 2
        if split_needs(needs, settings, middle).total <= budget:
            fits = middle
        else:
            tried = middle
    return fits


def highest_lines(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Return the lines that are the highest at some number of images from 1 on."""
    highest: list[Line] = []
    for line in sorted(set(lines), key=lambda line: (line.per_image, line.fixed)):
        while highest and _is_covered(highest, line):
            highest.pop()
        highest.append(line)

    # What is the highest below one image alone is none.
    while len(highest) > 1 and highest[1].at(1) >= highest[0].at(1):
        del highest[0]
    return tuple(highest)


def _is_covered(highest: Sequence[Line], line: Line) -> bool:
    """Tell whether the last line is nowhere above both the one before it and a steeper one."""
    last = highest[-1]
    if line.fixed >= last.fixed:
        return True
    if len(highest) < 2:
        return False

    # The steeper line passes the one before the last no later than the last does.
    before = highest[-2]
    by_last = (before.fixed - last.fixed) * (line.per_image - before.per_image)
    by_line = (before.fixed - line.fixed) * (last.per_image - before.per_image)
    return by_line <= by_last


# ---- The file

_FIELDS = ("network", "name", "size", "precision", "recompute")
_BYTES = ("weights", "trained", "block", "outside")
_LINE = ("gradients", "fixed", "per_image")


def write_needs(root: Path, needs: Iterable[Needs]) -> None:
    """Write the file below a results folder, one line of it for every traced line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_FIELDS, *_BYTES, *_LINE))
    for each in needs:
        common = [getattr(each, name) for name in (*_FIELDS, *_BYTES)]
        for gradients, lines in each.lines.items():
            writer.writerows((*common, gradients, x.fixed, x.per_image) for x in lines)
    with written_whole(root / FOLDER / FILE) as file:
        file.write(text.getvalue().encode())


def read_needs(root: Path) -> dict[Key, Needs]:
    """Read the file below a results folder; nothing if there is none.

    Raises:
        ValueError: the file lacks a column, or holds what is no number.
    """
    path = root / FOLDER / FILE
    if not path.exists():
        return {}
    needs: dict[Key, Needs] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                _add_line(needs, line)
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path.name}, line {number} is not what was traced; remove the file and run "
                    "experiments/efficiency.py --memory"
                ) from None
    return needs


def _add_line(needs: dict[Key, Needs], line: dict[str, str]) -> None:
    """Add a line of the file to what was read."""
    new = Needs(
        line["network"],
        line["name"],
        int(line["size"]),
        line["precision"],
        {"True": True, "False": False}[line["recompute"]],
        weights=int(line["weights"]),
        trained=int(line["trained"]),
        block=int(line["block"]),
        outside=int(line["outside"]),
    )
    known = needs.setdefault(new.key, new)
    gradients = Gradients(line["gradients"])
    traced = Line(int(line["fixed"]), int(line["per_image"]))
    known.lines[gradients] = (*known.lines.get(gradients, ()), traced)
