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
    return backbones.build(
        name, **backbones.tiny_options_of(name) | dict(num_classes=CLASSES) | options
    )


def inputs(name: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y of a batch of three; the last label is the last of those that have a row."""
    options = backbones.options_of(name)
    x = torch.randn(
        3, options["in_channels"], size, size, generator=torch.Generator().manual_seed(1)
    )
    return x, torch.tensor([0, 37, 999]), torch.tensor([0, 3, CLASSES - 1 + options["null_label"]])


@every_name
@torch.no_grad()
def test_output_is_that_of_the_authors_module(name: str):
    """One pixel of the second sample, measured in float64 on their modules."""
    model = randomise(network(name)).double()
    x, t, y = inputs(name, 16)
    ours = model(x.double(), t, y)[1, :, 5, 3]
    theirs = torch.tensor(AUTHORS[name], dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert relative_rms(ours, theirs) < 1e-9


def channels_of(order: str, part: int, head: int, heads: int, e: int) -> slice:
    """Return where a head's queries (part 0), keys (1) or values (2) lie in the channels of qkv."""
    first = (3 * head + part if order == "legacy" else part * heads + head) * e
    return slice(first, first + e)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_adm_attention_is_what_its_order_says(order: str, heads: int):
    dim = 96
    e = 96 // heads
    block = randomise(AttentionBlock(dim, heads, order).double())
    x = torch.randn(2, dim, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    h = x.view(2, 32, -1)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = h.view(2, dim, 15) * block.norm.weight[:, None] + block.norm.bias[:, None]
    qkv = block.qkv.weight[:, :, 0] @ h + block.qkv.bias[:, None]
    attended = []
    for head in range(heads):
        q, k, v = (qkv[:, channels_of(order, part, head, heads, e)] for part in range(3))
        logits = torch.einsum("ncq,nck->nqk", q, k) / e**0.5
        attended.append(
            torch.einsum("nqk,nck->ncq", logits.exp() / logits.exp().sum(-1, keepdim=True), v)
        )
    truth = x + (
        block.proj_out.weight[:, :, 0] @ torch.cat(attended, dim=1) + block.proj_out.bias[:, None]
    ).view(x.shape)
    assert relative_rms(block(x), truth) < 1e-12
    block.order = {"legacy": "new", "new": "legacy"}[order]
    assert (
        relative_rms(block(x), truth) < 1e-12
        if heads == 1
        else relative_rms(block(x), truth) > 0.05
    )


@torch.no_grad()
def test_a_wrong_order_loads_silently_and_changes_the_output():
    legacy, new = (randomise(network("adm_256", order=order)) for order in ("legacy", "new"))
    new.load_state_dict(legacy.state_dict(), strict=True)
    assert relative_rms(new(*inputs("adm_256", 16)), legacy(*inputs("adm_256", 16))) > 1e-3


@pytest.mark.parametrize("tokens, heads", [(1, 2), (5, 3)])
@torch.no_grad()
def test_ldm_attention_against_loops_over_heads(tokens: int, heads: int):
    dim = 12
    dim_context = 7
    e = 12 // heads
    block = randomise(CrossAttention(dim, dim_context, heads).double())
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, dim, generator=draw).double()
    context = torch.randn(2, tokens, dim_context, generator=draw).double()
    q = x @ block.to_q.weight.T
    k = context @ block.to_k.weight.T
    v = context @ block.to_v.weight.T
    parts = []
    for head in range(heads):
        at = slice(head * e, (head + 1) * e)
        logits = q[..., at] @ k[..., at].transpose(1, 2) / e**0.5
        parts.append(logits.exp() / logits.exp().sum(-1, keepdim=True) @ v[..., at])
    truth = torch.cat(parts, dim=-1) @ block.to_out[0].weight.T + block.to_out[0].bias
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
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 12, generator=draw).double()
    low_res = torch.randn(2, 3, 4, 3, generator=draw).double()
    joined = append_low_res(x, low_res)
    assert joined.shape == (2, 6, 16, 12)
    assert torch.equal(joined[:, :3], x)
    assert relative_rms(joined[:, 3:], bilinear(4, 16) @ low_res @ bilinear(3, 12).T) < 1e-12
    model = randomise(network("adm_up_256"))
    assert model(joined.float(), torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape == (
        2,
        6,
        16,
        12,
    )


def test_a_published_ldm_checkpoint_is_renamed_and_its_other_parts_left_out(tmp_path: Path):
    model = randomise(network("ldm_4"))
    loaded = network("ldm_4")
    own = model.state_dict()
    theirs = {
        key if key.startswith("cond_stage_model.") else f"model.diffusion_model.{key}": value
        for key, value in own.items()
    }
    assert "cond_stage_model.embedding.weight" in theirs
    assert "model.diffusion_model.input_blocks.0.0.weight" in theirs
    theirs |= {
        key: torch.zeros(1)
        for key in ("betas", "first_stage_model.quantize.embedding.weight", "model_ema.decay")
    }
    averaged = {
        "model_ema.diffusion_model" + key.replace(".", ""): 2 * own[key]
        for key in own
        if not key.startswith("cond_stage_model.")
    }
    for name, extra, factor in [("plain", {}, 1), ("averaged", averaged, 2)]:
        torch.save({"state_dict": theirs | extra, "global_step": 3}, tmp_path / f"{name}.ckpt")
        load_published(loaded, tmp_path / f"{name}.ckpt")
        for key, value in loaded.state_dict().items():
            assert torch.equal(
                value, own[key] if key.startswith("cond_stage_model.") else factor * own[key]
            )
