"""Small networks of every registered backbone and of every declared ablation, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from experiments.ablation import TABLES

CHANNELS, CLASSES = 3, 7
NETWORKS = backbones.registered_networks()

# Shapes of weights by their names in a state dict.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A small network at one input size."""

    names: tuple[str, ...]
    """Registered names that are this network at a test's size; the first one builds it."""

    options: dict[str, Any]
    """Options of the network, its input size, channels and classes among them."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def family(self) -> type[nn.Module]:
        return NETWORKS[self.name]

    @property
    def size(self) -> int:
        return self.options["input_size"]

    @property
    def all_options(self) -> dict[str, Any]:
        """The options with the defaults of the registered name."""
        return backbones.options_of(self.name) | self.options

    @property
    def image_channels(self) -> int:
        """Channels of the image to denoise: an upsampler takes a second one beside it."""
        channels = self.options["in_channels"]
        return channels // 2 if self.all_options.get("low_res") else channels

    @property
    def has_null_label(self) -> bool:
        return self.all_options.get("null_label", True)

    @property
    def exceptions(self) -> backbones.Exceptions:
        return backbones.exceptions_of(self.name)

    def build(self, **options: Any) -> nn.Module:
        return backbones.build(self.name, **self.options | options)

    def inputs(self, batch: int = 3, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Draw x, t and y of up to three samples; the last label is the last one with a row."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch, self.options["in_channels"], self.size, self.size)
        labels = CLASSES + replace(self, options=self.options | options).has_null_label
        x = torch.randn(shape, generator=generator)
        return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, labels - 1])[-batch:]


def _sizes(name: str, options: dict[str, Any]) -> tuple[int, ...]:
    """Input sizes of a registered name: a power of two and another one, or three patches."""
    if sizes := backbones.exceptions_of(name).sizes:
        return sizes
    patch = (backbones.options_of(name) | options).get("patch")
    return (3 * patch,) if patch else (8, 12)


def _registered() -> dict[str, Case]:
    """Return a case for every network that differs from the others at a test's size."""
    grouped: dict[str, list[str]] = {}
    for name in backbones.list_backbones():
        tiny = backbones.tiny_options_of(name)
        identity = NETWORKS[name].__name__, backbones.options_of(name) | tiny
        for option in ("input_size", "in_channels", "num_classes"):
            identity[1].pop(option)
        grouped.setdefault(repr(identity), []).append(name)

    # The first network of a family is tested at all its sizes, the others at the last one.
    cases = {}
    families = set()
    for names in grouped.values():
        name, tiny = names[0], backbones.tiny_options_of(names[0])
        low_res = backbones.options_of(name).get("low_res", False)
        sizes = _sizes(name, tiny)
        family = NETWORKS[name]
        if family in families:
            sizes = sizes[-1:]
        families.add(family)
        for size in sizes:
            channels = 2 * CHANNELS if low_res else CHANNELS
            shape = dict(input_size=size, in_channels=channels, num_classes=CLASSES)
            cases[f"{name} at {size}"] = Case(tuple(names), tiny | shape)
    return cases


def _declared() -> dict[str, Case]:
    """Return a case for every row of an ablation that differs from the others when it is small."""
    cases: dict[str, Case] = {}
    seen = set()
    for table in TABLES.values():
        if table.counts_only:
            continue
        for row in table.rows + table.outside:
            options = row.backbone.but(**row.small).options
            identity = (row.backbone.name, repr(sorted(options.items(), key=str)))
            if identity in seen:
                continue
            seen.add(identity)

            # A window of 4 fits no grid of an input of 12.
            size = _sizes(row.backbone.name, options)[-1]
            if options.get("mixer") in ("window", "global_regional"):
                size = 16
            shape = dict(input_size=size, in_channels=CHANNELS, num_classes=CLASSES)
            cases[f"{row.label} at {size}"] = Case((row.backbone.name,), options | shape)
    return cases


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the error over that of the truth."""
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / truth.norm()).item()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every trained parameter from a normal, scaled by its fan-in, so that gates are open.

    DiMR's gains of norms stay around one. Around zero, its cascade of norms would close its paths.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, p in module.named_parameters():
        if p.requires_grad:
            std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            gain_of_time = key.endswith((".param0", ".param1")) and ".bias." not in key
            p.data = (float(gain_of_time) + torch.randn(p.shape, generator=generator) * std).to(
                p.dtype
            )
    return module


def under(prefix: str, shapes: Shapes) -> Shapes:
    """Return the shapes with a prefix before every name."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def repeated(prefix: str, num: int, shapes: Shapes) -> Shapes:
    """Return the shapes of so many equal blocks, which are numbered behind the prefix."""
    keys: Shapes = {}
    for i in range(num):
        keys |= under(f"{prefix}.{i}", shapes)
    return keys


def weights_and_biases(layers: Shapes) -> Shapes:
    """Return the shapes of the state dict of layers by the shapes of their weights."""
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


CASES = _registered() | _declared()
# One network of every family, by the name of its class.
FAMILIES = {case.family.__name__: case for case in CASES.values()}
