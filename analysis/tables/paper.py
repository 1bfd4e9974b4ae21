"""Tables 1 to 9 of the paper as sheets: published numbers beside the committed records'. No torch.

Differences are given where both sides measure the same thing (parameters, Gflops, recipes, a GPU's throughput, scores under one
protocol); digits' scores and a CPU's throughput stand beside the paper's without one. Ranks are intervals: a row's rank is known up to the differences that its seeds resolve.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from analysis.query import ReferenceStore, digits_scores, latest, rankable, reference_seeds
from analysis.tables.conditions import (
    SCORES_NOTE,
    add_conditions,
    clash_notes,
    insert,
    number_cell,
    progress_score,
    score_cells,
    score_columns,
)
from analysis.tables.pages import once
from experiments import main_results
from experiments.ablation import TABLES
from experiments.declared import timings as speed
from experiments.declared.protocols import DIGITS, IMAGENET256, IMAGENET256_OWN, IMAGENET512_OWN
from experiments.declared.systems import SYSTEMS
from experiments.engine.records.store import Record
from experiments.engine.reporting.efficiency.counts import (
    Named,
    counted,
    counts_sheet,
    difference,
    system_notes,
)
from experiments.engine.reporting.efficiency.speed import speed_sheet
from experiments.engine.reporting.lookup import SCORES
from experiments.engine.reporting.sheet import Cell, Column, Sheet
from experiments.engine.reporting.statistics import pooled, reach, scaled
from experiments.engine.reporting.tables import main_sheet
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Sampler, Stage, Train
from experiments.engine.specs.stages import (
    Protocol,
    cost_stage,
    cost_stages,
    evaluate_stage,
    timed_rows,
    timing_stage,
)

ROWS_256, ROWS_512 = (
    {row.label: row for row in main_results.TABLES[number].rows} for number in (1, 2)
)
CONFIGURATIONS: dict[str, tuple[Row, Protocol]] = {
    **{f"{model} 256": (ROWS_256[model], IMAGENET256) for model in ("DiCo-S", "DiCo-B", "DiCo-L")},
    "DiCo-XL 256": (ROWS_256["DiCo-XL (w/ CFG)"], IMAGENET256_OWN),
    "DiCo-XL 512": (ROWS_512["DiCo-XL, 3M"], IMAGENET512_OWN),
    "DiCo-H 256": (ROWS_256["DiCo-H (w/ CFG)"], IMAGENET256_OWN),
}
RECONSTRUCTED = (
    "The authors published no ablation code: sizes of all rows but DiCo-S, its kernels and activation, and DiT (iso.) are "
    "reconstructed from the paper's two rounded numbers a row; a match is consistent with the row, it is no proof."
)


def ablation_sheet(table: Table, store: ReferenceStore) -> Sheet:
    """Tables 3, 4 and 5: counts with their differences, throughput, scores on digits with ranks, and what a GPU gave under the paper's conditions."""
    sheet = main_sheet(
        table,
        table.rows,
        DIGITS,
        reference_seeds(table, store),
        "cpu",
        store,
        source=store.reference,
    )
    for group in ("params, M", "Gflops"):
        _compare(sheet, group)
    stages: list[Stage] = [cost_stage(row) for row in table.rows]
    own: list[Record] = []
    if table.counts_only:
        _dit_ratio(sheet, table, store)
    else:
        _rank(sheet, table.rows, store)
        own = add_conditions(sheet, table, 256, store)
        stages += [timing_stage(row, table.baseline, "cpu") for row in table.rows]
        sheet.notes.append(RECONSTRUCTED)
    sheet.notes += caveats(
        [
            *latest(stages, store),
            *(record for row in table.rows for record in digits_scores(row, store)),
            *own,
        ]
    )
    return sheet


