from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.ablation import TABLES

CHANNELS, CLASSES = 3, 7


ELSEWHERE = [
    name
    for family in ("sit", "dic", "udit", "uvit", "adm", "ldm", "dis", "dim", "dimsum")
    for name in backbones.list_backbones(f"{family}_*")
]


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Tiny networks by a readable id: odd grids of patches, U-shapes at 8 and at 12 (16 where a window of 4 must fit)."""
    networks = {
        name: (name, backbones.tiny_options_of(name))
        for name in backbones.list_backbones()
        if name not in ELSEWHERE
    }
    rows = [
        row
        for table in TABLES.values()
        if not table.counts_only
        for row in table.rows + table.outside
    ]
    networks |= {
        row.label: (row.backbone.name, row.backbone.but(**row.small).options) for row in rows
    }
    found = {}
    for label, (name, options) in networks.items():
        patch = (backbones.options_of(name) | options).get("patch")
        sizes = (3 * patch,) if patch else (8, 16) if options.get("mixer") == "window" else (8, 12)
        for size in sizes:
            found[f"{label} at {size}"] = (
                name,
                options | dict(input_size=size, in_channels=CHANNELS, num_classes=CLASSES),
            )
    return found


CASES = cases()


def relative_rms(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / truth.norm()).item()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every trainable parameter from a normal, scaled by its fan-in, so that no gate is closed."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.data = (torch.randn(p.shape, generator=generator) * std).to(p.dtype)
    return module


def network(case: str) -> nn.Module:
    name, options = CASES[case]
    return backbones.build(name, **options)


def inputs(case: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    size = CASES[case][1]["input_size"]
    x = torch.randn(batch, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


def weights_and_biases(layers: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape for name, shape in layers.items()} | {
        f"{name}.bias": shape[:1] for name, shape in layers.items()
    }
