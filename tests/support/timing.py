"""Small timings, and what hears the calls of the networks that they draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.engine.specs.spec import Backbone, Timing
from experiments.engine.timing import networks, tasks

CPU = torch.device("cpu")
DIT = Backbone("dit_s_2", dict(depth=1, dim=24, heads=3))
DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
# Families that make tokens of time or label, and so need one of each per image.
TOKENS = ("uvit", "dim", "dimr", "dis", "mmdit")


def declare_timing(**changes: object) -> Timing:
    """Declare a timing of a tiny DiT on 8x8 images."""
    usual = dict(backbone=DIT, size=8, channels=1, num_classes=10, batch=2, device="cpu")
    return Timing(**(usual | changes))


def hear_calls(
    monkeypatch: pytest.MonkeyPatch, note: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> None:
    """Call `note(network, inputs)` before every call of a network that is drawn from now on."""
    draw = networks.draw_network

    def draw_with_hook(*args: object) -> nn.Module:
        model = draw(*args)
        model.register_forward_pre_hook(note)
        return model

    for module in (networks, tasks):
        monkeypatch.setattr(module, "draw_network", draw_with_hook)


def every_family() -> dict[str, Timing]:
    """Declare one tiny network of every family, and those that are called in another way."""
    names = {name.partition("_")[0]: name for name in reversed(backbones.list_backbones())}
    names |= {"adm": "adm_base_64", "upsampler": "adm_up_256", "unguided ldm": "ldm_8"}
    timings = {}
    for family, name in names.items():
        network = Backbone(name, backbones.tiny_options_of(name))
        if "multipliers" in network.options:
            # The option is named by its unit, which differs between families.
            attention = {key: (4,) for key in network.options if key.startswith("attention_")}
            network = network.but(dim=32, multipliers=(1, 2), **attention or dict(depths=(0, 1)))
        channels = 6 if family == "upsampler" else 3
        timings[family] = declare_timing(backbone=network, channels=channels)
    return timings