def systems_sheet(table: Table, resolution: int, store: ReferenceStore) -> Sheet:
    """Tables 1, 2, 8 and 9: every published row; counts, also in the convention of each published figure; our GPU throughput and scores."""
    sheet = main_sheet(
        table,
        table.rows,
        DIGITS,
        reference_seeds(table, store),
        "cpu",
        store,
        source=store.reference,
    )
    if ("params, M", "paper") in sheet.columns:
        _compare(sheet, "params, M")
    published = store.published(table.published, table.key)
    systems = {system.label: system for system in SYSTEMS if system.resolution == resolution}
    known = [systems.get(published[row.published]["model"]) for row in table.rows]
    same = [counted(system, store.reference)[1] if system else Cell() for system in known]
    at = sheet.columns.index(("Gflops", "ours"))
    sheet.columns[at] = ("Gflops", "ours, torchprofile")
    insert(sheet, at + 1, ("Gflops", "ours, same counter"), same)
    insert(
        sheet,
        at + 2,
        ("Gflops", "diff. %"),
        [difference(cell, row[at - 1]) for cell, row in zip(same, sheet.rows, strict=True)],
    )
    own = add_conditions(sheet, table, resolution, store)
    frozen, compared = {}, ("params, M", "diff. %") in sheet.columns
    for row, system, cells in zip(table.rows, known, sheet.rows, strict=True):
        every, ours = (
            counted(system, store.reference)[0] if system else Cell(),
            cells[sheet.columns.index(("params, M", "ours"))],
        )
        if every.text() != ours.text():
            frozen[row.label] = every.text()
            if compared:
                cells[sheet.columns.index(("params, M", "diff. %"))] = difference(
                    every, cells[sheet.columns.index(("params, M", "paper"))]
                )
    if frozen:
        every = "; diff. is of all" if compared else ". All"
        sheet.notes.append(
            f"params: ours are those that train{every}, with what is frozen or never used, as published figures can count them: {', '.join(f'{label} {text}' for label, text in frozen.items())}."
        )
    if rounded := [
        row.label
        for row in table.rows
        if row.backbone and published[row.published].get("params", "").endswith("B")
    ]:
        sheet.notes.append(
            f"params of {', '.join(rounded)}: published in billions to one decimal, whose rounding alone can differ by 5 %."
        )
    sheet.notes += system_notes(
        [
            Named(row.label, system, cells[at - 1])
            for row, system, cells in zip(table.rows, known, sheet.rows, strict=True)
            if system
        ],
        SYSTEMS,
        store.reference,
    )
    sheet.notes += [
        "same counter: Gflops in the convention of the tool that gave the published figure; core counts all systems by one rule.",
        f"A gap in our columns is what has not been run here{_timed_elsewhere(table, store)}. The paper's scores are one run each, printed without error, so none is marked best.",
    ]
    stages: list[Stage] = [cost for row in table.rows for cost in cost_stages(row)]
    if table.timed:
        stages += [
            timing_stage(row, table.baseline, "cpu")
            for row in timed_rows(table, table.rows, "cpu", named=True)
        ]
    scored = [record for row in table.rows if row.backbone for record in digits_scores(row, store)]
    sheet.notes += caveats([*latest(stages, store), *scored, *own])
    return sheet


def _timed_elsewhere(table: Table, store: ReferenceStore) -> str:
    """In words: rows whose forward pass was timed here, but not in the numeric mode of the table's own column of throughput."""
    if table is not main_results.TABLE_1 or _in_modes(
        "cuda", "forward", store
    ):  # a GPU's modes all stand in the table
        return ""
    labels = [
        row.label
        for row in _in_modes("cpu", "forward", store)
        if not store.reference.latest(timing_stage(row, table.baseline, "cpu"))
    ]
    return (
        f"; the throughput of {', '.join(labels)} was timed with fused attention and stands in speed_forward"
        * bool(labels)
    )


def _in_modes(device: str, what: str, store: ReferenceStore) -> list[Row]:
    """Table 1's rows that were timed in a numeric mode of a device."""
    table = main_results.TABLE_1
    return [
        row
        for row in table.rows
        if row.backbone
        and list(latest(speed.stages(table, [row], device, what, named=True), store))
    ]


