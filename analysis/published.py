"""The published tables under results/published, checked before use. Standard library only."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.machine.system_errors import explain

SCORES = ("fid", "is", "precision", "recall")
ADVICE = "restore it with git checkout results/published"


@dataclass(frozen=True)
class Contents:
    """The columns that a published file must have."""

    words: tuple[str, ...]
    numbers: tuple[str, ...] = ()


_SYSTEMS = Contents(
    ("group", "model", "cfg"), ("train_steps", "gflops", "throughput_img_s", *SCORES)
)
_VERSION_2 = Contents(("model",), ("params_m", "gflops", "throughput_img_s", "fid", "is"))
_MODELS = Contents(("type", "model", "params"), ("gflops", *SCORES))

FILES = {
    "table1.csv": _SYSTEMS,
    "table2.csv": _SYSTEMS,
    "table3.csv": Contents(
        ("model", "structure"), ("params_m", "gflops", "throughput_img_s", *SCORES)
    ),
    "table4.csv": Contents(
        ("group", "variant"), ("params_m", "gflops", "throughput_img_s", *SCORES)
    ),
    "table5.csv": Contents(("model",), ("params_m", "gflops", "gflops_ratio_to_dit")),
    "table6.csv": Contents(
        (
            "model",
            "optimizer",
            "lr_schedule",
            "precision",
            "gpus",
            "augmentation",
            "vae",
            "sampler",
        ),
        (
            "resolution",
            "beta1",
            "beta2",
            "weight_decay",
            "peak_lr",
            "warmup_steps",
            "global_batch_size",
            "training_steps",
            "training_hours",
            "sampling_steps",
        ),
    ),
    "table7.csv": Contents(("model",), ("gflops", "train_steps", "sfid", *SCORES)),
    "table8.csv": _MODELS,
    "table9.csv": _MODELS,
    "tablev2-3.csv": Contents(("model",), ("fid",)),
    "tablev2-11.csv": _VERSION_2,
    "tablev2-12.csv": _VERSION_2,
    "tablev2-13.csv": _VERSION_2,
    "tablerelated.csv": Contents(("model", "params"), ("gflops", "fid")),
    "tableternary.csv": Contents(("model",), ("weights_gb", "peak_gb", "seconds")),
    "tablerelated-small.csv": Contents(
        ("model",), ("gflops", "dense_gflops", "seconds", "dense_seconds", "fid")
    ),
    "code.csv": Contents(("model",), ("drafted_scales", "fid", "is", "speed_up")),
    "cards.csv": Contents(("card", "quantity", "unit"), ("value",)),
    "claims.csv": Contents(("id", "claim", "metric", "subject", "baseline", "relation", "value")),
    "dico_logs.csv": Contents(
        ("model",), ("first_step", "last_step", "lines", "loss", "loss_sd", "hours")
    ),
}

# Other numbers are divided by these, so they must be above zero.
POSITIVE = {
    "gflops",
    "dense_gflops",
    "seconds",
    "dense_seconds",
    "weights_gb",
    "peak_gb",
    "throughput_img_s",
    "params_m",
    "gflops_ratio_to_dit",
    "lines",
    "sfid",
    *SCORES,
}


def read_published(folder: Path, name: str) -> list[dict[str, str]]:
    """Read a published file, a dictionary per row.

    Raises:
        ValueError: if a column is missing, a row has no source, or a number is none.
    """
    rows = _read(folder / name)
    contents = FILES[name]
    needed = (*contents.words, *contents.numbers, "source")
    missing = [column for column in needed if column not in rows[0]]
    if missing:
        raise ValueError(
            f"published data {name}: no column {', '.join(missing)}; found: {', '.join(rows[0])}"
        )

    # the first line of the file holds the columns
    for line, row in enumerate(rows, 2):
        if not row["source"]:
            raise ValueError(f"published data {name}, line {line}: no source")
        for column in contents.numbers:
            problem = _problem_with(column, row[column])
            if problem:
                raise ValueError(
                    f"published data {name}, line {line}: {column} is {problem}; leave a gap empty"
                )
    return rows


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        advice = f"; {ADVICE}" if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"published data: {explain(error, 'read', path)}{advice}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"published data {path.name}: no CSV in UTF-8 ({error}); {ADVICE}"
        ) from None
    if not rows:
        raise ValueError(f"published data {path.name}: holds no rows")
    return rows


def _problem_with(column: str, text: str) -> str:
    """What is wrong with a number, or ''; an empty text is a gap."""
    if not text:
        return ""
    try:
        number = float(text)
    except ValueError:
        return f"{text!r}, not a number"
    if not math.isfinite(number):
        return f"{text!r}, not a number"
    if column in POSITIVE and number <= 0:
        return f"{text}, which is not above 0"
    return ""
