"""What a small protocol says about Tables 3 and 4, with its uncertainty: numbers first, then one page of text made from them. No torch."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.query import Sources, scores_of
from analysis.tables import ranks
from experiments.ablation import TABLES
from experiments.engine.render import render
from experiments.engine.report import SCORES, Sheet, main_sheet
from experiments.engine.rows import Table
from experiments.engine.spread import LEVEL, pooled, reach, scaled
from experiments.protocols import CIFAR10_CLASSIFIER, CIFAR10_SMALL, DIGITS, Protocol, timing_stage

PAPER = {"fd": "fid", "is": "is", "precision": "precision", "recall": "recall"}  # our scores by the start of their names
FULL = {CIFAR10_SMALL.name: CIFAR10_CLASSIFIER}  # of what a protocol is the small form
DRAWS, FEW = 2000, 10  # redrawn orders; repeated runs below which a spread is poorly known


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of our row means with the paper's column.

    `low`, `high`: central 95 % of Kendall's tau over fresh draws of our seeds' noise; `chance`: share of random orders
    that agree at least as well; `ceiling`: mean tau of two such draws with each other, which no comparison can exceed.
    `freedom`: repeated runs from which that noise is known.
    """

    rows: int
    seeds: str
    tau: float
    rho: float
    low: float
    high: float
    chance: float
    ceiling: float
    freedom: int


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; nan where one side has no order."""
    score, ties_a, ties_b, pairs = 0, 0, 0, 0
    for i in range(len(a)):
        for j in range(i):
            da, db = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
            score, ties_a, ties_b, pairs = score + da * db, ties_a + (da == 0), ties_b + (db == 0), pairs + 1
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return score / scale if scale else math.nan


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho: correlation of the ranks, ties at their mean rank; nan where one side has no order."""

    def places(values: Sequence[float]) -> list[float]:
        return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]

    try:
        return statistics.correlation(places(a), places(b))
    except statistics.StatisticsError:
        return math.nan


def agreement(name: str, table: Table, store: Sources, protocol: Protocol = DIGITS) -> Agreement | None:
    """How a score orders a table's rows against the paper; None without repeats or with fewer than three rows."""
    published, column = store.published(table.published, table.key), PAPER[name.partition("_")[0]]
    rows = [(float(published[row.published][column]), values) for row in table.rows if (values := [r.values for r in scores_of(row, protocol, store)])]
    spread = pooled(name, [values for _, values in rows])
    if spread is None or len(rows) < 3:
        return None
    paper = [value for value, _ in rows]
    means = [statistics.fmean(scaled(name, values)) for _, values in rows]
    errors = [spread[0] / math.sqrt(len(values)) for _, values in rows]
    dice = random.Random(0)

    def draw() -> list[float]:
        return [dice.gauss(mean, error) for mean, error in zip(means, errors, strict=True)]

    tau = kendall(means, paper)
    drawn = sorted(kendall(draw(), paper) for _ in range(DRAWS))
    shuffled = [kendall(dice.sample(means, len(means)), paper) for _ in range(DRAWS)]
    tail = int(DRAWS * LEVEL / 2)
    return Agreement(
        rows=len(rows),
        seeds=_span([len(values) for _, values in rows]),
        tau=tau,
        rho=spearman(means, paper),
        low=drawn[tail],
        high=drawn[-1 - tail],
        chance=(1 + sum(other >= tau - 1e-12 for other in shuffled)) / (1 + DRAWS),
        ceiling=statistics.fmean(kendall(draw(), draw()) for _ in range(DRAWS)),
        freedom=spread[1],
    )


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def resolved_pairs(table: Table, store: Sources, protocol: Protocol = DIGITS) -> tuple[int, int, int, int]:
    """Of all pairs of rows with a score: how many the Fréchet distance resolves; of these, how many the paper's FID orders alike; pairs; rows of certain rank."""
    name = f"fd_{protocol.features}"
    published = store.published(table.published, table.key)
    scored = [(row, found) for row in table.rows if (found := [record.values for record in scores_of(row, protocol, store)])]
    values = [found for _, found in scored]
    spread, pairs = pooled(name, values), len(values) * (len(values) - 1) // 2
    if spread is None:
        return 0, 0, pairs, 0
    resolved = alike = 0
    for i in range(len(values)):
        for j in range(i):
            ours = statistics.fmean(scaled(name, values[i])) - statistics.fmean(scaled(name, values[j]))
            paper = float(published[scored[i][0].published]["fid"]) - float(published[scored[j][0].published]["fid"])
            clear = abs(ours) > reach(spread, len(values[i]), len(values[j]), pairs)
            resolved, alike = resolved + clear, alike + (clear and ours * paper > 0)
    certain = sum(rank is not None and rank[0] == rank[1] for rank in ranks(name, "lower", values))
    return resolved, alike, pairs, certain


def speed_agreement(table: Table, store: Sources) -> tuple[float, int]:
    """Kendall's tau of the CPU's relative throughput with the paper's on an A100, and the number of rows timed."""
    published = store.published(table.published, table.key)
    timed = [(record.values["relative"], float(published[row.published]["throughput_img_s"])) for row in table.rows if (record := store.latest(timing_stage(row, table.baseline, "cpu"), "reference"))]
    return (kendall(*zip(*timed, strict=True)) if len(timed) > 1 else math.nan), len(timed)


