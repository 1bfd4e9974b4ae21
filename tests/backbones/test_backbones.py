"""Registering is being tested: every registered network, and every declared row shrunk to a test's size.

The controlled stacks are held to DiCo and DiT by loading their weights.
"""

import csv
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.dico import DiCo
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import count_backbone as count
from tests.support.networks import (
    CASES,
    CHANNELS,
    inputs,
    network,
    randomise,
    relative_rms,
    weights_and_biases,
)
from tests.support.paths import DATA

AUTHORS = list(csv.DictReader((DATA / "counts_authors_code.csv").open()))


every_network = pytest.mark.parametrize("case", CASES)


@every_network
def test_starts_at_zero_the_same_from_a_seed_and_on_the_meta_device(case: str):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(network(case))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )
    out = models[0](*inputs(case))
    assert not out.any() and not any(
        value.any() for key, value in first.items() if "adaLN_modulation" in key
    )
    with torch.device("meta"):
        meta = network(case).to("meta")
    assert {key: value.shape for key, value in meta.state_dict().items()} == {
        key: value.shape for key, value in first.items()
    }
    assert meta(*(part.to("meta") for part in inputs(case))).shape == out.shape


@every_network
def test_is_a_function_of_each_sample(case: str):
    model = randomise(network(case))
    x, t, y = inputs(case)
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == (3, 2 * CHANNELS, *x.shape[2:]) and out.isfinite().all()
        assert torch.equal(out, model(x, t, y)) and torch.equal(out, model.eval()(x, t, y))
        for i in range(3):
            assert relative_rms(out[i], model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0]) <= 1e-5
        exact = model.double()(x.double(), t, y)
        assert exact.dtype == torch.float64 and relative_rms(out, exact) <= 1e-5


@every_network
def test_gradients_reach_every_parameter(case: str):
    model = randomise(network(case))
    x, t, y = inputs(case)
    x.requires_grad_()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    for name, p in [("x", x), *model.named_parameters()]:
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.grad is None and "pos" in name


@every_network
def test_another_input_size_is_taken_or_refused_in_a_line(case: str):
    model, size = network(case), CASES[case][1]["input_size"]
    _, t, y = inputs(case)
    with pytest.raises(ValueError, match=f"{size + 2}x{size + 2}") as refusal:
        model(torch.zeros(3, CHANNELS, size + 2, size + 2), t, y)
    assert "\n" not in str(refusal.value)
    try:
        assert model(torch.zeros(3, CHANNELS, 2 * size, 2 * size), t, y).shape == (
            3,
            2 * CHANNELS,
            2 * size,
            2 * size,
        )
    except ValueError as error:
        assert "\n" not in str(error) and "input" in str(error)


@pytest.mark.parametrize("name", ["dico_s", "dit_s_2", "hourglass", "isotropic"])
def test_learn_sigma_off_predicts_the_noise_alone(name: str):
    model = backbones.build(
        name, **backbones.tiny_options_of(name), input_size=8, learn_sigma=False
    )
    assert model(
        torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    ).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("row", AUTHORS, ids=lambda row: f"{row['name']} at {row['size']}")
def test_counts_are_those_of_the_authors_code(row: dict[str, str]):
    """Measured on the authors' modules; with attention as explicit products, queries scaled."""
    ours = count(Cost(Backbone(row["name"]), size=int(row["size"]), channels=4, num_classes=1000))
    assert (ours["params_total"], ours["params_trainable"]) == (
        int(row["params_total"]),
        int(row["params_trainable"]),
    )
    assert abs(ours["macs_core"] / 1e9 - float(row["core_g"])) < 0.51e-4
    assert abs(ours["macs_torchprofile"] / 1e9 - float(row["torchprofile_g"])) < 0.51e-4


def test_authors_counts_cover_every_published_size():
    families = ("dic_*", "dico_*", "dit_*", "sit_*", "udit_*", "uvit_*")
    assert {row["name"] for row in AUTHORS} == {
        name for family in families for name in backbones.list_backbones(family)
    }


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


@pytest.mark.parametrize(
    "name, keys, entries", [("dit_s_2", dit_s_2_keys(), 132), ("dico_s", dico_s_keys(), 323)]
)
def test_state_dict_has_the_authors_keys(name: str, keys: dict[str, tuple[int, ...]], entries: int):
    with torch.device("meta"):
        state = backbones.build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == keys and len(
        keys
    ) == entries


