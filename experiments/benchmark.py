"""Measure what this suite promises of its own speed: `python experiments/benchmark.py`.

Counting every registered network at its own input, and every row of Tables 3, 4 and 5, on the meta device; `--report` and whether it stays without
torch. `--main-job` runs `--table 4` from nothing in a temporary folder and prints its seconds and peak memory. `--latents` times the loader alone:
32 x 32 x 4 moments, drawn anew, from a warm page cache in two threads, and keeps a record. `--checkpoints` measures how long training stalls
for a checkpoint, in the copy and by the writing beside it. `--neighbours` times precision, recall, density and coverage, exact and
in ADM's half-precision arithmetic, and keeps a record of each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.cli import Parser, require_device, run_command
from experiments.engine.records.store import REPOSITORY, Store, provenance

SCRIPT = REPOSITORY / "experiments" / "ablation.py"
BATCH, PAIRS = 4, 7
ROWS = {"cuda": (50_000, 10_000), "cpu": (5000, 2000)}  # samples and reference points


@dataclass(frozen=True)
class Neighbours:
    """Precision and recall of two sets of features of this width: 'exact', with density and coverage, or in ADM's 'half' precision."""

    arithmetic: str
    device: str
    samples: int
    reference: int
    dim: int


@dataclass(frozen=True)
class Loader:
    """Latents of this size, drawn anew from moments, in shuffled batches."""

    size: int = 32
    batch: int = 256


def main() -> int:
    return run_command(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--main-job",
        action="store_true",
        help="run the whole main job and report seconds and peak memory",
    )
    parser.add_argument(
        "--latents", action="store_true", help="time the loader of latents and nothing else"
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="measure what a checkpoint costs and nothing else",
    )
    parser.add_argument(
        "--neighbours", action="store_true", help="time precision and recall and nothing else"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of --neighbours (default: cpu)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        metavar=("SAMPLES", "REFERENCE", "DIM"),
        help="of --neighbours (default: 5000 2000 2048, on CUDA 50000 10000 2048)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results folder for the records of --neighbours and --latents (default: results)",
    )
    args = parser.parse_args()
    if args.neighbours:
        require_device(args.device)
        store = Store(args.results)
        store.check_writable()
        for arithmetic in ("exact", "half"):
            _neighbours(
                Neighbours(arithmetic, args.device, *(args.sizes or (*ROWS[args.device], 2048))),
                store,
            )
        return 0
    if args.checkpoints:
        _checkpoints()
        return 0
    if args.latents:
        store = Store(args.results)
        store.check_writable()
        _latents(Loader(), store)
        return 0
    _report()
    _counts()
    if args.main_job:
        _main_job()
    return 0


def _report() -> None:
    code = f"import runpy, sys; sys.argv = ['ablation.py', '--table', '4', '--report']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nfinally: print('torch' in sys.modules)"
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    ).stdout
    print(f"--report: {time.perf_counter() - started:.2f} s, torch imported: {out.split()[-1]}")


def _counts() -> None:
    import backbones
    from experiments.ablation import TABLES
    from experiments.engine.specs.spec import Backbone, Cost
    from experiments.engine.specs.stages import cost_stage
    from experiments.engine.timing import cost

    options = {name: backbones.options_of(name) for name in backbones.list_backbones()}
    groups = {
        "registered networks": [
            Cost(Backbone(name), own["input_size"], own["in_channels"], own["num_classes"])
            for name, own in options.items()
        ],
        "rows of ablations": [
            cost_stage(row) for table in TABLES.values() for row in (*table.rows, *table.outside)
        ],
    }
    for what, specs in groups.items():
        started = time.perf_counter()
        for spec in specs:
            cost.count_backbone(spec)
        print(f"counts: {len(specs)} {what} in {time.perf_counter() - started:.1f} s", flush=True)


