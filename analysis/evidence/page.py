"""The page of evidence: rows in order with intervals, pairs by verdict, and what is still missing.

No torch.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from analysis.evidence.pairs import (
    Pair,
    PairVerdict,
    Trained,
    pairs,
    paper_scores,
    subjects,
    trained,
)
from analysis.evidence.speeds import speed_agreement
from analysis.evidence.spreads import spread_blocks
from analysis.query import ReferenceStore
from analysis.tables.ablations import RECONSTRUCTED
from analysis.tables.caveats import record_caveats
from analysis.tables.pages import Block, Text, markdown, once, origins
from experiments.declared.campaign import BLOCKS, Ladder
from experiments.declared.protocols import at_half_length
from experiments.engine.records.score_names import CLASSIFIER_SCORES, HELDOUT_LOSS
from experiments.engine.reporting.paired import LEVEL, PairedComparison, rank_agreement
from experiments.engine.reporting.sheet import Cell, Column, Kind, Sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Cost
from experiments.engine.specs.stages import Protocol, distinct_networks, evaluate_stage, network

# Unresolved pairs of which the page says how many seeds they need.
NAMED_PAIRS = 10


def evidence_page(store: ReferenceStore) -> str:
    """The page as Markdown."""
    return markdown(evidence_blocks(store), store)


def evidence_blocks(store: ReferenceStore) -> list[Block]:
    """The page as blocks that know their records."""
    blocks: list[Block] = [
        Text("What the trainings on held-out images say of the paper's orders", 1),
        Text(
            "Every row is trained at a small size, at the learning rate that the validation part "
            "chose for it, and scored by its loss on test images: the geometric mean of the noise "
            "error over nine unit bins of log SNR. Lower is better. The replicate is the training "
            "seed: a seed gives all rows the same data order, times and noises, and the same "
            "initial weights where they share parameters. The scores are not the paper's. What "
            "compares is the order of the rows."
        ),
    ]
    for table, protocol in subjects():
        blocks += _subject_blocks(table, protocol, store)
    speeds = _speed_blocks(store)
    return [*blocks, *speeds, Text(RECONSTRUCTED)]


def _subject_blocks(table: Table, protocol: Protocol, store: ReferenceStore) -> list[Block]:
    """One table under one protocol."""
    full = trained(table, protocol, store)
    half = trained(table, at_half_length(protocol), store)
    title = f"Table {table.number} on {protocol.name}: {protocol.recipe.steps} steps"
    blocks: list[Block] = [Text(title, 2)]
    if not any(full.records.values()):
        return [*blocks, Text("Not trained yet.")]

    sheet = _order_sheet(full, half, store)
    blocks.append(sheet)
    comparison = full.comparison()
    if comparison is None:
        blocks.append(Text("Without two seeds of every row, no difference can be resolved."))
    else:
        blocks += _comparison_blocks(full, comparison, store)
    blocks += _rate_blocks(table, protocol, store)
    blocks += spread_blocks(table, protocol, store)
    if full.lacking:
        lacking = "; ".join(f"{row}: {seeds}" for row, seeds in full.lacking.items())
        blocks.append(Text(f"Seeds that a row lacks are left out for all rows ({lacking})."))

    records = once(record for row in sheet.rows for cell in row.values() for record in cell.records)
    blocks += [Text(note.text, records=records) for note in record_caveats(records)]
    return [*blocks, origins(sheet)]


def _order_sheet(full: Trained, half: Trained, store: ReferenceStore) -> Sheet:
    """The rows in the order of their loss."""
    agreement = CLASSIFIER_SCORES[full.protocol.features].agreement.key
    columns = [
        Column("row", "row", kind=Kind.PROSE),
        Column("loss", "held-out loss", digits=5),
        Column("above", "above the best, %"),
        Column("half", "loss at half length", digits=5),
        Column("doubling", "doubling changes, %"),
        Column("lr", "own lr", digits=5),
        Column("common", "at the common lr, %"),
        Column("params", "params, M", digits=3),
        Column("macs", "MACs, M", digits=1),
        Column("agreement", "agreement", digits=3),
        Column("paper", "paper's FID"),
    ]
    sheet = Sheet("", columns)
    rows = {row.label: row for row in distinct_networks(full.table, full.protocol)}
    means = {label: _log_mean(full, label) for label in rows}
    order = sorted(
        (label for label in rows if full.records[label]),
        key=lambda label: means[label],
    )
    paper = paper_scores(full.table, store)
    for label in order:
        records = tuple(full.records[label].values())
        earlier = tuple(half.records[label].values())
        loss, half_loss = means[label], _log_mean(half, label)
        counts = _counts(rows[label], full.protocol, store)
        sheet.add_row(
            {
                "row": Cell(label=label),
                "loss": Cell(math.exp(loss), records=records),
                "above": Cell(100 * math.expm1(loss - means[order[0]])),
                "half": Cell(math.exp(half_loss), records=earlier),
                "doubling": Cell(100 * math.expm1(loss - half_loss)),
                "lr": Cell(records[0].spec["train"]["recipe"]["lr"]),
                "common": _at_common_rate(rows[label], full.protocol, store),
                "params": counts[0],
                "macs": counts[1],
                "agreement": _mean_score(rows[label], full, agreement, store),
                "paper": Cell(paper.get(label)),
            }
        )
    return sheet


def _at_common_rate(row: Row, protocol: Protocol, store: ReferenceStore) -> Cell:
    """How far half a training's validation loss at the common rate is above that at its own."""
    ladder = Ladder(row, protocol)
    losses = ladder.losses(store)
    common = losses.get(protocol.recipe.lr)
    if common is None or not math.isfinite(common):
        return Cell()
    return Cell(100 * (common / losses[ladder.best(store)] - 1))


