"""A verdict on every claim of the paper, from committed records and published tables. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from analysis.claims.fid import judge_cca, judge_fid, judge_fid_ratio
from analysis.claims.finding import (
    MEANINGS,
    Evidence,
    Finding,
    Subject,
    check_consistency,
    open_finding,
    published_number,
)
from analysis.claims.orders import judge_kernels, judge_structures
from analysis.claims.probes import judge_attention, judge_channels
from analysis.claims.scaling import judge_scaling
from analysis.claims.version_2 import judge_convolution, judge_lead, judge_number
from analysis.query import ReferenceStore
from analysis.tables.caveats import add_caveats
from experiments.declared import speed_claims
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency import claims as efficiency
from experiments.engine.reporting.efficiency.claims import Claim, Ratio
from experiments.engine.reporting.efficiency.predicted_sheets import MODES, claim_cells
from experiments.engine.reporting.efficiency.predictions import read_predictions
from experiments.engine.reporting.efficiency.speed import unfused
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet
from experiments.engine.reporting.verdict import Judgement, Verdict

SOURCE_PREFIX = "arXiv:2505.11196v1 "


def judge(claim: Claim, store: ReferenceStore) -> Finding:
    """The strongest evidence on a claim; open if published data that it needs are unfit.

    Raises:
        ValueError: if no rule judges the claim.
    """
    metric = claim["metric"], claim["relation"]
    rule = BY_ID.get(claim["id"]) or BY_METRIC.get(metric)
    if rule is None:
        raise ValueError(
            f"claim {claim['id']}: no rule for {' and '.join(map(repr, metric))}; known: "
            f"{', '.join(map(repr, BY_METRIC))}, or by id {', '.join(BY_ID)}"
        )
    try:
        return rule(claim, store)
    except ValueError as error:
        return open_finding(str(error))


def claims_sheet(store: ReferenceStore) -> Sheet:
    """One row per claim; its basis leads to all records that were read to judge it."""
    titles = ["claim", "says", "paper", "evidence", "value", "error", "verdict", "basis", "source"]
    numbers = ("paper",)
    sheet = Sheet(
        "Claims of the paper",
        [
            Column(title, title, kind=Kind.NUMBER if title in numbers else Kind.PROSE)
            for title in titles
        ],
    )
    levels = []
    for claim in store.rows("claims.csv"):
        with store.noting() as noted:
            finding = judge(claim, store)
        levels.append(finding.evidence)
        sheet.add_row(_row_cells(claim, finding, tuple(noted.values())))

    # how many claims rest on what, and what the verdicts mean
    counts = [f"{levels.count(level)} {level.value}" for level in Evidence if level in levels]
    sheet.note(NoteKind.GENERAL, f"{len(levels)} claims: {', '.join(counts)}.")
    sheet.note(
        NoteKind.GENERAL,
        *(f"{verdict.value}: {meaning}." for verdict, meaning in MEANINGS.items()),
    )
    return add_caveats(sheet)


def _row_cells(claim: Claim, finding: Finding, noted: tuple[Record, ...]) -> dict[str, Cell]:
    error_records = finding.records if finding.error_measured else ()
    return {
        "claim": Cell(label=claim["id"]),
        "says": Cell(label=claim["claim"]),
        "paper": Cell(label=claim["value"]),
        "evidence": Cell(label=finding.evidence.value, choice=finding.evidence),
        "value": Cell(label=finding.value, records=finding.records),
        "error": Cell(label=finding.error, records=error_records),
        "verdict": Cell(label=str(finding.judgement)),
        "basis": Cell(label=finding.basis, records=noted),
        "source": Cell(label=claim["source"].removeprefix(SOURCE_PREFIX)),
    }


def judge_throughput(claim: Claim, store: ReferenceStore) -> Finding:
    """By a GPU; else by the claim's networks on a CPU; else by the published table.

    Without any of these, a prediction is all there is. Otherwise it stands beside the rest, as a
    small network on a CPU does for scale.
    """
    measured = _measured_speed(claim, store, "cuda")
    if measured:
        return measured
    subjects = claim["subject"], claim["baseline"]
    printed = _printed_speed(subjects, store)
    proxy = _measured_speed(claim, store, "cpu")
    if proxy:
        return replace(proxy, basis=f"{proxy.basis}; {printed}")

    small = _small_speed(claim, store)
    basis = printed + (f". Not the claim's, for scale: {small}" if small else "")
    prediction = _predicted_speed(claim, store)
    ours, other = (published_number(name, "throughput_img_s", store) for name in subjects)
    if ours is None or other is None:
        if prediction:
            return Finding(
                Evidence.PREDICTED, prediction, Judgement(Verdict.PREDICTED), basis, "unknown"
            )
        return open_finding(basis)
    if prediction:
        basis += f". Predicted: {prediction}"
    return Finding(
        Evidence.PUBLISHED,
        f"{ours / other:.2f}",
        check_consistency(ours / other, claim["value"]),
        basis,
        "one figure each, none given",
    )


def _predicted_speed(claim: Claim, store: ReferenceStore) -> str:
    """What the model says of a speed-up in every mode, in words; '' if it was not asked."""
    cells = claim_cells(claim, read_predictions(store.root))
    if not cells:
        return ""
    return "attained / bound on an A100 " + "; ".join(
        f"{cells[f'{mode}_attained'].text()} / {cells[f'{mode}_bound'].text()} ({mode})"
        for mode in MODES
    )


def _printed_speed(subjects: Sequence[str], store: ReferenceStore) -> str:
    """What the paper prints of two networks' throughput."""
    speeds = {name: published_number(name, "throughput_img_s", store) for name in subjects}
    missing = [name for name, speed in speeds.items() if speed is None]
    if missing:
        return (
            f"the paper prints no throughput of {' and '.join(missing)}, and no GPU record is "
            "committed"
        )
    table = Subject.parse(subjects[0]).file.removeprefix("table").removesuffix(".csv")
    listed = " over ".join(f"{speed:g}" for speed in speeds.values())
    # The second version does not say on which card.
    card = " on an A100" if table.isdecimal() else ""
    return f"Table {table}: {listed} img/s{card}; no GPU record here"


