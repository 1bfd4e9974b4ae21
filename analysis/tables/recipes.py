"""Table 6 of the paper: its recipes beside the declared ones. No torch."""

from __future__ import annotations

from collections.abc import Callable

from analysis.query import ReferenceStore
from experiments import main_results
from experiments.declared.protocols import IMAGENET256, IMAGENET256_OWN, IMAGENET512_OWN
from experiments.engine.reporting.sheet import Cell, Column, Kind, NoteKind, Sheet, SheetRow
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Evaluate, Sampler, Train
from experiments.engine.specs.stages import Protocol, evaluate_stage


def _configurations() -> dict[str, tuple[Row, Protocol]]:
    """By model and resolution, the declared row and the protocol that trains it as published."""
    rows_256 = {row.label: row for row in main_results.TABLES[1].rows}
    rows_512 = {row.label: row for row in main_results.TABLES[2].rows}
    common = {
        f"{model} 256": (rows_256[model], IMAGENET256) for model in ("DiCo-S", "DiCo-B", "DiCo-L")
    }
    return common | {
        "DiCo-XL 256": (rows_256["DiCo-XL (w/ CFG)"], IMAGENET256_OWN),
        "DiCo-XL 512": (rows_512["DiCo-XL, 3M"], IMAGENET512_OWN),
        "DiCo-H 256": (rows_256["DiCo-H (w/ CFG)"], IMAGENET256_OWN),
    }


CONFIGURATIONS = _configurations()

# By column of table6.csv, what is declared in its place.
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
    "sampler": lambda train, sampler: "iDDPM" if sampler.name == "ancestral" else sampler.name,
    "sampling_steps": lambda train, sampler: sampler.num_steps,
}
UNDECLARED = ("optimizer", "vae", "gpus", "training_hours")

# The steps at which an author's log is compared with Table 6's hours.
LOGGED_STEPS = {"DiCo-S": 400_000, "DiCo-B": 400_000, "DiCo-L": 400_000, "DiCo-XL": 3_750_000}


def recipe_sheet(store: ReferenceStore) -> Sheet:
    """The paper's recipe beside the declared one, field by field, and the hours of the logs."""
    published = {f"{row['model']} {row['resolution']}": row for row in store.rows("table6.csv")}
    stages = {
        label: evaluate_stage(*CONFIGURATIONS[label], 0)
        for label in published
        if label in CONFIGURATIONS
    }
    columns = [Column("field", "field", kind=Kind.PROSE)]
    for label in published:
        columns += [
            Column(f"{label}/{side}", side, label, kind=Kind.PROSE)
            for side in ("paper", "declared")
        ]
    sheet = Sheet("Table 6: Recipes (DiCo paper, Table 6)", columns)

    # one row per field
    differing = []
    for name in (*RECIPE, *UNDECLARED):
        cells: SheetRow = {"field": Cell(label=_field_words(name))}
        for label, recipe in published.items():
            cells[f"{label}/paper"] = Cell(label=recipe[name])
            declared = _declared(name, stages.get(label))
            if declared is not None:
                cells[f"{label}/declared"] = Cell(label=str(declared))
                if not _is_same(recipe[name], declared):
                    differing.append(f"{label}: {_field_words(name)}")
        sheet.add_row(cells)

    total = len(stages) * len(RECIPE)
    sheet.note(
        NoteKind.GENERAL,
        f"{total - len(differing)} of {total} declared fields equal the paper's. "
        f"Different: {', '.join(differing) or 'none'}.",
        "The optimiser is AdamW in every declared recipe. VAE, GPUs and hours are no part of a "
        "recipe here.",
        *(_hours_note(model, steps, published, store) for model, steps in LOGGED_STEPS.items()),
    )
    return sheet


def _field_words(name: str) -> str:
    return name.replace("_", " ")


def _declared(name: str, stage: Evaluate | None) -> object:
    """The declared value of a field; None if it is no part of a recipe here."""
    if stage is None or name not in RECIPE:
        return None
    assert isinstance(stage.train, Train)
    return RECIPE[name](stage.train, stage.sampler)


def _is_same(text: str, declared: object) -> bool:
    if isinstance(declared, str):
        return text == declared
    assert isinstance(declared, int | float)
    return float(text) == declared


def _hours_note(
    model: str, steps: int, published: dict[str, dict[str, str]], store: ReferenceStore
) -> str:
    """A sentence on the hours of an author's log and those of Table 6."""
    hours = [
        float(row["hours"])
        for row in store.rows("dico_logs.csv")
        if row["model"] == model and int(row["last_step"]) == steps
    ]
    printed = published.get(f"{model} 256", {}).get("training_hours")

    # The two sources can be compared only if both tell the hours of this training.
    if hours and printed:
        return (
            f"{model}: {hours[0]:.1f} h to step {steps} in the authors' log; "
            f"Table 6 says {printed} h."
        )

    # Otherwise the note says which of the two is missing.
    reason = f"dico_logs.csv has no line of it to step {steps}"
    if hours:
        reason = "table6.csv has no row of it at 256 pixels"
    return f"{model}: its hours cannot be compared, since {reason}."