def _log_mean(side: Trained, label: str) -> float:
    """The mean of the log loss over a row's seeds; not a number without records."""
    losses = [record.values["heldout_loss"] for record in side.records[label].values()]
    return statistics.fmean(map(math.log, losses)) if losses else math.nan


def _counts(row: Row, protocol: Protocol, store: ReferenceStore) -> tuple[Cell, Cell]:
    """Parameters and MACs of the small network, in millions."""
    data = protocol.data
    stage = Cost(network(row, protocol), data.size, data.channels, data.num_classes)
    record = store.reference.latest(stage)
    if record is None:
        return Cell(), Cell()
    values = record.values
    return (
        Cell(values["params_trainable"] / 1e6, records=(record,)),
        Cell(values["macs_core"] / 1e6),
    )


def _mean_score(row: Row, side: Trained, name: str, store: ReferenceStore) -> Cell:
    """The mean of a score of the samples over the seeds that have one."""
    stages = [evaluate_stage(row, side.protocol, seed) for seed in side.records[row.label]]
    found = [record for stage in stages if (record := store.reference.latest(stage))]
    if not found:
        return Cell()
    value = statistics.fmean(record.values[name] for record in found)
    return Cell(value, records=tuple(found))


def _comparison_blocks(
    full: Trained, comparison: PairedComparison, store: ReferenceStore
) -> list[Block]:
    """What the seeds resolve, and how well the model of rows and seeds fits."""
    judged = pairs(full.table, full.protocol, store)
    counts = Counter(pair.verdict for pair in judged)
    lines = [f"{verdict.value}: {counts[verdict]}" for verdict in PairVerdict if counts[verdict]]
    low_to_high = _tau(comparison, paper_scores(full.table, store))
    checks = comparison.assumptions
    return [
        Text(
            f"Of {len(judged)} pairs at {full.protocol.recipe.steps} steps and "
            f"{comparison.num_seeds} seeds: {'; '.join(lines)}. {low_to_high}"
        ),
        Text(
            f"A difference is known to ±{comparison.half_width:.2f} % ({LEVEL:.0%}, all pairs "
            "together, Tukey's studentised range; residual of rows within seeds "
            f"{100 * comparison.residual:.2f} % with {comparison.degrees_of_freedom} degrees of "
            f"freedom). Its assumptions have the probabilities {checks.normal:.2g} (normal), "
            f"{checks.equal_variances:.2g} (equal variances) and {checks.additive:.2g} (rows and "
            "seeds add up)."
        ),
        *_seeds_needed(judged, comparison),
    ]


def _rate_blocks(table: Table, protocol: Protocol, store: ReferenceStore) -> list[Block]:
    """Whether the best rate moves from half to full length, for the rows that were tried."""
    labels = dict.fromkeys(
        label
        for block in BLOCKS
        if (block.table, block.protocol.name) == (table, protocol.name)
        for label in block.checked
    )
    texts, records = [], []
    for label in labels:
        stages = Ladder(table.row(label), protocol).full_stages()
        found = {rate: store.reference.latest(stage) for rate, stage in stages.items()}
        losses = {rate: r.values[HELDOUT_LOSS.key] for rate, r in found.items() if r}
        if len(losses) < len(stages):
            continue
        own, best = list(stages)[1], min(losses, key=lambda rate: losses[rate])
        moved = "does not move" if best == own else f"moves to {best:g}"
        above = ", ".join(
            f"{rate:g}: {100 * (losses[rate] / losses[own] - 1):+.2f} %" for rate in losses
        )
        texts.append(f"{label}: the best rate {moved} ({above})")
        records += [record for record in found.values() if record]
    if not texts:
        return []
    text = (
        "Rates were chosen at half length. At full length, by validation loss against that at the "
        f"chosen rate: {'; '.join(texts)}."
    )
    return [Text(text, records=tuple(records))]


def _speed_blocks(store: ReferenceStore) -> list[Block]:
    """How a CPU orders the rows by throughput; nothing without timings."""
    blocks: list[Block] = []
    for table in {table.number: table for table, _ in subjects()}.values():
        found = speed_agreement(table, store)
        if found:
            text = (
                f"Table {table.number}: the order of {len(found.records)} rows by throughput on "
                "the CPU (fp32) agrees with the paper's on an A100 with Kendall's tau "
                f"{found.agreement}. Every row varies by its own spread over rounds of timing."
            )
            blocks.append(Text(text, records=found.records))
    return [Text("The order by throughput", 2), *blocks] if blocks else []


def _tau(comparison: PairedComparison, paper: dict[str, float]) -> str:
    logs = {row: math.log(mean) for row, mean in comparison.means.items()}

    # the error of a mean over seeds, less what all rows share
    error = comparison.residual / math.sqrt(comparison.num_seeds)
    agreement = rank_agreement(logs, dict.fromkeys(logs, error), paper)
    return f"Kendall's tau with the paper's FID is {agreement}."


def _seeds_needed(judged: Sequence[Pair], comparison: PairedComparison) -> list[Block]:
    """The unresolved pairs that need the fewest seeds."""
    unresolved = {(p.a, p.b) for p in judged if p.verdict is PairVerdict.NOT_RESOLVED}
    needed = [
        (seeds, f"{difference.a} and {difference.b}")
        for difference in comparison.differences
        if (difference.a, difference.b) in unresolved
        and (seeds := comparison.seeds_needed(difference)) is not None
    ]
    if not needed:
        return []
    named = sorted(needed)[:NAMED_PAIRS]
    texts = "; ".join(f"{pair}: {seeds}" for seeds, pair in named)
    return [Text(f"Seeds that unresolved pairs would need, the fewest first: {texts}.")]