def test_names_are_sorted_and_matched_by_pattern():
    assert backbones.list_backbones("dit_s_*") == ["dit_s_2", "dit_s_4", "dit_s_8"]
    assert (
        backbones.list_backbones() == sorted(set(backbones.list_backbones()))
        and backbones.list_backbones("unet*") == []
    )


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dico_z", {}, ["unknown backbone 'dico_z'", "dico_xl", "dit_s_2", "hourglass"]),
        (
            "dico_s",
            {"depth": 3, "width": 8},
            ["depth, width", "depths", "input_size", "learn_sigma"],
        ),
        ("dico_s", {"input_size": 6}, ["divisible by 4", "6"]),
        ("dit_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
        ("dit_s_2", {"heads": 5}, ["dim by heads", "384", "5"]),
        ("hourglass", {"input_size": 10}, ["divisible by 4", "10"]),
        ("isotropic", {"input_size": 7}, ["divisible by patch", "7"]),
        (
            "isotropic",
            {"mixer": "mixer"},
            ["unknown mixer 'mixer'", "agent, conv, focused_linear, softmax, window"],
        ),
        (
            "isotropic",
            {"mixer": "window", "mixer_options": {"windows": 4}},
            ["windows", "heads, window"],
        ),
        ("isotropic", {"mixer_options": {"channel": "eca"}}, ["'eca'", "cca, none, se, mdta"]),
        ("isotropic", {"mixer_options": {"activation": "silu"}}, ["'silu'", "gelu, relu"]),
    ],
)
def test_errors_name_what_is_known(name: str, options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        backbones.build(name, **options)
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


def test_a_name_is_registered_once():
    before = backbones.options_of("dico_s")
    with pytest.raises(ValueError, match="'dico_s' is registered twice"):
        backbones.register(DiCo, {"dico_s": dict(dim=1)}, tiny={})
    assert backbones.options_of("dico_s") == before


def renamed(state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    for pattern, replacement in names:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


DICO_TO_HOURGLASS = [
    (r"^x_embedder\.", "stem."),
    (r"^y_embedder\.embedding_table_(\d)", r"y_embedders.\1.embedding_table"),
    (r"^final_layer\.", "final."),
    (r"^t_embedder_1\.", "t_embedders.0."),
    (r"^t_embedder_2\.", "t_embedders.1."),
    (r"^t_embedder_3\.", "t_embedders.2."),
    (r"^(en|de)coder_level_", r"\1coder_"),
    (r"^latent\.", "middle."),
    (r"^down(\d)_\d", r"down_\1"),
    (r"^up\d_(\d)", r"up_\1"),
    (r"^reduce_chan_level", "reduce_"),
    (r"\.conv1\.", ".mixer.pointwise_in."),
    (r"\.conv2\.", ".mixer.depthwise."),
    (r"\.ca\.1\.", ".mixer.channel.weight."),
    (r"\.conv3\.", ".mixer.pointwise_out."),
    (r"\.conv4\.", ".fc1."),
    (r"\.conv5\.", ".fc2."),
]
DIT_TO_ISOTROPIC = [
    (r"^pos_embed", "position"),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.fc", ".fc"),
    (r"^final_layer\.", "final."),
]


def same_function(
    published: nn.Module, controlled: nn.Module, names: list[tuple[str, str]], size: int
) -> None:
    """Output and input gradient in float64, and float32, after the published weights were renamed and loaded."""
    shapes = {key: value.shape for key, value in controlled.state_dict().items()}
    state = {
        key: value.reshape(shapes[key])
        for key, value in renamed(randomise(published).state_dict(), names).items()
    }
    controlled.load_state_dict(state, strict=True)
    x, t, y = (
        torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(7)),
        torch.tensor([3, 999]),
        torch.tensor([1, 5]),
    )
    for dtype, tolerance in {torch.float64: 1e-12, torch.float32: 1e-5}.items():
        results = []
        for model in (published.to(dtype), controlled.to(dtype)):
            own_x = x.to(dtype, copy=True).requires_grad_()
            out = model(own_x, t, y)
            results.append((out, *torch.autograd.grad(out.sin().sum(), own_x)))
        assert all(relative_rms(a, b) <= tolerance for a, b in zip(*results, strict=True))


def test_hourglass_of_conv_modules_is_dico():
    options = dict(input_size=12, num_classes=5, dim=12, depths=(2, 3, 2, 1, 2))
    same_function(
        backbones.build("dico_s", **options),
        backbones.build("hourglass", **options),
        DICO_TO_HOURGLASS,
        12,
    )


def test_isotropic_of_softmax_attention_is_dit():
    options = dict(input_size=10, num_classes=5, dim=36, depth=3, mlp_ratio=4.0)
    controlled = backbones.build(
        "isotropic", **options, mixer="softmax", mixer_options=dict(heads=3), gelu="tanh"
    )
    same_function(backbones.build("dit_s_2", **options, heads=3), controlled, DIT_TO_ISOTROPIC, 10)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7])
def test_long_skips_join_mirrored_blocks(depth: int):
    """Block i's output and block depth-2-i's are reduced into the input of block depth-1-i, for i < (depth-1)//2."""
    model = randomise(backbones.build("isotropic", input_size=6, dim=12, depth=depth, skips=True))
    assert len(model.reduce) == (depth - 1) // 2
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for module in [*model.blocks, *model.reduce]:
        module.register_forward_hook(
            lambda module, args, out: seen.update({module: (args[0], out)})
        )
    model(torch.randn(2, 4, 6, 6), torch.tensor([3, 999]), torch.tensor([1, 5]))
    for i in range(depth - 1):
        after, reduced = model.blocks[depth - 1 - i], None
        if i < (depth - 1) // 2:
            reduced = model.reduce[len(model.reduce) - 1 - i]
            assert torch.equal(
                seen[reduced][0],
                torch.cat([seen[model.blocks[depth - 2 - i]][1], seen[model.blocks[i]][1]], dim=1),
            )
        assert torch.equal(seen[after][0], seen[reduced or model.blocks[depth - 2 - i]][1])
