"""Measure what this suite promises of its own speed: `python experiments/benchmark.py`.

Counting every row of Tables 1 (DiT, DiCo), 3, 4 and 5 on the meta device; `--report` and whether it stays without
torch; a training step and a sampling step of dico_s and dit_s_2. With `--against dico_s=FILE:NAME` the same steps of
another implementation (constructor NAME in FILE) run in turn with ours under the same loop. `--main-job` runs
`--table 4` from nothing in a temporary folder and prints its seconds and peak memory. `--latents` times the loader alone:
32 x 32 x 4 moments, drawn anew, from a warm page cache in two threads. `--checkpoints` measures how long training stalls
for a checkpoint, in the copy and by the writing beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine.store import REPOSITORY

if TYPE_CHECKING:
    from torch import nn

SCRIPT = REPOSITORY / "experiments" / "ablation.py"
BATCH, PAIRS = 4, 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", nargs="*", default=[], metavar="BACKBONE=FILE:NAME", help="other implementations to time in turn with ours")
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
    try:
        others = dict(_other(text) for text in args.against)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _report()
    _counts()
    for name in ("dico_s", "dit_s_2"):
        _steps(name, others.get(name))
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


def _other(text: str) -> tuple[str, Callable[[], nn.Module]]:
    name, _, where = text.partition("=")
    file, _, constructor = where.rpartition(":")
    if name not in ("dico_s", "dit_s_2") or not Path(file).is_file():
        raise ValueError(f"--against takes dico_s=FILE:NAME or dit_s_2=FILE:NAME with an existing file, got {text!r}")
    spec = importlib.util.spec_from_file_location(f"other_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return name, getattr(module, constructor)


def _steps(name: str, other: Callable[[], nn.Module] | None) -> None:
    import torch

    from experiments.engine.spec import Backbone
    from experiments.engine.train import build

    models = [build(Backbone(name), 0, torch.device("cpu"))] + ([other()] if other else [])
    for label, make in (("training", _training_step), ("sampling", _sampling_step)):
        steps = [make(model) for model in models]
        for step in steps:
            step()
        times = [[_seconds(step) for step in steps] for _ in range(PAIRS)]
        line = f"{name} {label} step, batch {BATCH}: {statistics.median(t[0] for t in times):.3f} s"
        if other:
            ratios = [theirs / ours for ours, theirs in times]
            line += f"; the other takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f} over {PAIRS} pairs)"
        print(line, flush=True)


def _training_step(model: nn.Module) -> Callable[[], None]:
    import copy

    import torch

    from experiments.engine.diffusion import IDDPM
    from experiments.engine.train import update_ema

    model.train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    diffusion, (x, t, y) = IDDPM.linear(), _batch()

    def step() -> None:
        diffusion.losses(model, x, y, t, torch.randn_like(x))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, 0.9999)

    return step


def _sampling_step(model: nn.Module) -> Callable[[], None]:
    import torch

    from experiments.engine.diffusion import IDDPM

    model.eval()
    diffusion, (x, t, y) = IDDPM.linear().respaced(250), _batch()

    @torch.no_grad()
    def step() -> None:
        mean, log_variance, _ = diffusion.posterior(x, 100, model(x, t, y))
        torch.addcmul(mean, (0.5 * log_variance).exp(), torch.randn_like(x))

    return step


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


def _batch() -> tuple:
    import torch

    return torch.randn(BATCH, 4, 32, 32), torch.full((BATCH,), 400), torch.arange(BATCH)


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
