"""A verdict on every claim of the paper, computed from committed records and published tables. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from analysis.claims import probes as claims_probes
from analysis.claims import scores as claims_scores
from analysis.claims.finding import (
    COUNTED,
    LEVELS,
    MEASURED,
    NOT_YET,
    PUBLISHED,
    REDUCED,
    VERDICTS,
    Finding,
    consistent,
    published,
)
from analysis.query import ReferenceStore
from analysis.tables.paper import with_caveats
from experiments.declared import speed_claims
from experiments.declared.systems import SYSTEMS
from experiments.engine.reporting.efficiency.claims import (
    Claim,
    Ratio,
    judge_gflops,
    judge_speed,
    looped,
    ratios,
    small_on_cpu,
)
from experiments.engine.reporting.efficiency.speed import unfused
from experiments.engine.reporting.sheet import Cell, Sheet


def judge(claim: Claim, store: ReferenceStore) -> Finding:
    """The strongest evidence there is; open where published data that it needs is unfit. ValueError for a claim that no rule judges."""
    kind = claim["metric"], claim["relation"]
    rule = claims_scores.BY_ID.get(claim["id"]) or BY_KIND.get(kind)
    if rule is None:
        raise ValueError(
            f"claim {claim['id']}: no rule for {' and '.join(map(repr, kind))}; known: {', '.join(map(repr, BY_KIND))}, or by id {', '.join(claims_scores.BY_ID)}"
        )
    try:
        return rule(claim, store)
    except ValueError as error:
        return Finding(NOT_YET, "", "open", str(error))


def claims_sheet(store: ReferenceStore) -> Sheet:
    """One row a claim of results/published/claims.csv; its basis leads to all records that were read to judge it."""
    columns = ["claim", "says", "paper", "evidence", "value", "error", "verdict", "basis", "source"]
    sheet = Sheet("Claims of the paper", [("", name) for name in columns])
    levels = []
    for claim in store.rows("claims.csv"):
        with store.noting() as noted:
            finding = judge(claim, store)
        levels.append(finding.evidence)
        words = [
            claim["id"],
            claim["claim"],
            claim["value"] or "-",
            finding.evidence,
            finding.value or "-",
            finding.error or "-",
            finding.verdict,
            finding.basis,
        ]
        cells = [
            Cell(label=text)
            for text in (*words, claim["source"].removeprefix("arXiv:2505.11196v1 "))
        ]
        own = finding.records if any(character.isdigit() for character in finding.error) else ()
        for at, records in ((4, finding.records), (5, own), (7, tuple(noted.values()))):
            cells[at] = replace(cells[at], records=records)
        sheet.rows.append(cells)
    sheet.notes.append(
        f"{len(levels)} claims: "
        + ", ".join(f"{levels.count(level)} {level}" for level in LEVELS if level in levels)
        + "."
    )
    sheet.notes += [f"{verdict}: {meaning}." for verdict, meaning in VERDICTS.items()]
    return with_caveats(sheet)


def _throughput(claim: Claim, store: ReferenceStore) -> Finding:
    """On a GPU; else by the claim's networks on a CPU, a proxy; else by the published table, small networks on a CPU beside it for scale."""
    if measured := _measured_speed(claim, store, "cuda"):
        return measured
    names = claim["subject"], claim["baseline"]
    speeds = [published(name, "throughput_img_s", store) for name in names]
    missing = " and ".join(name for name, speed in zip(names, speeds, strict=True) if speed is None)
    if missing:
        printed = f"the paper prints no throughput of {missing}, and no GPU record is committed"
    else:
        printed = f"Table {1 if names[0].endswith('@256') else 2}: {speeds[0]:g} over {speeds[1]:g} img/s on an A100; no GPU record here"
    if proxy := _measured_speed(claim, store, "cpu"):
        return replace(proxy, basis=f"{proxy.basis}; {printed}")
    networks = speed_claims.small_networks(claim)
    small = networks and small_on_cpu(
        networks.families, networks.pair, networks.alone, store.reference
    )
    basis = printed + (f". Not the claim's, for scale: {small}" if small else "")
    if missing:
        return Finding(NOT_YET, "", "open", basis)
    return Finding(
        PUBLISHED,
        f"{speeds[0] / speeds[1]:.2f}",
        consistent(speeds[0] / speeds[1], claim["value"]),
        basis,
        "one figure each, none given",
    )


def _measured_speed(claim: Claim, store: ReferenceStore, device: str) -> Finding | None:
    """Ratio of two networks' throughput in every numeric mode that they were timed in, in turn."""
    stages = speed_claims.claim_stages(claim, device)
    if not (found := ratios(claim, stages, store.reference)):
        return None
    value = "; ".join(
        f"{ratio.value:.2f} ±{ratio.error:.2f} ({ratio.mode}, {ratio.device})" for ratio in found
    )
    records = sum((ratio.records for ratio in found), ())
    if device == "cuda":
        evidence, basis = (
            MEASURED,
            "full batches timed in turn, synchronised but in the authors' own mode (as_published)"
            + _unfused(found),
        )
    else:
        scans = (
            "; the scan as a loop over tokens, for which GPUs have a fused kernel, so the claim cannot be judged so"
            * looped(records)
        )
        evidence, basis = (
            REDUCED,
            f"the claim's networks on a CPU, timed in turn at batch {records[0].spec['batch']}{scans}",
        )
    return Finding(
        evidence, value, str(judge_speed(found, stages)), basis, "within each value", records
    )


def _unfused(found: Sequence[Ratio]) -> str:
    """In words: what ran on a GPU without the fused kernel that there is for it, and in which modes."""
    modes: dict[str, list[str]] = {}
    for ratio in found:
        for how in unfused(ratio.records[0]):
            modes.setdefault(how, []).append(ratio.mode)
    return "".join(
        f"; {how}, without its fused kernel, in {' and '.join(names)}"
        for how, names in modes.items()
    )


def _gflops(claim: Claim, store: ReferenceStore) -> Finding:
    result = judge_gflops(claim, SYSTEMS, store.reference)
    if result is None:
        return Finding(
            NOT_YET,
            "",
            "open",
            "not every network of it has a count that reproduces the paper's counter",
        )
    off = (
        ""
        if "-" in claim["value"]
        else f": off by {result.cell.value - float(claim['value']):+.1f} points"
    )
    return Finding(
        COUNTED,
        result.cell.label,
        "reproduced" if result.holds else "not to the printed digit" + off,
        f"{result.counts} Gflops, counted here by the paper's counter",
        "exact",
        result.cell.records,
    )


BY_KIND: dict[tuple[str, str], Callable[[Claim, ReferenceStore], Finding]] = {
    ("throughput", "ratio"): _throughput,
    ("gflops", "reduction_percent"): _gflops,
    ("gflops", "ratio_percent"): _gflops,
    ("attention", "shape"): claims_probes.attention,
    ("channel activation", "more"): claims_probes.channels,
    **claims_scores.BY_KIND,
}
