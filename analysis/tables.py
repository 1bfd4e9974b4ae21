"""Tables 1 to 9 of the paper as sheets: published numbers beside the committed records'. No torch.

Differences are given where both sides measure the same thing (parameters, Gflops, recipes); scores of different protocols
stand side by side without one. Ranks are intervals: a row's rank is known up to the differences that its seeds resolve.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from analysis.query import Sources, digits_scores, gpu_timings, latest, reference_seeds
from experiments.ablation import TABLES
from experiments.efficiency import SYSTEMS, counted, counts_sheet, difference
from experiments.engine.report import SCORES, Cell, Sheet, main_sheet, pooled, reach, scaled
from experiments.engine.spec import Backbone, Row, Stage, Table
from experiments.engine.store import Record
from experiments.protocols import DIGITS, IMAGENET256, IMAGENET512, Protocol, cost_stage, evaluate_stage, timing_stage

CONFIGURATIONS = {"DiCo-S 256": IMAGENET256, "DiCo-B 256": IMAGENET256, "DiCo-L 256": IMAGENET256, "DiCo-XL 256": IMAGENET256, "DiCo-XL 512": IMAGENET512}
RECONSTRUCTED = (
    "The authors published no ablation code: sizes of all rows but DiCo-S, its kernels and activation, and DiT (iso.) are "
    "reconstructed from the paper's two rounded numbers a row; a match is consistent with the row, it is no proof."
)


def ablation_sheet(table: Table, store: Sources) -> Sheet:
    """Tables 3, 4 and 5: counts with their differences, throughput, and scores on digits with ranks."""
    sheet = main_sheet(table, table.rows, DIGITS, reference_seeds(table, store), "cpu", store, where="reference")
    for group in ("params, M", "Gflops"):
        paper, ours = (sheet.columns.index((group, side)) for side in ("paper", "ours"))
        _insert(sheet, ours + 1, (group, "diff. %"), [difference(row[ours], row[paper]) for row in sheet.rows])
    stages: list[Stage] = [cost_stage(row) for row in table.rows]
    if table.counts_only:
        _dit_ratio(sheet, table, store)
    else:
        _rank(sheet, table.rows, store)
        stages += [timing_stage(row, table.baseline, "cpu") for row in table.rows]
        sheet.notes.append(RECONSTRUCTED)
    sheet.notes += caveats([*latest(stages, store), *(record for row in table.rows for record in digits_scores(row, store))])
    return sheet


def systems_sheet(number: int, title: str, resolution: int, store: Sources) -> Sheet:
    """Tables 1, 2, 8 and 9: every published row; counts of the systems that stand in this project; scores as published."""
    published = store.rows(f"table{number}.csv")
    kind, speeds = ("type", False) if "type" in published[0] else ("group", True)
    columns = [("", "system"), ("", kind)] + ([("", "steps")] if speeds else [("params", "paper"), ("params", "ours, M")])
    columns += [("Gflops", "paper"), ("Gflops", "ours, same counter"), ("Gflops", "diff. %"), ("Gflops", "core")]
    columns += [("throughput, img/s", "paper, A100"), ("throughput, img/s", "ours, GPU")] if speeds else []
    columns += [(f"paper: ImageNet {resolution}", name) for name in ("FID", "IS", "P", "R")] + [("ours, same protocol", "FID")]
    sheet = Sheet(f"Table {number}: {title} (DiCo paper, Table {number})", columns)
    systems = {system.label: system for system in SYSTEMS if system.resolution == resolution}
    used = []
    for paper in published:
        system = systems.get(paper["model"])
        params, same, core = counted(system, store, "reference") if system else (Cell(), Cell(), Cell())
        gflops, timed, scored = number_cell(paper["gflops"]), Cell(), Cell()
        if system and len(system.costs) == 1:
            timed = _timed(gpu_timings(system.costs[0].backbone, system.costs[0].size, store))
            scored = _scored(system.costs[0].backbone, paper, resolution, store)
        used += core.records + timed.records + scored.records
        cells = [Cell(words=paper["model"]), Cell(words=paper[kind])]
        cells += [Cell(words=_steps(paper))] if speeds else [_params_cell(paper["params"]), params]
        cells += [gflops, same, difference(same, gflops), core]
        cells += [number_cell(paper["throughput_img_s"]), timed] if speeds else []
        sheet.rows.append([*cells, *(number_cell(paper[name]) for name in ("fid", "is", "precision", "recall")), scored])
    noted: dict[str, list[str]] = {}
    for label in dict.fromkeys(paper["model"] for paper in published):
        if label in systems and systems[label].note:
            noted.setdefault(systems[label].note, []).append(label)
    sheet.notes += [f"{', '.join(labels)}: {note}." for note, labels in noted.items()]
    sheet.notes += [
        "Gflops are multiply-accumulates of one forward pass at batch 1. same counter: in the convention of the tool that gave the published figure; "
        "core: convolutions, linear layers, matrix products and recurrences of all systems by one rule.",
        "A gap in our columns is what has not been run here. The paper's scores are one run each, printed without error, so none is marked best.",
    ]
    sheet.notes += caveats(used)
    return sheet


RECIPE: dict[str, Callable[[Protocol], object]] = {
    "beta1": lambda p: p.recipe.betas[0],
    "beta2": lambda p: p.recipe.betas[1],
    "weight_decay": lambda p: p.recipe.weight_decay,
    "peak_lr": lambda p: p.recipe.lr,
    "lr_schedule": lambda p: p.recipe.decay,
    "warmup_steps": lambda p: p.recipe.warmup,
    "global_batch_size": lambda p: p.recipe.batch,
    "precision": lambda p: p.recipe.precision,
    "training_steps": lambda p: p.recipe.steps,
    "augmentation": lambda p: "random flip" if p.data.flip else "none",
    "sampler": lambda p: {"ancestral": "iDDPM"}.get(p.sampler.name, p.sampler.name),
    "sampling_steps": lambda p: p.sampler.num_steps,
}
UNDECLARED = ("optimizer", "vae", "gpus", "training_hours")


def recipe_sheet(store: Sources) -> Sheet:
    """Table 6, field by field: the paper's recipe beside the one declared here, and the hours that the authors' logs show."""
    published = {f"{row['model']} {row['resolution']}": row for row in store.rows("table6.csv")}
    sheet = Sheet("Table 6: Recipes (DiCo paper, Table 6)", [("", "field"), *((name, side) for name in published for side in ("paper", "declared"))])
    differing = []
    for name in (*RECIPE, *UNDECLARED):
        cells = [Cell(words=name.replace("_", " "))]
        for label, paper in published.items():
            declared = RECIPE[name](CONFIGURATIONS[label]) if name in RECIPE and label in CONFIGURATIONS else None
            cells += [Cell(words=paper[name]), Cell() if declared is None else Cell(words=str(declared))]
            if declared is not None and not _same(paper[name], declared):
                differing.append(f"{label}: {name.replace('_', ' ')}")
        sheet.rows.append(cells)
    total = sum(label in CONFIGURATIONS for label in published) * len(RECIPE)
    sheet.notes.append(f"{total - len(differing)} of {total} declared fields equal the paper's. Different: {', '.join(differing) or 'none'}.")
    sheet.notes.append("The declared protocols stop where the paper's tables without guidance do; DiCo-H's recipe is in the paper only and is not declared here.")
    sheet.notes.append("The optimiser is AdamW in every declared recipe; VAE, GPUs and hours are no part of a recipe here.")
    for model, steps in (("DiCo-S", 400_000), ("DiCo-B", 400_000), ("DiCo-L", 400_000), ("DiCo-XL", 3_750_000)):
        hours = next(float(row["hours"]) for row in store.rows("dico_logs.csv") if row["model"] == model and int(row["last_step"]) == steps)
        sheet.notes.append(f"{model}: {hours:.1f} h to step {steps} in the authors' log; Table 6 says {published[f'{model} 256']['training_hours']} h.")
    return sheet


def progress_sheet(store: Sources) -> Sheet:
    """Table 7: scores over training without guidance, and ours where a record of that length exists."""
    names = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "P", "recall": "R"}
    sheet = Sheet(
        "Table 7: Scores over training (DiCo paper, Table 7)",
        [("", "model"), ("", "steps"), *(("paper: ImageNet 256", name) for name in names.values()), *(("ours", name) for name in names.values())],
    )
    for paper in store.rows("table7.csv"):
        row = Row(paper["model"], Backbone(paper["model"].lower().replace("-", "_")), {}, None)
        stopped = replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, steps=int(paper["train_steps"])))
        record = store.latest(evaluate_stage(row, stopped, 0), "reference")
        ours = [Cell(record.values.get(name), record.values.get(f"{name}_se"), records=(record,)) if record else Cell() for name in names]
        sheet.rows.append([Cell(words=paper["model"]), number_cell(paper["train_steps"]), *(number_cell(paper[name]) for name in names), *ours])
    sheet.notes.append("50K images, no guidance. Ours is a gap where no record of that many training steps under the imagenet256 protocol is committed.")
    return sheet


SHEETS: dict[str, Callable[[Sources], Sheet]] = {
    "table1": lambda store: systems_sheet(1, "Systems at 256", 256, store),
    "table2": lambda store: systems_sheet(2, "Systems at 512", 512, store),
    **{f"table{number}": lambda store, table=table: ablation_sheet(table, store) for number, table in TABLES.items()},
    "table6": recipe_sheet,
    "table7": progress_sheet,
    "table8": lambda store: systems_sheet(8, "Families of generative models at 256", 256, store),
    "table9": lambda store: systems_sheet(9, "Families of generative models at 512", 512, store),
    "counts": lambda store: counts_sheet(store, where="reference"),
}


def caveats(records: Sequence[Record]) -> list[str]:
    """What the records of a table say about themselves that its reader should know."""
    if not records:
        return []
    count = len({record.name for record in records})
    modes = sorted({" and ".join(f"{name} {'on' if on else 'off'}" for name, on in sorted(r.provenance["precision_flags"].items())) for r in records})
    commits = sorted({r.provenance["commit"][:12] if r.provenance["commit"] else "unknown" for r in records})
    notes = [f"{count} records of commit{'s' * (len(commits) > 1)} {', '.join(commits)}; precision flags in force: {'; '.join(modes)}."]
    if dirty := {record.name for record in records if record.provenance["dirty"]}:
        notes.append(f"{len(dirty)} of these records come from a tree with uncommitted changes: {', '.join(sorted(dirty))}.")
    return notes


def ranks(name: str, better: str, values: Sequence[list[dict[str, float]]]) -> list[tuple[int, int] | None]:
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
        (1 + sum(clearly_better(j, i) for j in known), len(known) - sum(clearly_better(i, j) for j in known)) if i in known else None for i in range(len(values))
    ]


def number_cell(text: str) -> Cell:
    """A published number with the digits that were published."""
    return Cell(float(text), None, len(text.partition(".")[2])) if text else Cell()


def _params_cell(text: str) -> Cell:
    """Tables 8 and 9 print 675M or 1.0B."""
    return Cell(float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]], words=text)


def _rank(sheet: Sheet, rows: Sequence[Row], store: Sources) -> None:
    name, better = next(iter(SCORES[DIGITS.features].items()))
    (at,) = [i for i, (_, column) in enumerate(sheet.columns) if column == name]
    found = ranks(name, better, [[record.values for record in digits_scores(row, store)] for row in rows])
    for row, rank in zip(sheet.rows, found, strict=True):
        row[at] = replace(row[at], best=rank == (1, 1))
    words = ["-" if rank is None else f"{rank[0]}" if rank[0] == rank[1] else f"{rank[0]} to {rank[1]}" for rank in found]
    _insert(sheet, at + 1, (sheet.columns[at][0], "rank"), [Cell(words=word) for word in words])
    sheet.notes.append(f"rank: by {name}, as far as the seeds resolve it (95 % over all pairs, Bonferroni); bold is rank 1 for certain.")


def _dit_ratio(sheet: Sheet, table: Table, store: Sources) -> None:
    """Gflops over those of the DiT of the same size, as the paper's Table 5 gives them."""
    gflops = {system.label: counted(system, store, "reference")[1] for system in SYSTEMS if system.resolution == 256}
    published = store.published(table.published, table.key)
    for row, cells in zip(table.rows, sheet.rows, strict=True):
        ours, dit = gflops.get(row.label, Cell()), gflops.get(f"{row.label.replace('DiCo', 'DiT')}/2", Cell())
        known = ours.value is not None and dit.value is not None
        cells += [number_cell(published[row.published]["gflops_ratio_to_dit"])]
        cells += [Cell(ours.value / dit.value, None, 3, records=ours.records + dit.records) if known else Cell()]
    sheet.columns += [("Gflops over DiT's", "paper"), ("Gflops over DiT's", "ours")]