def throughput_sheet(what: str, store: ReferenceStore) -> Sheet:
    """Table 1's rows that were timed on a GPU or, as long as none was, on a CPU; gaps where none was at all."""
    table, device = main_results.TABLE_1, "cuda" if _in_modes("cuda", what, store) else "cpu"
    rows = _in_modes(device, what, store) or [
        row for row in table.rows if row.backbone and not row.heavy
    ]
    timed = speed.timed_table(table, rows, device, what)
    return with_caveats(speed_sheet(timed, store, store.reference))


RECIPE: dict[str, Callable[[Train, Sampler], object]] = {
    "beta1": lambda train, sampler: train.recipe.betas[0],
    "beta2": lambda train, sampler: train.recipe.betas[1],
    "weight_decay": lambda train, sampler: train.recipe.weight_decay,
    "peak_lr": lambda train, sampler: train.recipe.lr,
    "lr_schedule": lambda train, sampler: train.recipe.decay,
    "warmup_steps": lambda train, sampler: train.recipe.warmup,
    "global_batch_size": lambda train, sampler: train.recipe.batch,
    "precision": lambda train, sampler: train.recipe.precision,
    "training_steps": lambda train, sampler: train.recipe.steps,
    "augmentation": lambda train, sampler: "random flip" if train.data.flip else "none",
    "sampler": lambda train, sampler: {"ancestral": "iDDPM"}.get(sampler.name, sampler.name),
    "sampling_steps": lambda train, sampler: sampler.num_steps,
}
UNDECLARED = ("optimizer", "vae", "gpus", "training_hours")


def recipe_sheet(store: ReferenceStore) -> Sheet:
    """Table 6, field by field: the paper's recipe beside the one declared here, and the hours that the authors' logs show."""
    published = {f"{row['model']} {row['resolution']}": row for row in store.rows("table6.csv")}
    sheet = Sheet(
        "Table 6: Recipes (DiCo paper, Table 6)",
        [("", "field"), *((name, side) for name in published for side in ("paper", "declared"))],
    )
    differing = []
    for name in (*RECIPE, *UNDECLARED):
        cells = [Cell(label=name.replace("_", " "))]
        for label, paper in published.items():
            stage = evaluate_stage(*CONFIGURATIONS[label], 0) if label in CONFIGURATIONS else None
            declared = (
                RECIPE[name](stage.train, stage.sampler) if name in RECIPE and stage else None
            )
            cells += [
                Cell(label=paper[name]),
                Cell() if declared is None else Cell(label=str(declared)),
            ]
            if declared is not None and not _same(paper[name], declared):
                differing.append(f"{label}: {name.replace('_', ' ')}")
        sheet.rows.append(cells)
    total = sum(label in CONFIGURATIONS for label in published) * len(RECIPE)
    sheet.notes.append(
        f"{total - len(differing)} of {total} declared fields equal the paper's. Different: {', '.join(differing) or 'none'}."
    )
    sheet.notes.append(
        "The optimiser is AdamW in every declared recipe; VAE, GPUs and hours are no part of a recipe here."
    )
    for model, steps in (
        ("DiCo-S", 400_000),
        ("DiCo-B", 400_000),
        ("DiCo-L", 400_000),
        ("DiCo-XL", 3_750_000),
    ):
        hours = [
            float(row["hours"])
            for row in store.rows("dico_logs.csv")
            if row["model"] == model and int(row["last_step"]) == steps
        ]
        said = published.get(f"{model} 256", {}).get("training_hours")
        if hours and said:
            sheet.notes.append(
                f"{model}: {hours[0]:.1f} h to step {steps} in the authors' log; Table 6 says {said} h."
            )
        else:
            sheet.notes.append(
                f"{model}: its hours cannot be compared, since {'table6.csv has no row of it at 256 pixels' if hours else f'dico_logs.csv has none to step {steps}'}."
            )
    return sheet


