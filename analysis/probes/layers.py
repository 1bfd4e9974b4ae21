"""The token mixers of a network, layer by layer: how their tokens lie on the grid and what weights they apply.

N images, C channels, S tokens of a layer's sequence, T = H W tokens of its grid, row-major.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analysis.probes import implied
from analysis.probes.implied import Weights
from backbones import adm, dico, dig, dim, dimsum, dis, ldm, udit, uvit
from backbones.kernels import observing, use
from backbones.layers import SelfAttention
from backbones.mamba import COLUMNS, COLUMNS_BACK, ROWS, ROWS_BACK, Mamba, reorder
from backbones.mixers import agent, conv, focused_linear, softmax, window

IGNORED = (
    "attention",
    "linear",
    "pointwise",
    "adaln",
    "addcmul",
    "pool",
    "depthwise_gelu",
    "pointwise_gelu",
)  # the first is heard as torch's own; the others mix no tokens or are convolutions, known by their weights
Grid = tuple[int, int]


@dataclass(frozen=True)
class Heard:
    """An operation inside a layer's call: 'attention' (q, k, bias, scale), 'softmax' (its output), or one of kernels' by its arguments."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """`module`'s first input is x (N, C, H, W), or (N, S, C) where `place` gives the tokens of a grid in it (T,).

    `read(heard, x, place)` makes weights of what was heard; `mix(x, *other inputs)` is the mixer alone, without a
    residual connection, or None where it has no form that one input can vary.
    """

    name: str
    module: nn.Module
    read: Callable[[list[Heard], Tensor, Tensor], Weights]
    grid: Grid | None = None
    place: Tensor | None = None
    mix: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """A layer's turn in a forward pass, with its place and inputs.

    `index` counts the calls of all watched layers; `name` tells a shared layer's calls apart.
    """

    layer: Layer
    name: str
    index: int
    grid: Grid
    place: Tensor
    inputs: tuple[Any, ...]
    weights: Weights


def layers(model: nn.Module) -> list[Layer]:
    """Those of a network of this suite that have weights over tokens; none where the family has no such mixer."""
    found: list[Layer] = []
    for name, module in model.named_modules():
        grid, index = getattr(model, "grid", None), len(found)
        if isinstance(module, softmax.SoftmaxAttention):
            found.append(Layer(name, module, attention_of, mix=module))
        elif isinstance(module, SelfAttention):
            leading = 2 if isinstance(model, uvit.UViT) else 0  # label and time
            place = leading + torch.arange(_tokens(grid))
            found.append(Layer(name, module, attention_of, grid, place, module))
        elif isinstance(module, window.WindowAttention):
            found.append(Layer(name, module, partial(_windows, module), mix=module))
        elif isinstance(module, agent.AgentAttention):
            found.append(Layer(name, module, _agents, mix=module))
        elif isinstance(module, focused_linear.FocusedLinearAttention):
            found.append(Layer(name, module, _linear, mix=module))
        elif isinstance(module, conv.ConvModule):
            found.append(Layer(name, module, partial(_kernel, module.depthwise), mix=module))
        elif isinstance(module, dico.DiCoBlock):
            found.append(
                Layer(
                    name,
                    module.conv1,
                    partial(_kernel, module.conv2),
                    mix=partial(dico_mixer, module),
                )
            )
        elif isinstance(module, dig.GatedLinearAttention):
            order = (ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)[index % 4]
            found.append(
                Layer(
                    name,
                    module,
                    _gated_linear,
                    grid,
                    _inverse(reorder(_indices(grid), grid, order)),
                    module,
                )
            )
        elif isinstance(module, dis.BidirectionalMamba):
            found.append(Layer(name, module, _scans, grid, 2 + torch.arange(_tokens(grid)), module))
        elif isinstance(module, Mamba) and isinstance(model, dim.DiM):
            framed = model.a4m_adapter.framed
            order = dim.scan_order(index, len(model.transformer_blocks))
            place = (
                _inverse(reorder(_indices(framed), framed, order))
                .unflatten(0, framed)[: grid[0], : grid[1]]
                .flatten()
            )
            leading = 2 + model.a4m_adapter.pad_token.shape[-1]
            found.append(Layer(name, module, _scans, grid, leading + place, module))
        elif isinstance(module, dimsum.CrossFusion):
            found.append(Layer(name, module, _fused, grid, _indices(grid).flatten()))
        elif isinstance(module, dimsum.SpatialBranch) and not isinstance(
            module, dimsum.WaveletBranch
        ):  # whose tokens are of bands, not of places
            found.append(
                Layer(
                    name,
                    module.mixer,
                    _scans,
                    grid,
                    _inverse(reorder(_indices(grid), grid, module.order)),
                    module.mixer,
                )
            )
        elif isinstance(module, adm.AttentionBlock):
            found.append(Layer(name, module, _written, mix=lambda x, module=module: module(x) - x))
        elif isinstance(module, ldm.CrossAttention) and name.endswith("attn1"):
            found.append(
                Layer(name, module, _written, mix=lambda x, context, module=module: module(x, x))
            )
        elif isinstance(module, udit.DownsampledAttention):
            found.append(Layer(name, module, _polyphase, mix=module))
    return found


def dico_mixer(block: dico.DiCoBlock, x: Tensor) -> Tensor:
    """The conv module of DiCo's equation 3, which the block spells out: (N, C, H, W) -> same."""
    h = F.gelu(block.conv2(block.conv1(x)))
    return block.conv3(h * block.ca(h))


class _Softmaxes(TorchFunctionMode):
    """Hears of every softmax and fused attention that torch computes."""

    def __init__(self, hear: Callable[..., None]) -> None:
        super().__init__()
        self.hear = hear

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            bias = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            q, k = (
                kwargs[name] if name in kwargs else args[i]
                for i, name in enumerate(("query", "key"))
            )
            self.hear("attention", q, k, bias, kwargs.get("scale"))
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            self.hear("softmax", out)
        return out


