"""The token mixers of this suite's networks: where their tokens lie and how their weights are read.

N images, C channels, S tokens of a layer's sequence, T = H W tokens of its grid in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.probes import implied
from analysis.probes.implied import Weights
from analysis.probes.watch import Grid, Layer, Operation, num_tokens
from backbones import (
    adm,
    dico,
    dig,
    dim,
    dimr,
    dimsum,
    dis,
    lightningdit,
    mmdit,
    terdit,
    text_unet,
    udit,
    unet,
    uvit,
    uvit_text,
)
from backbones.block import Block
from backbones.layers import SelfAttention
from backbones.mamba import COLUMNS, COLUMNS_BACK, ROWS, ROWS_BACK, Mamba, reorder
from backbones.mixers import agent, conv, focused_linear, global_regional, softmax, window

GRID_ORDERS = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)  # of DiG's layers in turn


@dataclass(frozen=True)
class Candidate:
    """A module that may be a token mixer."""

    name: str
    module: Any
    model: Any
    # How many layers were found before it.
    index: int

    @property
    def grid(self) -> Grid:
        """The grid of a network that works on a sequence of tokens."""
        return self.model.grid

    def layer(self, read: Callable[..., Weights] | None, **fields: Any) -> Layer:
        """Return the module as a layer whose mixer is the module itself, unless `fields` differ."""
        return Layer(
            **dict(name=self.name, module=self.module, read=read, mix=self.module) | fields
        )

    def sequence_layer(self, read: Callable[..., Weights], place: Tensor, **fields: Any) -> Layer:
        """Return the module as a layer on a sequence that holds the network's grid at `place`."""
        return self.layer(read, grid=self.grid, place=place, **fields)


def layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a network that mix tokens.

    A mixer of one's own, in a stack with a swappable mixer or in the list that the network's method
    `mixers()` returns, is a layer of unknown weights. The list is empty if this module knows no
    layer of the network's family.
    """
    own = _own_mixers(model)
    layers: list[Layer] = []
    opaque = ""  # the name of the mixer whose parts are passed over
    for name, module in model.named_modules():
        if opaque and name.startswith(f"{opaque}."):
            continue
        find = _finder(module)
        if module in own:
            find, opaque = _own_mixer, name
        if find is None:
            continue
        layer = find(Candidate(name, module, model, len(layers)))
        if layer is not None:
            layers.append(layer)
    return layers


def _finder(module: nn.Module) -> Callable[[Candidate], Layer | None] | None:
    return next((find for kind, find in FINDERS if isinstance(module, kind)), None)


def _own_mixers(model: nn.Module) -> set[nn.Module]:
    """Return the mixers of maps (N, C, H, W) that are of no kind of this suite."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    mixers = [block.mixer for block in blocks]
    if callable(getattr(model, "mixers", None)):
        mixers += model.mixers()  # type: ignore[operator]
    return {mixer for mixer in mixers if _finder(mixer) is None}


# How each kind of mixer becomes a layer; None if this one has no weights over tokens of the grid.


def _token_attention(candidate: Candidate) -> Layer:
    # U-ViT has two tokens, of label and time, in front of the grid; or time and text.
    leading = 2 if isinstance(candidate.model, uvit.UViT) else 0
    if isinstance(candidate.model, uvit_text.TextUViT):
        leading = candidate.model.leading
    place = leading + torch.arange(num_tokens(candidate.grid))
    return candidate.sequence_layer(read_attention, place)


def _labelled_attention(candidate: Candidate) -> Layer:
    # The label's token stands before the grid.
    return candidate.sequence_layer(read_attention, 1 + torch.arange(num_tokens(candidate.grid)))


def _own_mixer(candidate: Candidate) -> Layer:
    return candidate.layer(None)


def _softmax(candidate: Candidate) -> Layer:
    return candidate.layer(read_attention)


def _window(candidate: Candidate) -> Layer:
    return candidate.layer(partial(_read_windows, candidate.module))


def _global_regional(candidate: Candidate) -> Layer:
    return candidate.layer(partial(_read_global_regional, candidate.module))


def _agent(candidate: Candidate) -> Layer:
    return candidate.layer(_read_agents)


def _focused_linear(candidate: Candidate) -> Layer:
    return candidate.layer(_read_linear)


def _conv(candidate: Candidate) -> Layer:
    return candidate.layer(partial(_read_kernel, candidate.module.depthwise))


def _dico_block(candidate: Candidate) -> Layer:
    block = candidate.module
    return candidate.layer(
        partial(_read_kernel, block.conv2), module=block.conv1, mix=partial(dico_mixer, block)
    )


def _gated_linear(candidate: Candidate) -> Layer:
    order = GRID_ORDERS[candidate.index % len(GRID_ORDERS)]
    return candidate.sequence_layer(_read_gated_linear, _places(candidate.grid, order))


