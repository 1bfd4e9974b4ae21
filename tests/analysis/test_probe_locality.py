"""Locality against closed forms, hand-made weights and brute-force Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from analysis.probes import implied
from analysis.probes.gradients import Estimator, Gradients
from analysis.probes.layers import layers
from analysis.probes.locality import (
    LocalityProbe,
    Settings,
    anchor_token,
    some_queries,
    streamed,
    summary,
)
from analysis.probes.measures import distances, locality, radii, uniform
from analysis.probes.watch import Call, watching
from backbones.kernels import gated_linear, selective_scan
from backbones.mixers import MIXERS, build_mixer

ODD = (3, 5)
TOKENS = ODD[0] * ODD[1]
ALL = torch.arange(TOKENS)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimator(directions: int) -> Estimator:
    return Estimator(directions, torch.Generator().manual_seed(0))


def test_uniform_weights_on_a_line_have_closed_forms():
    """On 1 x n the mean distance is (n^2 - 1) / 3n, and n - r places hold a pair at distance r."""
    n = 7
    values, mass = uniform((1, n), torch.arange(n))
    assert values[0].item() == pytest.approx((n * n - 1) / (3 * n))
    assert values[2].item() == pytest.approx(math.log(n))
    pairs = [n + 2 * sum(n - i for i in range(1, r + 1)) for r in range(n)]
    assert mass.tolist() == pytest.approx([count / n**2 for count in pairs])


def test_hand_made_weights_have_the_measures_computed_by_hand():
    """On itself; on the right neighbour; half on itself and half two tokens to the right."""
    distance = distances((1, 4), torch.tensor([0, 1, 1]))
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 0.5, 0, 0.5]])
    values, mass = locality(weights, distance, torch.tensor([0.0, 1.0, 2.0]))
    assert values.tolist() == [[0, 0, 0], [1, 1, 0], [1, 2, pytest.approx(math.log(2))]]
    assert mass.tolist() == [[1, 1, 1], [0, 1, 1], [0.5, 0.5, 1]]


def test_radii_reach_every_token():
    values, mass = uniform(ODD, ALL)
    assert mass[-1] == pytest.approx(1)
    assert len(mass) == len(radii(ODD)) == 6
    assert values[1] < radii(ODD)[-1]


def test_streaming_equals_one_shot():
    q = seeded(2, 3, TOKENS, 4).float()
    k = seeded(2, 3, TOKENS, 4, seed=1).float()
    weights = implied.Softmax(q, k, ALL)
    weights.floats = 10**6 // 8 // 3  # one row and a bit of two images in a chunk of one MiB
    streamed_means = streamed(weights, ODD, ALL, memory=1)

    full = ((q @ k.mT) / 2).softmax(-1)
    whole = locality(full, distances(ODD, ALL), radii(ODD))
    for streamed_mean, truth in zip(streamed_means, whole, strict=True):
        torch.testing.assert_close(streamed_mean, truth.mean((0, 2)), rtol=1e-6, atol=1e-8)


def test_too_little_memory_for_one_row_is_refused():
    weights = implied.Softmax(torch.ones(1, 1, TOKENS, 2), torch.ones(1, 1, TOKENS, 2), ALL)
    weights.floats = 2**20
    message = "takes 9 MiB, and 2 MiB are allowed; probe fewer images"
    with pytest.raises(ValueError, match=message):
        streamed(weights, ODD, ALL, memory=2)


def test_the_memory_of_a_gradient_is_what_one_image_more_keeps():
    """sin and a product each keep their input, half of 8 bytes per value; weights do not count."""
    weights = torch.randn(6, 6, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return torch.sin(x.flatten(2).mT @ weights).mT.unflatten(2, ODD)

    x = torch.randn(3, 6, *ODD)
    gradients = Gradients("", f, x, None, estimator(1))
    assert gradients.floats == x[0].numel()
    assert not gradients.x.requires_grad


def test_weights_that_are_not_finite_or_zero_are_refused():
    nan = torch.full((1, 1, TOKENS, 2), torch.nan)
    with pytest.raises(ValueError, match="not finite or all zero"):
        implied.Softmax(nan, torch.ones(1, 1, TOKENS, 2), ALL).rows(0, ALL)
    with pytest.raises(ValueError, match="all zero"):
        implied.normalised(torch.zeros(2, 3))


def scattered_place() -> Tensor:
    """Return places of the grid's tokens in a longer sequence, out of order."""
    return 2 + torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))


