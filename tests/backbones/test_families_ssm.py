"""What is particular to DiS, DiM and DiMSUM: the authors' outputs, scans, skips and bands."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.dim import Frame, scan_order
from backbones.dimsum import DiMSUMBlock, WaveletBranch, unwindows, windows
from backbones.dis import BidirectionalMamba
from backbones.kernels import use
from backbones.mamba import COLUMNS, COLUMNS_BACK, ROWS, ROWS_BACK, Mamba, reorder, restore
from tests.support.networks import randomise, relative_rms
from tests.support.paths import DATA

CHANNELS = 3
CLASSES = 7
FAMILIES = {
    "dis_s_2": 6,
    "dim_l": 6,
    "dimsum_l_2": 24,
}  # one size stands for its family; the side of the input
AUTHORS = json.loads((DATA / "outputs_ssm.json").read_text())
every_family = pytest.mark.parametrize("name", FAMILIES)


def network(name: str, **options: Any) -> nn.Module:
    shape = dict(input_size=FAMILIES[name], in_channels=CHANNELS, num_classes=CLASSES)
    return backbones.build(name, **backbones.tiny_options_of(name) | shape | options)


def inputs(name: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(
        batch, CHANNELS, FAMILIES[name], FAMILIES[name], generator=torch.Generator().manual_seed(1)
    )
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


@every_family
def test_every_choice_of_kernels_gives_the_same(name: str):
    model = randomise(network(name)).double()
    x, t, y = inputs(name)
    with (
        torch.no_grad(),
        use(selective_scan="reference", causal_conv="reference", attention="reference"),
    ):
        truth = model(x.double(), t, y)
    with torch.no_grad():
        assert relative_rms(model(x.double(), t, y), truth) <= 1e-12


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(
        np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    ).float()


@pytest.mark.parametrize("case", AUTHORS)
def test_outputs_are_those_of_the_authors_code(case: str):
    """Sampled outputs of their modules, with parameters drawn from their own names.

    Weights are scaled by their fan-in; decay rates keep their initial values.
    """
    row = AUTHORS[case]
    model = backbones.build(row["name"], **row["options"])
    for key, p in model.named_parameters():
        if "A_log" not in key and "A_b_log" not in key:
            p.data = drawn(key, tuple(p.shape)) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    with torch.no_grad():
        out = model(
            drawn("x", (2, 4, model.input_size, model.input_size)),
            torch.tensor(row["t"]),
            torch.tensor([3, 10]),
        )
    assert relative_rms(out.flatten()[:: row["stride"]], torch.tensor(row["output"])) < 1e-5


@every_family
def test_runs_under_autocast_with_its_residual_stream_in_float32(name: str):
    model = randomise(network(name))
    with torch.no_grad():
        exact = model(*inputs(name))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs(name))
    assert relative_rms(out, exact) < 0.1


def depends(out: Tensor, x: Tensor) -> Tensor:
    """Which positions of x (1, T, D) each position of the output (1, T, D) depends on."""
    rows = [
        torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0
        for i in range(out.shape[1])
    ]
    return torch.stack(rows)


def test_mamba_is_causal_and_its_twin_reads_both_ways():
    x = torch.randn(1, 9, 12, requires_grad=True)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(depends(randomise(Mamba(12))(x), x), past)
    mixer = randomise(BidirectionalMamba(12))
    assert depends(mixer(x), x).all()
    for silent, seen in (("_b", past), ("", past.T)):
        mixer = randomise(BidirectionalMamba(12))
        nn.init.zeros_(
            getattr(mixer, f"x_proj{silent}").weight
        )  # no b and no c: the scan keeps and reads nothing
        nn.init.zeros_(getattr(mixer, f"D{silent}"))
        assert torch.equal(depends(mixer(x), x), seen)


def test_dis_skips_carry_the_increments_of_the_in_blocks_last_in_first_out():
    model = randomise(network("dis_s_2"))
    made: list[Tensor] = []
    taken: list[Tensor] = []
    for block in model.in_blocks:
        block.mixer.register_forward_hook(lambda mixer, args, out: made.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda block, args: taken.append(args[2]))
    model(*inputs("dis_s_2"))
    assert len(made) == 2
    assert all(skip is out for skip, out in zip(taken, reversed(made), strict=True))


def test_dis_has_the_label_in_front_of_the_time_in_front_of_the_patches():
    model = randomise(network("dis_s_2"))
    x, t, y = inputs("dis_s_2")
    seen = []
    model.in_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(x, t, y)
    tokens = (seen[0] - model.pos_embed).detach()
    assert relative_rms(tokens[:, 0], model.label_emb(y).detach()) < 1e-5
    assert relative_rms(tokens[:, 2:], model.patch_embed(x).detach()) < 1e-5


def explicit(order: tuple[bool, bool], height: int, width: int) -> list[int]:
    """The row-major index of the token that an order puts in each place."""
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return {ROWS: rows, ROWS_BACK: rows[::-1], COLUMNS: columns, COLUMNS_BACK: columns[::-1]}[order]


@pytest.mark.parametrize("order", [ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK])
def test_orders_of_a_grid_are_these_permutations(order: tuple[bool, bool]):
    tokens = torch.arange(12).view(1, 12, 1)
    assert reorder(tokens, (3, 4), order).flatten().tolist() == explicit(order, 3, 4)
    assert torch.equal(restore(reorder(tokens, (3, 4), order), (3, 4), order), tokens)


def test_dim_cycles_through_the_orders_and_back():
    codes = {ROWS: 0, ROWS_BACK: -2, COLUMNS: 1, COLUMNS_BACK: -1}
    assert [codes[scan_order(i, 49)] for i in range(49)] == [0] + [-2, 1, -1, 0] * 6 + [
        -1,
        1,
        -2,
        0,
    ] * 6


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_dim_blocks_read_the_framed_grid_in_their_order_behind_the_leading_tokens():
    """With silent mixers and skips, every block is given the same tokens, permuted."""
    model = randomise(network("dim_l", depth=9))
    seen: list[Tensor] = []
    for block in model.transformer_blocks:
        block.attn1 = Silent()
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0][0]))
        if block.skip_linear is not None:
            nn.init.eye_(block.skip_linear[0].weight)
            for part in (
                block.skip_linear[0].bias,
                block.skip_linear[1].weight,
                block.skip_linear[1].bias,
            ):
                nn.init.zeros_(part)
    with torch.no_grad():
        model(*inputs("dim_l"))
    assert len({tuple(tokens[5:, 0].tolist()) for tokens in seen}) == 4
    for i, tokens in enumerate(seen):
        assert torch.equal(tokens[:5], seen[0][:5])
        assert torch.equal(tokens[5:], seen[0][5:][explicit(scan_order(i, 9), 6, 6)])


def test_dim_skips_join_blocks_that_read_the_grid_in_one_order():
    model = randomise(network("dim_l"))
    made: list[Tensor] = []
    taken: list[Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda block, args, out: made.append(out))
        if block.skip_linear is not None:
            block.skip_linear[1].register_forward_pre_hook(
                lambda linear, args: taken.append(args[0])
            )
    model(*inputs("dim_l"))
    assert len(made) == 7
    assert all(skip is out for skip, out in zip(taken, (made[3], made[2], made[1]), strict=True))


@pytest.mark.parametrize("raster", [False, True])
def test_dim_frames_its_grid_with_padding_tokens(raster: bool):
    """2x4 patches in a frame of 5x7, against each token's own rule; smoothers that do nothing."""
    frame = randomise(Frame(3, (2, 4), raster))
    for smoother in (frame.first_smoother, frame.last_smoother):
        nn.init.dirac_(smoother.weight, groups=3)
        nn.init.zeros_(smoother.bias)
    x = torch.randn(2, 2 + 8, 3)
    with torch.no_grad():
        out = frame(x)
        assert torch.equal(frame.take_off(out), x[:, 2:])
    assert out.shape == (2, 2 + 3 + 35, 3)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[0, 2:5], frame.pad_token_dec_split[0])
    count = 0
    for r in range(5):
        for c in range(7):
            token = out[1, 5 + 7 * r + c]
            if r < 2 and c < 4:
                assert torch.equal(token, x[1, 2 + 4 * r + c])
                continue
            which = count % 3 if raster else r - 2 if r >= 2 else c - 4
            assert torch.equal(token, frame.pad_token[0, :, which])
            count += 1
    assert count == 35 - 8


