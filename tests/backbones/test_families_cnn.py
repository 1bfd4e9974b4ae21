"""SiT, DiC, U-DiT and U-ViT: every registered name in small, and what is particular to each family."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.udit import DownsampledAttention, UDiT, rotary_table
from tests.support.networks import randomise, relative_rms, weights_and_biases

CHANNELS, CLASSES = 3, 7
NAMES = [
    name
    for family in ("sit_*", "dic_*", "udit_*", "uvit_*")
    for name in backbones.list_backbones(family)
]


def sizes(name: str) -> tuple[int, ...]:
    """Odd grids of patches; U-shapes at a power of two and at another size.

    U-DiT from 16 on: at 8 the sub-grids of its middle hold one token each, and attention has nothing to learn.
    """
    patch = backbones.options_of(name).get("patch")
    return (3 * patch,) if patch else (16, 24) if name.startswith("udit") else (8, 12)


CASES = [(name, size) for name in NAMES for size in sizes(name)]
every_network = pytest.mark.parametrize("name, size", CASES)
every_name = pytest.mark.parametrize("name", NAMES)


def network(name: str, size: int | None = None, **options: Any) -> nn.Module:
    small = backbones.tiny_options_of(name) | dict(
        input_size=size or sizes(name)[0], in_channels=CHANNELS, num_classes=CLASSES
    )
    return backbones.build(name, **small | options)


def inputs(size: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(batch, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


def out_channels(name: str) -> int:
    return CHANNELS * (2 if name.startswith(("dic", "udit")) else 1)


@every_network
def test_starts_the_same_from_a_seed_and_on_the_meta_device(name: str, size: int):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(network(name, size))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )
    out = models[0](*inputs(size))
    assert out.any() == name.startswith("uvit")  # the one family without a zero-initialised head
    with torch.device("meta"):
        meta = network(name, size).to("meta")
    assert {key: value.shape for key, value in meta.state_dict().items()} == {
        key: value.shape for key, value in first.items()
    }
    assert meta(*(part.to("meta") for part in inputs(size))).shape == out.shape
    with torch.no_grad():
        assert meta.eval()(*(part.to("meta") for part in inputs(size))).shape == out.shape


@every_network
@pytest.mark.parametrize("training", [True, False])
def test_is_a_function_of_each_sample(name: str, size: int, training: bool):
    model = randomise(network(name, size)).train(training)
    assert (model.input_size, model.in_channels, model.num_classes, model.out_channels) == (
        size,
        CHANNELS,
        CLASSES,
        out_channels(name),
    )
    x, t, y = inputs(size)
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == (3, out_channels(name), size, size) and out.isfinite().all()
        assert torch.equal(out, model(x, t, y))
        for i in range(3):
            assert relative_rms(out[i], model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0]) <= 1e-5
        exact = model.double()(x.double(), t, y)
        assert exact.dtype == torch.float64 and relative_rms(out, exact) <= 1e-5


@every_network
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter(name: str, size: int, training: bool):
    model = randomise(network(name, size)).train(training)
    x, t, y = inputs(size)
    x.requires_grad_()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    for key, p in [("x", x), *model.named_parameters()]:
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
        else:
            assert p.grad is None and key == "pos_embed" and name.startswith("sit")


@every_name
def test_another_input_size_is_taken_or_refused_in_a_line(name: str):
    size = sizes(name)[0]
    _, t, y = inputs(size)
    with pytest.raises(ValueError, match=f"{size + 2}x{size + 2}") as refusal:
        network(name)(torch.zeros(3, CHANNELS, size + 2, size + 2), t, y)
    assert "\n" not in str(refusal.value)
    if name.startswith(("dic", "udit")):
        assert network(name)(torch.zeros(3, CHANNELS, size, 2 * size), t, y).shape == (
            3,
            2 * CHANNELS,
            size,
            2 * size,
        )
    else:
        with pytest.raises(ValueError, match="input_size"):
            network(name)(torch.zeros(3, CHANNELS, 2 * size, 2 * size), t, y)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dic_s", {"input_size": 6}, ["divisible by 4", "6"]),
        ("dic_s", {"dim": 36}, ["32 groups", "36"]),
        ("dic_s", {"dim": 2}, ["groups of 4", "2"]),
        ("dic_s", {"depths": (6, 6, 5, 6, 7)}, ["every 3rd", "(6, 6, 5, 6, 7)"]),
        ("udit_s", {"input_size": 12}, ["divisible by 8", "12"]),
        ("udit_s", {"dim": 24}, ["divisible by 4 heads", "24", "4"]),
        ("uvit_l_2", {"input_size": 7}, ["divisible by patch", "7"]),
        ("uvit_l_2", {"heads": 5}, ["dim by heads", "1024", "5"]),
        ("uvit_l_2", {"depth": 5}, ["even", "5"]),
        ("uvit_l_2", {"learn_sigma": False}, ["learn_sigma", "conv_head"]),
        ("sit_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ],
)
def test_errors_name_what_is_known(name: str, options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        backbones.build(name, **options)
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("name", ["dic_s", "udit_s", "sit_s_2"])
def test_learn_sigma_off_shrinks_the_head(name: str):
    model, size = network(name, learn_sigma=False), sizes(name)[0]
    head = (
        model.final_layer.linear.out_features // 4
        if name == "sit_s_2"
        else model.final_layer.out_proj.out_channels
    )
    assert head == model.out_channels == CHANNELS and model(*inputs(size)).shape == (
        3,
        CHANNELS,
        size,
        size,
    )


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


@pytest.mark.parametrize(
    "name, keys, entries",
    [
        ("dic_s", dic_s_keys(), 325),
        ("udit_s", udit_s_keys(), 1043),
        ("uvit_l_2", uvit_l_2_keys(), 261),
    ],
)
def test_state_dict_has_the_authors_keys(name: str, keys: dict[str, tuple[int, ...]], entries: int):
    with torch.device("meta"):
        state = backbones.build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == keys and len(
        keys
    ) == entries


def test_sit_is_the_first_half_of_dit():
    sit = randomise(network("sit_s_2"))
    dit = network("dit_s_2", **backbones.tiny_options_of("sit_s_2"), input_size=6)
    dit.load_state_dict(sit.state_dict(), strict=True)
    x, _, y = inputs(6)
    t = torch.tensor([0.0, 0.3, 1.0])
    out = sit(x, t, y)
    assert torch.equal(out, dit(x, t, y)[:, :CHANNELS]) and (out[0] != out[1]).any()
    assert not torch.equal(out, sit(x, 1000 * t, y))


def test_dic_starts_with_open_gates():
    """The authors' zero-initialisation of the blocks finds nothing; their largest weight for S is 0.125 as well."""
    torch.manual_seed(0)
    model = backbones.build("dic_s")
    for stages in (model.enc_blocks, model.lat_blocks, model.dec_blocks):
        for affine in (block["conv"].affine[1] for stage in stages for block in stage):
            bound = math.sqrt(6 / sum(affine.weight.shape))
            assert 0.99 * bound < affine.weight.abs().max() <= bound and not affine.bias.any()
    zero = {
        key
        for key, value in model.state_dict().items()
        if key.endswith("weight") and not value.any()
    }
    assert zero == {"final_layer.out_proj.weight", "final_layer.adaLN_modulation.1.weight"}


