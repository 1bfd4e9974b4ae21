"""Verdicts on the paper's claims about speed and Gflops, from records. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.efficiency.counts import System, counted
from experiments.engine.reporting.efficiency.speed import AS_PUBLISHED
from experiments.engine.reporting.sheet import GAP, Cell, Column, Kind, NoteKind, Sheet
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict
from experiments.engine.specs.spec import Timing

Claim = dict[str, str]  # a row of results/published/claims.csv
SIZES = ("S", "B", "L", "XL")


@dataclass(frozen=True)
class Ratio:
    """A measured speed-up of two networks in one numeric mode."""

    mode: str
    # The name of the device.
    device: str
    value: float
    # Half the interquartile range.
    error: float
    # Whether the ratio is what the claim says.
    holds: bool
    records: tuple[Record, ...]


@dataclass(frozen=True)
class CountedClaim:
    """What was counted of a claim about Gflops."""

    # The percentage, or its range over sizes.
    cell: Cell
    # Whether it rounds to the claimed digits.
    holds: bool
    # The Gflops that it was computed from.
    counts: str


# ---- Throughput


def ratios(claim: Claim, stages: Sequence[Timing], source: RecordFolder) -> list[Ratio]:
    """Return what was measured of a claim.

    A ratio holds if it reaches the claimed one within two errors and the printed digit.

    Args:
        stages: the claim's networks, timed in turn in every mode of a device.
    """
    measured = []
    for stage in stages:
        record = source.latest(stage)
        if record is None:
            continue
        value, error = record.values["relative"], record.values["relative_spread"]
        holds = value >= float(claim["value"]) - half_digit(claim["value"]) - 2 * error
        name = record.provenance["device" if stage.device == "cuda" else "cpu"]
        measured.append(Ratio(stage.precision, name, value, error, holds, (record,)))
    return measured


def judge_speed(measured: Sequence[Ratio], stages: Sequence[Timing]) -> Judgement:
    """Return the verdict on at least one measured ratio, with the modes that lack one.

    On a CPU that runs a scan as a loop the verdict is a direction alone: GPUs have a fused kernel.

    Args:
        stages: the stages that the ratios were measured with, measured or not.
    """
    on_cpu = stages[0].device == "cpu"
    if on_cpu and looped(record for ratio in measured for record in ratio.records):
        (ratio,) = measured
        return Judgement(_direction(ratio), (Qualifier.CPU_SCAN_LOOP,))

    holding = [ratio.mode for ratio in measured if ratio.holds]
    if len(holding) == len(measured):
        judgement = Judgement(Verdict.HOLDS)
    elif not holding:
        judgement = Judgement(Verdict.DOES_NOT_HOLD)
    elif holding == [AS_PUBLISHED]:
        judgement = Judgement(Verdict.HOLDS_AS_PUBLISHED)
    else:
        judgement = Judgement(Verdict.HOLDS_IN_SOME_MODES, (" and ".join(holding),))

    if on_cpu:
        judgement = judgement.qualified(Qualifier.CPU_PROXY)
    modes = {ratio.mode for ratio in measured}
    lacking = [stage.precision for stage in stages if stage.precision not in modes]
    if lacking:
        judgement = judgement.qualified(f"not measured in {', '.join(lacking)}")
    return judgement


def _direction(ratio: Ratio) -> Verdict:
    if abs(ratio.value - 1) <= 2 * ratio.error:
        return Verdict.NO_DIRECTION
    return Verdict.SAME_DIRECTION if ratio.value > 1 else Verdict.OTHER_DIRECTION


def looped(records: Iterable[Record]) -> bool:
    """Return whether a scan over tokens ran as a loop, so that a GPU's ratio cannot be judged."""
    return any(
        "loop" in record.provenance.get("kernels", {}).get("selective_scan", ())
        for record in records
    )


def small_on_cpu(
    names: Sequence[str], pair: Timing, alone: Sequence[Timing], source: RecordFolder
) -> str:
    """Return in words how the smallest networks of a claim compare on a CPU; "" without records.

    Args:
        names: of the two families.
        pair: the two networks timed in turn, which counts more than each alone.
        alone: each network timed alone.
    """
    # A record counts as evidence once it is read, so the single timings are read last.
    in_turn = source.latest(pair)
    records = [in_turn] if in_turn else [record for record in map(source.latest, alone) if record]
    if in_turn:
        value, error = in_turn.values["relative"], in_turn.values["relative_spread"]
        how = f"timed in turn at batch {pair.batch}"
    elif len(records) == len(alone):
        first, second = (record.values["images_per_s"] for record in records)
        value = first / second
        shares = [
            record.values["images_per_s_spread"] / record.values["images_per_s"]
            for record in records
        ]
        error = value * math.hypot(*shares)
        how = f"each timed alone at batch {alone[0].batch}"
    else:
        return ""

    scan = ", with its scan as a loop over tokens" if looped(records) else ""
    return (
        f"on a CPU in fp32, {names[0]}-S against {names[1]}-S is {value:.2f} ±{error:.2f}, "
        f"{how}{scan}"
    )


