"""What a small protocol says about Tables 3 and 4, with its uncertainty: numbers first, then one page of text made from them. No torch."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.query import ReferenceStore, rankable, scores_of
from analysis.tables.pages import Block, Origins, Text, markdown, once
from analysis.tables.paper import RECONSTRUCTED, caveats, ranks
from experiments.ablation import TABLES
from experiments.declared.protocols import CIFAR10_CLASSIFIER, CIFAR10_SMALL, DIGITS
from experiments.engine.records.store import Record
from experiments.engine.reporting.lookup import SCORES
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.reporting.statistics import LEVEL, pooled, reach, scaled
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.stages import Protocol, timing_stage

PAPER = {
    "fd": "fid",
    "is": "is",
    "precision": "precision",
    "recall": "recall",
}  # our scores by the start of their names
FULL = {CIFAR10_SMALL.name: CIFAR10_CLASSIFIER}  # of what a protocol is the small form
DRAWS, FEW = 2000, 10  # redrawn orders; repeated runs below which a spread is poorly known
EXACT = 7  # rows up to which every order is counted
NORMAL = 1.4826  # a normal distribution's standard deviation over half its interquartile range


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of our row means with the paper's column.

    `low`, `high`: central 95 % of Kendall's tau over fresh draws of our seeds' noise; `chance`: share of orders, all of them
    up to EXACT rows and else random ones, that agree at least as well; `ceiling`: mean tau of two such draws with each other,
    which no comparison can exceed.
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
            score, ties_a, ties_b, pairs = (
                score + da * db,
                ties_a + (da == 0),
                ties_b + (db == 0),
                pairs + 1,
            )
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return score / scale if scale else math.nan


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho: correlation of the ranks, ties at their mean rank; nan where one side has no order."""

    def places(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values)
            + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    try:
        return statistics.correlation(places(a), places(b))
    except statistics.StatisticsError:
        return math.nan


def _scored(
    table: Table, store: ReferenceStore, protocol: Protocol
) -> list[tuple[Row, list[dict[str, float]]]]:
    """Rows with the values of their scores, as far as they may be ranked together."""
    scores, _ = rankable(table.rows, protocol, store)
    return [
        (row, [record.values for record in records])
        for row, records in zip(table.rows, scores, strict=True)
        if records
    ]


def agreement(
    name: str, table: Table, store: ReferenceStore, protocol: Protocol = DIGITS
) -> Agreement | None:
    """How a score orders a table's rows against the paper; None without repeats or with fewer than three rows."""
    published, column = store.published(table.published, table.key), PAPER[name.partition("_")[0]]
    rows = [
        (float(published[row.published][column]), values)
        for row, values in _scored(table, store, protocol)
    ]
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
    low, high = _central([kendall(draw(), paper) for _ in range(DRAWS)])
    return Agreement(
        rows=len(rows),
        seeds=_span([len(values) for _, values in rows]),
        tau=tau,
        rho=spearman(means, paper),
        low=low,
        high=high,
        chance=chance(means, paper, dice),
        ceiling=statistics.fmean(kendall(draw(), draw()) for _ in range(DRAWS)),
        freedom=spread[1],
    )


def _central(drawn: Sequence[float]) -> tuple[float, float]:
    """Where all but LEVEL of the draws lie."""
    ordered, tail = sorted(drawn), int(len(drawn) * LEVEL / 2)
    return ordered[tail], ordered[-1 - tail]


def chance(ours: Sequence[float], paper: Sequence[float], dice: random.Random) -> float:
    """Share of orders of `ours` whose tau with the paper's is at least the one found: of all up to EXACT rows, else of DRAWS random ones."""
    tau = kendall(ours, paper)
    if len(ours) <= EXACT:
        every = [kendall(order, paper) >= tau - 1e-12 for order in itertools.permutations(ours)]
        return sum(every) / len(every)
    return (
        1 + sum(kendall(dice.sample(ours, len(ours)), paper) >= tau - 1e-12 for _ in range(DRAWS))
    ) / (1 + DRAWS)


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


@dataclass(frozen=True)
class Pairs:
    """Rows' labels, the lower Fréchet distance first: pairs that the seeds resolve, those that they do not, those resolved against the order of the paper's FID; and rows of certain rank."""

    resolved: list[tuple[str, str]]
    open: list[tuple[str, str]]
    against: list[tuple[str, str]]
    certain: int


def resolved_pairs(
    table: Table, store: ReferenceStore, protocol: Protocol = DIGITS
) -> Pairs | None:
    """Of all pairs of rows with a score; None without repeated seeds."""
    name = f"fd_{protocol.features}"
    published = store.published(table.published, table.key)
    scored = _scored(table, store, protocol)
    values = [found for _, found in scored]
    spread, total = pooled(name, values), len(values) * (len(values) - 1) // 2
    if spread is None:
        return None
    made = Pairs(
        [],
        [],
        [],
        sum(rank is not None and rank[0] == rank[1] for rank in ranks(name, "lower", values)),
    )
    for (one, first), (two, second) in itertools.combinations(scored, 2):
        ours = statistics.fmean(scaled(name, first)) - statistics.fmean(scaled(name, second))
        paper = float(published[one.published]["fid"]) - float(published[two.published]["fid"])
        pair = (one.label, two.label) if ours < 0 else (two.label, one.label)
        clear = abs(ours) > reach(spread, len(first), len(second), total)
        (made.resolved if clear else made.open).append(pair)
        made.against.extend([pair] * (clear and ours * paper <= 0))
    return made