def test_dic_skips_join_every_third_block_counted_from_the_bottleneck():
    model = randomise(network("dic_s", depths=(7, 4, 2, 5, 8)))
    made, taken = {}, {}
    for stage in (0, 1):
        for i, block in enumerate(model.enc_blocks[stage]):
            block["conv"].register_forward_hook(
                lambda module, args, out, at=(stage, i): made.update({at: out})
            )
        for i, block in enumerate(model.dec_blocks[1 - stage]):
            block["conv"].register_forward_pre_hook(
                lambda module, args, at=(stage, i): taken.update({at: args[0]})
            )
    model(*inputs(8))
    widths = {stage: made[stage, 0].shape[1] for stage in (0, 1)}
    joined = {at: x[:, widths[at[0]] :] for at, x in taken.items() if x.shape[1] > widths[at[0]]}
    sources = {
        at: [
            source
            for source, out in made.items()
            if out.shape == skip.shape and torch.equal(out, skip)
        ]
        for at, skip in joined.items()
    }
    assert sources == {
        (1, 0): [(1, 3)],
        (1, 3): [(1, 0)],
        (0, 0): [(0, 6)],
        (0, 3): [(0, 3)],
        (0, 6): [(0, 0)],
    }


def relative_error_of_eval(model: nn.Module) -> float:
    """Fused against spelled-out, on the same weights."""
    with torch.no_grad():
        spelled = model.train()(*inputs(16))
        fused = model.eval()(*inputs(16))
    assert not torch.equal(spelled, fused)
    return relative_rms(fused, spelled)


