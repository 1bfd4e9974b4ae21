"""The probe watches all attention of all families; DiMSUM's equals products computed by hand."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import backbones
from analysis.probes.layers import layers
from analysis.probes.locality import LocalityProbe, Settings
from analysis.probes.watch import Call, SoftmaxObserver, watching
from backbones import dico_text
from backbones.kernels import use
from backbones.ldm import CrossAttention
from backbones.mamba import reorder
from tests.support.networks import NETWORKS

GRID = (12, 12)
TOKENS = GRID[0] * GRID[1]


def randomised(model: nn.Module) -> nn.Module:
    """Draw every parameter at random, zeros included, so that no path is closed."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model: nn.Module, images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shape = (images, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x, torch.full((images,), 0.3), torch.arange(images)


def families() -> list[str]:
    """Return one name per family."""
    names = {NETWORKS[name]: name for name in backbones.list_backbones()}
    return list(names.values())


def count_inside(model: nn.Module, modules: set[nn.Module]) -> int:
    """Return how many softmaxes a forward pass computes inside the modules."""
    observed: list[str] = []
    observer = SoftmaxObserver(lambda kind, *args: observed.append(kind))

    def enter(*_: object) -> None:
        observer.__enter__()

    def leave(*_: object) -> None:
        observer.__exit__(None, None, None)

    # Observe from the start of a module's forward pass to its end.
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with torch.no_grad(), use(attention="sdpa"):
            model(*inputs(model, 1))
    return len(observed)


@pytest.mark.parametrize("name", families())
def test_every_softmax_of_every_family_is_inside_a_watched_layer(name: str):
    """Attention to a class, which is one token, and to a text is the exception."""
    torch.manual_seed(0)
    options = dict(num_classes=5) | backbones.tiny_options_of(name)
    model = randomised(backbones.build(name, **options))
    watched = layers(model)
    to_class = sum(
        isinstance(module, CrossAttention | dico_text.CrossAttention)
        and part.endswith(("attn2", "text"))
        for part, module in model.named_modules()
    )
    inside = count_inside(model, {layer.module for layer in watched})
    assert inside == count_inside(model, {model}) - to_class

    # A shared layer's calls are watched one by one.
    calls: list[Call] = []
    with torch.no_grad(), watching(watched, calls.append):
        model(*inputs(model, 1))
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.name for call in calls}) == len(calls) >= len(watched)


@pytest.fixture(scope="module")
def dimsum() -> nn.Module:
    torch.manual_seed(0)
    options = dict(input_size=24, in_channels=3, num_classes=5)
    tiny = backbones.tiny_options_of("dimsum_l_2")
    return randomised(backbones.build("dimsum_l_2", **tiny | options))


@dataclass
class Pass:
    """A forward pass: the probe's calls, and each module's inputs and outputs call by call."""

    calls: list[Call]
    passed: dict[nn.Module, list[tuple[tuple[Tensor, ...], Tensor]]]


@pytest.fixture(scope="module")
def seen(dimsum: nn.Module) -> Pass:
    seen = Pass([], {})

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.passed.setdefault(module, []).append((args, out))

    with ExitStack() as stack:
        for module in dimsum.modules():
            stack.callback(module.register_forward_hook(keep).remove)
        with torch.no_grad(), watching(layers(dimsum), seen.calls.append):
            dimsum(*inputs(dimsum))
    return seen


def matrix(call: Call) -> Tensor:
    """Return all heads' weights of a call: (N, h, T, T) in float64."""
    heads = range(call.weights.heads)
    rows = [call.weights.rows(head, torch.arange(TOKENS)) for head in heads]
    return torch.stack(rows, dim=1).double()


def heads_of(x: Tensor, linear: nn.Linear, part: int, heads: int) -> Tensor:
    """Return queries (0), keys (1) or values (2): (N, T, D) -> (N, h, T, e) in float64."""
    width = linear.out_features // 3 // heads
    outputs = []
    for head in range(heads):
        start = (part * heads + head) * width
        rows = slice(start, start + width)
        weight = linear.weight[rows].double()
        bias = linear.bias[rows].double()
        outputs.append(x.double() @ weight.T + bias)
    return torch.stack(outputs, dim=1)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    sizes = torch.exp(torch.einsum("nhie,nhje->nhij", q, k) / q.shape[-1] ** 0.5)
    return sizes / sizes.sum(-1, keepdim=True)


