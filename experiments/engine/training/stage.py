"""The Train stage: train or resume in a folder, and keep log, heartbeat and checkpoints there."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from experiments.engine.data.sets import AnySet, batch_indices, load
from experiments.engine.numerics.parts import gather_state
from experiments.engine.numerics.weights import digest
from experiments.engine.records.weight_files import require_weights
from experiments.engine.runtime.attempts import begin_attempt
from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.group import DelayedMaximum
from experiments.engine.runtime.heartbeat import RunState
from experiments.engine.runtime.preemption import Preempted, StopRequest
from experiments.engine.runtime.progress import Progress
from experiments.engine.specs.spec import Train
from experiments.engine.specs.weights import Weights
from experiments.engine.texts.tables import identify_captions
from experiments.engine.training import averages, checkpoint
from experiments.engine.training.bands import bands_of
from experiments.engine.training.boards import require_boards
from experiments.engine.training.log import Log, curve
from experiments.engine.training.networks import load_ema
from experiments.engine.training.next_scale.tokens import encode_set, load_tokenizer
from experiments.engine.training.optimiser import lr_at
from experiments.engine.training.trainer import Trainer
from experiments.engine.training.watch import replay
from experiments.engine.training.watch.divergence import Diverged, find_bad_loss, has_finite_weights

LOG_EVERY = 50  # steps from one line of the log to the next
FINAL_STEPS = 200  # steps at the end whose mean loss is the run's loss


def run_training(spec: Train, context: RunContext) -> dict[str, Any]:
    """Train, or go on training, in the context's folder, and return the values of the record.

    Every rank of the group calls this. Rank 0 writes, and has the heartbeat.

    Raises:
        Diverged: A loss or a weight is not finite, or the loss has jumped.
        Preempted: The job was asked to stop, and has saved.
        OSError: A checkpoint or the log cannot be written.
    """
    require_boards()
    group, resources = context.group, context.resources
    snapshots = averages.snapshot_steps(spec.recipe)
    teacher = _load_teacher(spec, context)
    trained = (
        load_tokenizer(spec, context.folder.parent, context.device) if spec.tokenizer else None
    )
    tokenizer = trained.network if trained else None
    trainer = Trainer(spec, resources, group, teacher=teacher, tokenizer=tokenizer)
    pending = _restore(trainer, context, teacher)
    if context.heartbeat:
        begin_attempt(context.heartbeat, trainer.step)
        context.heartbeat.update(
            state=RunState.TRAINING, step=trainer.step, steps=spec.recipe.steps
        )

    images = load(spec.data)
    if trained:
        images = encode_set(images, trained, context.device)
    checkpoints = context.folder / "checkpoints"
    with ExitStack() as stack:
        log = None
        if group.first:
            log = stack.enter_context(Log(context.folder, trainer.step, bands_of(spec)))
        writer = stack.enter_context(
            checkpoint.Writer(checkpoints, resources.keep, resources.milestones)
        )
        attempt = _Attempt(trainer, context, writer, log, pending, images)
        for loss in trainer.steps(images):
            # Averages are on disk before a checkpoint of the same step, or a later one, is.
            if trainer.averages and trainer.step in snapshots:
                kept_averages = gather_state(trainer.averages.snapshot(), group.first)
                if group.first:
                    folder = context.folder / averages.FOLDER
                    checkpoint.save(folder, trainer.step, kept_averages, milestones=1)
            attempt.follow(loss)
        writer.wait()
    kept = {"power_averages": averages.describe(spec.recipe)} if snapshots else {}
    identity = images.identity | identify_captions(trainer.model)
    if trainer.aligner:
        kept["alignment"] = trainer.aligner.identity
    start = {"start": trainer.start} if trainer.start else {}
    return attempt.values() | identity | kept | start | attempt.warnings()


def _load_teacher(spec: Train, context: RunContext) -> nn.Module | None:
    """Load the averaged network that a distillation learns from."""
    if spec.distillation is None:
        return None
    teacher = spec.distillation.teacher
    return load_ema(teacher, context.folder_of(teacher), context.device)


def _restore(trainer: Trainer, context: RunContext, teacher: nn.Module | None) -> list[Tensor]:
    """Bring a trainer to where the run stands, and return the losses since its last log line."""
    # Rank 0 chooses the checkpoint, so that all ranks resume from the same step.
    group, spec = trainer.group, trainer.spec
    checkpoints = context.folder / "checkpoints"
    path = group.broadcast(checkpoint.newest_intact(checkpoints) if group.first else None)
    if path:
        step, state = checkpoint.load(path, like=trainer.parted_like())
        trainer.restore(step, state)
        # The saved losses are sums over the ranks, so rank 0 alone takes them over.
        losses = state.get("losses", torch.empty(0)).to(trainer.device)
        return list(losses if group.first else torch.zeros_like(losses))

    if isinstance(spec.init_from, Weights):
        trainer.start_from_file(spec.init_from, require_weights(spec.init_from.sha256))
    elif spec.init_from:
        folder = context.folder_of(spec.init_from)
        trainer.start_from(load_ema(spec.init_from, folder, trainer.device))
    elif teacher is not None and spec.distillation is not None and spec.distillation.inherits:
        trainer.inherit_from(teacher)
    return []


class _Attempt:
    """What happens beside the steps of a training: the watch, the log, checkpoints, the stop."""

    def __init__(
        self,
        trainer: Trainer,
        context: RunContext,
        writer: checkpoint.Writer,
        log: Log | None,
        pending: list[Tensor],
        images: AnySet,
    ) -> None:
        self.trainer = trainer
        self.context = context
        self.group = context.group
        self.writer = writer
        self.log = log
        self.images = images
        self.first_step = trainer.step
        self.started = time.perf_counter()

        # This rank's losses since the last line of the log.
        self.pending = pending
        # Losses of all lines of the log. The log appends to its own list.
        self.means: list[float] = list(self.group.broadcast(log.losses if log else None))
        # Steps that are safe on disk, or will be soon.
        self.saved = [trainer.step]
        self._agree = DelayedMaximum(self.group)

    def follow(self, loss: Tensor) -> None:
        """Do what is due after a step: check, log, save, and stop if the job was asked to."""
        self.pending.append(loss)
        request = StopRequest(self._agree(self.context.requested_stop()))
        if request == StopRequest.TAKEN_OVER:
            raise Preempted(request)

        # What is due.
        step, steps = self.trainer.step, self.trainer.spec.recipe.steps
        is_last = step == steps
        logs = is_last or step % LOG_EVERY == 0
        saves = is_last or step % self.context.resources.checkpoint_every == 0 or bool(request)

        # Nothing is logged or saved of a training that has diverged.
        unlogged = torch.empty(0)
        if logs or saves:
            unlogged = self.group.sum(torch.stack(self.pending))
            self._check_losses(unlogged)
        if saves and not has_finite_weights(self.trainer.model):
            raise self._diverged("the update made weights that are not finite", step)
        if logs:
            self._write_log(unlogged)
            unlogged = unlogged[:0]

        # A heartbeat tells when a save is the last work of an attempt.
        if self.context.heartbeat:
            is_ending = saves and (is_last or bool(request))
            state = RunState.SAVING if is_ending else RunState.TRAINING
            self.context.heartbeat.update(step=step, state=state)
        if saves:
            self._save(unlogged)
        if request and not is_last:
            self._stop(request)

    def _check_losses(self, losses: Tensor) -> None:
        """Raise Diverged if one of the latest losses, which end at this step, is bad."""
        # A few losses alone can be high by chance.
        means = self.means if len(losses) >= LOG_EVERY else []
        bad = find_bad_loss(losses.tolist(), means)
        if bad:
            step = self.trainer.step - len(losses) + 1 + bad.index
            raise self._diverged(f"the loss {bad.problem}", step)

        # A gradient shows no sign in the losses before the step after it.
        frozen = self.trainer.freeze.step
        if frozen is not None:
            raise self._diverged("the gradient is not finite", frozen + 1)

    def _write_log(self, losses: Tensor) -> None:
        """Write a line of the log, and report the progress."""
        step, recipe = self.trainer.step, self.trainer.spec.recipe

        # The mean joins those of the log, and the next line starts empty.
        mean = losses.mean().item()
        rate = self._images_per_second()
        self.pending = []
        self.means.append(mean)

        # Only the rank that has the log writes it.
        if self.log:
            # A disk that a finished save found full is known now, not at the next save.
            if not self.writer.busy:
                self.writer.wait()
            for look in self.trainer.looks:
                self.log.write_look(look)
            self.log.write(
                step=step, loss=mean, lr=lr_at(recipe, step - 1), images_per_s=round(rate, 1)
            )
            self.context.report(Progress(step, recipe.steps, rate, mean))
        self.trainer.looks.clear()

        # The heartbeat tells the watcher that this rank still works.
        if self.context.heartbeat:
            self.context.heartbeat.update(loss=mean, images_per_s=round(rate, 1))

    def _save(self, unlogged: Tensor) -> None:
        """Start to write a checkpoint, which holds the losses that no log line has yet."""
        trainer, kept = self.trainer, {"losses": unlogged}
        is_last = trainer.step == trainer.spec.recipe.steps
        if trainer.is_parted and not is_last:
            self.writer.save_parts(trainer.step, trainer.own_state() | kept, self.group)
        else:
            # Whatever reads a finished network finds it whole.
            state = trainer.state()
            if self.group.first:
                self.writer.save(trainer.step, state | kept)
        self.saved.append(trainer.step)

    def _stop(self, request: StopRequest) -> None:
        """Leave once the checkpoint is on disk, all ranks together."""
        self.writer.wait()
        # Whichever rank leaves first can take the others with it.
        self.group.broadcast(None)
        raise Preempted(request)

    def _diverged(self, problem: str, step: int) -> Diverged:
        """Return the error for a problem at a step, with the batch that led to it."""
        spec = self.trainer.spec
        recipe = spec.recipe
        batch = batch_indices(len(self.images), recipe.batch, spec.seed, step - 1)

        # The last checkpoint before the problem is where a new attempt can start.
        earlier = [saved for saved in self.saved if saved < step]
        values = {
            "stopped_at": step,
            "batch": batch.tolist(),
            "last_checkpoint": max(earlier, default=self.saved[0]),
        }

        # Rank 0 runs a step that was not made again, and the others wait for what it finds. A
        # network that all share, all run.
        advice = f"lower the learning rate ({recipe.lr}) or lengthen the warm-up"
        message = f"{problem} at step {step}; {advice} ({recipe.warmup} steps)"
        if self.trainer.freeze.step is not None:
            runs = self.group.first or self.trainer.is_parted
            diagnosis = self.group.broadcast(
                replay.replay(self.trainer, self.images) if runs else None
            )
            values["diagnosis"] = diagnosis
            message += replay.describe(diagnosis)
        return Diverged(message, values)

    def _images_per_second(self) -> float:
        """Return the throughput of this attempt."""
        images = (self.trainer.step - self.first_step) * self.trainer.spec.recipe.batch
        return images / (time.perf_counter() - self.started)

    def values(self) -> dict[str, Any]:
        """Return the values of the record of a finished training."""
        # All ranks must hold the same weights, or the record would speak for one of them.
        weights = digest(self.trainer.ema)
        if not self.group.agrees_on(weights):
            raise RuntimeError("the ranks' weights differ at the end of the training")

        # The loss of the record is the mean over the last lines of the log.
        tail = self.means[-max(1, FINAL_STEPS // LOG_EVERY) :]
        return {
            "loss": sum(tail) / len(tail) if tail else None,
            "steps": self.trainer.step,
            "curve": curve(self.means, LOG_EVERY),
            "resumed_at": self.first_step,
            # Seconds of this attempt: copies, and the wait for the last save to be on disk.
            "checkpoint_stall_s": round(self.writer.stalled, 3),
            "images_per_s": self._images_per_second(),
            "weights_sha256": weights,
        }

    def warnings(self) -> dict[str, list[str]]:
        """Return for the record what was noted of the weights at the start, and of the loss.

        The loss may have left the bands of the authors' logs.
        """
        lines = [*self.trainer.start.get("warnings", [])]
        lines += self.log.warnings() if self.log else []
        return {"warnings": lines} if lines else {}
