"""What is particular to TerDiT: the authors' outputs, ternary weights, and their packed form."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.ternary import (
    LEAST_ALPHA,
    PackedLinear,
    TernaryLinear,
    pack,
    pack_weights,
    ternarise,
    unpack,
)
from experiments.engine.timing.cost import count_network
from tests.support.authors import CASES, build_like_authors, inputs_of, largest_error
from tests.support.networks import randomise, relative_rms

AUTHORS = CASES["terdit"]
SMALL = dict(input_size=6, in_channels=3, num_classes=7, dim=24, depth=2, heads=3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def network(**options: Any) -> nn.Module:
    return backbones.build("terdit_600m", **SMALL | options)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.tensor([0, 37, 999]), torch.tensor([0, 3, 7])


def test_outputs_gradients_names_and_bytes_are_those_of_the_authors_code():
    model = build_like_authors(AUTHORS)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == AUTHORS["keys"]
    out = model(*inputs_of(AUTHORS))
    assert largest_error(out, AUTHORS, AUTHORS["output"]) <= AUTHORS["tolerance"]

    # Gradients pass the rounding; those of one weight are tiny beside those of the others.
    out.square().mean().backward()
    largest = max(AUTHORS["largest"].values())
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key, expected in AUTHORS["gradients"].items():
        assert largest_error(gradients[key], AUTHORS, expected) <= 1e-5 * largest, key

    packed = pack_weights(model.state_dict())
    for key, expected in AUTHORS["packed"].items():
        assert packed[key].flatten().tolist() == expected, key


@pytest.mark.parametrize(
    "name, size, ternary_weights", [("600m", 32, 603_979_776), ("4_2b", 32, 4_227_858_432)]
)
def test_ternary_weights_and_what_multiplying_by_alpha_costs(
    name: str, size: int, ternary_weights: int
):
    """Multiply-accumulates of products do not change; the profiler's count grows by the weights."""
    with torch.device("meta"):
        model = backbones.build(f"terdit_{name}")
        control = backbones.build(f"terdit_{name}", ternary=False)
    layers = [layer for layer in model.modules() if isinstance(layer, TernaryLinear)]
    assert sum(layer.weight.numel() for layer in layers) == ternary_weights

    counts, plain = (count_network(network, size, 4) for network in (model, control))
    assert counts["macs_core"] == plain["macs_core"]
    assert counts["macs_torchprofile"] - plain["macs_torchprofile"] == ternary_weights
    assert counts["params_total"] - plain["params_total"] == len(layers)