def _checkpoints() -> None:
    """Steps of dico_s on the GPU, if there is one, before, during and after a save in the background."""
    import numpy as np
    import torch

    from experiments.engine.data.sets import ImageSet
    from experiments.engine.runtime.context import Resources
    from experiments.engine.specs.spec import Backbone, Data, Recipe, Train
    from experiments.engine.training.checkpoint import Writer
    from experiments.engine.training.trainer import Trainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, batch = Data("random", 32, 4, 1000), 256 if device.type == "cuda" else BATCH
    drawn = np.random.default_rng(0)
    images = ImageSet(
        drawn.standard_normal((512, 4, 32, 32), dtype=np.float32),
        drawn.integers(1000, size=512),
        data,
    )
    trainer = Trainer(Train(Backbone("dico_s"), data, Recipe(steps=10**6, batch=batch)), device)
    stepping = trainer.steps(images)
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder)) as writer:
        next(stepping).item()
        writer.save(trainer.step, trainer.state())  # the first save makes the buffers
        writer.wait()
        plain, during = [_seconds(lambda: next(stepping).item()) for _ in range(2 * PAIRS)], []
        started = time.perf_counter()
        copied = _seconds(lambda: writer.save(trainer.step, trainer.state()))
        while writer.busy:
            during.append(_seconds(lambda: next(stepping).item()))
        seconds, size = (
            time.perf_counter() - started,
            max(path.stat().st_size for path in Path(folder).iterdir()),
        )
    stepping.close()
    usual, every = statistics.median(plain), Resources().checkpoint_every
    slowed = sum(during) - usual * len(during)
    print(
        f"checkpoint of {size / 1e9:.2f} GB: copied in {copied:.2f} s, written in {seconds:.1f} s beside {len(during)} steps, which took {slowed:.2f} s longer"
    )
    print(f"stall every {every} steps of {usual:.3f} s: {(copied + slowed) / (every * usual):.3%}")


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _neighbours(spec: Neighbours, store: Store) -> None:
    """Rectified Gaussians, as wide as Inception's features; the second of two runs counts, which has its memory.

    A pair is one distance: every two rows of all n samples and m reference points, in n^2 + m^2 + n m. Rate and ceiling are of
    fused multiply-adds, of which a distance takes `dim`, the ceiling a plain product of large matrices in the same type.
    """
    import numpy as np
    import torch

    from experiments.engine.numerics.device import describe_device
    from experiments.engine.numerics.precision import read_tf32_flags
    from experiments.engine.scoring.measure import NEIGHBOURS
    from experiments.engine.scoring.neighbours import (
        ADM_BLOCK,
        neighbour_shares,
        precision_recall_half,
    )
    from experiments.engine.timing.clock import time_call

    if spec.samples <= NEIGHBOURS or spec.reference <= NEIGHBOURS or spec.dim < 1:
        raise ValueError(
            f"--sizes takes more than {NEIGHBOURS} samples and reference points and a width from 1 on"
        )
    device, draw = torch.device(spec.device), np.random.default_rng(0)
    reference, samples = (
        np.maximum(draw.standard_normal((n, spec.dim), np.float32), 0)
        for n in (spec.reference, spec.samples)
    )
    block = 2000 if spec.arithmetic == "exact" and device.type == "cpu" else ADM_BLOCK
    shares = neighbour_shares if spec.arithmetic == "exact" else precision_recall_half
    about = (
        provenance() | describe_device(device) | {"precision_flags": read_tf32_flags()}
    )  # before anything is timed: memory is kept from here on
    taken, found = [], ()
    for _ in range(2):
        started = time.perf_counter()
        found = shares(reference, samples, NEIGHBOURS, block, device)
        taken.append(time.perf_counter() - started)
    side = min(4096 if device.type == "cuda" else 1024, block)
    square = torch.ones(
        side,
        side,
        dtype=torch.float64 if spec.arithmetic == "exact" else torch.float32,
        device=device,
    )
    ceiling = max(side**3 / time_call(lambda: square @ square, device, 3) for _ in range(3)) / 1e9
    pairs = spec.samples**2 + spec.reference**2 + spec.samples * spec.reference
    rate = spec.dim * pairs / taken[-1] / 1e9
    values = {
        "seconds": taken[-1],
        "pairs_per_s": pairs / taken[-1],
        "gmacs_per_s": rate,
        "product_gmacs_per_s": ceiling,
        "share_of_product": rate / ceiling,
    }
    store.append(spec, "done", values | {"precision": found[0], "recall": found[1]}, about)
    print(
        f"neighbours, {spec.arithmetic}: {spec.samples} x {spec.reference} x {spec.dim} in {taken[-1]:.2f} s, {pairs / taken[-1]:.3g} pairs/s, "
        f"{rate:.1f} GMAC/s, {rate / ceiling:.0%} of a matrix product's",
        flush=True,
    )