def test_gated_linear_attention_equals_its_jacobian():
    """Implied weights are the Jacobian by the values, normalised over the grid's tokens."""
    place = scattered_place()
    length = TOKENS + 3
    q, k, v = (seeded(1, 2, length, e, seed=seed) for seed, e in enumerate((4, 4, 3)))
    g = F.logsigmoid(seeded(1, 2, length, 4, seed=3))
    full = torch.autograd.functional.jacobian(lambda v: gated_linear(q, k, v, g), v)
    jacobian = full[0, 1, :, 0, 0, 1, :, 0]  # (S, S)

    # The second head, whose value channels all have the same weights.
    rows = implied.GatedLinear(q, k, g, place).rows(1, ALL)[0]
    truth = implied.normalised(jacobian.abs()[place][:, place])
    torch.testing.assert_close(rows, truth, rtol=1e-6, atol=1e-7)


def test_the_scan_equals_its_jacobian():
    """Implied weights are the Jacobian's sizes, summed over channels and normalised."""
    place = scattered_place()
    length = TOKENS + 3
    u, delta, z = (seeded(1, 4, length, seed=seed) for seed in range(3))
    inputs = implied.ScanInputs(
        delta,
        -seeded(4, 5, seed=3).exp(),
        seeded(1, 5, length, seed=4),
        seeded(1, 5, length, seed=5),
        seeded(4, seed=6),
        z,
        seeded(4, seed=7),
    )

    # Channels do not mix.
    full = torch.autograd.functional.jacobian(lambda u: selective_scan(u, *inputs), u)
    jacobian = full[0, :, :, 0]  # (D, S, D, S)
    sizes = sum(jacobian[channel, :, channel].abs() for channel in range(4))

    # The grid's tokens alone are weighed.
    rows = implied.Scan(inputs, place).rows(0, ALL)[0]
    truth = implied.normalised(sizes[place][:, place])
    torch.testing.assert_close(rows, truth, rtol=1e-6, atol=1e-9)


def frozen(name: str, size: tuple[int, int], index: int = 0, **options: object) -> nn.Module:
    """Return a mixer with one head whose queries and keys do not depend on its input.

    It is linear, and its Jacobian is A times one matrix.
    """
    torch.manual_seed(0)
    mixer = build_mixer(name, 6, size, index, heads=1, **options).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    nn.init.zeros_(mixer.qkv.weight[:12])

    # Implied attention leaves out the convolution of the values.
    if hasattr(mixer, "dwc"):
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
    """Of a linear mixer, weights and gradients are the norms of the Jacobian's blocks."""
    mixer = frozen(name, size, index, **options)
    calls = []
    x = seeded(2, 6, *size)
    with torch.no_grad(), watching(layers(nn.Sequential(mixer)), calls.append):
        mixer(x)

    # A block holds the derivatives of one token's channels by another one's.
    jacobian = torch.autograd.functional.jacobian(mixer, x[:1])[0]  # (C, H, W, 1, C, H, W)
    tokens = size[0] * size[1]
    norms = jacobian.view(6, tokens, 6, tokens).square().sum((0, 2)).sqrt()
    truth = implied.normalised(norms)
    every = torch.arange(tokens)
    for image in calls[0].weights.rows(0, every).double():
        torch.testing.assert_close(image, truth, rtol=1e-5, atol=1e-8)

    # One direction is exact, because J_ij is A_ij times one matrix.
    gradients = Gradients("input gradient", mixer, x, None, estimator(1)).rows(0, every)
    torch.testing.assert_close(gradients, truth.expand_as(gradients), rtol=1e-5, atol=1e-8)


