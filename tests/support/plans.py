"""Plans over Table 4 for tests of the cluster room."""

from __future__ import annotations

from pathlib import Path

from experiments.ablation import TABLES
from experiments.declared.protocols import IMAGENET256
from experiments.engine.jobs.plan import TablePlan
from experiments.engine.specs.selection import Selection
from experiments.engine.specs.stages import Protocol

TABLE = TABLES[4]


def two_rows(protocol: Protocol = IMAGENET256, device: str = "cuda") -> TablePlan:
    """Return the first two rows of Table 4, with one training seed."""
    return TablePlan(Selection(TABLE, TABLE.rows[:2], protocol, [0], device))


def site_file(folder: Path, text: str) -> dict[str, str]:
    """Write a site file, and return the environment that names it."""
    (folder / "site.toml").write_text(text)
    return {"DICO_SLURM_SITE": str(folder / "site.toml")}
