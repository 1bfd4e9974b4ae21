"""Draw images of a declared row: `python experiments/sample.py --row DiCo-S --num 50000`.

Each image comes from its own seed, so the set depends on neither the batch nor the number of processes (srun or torchrun starts
several, one a GPU) but by rounding, and not on where a stopped run went on. Labels follow the
protocol's policy. Writes an ADM-readable .npz (arr_0 images, arr_1 labels, shuffled with a fixed seed) and, with --png,
one PNG an image. The Evaluate stage of the same row and number scores the same images: with Inception these very files, on a
classifier's features drawn anew in other batches, so the same to rounding (of digits before they are rounded to 8 bits).
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import ablation, main_results
from experiments.declared.protocols import PROTOCOLS
from experiments.engine.cli import Parser, add_fast_options, fast, guarded
from experiments.engine.data.locate import require_data
from experiments.engine.jobs.pool import Job
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.records.store import REPOSITORY, Store
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.rows import table_of
from experiments.engine.specs.stages import evaluate_stage

if TYPE_CHECKING:
    from experiments.engine.runtime.context import RunContext
    from experiments.engine.sampling.samples import SampleSet
    from experiments.engine.specs.spec import Evaluate

TABLES = ablation.TABLES | main_results.TABLES


def main() -> int:
    return guarded(_main, _cannot_write)


def _cannot_write(error: OSError) -> str:
    return f"cannot write images ({error.strerror}); free space or choose another folder with --results or --out"


def _main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table",
        type=int,
        choices=sorted(TABLES),
        help="that declares the row (default: the one that does)",
    )
    parser.add_argument("--row", required=True, help="by its label")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="digits")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the training run (default: 0)"
    )
    parser.add_argument(
        "--num", type=int, metavar="N", help="images (default: as the protocol scores)"
    )
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="another than the protocol's: ancestral, ddim, dpm_solver, dpm_solver_diffusers; of flows euler, heun, dopri5, sde",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of the sampler (default: as the protocol's)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the .npz (default: samples.npz in the run's folder)",
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="also one PNG an image")
    parser.add_argument(
        "--batch",
        type=int,
        default=250,
        metavar="N",
        help="images at a time on a GPU, which changes no image but by rounding (default: 250)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=os.environ.get("RESULTS") or None,
        metavar="DIR",
        help="results folder (default: $RESULTS, else results)",
    )
    add_fast_options(parser)
    return _run(parser.parse_args())


def _run(args: argparse.Namespace) -> int:
    protocol = PROTOCOLS[args.protocol]
    table = (
        TABLES[args.table]
        if args.table
        else table_of(args.row, TABLES, lambda row: evaluate_stage(row, protocol, args.seed))
    )
    row = table.row(args.row)
    if row.backbone is None:
        raise ValueError(
            f"row {args.row!r} holds published numbers only: there is no network to sample"
        )
    if min(args.batch, *(value for value in (args.num, args.steps) if value is not None), 1) < 1:
        raise ValueError("--num, --steps and --batch take numbers from 1 on")
    spec = evaluate_stage(row, protocol, args.seed)
    sampler = replace(
        spec.sampler,
        name=args.sampler or spec.sampler.name,
        num_steps=args.steps or spec.sampler.num_steps,
    )
    spec = replace(spec, num=args.num or spec.num, sampler=sampler)
    require_data(spec.data)

    import torch

    from experiments.engine.diffusion.build import build_diffusion
    from experiments.engine.diffusion.samplers import bind_sampler
    from experiments.engine.jobs.execute import require_device
    from experiments.engine.runtime import group as distributed
    from experiments.engine.runtime.context import Resources, RunContext
    from experiments.engine.sampling.samples import decoder_warnings

    bind_sampler(
        sampler, build_diffusion(spec.train.diffusion)
    )  # an unknown sampler is said before anything is drawn
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    resources, store = (
        Resources(device, sample_batch=args.batch, **fast(args, device)),
        Store(args.results, REPOSITORY / "results" / "reference"),
    )
    store.check_writable()
    out, job = (
        args.out or store.run_dir(spec) / "samples.npz",
        Job(f"{args.row}, {spec.num} images", (spec,)),
    )
    group = distributed.join_group(device, resources.timeout)
    with ExitStack() as held:
        display = held.enter_context(ProgressDisplay(total=1, lines=True)) if group.first else None

        def report(progress: Progress) -> None:
            if display:  # the other ranks draw as fast
                rate = progress.rate * group.world_size
                display.notify(job, "progress", replace(progress, rate=rate))

        context = RunContext(store.run_dir(spec.train), resources, group, report=report)
        samples = _drawn(spec, store, context, held)
        if not group.first:
            return 0
        samples.pack(out)
        if args.png:
            samples.write_png(args.png)
    for text in decoder_warnings(spec.data, samples.made["decoder"]):
        print(f"warning: {text}", file=sys.stderr)
    print(
        f"{spec.num} images {samples.shape[1]} x {samples.shape[2]}, {spec.labels} labels, seed {spec.seed}, {samples.nfe:g} network evaluations each: {out}"
    )
    return 0


def _drawn(spec: Evaluate, store: Store, context: RunContext, held: ExitStack) -> SampleSet:
    """The set, drawn by all ranks; the first one's hold on its folder lasts as long as `held`. Where one rank fails all end, each with its error."""
    from experiments.engine.runtime import failures, preemption
    from experiments.engine.runtime.heartbeat import claim_run
    from experiments.engine.sampling.samples import generate_samples

    group, heartbeat = context.group, None
    folder, refusal = store.run_dir(spec), None
    if group.first:
        try:
            heartbeat = held.enter_context(claim_run(folder, group.world_size))
            failures.clear_errors(folder)
        except (ValueError, OSError) as error:
            refusal = error
    if refusal := group.broadcast(refusal):  # every rank says so
        raise refusal
    try:
        with failures.FailureWatch(
            group, folder, lambda error: print(f"error: {error}", file=sys.stderr, flush=True)
        ):
            return generate_samples(spec, replace(context, heartbeat=heartbeat))
    except Exception as failure:
        if group.world_size == 1:
            raise
        try:
            raise ValueError(failures.explain_failure(folder, group, failure)) from None
        except failures.RankLost as lost:
            print(
                f"error: {lost}; the same command goes on where this one stopped", file=sys.stderr
            )
            raise SystemExit(preemption.LOST) from None


if __name__ == "__main__":
    raise SystemExit(main())