@contextmanager
def watching(watched: list[Layer], see: Callable[[Call], None]) -> Iterator[None]:
    """While active, `see` is shown every call of a watched layer once it has run; what `see` computes is not watched."""
    heard: list[Heard] | None = None

    def hear(name: str, *args: Any) -> None:
        if heard is not None:
            heard.append(Heard(name, args))

    turns: Counter[str] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal heard
        heard = [] if not busy else None

    def after(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        *,
        layer: Layer,
    ) -> None:
        nonlocal heard, busy
        if busy:
            return
        told, heard, busy = heard, None, True
        try:
            inputs = args or (kwargs["hidden_states"],)
            grid = layer.grid or _grid(inputs[0])
            place = torch.arange(_tokens(grid)) if layer.place is None else layer.place
            place = place.to(inputs[0].device)
            weights = layer.read(told, inputs[0], place)
            index = turns.total()
            turns[layer.name] += 1
            name = (
                layer.name if turns[layer.name] == 1 else f"{layer.name} call {turns[layer.name]}"
            )
            see(Call(layer, name, index, grid, place, inputs, weights))
        finally:
            busy = False

    busy = False
    with ExitStack() as stack:
        for layer in watched:
            stack.callback(layer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(
                layer.module.register_forward_hook(
                    partial(after, layer=layer), with_kwargs=True
                ).remove
            )
        stack.enter_context(use(attention="sdpa"))
        stack.enter_context(
            observing(lambda name, *args: hear(name, *args) if name not in IGNORED else None)
        )
        stack.enter_context(_Softmaxes(hear))
        yield


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1]


def _indices(grid: Grid) -> Tensor:
    return torch.arange(_tokens(grid))[None, :, None]


def _inverse(order: Tensor) -> Tensor:
    """Token of the grid at every place (1, T, 1) -> place of every token (T,)."""
    return order.flatten().argsort()


def _grid(x: Tensor) -> Grid:
    """Of x (N, C, H, W), or of the tokens of a square (N, T, C)."""
    side = round(x.shape[1] ** 0.5)
    return tuple(x.shape[-2:]) if x.ndim == 4 else (side, side)


def _only(heard: list[Heard], *names: str) -> list[tuple[Any, ...]]:
    """The arguments of the operations heard; ValueError unless these were heard, in this order."""
    if tuple(call.name for call in heard) != names:
        raise ValueError(
            f"expected {', '.join(names)} inside this layer and heard {', '.join(call.name for call in heard) or 'nothing'}; "
            "choose torch's own attention (in diffusers: model.set_attn_processor with an AttnProcessor2_0)"
        )
    return [call.args for call in heard]


def attention_of(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    ((q, k, bias, scale),) = _only(heard, "attention")
    return implied.Softmax(q, k, place, bias, scale)


def _fused(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    """The heads of the first branch that ask the second, then those of the second that ask the first."""
    (q1, k2, bias, scale), (q2, k1, _, _) = _only(heard, "attention", "attention")
    return implied.Softmax(
        torch.cat([q1, q2], dim=1), torch.cat([k2, k1], dim=1), place, bias, scale
    )


def _written(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    ((weights,),) = _only(heard, "softmax")
    return implied.Written(weights, place)


def _windows(
    module: window.WindowAttention, heard: list[Heard], x: Tensor, place: Tensor
) -> Weights:
    ((q, k, bias, scale),) = _only(heard, "attention")
    w, shift, (height, width) = module.window, module.shift, module.size
    cells = place.view(height, width).roll((-shift, -shift), dims=(0, 1))
    cells = cells.view(height // w, w, width // w, w).transpose(1, 2).reshape(-1, w * w)  # (P, L)
    q, k, bias = (
        part.expand(len(x), *part.shape[1:]).unflatten(1, (len(cells), -1)).flatten(0, 1)
        for part in (q, k, bias)
    )
    return implied.Partitioned(
        implied.Softmax(q, k, torch.arange(w * w, device=x.device), bias, scale), cells
    )


def _polyphase(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    ((weights,),) = _only(heard, "softmax")
    height, width = x.shape[-2:]
    cells = place.view(height // 2, 2, width // 2, 2).permute(1, 3, 0, 2).reshape(4, -1)
    return implied.Partitioned(
        implied.Written(weights, torch.arange(cells.shape[1], device=x.device)), cells
    )


def _agents(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    (agents, k, to_agents, scale), (q, _, to_queries, _) = _only(heard, "attention", "attention")
    each = torch.arange(agents.shape[2], device=x.device)
    return implied.Agents(
        implied.Softmax(agents, k, each, to_agents, scale, keys=place),
        implied.Softmax(q, agents, place, to_queries, scale, keys=each),
    )


def _linear(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    ((q, k, _),) = _only(heard, "linear_attention")
    return implied.Linear(q, k, place)


def _gated_linear(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    ((q, k, _, g),) = _only(heard, "gated_linear")
    return implied.GatedLinear(q, k, g, place)


def _scans(heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    """One scan through the sequence or, as in DiS, a second from its end."""
    calls = [call.args for call in heard if call.name == "selective_scan"]
    both = [
        implied.Scan(*call[1:], where)
        for call, where in zip(calls, (place, x.shape[1] - 1 - place), strict=False)
    ]
    return both[0] if len(both) == 1 else implied.Both(*both)


def _kernel(depthwise: nn.Conv2d, heard: list[Heard], x: Tensor, place: Tensor) -> Weights:
    return implied.Kernel(depthwise.weight, tuple(x.shape[-2:]), len(x))
