"""Measure what this suite promises of its own speed: `python experiments/benchmark.py`.

Counting every row of Tables 1 (DiT, DiCo), 3, 4 and 5 on the meta device; `--report` and whether it stays without
torch. `--main-job` runs `--table 4` from nothing in a temporary folder and prints its seconds and peak memory. `--latents` times the loader alone:
32 x 32 x 4 moments, drawn anew, from a warm page cache in two threads. `--checkpoints` measures how long training stalls
for a checkpoint, in the copy and by the writing beside it.
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
from pathlib import Path

from experiments.engine.cli import Parser, guarded
from experiments.engine.store import REPOSITORY

SCRIPT = REPOSITORY / "experiments" / "ablation.py"
BATCH, PAIRS = 4, 7


def main() -> int:
    return guarded(_main)


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--main-job", action="store_true", help="run the whole main job and report seconds and peak memory")
    parser.add_argument("--latents", action="store_true", help="time the loader of latents and nothing else")
    parser.add_argument("--checkpoints", action="store_true", help="measure what a checkpoint costs and nothing else")
    args = parser.parse_args()
    if args.checkpoints:
        _checkpoints()
        return 0
    if args.latents:
        _latents()
        return 0
    _report()
    _counts()
    if args.main_job:
        _main_job()
    return 0


def _report() -> None:
    code = f"import runpy, sys; sys.argv = ['ablation.py', '--table', '4', '--report']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nfinally: print('torch' in sys.modules)"
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    print(f"--report: {time.perf_counter() - started:.2f} s, torch imported: {out.split()[-1]}")


def _counts() -> None:
    from experiments.ablation import TABLES
    from experiments.engine import cost
    from experiments.engine.spec import Backbone, Cost
    from experiments.protocols import cost_stage

    started = time.perf_counter()
    specs = [cost_stage(row) for table in TABLES.values() for row in (*table.rows, *table.outside)]
    specs += [Cost(Backbone(f"dit_{size}_2"), 32, 4, 1000) for size in ("s", "b", "l", "xl")]
    specs += [Cost(Backbone(name), 64, 4, 1000) for name in ("dit_xl_2", "dico_xl")]
    for spec in specs:
        cost.run(spec)
    print(f"counts: {len(specs)} networks in {time.perf_counter() - started:.1f} s")


def _checkpoints() -> None:
    """Steps of dico_s on the GPU, if there is one, before, during and after a save in the background."""
    import numpy as np
    import torch

    from experiments.engine.checkpoint import Writer
    from experiments.engine.data import ImageSet
    from experiments.engine.spec import Backbone, Data, Recipe, Train
    from experiments.engine.train import Resources, Trainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, batch = Data("random", 32, 4, 1000), 256 if device.type == "cuda" else BATCH
    drawn = np.random.default_rng(0)
    images = ImageSet(drawn.standard_normal((512, 4, 32, 32), dtype=np.float32), drawn.integers(1000, size=512), data)
    trainer = Trainer(Train(Backbone("dico_s"), data, Recipe(steps=10**6, batch=batch)), device)
    stepping = trainer.steps(images)
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder)) as writer:
        next(stepping).item()
        writer.save(trainer.step, trainer.state())  # the first save makes the buffers
        writer.wait()
        plain, during = [_seconds(lambda: next(stepping).item()) for _ in range(2 * PAIRS)], []
        writer.stalled, started = 0.0, time.perf_counter()
        writer.save(trainer.step, trainer.state())
        while writer.busy:
            during.append(_seconds(lambda: next(stepping).item()))
        seconds, size = time.perf_counter() - started, max(path.stat().st_size for path in Path(folder).iterdir())
    stepping.close()
    usual, every = statistics.median(plain), Resources().checkpoint_every
    slowed = sum(during) - usual * len(during)
    print(f"checkpoint of {size / 1e9:.2f} GB: copied in {writer.stalled:.2f} s, written in {seconds:.1f} s beside {len(during)} steps, which took {slowed:.2f} s longer")
    print(f"stall every {every} steps of {usual:.3f} s: {(writer.stalled + slowed) / (every * usual):.3%}")


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _latents() -> None:
    """Latents a second over a temporary folder of random moments, shuffled batches of 256 in two threads."""
    import json

    import numpy as np
    import torch

    from experiments.engine.data import batches
    from experiments.engine.latents import LatentSet, shard_path
    from experiments.engine.spec import Data

    batch, shards, each, steps = 256, 8, 512, 40
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), np.random.default_rng(0)
        for number in range(shards):
            np.save(shard_path(folder, number), draw.random((each, 2, 8, 32, 32), np.float32))
        np.save(folder / "labels.npy", draw.integers(0, 1000, shards * each))
        vae = {"name": "none", "encoder": "none"}
        manifest = {"latents": "moments", "shape": [2, 8, 32, 32], "num_classes": 1000, "shards": [each] * shards, "sha256": "", "vae": vae}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"statistics": {"as_expected": False}}))
        images = LatentSet(folder, Data("latents", size=32, channels=4, num_classes=1000, flip=True, vae="none"))
        for _ in batches(images, batch, 0, range(len(images) // batch), torch.device("cpu")):
            pass
        rates, busy = [], time.process_time()
        for seed in range(PAIRS):
            started = time.perf_counter()
            for _ in batches(images, batch, seed, range(steps), torch.device("cpu")):
                pass
            rates.append(steps * batch / (time.perf_counter() - started))
        busy = (time.process_time() - busy) / (PAIRS * steps * batch)
    spread = f"{min(rates):,.0f} to {max(rates):,.0f} over {PAIRS} runs"
    print(f"latents: {statistics.median(rates):,.0f} a second ({spread}), {1e6 * busy:.0f} us of a core each; batch {batch}, 2 threads, {len(_cores())} cores")


def _main_job() -> None:
    """Peak memory is the largest sum over the process tree, sampled four times a second."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        job = subprocess.Popen([sys.executable, str(SCRIPT), "--table", "4", "--results", folder], start_new_session=True)
        peak, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.25):
                peak[0] = max(peak[0], _tree_bytes(job.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = job.wait()
        ended.set()
        watcher.join()
        print(f"main job: exit status {status}, {time.perf_counter() - started:.0f} s, at most {peak[0] / 2**30:.2f} GiB on {len(_cores())} cores")


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
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


if __name__ == "__main__":
    raise SystemExit(main())