def test_dimsum_spatial_scans_change_order_and_its_blocks_put_it_back():
    """A token reads those before it in the block's order, and its result stays in its place."""
    position = torch.empty(16, dtype=torch.long)
    for index, order in enumerate((ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)):
        branch = randomise(DiMSUMBlock(24, 3, (4, 4), index + 4)).spatial_mamba
        x = torch.randn(1, 16, 12, requires_grad=True)
        position[explicit(order, 4, 4)] = torch.arange(16)
        assert torch.equal(
            depends(branch(x, torch.randn(1, 24)), x), position[:, None] >= position[None]
        )


@pytest.mark.parametrize("by_column", [False, True])
def test_dimsum_windows_are_this_permutation(by_column: bool):
    """4x4 windows of 3x3 on a grid of 12; by column, rows and columns change places."""
    places = [
        (3 * wr + r, 3 * wc + c)
        for wr in range(4)
        for wc in range(4)
        for r in range(3)
        for c in range(3)
    ]
    expected = [12 * c + r if by_column else 12 * r + c for r, c in places]
    tokens = torch.arange(144).view(1, 144, 1)
    assert windows(tokens, (12, 12), by_column).flatten().tolist() == expected
    assert torch.equal(unwindows(windows(tokens, (12, 12), by_column), (12, 12), by_column), tokens)
    index = 1 if by_column else 2
    branch = randomise(DiMSUMBlock(24, 3, (12, 12), index)).freq_mamba
    branch.packet = branch.unpacket = lambda x: x
    x = torch.randn(1, 144, 12, requires_grad=True)
    position = torch.empty(144, dtype=torch.long)
    position[expected] = torch.arange(144)
    assert torch.equal(
        depends(branch(x, torch.randn(1, 24)), x), position[:, None] >= position[None]
    )


