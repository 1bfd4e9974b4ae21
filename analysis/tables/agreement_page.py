"""What a small protocol says about Tables 3 and 4, as a page of text and tables. No torch.

Every figure is computed, and the sentences follow from the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.query import ReferenceStore, rankable, scores_of
from analysis.tables.ablations import RECONSTRUCTED
from analysis.tables.agreement import (
    DRAWS,
    EXACT,
    Agreement,
    Pair,
    Pairs,
    measure_agreement,
    measure_speed_agreement,
    resolve_pairs,
)
from analysis.tables.caveats import record_caveats
from analysis.tables.pages import Block, Origins, Text, markdown, once
from experiments.ablation import TABLES
from experiments.declared.protocols import CIFAR10_CLASSIFIER, CIFAR10_SMALL, DIGITS
from experiments.engine.records.score_names import TABLE_SCORES, Score
from experiments.engine.records.store import Record
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet, Topic
from experiments.engine.reporting.statistics import LEVEL
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.rows import Table
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import Protocol, timing_stage

# By the name of a small protocol, the full one that it stands for.
FULL = {CIFAR10_SMALL.name: CIFAR10_CLASSIFIER}

# repeated runs below which a spread is poorly known
FEW = 10
# below this ceiling even a perfect proxy could not show more
LOW_CEILING = 0.8

TABLE_NUMBERS = (3, 4)


def agreement_page(store: ReferenceStore, protocol: Protocol = DIGITS) -> str:
    """The page as Markdown."""
    return markdown(agreement_blocks(store, protocol), store)


def agreement_blocks(store: ReferenceStore, protocol: Protocol = DIGITS) -> list[Block]:
    """The page as blocks that know their records."""
    recipe, full = protocol.recipe, FULL.get(protocol.name)
    blocks: list[Block] = [
        Text(f"What the {protocol.name} protocol resolves of Tables 3 and 4", 1),
        Text(
            f"Every row is trained at a small size that keeps its structure, with {recipe.steps} "
            f"steps of {recipe.batch}, and scored on {protocol.num} images. The scores are not the "
            "paper's: data, size and features differ. What can be compared is the order of the "
            "rows, as far as the spread over training seeds shows it."
        ),
    ]
    for number in TABLE_NUMBERS:
        blocks.append(Text(f"Table {number}: {TABLES[number].title}", 2))
        blocks += _table_blocks(TABLES[number], store, protocol, with_scores=full is not None)

    # the same rows at their full size
    if full:
        blocks += [
            Text(f"The same rows at full size: protocol {full.name}", 2),
            Text(
                f"{full.recipe.steps} steps of {full.recipe.batch}, {full.num} images. A row "
                "without a committed record is a gap."
            ),
        ]
        for number in TABLE_NUMBERS:
            blocks += _table_blocks(TABLES[number], store, full, with_scores=True)
    return [*blocks, *_method_blocks()]


def _method_blocks() -> list[Block]:
    """How the figures of the page were computed."""
    return [
        Text("How this was computed", 2),
        Text(
            "tau is Kendall's tau-b, and rho is Spearman's rho, between our means over seeds and "
            f"the paper's column. The interval of tau holds {1 - LEVEL:.0%} of {DRAWS} redrawn "
            "sets of means. Each mean moves by the seeds' spread, pooled over the rows (fd on a "
            "log scale); a throughput moves by the row's own spread over rounds of timing. chance "
            f"is the share of orders that agree at least as well: of all orders up to {EXACT} "
            f"rows, and otherwise of {DRAWS} random ones. The ceiling is the mean tau of two "
            "redrawn sets with each other. If it is far below 1, even a perfect proxy could not "
            "show more. A pair is resolved if its difference exceeds Student's bound for all pairs "
            f"of the table together ({1 - LEVEL:.0%}, Bonferroni). The paper's scores are one "
            "training run each; the paper does not say how they spread."
        ),
        Text(RECONSTRUCTED),
    ]


def _table_blocks(
    table: Table, store: ReferenceStore, protocol: Protocol, with_scores: bool
) -> list[Block]:
    """One table: the agreement, the scores if wanted, what records say, and where they lie."""
    blocks = _agreement_blocks(table, store, protocol)
    if with_scores:
        blocks += _score_blocks(table, store, protocol)
    origins = _origins(table, store, protocol)
    records = once(record for _, found in origins.rows for record in found)
    blocks += [Text(note.text, records=records) for note in record_caveats(records)]
    return [*blocks, origins]


def _origins(table: Table, store: ReferenceStore, protocol: Protocol) -> Origins:
    """The records behind a table's blocks, by row."""
    rows = []
    for row in table.rows:
        with store.noting() as noted:
            scores_of(row, protocol, store)
            if protocol is DIGITS:
                store.reference.latest(timing_stage(row, table.baseline, "cpu"))
        if noted:
            rows.append((row.label, tuple(noted.values())))
    return Origins(tuple(rows))