def progress_sheet(store: ReferenceStore) -> Sheet:
    """Table 7: scores over training without guidance, and ours where a record of that length exists."""
    names = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "P", "recall": "R"}
    columns = [
        ("", "model"),
        ("", "steps"),
        *(("paper: ImageNet 256", name) for name in names.values()),
        *score_columns("ours", names, IMAGENET256),
    ]
    sheet, found = Sheet("Table 7: Scores over training (DiCo paper, Table 7)", columns), []
    for paper in store.rows("table7.csv"):
        record = progress_score(paper, store)
        found.append(record)
        sheet.rows.append(
            [
                Cell(label=paper["model"]),
                *(number_cell(paper[name]) for name in ("train_steps", *names)),
                *score_cells(record, paper, names),
            ]
        )
    sheet.notes.append(
        "50K images, no guidance. Ours is a gap where no record of that many training steps under the imagenet256 protocol is committed."
    )
    labels = [f"{row[0].text()} after {row[1].text()} steps" for row in sheet.rows]
    sheet.notes += [
        f"ours: {SCORES_NOTE}",
        *clash_notes(labels, found),
        *caveats([record for record in found if record]),
    ]
    return sheet


SHEETS: dict[str, Callable[[ReferenceStore], Sheet]] = {
    "table1": lambda store: systems_sheet(main_results.TABLE_1, 256, store),
    "table2": lambda store: systems_sheet(main_results.TABLE_2, 512, store),
    **{
        f"table{number}": lambda store, table=table: ablation_sheet(table, store)
        for number, table in TABLES.items()
    },
    "table6": recipe_sheet,
    "table7": progress_sheet,
    "table8": lambda store: systems_sheet(main_results.TABLE_8, 256, store),
    "table9": lambda store: systems_sheet(main_results.TABLE_9, 512, store),
    "counts": lambda store: with_caveats(counts_sheet(SYSTEMS, store, store.reference)),
    **{
        f"speed_{what}": lambda store, what=what: throughput_sheet(what, store)
        for what in speed.TASKS
    },
}


def caveats(records: Sequence[Record]) -> list[str]:
    """What the records of a table say about themselves that its reader should know."""
    if not records:
        return []
    count = len({record.name for record in records})
    modes = sorted(
        {
            " and ".join(
                f"{name} {'on' if on else 'off'}"
                for name, on in sorted(r.provenance["precision_flags"].items())
            )
            for r in records
        }
    )
    commits = sorted(
        {r.provenance["commit"][:12] if r.provenance["commit"] else "unknown" for r in records}
    )
    notes = [
        f"{count} records of commit{'s' * (len(commits) > 1)} {', '.join(commits)}; precision flags in force: {'; '.join(modes)}."
    ]
    if dirty := {record.name for record in records if record.provenance["dirty"]}:
        notes.append(
            f"{len(dirty)} of these records come from a tree with uncommitted changes: {', '.join(sorted(dirty))}."
        )
    inception = [
        record
        for record in records
        if record.kind == "evaluate" and record.spec["features"] == "inception"
    ]  # the others' rows say theirs
    return notes + [
        f"warning: {text}."
        for text in dict.fromkeys(
            text for record in inception for text in record.values.get("warnings", ())
        )
    ]


def _flat(sheet: Sheet) -> Sheet:
    """TRANSITION, to go: a sheet of the new types as lists of cells and plain notes."""
    return Sheet(
        sheet.title,
        [(column.group, column.title) for column in sheet.columns],
        [
            [
                replace(cell, digits=column.digits if cell.digits is None else cell.digits)
                for column, cell in sheet.cells(row)
            ]
            for row in sheet.rows
        ],
        [note.text for note in sheet.notes],
    )