def _latents(spec: Loader, store: Store) -> None:
    """Latents a second over a temporary folder of random moments, in two threads."""
    import json

    import numpy as np
    import torch

    from experiments.engine.data.latents import LatentSet, shard_path
    from experiments.engine.data.sets import iterate_batches
    from experiments.engine.numerics.device import describe_device
    from experiments.engine.numerics.precision import read_tf32_flags
    from experiments.engine.specs.spec import Data

    about = (
        provenance()
        | describe_device("cpu")
        | {"precision_flags": read_tf32_flags(), "threads": 2, "cores": len(_cores())}
    )
    batch, size, shards, each, steps = spec.batch, spec.size, 8, 512, 40
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), np.random.default_rng(0)
        for number in range(shards):
            np.save(shard_path(folder, number), draw.random((each, 2, 8, size, size), np.float32))
        np.save(folder / "labels.npy", draw.integers(0, 1000, shards * each))
        vae = {"name": "none", "encoder": "none"}
        manifest = {
            "latents": "moments",
            "shape": [2, 8, size, size],
            "num_classes": 1000,
            "shards": [each] * shards,
            "sha256": "",
            "vae": vae,
        }
        (folder / "manifest.json").write_text(
            json.dumps(manifest | {"statistics": {"as_expected": False}})
        )
        images = LatentSet(
            folder, Data("latents", size=size, channels=4, num_classes=1000, flip=True, vae="none")
        )
        for _ in iterate_batches(
            images, batch, 0, range(len(images) // batch), torch.device("cpu")
        ):
            pass
        rates, busy = [], time.process_time()
        for seed in range(PAIRS):
            started = time.perf_counter()
            for _ in iterate_batches(images, batch, seed, range(steps), torch.device("cpu")):
                pass
            rates.append(steps * batch / (time.perf_counter() - started))
        busy = (time.process_time() - busy) / (PAIRS * steps * batch)
    values = {
        "latents_per_s": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "runs": PAIRS,
        "core_s_each": busy,
    }
    store.append(spec, "done", values, about)
    spread = f"{min(rates):,.0f} to {max(rates):,.0f} over {PAIRS} runs"
    print(
        f"latents: {statistics.median(rates):,.0f} a second ({spread}), {1e6 * busy:.0f} us of a core each; batch {batch}, 2 threads, {len(_cores())} cores"
    )


def _main_job() -> None:
    """Peak memory is the largest sum over the process tree, sampled four times a second."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        job = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--table", "4", "--results", folder],
            start_new_session=True,
        )
        peak, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.25):
                peak[0] = max(peak[0], _tree_bytes(job.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = job.wait()
        ended.set()
        watcher.join()
        print(
            f"main job: exit status {status}, {time.perf_counter() - started:.0f} s, at most {peak[0] / 2**30:.2f} GiB on {len(_cores())} cores"
        )


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def _tree_bytes(session: int) -> int:
    """Proportional resident memory of every process of a session (shared pages counted once)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                total += next(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")
                )
        except (OSError, StopIteration):
            continue
    return total


if __name__ == "__main__":
    raise SystemExit(main())