def _score_blocks(table: Table, store: ReferenceStore, protocol: Protocol) -> list[Block]:
    """A table's scores beside the paper's; a row without a record is a gap."""
    seeds = sorted(
        {
            record.spec["train"]["seed"]
            for row in table.rows
            for record in scores_of(row, protocol, store)
        }
    )
    selection = Selection(table, table.rows, protocol, seeds or [0], "cpu")
    sheet = main_sheet(selection, store, store.reference).about(Topic.SCORES)

    # of the notes, what the page does not say itself
    fewer = [note for note in sheet.notes if note.kind is NoteKind.SEEDS]
    texts = []
    if fewer:
        error = "± is the standard error over seeds; with one seed, the sampling standard error."
        texts.append(" ".join([error, *(note.text for note in fewer)]))
    texts += [note.text for note in sheet.notes if note.kind is NoteKind.WARNING]
    sheet.notes = []
    title = Text(f"Table {table.number} on {protocol.name}", 3)
    return [title, sheet, *(Text(text) for text in texts)]


def _agreement_blocks(table: Table, store: ReferenceStore, protocol: Protocol) -> list[Block]:
    """Sentences and a table on how the order of the rows agrees with the paper's."""
    scores = [score for score in TABLE_SCORES[protocol.features] if score.paper]
    results = {score: measure_agreement(score, table, store, protocol) for score in scores}
    main, pairs = results[scores[0]], resolve_pairs(table, store, protocol)
    if main is None or pairs is None:
        return [Text("No committed records with repeated seeds: nothing can be said.")]
    records = once(record for row in table.rows for record in scores_of(row, protocol, store))

    # the order by the first score, and what of it is resolved
    blocks: list[Block] = [
        Text(_describe_order(scores[0].key, main), records=records),
        Text(
            f"{describe_pairs(pairs)} {pairs.certain} of {main.rows} rows have a certain rank.",
            records=records,
        ),
    ]
    refused = rankable(table.rows, protocol, store).refused
    if refused:
        listed = "; ".join(f"{label} ({', '.join(fields)})" for label, fields in refused.items())
        blocks.append(Text(f"Left out, since scored by another protocol: {listed}."))

    # the order by throughput, then every score
    speed = measure_speed_agreement(table, store) if protocol is DIGITS else None
    if speed:
        blocks.append(
            Text(
                f"The order by throughput on the CPU (fp32, {len(speed.records)} rows) agrees with "
                f"the paper's on an A100 with tau {speed.tau:.2f} (95 % over rounds of timing: "
                f"{speed.low:.2f} to {speed.high:.2f}).",
                records=speed.records,
            )
        )
    return [*blocks, _coefficient_sheet(results, records)]


def _describe_order(name: str, main: Agreement) -> str:
    """Sentences on the agreement of the order by the ranking score."""
    text = (
        f"{main.rows} rows, {main.seeds} seeds each. The order by {name} agrees with the paper's "
        f"order by FID with tau {main.tau:.2f} (95 % over seeds: {main.low:.2f} to "
        f"{main.high:.2f}). {describe_chance(main)}"
    )
    if main.freedom < FEW:
        runs = "run" if main.freedom == 1 else "runs"
        text += (
            f" The spread over seeds is known from {main.freedom} repeated {runs} only, so the "
            "interval is itself uncertain."
        )
    return text


def describe_chance(result: Agreement) -> str:
    """Whether an agreement is more than chance, in sentences."""
    if result.chance <= LEVEL and result.low > 0:
        return (
            f"Chance alone does as well in {result.chance:.2%} of orders, so the protocol orders "
            "these rows as the paper does more than by chance."
        )
    text = f"Random orders do as well in {result.chance:.0%} of cases, so no agreement is shown."
    if result.ceiling < LOW_CEILING:
        text += (
            " With this noise, two runs of this very protocol would agree with each other with "
            f"tau {result.ceiling:.2f} only."
        )
    return text


def describe_pairs(pairs: Pairs) -> str:
    """How many pairs are resolved, and which: the shorter of the two lists by name."""
    resolved, total = len(pairs.resolved), len(pairs.resolved) + len(pairs.not_resolved)
    alike = ""
    if resolved:
        alike = f", and the paper orders {resolved - len(pairs.against)} of these alike"
    sentences = [f"Of {total} pairs of rows the seeds resolve {resolved}{alike}."]

    # names of the shorter list, then those against the paper's order
    if resolved <= len(pairs.not_resolved):
        sentences += _list_pairs("Resolved", " before ", pairs.resolved)
    else:
        sentences += _list_pairs("Not resolved", " and ", pairs.not_resolved)
    sentences += _list_pairs("Resolved against the paper's order", " before ", pairs.against)
    return " ".join(sentences)


def _list_pairs(title: str, word: str, pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    return [f"{title}: {'; '.join(word.join(pair) for pair in pairs)}."]


def _coefficient_sheet(
    results: dict[Score, Agreement | None], records: tuple[Record, ...]
) -> Sheet:
    """The coefficients of every score."""
    columns = [
        Column("score", "score", kind=Kind.PROSE),
        Column("paper", "paper's", kind=Kind.PROSE),
        Column("tau", "tau"),
        Column("range", "95 % over seeds"),
        Column("rho", "rho"),
        Column("chance", "chance", digits=4),
        Column("ceiling", "ceiling"),
    ]
    sheet = Sheet("", columns)

    # A score without a coefficient has no line.
    for score, result in results.items():
        if result:
            sheet.add_row(
                {
                    "score": Cell(label=score.key),
                    "paper": Cell(label=score.paper),
                    "tau": Cell(result.tau, records=records),
                    "range": Cell(label=f"{result.low:.2f} to {result.high:.2f}", records=records),
                    "rho": Cell(result.rho, records=records),
                    "chance": Cell(result.chance, records=records),
                    "ceiling": Cell(result.ceiling, records=records),
                }
            )
    return sheet
