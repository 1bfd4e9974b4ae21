"""Locality against closed forms, hand-made weights and brute-force Jacobians."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from analysis.probes import implied
from analysis.probes.gradients import Gradients
from analysis.probes.layers import layers, watching
from analysis.probes.locality import (
    LocalityProbe,
    Settings,
    anchor_token,
    some_queries,
    streamed,
    summary,
)
from analysis.probes.measures import distances, locality, radii, uniform
from backbones.kernels import gated_linear, selective_scan
from backbones.mixers import MIXERS, build_mixer

ODD = (3, 5)
TOKENS = ODD[0] * ODD[1]
ALL = torch.arange(TOKENS)
SETTINGS = Settings(
    queries=9, anchors=((0.5, 0.5), (0.0, 0.0)), gradient_queries=4, gradient_images=1, directions=2
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_uniform_weights_on_a_line_have_closed_forms():
    """On 1 x n the mean distance over all pairs is (n^2 - 1) / 3n, and n - r places hold a pair at distance r."""
    n = 7
    values, mass = uniform((1, n), torch.arange(n))
    assert values[0].item() == pytest.approx((n * n - 1) / (3 * n))
    assert values[2].item() == pytest.approx(math.log(n))
    assert mass.tolist() == pytest.approx(
        [(n + 2 * sum(n - i for i in range(1, r + 1))) / n**2 for r in range(n)]
    )


def test_hand_made_weights():
    """Self; the right neighbour; half on self and half two to the right: distance, field and entropy by hand."""
    distance = distances((1, 4), torch.tensor([0, 1, 1]))
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 0.5, 0, 0.5]])
    values, mass = locality(weights, distance, torch.tensor([0.0, 1.0, 2.0]))
    assert values.tolist() == [[0, 0, 0], [1, 1, 0], [1, 2, pytest.approx(math.log(2))]]
    assert mass.tolist() == [[1, 1, 1], [0, 1, 1], [0.5, 0.5, 1]]


def test_radii_reach_every_token():
    values, mass = uniform(ODD, ALL)
    assert (
        mass[-1] == pytest.approx(1)
        and len(mass) == len(radii(ODD)) == 6
        and values[1] < radii(ODD)[-1]
    )


def test_streaming_equals_one_shot():
    q, k = seeded(2, 3, TOKENS, 4).float(), seeded(2, 3, TOKENS, 4, seed=1).float()
    weights = implied.Softmax(q, k, ALL)
    full = ((q @ k.mT) / 2).softmax(-1)
    values, mass = locality(full, distances(ODD, ALL), radii(ODD))
    weights.floats = 10**6 // 8 // 3  # one row and a bit in a MiB of chunk: 2 images
    in_parts = streamed(weights, ODD, ALL, memory=1)
    for found, truth in zip(in_parts, (values, mass), strict=True):
        torch.testing.assert_close(found, truth.mean((0, 2)), rtol=1e-6, atol=1e-8)


def test_too_little_memory_for_one_row():
    weights = implied.Softmax(torch.ones(1, 1, TOKENS, 2), torch.ones(1, 1, TOKENS, 2), ALL)
    weights.floats = 2**20
    with pytest.raises(ValueError, match="takes 9 MiB and 2 are allowed; probe fewer images"):
        streamed(weights, ODD, ALL, memory=2)


def test_a_gradients_memory_is_what_one_image_more_keeps():
    """sin keeps its input and a product with weights its input too, in half of 8 bytes each; the weights do not count."""
    weights = torch.randn(6, 6, requires_grad=True)
    f = lambda x: torch.sin(x.flatten(2).mT @ weights).mT.unflatten(2, ODD)  # noqa: E731
    x = torch.randn(3, 6, *ODD)
    gradients = Gradients("", f, x, None, 1, torch.Generator())
    assert gradients.floats == x[0].numel() and not gradients.x.requires_grad


def test_weights_that_are_not_finite_or_zero():
    with pytest.raises(ValueError, match="not finite or all zero"):
        implied.Softmax(
            torch.full((1, 1, TOKENS, 2), torch.nan), torch.ones(1, 1, TOKENS, 2), ALL
        ).rows(0, ALL)
    with pytest.raises(ValueError, match="all zero"):
        implied.normalised(torch.zeros(2, 3))


def scattered_place() -> Tensor:
    """The grid's tokens inside a longer sequence, out of order."""
    return 2 + torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))


def test_gated_linear_attention_against_its_jacobian():
    place, s = scattered_place(), TOKENS + 3
    q, k, v = (seeded(1, 2, s, e, seed=seed) for seed, e in enumerate((4, 4, 3)))
    g = F.logsigmoid(seeded(1, 2, s, 4, seed=3))
    jacobian = torch.autograd.functional.jacobian(lambda v: gated_linear(q, k, v, g), v)[
        0, 1, :, 0, 0, 1, :, 0
    ]  # (S, S)
    truth = implied.normalised(jacobian.abs()[place][:, place])
    torch.testing.assert_close(
        implied.GatedLinear(q, k, g, place).rows(1, ALL)[0], truth, rtol=1e-6, atol=1e-7
    )


