"""Names and shapes of the weights are the authors', so that published checkpoints load.

The keys of ADM and LDM are held by a digest in test_counts.
"""

from collections.abc import Callable

import pytest
import torch

import backbones
from tests.support.networks import Shapes, repeated, under, weights_and_biases


def time_embedder(prefix: str, dim: int) -> Shapes:
    """Return the weights of an embedder of 256 frequencies."""
    return {f"{prefix}.mlp.0": (dim, 256), f"{prefix}.mlp.2": (dim, dim)}


def resampling(dim: int, down_1: str, down_2: str, up_2: str, up_1: str) -> Shapes:
    """Return the convolutions between the levels of a U-Net, which shuffle pixels and channels."""
    widths = {
        down_1: (dim // 2, dim),
        down_2: (dim, 2 * dim),
        up_2: (8 * dim, 4 * dim),
        up_1: (4 * dim, 2 * dim),
    }
    return {f"{name}.body.0.weight": (*width, 3, 3) for name, width in widths.items()}


def u_net_layers(dim: int) -> Shapes:
    """Return what DiCo and U-DiT have around their stages: embedders, reductions and the head."""
    layers = {
        "x_embedder.proj": (dim, 4, 3, 3),
        "reduce_chan_level2": (2 * dim, 4 * dim, 1, 1),
        "reduce_chan_level1": (2 * dim, 2 * dim, 1, 1),
        "final_layer.out_proj": (8, 2 * dim, 3, 3),
        "final_layer.adaLN_modulation.1": (4 * dim, 2 * dim),
    }
    for level, c in ((1, dim), (2, 2 * dim), (3, 4 * dim)):
        layers |= time_embedder(f"t_embedder_{level}", c)
    return layers


def u_net_stages(dim: int, *depths: int) -> list[tuple[str, int, int]]:
    """Return the stages of DiCo and U-DiT: name, depth and width.

    The decoder's upper level keeps the width of the lower one.
    """
    levels = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
    widths = (dim, 2 * dim, 4 * dim, 2 * dim, 2 * dim)
    return list(zip(levels, depths, widths, strict=True))


def dit_s_2_keys() -> Shapes:
    d = 384
    block = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (4 * d, d),
        "mlp.fc2": (d, 4 * d),
        "adaLN_modulation.1": (6 * d, d),
    }

    # Every layer has a bias.
    layers = time_embedder("t_embedder", d) | repeated("blocks", 12, block)
    layers |= {
        "x_embedder.proj": (d, 4, 2, 2),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    tables = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    return weights_and_biases(layers) | tables


def dico_s_keys() -> Shapes:
    d = 128
    layers = u_net_layers(d)
    for stage, depth, c in u_net_stages(d, 5, 4, 4, 4, 4):
        block = {
            "conv1": (c, c, 1, 1),
            "conv2": (c, 1, 3, 3),
            "conv3": (c, c, 1, 1),
            "ca.1": (c, c, 1, 1),
            "conv4": (2 * c, c, 1, 1),
            "conv5": (c, 2 * c, 1, 1),
            "adaLN_modulation.1": (6 * c, c),
        }
        layers |= repeated(stage, depth, block)

    # Every level has a table of labels.
    keys = weights_and_biases(layers)
    for level in range(3):
        keys[f"y_embedder.embedding_table_{level}.weight"] = (1001, d << level)
    return keys | resampling(d, "down1_2", "down2_3", "up3_2", "up2_1")


def dic_block(c: int, joined: bool) -> Shapes:
    """Return a block of DiC; one that takes a skip reads twice its width."""
    wide = 2 * c if joined else c
    block: Shapes = {
        "conv.norm0": (wide,),
        "conv.conv0": (c, wide, 3, 3),
        "conv.affine.1": (3 * c, c),
        "conv.norm1": (c,),
        "conv.conv1": (c, c, 3, 3),
    }
    if joined:
        block["conv.skip"] = (c, wide, 1, 1)
    return block


def dic_s_keys() -> Shapes:
    d = 96
    layers = {
        "x_embedder.proj": (d, 4, 3, 3),
        "output": (d, d, 3, 3),
        "final_layer.out_proj": (8, d, 3, 3),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }

    # Every level has embedders of its own.
    tables: Shapes = {}
    for level, c in enumerate((d, 2 * d, 4 * d)):
        layers |= time_embedder(f"t_embedder_ls.{level}", c)
        tables[f"y_embedder_ls.{level}.embedding_table.weight"] = (1001, c)

    # In the decoder every third block takes a skip.
    stages = [
        ("enc_blocks.0", 6, d),
        ("enc_blocks.1", 6, 2 * d),
        ("lat_blocks.0", 5, 4 * d),
        ("dec_blocks.0", 6, 2 * d),
        ("dec_blocks.1", 6, d),
    ]
    for stage, depth, c in stages:
        for i in range(depth):
            joined = stage.startswith("dec") and i in (0, 3)
            layers |= under(f"{stage}.{i}", dic_block(c, joined))
    keys = weights_and_biases(layers) | tables
    return keys | resampling(d, "downs.0", "downs.1", "ups.0", "ups.1")


def udit_block(c: int) -> Shapes:
    """Return the layers with biases of a block of U-DiT: two pairs of attention and MLP."""
    block: Shapes = {}
    for pair in (1, 2):
        block |= {
            f"attn{pair}.to_qkv": (3 * c, c),
            f"attn{pair}.to_out": (c, c, 1, 1),
            f"attn{pair}.downsampler.layer": (c, 1, 5, 5),
            f"adaLN_modulation{pair}.1": (6 * c, c),
        }

        # The MLP sums depthwise convolutions of three kernels.
        block |= {
            f"mlp{pair}.project_in.0": (c, c, 1, 1),
            f"mlp{pair}.project_in.1": (2 * c, c, 1, 1),
            f"mlp{pair}.dwconv.0": (2 * c, 1, 5, 5),
            f"mlp{pair}.dwconv.1": (2 * c, 1, 3, 3),
            f"mlp{pair}.dwconv.2": (2 * c, 1, 1, 1),
            f"mlp{pair}.project_out.0": (c, 2 * c, 1, 1),
            f"mlp{pair}.project_out.1": (c, c, 1, 1),
        }
    return block


def udit_s_keys() -> Shapes:
    d = 96
    layers = u_net_layers(d) | {"output": (2 * d, 2 * d, 3, 3)}
    scales: Shapes = {}

    # Every attention has four heads, whose scales have no bias.
    scales_of_block: Shapes = {"attn1.logit_scale": (4, 1, 1), "attn2.logit_scale": (4, 1, 1)}
    for stage, depth, c in u_net_stages(d, 2, 5, 8, 5, 2):
        layers |= repeated(stage, depth, udit_block(c))
        scales |= repeated(stage, depth, scales_of_block)

    # Every level has a table of labels.
    keys = weights_and_biases(layers) | scales
    for level in range(3):
        keys[f"y_embedder_{level + 1}.embedding_table.weight"] = (1001, d << level)
    return keys | resampling(d, "down1_2", "down2_3", "up3_2", "up2_1")


def uvit_l_2_keys() -> Shapes:
    d = 1024
    layers: Shapes = {
        "patch_embed.proj": (d, 4, 2, 2),
        "norm": (d,),
        "decoder_pred": (16, d),
        "final_layer": (4, 4, 3, 3),
    }
    tables: Shapes = {"pos_embed": (1, 258, d), "label_emb.weight": (1001, d)}
    block: Shapes = {
        "norm1": (d,),
        "attn.proj": (d, d),
        "norm2": (d,),
        "mlp.fc1": (4 * d, d),
        "mlp.fc2": (d, 4 * d),
    }

    # Queries, keys and values have no bias.
    unbiased = {"attn.qkv.weight": (3 * d, d)}
    tables |= under("mid_block", unbiased)
    tables |= repeated("in_blocks", 10, unbiased) | repeated("out_blocks", 10, unbiased)

    # Only the out-blocks take skips.
    joined = block | {"skip_linear": (d, 2 * d)}
    layers |= under("mid_block", block)
    layers |= repeated("in_blocks", 10, block) | repeated("out_blocks", 10, joined)
    return weights_and_biases(layers) | tables


def dig_s_2_keys() -> Shapes:
    d = 384
    inner = 1024
    tables = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}

    # The layers with biases.
    biased_of_block = {
        "attn.gk_proj.1": (d // 2, 16),
        "adaLN_modulation.1": (6 * d, d),
        "dw_conv": (d, 1, 3, 3),
    }
    biased = time_embedder("t_embedder", d) | repeated("blocks", 12, biased_of_block)
    biased |= {
        "x_embedder.proj": (d, 4, 2, 2),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }

    # The layers without.
    block = {
        "attn.q_proj.weight": (d // 2, d),
        "attn.k_proj.weight": (d // 2, d),
        "attn.v_proj.weight": (d, d),
        "attn.g_proj.weight": (d, d),
        "attn.o_proj.weight": (d, d),
        "attn.gk_proj.0.weight": (16, d),
        "attn.g_norm_swish_gate.weight": (64,),
        "mlp.gate_proj.weight": (2 * inner, d),
        "mlp.down_proj.weight": (d, inner),
    }
    return tables | repeated("blocks", 12, block) | weights_and_biases(biased)


def mamba_keys(dim: int, rank: int, kernel: int = 4, suffix: str = "") -> Shapes:
    """Return one direction of a mixer, with the projections that both directions share."""
    inner = 2 * dim
    b = suffix

    # A direction has its own convolution, step sizes and decay rates of 16 states.
    direction: Shapes = {
        f"A{b}_log": (inner, 16),
        f"D{b}": (inner,),
        f"conv1d{b}.weight": (inner, 1, kernel),
        f"conv1d{b}.bias": (inner,),
        f"x_proj{b}.weight": (rank + 32, inner),
        f"dt_proj{b}.weight": (inner, rank),
        f"dt_proj{b}.bias": (inner,),
    }
    return direction | {"in_proj.weight": (2 * inner, dim), "out_proj.weight": (dim, inner)}


def dis_h_2_keys() -> Shapes:
    d = 1536
    layers: Shapes = {
        "patch_embed.proj": (d, 4, 2, 2),
        "time_embed.0": (4 * d, d),
        "time_embed.2": (d, 4 * d),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    layers |= repeated("out_blocks", 24, {"skip_linear": (d, 2 * d)})

    # Every block reads its tokens in both directions.
    mixer = mamba_keys(d, 96) | mamba_keys(d, 96, suffix="_b")
    block = under("mixer", mixer) | {"norm.weight": (d,)}
    blocks = repeated("in_blocks", 24, block) | repeated("out_blocks", 24, block)
    blocks |= under("mid_block", block)

    tables: Shapes = {
        "pos_embed": (1, 258, d),
        "label_emb.embedding_table.weight": (1001, d),
        "norm_f.weight": (d,),
    }
    return weights_and_biases(layers) | blocks | tables


def dim_h_keys() -> Shapes:
    d = 1536
    layers: Shapes = {
        "pos_embed.proj": (d, 4, 2, 2),
        "adaln_single.emb.timestep_embedder.linear_1": (d, 256),
        "adaln_single.emb.timestep_embedder.linear_2": (d, d),
        "adaln_single.linear": (3 * d, d),
        "a4m_adapter.first_smoother": (d, 1, 3, 3),
        "a4m_adapter.last_smoother": (d, 1, 3, 3),
        "proj_out_1": (2 * d, d),
        "proj_out_2": (16, d),
    }

    # Embeddings, the tokens of the frame and the gain of the last norm.
    tables: Shapes = {
        "additional_embed": (1, 258, d),
        "label_emb.weight": (1001, d),
        "adaln_single.emb.class_embedder.embedding_table.weight": (1001, d),
        "a4m_adapter.pad_token": (1, d, 3),
        "a4m_adapter.pad_token_dec_split": (1, 3, d),
        "norm_out.norm.weight": (d,),
    }

    # Of 49 blocks, those behind the middle one take skips.
    block: Shapes = {"scale_shift_table": (3, d), "norm1.norm.weight": (d,)}
    block |= under("attn1", mamba_keys(d, 96, kernel=3))
    keys = weights_and_biases(layers) | tables | repeated("transformer_blocks", 49, block)
    skips = weights_and_biases({"skip_linear.0": (d, d), "skip_linear.1": (d, d)})
    for i in range(25, 49):
        keys |= under(f"transformer_blocks.{i}", skips)
    return keys


def dimsum_block(d: int, e: int) -> Shapes:
    """Return a block of DiMSUM: attention, an MLP, and two scans of half the channels each."""
    layers = {
        "proj.qkv1": (3 * e, e),
        "proj.qkv2": (3 * e, e),
        "proj.proj": (d, d),
        "mlp.w12": (8 * d, d),
        "mlp.w3": (d, 4 * d),
        "adaLN_modulation.1": (3 * d, d),
        "spatial_mamba.adaLN_modulation.1": (3 * e, d),
        "spatial_mamba.mixer.cond_proj": (d, d),
        "freq_mamba.adaLN_modulation.1": (3 * e, d),
        "freq_mamba.mixer.cond_proj": (d, d),
    }
    block = weights_and_biases(layers)
    block |= under("spatial_mamba.mixer", mamba_keys(e, 32))
    block |= under("freq_mamba.mixer", mamba_keys(e, 32))

    # Gains of norms, and the filters of the wavelets.
    return block | {
        "norm.weight": (d,),
        "norm_2.weight": (d,),
        "freq_mamba.dwt.w_ll": (1, 1, 2, 2),
        "freq_mamba.dwt.w_lh": (1, 1, 2, 2),
        "freq_mamba.dwt.w_hl": (1, 1, 2, 2),
        "freq_mamba.dwt.w_hh": (1, 1, 2, 2),
        "freq_mamba.idwt.filters": (4, 1, 2, 2),
    }


def dimsum_l_2_keys() -> Shapes:
    d = 1024
    layers = time_embedder("t_embedder", d)
    layers |= {
        "x_embedder.proj": (d, 4, 2, 2),
        "final_layer.linear": (16, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }

    # The one attention block that all blocks share.
    layers |= {
        "attn_block.adaLN_modulation.1": (6 * d, d),
        "attn_block.attn.qkv": (3 * d, d),
        "attn_block.attn.proj": (d, d),
        "attn_block.mlp.w12": (8 * d, d),
        "attn_block.mlp.w3": (d, 4 * d),
    }
    tables = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    blocks = repeated("blocks", 16, dimsum_block(d, d // 2))
    return weights_and_biases(layers) | tables | blocks


# The number of entries was read off the authors' modules; None where it was not.
CASES: dict[str, tuple[Callable[[], Shapes], int | None]] = {
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
    """A network of published size has exactly the names and shapes of the authors' module."""
    expected_keys, entries = CASES[name]
    expected = expected_keys()
    with torch.device("meta"):
        state = backbones.build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert entries is None or len(expected) == entries
