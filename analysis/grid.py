"""Uncurated samples of a trained run as one image: `python -m analysis.grid --table 4 --row DiCo-S`.

One column a class, one row a sample, in the order of the evaluation's own seeds: nothing is chosen. Loads torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.style import figure, save
from experiments.ablation import TABLES
from experiments.engine.spec import Evaluate
from experiments.engine.store import Store
from experiments.protocols import PROTOCOLS, evaluate_stage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=[number for number, table in TABLES.items() if not table.counts_only], required=True)
    parser.add_argument("--row", required=True, help="by label")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="digits")
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    parser.add_argument("--columns", type=int, default=10, help="classes (default: 10)")
    parser.add_argument("--rows", type=int, default=8, help="samples a class (default: 8)")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="results folder (default: results)")
    args = parser.parse_args()
    try:
        rows = {row.label: row for row in (*TABLES[args.table].rows, *TABLES[args.table].outside)}
        if args.row not in rows:
            raise ValueError(f"table {args.table} has no row {args.row!r}; known: {', '.join(map(repr, rows))}")
        protocol, store = PROTOCOLS[args.protocol], Store(args.results)
        spec = evaluate_stage(rows[args.row], protocol, args.seed)
        if not all(store.latest(training) for training in spec.trainings):
            command = f"python experiments/ablation.py --table {args.table} --rows {args.row!r} --protocol {protocol.name} --seeds {args.seed}"
            raise ValueError(f"no finished run of {args.row!r} here; train it with: {command}")
        name = f"{protocol.name}_table{args.table}_{args.row}_seed{args.seed}".replace("/", "").replace(" ", "_")
        draw(spec, store, args.columns, args.rows, name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {store.root / 'figures' / 'samples' / name}.png")
    return 0


def draw(spec: Evaluate, store: Store, columns: int, rows: int, name: str) -> None:
    """Sample with the run's EMA network until every shown class has enough images. ValueError where the set is not in pixels."""
    import torch

    from experiments.engine.generate import images
    from experiments.engine.samples import network_of
    from experiments.engine.train import Resources

    data = spec.data
    if data.channels not in (1, 3):
        raise ValueError(f"{data.name} holds latents of {data.channels} channels, which a grid does not decode; sample and decode them first")
    columns = min(columns, data.num_classes)
    device = torch.device("cpu")
    shown: dict[int, list[torch.Tensor]] = {label: [] for label in range(columns)}
    for x, y in images(spec, network_of(spec, store.run_dir(spec.train), Resources()), device, batch=100):
        for image, label in zip(x, y.tolist(), strict=True):
            if label in shown and len(shown[label]) < rows:
                shown[label].append(image)
        if all(len(found) == rows for found in shown.values()):
            break
    made, axes = figure(0.62 * columns, 0.62 * rows + 0.35, rows, columns, squeeze=False)
    for label, found in shown.items():
        for place in range(rows):
            axes[place, label].axis("off")
            if place < len(found):
                pixels = (found[place].clamp(-1, 1) + 1) / 2
                axes[place, label].imshow(pixels.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes[0, label].set_title(str(label))
    save(made, store.root / "figures" / "samples", name)


if __name__ == "__main__":
    raise SystemExit(main())
