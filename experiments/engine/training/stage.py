from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from experiments.engine.data.sets import batch_indices, load_data
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.attempts import begin_attempt
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.group import DelayedMaximum
from experiments.engine.runtime.preemption import Preempted, StopRequest
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.spec import Train, spec_id
from experiments.engine.training import checkpoint
from experiments.engine.training import log as bands
from experiments.engine.training.log import Diverged, Log, curve, require_boards, trouble
from experiments.engine.training.trainer import Trainer, load_ema, lr_at

LOG_EVERY = 50


def run_training(
    spec: Train,
    context: RunContext,
) -> dict[str, Any]:
    """Train, or go on training, in the context's folder.

    Every rank of the group calls this; the first one writes, and has the heartbeat. Raises Diverged (a ValueError in one
    line, with values for the record) when the loss or a weight is not finite or the loss jumps, and Preempted, once it has saved, when the job
    is asked to stop.
    """
    folder, resources, group = context.folder, context.resources, context.group
    beat = context.heartbeat
    recipe = spec.recipe
    require_boards()
    trainer = Trainer(
        spec,
        torch.device(resources.device),
        resources.micro_batch,
        group,
        resources.shard_optimizer,
        resources.compile,
        resources.graphs,
    )
    losses: list[Tensor] = []  # since the last line of the log
    if found := group.broadcast(
        checkpoint.newest_intact(folder / "checkpoints") if group.first else None
    ):
        step, state = checkpoint.load(found)
        trainer.restore(step, state)
        losses += [
            loss if group.first else torch.zeros_like(loss)
            for loss in state.get("losses", torch.empty(0)).to(trainer.device)
        ]
    elif spec.init_from:
        trainer.begin(
            load_ema(spec.init_from, folder.parent / spec_id(spec.init_from), trainer.device)
        )
    first, started, saved = trainer.step, time.perf_counter(), [trainer.step]
    if beat:
        begin_attempt(beat, first)
        beat.update(state="training", step=first, steps=recipe.steps)
    images, stop = load_data(spec.data), DelayedMaximum(group)
    with (
        Log(folder, first, bands.bands_of(spec)) if group.first else nullcontext() as log,
        checkpoint.Writer(folder / "checkpoints", resources.keep, resources.milestones) as writer,
    ):
        means = list(
            group.broadcast(log.losses if group.first else None)
        )  # the log appends to its own
        for loss in trainer.steps(images):
            losses.append(loss)
            done = trainer.step
            how = StopRequest(stop(context.requested_stop()))
            if how == StopRequest.TAKEN_OVER:
                raise Preempted(how)
            last = done == recipe.steps
            logs = done % LOG_EVERY == 0 or last
            saves = done % resources.checkpoint_every == 0 or last or bool(how)
            if logs or saves:
                latest = group.sum(torch.stack(losses))
                usual = (
                    means if len(latest) >= LOG_EVERY else ()
                )  # a few losses can be high by chance
                _check(latest.tolist(), usual, trainer, len(images), saved)
            if saves and not _finite(trainer.model):
                raise _diverged(
                    "the update made weights that are not finite", done, trainer, len(images), saved
                )
            if logs:
                mean, rate = (
                    latest.mean().item(),
                    (done - first) * recipe.batch / (time.perf_counter() - started),
                )
                losses, latest = [], latest[:0]
                means.append(mean)
                if group.first:
                    if not writer.busy:
                        writer.wait()  # a full disk is known now, not at the next save
                    log.write(
                        step=done,
                        loss=mean,
                        lr=lr_at(recipe, done - 1),
                        images_per_s=round(rate, 1),
                    )
                    context.report(Progress(done, recipe.steps, rate, mean))
                if beat:
                    beat.update(loss=mean, images_per_s=round(rate, 1))
            if beat:
                beat.update(step=done, state="saving" if saves and (last or how) else "training")
            if saves:
                state = trainer.state()
                if group.first:
                    writer.save(done, state | {"losses": latest})
                saved.append(done)
            if how and not last:
                writer.wait()
                group.broadcast(None)  # the first rank that leaves can take the others with it
                raise Preempted(how)
        writer.wait()
    weights = digest(trainer.ema)
    if not group.agrees_on(weights):
        raise RuntimeError("the ranks' weights differ at the end of the training")
    tail = means[-max(1, 200 // LOG_EVERY) :]
    return {
        "loss": sum(tail) / len(tail) if tail else None,
        "steps": trainer.step,
        "curve": curve(means, LOG_EVERY),
        "resumed_at": first,
        "checkpoint_stall_s": round(
            writer.stalled, 3
        ),  # of this attempt: copies, and the wait for the last to be on disk
        "images_per_s": (trainer.step - first) * recipe.batch / (time.perf_counter() - started),
        "weights_sha256": weights,
        **images.identity,
        **(log.warnings() if log else {}),
    }


def _check(
    losses: list[float], means: Sequence[float], trainer: Trainer, size: int, saved: Sequence[int]
) -> None:
    """Raise Diverged if the latest losses, which end at the trainer's step, are bad."""
    if bad := trouble(losses, means):
        raise _diverged(
            f"the loss {bad[1]}", trainer.step - len(losses) + 1 + bad[0], trainer, size, saved
        )


def _finite(model: nn.Module) -> bool:
    """Whether every weight is: a loss is of the weights before its update."""
    return bool(torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all())


def _diverged(what: str, step: int, trainer: Trainer, size: int, saved: Sequence[int]) -> Diverged:
    recipe = trainer.spec.recipe
    batch = batch_indices(size, recipe.batch, trainer.spec.seed, step - 1).tolist()
    advice = (
        f"lower the learning rate ({recipe.lr}) or lengthen the warm-up ({recipe.warmup} steps)"
    )
    return Diverged(
        f"{what} at step {step}; {advice}",
        {
            "stopped_at": step,
            "batch": batch,
            "last_checkpoint": max((at for at in saved if at < step), default=saved[0]),
        },
    )