def page(store: Sources, protocol: Protocol = DIGITS) -> str:
    """Markdown. Every figure is computed; the sentences follow from the figures."""
    recipe = protocol.recipe
    lines = [
        f"# What the {protocol.name} protocol resolves of Tables 3 and 4",
        "",
        f"Every row is trained at a small size that keeps its structure, {recipe.steps} steps of {recipe.batch}, and scored on {protocol.num} images. "
        "The scores are not the paper's: other data, other size, other features. What can be compared is the order of the rows, as far as the spread over training seeds lets it be known.",
    ]
    full = FULL.get(protocol.name)
    for number in (3, 4):
        lines += ["", f"## Table {number}: {TABLES[number].title}", "", *_section(TABLES[number], store, protocol)]
        if full:
            lines += ["", *_scores_alone(TABLES[number], store, protocol)]
    if full:
        lines += ["", f"## The same rows at full size: protocol {full.name}", "", f"{full.recipe.steps} steps of {full.recipe.batch}, {full.num} images. A row without a committed record is a gap."]
        for number in (3, 4):
            lines += ["", *_section(TABLES[number], store, full), "", *_scores_alone(TABLES[number], store, full)]
    lines += [
        "",
        "## How this was computed",
        "",
        f"tau is Kendall's tau-b and rho Spearman's rho between the means over seeds and the paper's column; its interval holds 95 % of {DRAWS} redrawn sets of means, each mean "
        "moved by the seeds' spread pooled over the rows (fd on a log scale); chance is the share of random orders that agree at least as well; the ceiling is the mean tau of two "
        "redrawn sets with each other: where it is far below 1, even a perfect proxy could not show more. A pair is resolved where its difference exceeds Student's bound for all "
        f"pairs of the table together ({1 - LEVEL:.0%}, Bonferroni). The paper's scores are one training run each; their own spread is not known from the paper.",
        "",
    ]
    return "\n".join(lines)


def _scores_alone(table: Table, store: Sources, protocol: Protocol) -> list[str]:
    """The scores of a table beside the paper's, in Markdown; a row without a record is a gap."""
    seeds = sorted({record.spec["train"]["seed"] for row in table.rows for record in scores_of(row, protocol, store)}) or [0]
    sheet = main_sheet(table, table.rows, protocol, seeds, "cpu", store, where="reference")
    kept = [i for i, (group, name) in enumerate(sheet.columns) if name == "row" or group.startswith((f"{protocol.name} (", "paper: "))]
    alone = Sheet("", [sheet.columns[i] for i in kept], [[cells[i] for i in kept] for cells in sheet.rows])
    rows = [line for line in render([alone], "markdown").splitlines() if line.startswith("|")]
    fewer = [note for note in sheet.notes if note.endswith(f"of {len(seeds)} seeds")]
    notes = ["", f"± is the standard error over seeds, with one seed that of sampling. {'; '.join(fewer)}."] if fewer else []
    return [f"### Table {table.number} on {protocol.name}", "", *rows, *notes]


def _section(table: Table, store: Sources, protocol: Protocol) -> list[str]:
    scored = [name for name in SCORES[protocol.features] if name.partition("_")[0] in PAPER]
    found = {name: agreement(name, table, store, protocol) for name in scored}
    main = found[scored[0]]
    if main is None:
        return ["No committed records with repeated seeds: nothing can be said."]
    resolved, alike, pairs, certain = resolved_pairs(table, store, protocol)
    lines = [
        f"{main.rows} rows, {main.seeds} seeds each. The order by {scored[0]} agrees with the paper's order by FID with tau {main.tau:.2f} "
        f"(95 % over seeds: {main.low:.2f} to {main.high:.2f}); {_verdict(main)}."
        + (f" The spread over seeds is known from {main.freedom} repeated {'run' if main.freedom == 1 else 'runs'} only, so the interval is itself uncertain." if main.freedom < FEW else ""),
        "",
        f"Of {pairs} pairs of rows the seeds resolve {resolved}" + (f", and the paper orders {alike} of these alike" if resolved else "") + f". {certain} of {main.rows} rows have a rank that is known for certain.",
    ]
    if protocol is DIGITS:
        speed, timed = speed_agreement(table, store)
        lines += ["", f"The order by throughput on the CPU (fp32, {timed} rows) agrees with the paper's on an A100 with tau {speed:.2f}."]
    lines += ["", "| score | paper's | tau | 95 % over seeds | rho | chance | ceiling |", "|---|---|---:|---:|---:|---:|---:|"]
    for name, result in found.items():
        if result:
            lines.append(f"| {name} | {PAPER[name.partition('_')[0]]} | {result.tau:.2f} | {result.low:.2f} to {result.high:.2f} | {result.rho:.2f} | {result.chance:.3f} | {result.ceiling:.2f} |")
    return lines


def _verdict(result: Agreement) -> str:
    if result.chance <= LEVEL and result.low > 0:
        return f"chance alone would do as well in {result.chance:.1%} of random orders, so the protocol orders these rows as the paper does more than by chance"
    weak = f"random orders do as well in {result.chance:.0%} of cases, so no agreement is shown"
    return weak + (f"; with this noise two runs of this very protocol would agree with each other with tau {result.ceiling:.2f} only" if result.ceiling < 0.8 else "")
