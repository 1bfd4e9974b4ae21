"""A tiny network's samples, for the tests that draw images."""

from __future__ import annotations

import numpy as np
import torch

from experiments.declared.protocols import DIGITS_WHOLE
from experiments.engine.sampling.samples import SampleSet
from experiments.engine.specs.spec import Backbone, Evaluate, Recipe, Sampler, Train

CPU = torch.device("cpu")
TINY = Backbone(
    "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
)
# 23 images of a network that was trained for one step.
SPEC = Evaluate(
    Train(TINY, DIGITS_WHOLE.data, Recipe(steps=1, batch=4)),
    Sampler(num_steps=3, channels=None),
    23,
    "digits",
    "random",
)


def levels_of(samples: SampleSet) -> np.ndarray:
    """The images of a set in its order, uint8 (N, H, W, 3)."""
    return np.concatenate(list(samples.batches(7)))