def test_a_convolution_reaches_as_far_as_its_kernel():
    """The corner of the grid sees a quarter of a kernel of 5x5, by weights and by gradients."""
    mixer = build_mixer("conv", 4, ODD, 0, channel="none", kernel=5)
    nn.init.ones_(mixer.depthwise.weight)
    x = seeded(1, 4, *ODD).float()
    corner = torch.tensor([0])
    calls = []
    with torch.no_grad(), watching(layers(nn.Sequential(mixer)), calls.append):
        mixer(x)

    # Equal weights over 3x3 tokens.
    assert calls[0].weights.kind == "receptive field"
    weights = calls[0].weights.rows(0, corner)[0, 0].view(ODD)
    assert weights[:, :3].flatten().tolist() == pytest.approx([1 / 9] * 9)
    assert not weights[:, 3:].any()

    # Gradients to the same tokens.
    gradients = Gradients("", mixer, x, None, estimator(2)).rows(0, corner)[0, 0].view(ODD)
    assert gradients[:, :3].all()
    assert not gradients[:, 3:].any()


def test_directions_average_to_the_frobenius_norm():
    weight = seeded(5, 4)
    x = seeded(1, 4, 1, 3)
    spread = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        mixed = torch.einsum("ec,nchw,w->neh", weight, x, spread)[..., None]
        return mixed.expand(-1, -1, -1, 3) + x.sum(1, keepdim=True) * 0.1

    jacobian = torch.autograd.functional.jacobian(f, x)[0, :, 0, 1, 0, :, 0]  # (E, C, W)
    truth = implied.normalised(jacobian.square().sum((0, 1)).sqrt())
    rows = Gradients("", f, x, None, estimator(4000)).rows(0, torch.tensor([1]))
    torch.testing.assert_close(rows[0, 0], truth, rtol=0.03, atol=0)


def silence(model: nn.Module) -> None:
    """Let mixers, MLPs and skips add nothing, so that all layers see the same tokens."""
    # A mixer ends with its last projection.
    for layer in layers(model):
        parameters = dict(layer.module.named_parameters())
        ends = [name for name in parameters if name.endswith(("proj.weight", "out_proj.weight"))]
        nn.init.zeros_(parameters[ends[-1]])

    # A skip passes the stream and adds nothing of the other block.
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.fc2.weight", "scale_shift_table", "skip_linear.1.weight")):
            nn.init.zeros_(parameter)
        elif name.endswith(("skip_linear.weight", "skip_linear.0.weight")):
            nn.init.eye_(parameter)


