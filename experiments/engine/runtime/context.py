"""What a stage needs beside its spec: folder, machine, other processes, and whom to tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.engine.runtime.group import ALONE, Group
from experiments.engine.runtime.heartbeat import Heartbeat
from experiments.engine.runtime.preemption import StopRequest, requested_stop
from experiments.engine.runtime.progress import Report, ignore_progress
from experiments.engine.specs.spec import Stage, spec_id


@dataclass(frozen=True)
class Resources:
    """What a run may use. Nothing here names a run or changes its numbers by more than rounding."""

    # Where the network runs: "cpu" or "cuda".
    device: str = "cpu"
    # Samples per forward pass of a training process. None: the whole share of the batch.
    micro_batch: int | None = None
    # Images that a GPU samples at a time.
    sample_batch: int = 250
    # Steps between two checkpoints.
    checkpoint_every: int = 2000
    # Steps between two looks at gradients and activations of every block; 0: never.
    watch_every: int = 200
    # How many of the newest checkpoints are kept.
    keep: int = 2
    # Checkpoints at multiples of this many steps are kept for good.
    milestones: int | None = None
    # Whether each process holds only its part of the optimiser's state.
    shard_optimizer: bool = False
    # Whether each process holds only its part of weights, averages and all else.
    fully_shard: bool = False
    # Whether a training keeps of each block its inputs alone, and computes the rest again.
    recompute: bool = False
    # Seconds after which a collective operation gives up.
    timeout: float = 1800.0
    # File of a published checkpoint, for stages that start from one.
    checkpoint: Path | None = None
    # Whether networks are compiled.
    compile: bool = False
    # Whether CUDA graphs launch the sampler's steps, and the passes of a training by one process.
    graphs: bool = False


@dataclass(frozen=True)
class RunContext:
    """What a stage works with: its folder, resources, group, heartbeat and report."""

    # Folder of the training. The folders of other stages lie beside it, under their ids.
    folder: Path
    # Device, batch sizes and checkpoints.
    resources: Resources = Resources()
    # The processes that share the work.
    group: Group = ALONE
    # Sign of life of the first process. The other processes have none.
    heartbeat: Heartbeat | None = None
    # Hears how far the stage is.
    report: Report = ignore_progress

    @property
    def device(self) -> torch.device:
        """The device that the resources name."""
        return torch.device(self.resources.device)

    def folder_of(self, stage: Stage) -> Path:
        """Folder of another stage of the same results."""
        return self.folder.parent / spec_id(stage)

    def requested_stop(self) -> StopRequest:
        """Return why this process should stop now, if it should."""
        if self.heartbeat and self.heartbeat.taken_over:
            return StopRequest.TAKEN_OVER
        return requested_stop()