def half_digit(printed: str) -> float:
    """Return half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


# ---- Gflops


def judge_gflops(
    claim: Claim, systems: Sequence[System], source: RecordFolder
) -> CountedClaim | None:
    """Return what was counted of a claim about Gflops; None if a network is not counted."""
    sizes = SIZES if "{" in claim["subject"] else ("",)
    pairs: list[tuple[float, float]] = []
    records: list[Record] = []
    for size in sizes:
        subject, baseline = (
            _same_counter(_of_size(claim[side], size), systems, source)
            for side in ("subject", "baseline")
        )
        if subject.value is None or baseline.value is None:
            return None
        pairs.append((subject.value, baseline.value))
        records += [*subject.records, *baseline.records]

    shares = [100 * ours / theirs for ours, theirs in pairs]
    if claim["relation"] != "ratio_percent":
        shares = [100 - share for share in shares]
    ends = (min(shares), max(shares))
    limits = claim["value"].split("-")
    holds = all(
        abs(value - float(limit)) <= half_digit(limit) + 1e-9
        for value, limit in zip(ends, limits, strict=False)
    )

    label = " to ".join(f"{value:.1f}" for value in sorted(set(ends))) + " %"
    counts = "; ".join(f"{ours:.2f} against {theirs:.2f}" for ours, theirs in pairs)
    cell = Cell(label=label, value=statistics.fmean(shares), records=tuple(records))
    return CountedClaim(cell, holds, counts)


def _of_size(name: str, size: str) -> str:
    """Return the name with a size in place of its braces: DiG-{S,B}/2@256 gives DiG-S/2@256."""
    before, brace, after = name.partition("{")
    return before + size + after.partition("}")[2] if brace else name


def _same_counter(name: str, systems: Sequence[System], source: RecordFolder) -> Cell:
    """Return a network's Gflops by the published counter, for a name such as DiCo-XL@256."""
    label, _, resolution = name.partition("@")
    for system in systems:
        if (system.label, str(system.resolution)) == (label, resolution):
            return counted(system, source)[1]
    return GAP


# ---- The sheet


def claims_sheet(
    device: str,
    systems: Sequence[System],
    stages_of: Callable[[Claim], Sequence[Timing]],
    store: Store,
    source: RecordFolder | None = None,
) -> Sheet:
    """Return every claim about throughput or Gflops with its value, error and verdict.

    Args:
        stages_of: gives the timings of a claim; none if nobody described one of its networks.
        source: the records to read; by default those of this results folder.
    """
    source = source or store.here
    titles = ("claim", "paper", "measured", "verdict", "source")
    sheet = Sheet(
        f"Claims about speed and Gflops, measured on this {device}",
        [Column(title, title, kind=Kind.PROSE) for title in titles],
    )

    # Only claims about speed and cost have a row here; the other ones are judged elsewhere.
    for name, claim in store.published("claims.csv", ("id",)).items():
        if claim["metric"] == "throughput":
            measured, judgement = _speed_cells(claim, stages_of(claim), source)
        elif claim["metric"] == "gflops":
            measured, judgement = _gflops_cells(claim, systems, source)
        else:
            continue
        sheet.add_row(
            {
                "claim": Cell(label=name),
                "paper": Cell(label=claim["value"]),
                "measured": measured,
                "verdict": Cell(label=str(judgement)),
                "source": Cell(label=claim["source"]),
            }
        )

    sheet.note(
        NoteKind.SPEED,
        "measured: for throughput, the ratio of images per second in each numeric mode, both "
        "networks timed in turn, ± half the interquartile range. Gflops are counted exactly, by "
        "the published counter.",
    )
    return sheet


def _speed_cells(
    claim: Claim, stages: Sequence[Timing], source: RecordFolder
) -> tuple[Cell, Judgement]:
    if not stages:
        reason = "nobody described one of the two"
        return GAP, Judgement(Verdict.NOT_MEASURABLE, (reason,))
    measured = ratios(claim, stages, source)
    if not measured:
        return GAP, Judgement(Verdict.NOT_MEASURED)
    label = "; ".join(f"{ratio.value:.2f} ±{ratio.error:.2f} ({ratio.mode})" for ratio in measured)
    records = tuple(record for ratio in measured for record in ratio.records)
    return Cell(label=label, records=records), judge_speed(measured, stages)


def _gflops_cells(
    claim: Claim, systems: Sequence[System], source: RecordFolder
) -> tuple[Cell, Judgement]:
    result = judge_gflops(claim, systems, source)
    if result is None:
        return GAP, Judgement(Verdict.NOT_COUNTED)
    return result.cell, Judgement(Verdict.HOLDS if result.holds else Verdict.NOT_TO_THE_DIGIT)
