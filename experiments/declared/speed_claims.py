"""The paper's claims about speed and Gflops, judged from records. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.declared.systems import SYSTEMS, counted
from experiments.declared.timings import MODES, figure_3, in_mode
from experiments.engine.jobs.pool import Job
from experiments.engine.records.store import Record, RecordFolder, Store
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.reporting.verdict import Judgement, Qualifier, Verdict
from experiments.engine.specs.spec import Backbone, Timing

Claim = dict[str, str]


@dataclass(frozen=True)
class Ratio:
    """A measured speed-up in one numeric mode, and whether it is what a claim says."""

    mode: str
    device: str
    value: float
    error: float
    holds: bool
    records: tuple[Record, ...]


def claim_stages(claim: Claim, device: str) -> list[Timing]:
    """The two networks of a claim about throughput, timed in turn in every mode; none where one of them is not to be had."""
    networks = [_network(claim[side]) for side in ("subject", "baseline")]
    if None in networks:
        return []
    (one, side), (two, _) = networks
    return _in_turn(one, two, side, device)


def _in_turn(one: str, two: str, side: int, device: str) -> list[Timing]:
    batch = (4 if side == 32 else 1) if device == "cpu" else 64 if side == 32 else 16
    return [
        in_mode(Timing(Backbone(one), side, 4, 1000, batch, device, baseline=Backbone(two)), mode)
        for mode in MODES[device]
    ]


def jobs(claims: Iterable[Claim], device: str) -> tuple[Job, ...]:
    """A job a pair of networks; on a CPU without the large ones, which take minutes."""
    pairs: dict[str, Job] = {}
    for claim in claims:
        timed = claim_stages(claim, device) if claim["metric"] == "throughput" else []
        if timed and (device == "cuda" or not {"xl", "h"} & set(timed[0].backbone.name.split("_"))):
            pairs.setdefault(
                str(timed), Job(f"{claim['subject']} and {claim['baseline']}", tuple(timed))
            )
    return tuple(pairs.values())


def _network(name: str) -> tuple[str, int] | None:
    label, _, resolution = name.partition("@")
    network = label.lower().replace("-", "_").replace("/", "_")
    return None if network == "dis_xl" else (network, int(resolution) // 8)


def ratios(claim: Claim, device: str, store: Store, source: RecordFolder) -> list[Ratio]:
    """What was measured of a claim; it holds where the ratio, within two errors and the printed digit, is at least the claimed one."""
    found = []
    for stage in claim_stages(claim, device):
        if record := source.latest(stage):
            value, error = record.values["relative"], record.values["relative_spread"]
            holds = value >= float(claim["value"]) - half_digit(claim["value"]) - 2 * error
            name = record.provenance["device"] if device == "cuda" else record.provenance["cpu"]
            found.append(Ratio(stage.precision, name, value, error, holds, (record,)))
    return found


def small_on_cpu(claim: Claim, store: Store, source: RecordFolder) -> str:
    """In words: size S of the families of a claim at its resolution on a CPU, in turn where they were timed so, else each alone; '' without records."""
    families = [claim[side].partition("-")[0] for side in ("subject", "baseline")]
    side = int(claim["subject"].rpartition("@")[2]) // 8
    alone = {
        stage.backbone.name.partition("_")[0]: stage
        for stage in figure_3("cpu")
        if stage.size == side
    }
    stages = [alone.get(family.lower()) for family in families]
    if None in stages:
        return ""
    (pair,) = _in_turn(*(stage.backbone.name for stage in stages), side, "cpu")
    if record := source.latest(pair):
        records = [record]
        value, error, how = (
            record.values["relative"],
            record.values["relative_spread"],
            f"timed in turn at batch {pair.batch}",
        )
    elif all(records := [source.latest(stage) for stage in stages]):
        one, two = (record.values["images_per_s"] for record in records)
        value, how = one / two, f"each timed alone at batch {stages[0].batch}"
        error = value * math.hypot(
            *(
                record.values["images_per_s_spread"] / record.values["images_per_s"]
                for record in records
            )
        )
    else:
        return ""
    return f"on a CPU in fp32, {families[0]}-S against {families[1]}-S is {value:.2f} ±{error:.2f}, {how}{', its scan as a loop over tokens' * looped(records)}"


def judge_ratios(ratios: Sequence[Ratio], device: str) -> Judgement:
    """The verdict on at least one ratio, with the modes that were not measured.

    A CPU says no more than a direction if it lacks the kernel that GPUs have.
    """
    if device == "cpu" and looped(record for ratio in ratios for record in ratio.records):
        (ratio,) = ratios
        return Judgement(_direction(ratio), (Qualifier.CPU_SCAN_LOOP,))

    # in which modes the claim holds
    modes = [ratio.mode for ratio in ratios if ratio.holds]
    if len(modes) == len(ratios):
        judgement = Judgement(Verdict.HOLDS)
    elif modes == ["as_published"]:
        judgement = Judgement(Verdict.HOLDS_AS_PUBLISHED)
    elif modes:
        judgement = Judgement(Verdict.HOLDS_IN_SOME_MODES, (" and ".join(modes),))
    else:
        judgement = Judgement(Verdict.DOES_NOT_HOLD)

    # what restricts it
    if device == "cpu":
        judgement = judgement.qualified(Qualifier.CPU_PROXY)
    measured = {ratio.mode for ratio in ratios}
    lacking = [mode for mode in MODES[device] if mode not in measured]
    if lacking:
        judgement = judgement.qualified(f"not measured in {' and '.join(lacking)}")
    return judgement


def _direction(ratio: Ratio) -> Verdict:
    if abs(ratio.value - 1) <= 2 * ratio.error:
        return Verdict.NO_DIRECTION
    return Verdict.SAME_DIRECTION if ratio.value > 1 else Verdict.OTHER_DIRECTION


def looped(records: Iterable[Record]) -> bool:
    """Whether a scan over tokens ran as a loop, by which no ratio of GPUs with their fused kernel can be judged."""
    return any(
        "loop" in record.provenance.get("kernels", {}).get("selective_scan", ())
        for record in records
    )


def claims_sheet(device: str, store: Store, source: RecordFolder | None = None) -> Sheet:
    """Every claim about throughput or Gflops: value, error and verdict by mode."""
    source = source or store.here
    sheet = Sheet(
        f"Claims about speed and Gflops, measured on this {device}",
        [("", name) for name in ("claim", "paper", "measured", "verdict", "source")],
    )
    for name, claim in store.published("claims.csv", ("id",)).items():
        if claim["metric"] == "throughput":
            found = ratios(claim, device, store, source)
            words = "; ".join(
                f"{ratio.value:.2f} ±{ratio.error:.2f} ({ratio.mode})" for ratio in found
            )
            said = (
                str(judge_ratios(found, device))
                if found
                else "not measured"
                if claim_stages(claim, device)
                else "not measurable: nobody described one of the two"
            )
            cell = Cell(label=words or "-", records=sum((ratio.records for ratio in found), ()))
        elif claim["metric"] == "gflops":
            cell, same, _ = gflops(claim, store, source)
            said = (
                "not counted" if same is None else "holds" if same else "not to the printed digit"
            )
        else:
            continue
        sheet.rows.append(
            [
                Cell(label=name),
                Cell(label=claim["value"]),
                cell,
                Cell(label=said),
                Cell(label=claim["source"]),
            ]
        )
    sheet.notes.append(
        "measured: ratio of images a second, both timed in turn, ± half the interquartile range, in each numeric mode; Gflops: counted exactly, by the published counter."
    )
    return sheet


def gflops(claim: Claim, store: Store, source: RecordFolder) -> tuple[Cell, bool | None, str]:
    """The counted percentage, or range over sizes, whether it rounds to the claimed one, and what it is of; None where a network is not counted."""
    sizes = ("S", "B", "L", "XL") if "{" in claim["subject"] else ("",)
    pairs = [
        [_counted(_of_size(claim[side], size), store, source) for side in ("subject", "baseline")]
        for size in sizes
    ]
    if any(cell.value is None for pair in pairs for cell in pair):
        return Cell(), None, ""
    shares = [100 * a.value / b.value for a, b in pairs]
    found = shares if claim["relation"] == "ratio_percent" else [100 - share for share in shares]
    limits = claim["value"].split("-")
    same = all(
        abs(value - float(limit)) <= half_digit(limit) + 1e-9
        for value, limit in zip((min(found), max(found)), limits, strict=False)
    )
    words = " to ".join(f"{value:.1f}" for value in sorted({min(found), max(found)})) + " %"
    return (
        Cell(
            label=words,
            value=statistics.fmean(found),
            records=sum((cell.records for pair in pairs for cell in pair), ()),
        ),
        same,
        "; ".join(f"{a.value:.2f} against {b.value:.2f}" for a, b in pairs),
    )


def _of_size(name: str, size: str) -> str:
    before, brace, after = name.partition("{")
    return name if not brace else before + size + after.partition("}")[2]


def _counted(name: str, store: Store, source: RecordFolder) -> Cell:
    label, _, resolution = name.partition("@")
    return next(
        (
            counted(system, store, source)[1]
            for system in SYSTEMS
            if (system.label, str(system.resolution)) == (label, resolution)
        ),
        Cell(),
    )


def half_digit(printed: str) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])