def test_the_scan_against_its_jacobian():
    place, s = scattered_place(), TOKENS + 3
    u, delta, z = (seeded(1, 4, s, seed=seed) for seed in range(3))
    a, b, c, d, bias = (
        -seeded(4, 5, seed=3).exp(),
        seeded(1, 5, s, seed=4),
        seeded(1, 5, s, seed=5),
        seeded(4, seed=6),
        seeded(4, seed=7),
    )
    jacobian = torch.autograd.functional.jacobian(
        lambda u: selective_scan(u, delta, a, b, c, d, z, bias), u
    )[0, :, :, 0]  # (D, S, D, S)
    truth = sum(jacobian[channel, :, channel].abs() for channel in range(4))[place][:, place]
    torch.testing.assert_close(
        implied.Scan(delta, a, b, c, d, z, bias, place).rows(0, ALL)[0],
        implied.normalised(truth),
        rtol=1e-6,
        atol=1e-9,
    )


def frozen(name: str, size: tuple[int, int], index: int = 0, **options: object) -> nn.Module:
    """A mixer with one head whose queries and keys do not depend on its input: it is linear, and its Jacobian is A times one matrix."""
    torch.manual_seed(0)
    mixer = build_mixer(name, 6, size, index, heads=1, **options).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    nn.init.zeros_(mixer.qkv.weight[:12])
    if hasattr(mixer, "dwc"):  # the values' convolution, which implied attention leaves out
        nn.init.zeros_(mixer.dwc.weight)
    return mixer


@pytest.mark.parametrize(
    ("name", "size", "index", "options"),
    [
        ("softmax", ODD, 0, {}),
        ("window", (4, 6), 0, dict(window=2)),
        ("window", (4, 6), 1, dict(window=2)),
        ("window", (8, 4), 1, dict(window=4)),
        ("agent", ODD, 0, dict(agents=4)),
        ("agent", (2, 2), 0, dict(agents=9)),
        ("focused_linear", ODD, 0, {}),
    ],
)
def test_implied_attention_and_gradients_are_the_jacobian_of_a_linear_mixer(
    name: str, size: tuple[int, int], index: int, options: dict
):
    mixer, seen, x = frozen(name, size, index, **options), [], seeded(2, 6, *size)
    with torch.no_grad(), watching(layers(nn.Sequential(mixer)), seen.append):
        mixer(x)
    jacobian = torch.autograd.functional.jacobian(mixer, x[:1])[0]  # (C, H, W, 1, C, H, W)
    tokens = size[0] * size[1]
    truth = implied.normalised(jacobian.view(6, tokens, 6, tokens).square().sum((0, 2)).sqrt())
    every = torch.arange(tokens)
    for image in seen[0].weights.rows(0, every).double():
        torch.testing.assert_close(image, truth, rtol=1e-5, atol=1e-8)
    generator = torch.Generator().manual_seed(0)
    gradients = Gradients("input gradient", mixer, x, None, 1, generator).rows(
        0, every
    )  # one direction is exact: J_ij is A_ij times one matrix
    torch.testing.assert_close(gradients, truth.expand_as(gradients), rtol=1e-5, atol=1e-8)


def test_a_convolution_reaches_as_far_as_its_kernel():
    mixer, seen = build_mixer("conv", 4, ODD, 0, channel="none", kernel=5), []
    nn.init.ones_(mixer.depthwise.weight)
    with torch.no_grad(), watching(layers(nn.Sequential(mixer)), seen.append):
        mixer(seeded(1, 4, *ODD).float())
    corner = seen[0].weights.rows(0, torch.tensor([0]))[0, 0].view(ODD)
    assert (
        seen[0].weights.kind == "receptive field"
        and corner[:, :3].flatten().tolist() == pytest.approx([1 / 9] * 9)
        and not corner[:, 3:].any()
    )
    gradients = Gradients(
        "", mixer, seeded(1, 4, *ODD).float(), None, 2, torch.Generator().manual_seed(0)
    ).rows(0, torch.tensor([0]))
    assert not gradients[0, 0].view(ODD)[:, 3:].any() and gradients[0, 0].view(ODD)[:, :3].all()


def test_directions_average_to_the_frobenius_norm():
    weight, x = seeded(5, 4), seeded(1, 4, 1, 3)
    spread = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (
            torch.einsum("ec,nchw,w->neh", weight, x, spread[0])[..., None].expand(-1, -1, -1, 3)
            + x.sum(1, keepdim=True) * 0.1
        )

    jacobian = torch.autograd.functional.jacobian(f, x)[0, :, 0, 1, 0, :, 0]  # (E, C, W)
    truth = implied.normalised(jacobian.square().sum((0, 1)).sqrt())
    torch.testing.assert_close(
        Gradients("", f, x, None, 4000, torch.Generator().manual_seed(0)).rows(
            0, torch.tensor([1])
        )[0, 0],
        truth,
        rtol=0.03,
        atol=0,
    )