def _in_words(pairs: Pairs) -> str:
    """How many pairs are resolved, and which: the shorter of the two lists by name."""
    resolved, total = len(pairs.resolved), len(pairs.resolved) + len(pairs.open)
    words = (
        f"Of {total} pairs of rows the seeds resolve {resolved}"
        + f", and the paper orders {resolved - len(pairs.against)} of these alike" * (resolved > 0)
        + "."
    )
    shorter = (
        ("Resolved", " before ", pairs.resolved)
        if resolved <= len(pairs.open)
        else ("Not resolved", " and ", pairs.open)
    )
    named = (
        f"{name}: {'; '.join(map(word.join, some))}."
        for name, word, some in (
            shorter,
            ("Resolved against the paper's order", " before ", pairs.against),
        )
        if some
    )
    return " ".join([words, *named])


@dataclass(frozen=True)
class SpeedAgreement:
    """Kendall's tau of the CPU's relative throughput with the paper's on an A100, over as many rows as were timed.

    `low`, `high`: central 95 % of it over fresh draws of each row's own spread over rounds.
    """

    tau: float
    low: float
    high: float
    records: tuple[Record, ...]


def speed_agreement(table: Table, store: ReferenceStore) -> SpeedAgreement | None:
    """None with fewer than three rows timed."""
    published, dice = store.published(table.published, table.key), random.Random(0)
    found = [
        (record, float(published[row.published]["throughput_img_s"]))
        for row in table.rows
        if (record := store.reference.latest(timing_stage(row, table.baseline, "cpu")))
    ]
    if len(found) < 3:
        return None
    records, paper = zip(*found, strict=True)
    ours = [
        (record.values["relative"], NORMAL * record.values["relative_spread"]) for record in records
    ]
    low, high = _central([kendall([dice.gauss(*one) for one in ours], paper) for _ in range(DRAWS)])
    return SpeedAgreement(kendall([value for value, _ in ours], paper), low, high, records)


def page(store: ReferenceStore, protocol: Protocol = DIGITS) -> str:
    """Markdown of `blocks`."""
    return markdown(blocks(store, protocol), store)


def blocks(store: ReferenceStore, protocol: Protocol = DIGITS) -> list[Block]:
    """Every figure is computed; the sentences follow from the figures."""
    recipe, full = protocol.recipe, FULL.get(protocol.name)
    made: list[Block] = [
        Text(f"What the {protocol.name} protocol resolves of Tables 3 and 4", 1),
        Text(
            f"Every row is trained at a small size that keeps its structure, {recipe.steps} steps of {recipe.batch}, and scored on {protocol.num} images. "
            "The scores are not the paper's: other data, other size, other features. What can be compared is the order of the rows, as far as the spread over training seeds lets it be known."
        ),
    ]
    for number in (3, 4):
        made += [
            Text(f"Table {number}: {TABLES[number].title}", 2),
            *_section(TABLES[number], store, protocol),
        ]
        if full:
            made += _scores_alone(TABLES[number], store, protocol)
        made += [
            *_caveats(TABLES[number], store, protocol),
            _origins(TABLES[number], store, protocol),
        ]
    if full:
        made += [
            Text(f"The same rows at full size: protocol {full.name}", 2),
            Text(
                f"{full.recipe.steps} steps of {full.recipe.batch}, {full.num} images. A row without a committed record is a gap."
            ),
        ]
        for number in (3, 4):
            made += [
                *_section(TABLES[number], store, full),
                *_scores_alone(TABLES[number], store, full),
                *_caveats(TABLES[number], store, full),
                _origins(TABLES[number], store, full),
            ]
    made += [
        Text("How this was computed", 2),
        Text(
            f"tau is Kendall's tau-b and rho Spearman's rho between the means over seeds and the paper's column; its interval holds {1 - LEVEL:.0%} of {DRAWS} redrawn sets of means, each mean "
            f"moved by the seeds' spread pooled over the rows (fd on a log scale), of throughput each row by its own spread over rounds of timing; chance is the share of orders that agree at least as well, of all orders up to {EXACT} rows and else of {DRAWS} random ones; "
            "the ceiling is the mean tau of two redrawn sets with each other: where it is far below 1, even a perfect proxy could not show more. A pair is resolved where its difference exceeds Student's bound "
            f"for all pairs of the table together ({1 - LEVEL:.0%}, Bonferroni). The paper's scores are one training run each; their own spread is not known from the paper."
        ),
        Text(RECONSTRUCTED),
    ]
    return made