def test_dimsum_wavelet_packet_is_the_authors_arrangement():
    """Two levels of the Haar transform by its definition, over 4.

    Token (p, q) of a cell holds channels 16 j + 4 p + q.
    """
    dim = 5
    side = 8
    branch = WaveletBranch(dim, 24, (side, side), 0).double()
    x = torch.randn(2, side * side, dim, dtype=torch.float64)

    def bands(image: Tensor) -> list[Tensor]:
        a, b, c, d = (image[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]

    image = x.transpose(1, 2).reshape(2, dim, side, side)
    flat = torch.cat([second for first in bands(image) for second in bands(first)], dim=1) / 4
    packet = branch.packet(x).view(2, side, side, dim)
    for r in range(side):
        for c in range(side):
            channels = [16 * j + 4 * (r % 4) + c % 4 for j in range(dim)]
            assert torch.allclose(
                packet[:, r, c], flat[:, channels, r // 4, c // 4], rtol=0, atol=1e-14
            )
    assert relative_rms(branch.unpacket(branch.packet(x)), x) < 1e-15
    filters = torch.cat([branch.dwt.w_ll, branch.dwt.w_lh, branch.dwt.w_hl, branch.dwt.w_hh])
    assert torch.equal(filters, branch.idwt.filters)


def test_dimsum_shares_one_block_and_drops_the_residual_stream():
    """The shared block takes every second block's output, and the head takes the shared block's."""
    model = randomise(network("dimsum_l_2"))
    made: list[Tensor] = []
    asked: list[tuple[Tensor, Tensor]] = []
    read: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: made.append(out[0]))
    model.attn_block.register_forward_hook(lambda block, args, out: asked.append((args[0], out)))
    model.final_layer.register_forward_pre_hook(lambda layer, args: read.append(args[0]))
    model(*inputs("dimsum_l_2"))
    assert len(made) == 4
    assert len(asked) == 2
    assert asked[0][0] is made[1]
    assert asked[1][0] is made[3]
    assert read[0] is asked[1][1]