def _timed(records: Sequence[Record]) -> Cell:
    """The newest GPU timing; its numeric mode stands in the table's notes."""
    return Cell(records[-1].values["images_per_s"], records[-1].values.get("images_per_s_spread"), records=(records[-1],)) if records else Cell()


def _scored(backbone: Backbone, paper: dict[str, str], resolution: int, store: Sources) -> Cell:
    """Our FID under the protocol of the published row: without guidance, after as many steps."""
    protocol = IMAGENET256 if resolution == 256 else IMAGENET512
    if paper.get("train_steps") != str(protocol.recipe.steps):
        return Cell()
    record = store.latest(evaluate_stage(Row(paper["model"], backbone, {}, None), protocol, 0), "reference")
    return Cell(record.values.get("fid"), record.values.get("fid_se"), records=(record,)) if record else Cell()


def _insert(sheet: Sheet, at: int, column: tuple[str, str], cells: Sequence[Cell]) -> None:
    sheet.columns.insert(at, column)
    for row, cell in zip(sheet.rows, cells, strict=True):
        row.insert(at, cell)


def _steps(paper: dict[str, str]) -> str:
    guided = {"yes": "CFG", "no": "", "": ""}[paper["cfg"]]
    return f"{int(paper['train_steps']) // 1000}K" if paper["train_steps"] else guided or "-"


def _same(text: str, declared: object) -> bool:
    return text == declared if isinstance(declared, str) else float(text) == declared
