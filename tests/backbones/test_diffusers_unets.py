"""U-Nets of the diffusers library, read from its folders and run as the library runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.captions import Text
from experiments.engine.records.weight_files import own_weights

diffusers = pytest.importorskip("diffusers")

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
# As SD 1.x and as KOALA-700M: the one with heads, the other with Linear and no middle.
SD = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=(CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP),
    attention_head_dim=2,
    cross_attention_dim=10,
)
KOALA = SD | dict(
    down_block_types=(DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, UP),
    mid_block_type=None,
    attention_head_dim=(1, 2),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=8 + 24,
)
PLAIN = dict(
    in_channels=3,
    out_channels=6,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    attention_head_dim=16,
    attn_norm_num_groups=32,
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=7,
)
COMMON = dict(input_size=6, in_channels=3, num_classes=7, dim=32, multipliers=(1, 2))
TEXT = COMMON | dict(num_res_blocks=1, context_tokens=5, context_dim=10)
OWN_SD = ("sd_1", TEXT | dict(depths=(1, 0), heads=2))
OWN_KOALA = ("koala_700m", TEXT | dict(depths=(0, 2), head_dim=32, pooled_dim=8, size_dim=4))
OTHER = dict(input_size=6, in_channels=3, num_classes=7, dim=24, depth=2, heads=3)
OWN_ADM = ("adm_base_64", COMMON | dict(num_res_blocks=1, attention_resolutions=(3,), head_dim=16))


def save(kind: str, config: dict[str, Any], folder: Path) -> nn.Module:
    """Write a network of the library with random weights of a trained one's size."""
    torch.manual_seed(0)
    network = getattr(diffusers, kind)(**config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return network.eval()


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 451, 999])


def load(own: tuple[str, dict[str, Any]], folder: Path, labels: str = "same") -> nn.Module:
    model = backbones.build(own[0], **own[1])
    backbones.load_fitted(model, folder, labels=backbones.Labels(labels))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("config", "own"), [(SD, OWN_SD), (KOALA, OWN_KOALA)], ids=["sd", "koala"])
def test_a_text_unet_runs_as_it_does_there(config: dict, own: tuple, tmp_path: Path):
    theirs = save("UNet2DConditionModel", config, tmp_path / "pipeline" / "unet")
    model = load(own, tmp_path / "pipeline")
    (x, t), context = inputs(), torch.randn(3, 5, 10)
    pooled, sizes = torch.randn(3, 8), torch.tensor([[48.0, 48, 0, 3, 32, 32]] * 3)
    added = {"text_embeds": pooled, "time_ids": sizes} if "pooled_dim" in own[1] else None
    text = Text(context, pooled, sizes) if added else Text(context)
    expected = theirs(x, t, context, added_cond_kwargs=added).sample
    torch.testing.assert_close(model(x, t, text), expected, rtol=0, atol=1e-5)

    # The declaration in a study has the hash of the network's folder.
    declared = own_weights(tmp_path / "pipeline").sha256
    assert declared == own_weights(tmp_path / "pipeline" / "unet").sha256


@torch.no_grad()
def test_ldm_takes_all_but_its_label_table(tmp_path: Path):
    theirs = save("UNet2DConditionModel", SD, tmp_path / "unet")
    own = ("ldm_4", COMMON | dict(num_res_blocks=1, attention_factors=(1,), heads=2))
    own[1]["context_dim"] = 10
    with pytest.raises(ValueError, match=r"has no label table .* declares labels='redraw'"):
        load(own, tmp_path / "unet")
    model = load(own, tmp_path / "unet", "redraw")
    (x, t), y = inputs(), torch.tensor([0, 3, 7])
    expected = theirs(x, t, model.cond_stage_model(y)).sample
    torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", ["legacy", "new"])
def test_adm_runs_as_it_does_there(order: str, tmp_path: Path):
    theirs = save("UNet2DModel", PLAIN, tmp_path / "unet")
    model = load((OWN_ADM[0], OWN_ADM[1] | dict(order=order)), tmp_path / "unet")
    (x, t), y = inputs(), torch.tensor([0, 3, 6])
    expected = theirs(x, t, class_labels=y).sample
    torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "own", "words"),
    [
        (
            "UNet2DConditionModel",
            dict(attention_head_dim=4),
            OWN_SD,
            "attention_head_dim 4, not (2, 2)",
        ),
        ("UNet2DConditionModel", dict(norm_eps=1e-6), OWN_SD, "norm_eps 1e-06, which no network"),
        ("UNet2DConditionModel", dict(time_cond_proj_dim=4), OWN_SD, "time_cond_proj_dim 4, which"),
        ("UNet2DConditionModel", dict(), OWN_KOALA, "down_block_types ('CrossAttnDownBlock2D', "),
        ("UNet2DConditionModel", dict(), OWN_ADM, "and ADM is read from a UNet2DModel"),
        ("UNet2DConditionModel", dict(), ("dit_s_2", OTHER), "which is not read into DiT"),
        ("UNet2DModel", dict(), OWN_ADM, "down_block_types ('CrossAttnDownBlock2D', "),
        ("UVit2DModel", dict(), ("uvit_h_2", OTHER), "no network here has that form"),
        (None, dict(), OWN_SD, "it lacks _class_name"),
    ],
)
def test_a_folder_of_another_network_is_one_line(
    kind: str | None, changes: dict, own: tuple, words: str, tmp_path: Path
):
    config = SD | changes | ({"_class_name": kind} if kind else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refusal:
        load(own, tmp_path)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
