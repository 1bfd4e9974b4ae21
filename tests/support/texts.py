"""Outputs of the authors' text networks on small networks, and what made them.

tests/data/outputs_text.json holds one case per network. Every weight is `gain` times normal numbers
that its name seeds, plus 1 for the gains of norms. `output` holds every `stride`-th number.
`guided` is null + 2 (conditional - null), both images at the first time. The outputs of
`dico_t2i_*` are of a reconstruction, the others of the modules of the authors or of diffusers.
`digest` is of names and shapes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.captions import Text
from tests.support.authors import draw_normal
from tests.support.paths import DATA

CASES: dict[str, dict[str, Any]] = json.loads((DATA / "outputs_text.json").read_text())


def draw_weights(state: dict[str, Tensor], module: nn.Module, gain: float) -> dict[str, Tensor]:
    """Draw the weights of a state dict by the names of its entries; buffers stay."""
    norms = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.LayerNorm | nn.GroupNorm)
    }
    trained = {name for name, _ in module.named_parameters()}
    drawn = {}
    for key, value in state.items():
        noise = draw_normal(zlib.crc32(key.encode()), tuple(value.shape))
        fresh = (float(key in norms) + gain * noise).float()
        drawn[key] = fresh if key in trained else value
    return drawn


def build_case(case: dict[str, Any], gain: float | None = None) -> nn.Module:
    """Build a case's network with the authors' weights under their own names."""
    model = backbones.build(case["name"], **case["options"])
    gain = case["gain"] if gain is None else gain
    model.load_state_dict(draw_weights(model.state_dict(), model, gain))
    return model.eval()


def text_of(case: dict[str, Any]) -> Text:
    """Return what the captions of a case are to the network."""
    pooled = draw_normal(15, tuple(case["pooled_shape"])).float() if "sizes" in case else None
    sizes = torch.tensor(case["sizes"]) if "sizes" in case else None
    return Text(draw_normal(14, tuple(case["context_shape"])).float(), pooled, sizes)


def inputs_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Text]:
    """Return a case's x, t and text."""
    return draw_normal(11, tuple(case["shape"])).float(), torch.tensor(case["t"]), text_of(case)


def guide(case: dict[str, Any], run: Callable[[Tensor, Tensor, Text], Tensor]) -> Tensor:
    """Guide both images at the first time, with scale 2."""
    x, t, text = inputs_of(case)
    t = t[:1].expand(2)
    null = draw_normal(16, (1, *case["context_shape"][1:])).float()
    unconditional = run(x, t, Text(null.expand(2, -1, -1)))
    return unconditional + 2 * (run(x, t, text) - unconditional)
