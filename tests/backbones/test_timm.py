"""Attention, MLP and stochastic depth against timm, an independent implementation.

Outputs and the gradients of the input and of every parameter agree in float64, on odd sizes. timm
is also compared in float32, where its fused attention runs.
"""

import pytest
import torch
from timm.layers import DropPath
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from backbones.dis import DiSBlock
from backbones.layers import Mlp, SelfAttention
from backbones.mixers import build_mixer
from tests.support.networks import randomise, relative_rms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = layer(x)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], probe)
    return dict(zip(["out", "x", *parameters], [out, *gradients], strict=True))


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Load our weights into their layer and compare."""
    theirs.load_state_dict(randomise(ours).state_dict(), strict=True)
    ours, theirs = ours.to(x.dtype), theirs.to(x.dtype)
    truth = results(theirs, x)
    for name, value in results(ours, x).items():
        assert relative_rms(value, truth[name]) <= TOLERANCE[x.dtype], name


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_dtype
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tokens, dim, heads", [(1, 6, 2), (7, 15, 3), (13, 35, 7), (11, 9, 1)])
def test_attention_is_timms(tokens: int, dim: int, heads: int, qkv_bias: bool, dtype: torch.dtype):
    ours = SelfAttention(dim, heads, qkv_bias)
    theirs = TimmAttention(dim, num_heads=heads, qkv_bias=qkv_bias)
    assert_same(ours, theirs, draw(3, tokens, dim, dtype=dtype))


def test_the_softmax_mixer_is_timms_attention_over_a_grid():
    mixer = randomise(build_mixer("softmax", 15, (5, 7), 0, heads=3)).double()
    theirs = TimmAttention(15, num_heads=3, qkv_bias=True).double()
    theirs.load_state_dict(mixer.state_dict(), strict=True)
    x = draw(2, 15, 5, 7, dtype=torch.float64)
    truth = theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (5, 7))
    assert relative_rms(mixer(x), truth) <= 1e-12


@every_dtype
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("tokens, dim, hidden", [(1, 5, 3), (7, 15, 61), (13, 9, 36)])
def test_mlp_is_timms(tokens: int, dim: int, hidden: int, approximate: str, dtype: torch.dtype):
    theirs = TimmMlp(dim, hidden, act_layer=lambda: nn.GELU(approximate=approximate))
    assert_same(Mlp(dim, hidden, approximate), theirs, draw(3, tokens, dim, dtype=dtype))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6])
def test_a_weighed_increment_is_timms_drop_path(rate: float):
    """DiS's `kept`, with timm's draw for each sample, adds what timm adds to the stream."""
    block = randomise(DiSBlock(10)).double()
    h, r = draw(2, 17, 5, 10, dtype=torch.float64).requires_grad_()
    drop = DropPath(rate).train()

    # timm's draws, read off a tensor of ones: 0, or 1 / (1 - rate).
    torch.manual_seed(3)
    kept = drop(torch.ones(17, 1, 1, dtype=torch.float64))
    assert set(kept.flatten().tolist()) == ({0.0, 1 / (1 - rate)} if rate else {1.0})

    torch.manual_seed(3)
    truth = r + drop(h)
    _, stream = block(h, r, kept=kept)
    assert torch.equal(stream, truth)
    probe = draw(17, 5, 10, dtype=torch.float64)
    ours = torch.autograd.grad(stream, (h, r), probe)
    theirs = torch.autograd.grad(truth, (h, r), probe)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