@pytest.mark.parametrize("name", ["dit_s_2", "dig_s_2", "sit_s_2", "uvit_l_2", "dis_s_2", "dim_l"])
def test_tokens_of_the_grid_are_found_in_every_layers_sequence(name: str):
    """Where mixers, MLPs and skips add nothing, all layers see the same tokens, once `place` has brought them into the grid's order."""
    torch.manual_seed(0)
    model = backbones.build(
        name, **backbones.tiny_options_of(name), input_size=6, in_channels=3, num_classes=5
    ).eval()
    watched = layers(model)
    for layer in watched:
        nn.init.zeros_(
            [
                p
                for n, p in layer.module.named_parameters()
                if n.endswith(("proj.weight", "out_proj.weight"))
            ][-1]
        )
    for part, parameter in model.named_parameters():
        if part.endswith(("mlp.fc2.weight", "scale_shift_table", "skip_linear.1.weight")):
            nn.init.zeros_(parameter)
        elif part.endswith(("skip_linear.weight", "skip_linear.0.weight")):
            nn.init.eye_(parameter)
    inputs = []
    with (
        torch.no_grad(),
        watching(watched, lambda call: inputs.append((call.grid, call.inputs[0][:, call.place]))),
    ):
        model(seeded(1, 3, 6, 6).float(), torch.tensor([500]), torch.tensor([1]))
    assert len(inputs) == len(watched) > 1
    for grid, tokens in inputs:
        assert grid == (3, 3) and tokens.shape[1] == 9
        torch.testing.assert_close(tokens, inputs[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "dico_s",
        "hourglass",
        "adm_256",
        "ldm_8",
        "dis_s_2",
        "dim_l",
        "dig_s_2",
        "udit_s",
        "dic_s",
        "dimsum_l_2",
    ],
)
def test_every_family_runs_and_is_unchanged(name: str):
    """The wrapped network gives the network's own output, and weights sum to 1."""
    names = backbones.list_backbones(f"{name.split('_')[0]}*")
    name = name if name in names else names[0]
    torch.manual_seed(0)
    model = backbones.build(name, **dict(num_classes=5) | backbones.tiny_options_of(name)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    size = model.input_size
    x, t, y = (
        seeded(2, model.in_channels, size, size).float(),
        torch.tensor([300, 300]),
        torch.tensor([0, 1]),
    )
    small = Settings(
        queries=2, anchors=((0.5, 0.5),), gradient_queries=1, gradient_images=1, directions=1
    )
    probe = LocalityProbe(model, layers(model), small)
    with torch.no_grad():
        torch.testing.assert_close(probe(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)
    arrays = probe.arrays()
    found = summary(arrays)
    assert {"network gradient"} <= set(found)
    assert all(
        abs(float(arrays[key][..., -1].min()) - 1) < 1e-4
        for key in arrays
        if key.startswith("mass_")
    )


def test_a_head_weighs_as_much_in_the_uniform_value_as_in_the_mass():
    """Uniform weights on two grids with different numbers of heads are 1 of their own value in every measure."""
    arrays: dict[str, np.ndarray] = {}
    for part, (heads, side, mass) in enumerate(((2, 4, 0.5), (8, 2, 1.0))):
        arrays |= {
            f"kind_{part}": np.array("attention"),
            f"grid_{part}": np.array([side, side]),
            f"uniform_{part}": np.full(3, 2.0),
            f"values_{part}": np.full((5, heads, 3), 2.0),
        }
        arrays |= {
            f"uniform_mass_{part}": np.array([0.1, mass]),
            f"mass_{part}": np.full((5, heads, 2), mass),
        }
    found = summary(arrays)["attention"]
    assert found == {
        "distance": 1.0,
        "field": 1.0,
        "entropy": 1.0,
        "near": 0.9,
        "near_uniform": 0.9,
        "parts": 10,
    }


def test_a_network_without_weights_over_tokens_says_so():
    model = nn.Conv2d(3, 6, 3, padding=1)
    with pytest.raises(
        ValueError,
        match="Conv2d has no layer whose weights over tokens are known; ask for its gradients",
    ):
        LocalityProbe(model, layers(model), Settings(9, (), 0, 1, 1))


def test_queries_and_anchors():
    assert some_queries(ODD, 99).tolist() == list(range(TOKENS))
    drawn = some_queries((9, 9), 20)
    assert len(set(drawn.tolist())) == 20 and drawn.tolist() == some_queries((9, 9), 20).tolist()
    assert (
        anchor_token(ODD, (0.5, 0.5)) == 1 * 5 + 2 and anchor_token(ODD, (1.0, 1.0)) == TOKENS - 1
    )


def test_every_mixer_is_known_to_the_probe():
    torch.manual_seed(0)
    needs_heads = {"conv": {}}
    for name in MIXERS:
        mixer = build_mixer(name, 8, (8, 8), 0, **needs_heads.get(name, dict(heads=2)))
        assert len(layers(nn.Sequential(mixer))) == 1, name