def _bidirectional_mamba(candidate: Candidate) -> Layer:
    # Two tokens, of time and label, stand before the grid.
    return candidate.sequence_layer(_read_scans, 2 + torch.arange(num_tokens(candidate.grid)))


def _dim_mamba(candidate: Candidate) -> Layer | None:
    model = candidate.model
    if not isinstance(model, dim.DiM):
        return None
    # The grid is a corner of a frame, which the layer reads in an order of its own.
    frame = model.a4m_adapter.framed
    order = dim.scan_order(candidate.index, len(model.transformer_blocks))
    height, width = candidate.grid
    place = _places(frame, order).unflatten(0, frame)[:height, :width].flatten()
    # Time, label and padding stand before the frame.
    leading = 2 + model.a4m_adapter.pad_token.shape[-1]
    return candidate.sequence_layer(_read_scans, leading + place)


def _cross_fusion(candidate: Candidate) -> Layer:
    place = torch.arange(num_tokens(candidate.grid))
    return candidate.sequence_layer(_read_fused, place, mix=None)


def _wavelet_branch(candidate: Candidate) -> None:
    """Return nothing: the tokens of a wavelet branch are of frequency bands, not of places."""


def _spatial_branch(candidate: Candidate) -> Layer:
    branch = candidate.module
    place = _places(candidate.grid, branch.order)
    return candidate.sequence_layer(_read_scans, place, module=branch.mixer, mix=branch.mixer)


def _adm_attention(candidate: Candidate) -> Layer:
    block = candidate.module
    return candidate.layer(_read_softmax, mix=lambda x: block(x) - x)


def _ldm_attention(candidate: Candidate) -> Layer | None:
    if not candidate.name.endswith("attn1"):
        return None  # attention to the class
    attention = candidate.module
    return candidate.layer(_read_softmax, mix=lambda x, context: attention(x, x))


def _stable_diffusion_attention(candidate: Candidate) -> Layer | None:
    if not candidate.name.endswith("attn1"):
        return None  # attention to the text
    attention = candidate.module
    return candidate.layer(read_attention, mix=lambda x, context: attention(x, x))


def _joint_attention(candidate: Candidate) -> Layer:
    # The tokens of text stand before the grid.
    place = candidate.model.captions.tokens + torch.arange(num_tokens(candidate.grid))
    return candidate.sequence_layer(read_attention, place, mix=None)


def _udit_attention(candidate: Candidate) -> Layer:
    return candidate.layer(_read_polyphase)


# The first kind that a module is an instance of decides.
FINDERS: tuple[tuple[type[nn.Module], Callable[[Candidate], Layer | None]], ...] = (
    (softmax.SoftmaxAttention, _softmax),  # before the class that it derives from
    (SelfAttention, _token_attention),
    (lightningdit.RotaryAttention, _token_attention),
    (terdit.RotaryAttention, _token_attention),
    (window.WindowAttention, _window),
    (global_regional.GlobalRegionalAttention, _global_regional),
    (agent.AgentAttention, _agent),
    (focused_linear.FocusedLinearAttention, _focused_linear),
    (conv.ConvModule, _conv),
    (dico.DiCoBlock, _dico_block),
    (dig.GatedLinearAttention, _gated_linear),
    (dis.BidirectionalMamba, _bidirectional_mamba),
    (Mamba, _dim_mamba),
    (dimsum.CrossFusion, _cross_fusion),
    (dimsum.WaveletBranch, _wavelet_branch),
    (dimsum.SpatialBranch, _spatial_branch),
    (adm.AttentionBlock, _adm_attention),
    (text_unet.FusedAttention, _stable_diffusion_attention),  # before the class it derives from
    (unet.CrossAttention, _ldm_attention),
    (mmdit.JointAttention, _joint_attention),
    (udit.DownsampledAttention, _udit_attention),
    (dimr.Attention, _labelled_attention),
)


def dico_mixer(block: dico.DiCoBlock, x: Tensor) -> Tensor:
    """Apply the conv module of DiCo's equation 3: (N, C, H, W) -> same."""
    h = F.gelu(block.conv2(block.conv1(x)))
    return block.conv3(h * block.ca(h))


def _places(grid: Grid, order: Any) -> Tensor:
    """Return each token's position in a sequence that reads the grid in an order: (T,)."""
    tokens = torch.arange(num_tokens(grid))[None, :, None]
    return reorder(tokens, grid, order).flatten().argsort()


# How weights are read from the operations inside a call: (operations, x, place) -> weights.


def arguments_of(operations: list[Operation], *names: str) -> list[tuple[Any, ...]]:
    """Return the arguments of the operations.

    Raises:
        ValueError: unless exactly the named operations were observed, in this order.
    """
    observed = tuple(operation.name for operation in operations)
    if observed != names:
        raise ValueError(
            f"expected {', '.join(names)} inside this layer, observed "
            f"{', '.join(observed) or 'nothing'}; choose torch's own attention "
            "(in diffusers: model.set_attn_processor with an AttnProcessor2_0)"
        )
    return [operation.args for operation in operations]