def _small_speed(claim: Claim, store: ReferenceStore) -> str:
    """How the smallest networks of a claim's families compare on a CPU; '' without records."""
    networks = speed_claims.small_networks(claim)
    if networks is None:
        return ""
    return efficiency.small_on_cpu(
        networks.families, networks.pair, networks.alone, store.reference
    )


def _measured_speed(claim: Claim, store: ReferenceStore, device: str) -> Finding | None:
    """Ratio of two networks' throughput in every numeric mode in which they were timed in turn."""
    stages = speed_claims.claim_stages(claim, device)
    ratios = efficiency.ratios(claim, stages, store.reference)
    if not ratios:
        return None

    # A CPU can only show a reduced form of what the paper measured on a GPU.
    records = tuple(record for ratio in ratios for record in ratio.records)
    if device == "cuda":
        evidence = Evidence.MEASURED
        basis = (
            "full batches timed in turn, synchronised but in the authors' own mode (as_published)"
            f"{_describe_unfused(ratios)}"
        )
    else:
        evidence = Evidence.REDUCED
        batch = records[0].spec["batch"]
        basis = f"the claim's networks on a CPU, timed in turn at batch {batch}"
        if efficiency.looped(records):
            basis += (
                "; the scan runs as a loop over tokens, for which GPUs have a fused kernel, so the "
                "claim cannot be judged this way"
            )

    # One claim may be timed in several modes, and the finding names them all.
    value = "; ".join(
        f"{ratio.value:.2f} ±{ratio.error:.2f} ({ratio.mode}, {ratio.device})" for ratio in ratios
    )
    judgement = efficiency.judge_speed(ratios, stages)
    return Finding(evidence, value, judgement, basis, "within each value", False, records)


def _describe_unfused(ratios: Sequence[Ratio]) -> str:
    """What ran on a GPU without its fused kernel, and in which modes."""
    modes: dict[str, list[str]] = {}
    for ratio in ratios:
        for description in unfused(ratio.records[0]):
            modes.setdefault(description, []).append(ratio.mode)
    return "".join(
        f"; {description}, without its fused kernel, in {' and '.join(names)}"
        for description, names in modes.items()
    )


def judge_gflops(claim: Claim, store: ReferenceStore) -> Finding:
    """A printed percentage of Gflops beside the counted one."""
    counted = efficiency.judge_gflops(claim, speed_claims.COUNTED, store.reference)
    if counted is None:
        return open_finding("not every network of it has a count by the paper's counter")
    judgement = Judgement(Verdict.REPRODUCED if counted.holds else Verdict.NOT_TO_THE_DIGIT)

    # a printed range has no single difference
    value = counted.cell.value
    if not counted.holds and "-" not in claim["value"] and value is not None:
        points = value - float(claim["value"])
        judgement = judgement.qualified(f"off by {points:+.1f} points")
    return Finding(
        Evidence.COUNTED,
        counted.cell.label,
        judgement,
        f"{counted.counts} Gflops, counted here by the paper's counter",
        "exact",
        records=counted.cell.records,
    )


Rule = Callable[[Claim, ReferenceStore], Finding]

# By the metric and the relation of a claim.
BY_METRIC: dict[tuple[str, str], Rule] = {
    ("throughput", "ratio"): judge_throughput,
    ("gflops", "reduction_percent"): judge_gflops,
    ("gflops", "ratio_percent"): judge_gflops,
    ("attention", "shape"): judge_attention,
    ("channel activation", "more"): judge_channels,
    ("fid", "value"): judge_fid,
    ("fid", "ratio"): judge_fid_ratio,
}

# By the id of a claim that has a rule of its own.
BY_ID: dict[str, Rule] = {
    "cca-fid": judge_cca,
    "structure-order": judge_structures,
    "kernel-order": judge_kernels,
    "scaling-order": judge_scaling,
    "flowdcn-order": partial(judge_lead, "tablev2-12.csv"),
    "lightningdit-order": partial(judge_lead, "tablev2-13.csv"),
    "fid-lightningdit": judge_number,
    "fid-coco-cross": judge_number,
    "fid-coco-dwc": judge_number,
    "text-convolution": judge_convolution,
}
