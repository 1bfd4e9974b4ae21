"""Rebuild results/tables and results/figures from the committed reference records: `python -m analysis.build`. No torch, no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis import figures_probes, style
from analysis.figures import save, score_against_speed
from experiments.ablation import TABLES
from experiments.efficiency import counts_sheet
from experiments.engine.files import written_whole
from experiments.engine.render import render
from experiments.engine.report import REFERENCE_SEEDS, Sheet, main_sheet
from experiments.engine.store import Store
from experiments.protocols import DIGITS, evaluate_stage

SUFFIXES = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=None, help="results folder (default: results)")
    store = Store(parser.parse_args().results)
    for table in TABLES.values():
        seeds = [seed for seed in REFERENCE_SEEDS if store.latest(evaluate_stage(table.baseline, DIGITS, seed), "reference")] or [0]
        sheet = main_sheet(table, table.rows, DIGITS, seeds, "cpu", store, where="reference")
        _write(store.root / "tables", f"table{table.number}", sheet)
        if not table.counts_only:
            save(score_against_speed(table, seeds, store), store.root / "figures", f"table{table.number}_score_speed")
        print(f"table {table.number}: {len(sheet.rows)} rows")
    _write(store.root / "tables", "counts", counts_sheet(store, where="reference"))
    problems = []
    for name, draw in figures_probes.FIGURES.items():
        try:
            style.save(draw(store), store.root / "figures", name)
        except ValueError as error:
            problems.append(f"problem: {name}: {error}")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


def _write(folder: Path, name: str, sheet: Sheet) -> None:
    for form, suffix in SUFFIXES.items():
        with written_whole(folder / f"{name}.{suffix}") as file:
            file.write(render([sheet], form).encode())


if __name__ == "__main__":
    raise SystemExit(main())