def read_attention(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    """Read the weights of one fused attention."""
    ((q, k, bias, scale),) = arguments_of(operations, "attention")
    return implied.Softmax(q, k, place, bias, scale)


def _read_fused(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    """Read the heads in which the first branch queries the second, then those of the opposite."""
    (q1, k2, bias, scale), (q2, k1, _, _) = arguments_of(operations, "attention", "attention")
    q = torch.cat([q1, q2], dim=1)
    k = torch.cat([k2, k1], dim=1)
    return implied.Softmax(q, k, place, bias, scale)


def _read_softmax(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    ((weights,),) = arguments_of(operations, "softmax")
    return implied.Written(weights, place)


def _read_windows(
    module: window.WindowAttention, operations: list[Operation], x: Tensor, place: Tensor
) -> Weights:
    ((q, k, bias, scale),) = arguments_of(operations, "attention")

    # The tokens of each window, after the shift.
    w = module.window
    height, width = module.size
    cells = place.view(height, width).roll((-module.shift, -module.shift), dims=(0, 1))
    cells = cells.view(height // w, w, width // w, w).transpose(1, 2).reshape(-1, w * w)  # (P, L)

    # Windows are items of the batch.
    q, k, bias = (
        tensor.expand(len(x), *tensor.shape[1:]).unflatten(1, (len(cells), -1)).flatten(0, 1)
        for tensor in (q, k, bias)
    )
    inside = torch.arange(w * w, device=x.device)
    return implied.Partitioned(implied.Softmax(q, k, inside, bias, scale), cells)


def _read_global_regional(
    module: global_regional.GlobalRegionalAttention,
    operations: list[Operation],
    x: Tensor,
    place: Tensor,
) -> Weights:
    ((q, k, _, _),) = arguments_of(operations, "attention")
    height, width = module.size
    w, p = module.window, module.pool

    # The tokens of each region (R, L), and the average in which each token stands (T,).
    cells = place.view(height // w, w, width // w, w).transpose(1, 2).reshape(-1, w * w)
    squares = torch.arange(height * width // p**2, device=x.device).view(height // p, width // p)
    member = squares.repeat_interleave(p, dim=0).repeat_interleave(p, dim=1).flatten()

    # The weight of an average is shared by its tokens.
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (N R, h, L, L + G)
    weights = weights.unflatten(0, (len(x), -1))  # (N, R, h, L, L + G)
    regional, averages = weights.split([w * w, len(squares.flatten())], dim=-1)
    whole = averages[..., member] / p**2  # (N, R, h, L, T)
    whole = whole.scatter_add(-1, cells[:, None, None].expand(regional.shape), regional)
    rows = whole.transpose(1, 2).flatten(2, 3)[:, :, cells.flatten().argsort()]  # (N, h, T, T)
    return implied.Written(rows, place)


def _read_polyphase(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    ((weights,),) = arguments_of(operations, "softmax")
    height, width = x.shape[-2:]
    cells = place.view(height // 2, 2, width // 2, 2).permute(1, 3, 0, 2).reshape(4, -1)
    inside = torch.arange(cells.shape[1], device=x.device)
    return implied.Partitioned(implied.Written(weights, inside), cells)


def _read_agents(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    gathering, reading = arguments_of(operations, "attention", "attention")
    agents, k, gather_bias, scale = gathering
    q, _, read_bias, _ = reading
    each = torch.arange(agents.shape[2], device=x.device)
    return implied.Agents(
        implied.Softmax(agents, k, each, gather_bias, scale, keys=place),
        implied.Softmax(q, agents, place, read_bias, scale, keys=each),
    )


def _read_linear(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    ((q, k, _),) = arguments_of(operations, "linear_attention")
    return implied.Linear(q, k, place)


def _read_gated_linear(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    ((q, k, _, g),) = arguments_of(operations, "gated_linear")
    return implied.GatedLinear(q, k, g, place)


def _read_scans(operations: list[Operation], x: Tensor, place: Tensor) -> Weights:
    """Read one scan through the sequence or, as in DiS, a second one from its end."""
    calls = [operation.args for operation in operations if operation.name == "selective_scan"]
    from_the_end = x.shape[1] - 1 - place
    scans = [
        implied.Scan(implied.ScanInputs(*args[1:]), places)
        for args, places in zip(calls, (place, from_the_end), strict=False)
    ]
    return scans[0] if len(scans) == 1 else implied.Both(*scans)


def _read_kernel(
    depthwise: nn.Conv2d, operations: list[Operation], x: Tensor, place: Tensor
) -> Weights:
    height, width = x.shape[-2:]
    return implied.Kernel(depthwise.weight, (height, width), len(x))