@pytest.mark.parametrize("name", ["dit_s_2", "dig_s_2", "uvit_l_2", "dis_s_2", "dim_l"])
def test_tokens_of_the_grid_are_found_in_every_layers_sequence(name: str):
    """`place` brings the tokens of every layer's sequence into the grid's order."""
    torch.manual_seed(0)
    options = backbones.tiny_options_of(name) | dict(input_size=6, in_channels=3, num_classes=5)
    model = backbones.build(name, **options).eval()
    silence(model)

    # Keep what every layer is given.
    calls = []
    watched = layers(model)
    with torch.no_grad(), watching(watched, calls.append):
        model(seeded(1, 3, 6, 6).float(), torch.tensor([500]), torch.tensor([1]))
    assert len(calls) == len(watched) > 1

    # All layers see the tokens of the first one.
    first = calls[0].inputs[0][:, calls[0].place]
    for call in calls:
        tokens = call.inputs[0][:, call.place]
        assert call.grid == (3, 3)
        assert tokens.shape[1] == 9
        torch.testing.assert_close(tokens, first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["dico_s", "hourglass", "adm_256", "ldm_8", "dis_s_2", "dig_s_2", "udit_s"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("dim_l", "dic_s", "dimsum_l_2")],
)
def test_every_family_runs_and_is_unchanged(name: str):
    """The wrapped network gives the network's own output, and weights sum to 1."""
    names = backbones.list_backbones(f"{name.split('_')[0]}*")
    name = name if name in names else names[0]
    size, *_ = backbones.exceptions_of(name).sizes or (16,)
    torch.manual_seed(0)
    options = dict(num_classes=5, input_size=size) | backbones.tiny_options_of(name)
    model = backbones.build(name, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)

    # The cheapest settings that use every measure.
    small = Settings(
        queries=2, anchors=((0.5, 0.5),), gradient_queries=1, gradient_images=1, directions=1
    )
    probe = LocalityProbe(model, layers(model), small)
    x = seeded(2, model.in_channels, model.input_size, model.input_size).float()
    t = torch.tensor([300, 300])
    y = torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(probe(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)

    # All weights lie within the largest radius.
    arrays = probe.arrays()
    assert "network gradient" in summary(arrays)
    for key, array in arrays.items():
        if key.startswith("mass_"):
            assert float(array[..., -1].min()) == pytest.approx(1, abs=1e-4), key


def test_a_head_weighs_as_much_in_the_uniform_value_as_in_the_mass():
    """Uniform weights on two grids with different numbers of heads are 1 in every measure."""
    # Five images in each of two layers.
    arrays: dict[str, np.ndarray] = {}
    for layer, (heads, side, mass) in enumerate(((2, 4, 0.5), (8, 2, 1.0))):
        arrays |= {
            f"kind_{layer}": np.array("attention"),
            f"grid_{layer}": np.array([side, side]),
            f"uniform_{layer}": np.full(3, 2.0),
            f"values_{layer}": np.full((5, heads, 3), 2.0),
            f"uniform_mass_{layer}": np.array([0.1, mass]),
            f"mass_{layer}": np.full((5, heads, 2), mass),
        }

    # Two heads with a mass of 0.5 nearby and eight with 1.0 have 0.9 on average.
    assert summary(arrays)["attention"] == {
        "distance": 1.0,
        "field": 1.0,
        "entropy": 1.0,
        "near": 0.9,
        "near_uniform": 0.9,
        "parts": 10,
    }


def test_a_network_without_weights_over_tokens_is_refused():
    model = nn.Conv2d(3, 6, 3, padding=1)
    message = "Conv2d has no layer whose weights over tokens are known; ask for its gradients"
    with pytest.raises(ValueError, match=message):
        LocalityProbe(model, layers(model), Settings(9, (), 0, 1, 1))


def test_queries_are_always_the_same_and_anchors_are_fractions():
    assert some_queries(ODD, 99).tolist() == list(range(TOKENS))
    drawn = some_queries((9, 9), 20).tolist()
    assert len(set(drawn)) == 20
    assert drawn == some_queries((9, 9), 20).tolist()
    assert anchor_token(ODD, (0.5, 0.5)) == 1 * 5 + 2
    assert anchor_token(ODD, (1.0, 1.0)) == TOKENS - 1


def test_every_mixer_is_known_to_the_probe():
    torch.manual_seed(0)
    for name in MIXERS:
        options = {} if name == "conv" else dict(heads=2)
        mixer = build_mixer(name, 8, (8, 8), 0, **options)
        assert len(layers(nn.Sequential(mixer))) == 1, name


def test_the_weights_of_global_regional_attention_make_its_output():
    """Tokens outside of the region have a share of their average."""
    torch.manual_seed(0)
    mixer = build_mixer("global_regional", 8, (4, 8), 0, heads=2, window=4, pool=2).double()
    x = seeded(2, 8, 4, 8)
    calls: list[Call] = []
    with torch.no_grad(), watching(layers(nn.Sequential(mixer)), calls.append):
        out = mixer(x)
        tokens = torch.arange(32)
        rows = torch.stack([calls[0].weights.rows(head, tokens) for head in range(2)], dim=1)
        v = mixer.qkv(x.flatten(2).transpose(1, 2))[..., 16:].unflatten(2, (2, 4)).transpose(1, 2)
        expected = mixer.proj((rows.double() @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), expected, rtol=1e-5, atol=1e-6)
