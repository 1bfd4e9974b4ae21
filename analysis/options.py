"""Options that the commands of analysis share."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.engine.cli import add_results_option


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add --results and --published: the folders that a `ReferenceStore` opens."""
    add_results_option(parser, use_environment=False)
    parser.add_argument(
        "--published",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of published numbers (default: results/published)",
    )
