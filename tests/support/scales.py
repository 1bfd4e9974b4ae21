"""Outputs of the authors' VAR, its tokenizer and CoDe on small networks, with their draws.

tests/data/outputs_var.json holds the cases. The weights follow the rule of `authors.py`. A token is
the first one whose cumulative probability exceeds a uniform number, which numpy draws.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.authors import draw_normal
from tests.support.paths import DATA

CASES: dict[str, dict[str, Any]] = json.loads((DATA / "outputs_var.json").read_text())


def images_of(case: dict[str, Any], size: int = 48) -> Tensor:
    """Return the images of a tokenizer's case."""
    return draw_normal(case["image_seed"], (2, 3, size, size)).clamp(-1, 1).float()


def error_of(case: dict[str, Any], name: str, value: Tensor) -> float:
    """Return the largest difference of an output from the numbers that a case keeps."""
    expected = case["outputs"][name]
    kept = value.detach().flatten()[:: expected["stride"]]
    return (kept - torch.tensor(expected["values"])).abs().max().item()


class InverseDraw:
    """Draw tokens from uniform numbers that numpy's generator gives, scale by scale."""

    def __init__(self, seed: int, sides: list[int], batch: int) -> None:
        generator = np.random.Generator(np.random.PCG64(seed))
        self.uniforms = [torch.from_numpy(generator.random((batch, side**2))) for side in sides]

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """Return tokens (N, l) of filtered logits (N, l, V)."""
        cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
        thresholds = self.uniforms[scale][..., None] * cumulative[..., -1:]
        return (cumulative > thresholds).int().argmax(dim=-1)