def test_each_call_of_dimsums_shared_attention_is_a_layer(dimsum: nn.Module, seen: Pass):
    attention = dimsum.attn_block.attn
    shared = [call for call in seen.calls if call.layer.module is attention]
    assert [call.name for call in shared] == ["attn_block.attn", "attn_block.attn call 2"]
    assert [call.index for call in shared] == [4, 9]
    for call, ((x,), _) in zip(shared, seen.passed[attention], strict=True):
        q, k = (heads_of(x, attention.qkv, part, 3) for part in (0, 1))
        assert call.grid == GRID
        torch.testing.assert_close(matrix(call), softmax(q, k), rtol=1e-4, atol=1e-8)
    assert (matrix(shared[0]) - matrix(shared[1])).abs().max() > 1e-3


def test_in_dimsums_fused_attention_each_branch_queries_the_other(dimsum: nn.Module, seen: Pass):
    """Checked by the weights, and by what the block then makes of the values."""
    for block in dimsum.blocks:
        fusion = block.proj
        (call,) = [call for call in seen.calls if call.layer.module is fusion]
        (((x1, x2), out),) = seen.passed[fusion]
        q1, k1, v1 = (heads_of(x1, fusion.qkv1, part, 3) for part in range(3))
        q2, k2, v2 = (heads_of(x2, fusion.qkv2, part, 3) for part in range(3))

        # Three heads of either branch.
        weights = matrix(call)
        truth = torch.cat([softmax(q1, k2), softmax(q2, k1)], dim=1)
        torch.testing.assert_close(weights, truth, rtol=1e-4, atol=1e-8)

        # The block projects the weighted values.
        answers = (weights @ torch.cat([v2, v1], dim=1)).transpose(1, 2).flatten(2)
        projected = answers @ fusion.proj.weight.double().T + fusion.proj.bias.double()
        torch.testing.assert_close(projected, out.double(), rtol=1e-3, atol=1e-4)


def test_dimsums_scans_of_the_grid_look_back_along_their_order(dimsum: nn.Module, seen: Pass):
    for block in dimsum.blocks:
        branch = block.spatial_mamba
        (call,) = [call for call in seen.calls if call.layer.module is branch.mixer]
        order = reorder(torch.arange(TOKENS)[None, :, None], GRID, branch.order).flatten()
        along = matrix(call)[:, 0][:, order][:, :, order]
        assert not along.triu(1).any()
        assert (along.diagonal(dim1=1, dim2=2) > 0).all()


def test_the_probe_keeps_a_series_for_every_call_over_time(dimsum: nn.Module):
    """Two passes give every call two values per head, also where a layer is called twice."""
    settings = Settings(
        queries=3, anchors=((0.5, 0.5),), gradient_queries=0, gradient_images=1, directions=1
    )
    probe = LocalityProbe(dimsum, layers(dimsum), settings)
    for _ in range(2):
        probe(*inputs(dimsum, 1))

    # The series of attention, by their numbers among the arrays.
    arrays = probe.arrays()
    kinds = [key for key in arrays if key.startswith("kind_")]
    numbers = [key.removeprefix("kind_") for key in kinds if str(arrays[key]) == "attention"]
    assert [str(arrays[f"layer_{number}"]) for number in numbers] == [
        "blocks.0.proj",
        "blocks.1.proj",
        "attn_block.attn",
        "blocks.2.proj",
        "blocks.3.proj",
        "attn_block.attn call 2",
    ]

    # A fusion has six heads and the shared block three.
    shapes = [arrays[f"values_{number}"].shape for number in numbers]
    assert shapes == [(2, heads, 3) for heads in (6, 6, 3, 6, 6, 3)]
