"""Each network's own learning rate: chosen by validation loss, and kept in results/rates.csv.

A ladder trains a network at several rates, in factors of two, at half length and with one seed. The
best rate lies inside its ladder; a ladder whose best rate is at an end grows. Of rates whose losses
one seed cannot tell apart, the lowest is taken: just above the best rate a training may diverge
under another seed. No torch.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from experiments.engine.records.files import written_whole
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.stages import Protocol

PATH = REPOSITORY / "results" / "rates.csv"
COLUMNS = ("protocol", "network", "row", "lr")
FACTOR = 2.0  # between neighbouring rates
# Losses of one network that lie closer than this share are alike: a seed moves them by more.
ALIKE = 0.005
# Rates beyond these ends say that something else is wrong.
SMALLEST, LARGEST = 1e-5, 0.2


def with_chosen_rates(protocol: Protocol) -> Protocol:
    """Return the protocol with the rates that its ladders chose."""
    chosen = read_rates(PATH)
    rates = {network: lr for (name, network), (_, lr) in chosen.items() if name == protocol.name}
    return replace(protocol, rates=rates)


@cache
def read_rates(path: Path) -> Mapping[tuple[str, str], tuple[str, float]]:
    """Return row and rate by (protocol, id of the network); nothing if the file is missing.

    Raises:
        ValueError: a line is not as `write_rates` writes it.
    """
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}")
        rates = {}
        for line in reader:
            try:
                rate = float(line["lr"])
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {reader.line_num}: lr is no number") from None
            rates[line["protocol"], line["network"]] = (line["row"], rate)
        return rates


def write_rates(path: Path, rates: Mapping[tuple[str, str], tuple[str, float]]) -> None:
    """Write the file of chosen rates, whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (protocol, network), (row, lr) in sorted(rates.items()):
        writer.writerow((protocol, network, row, f"{lr:g}"))
    with written_whole(path) as file:
        file.write(text.getvalue().encode())
    read_rates.cache_clear()


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the lowest rate whose loss is like the lowest loss.

    A training that failed has the loss infinity.

    Raises:
        ValueError: no training has a loss.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("no training of the ladder ended with a loss; lower its rates")
    lowest = min(finite.values())
    return min(rate for rate, loss in finite.items() if loss <= lowest * (1 + ALIKE))


def _is_level(losses: Mapping[float, float]) -> bool:
    """Return whether the losses of the three lowest rates are alike: still lower ones are, too.

    So it is with a network that is tuned on from good weights.
    """
    ends = [losses[rate] for rate in sorted(losses)[:3]]
    return max(ends) <= min(ends) * (1 + ALIKE)


def missing_rates(ladder: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """Return the rates that a ladder still has to try: its own, or one beyond its end.

    Raises:
        ValueError: the best rate lies at the end of what can be tried.
    """
    untried = [rate for rate in ladder if rate not in losses]
    if untried:
        return untried
    best = best_rate(losses)
    lowest, highest = min(losses), max(losses)
    if lowest < best < highest or (best == lowest and _is_level(losses)):
        return []
    beyond = lowest / FACTOR if best == lowest else highest * FACTOR
    if not SMALLEST <= beyond <= LARGEST:
        raise ValueError(
            f"the best rate, {best:g}, is at the end of its ladder, which cannot grow further"
        )
    return [beyond]
