"""Whether the probe watches all attention of all families, and DiMSUM's, which is fused and shared, against products by hand."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import backbones
from analysis.probes.layers import Call, _Softmaxes, layers, watching
from analysis.probes.locality import LocalityProbe, Settings
from backbones.kernels import use
from backbones.ldm import CrossAttention
from backbones.mamba import reorder

GRID, TOKENS = (12, 12), 144


def drawn(model: nn.Module) -> nn.Module:
    """Every parameter at random, zeros included, so that no path is closed."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model: nn.Module, images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shape = (images, model.in_channels, model.input_size, model.input_size)
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        torch.full((images,), 0.3),
        torch.arange(images),
    )


def families() -> list[str]:
    """One name a family."""
    return list(
        {
            type(backbones.build(name, **backbones.tiny_options_of(name))): name
            for name in backbones.list_backbones()
        }.values()
    )


@pytest.mark.parametrize("name", families())
def test_every_softmax_of_every_family_is_inside_a_watched_layer(name: str):
    """But LDM's attention to its class, which is one token; a shared layer's calls are watched one by one."""
    torch.manual_seed(0)
    model = drawn(backbones.build(name, **dict(num_classes=5) | backbones.tiny_options_of(name)))
    computed, watched, calls = [], [], []
    x, t, y = inputs(model, 1)
    with (
        torch.no_grad(),
        use(attention="sdpa"),
        _Softmaxes(lambda kind, *args: computed.append(kind)),
    ):
        model(x, t, y)
    with torch.no_grad(), ExitStack() as stack:
        found = layers(model)
        hearing = _Softmaxes(lambda kind, *args: watched.append(kind))
        for module in {layer.module for layer in found}:
            stack.callback(
                module.register_forward_pre_hook(lambda *_: hearing.__enter__() and None).remove
            )
            stack.callback(
                module.register_forward_hook(lambda *_: hearing.__exit__(None, None, None)).remove
            )
        with use(attention="sdpa"):
            model(x, t, y)
    with torch.no_grad(), watching(found, calls.append):
        model(x, t, y)
    to_class = sum(
        isinstance(module, CrossAttention) and part.endswith("attn2")
        for part, module in model.named_modules()
    )
    assert len(watched) == len(computed) - to_class
    assert [call.index for call in calls] == list(range(len(calls))) and len(
        {call.name for call in calls}
    ) == len(calls) >= len(found)


@pytest.fixture(scope="module")
def dimsum() -> nn.Module:
    torch.manual_seed(0)
    return drawn(
        backbones.build(
            "dimsum_l_2",
            **backbones.tiny_options_of("dimsum_l_2")
            | dict(input_size=24, in_channels=3, num_classes=5),
        )
    )


@pytest.fixture(scope="module")
def seen(dimsum) -> tuple[list[Call], dict[nn.Module, list[tuple[tuple[Tensor, ...], Tensor]]]]:
    """The probe's calls; and what went into and came out of every module, call by call, heard without the probe."""
    calls, passed = [], {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, out: passed.setdefault(module, []).append((args, out))
        )
        for module in dimsum.modules()
    ]
    with torch.no_grad(), watching(layers(dimsum), calls.append):
        dimsum(*inputs(dimsum))
    for hook in hooks:
        hook.remove()
    return calls, passed


def matrix(call: Call) -> Tensor:
    """All heads' weights of a call: (N, h, T, T) in float64."""
    return torch.stack(
        [call.weights.rows(head, torch.arange(TOKENS)) for head in range(call.weights.heads)], dim=1
    ).double()


def heads_of(x: Tensor, linear: nn.Linear, part: int, heads: int) -> Tensor:
    """Queries (0), keys (1) or values (2) by slices of the weights: (N, T, D) -> (N, h, T, e) in float64."""
    each = linear.out_features // 3 // heads
    slices = [
        slice(part * heads * each + head * each, part * heads * each + (head + 1) * each)
        for head in range(heads)
    ]
    return torch.stack(
        [
            x.double() @ linear.weight[rows].double().T + linear.bias[rows].double()
            for rows in slices
        ],
        dim=1,
    )


def softmax(q: Tensor, k: Tensor) -> Tensor:
    sizes = torch.exp(torch.einsum("nhie,nhje->nhij", q, k) / q.shape[-1] ** 0.5)
    return sizes / sizes.sum(-1, keepdim=True)


def test_dimsums_shared_attention_is_a_layer_a_call(dimsum, seen):
    calls, passed = seen
    attn = dimsum.attn_block.attn
    shared = [call for call in calls if call.layer.module is attn]
    assert [call.name for call in shared] == ["attn_block.attn", "attn_block.attn call 2"] and [
        call.index for call in shared
    ] == [4, 9]
    for call, ((x,), _) in zip(shared, passed[attn], strict=True):
        assert call.grid == GRID
        q, k = (heads_of(x, attn.qkv, part, 3) for part in (0, 1))
        torch.testing.assert_close(matrix(call), softmax(q, k), rtol=1e-4, atol=1e-8)
    assert (matrix(shared[0]) - matrix(shared[1])).abs().max() > 1e-3


def test_dimsums_fused_attention_is_each_branchs_of_the_other(dimsum, seen):
    """By the weights, and by what the block then makes of the values."""
    calls, passed = seen
    for block in dimsum.blocks:
        (call,) = [call for call in calls if call.layer.module is block.proj]
        (((x1, x2), out),) = passed[block.proj]
        q1, k1, v1 = (heads_of(x1, block.proj.qkv1, part, 3) for part in range(3))
        q2, k2, v2 = (heads_of(x2, block.proj.qkv2, part, 3) for part in range(3))
        found = matrix(call)
        torch.testing.assert_close(
            found, torch.cat([softmax(q1, k2), softmax(q2, k1)], dim=1), rtol=1e-4, atol=1e-8
        )
        answers = (found @ torch.cat([v2, v1], dim=1)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            answers @ block.proj.proj.weight.double().T + block.proj.proj.bias.double(),
            out.double(),
            rtol=1e-3,
            atol=1e-4,
        )


def test_dimsums_scans_of_the_grid_look_back_along_their_order(dimsum, seen):
    calls, _ = seen
    for block in dimsum.blocks:
        (call,) = [call for call in calls if call.layer.module is block.spatial_mamba.mixer]
        order = reorder(
            torch.arange(TOKENS)[None, :, None], GRID, block.spatial_mamba.order
        ).flatten()
        along = matrix(call)[:, 0][:, order][:, :, order]
        assert not along.triu(1).any() and (along.diagonal(dim1=1, dim2=2) > 0).all()


def test_the_probe_keeps_a_part_for_every_call_over_time(dimsum):
    probe = LocalityProbe(
        dimsum,
        layers(dimsum),
        Settings(
            queries=3, anchors=((0.5, 0.5),), gradient_queries=1, gradient_images=1, directions=1
        ),
    )
    for _ in range(2):
        probe(*inputs(dimsum))
    arrays = probe.arrays()
    parts = [
        p
        for p in range(sum(key.startswith("kind_") for key in arrays))
        if str(arrays[f"kind_{p}"]) == "attention"
    ]
    assert [str(arrays[f"layer_{p}"]) for p in parts] == [
        "blocks.0.proj",
        "blocks.1.proj",
        "attn_block.attn",
        "blocks.2.proj",
        "blocks.3.proj",
        "attn_block.attn call 2",
    ]
    assert [arrays[f"values_{p}"].shape for p in parts] == [
        (2, heads, 3) for heads in (6, 6, 3, 6, 6, 3)
    ]
