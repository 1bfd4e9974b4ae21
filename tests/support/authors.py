"""Outputs of the authors' modules on small networks, and the weights with which they were made.

tests/data/outputs_related.json holds one case per network. The weights do not depend on a library's
random numbers: a trained parameter is its initial value plus `gain` times normal numbers that its
own name seeds. The initial value counts as zero where it is random. `output` and every entry of
`gradients`, which are those of the mean square of the output, hold every `stride`-th number. So
does every entry of `outputs`, where a network has several.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import backbones
from tests.support.paths import DATA

CASES: dict[str, dict[str, Any]] = json.loads((DATA / "outputs_related.json").read_text())


def draw_normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers in float64."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)))


def build_like_authors(case: dict[str, Any]) -> nn.Module:
    """Build a case's network with the weights that made its output."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(backbones.build(case["name"], **case["options"]))
    model, other = models

    # What both seeds initialise alike stays, under added noise; what they draw is replaced by it.
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (key, p), same in pairs:
        if p.requires_grad:
            base = p.detach().double() if torch.equal(p, same) else torch.zeros(())
            noise = draw_normal(zlib.crc32(key.encode()), tuple(p.shape))
            p.data = (base + case["gain"] * noise).float()
    return model.eval()


def inputs_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a case's x, t and y."""
    x = draw_normal(case["seed"], tuple(case["shape"])).float()
    return x, torch.tensor(case["t"]), torch.tensor(case["y"])


def largest_error(value: Tensor, case: dict[str, Any], expected: list[float]) -> float:
    """Return the largest difference of the numbers of a tensor that a case keeps."""
    kept = value.detach().flatten()[:: case["stride"]]
    return (kept - torch.tensor(expected)).abs().max().item()


def digest_shapes(state: dict[str, Tensor]) -> str:
    """Return a digest of the names and shapes of a state_dict."""
    lines = sorted(f"{key} {list(value.shape)}" for key, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
