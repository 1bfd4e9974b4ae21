"""What is particular to LightningDiT: the authors' outputs and names, positions, and variants."""

import cmath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.lightningdit import RotaryPosition
from experiments.engine.timing.cost import count_network
from tests.support.authors import CASES, build_like_authors, inputs_of, largest_error
from tests.support.networks import randomise, relative_rms

AUTHORS = {name: case for name, case in CASES.items() if name.startswith("lightningdit")}
SMALL = dict(input_size=6, in_channels=3, num_classes=7, patch=2, dim=24, depth=2, heads=3)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 3, 7])


@pytest.mark.parametrize("case", AUTHORS)
def test_outputs_and_names_are_those_of_the_authors_code(case: str):
    row = AUTHORS[case]
    model = build_like_authors(row)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == row["keys"]
    with torch.no_grad():
        out = model(*inputs_of(row))
    assert largest_error(out, row, row["output"]) <= row["tolerance"]


@pytest.mark.parametrize(
    "name, options, params, core_g, entries",
    [
        ("lightningdit_xl_2", {"in_channels": 4, "input_size": 32}, 675_219_856, 118.6167, 351),
        ("lightningdit_xl_1", {"in_channels": 16}, 675_219_856, 118.6167, 351),
        ("lightningdit_xl_1", {"in_channels": 64}, 675_330_496, 118.6450, 351),
        ("lightningdit_b_1", {"in_channels": 16}, 130_531_600, 23.0020, 159),
        ("lightningdit_b_1", {"in_channels": 64}, 130_605_376, 23.0208, 159),
        ("lightningdit_xl_1", {"no_shift": True}, 600_874_400, None, 351),
        ("lightningdit_xl_1", {"qk_norm": True}, 675_256_736 + 4_032, 118.6261, 407),
    ],
)
def test_counts_of_other_latents_and_variants_are_the_authors(
    name: str, options: dict[str, Any], params: int, core_g: float | None, entries: int
):
    """Modulations are the same for all tokens, so a network without shifts costs about as much."""
    with torch.device("meta"):
        model = backbones.build(name, **options)
    counts = count_network(model, model.input_size, model.in_channels)
    assert counts["params_total"] == params
    assert len(model.state_dict()) == entries
    if core_g is not None:
        assert abs(counts["macs_core"] / 1e9 - core_g) < 0.51e-4


def test_rows_turn_the_first_half_of_the_channels_and_columns_the_second():
    """Against complex numbers, pair by pair; an order or a layout of another kind differs."""
    height, width, head_dim = 2, 3, 12
    rope = RotaryPosition(head_dim, (height, width)).double()
    x = torch.randn(1, 1, height * width, head_dim, dtype=torch.float64)
    turned = rope(x)[0, 0]
    for place in range(height * width):
        for pair in range(head_dim // 2):
            position = (place // width, place % width)[pair // 3]
            angle = position * 10000 ** (-2 * (pair % 3) / (head_dim / 2))
            a, b = x[0, 0, place, 2 * pair : 2 * pair + 2].tolist()
            expected = complex(a, b) * cmath.exp(1j * angle)
            actual = complex(*turned[place, 2 * pair : 2 * pair + 2].tolist())
            assert abs(actual - expected) < 1e-6


def test_without_its_changes_it_is_sit():
    plain = dict(swiglu=False, rope=False, rms=False, learn_sigma=True)
    model = randomise(backbones.build("lightningdit_b_2", **SMALL | plain))
    sit = backbones.build("sit_s_2", **SMALL)
    sit.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert relative_rms(model(*inputs()), sit(*inputs())) < 1e-6


def test_the_plain_norms_of_queries_and_keys_are_affine_with_pytorchs_epsilon():
    model = backbones.build("lightningdit_b_2", **SMALL, rms=False, qk_norm=True)
    norm = model.blocks[0].attn.q_norm
    assert isinstance(norm, nn.LayerNorm)
    assert (norm.normalized_shape, norm.eps, norm.elementwise_affine) == ((8,), 1e-5, True)


@pytest.mark.parametrize(
    "name, hidden", [("b_1", 2048), ("l_2", 2730), ("1p0b_1", 4096), ("1p6b_1", 4778)]
)
def test_the_gated_mlp_has_two_thirds_of_the_width(name: str, hidden: int):
    with torch.device("meta"):
        model = backbones.build(f"lightningdit_{name}", depth=1)
    assert model.blocks[0].mlp.w3.in_features == hidden


def test_the_authors_guide_three_of_the_32_channels():
    with torch.device("meta"):
        model = backbones.build("lightningdit_xl_1", depth=1)
    assert model.in_channels == model.out_channels == 32
    assert backbones.guided_channels_of(model) == 3


def test_runs_under_autocast():
    model = randomise(backbones.build("lightningdit_b_2", **SMALL))
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs())
    assert relative_rms(out, exact) < 0.1