def test_udit_fuses_beside_its_parameters():
    model = randomise(network("udit_s"))
    before, buffers = copy.deepcopy(model.state_dict()), list(model.buffers())
    for _ in range(2):
        assert relative_error_of_eval(model) <= 1e-5
        model.eval().eval()
        state = model.state_dict()
        assert state.keys() == before.keys() and all(
            torch.equal(state[key], before[key]) for key in before
        )
        assert list(model.buffers()) == buffers == []


@pytest.mark.parametrize("change", ["load", "write", "replace", "cast", "copy"])
def test_udit_sees_weights_changed_in_eval_mode(change: str):
    model, other = randomise(network("udit_s"), seed=0).eval(), randomise(network("udit_s"), seed=1)
    x, t, y = inputs(16)
    with torch.no_grad():
        stale = model(x, t, y)
        if change == "copy":
            model = copy.deepcopy(model)
        if change == "cast":
            other, model, x = other.double(), model.double(), x.double()
        if change == "write":
            torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 1.0)
        else:
            model.load_state_dict(other.state_dict(), assign=change == "replace")
        assert (
            relative_rms(model(x, t, y), other(x, t, y))
            <= 1e-5
            < relative_rms(stale, other(x, t, y))
        )


def test_udit_attends_within_a_sub_grid():
    torch.manual_seed(0)
    attention = DownsampledAttention(16, heads=2)
    nn.init.zeros_(attention.downsampler["layer"].weight)
    x = torch.randn(1, 16, 8, 12)
    rotation = rotary_table((4, 6), 8, like=x)
    moved = x.clone()
    moved[:, :, 5, 2] += 1
    with torch.no_grad():
        changed = (attention(moved, rotation) - attention(x, rotation)).abs().amax(dim=1)[0] > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(changed, expected)


def test_udit_turns_pairs_by_column_and_row_in_turn():
    table = rotary_table((2, 3), 8, like=torch.zeros(1, dtype=torch.float64))
    for token in range(6):
        row, column = divmod(token, 3)
        for pair, position in enumerate((column, row, column, row)):
            angle = position * 10000 ** (-4 * (pair // 2) / 8)
            assert (
                abs(table[token, pair].item() - complex(math.cos(angle), math.sin(angle))) < 1e-14
            )


def test_udit_blocks_of_real_size_fuse_to_float32_accuracy():
    torch.manual_seed(0)
    model = randomise(
        UDiT(
            dim=96, depths=(1, 1, 1, 1, 1), input_size=16, in_channels=CHANNELS, num_classes=CLASSES
        )
    )
    assert relative_error_of_eval(model) <= 1e-5


def test_uvit_skips_are_taken_last_first():
    model = randomise(network("uvit_l_2"))
    made, taken = [], []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, out: made.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: taken.append(args[1]))
    model(*inputs(6))
    assert len(made) == len(taken) == 2 and all(
        torch.equal(a, b) for a, b in zip(made, reversed(taken), strict=True)
    )


def test_uvit_starts_as_published():
    torch.manual_seed(0)
    model = backbones.build("uvit_l_2", depth=2)
    middle = model.mid_block
    for weight in (
        middle.attn.qkv.weight,
        middle.mlp.fc2.weight,
        model.out_blocks[0].skip_linear.weight,
        model.decoder_pred.weight,
        model.pos_embed,
    ):
        assert abs(weight.std() / 0.02 - 1) < 0.02
    assert abs(model.label_emb.weight.std() - 1) < 0.02 and model.pos_embed.requires_grad
    assert not any(
        layer.bias.any()
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None
    )


def test_uvit_without_its_conv_head_ends_with_the_patches():
    with_head, without = randomise(network("uvit_l_2")), network("uvit_l_2", conv_head=False)
    state = {
        key: value
        for key, value in with_head.state_dict().items()
        if not key.startswith("final_layer")
    }
    without.load_state_dict(state, strict=True)
    out = without(*inputs(6))
    assert torch.equal(with_head(*inputs(6)), with_head.final_layer(out))