def with_caveats(sheet: Sheet) -> Sheet:
    """The sheet with those of the records in its cells among its notes."""
    if sheet.columns and isinstance(sheet.columns[0], Column):
        sheet = _flat(sheet)
    sheet.notes += caveats(
        once(record for row in sheet.rows for cell in row for record in cell.records)
    )
    return sheet


def ranks(
    name: str, better: str, values: Sequence[list[dict[str, float]]]
) -> list[tuple[int, int] | None]:
    """First and last rank that every row may have, by Bonferroni over all pairs; None for a row without scores, or all without repeats."""
    spread = pooled(name, values)
    if spread is None:
        return [None] * len(values)
    sign = 1 if better == "lower" else -1
    means = [sign * statistics.fmean(scaled(name, row)) if row else None for row in values]
    known = [i for i, mean in enumerate(means) if mean is not None]
    pairs = len(known) * (len(known) - 1) // 2

    def clearly_better(i: int, j: int) -> bool:
        return means[j] - means[i] > reach(spread, len(values[i]), len(values[j]), pairs)

    return [
        (
            1 + sum(clearly_better(j, i) for j in known),
            len(known) - sum(clearly_better(i, j) for j in known),
        )
        if i in known
        else None
        for i in range(len(values))
    ]


def _compare(sheet: Sheet, group: str) -> None:
    """Our difference to the paper's column of a group, beside ours."""
    paper, ours = (sheet.columns.index((group, side)) for side in ("paper", "ours"))
    insert(
        sheet,
        ours + 1,
        (group, "diff. %"),
        [difference(row[ours], row[paper]) for row in sheet.rows],
    )


def _rank(sheet: Sheet, rows: Sequence[Row], store: ReferenceStore) -> None:
    name, better = next(iter(SCORES[DIGITS.features].items()))
    (at,) = [i for i, (_, column) in enumerate(sheet.columns) if column == name]
    scores, other = rankable(rows, DIGITS, store)
    found = ranks(name, better, [[record.values for record in records] for records in scores])
    for row, rank in zip(sheet.rows, found, strict=True):
        row[at] = replace(row[at], best=rank == (1, 1))
    words = [
        "-" if rank is None else f"{rank[0]}" if rank[0] == rank[1] else f"{rank[0]} to {rank[1]}"
        for rank in found
    ]
    insert(
        sheet,
        at + 1,
        (sheet.columns[at][0], "rank"),
        [
            Cell(label=word, records=tuple(records))
            for word, records in zip(words, scores, strict=True)
        ],
    )
    sheet.notes.append(
        f"rank: by {name}, as far as the seeds resolve it (95 % over all pairs, Bonferroni); bold is rank 1 for certain."
    )
    sheet.notes += [
        f"{label}: not ranked, scored by another protocol ({', '.join(fields)})."
        for label, fields in other.items()
    ]


def _dit_ratio(sheet: Sheet, table: Table, store: ReferenceStore) -> None:
    """Gflops over those of the DiT of the same size, as the paper's Table 5 gives them."""
    gflops = {
        system.label: counted(system, store.reference)[1]
        for system in SYSTEMS
        if system.resolution == 256
    }
    published = store.published(table.published, table.key)
    for row, cells in zip(table.rows, sheet.rows, strict=True):
        ours, dit = (
            gflops.get(row.label, Cell()),
            gflops.get(f"{row.label.replace('DiCo', 'DiT')}/2", Cell()),
        )
        known = ours.value is not None and dit.value is not None
        paper = number_cell(published[row.published]["gflops_ratio_to_dit"])
        ratio = (
            Cell(ours.value / dit.value, None, 3, records=ours.records + dit.records)
            if known
            else Cell()
        )
        cells += [paper, ratio, difference(ratio, paper)]
    sheet.columns += [("Gflops over DiT's", name) for name in ("paper", "ours", "diff. %")]


def _same(text: str, declared: object) -> bool:
    return text == declared if isinstance(declared, str) else float(text) == declared
