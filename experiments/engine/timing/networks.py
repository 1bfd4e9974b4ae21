"""Networks to time: drawn once, filled with weights that reach the output, at declared inputs.

A network to time is declared by a `Cost`: a backbone with its input. Its registered options say
whether it has a null label, and whether it is an upsampler. The input of an upsampler is an image
and, after the image's channels, the low-resolution image.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.specs.spec import Backbone, Cost, Data, Diffusion, Timing
from experiments.engine.training.networks import build

# Networks that are kept on the CPU: drawing a large one takes longer than timing it.
MOST_DRAWN = 2
# A network with more bytes of weights is drawn anew each time, so that no second copy is held.
MOST_KEPT_BYTES = 8 * 10**9
# How many times as wide the images of ADM's upsampler are as its low-resolution images.
UPSAMPLING_FACTOR = 4
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

_drawn: dict[str, nn.Module] = {}


def list_networks(timing: Timing) -> list[Cost]:
    """Return the networks of a timing's system, which an image passes one after the other."""
    own = Cost(timing.backbone, timing.size, timing.channels, timing.num_classes, timing.tokenizer)
    return [own, *timing.parts]


def build_network(network: Cost, spec: Timing, device: torch.device) -> nn.Module:
    """Build a network for inference, in the layout of the timing, without zero weights."""
    model = draw_network(size_backbone(network), device)
    model = model.to(memory_format=layout_of(spec)).eval()
    fill_zeros(model)
    return model


def draw_network(spec: Backbone, device: torch.device) -> nn.Module:
    """Return a copy of the network with the initial weights of seed 0."""
    name = str(spec)
    if name not in _drawn:
        # Drop the oldest networks first; dictionaries keep the order of insertion.
        while len(_drawn) >= MOST_DRAWN:
            del _drawn[next(iter(_drawn))]
        network = build(spec, 0, torch.device("cpu"))
        if sum(p.numel() * p.element_size() for p in network.parameters()) > MOST_KEPT_BYTES:
            return network.to(device)
        _drawn[name] = network
    return copy.deepcopy(_drawn[name]).to(device)


def size_backbone(network: Cost) -> Backbone:
    """Return the backbone with its input as options."""
    if network.tokenizer:
        return network.backbone.but(channels=network.channels, num_classes=network.num_classes)
    return network.backbone.but(
        input_size=network.size, in_channels=network.channels, num_classes=network.num_classes
    )


def fill_zeros(model: nn.Module) -> None:
    """Draw the weights that an initialisation left at zero.

    A zero head would make any kernel look right. Biases are drawn large, to open the gates, so
    that an error in a branch reaches the output.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            std = 0.02 if parameter.ndim > 1 else 0.5
            generator = generator_at("timing", name, device=parameter.device)
            nn.init.normal_(parameter, std=std, generator=generator)


def draw_inputs(network: Cost, spec: Timing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x (N,C,H,W), t (N,) and y (N,) of one batch."""
    draw = torch.Generator().manual_seed(seed_at("timing"))
    x = torch.randn(spec.batch, network.channels, network.size, network.size, generator=draw)
    t = torch.randint(1000, (spec.batch,), generator=draw)
    y = torch.randint(max(1, network.num_classes), (spec.batch,), generator=draw)
    return x.to(device=device, memory_format=layout_of(spec)), t.to(device), y.to(device)


def draw_scale_inputs(network: Cost, spec: Timing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw y (N,) and the inputs of all scales after the first, (N, L - l_1, C), of one batch."""
    draw = torch.Generator().manual_seed(seed_at("timing"))
    inputs = torch.randn(spec.batch, count_tokens(network) - 1, network.channels, generator=draw)
    y = torch.randint(network.num_classes, (spec.batch,), generator=draw)
    return y.to(device), inputs.to(device)


def count_tokens(network: Cost) -> int:
    """Return the tokens of all scales of an autoregressive network."""
    options = backbones.options_of(network.backbone.name) | network.backbone.options
    return sum(side**2 for side in options["sides"])


def build_tokenizer(network: Cost, device: torch.device) -> nn.Module:
    """Build the tokenizer of an autoregressive network, untrained, with the network's scales."""
    assert network.tokenizer, "an autoregressive network declares its tokenizer"
    options = backbones.options_of(network.backbone.name) | network.backbone.options
    sized = Backbone(network.tokenizer.name, dict(sides=options["sides"]))
    sized = sized.but(**network.tokenizer.options)
    return build(sized, 0, torch.device("cpu")).to(device).eval().requires_grad_(False)


def layout_of(spec: Timing) -> torch.memory_format:
    """Return the declared layout of four-dimensional tensors.

    Raises:
        ValueError: the layout is unknown.
    """
    if spec.layout not in LAYOUTS:
        raise ValueError(f"unknown layout {spec.layout!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[spec.layout]


def read_layout(*tensors: Tensor) -> str:
    """Name the layouts of the four-dimensional tensors, or 'any' if they do not tell.

    A tensor of one channel or one pixel lies in both layouts at once, and tells nothing.
    """
    names: set[str] = set()
    for tensor in tensors:
        if tensor.ndim != 4:
            continue
        fitting = [
            name for name, layout in LAYOUTS.items() if tensor.is_contiguous(memory_format=layout)
        ]
        if len(fitting) == 1:
            names.update(fitting)
    return ", ".join(sorted(names)) or "any"


def training_data(network: Cost) -> Data:
    """Return the images that a network makes; an upsampler's input has twice their channels."""
    channels = network.channels // 2 if is_upsampler(network) else network.channels
    return Data("random", network.size, channels, network.num_classes)


def training_diffusion(network: Cost, model: nn.Module) -> Diffusion:
    """Return DiT's diffusion, whose variance is learned if the network predicts one.

    A network with as many outputs as the images have channels predicts the noise alone.
    """
    data = training_data(network)
    low_res = max(1, data.size // UPSAMPLING_FACTOR) if is_upsampler(network) else None
    learned = model.out_channels == 2 * data.channels
    return Diffusion(variance="learned" if learned else "fixed", low_res=low_res)


def is_upsampler(network: Cost) -> bool:
    """Tell whether the network takes a low-resolution image."""
    return _option(network, "low_res", default=False)


def has_null_label(network: Cost) -> bool:
    """Tell whether the network has a label for "no class"."""
    return _option(network, "null_label", default=True)


def _option(network: Cost, name: str, default: bool) -> bool:
    options = backbones.options_of(network.backbone.name) | network.backbone.options
    return options.get(name, default)
