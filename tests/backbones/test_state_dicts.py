"""Names and shapes of the weights are the authors', so that published checkpoints load.

The keys of ADM and LDM are held by a digest in test_counts.
"""

from collections.abc import Callable

import pytest
import torch

import backbones
from tests.support.networks import weights_and_biases


def dit_s_2_keys() -> dict[str, tuple[int, ...]]:
    d = 384
    layers = {
        "x_embedder.proj": (d, 4, 2, 2),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
    }
    layers |= {"final_layer.linear": (32, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    block = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (4 * d, d),
        "mlp.fc2": (d, 4 * d),
        "adaLN_modulation.1": (6 * d, d),
    }
    layers |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    return weights_and_biases(layers) | {
        "pos_embed": (1, 256, d),
        "y_embedder.embedding_table.weight": (1001, d),
    }


def dico_s_keys() -> dict[str, tuple[int, ...]]:
    d = 128
    layers = {
        "x_embedder.proj": (d, 4, 3, 3),
        "final_layer.out_proj": (8, 2 * d, 3, 3),
        "final_layer.adaLN_modulation.1": (4 * d, 2 * d),
    }
    layers |= {
        "reduce_chan_level2": (2 * d, 4 * d, 1, 1),
        "reduce_chan_level1": (2 * d, 2 * d, 1, 1),
    }
    for level, c in ((1, d), (2, 2 * d), (3, 4 * d)):
        layers |= {f"t_embedder_{level}.mlp.0": (c, 256), f"t_embedder_{level}.mlp.2": (c, c)}
    stages = [
        ("encoder_level_1", 5, d),
        ("encoder_level_2", 4, 2 * d),
        ("latent", 4, 4 * d),
        ("decoder_level_2", 4, 2 * d),
        ("decoder_level_1", 4, 2 * d),
    ]
    for stage, depth, c in stages:
        block = {
            "conv1": (c, c, 1, 1),
            "conv2": (c, 1, 3, 3),
            "conv3": (c, c, 1, 1),
            "ca.1": (c, c, 1, 1),
        }
        block |= {
            "conv4": (2 * c, c, 1, 1),
            "conv5": (c, 2 * c, 1, 1),
            "adaLN_modulation.1": (6 * c, c),
        }
        layers |= {
            f"{stage}.{i}.{name}": shape for i in range(depth) for name, shape in block.items()
        }
    keys = weights_and_biases(layers) | {
        f"y_embedder.embedding_table_{level}.weight": (1001, d << level) for level in range(3)
    }
    resampling = {
        "down1_2": (d // 2, d),
        "down2_3": (d, 2 * d),
        "up3_2": (8 * d, 4 * d),
        "up2_1": (4 * d, 2 * d),
    }
    return keys | {f"{name}.body.0.weight": (*shape, 3, 3) for name, shape in resampling.items()}


def dic_s_keys() -> dict[str, tuple[int, ...]]:
    d = 96
    layers = {
        "x_embedder.proj": (d, 4, 3, 3),
        "output": (d, d, 3, 3),
        "final_layer.out_proj": (8, d, 3, 3),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for level in range(3):
        layers |= {
            f"t_embedder_ls.{level}.mlp.0": (d << level, 256),
            f"t_embedder_ls.{level}.mlp.2": (d << level, d << level),
        }
    for stage, depth, c in [
        ("enc_blocks.0", 6, d),
        ("enc_blocks.1", 6, 2 * d),
        ("lat_blocks.0", 5, 4 * d),
        ("dec_blocks.0", 6, 2 * d),
        ("dec_blocks.1", 6, d),
    ]:
        for i in range(depth):
            joined = stage.startswith("dec") and i in (0, 3)
            wide = 2 * c if joined else c
            block = {
                "norm0": (wide,),
                "conv0": (c, wide, 3, 3),
                "affine.1": (3 * c, c),
                "norm1": (c,),
                "conv1": (c, c, 3, 3),
            }
            block |= {"skip": (c, wide, 1, 1)} if joined else {}
            layers |= {f"{stage}.{i}.conv.{name}": shape for name, shape in block.items()}
    keys = weights_and_biases(layers) | {
        f"y_embedder_ls.{level}.embedding_table.weight": (1001, d << level) for level in range(3)
    }
    resampling = {
        "downs.0": (d // 2, d),
        "downs.1": (d, 2 * d),
        "ups.0": (8 * d, 4 * d),
        "ups.1": (4 * d, 2 * d),
    }
    return keys | {f"{name}.body.0.weight": (*shape, 3, 3) for name, shape in resampling.items()}


def udit_s_keys() -> dict[str, tuple[int, ...]]:
    d, tables = 96, {}
    layers = {
        "x_embedder.proj": (d, 4, 3, 3),
        "output": (2 * d, 2 * d, 3, 3),
        "reduce_chan_level2": (2 * d, 4 * d, 1, 1),
        "reduce_chan_level1": (2 * d, 2 * d, 1, 1),
    }
    layers |= {
        "final_layer.out_proj": (8, 2 * d, 3, 3),
        "final_layer.adaLN_modulation.1": (4 * d, 2 * d),
    }
    for level, c in ((1, d), (2, 2 * d), (3, 4 * d)):
        layers |= {f"t_embedder_{level}.mlp.0": (c, 256), f"t_embedder_{level}.mlp.2": (c, c)}
        tables[f"y_embedder_{level}.embedding_table.weight"] = (1001, c)
    stages = [
        ("encoder_level_1", 2, d),
        ("encoder_level_2", 5, 2 * d),
        ("latent", 8, 4 * d),
        ("decoder_level_2", 5, 2 * d),
        ("decoder_level_1", 2, 2 * d),
    ]
    for stage, depth, c in stages:
        for block in (f"{stage}.{i}" for i in range(depth)):
            for part in (1, 2):
                pair = {
                    f"attn{part}.to_qkv": (3 * c, c),
                    f"attn{part}.to_out": (c, c, 1, 1),
                    f"attn{part}.downsampler.layer": (c, 1, 5, 5),
                }
                pair |= {
                    f"mlp{part}.project_in.0": (c, c, 1, 1),
                    f"mlp{part}.project_in.1": (2 * c, c, 1, 1),
                    f"adaLN_modulation{part}.1": (6 * c, c),
                }
                pair |= {f"mlp{part}.dwconv.{i}": (2 * c, 1, k, k) for i, k in enumerate((5, 3, 1))}
                pair |= {
                    f"mlp{part}.project_out.0": (c, 2 * c, 1, 1),
                    f"mlp{part}.project_out.1": (c, c, 1, 1),
                }
                layers |= {f"{block}.{name}": shape for name, shape in pair.items()}
                tables[f"{block}.attn{part}.logit_scale"] = (4, 1, 1)
    resampling = {
        "down1_2": (d // 2, d),
        "down2_3": (d, 2 * d),
        "up3_2": (8 * d, 4 * d),
        "up2_1": (4 * d, 2 * d),
    }
    return (
        weights_and_biases(layers)
        | tables
        | {f"{name}.body.0.weight": (*shape, 3, 3) for name, shape in resampling.items()}
    )


def uvit_l_2_keys() -> dict[str, tuple[int, ...]]:
    d = 1024
    layers = {
        "patch_embed.proj": (d, 4, 2, 2),
        "norm": (d,),
        "decoder_pred": (16, d),
        "final_layer": (4, 4, 3, 3),
    }
    names = [f"{half}_blocks.{i}" for half in ("in", "out") for i in range(10)] + ["mid_block"]
    for block in names:
        parts = {
            "norm1": (d,),
            "attn.proj": (d, d),
            "norm2": (d,),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
        }
        parts |= {"skip_linear": (d, 2 * d)} if block.startswith("out") else {}
        layers |= {f"{block}.{name}": shape for name, shape in parts.items()}
    keys = weights_and_biases(layers) | {f"{block}.attn.qkv.weight": (3 * d, d) for block in names}
    return keys | {"pos_embed": (1, 258, d), "label_emb.weight": (1001, d)}


def dig_s_2_keys() -> dict[str, tuple[int, ...]]:
    d, inner = 384, 1024
    keys = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    biased = {
        "x_embedder.proj": (d, 4, 2, 2),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(12):
        block = {
            "attn.q_proj": (d // 2, d),
            "attn.k_proj": (d // 2, d),
            "attn.v_proj": (d, d),
            "attn.g_proj": (d, d),
            "attn.o_proj": (d, d),
        }
        block |= {
            "attn.gk_proj.0": (16, d),
            "attn.g_norm_swish_gate": (64,),
            "mlp.gate_proj": (2 * inner, d),
            "mlp.down_proj": (d, inner),
        }
        keys |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
        biased |= {
            f"blocks.{i}.attn.gk_proj.1": (d // 2, 16),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
            f"blocks.{i}.dw_conv": (d, 1, 3, 3),
        }
    return keys | weights_and_biases(biased)


def mamba_keys(
    dim: int, rank: int, kernel: int = 4, suffix: str = ""
) -> dict[str, tuple[int, ...]]:
    """One direction of a mixer."""
    inner, b = 2 * dim, suffix
    keys = {
        f"A{b}_log": (inner, 16),
        f"D{b}": (inner,),
        f"conv1d{b}.weight": (inner, 1, kernel),
        f"conv1d{b}.bias": (inner,),
    }
    keys |= {
        f"x_proj{b}.weight": (rank + 32, inner),
        f"dt_proj{b}.weight": (inner, rank),
        f"dt_proj{b}.bias": (inner,),
    }
    return keys | {"in_proj.weight": (2 * inner, dim), "out_proj.weight": (dim, inner)}


def dis_h_2_keys() -> dict[str, tuple[int, ...]]:
    d = 1536
    keys = weights_and_biases(
        {
            "patch_embed.proj": (d, 4, 2, 2),
            "time_embed.0": (4 * d, d),
            "time_embed.2": (d, 4 * d),
            "final_layer.linear": (32, d),
            "final_layer.adaLN_modulation.1": (2 * d, d),
        }
    )
    keys |= {
        "pos_embed": (1, 258, d),
        "label_emb.embedding_table.weight": (1001, d),
        "norm_f.weight": (d,),
    }
    mixer = mamba_keys(d, 96) | mamba_keys(d, 96, suffix="_b")
    for block in [*(f"{arm}_blocks.{i}" for arm in ("in", "out") for i in range(24)), "mid_block"]:
        keys |= {f"{block}.mixer.{key}": shape for key, shape in mixer.items()} | {
            f"{block}.norm.weight": (d,)
        }
        if block.startswith("out"):
            keys |= weights_and_biases({f"{block}.skip_linear": (d, 2 * d)})
    return keys


def dim_h_keys() -> dict[str, tuple[int, ...]]:
    d, single = 1536, "adaln_single.emb.timestep_embedder.linear_"
    keys = weights_and_biases(
        {
            "pos_embed.proj": (d, 4, 2, 2),
            f"{single}1": (d, 256),
            f"{single}2": (d, d),
            "adaln_single.linear": (3 * d, d),
            "a4m_adapter.first_smoother": (d, 1, 3, 3),
            "a4m_adapter.last_smoother": (d, 1, 3, 3),
            "proj_out_1": (2 * d, d),
            "proj_out_2": (16, d),
        }
    )
    keys |= {
        "additional_embed": (1, 258, d),
        "label_emb.weight": (1001, d),
        "adaln_single.emb.class_embedder.embedding_table.weight": (1001, d),
    }
    keys |= {
        "a4m_adapter.pad_token": (1, d, 3),
        "a4m_adapter.pad_token_dec_split": (1, 3, d),
        "norm_out.norm.weight": (d,),
    }
    block = {"scale_shift_table": (3, d), "norm1.norm.weight": (d,)} | {
        f"attn1.{key}": shape for key, shape in mamba_keys(d, 96, kernel=3).items()
    }
    for i in range(49):
        skips = (
            weights_and_biases({"skip_linear.0": (d, d), "skip_linear.1": (d, d)}) if i > 24 else {}
        )
        keys |= {f"transformer_blocks.{i}.{key}": shape for key, shape in (block | skips).items()}
    return keys


def dimsum_l_2_keys() -> dict[str, tuple[int, ...]]:
    d, e = 1024, 512
    layers = {
        "x_embedder.proj": (d, 4, 2, 2),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
    }
    layers |= {
        "final_layer.linear": (16, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
        "attn_block.adaLN_modulation.1": (6 * d, d),
    }
    layers |= {
        "attn_block.attn.qkv": (3 * d, d),
        "attn_block.attn.proj": (d, d),
        "attn_block.mlp.w12": (8 * d, d),
        "attn_block.mlp.w3": (d, 4 * d),
    }
    block = {
        "proj.qkv1": (3 * e, e),
        "proj.qkv2": (3 * e, e),
        "proj.proj": (d, d),
        "mlp.w12": (8 * d, d),
        "mlp.w3": (d, 4 * d),
    }
    block |= {"adaLN_modulation.1": (3 * d, d)}
    for branch in ("spatial_mamba", "freq_mamba"):
        block |= {f"{branch}.adaLN_modulation.1": (3 * e, d), f"{branch}.mixer.cond_proj": (d, d)}
    block = weights_and_biases(block) | {
        "norm.weight": (d,),
        "norm_2.weight": (d,),
        "freq_mamba.idwt.filters": (4, 1, 2, 2),
    }
    block |= {f"freq_mamba.dwt.w_{band}": (1, 1, 2, 2) for band in ("ll", "lh", "hl", "hh")}
    block |= {
        f"{branch}.mixer.{key}": shape
        for branch in ("spatial_mamba", "freq_mamba")
        for key, shape in mamba_keys(e, 32).items()
    }
    keys = weights_and_biases(layers) | {
        "pos_embed": (1, 256, d),
        "y_embedder.embedding_table.weight": (1001, d),
    }
    return keys | {f"blocks.{i}.{key}": shape for i in range(16) for key, shape in block.items()}


# The number of entries was read off the authors' modules; None where it was not.
CASES: dict[str, tuple[Callable[[], dict[str, tuple[int, ...]]], int | None]] = {
    "dit_s_2": (dit_s_2_keys, 132),
    "dico_s": (dico_s_keys, 323),
    "dic_s": (dic_s_keys, 325),
    "udit_s": (udit_s_keys, 1043),
    "uvit_l_2": (uvit_l_2_keys, 261),
    "dig_s_2": (dig_s_2_keys, None),
    "dis_h_2": (dis_h_2_keys, None),
    "dim_h": (dim_h_keys, None),
    "dimsum_l_2": (dimsum_l_2_keys, None),
}


@pytest.mark.parametrize("name", CASES)
def test_state_dict_has_the_authors_keys(name: str):
    expected, entries = CASES[name][0](), CASES[name][1]
    with torch.device("meta"):
        state = backbones.build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert entries is None or len(expected) == entries