def _origins(table: Table, store: ReferenceStore, protocol: Protocol) -> Origins:
    """The records that a table's sections read, by row."""
    rows = []
    for row in table.rows:
        with store.noting() as noted:
            scores_of(row, protocol, store)
            if protocol is DIGITS:
                store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        rows.append((row.label, tuple(noted.values())))
    return Origins(tuple((label, records) for label, records in rows if records))


def _scores_alone(table: Table, store: ReferenceStore, protocol: Protocol) -> list[Block]:
    """The scores of a table beside the paper's; a row without a record is a gap."""
    seeds = sorted(
        {
            record.spec["train"]["seed"]
            for row in table.rows
            for record in scores_of(row, protocol, store)
        }
    ) or [0]
    sheet = main_sheet(table, table.rows, protocol, seeds, "cpu", store, source=store.reference)
    kept = [
        i
        for i, (group, name) in enumerate(sheet.columns)
        if name == "row" or group.startswith((f"{protocol.name} (", "paper: "))
    ]
    alone = Sheet(
        "", [sheet.columns[i] for i in kept], [[cells[i] for i in kept] for cells in sheet.rows]
    )
    fewer = [note for note in sheet.notes if note.endswith(f"of {len(seeds)} seeds")]
    notes = (
        [f"± is the standard error over seeds, with one seed that of sampling. {'; '.join(fewer)}."]
        if fewer
        else []
    )
    notes += [note for note in sheet.notes if note.startswith("warning: ")]
    return [Text(f"Table {table.number} on {protocol.name}", 3), alone, *map(Text, notes)]


def _caveats(table: Table, store: ReferenceStore, protocol: Protocol) -> list[Block]:
    """What the records of a table's sections say about themselves."""
    records = once(record for _, found in _origins(table, store, protocol).rows for record in found)
    return [Text(note, records=records) for note in caveats(records)]


def _section(table: Table, store: ReferenceStore, protocol: Protocol) -> list[Block]:
    scored = [name for name in SCORES[protocol.features] if name.partition("_")[0] in PAPER]
    found = {name: agreement(name, table, store, protocol) for name in scored}
    main = found[scored[0]]
    if main is None:
        return [Text("No committed records with repeated seeds: nothing can be said.")]
    records = once(record for row in table.rows for record in scores_of(row, protocol, store))
    pairs = resolved_pairs(table, store, protocol)
    poorly = (
        f" The spread over seeds is known from {main.freedom} repeated {'run' if main.freedom == 1 else 'runs'} only, so the interval is itself uncertain."
        if main.freedom < FEW
        else ""
    )
    order = f"The order by {scored[0]} agrees with the paper's order by FID with tau {main.tau:.2f} (95 % over seeds: {main.low:.2f} to {main.high:.2f}); {_verdict(main)}."
    made: list[Block] = [
        Text(f"{main.rows} rows, {main.seeds} seeds each. {order}{poorly}", records=records),
        Text(
            f"{_in_words(pairs)} {pairs.certain} of {main.rows} rows have a rank that is known for certain.",
            records=records,
        ),
    ]
    if other := rankable(table.rows, protocol, store)[1]:
        refused = (f"{label} ({', '.join(fields)})" for label, fields in other.items())
        made.append(Text(f"Left out, scored by another protocol: {'; '.join(refused)}."))
    if protocol is DIGITS and (speed := speed_agreement(table, store)):
        words = (
            f"tau {speed.tau:.2f} (95 % over rounds of timing: {speed.low:.2f} to {speed.high:.2f})"
        )
        made.append(
            Text(
                f"The order by throughput on the CPU (fp32, {len(speed.records)} rows) agrees with the paper's on an A100 with {words}.",
                records=speed.records,
            )
        )
    sheet = Sheet(
        "",
        [
            ("", name)
            for name in ("score", "paper's", "tau", "95 % over seeds", "rho", "chance", "ceiling")
        ],
    )
    for name, result in found.items():
        if result:
            span = Cell(label=f"{result.low:.2f} to {result.high:.2f}", records=records)
            tau, rho, share, ceiling = (
                Cell(value, None, digits, records=records)
                for value, digits in (
                    (result.tau, 2),
                    (result.rho, 2),
                    (result.chance, 4),
                    (result.ceiling, 2),
                )
            )
            sheet.rows.append(
                [
                    Cell(label=name),
                    Cell(label=PAPER[name.partition("_")[0]]),
                    tau,
                    span,
                    rho,
                    share,
                    ceiling,
                ]
            )
    return [*made, sheet]


def _verdict(result: Agreement) -> str:
    if result.chance <= LEVEL and result.low > 0:
        return f"chance alone would do as well in {result.chance:.2%} of orders, so the protocol orders these rows as the paper does more than by chance"
    weak = f"random orders do as well in {result.chance:.0%} of cases, so no agreement is shown"
    return weak + (
        f"; with this noise two runs of this very protocol would agree with each other with tau {result.ceiling:.2f} only"
        if result.ceiling < 0.8
        else ""
    )
