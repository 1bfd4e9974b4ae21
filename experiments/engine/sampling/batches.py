"""The images of a spec in batches that a group shares, each reduced to what its scores need."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.engine.runtime.context import RunContext
from experiments.engine.runtime.pieces import Arrays, compute_pieces, count_missing
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.forecast import announce_sampling
from experiments.engine.sampling.generate import can_capture_steps, generate_images
from experiments.engine.specs.spec import Evaluate

# Images that a CPU samples and reads at a time, whatever the resources say: there, both round by
# the batch.
BATCH_ON_CPU = 250


def batch_of(context: RunContext) -> int:
    """Return how many images are sampled and read at a time."""
    return BATCH_ON_CPU if context.device.type == "cpu" else context.resources.sample_batch


def draw_in_batches(
    spec: Evaluate,
    network: nn.Module,
    folder: Path,
    context: RunContext,
    read: Callable[[Tensor, Tensor], Arrays],
) -> list[Arrays] | None:
    """Sample all images, each rank its share of the batches; None on ranks but the first.

    Args:
        spec: what is sampled.
        network: of the spec.
        folder: where finished batches wait, so that a stopped sampling goes on.
        context: whose group shares the work.
        read: returns what is kept of a batch, images (n, C, H, W) and labels (n,).

    Returns:
        What `read` kept of each batch, with `evaluated`, how often the network was evaluated for
        it, and of a network with gates `shares`, the share of its gated work in each evaluation.
    """
    batch = batch_of(context)
    counting = CountingModel(network, context.resources.graphs and can_capture_steps(spec))
    num_batches = math.ceil(spec.num / batch)
    left = min(spec.num, count_missing(folder, num_batches) * batch)
    announce_sampling(spec, network, left, batch, context.device, context.group)

    def draw_batch(number: int) -> Arrays:
        before = counting.evaluated
        indices = range(number * batch, min((number + 1) * batch, spec.num))
        ((x, y),) = generate_images(spec, counting, context.device, batch, indices)
        evaluated = np.array(counting.evaluated - before)
        return read(x, y) | {"evaluated": evaluated} | _take_shares(counting)

    # Batches are cut as one process would cut them, so that no number depends on the group.
    batches = list(compute_pieces(context, folder, num_batches, draw_batch))
    counting.release_graphs()
    return batches if context.group.first else None


def _take_shares(counting: CountingModel) -> Arrays:
    """Return and forget the shares of gated work of a batch's evaluations, one number each."""
    if not counting.shares:
        return {}
    shares = torch.cat(counting.shares).double().cpu().numpy()
    counting.shares.clear()
    return {"shares": shares}
