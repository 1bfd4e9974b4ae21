"""What is particular to FlowDCN: the authors' outputs, the truncated cell, and its counts."""

import pytest
import torch
from torch import Tensor

import backbones
from backbones.kernels import deformable
from experiments.engine.timing.cost import count_network
from tests.support.authors import CASES, build_like_authors, inputs_of, largest_error
from tests.support.networks import randomise, relative_rms

AUTHORS = {name: case for name, case in CASES.items() if name.startswith("flowdcn")}
SMALL = dict(input_size=6, in_channels=3, num_classes=7, dim=24, depth=2, groups=2)
# A row of the values 1, 10, 100, 1000 and 10000, sampled by the authors' kernel.
ROW = (1.0, 10.0, 100.0, 1000.0, 10000.0)
SAMPLED = {
    -2.0: 0.0,
    -1.75: -0.75,
    -1.5: -0.5,
    -1.25: -0.25,
    -1.0: 0.0,
    -0.75: -5.75,
    -0.5: -3.5,
    -0.25: -1.25,
    0.0: 1.0,
    0.25: 3.25,
    3.75: 7750.0,
    4.0: 10000.0,
    4.25: 7500.0,
    4.75: 2500.0,
    5.0: 0.0,
}


@pytest.mark.parametrize("case", AUTHORS)
def test_outputs_gradients_and_names_are_those_of_the_authors_code(case: str):
    """The names also come in the authors' order, in which their files keep the average."""
    row = AUTHORS[case]
    model = build_like_authors(row)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes.items()) == list(row["keys"].items())

    out = model(*inputs_of(row))
    assert largest_error(out, row, row["output"]) <= row["tolerance"]
    out.square().mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key, expected in row.get("gradients", {}).items():
        assert largest_error(gradients[key], row, expected) <= 1e-5 * row["largest"][key], key


@pytest.mark.parametrize("down", [False, True])
def test_cells_are_truncated_towards_zero_as_the_authors_kernels_do(down: bool):
    """A floor would give 0.25 at -0.75 from the left, and grid_sample has no such mode."""
    values = torch.tensor(ROW).view(1, 1, 5, 1, 1)
    for position, expected in SAMPLED.items():
        points = torch.zeros(1, 1, 5, 1, 1, 2)
        points[..., 0] = position
        weights = torch.ones(1, 1, 5, 1, 1)
        if down:
            out = deformable(
                values.transpose(1, 2), points.transpose(1, 2).flip(-1), weights.transpose(1, 2)
            )
        else:
            out = deformable(values, points, weights)
        assert out.flatten()[0].item() == pytest.approx(expected, abs=1e-2), position


def sample_naively(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Follow the definition, point by point."""
    n, height, width, groups, _ = values.shape
    out = torch.zeros_like(values)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape)).tolist():
        image, row, column, group, _ = index
        x, y = (points[tuple(index)] + torch.tensor([column, row])).tolist()
        weight = weights[tuple(index)]

        # Four pixels around the point share in it, and pixels outside are zero.
        for r in (int(y), int(y) + 1):
            for c in (int(x), int(x) + 1):
                if 0 <= r < height and 0 <= c < width:
                    share_y = y - int(y) if r > int(y) else 1 - (y - int(y))
                    share_x = x - int(x) if c > int(x) else 1 - (x - int(x))
                    tap = values[image, r, c, group]
                    out[image, row, column, group] += weight * share_x * share_y * tap
    return out


def test_sampling_follows_its_definition_with_gradients_that_hold_the_cell_fixed():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    values, points, weights = draw(2, 3, 4, 2, 3), draw(2, 3, 4, 2, 2, 2), draw(2, 3, 4, 2, 2)
    with torch.no_grad():
        truth = sample_naively(values, 2 * points, weights)
        assert relative_rms(deformable(values, 2 * points, weights), truth) < 1e-12
    assert torch.autograd.gradcheck(lambda *args: deformable(*args), (values, points, weights))


def test_points_that_are_no_numbers_make_outputs_that_are_none():
    values, weights = torch.ones(1, 2, 2, 1, 1), torch.ones(1, 2, 2, 1, 1)
    points = torch.full((1, 2, 2, 1, 1, 2), float("nan"))
    assert deformable(values, points, weights).isnan().all()


@pytest.mark.parametrize(
    "name, sampling_g, fvcore_g",
    [
        ("flowdcn_s_2", 0.0531, 4.8009),
        ("flowdcn_b_2", 0.1062, 19.1933),
        ("flowdcn_l_2", 0.2831, 68.2038),
        ("flowdcn_xl_2", 0.3716, 100.1257),
    ],
)
def test_sampling_is_counted_apart_and_fvcore_sees_one_norm(
    name: str, sampling_g: float, fvcore_g: float
):
    """Profilers do not see the authors' kernel. The published 4.4 G of S is met by no convention.

    fvcore counts four per element of the head's LayerNorm, and the RMSNorms are no norm to it.
    """
    with torch.device("meta"):
        model = backbones.build(name)
    counts = count_network(model, 32, 4)
    fvcore = 4 * counts["macs_norms"] - 3 * counts["macs_core"]
    assert abs(counts["macs_sampling"] / 1e9 - sampling_g) < 0.51e-4
    assert abs(fvcore / 1e9 - fvcore_g) < 0.51e-4
    assert name != "flowdcn_s_2" or counts["macs_core"] / 1e9 > 4.7


def test_groups_start_on_grids_of_growing_spacing():
    torch.manual_seed(0)
    model = backbones.build("flowdcn_s_2", depth=1)
    (block,) = model.blocks
    spacing = 6 * block.attn.deformables_scale.detach().flatten().sigmoid()
    expected = torch.tensor([(group + 1) - 0.0006 for group in range(6)])
    assert torch.allclose(spacing, expected, atol=1e-5)
    prior = [(column, row) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    assert block.attn.deformables_prior.flatten(0, 4).tolist() == [
        list(map(float, p)) for p in prior
    ]

    # adaLN starts from PyTorch's own values, not from zero.
    assert block.adaLN_modulation[1].weight.any()
    assert not block.attn.qk_weights.weight.any() and block.attn.qk_weights.bias.any()


def test_runs_under_autocast():
    model = randomise(backbones.build("flowdcn_s_2", **SMALL))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    args = (x, torch.tensor([0.2, 0.9]), torch.tensor([3, 7]))
    with torch.no_grad():
        exact = model(*args)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*args)
    assert relative_rms(out, exact) < 0.2


def test_a_mixer_of_maps_can_stand_in_place_of_the_sampling():
    """It sees the map in rows and columns, and every parameter learns."""
    torch.manual_seed(0)
    model = backbones.build("flowdcn_s_2", **SMALL, mixer="conv")
    randomise(model)
    mixer = model.blocks[0].attn
    x = torch.randn(2, 9, 24, requires_grad=True)
    as_map = x.transpose(1, 2).reshape(2, 24, 3, 3)
    expected = mixer.mixer(as_map).reshape(2, 24, 9).transpose(1, 2)
    assert torch.equal(mixer(x), expected)

    model(torch.randn(2, 3, 6, 6), torch.rand(2), torch.tensor([0, 7])).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_conv_module_costs_what_the_paper_prints_and_has_fewer_parameters():
    with torch.device("meta"):
        model = backbones.build("flowdcn_s_2", mixer="conv")
    counts = count_network(model, 32, 4)
    assert round(counts["macs_torchprofile"] / 1e9, 1) == 4.6
    assert counts["params_trainable"] == 31_123_232
