"""The trainer: one loop for every backbone, resumable at any step with the same weights to the last bit."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.engine import checkpoint
from experiments.engine.data import ImageSet, batch_indices, load
from experiments.engine.diffusion import IDDPM
from experiments.engine.precision import precision
from experiments.engine.randomness import generator_at, seed_at
from experiments.engine.spec import Backbone, Recipe, Train

LOG_EVERY = 50


@dataclass(frozen=True)
class Resources:
    """What a run is given, which does not name it: device, samples at a time, steps between checkpoints, a published file."""

    device: str = "cpu"
    micro_batch: int | None = None
    sample_batch: int = 250
    checkpoint_every: int = 2000
    checkpoint: Path | None = None


def build(spec: Backbone, seed: int, device: torch.device) -> nn.Module:
    """The declared network, initialised from the seed, its activations channels-last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("init", seed))
        model = backbones.build(spec.name, **spec.options)
    return model.to(device=device, memory_format=torch.channels_last)


def lr_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then constant or cosine to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.decay == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))
    if recipe.decay != "constant":
        raise ValueError(f"unknown decay {recipe.decay!r}; known: constant, cosine")
    return recipe.lr


class Trainer:
    """Model, EMA and optimiser of a run, and the step it has reached."""

    def __init__(self, spec: Train, device: torch.device, micro_batch: int | None = None) -> None:
        self.spec, self.device = spec, device
        self.micro_batch = micro_batch or spec.recipe.batch
        self.model = build(spec.backbone, spec.seed, device)
        self.ema = build(spec.backbone, spec.seed, device).requires_grad_(False)
        self.forward = torch.compile(self.model) if spec.recipe.compile else self.model
        recipe = spec.recipe
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True)
        self.diffusion = IDDPM.linear(spec.diffusion.num_steps).to(device)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, step: int, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = step

    def steps(self, images: ImageSet) -> Iterator[Tensor]:
        """Train from the step reached to the last, yielding each step's loss (0-d, on the device)."""
        recipe = self.spec.recipe
        while self.step < recipe.steps:
            x0, y = images.take(batch_indices(len(images), recipe.batch, self.spec.seed, self.step))
            loss = self._update(x0.to(self.device), y.to(self.device))
            self.step += 1
            yield loss

    def _update(self, x0: Tensor, y: Tensor) -> Tensor:
        """One optimiser step on a global batch. Its noise depends on (seed, step) and the place in the batch only."""
        recipe, n = self.spec.recipe, len(x0)
        noise = generator_at("train", self.spec.seed, self.step, device=self.device)
        t = torch.randint(self.diffusion.num_steps, (n,), generator=noise, device=self.device)
        eps = torch.randn(x0.shape, generator=noise, device=self.device)
        dropped = torch.rand(n, generator=noise, device=self.device) < recipe.label_dropout
        flipped = torch.rand(n, generator=noise, device=self.device) < 0.5
        y = torch.where(dropped, self.spec.data.num_classes, y)
        if self.spec.data.flip:
            x0 = torch.where(flipped[:, None, None, None], x0.flip(-1), x0)
        total = torch.zeros((), device=self.device)
        for part in torch.arange(n).split(self.micro_batch):
            at = slice(int(part[0]), int(part[-1]) + 1)
            with precision(recipe.precision, self.device):
                loss = self.diffusion.losses(self.forward, x0[at], y[at], t[at], eps[at])["loss"].sum() / n
                with torch.autocast(self.device.type, enabled=False):  # each op's backward runs in its forward's type
                    loss.backward()
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(recipe, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.model, recipe.ema)
        return total


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model for every parameter; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)


def run(spec: Train, folder: Path, resources: Resources, report: Callable[[int, int, float, float], None]) -> dict[str, Any]:
    """Train, or go on training, in `folder`; `report(step, steps, loss, images per second)` hears of the progress.

    Raises ValueError in one line when the loss is not finite.
    """
    device, recipe = torch.device(resources.device), spec.recipe
    trainer = Trainer(spec, device, resources.micro_batch)
    if found := checkpoint.load_newest(folder / "checkpoints", device):
        trainer.restore(*found)
    first, started = trainer.step, time.perf_counter()
    images = load(spec.data)
    losses: list[Tensor] = []
    with _Log(folder, first) as log:
        for loss in trainer.steps(images):
            losses.append(loss)
            done = trainer.step
            if done % LOG_EVERY == 0 or done == recipe.steps:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                if not math.isfinite(mean):
                    raise ValueError(f"the loss is {mean} after {done} steps; lower the learning rate ({recipe.lr}) or lengthen the warm-up ({recipe.warmup} steps)")
                rate = (done - first) * recipe.batch / (time.perf_counter() - started)
                log.write(done, mean, lr_at(recipe, done - 1), rate)
                report(done, recipe.steps, mean, rate)
            if done % resources.checkpoint_every == 0 or done == recipe.steps:
                checkpoint.save(folder / "checkpoints", done, trainer.state())
        tail = log.losses[-max(1, 200 // LOG_EVERY) :]
    return {
        "loss": sum(tail) / len(tail) if tail else None,
        "steps": trainer.step,
        "resumed_at": first,
        "images_per_s": (trainer.step - first) * recipe.batch / (time.perf_counter() - started),
        "weights_sha256": digest(trainer.ema),
    }


def load_ema(spec: Train, folder: Path, device: torch.device) -> nn.Module:
    """The finished run's EMA network in eval mode; ValueError if the run has not finished."""
    found = checkpoint.load_newest(folder / "checkpoints", device)
    if found is None or found[0] < spec.recipe.steps:
        raise ValueError(f"run {folder.name} has no finished checkpoint; if it was removed, remove records/train/{folder.name}-*.json too and train again")
    model = build(spec.backbone, spec.seed, device)
    model.load_state_dict(found[1]["ema"])
    return model.eval()


def digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


class _Log:
    """Loss and rate to a JSON-lines file and, where it is installed, TensorBoard; steps after `first` are rewritten."""

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # the last line of a killed run can be cut
                kept.append(json.loads(line))
        kept = [entry for entry in kept if entry["step"] <= first]
        self.losses = [entry["loss"] for entry in kept]
        self.file = path.open("w")
        self.file.writelines(json.dumps(entry) + "\n" for entry in kept)
        self.board = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=first + 1)

    def write(self, step: int, loss: float, lr: float, rate: float) -> None:
        self.losses.append(loss)
        self.file.write(json.dumps({"step": step, "loss": loss, "lr": lr, "images_per_s": round(rate, 1)}) + "\n")
        self.file.flush()
        if self.board:
            self.board.add_scalar("loss", loss, step)
            self.board.add_scalar("images_per_s", rate, step)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()