@pytest.mark.parametrize("name, entries, gib", [("600m", 331, 0.1626), ("4_2b", 651, 1.0222)])
def test_the_packed_form_has_the_authors_entries_and_size(name: str, entries: int, gib: float):
    with torch.device("meta"):
        model = backbones.build(f"terdit_{name}", packed=True)
        with_norms = backbones.build(f"terdit_{name}", packed=True, qk_norm=True)
    state = model.state_dict()
    assert len(state) == entries
    assert len(with_norms.state_dict()) - entries == 4 * len(model.layers)
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert abs(size / 2**30 - gib) < 0.51e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_weights_give_the_same_outputs(dtype: torch.dtype, qk_norm: bool):
    """Bit for bit, whenever the network turns to half precision.

    The authors' packed form runs in float32 only.
    """
    model = randomise(network(qk_norm=qk_norm))
    packed = network(qk_norm=qk_norm, packed=True)
    packed.load_state_dict(pack_weights(model.state_dict()), strict=True)

    # Packing before and after the network changes its precision is the same.
    bytes_before = pack_weights(model.state_dict())
    model.to(dtype)
    packed.to(dtype)
    bytes_after = pack_weights(model.state_dict())
    layers = [key for key, value in bytes_before.items() if value.dtype == torch.uint8]
    assert layers
    assert all(torch.equal(bytes_before[key], bytes_after[key]) for key in layers)

    # So are the outputs.
    with torch.no_grad():
        out = model(*inputs(dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert out.any()
        assert torch.equal(packed(*inputs(dtype)), out)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_packed_file_runs_in_half_precision_and_under_autocast(dtype: torch.dtype):
    model = randomise(network())
    packed = network(packed=True)
    packed.load_state_dict(pack_weights(model.state_dict()))
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", dtype):
            assert relative_rms(packed(*inputs()), exact) < 0.1
        assert relative_rms(packed.to(dtype)(*inputs(dtype)), exact) < 0.1


def test_four_quarters_of_the_rows_share_a_byte_from_the_highest_bits_down():
    """Codes 0, 1 and 2 stand for -1, 0 and 1."""
    weight = torch.tensor([[-1.0], [0.0], [1.0], [1.0], [0.0], [0.0], [-1.0], [1.0]])
    packed = pack(weight)
    assert packed.tolist() == [
        [0 << 6 | 2 << 4 | 1 << 2 | 0],
        [1 << 6 | 2 << 4 | 1 << 2 | 2],
    ]
    assert torch.equal(unpack(packed).float() - 1, weight)


def test_weights_are_rounded_in_units_of_the_whole_tensors_mean_size():
    """The mean size is 1 here; half of it rounds to 0, and rows do not differ in their unit."""
    weight = torch.tensor([[0.5, -0.4], [1.0, -2.1]])
    assert math.isclose(weight.abs().mean().item(), 1.0, rel_tol=1e-6)
    assert ternarise(weight).tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_gradients_pass_the_rounding():
    layer = TernaryLinear(5, 4)
    layer.alphas.data.fill_(-0.7)
    x = torch.randn(6, 5)
    layer(x).square().sum().backward()

    effective = (-0.7 * ternarise(layer.weight.detach())).requires_grad_()
    (x @ effective.T).square().sum().backward()
    assert torch.allclose(layer.weight.grad, -0.7 * effective.grad)
    expected = (effective.grad * ternarise(layer.weight.detach())).sum()
    assert torch.allclose(layer.alphas.grad, expected)


def test_it_trains_in_half_precision_with_weights_that_keep_theirs():
    model = randomise(network()).to(torch.bfloat16)
    model(*inputs(torch.bfloat16)).float().square().mean().backward()
    layer = model.layers[0].attention.wq
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    assert layer.alphas.dtype == layer.alphas.grad.dtype == torch.bfloat16
    assert layer.weight.grad.any() and layer.alphas.grad.any()
    assert model.double().layers[0].attention.wq.weight.dtype == torch.float64


def test_alpha_starts_as_released_or_at_the_mean_size_of_the_weights():
    torch.manual_seed(0)
    drawn = torch.cat([p for key, p in network().named_parameters() if key.endswith("alphas")])
    assert drawn.min() < 0 < drawn.max()
    assert 0.4 < drawn.std() < 1.8

    model = network(alpha="absmean")
    for name, layer in model.named_modules():
        if isinstance(layer, TernaryLinear):
            size = layer.weight.abs().mean()
            starts_at_zero = "adaLN" in name
            assert bool(size == 0) == starts_at_zero
            expected = LEAST_ALPHA if starts_at_zero else size.item()
            assert layer.alphas.item() == pytest.approx(expected)


def test_the_norm_of_adaln_takes_away_the_size_of_alpha_and_keeps_its_sign():
    model = randomise(network())
    modulation = model.layers[0].adaLN_modulation
    modulation[1].bias.data.zero_()
    c = torch.randn(2, 24)
    out = modulation(c)
    modulation[1].alphas.data *= -3
    assert torch.allclose(modulation(c), -out, rtol=1e-3, atol=1e-3)


def save(weights: dict[str, Tensor], folder: Path) -> Path:
    torch.save(weights, folder / "terdit.pt")
    return folder / "terdit.pt"


def test_both_kinds_of_files_load_into_a_packed_network(tmp_path: Path):
    model = randomise(network())
    weights = model.state_dict()
    with torch.no_grad():
        truth = model(*inputs())
        for stored in (weights, pack_weights(weights)):
            packed = network(packed=True)
            backbones.load_published(packed, save(stored, tmp_path))
            assert torch.equal(packed(*inputs()), truth)


def test_files_of_another_form_are_refused_in_one_line(tmp_path: Path):
    packed = pack_weights(randomise(network()).state_dict())
    with pytest.raises(ValueError, match="build the network with packed=True") as refusal:
        backbones.load_published(network(), save(packed, tmp_path))
    assert "\n" not in str(refusal.value)

    # An unused code tells that another version packed the weights.
    packed["layers.0.attention.wq.weight"] = torch.full((6, 24), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="packed by another version") as refusal:
        backbones.load_published(network(packed=True), save(packed, tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_packed_layer_needs_four_equal_parts():
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        PackedLinear(4, 6)
