"""What is particular to ADM and LDM: the authors' outputs, the orders of heads, the upsamplers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.adm import AttentionBlock
from backbones.checkpoint import load_published
from backbones.ldm import CrossAttention
from experiments.engine.diffusion.cascade import append_low_res
from tests.support.networks import randomise, relative_rms
from tests.support.paths import DATA

CLASSES = 7
AUTHORS = json.loads((DATA / "outputs_adm.json").read_text())
NAMES = backbones.list_backbones("adm_*") + backbones.list_backbones("ldm_*")
every_name = pytest.mark.parametrize("name", NAMES)


def network(name: str, **options: Any) -> nn.Module:
    tiny = backbones.tiny_options_of(name) | dict(num_classes=CLASSES)
    return backbones.build(name, **tiny | options)


def inputs(name: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, t and y of a batch of three; the last label is the last of those that have a row."""
    options = backbones.options_of(name)
    shape = (3, options["in_channels"], size, size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    last = CLASSES - 1 + options["null_label"]
    return x, torch.tensor([0, 37, 999]), torch.tensor([0, 3, last])


@every_name
@torch.no_grad()
def test_output_is_that_of_the_authors_module(name: str):
    """One pixel of the second sample, measured in float64 on their modules.

    Sinusoids of time are float32, and processors round their cosines in different ways.
    """
    model = randomise(network(name)).double()
    x, t, y = inputs(name, 16)
    ours = model(x.double(), t, y)[1, :, 5, 3]
    theirs = torch.tensor(AUTHORS[name], dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert relative_rms(ours, theirs) < 1e-7


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def channels_of(order: str, part: int, head: int, heads: int, e: int) -> slice:
    """Return where a head's queries (part 0), keys (1) or values (2) lie in the channels of qkv."""
    first = 3 * head + part if order == "legacy" else part * heads + head
    return slice(first * e, (first + 1) * e)


def attend_by_definition(block: AttentionBlock, x: Tensor, order: str, heads: int) -> Tensor:
    """Return what a block of ADM computes, head by head: x (2, 96, 3, 5) -> same."""
    # Normalise 32 groups of channels.
    h = x.view(2, 32, -1)
    variance = h.var(-1, correction=0, keepdim=True)
    h = (h - h.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    h = h.view(2, 96, 15) * block.norm.weight[:, None] + block.norm.bias[:, None]

    # Attend over 15 positions, each head in its own channels.
    qkv = block.qkv.weight[:, :, 0] @ h + block.qkv.bias[:, None]
    e = 96 // heads
    attended = []
    for head in range(heads):
        q, k, v = (qkv[:, channels_of(order, part, head, heads, e)] for part in range(3))
        weights = softmax(torch.einsum("ncq,nck->nqk", q, k) / e**0.5)
        attended.append(torch.einsum("nqk,nck->ncq", weights, v))

    # Project, and add to the input.
    out = block.proj_out.weight[:, :, 0] @ torch.cat(attended, dim=1)
    return x + (out + block.proj_out.bias[:, None]).view(x.shape)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_adm_attention_is_what_its_order_says(order: str, heads: int):
    """The order of the channels of qkv decides which of them a head reads."""
    block = randomise(AttentionBlock(96, heads, order).double())
    x = torch.randn(2, 96, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    truth = attend_by_definition(block, x, order, heads)
    assert relative_rms(block(x), truth) < 1e-12

    # To one head, both orders are the same.
    block.order = {"legacy": "new", "new": "legacy"}[order]
    error = relative_rms(block(x), truth)
    if heads == 1:
        assert error < 1e-12
    else:
        assert error > 0.05


@torch.no_grad()
def test_a_wrong_order_loads_silently_and_changes_the_output():
    """The same weights in another order of heads give another output."""
    legacy = randomise(network("adm_256", order="legacy"))
    new = randomise(network("adm_256", order="new"))
    new.load_state_dict(legacy.state_dict(), strict=True)
    batch = inputs("adm_256", 16)
    assert relative_rms(new(*batch), legacy(*batch)) > 1e-3


@pytest.mark.parametrize("tokens, heads", [(1, 2), (5, 3)])
@torch.no_grad()
def test_ldm_attention_against_loops_over_heads(tokens: int, heads: int):
    """Every head attends to the context in its own channels."""
    dim = 12
    dim_context = 7
    block = randomise(CrossAttention(dim, dim_context, heads).double())
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, dim, generator=draw).double()
    context = torch.randn(2, tokens, dim_context, generator=draw).double()

    # Queries come from x, keys and values from the context.
    q = x @ block.to_q.weight.T
    k = context @ block.to_k.weight.T
    v = context @ block.to_v.weight.T
    e = dim // heads
    attended = []
    for head in range(heads):
        at = slice(head * e, (head + 1) * e)
        weights = softmax(q[..., at] @ k[..., at].transpose(1, 2) / e**0.5)
        attended.append(weights @ v[..., at])
    truth = torch.cat(attended, dim=-1) @ block.to_out[0].weight.T + block.to_out[0].bias
    assert relative_rms(block(x, context), truth) < 1e-12


def bilinear(size: int, new: int) -> Tensor:
    """(new, size) weights of a linear resize whose pixels are areas, clamped at the border."""
    weights = torch.zeros(new, size, dtype=torch.float64)
    for i in range(new):
        place = min(max((i + 0.5) * size / new - 0.5, 0), size - 1)
        low = min(int(place), size - 2)
        weights[i, low], weights[i, low + 1] = 1 - (place - low), place - low
    return weights


def test_the_low_resolution_image_is_resized_and_put_after_x():
    """An upsampler reads x, and behind it the low-resolution image at the size of x."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 12, generator=draw).double()
    low_res = torch.randn(2, 3, 4, 3, generator=draw).double()
    joined = append_low_res(x, low_res)

    # The first channels are x, and the others are resized.
    assert joined.shape == (2, 6, 16, 12)
    assert torch.equal(joined[:, :3], x)
    resized = bilinear(4, 16) @ low_res @ bilinear(3, 12).T
    assert relative_rms(joined[:, 3:], resized) < 1e-12

    # The network takes both together.
    model = randomise(network("adm_up_256"))
    out = model(joined.float(), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 6, 16, 12)


def test_a_published_ldm_checkpoint_is_renamed_and_its_other_parts_left_out(tmp_path: Path):
    """LDM's weights get our names, and its averaged weights replace those of the network."""
    own = randomise(network("ldm_4")).state_dict()
    labels = {key: value for key, value in own.items() if key.startswith("cond_stage_model.")}
    network_weights = {key: value for key, value in own.items() if key not in labels}

    # The authors put a prefix before the network's names, and store other parts beside it.
    theirs = labels | {
        f"model.diffusion_model.{key}": value for key, value in network_weights.items()
    }
    assert "cond_stage_model.embedding.weight" in theirs
    assert "model.diffusion_model.input_blocks.0.0.weight" in theirs
    for other in ("betas", "first_stage_model.quantize.embedding.weight", "model_ema.decay"):
        theirs[other] = torch.zeros(1)

    # Names of averaged weights have lost their dots. Here those weights are twice the others.
    averaged = {
        "model_ema.diffusion_model" + key.replace(".", ""): 2 * value
        for key, value in network_weights.items()
    }

    # The embedding of labels has no average.
    loaded = network("ldm_4")
    for name, extra, factor in [("plain", {}, 1), ("averaged", averaged, 2)]:
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": theirs | extra, "global_step": 3}, path)
        load_published(loaded, path)
        for key, value in loaded.state_dict().items():
            expected = own[key] if key in labels else factor * own[key]
            assert torch.equal(value, expected)
