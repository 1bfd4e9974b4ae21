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
    """Draw x, t and y; the last label is the null label."""
    shape = (batch, CHANNELS, FAMILIES[name], FAMILIES[name])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


@every_family
def test_every_choice_of_kernels_gives_the_same(name: str):
    """The kernels that are chosen by default agree with the references, in float64."""
    model = randomise(network(name)).double()
    x, t, y = inputs(name)
    references = use(selective_scan="reference", causal_conv="reference", attention="reference")
    with torch.no_grad():
        with references:
            truth = model(x.double(), t, y)
        out = model(x.double(), t, y)
    assert relative_rms(out, truth) <= 1e-12


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a normal tensor from a name, as the script that ran the authors' modules did."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    return torch.from_numpy(rng.standard_normal(shape)).float()


@pytest.mark.parametrize("case", AUTHORS)
def test_outputs_are_those_of_the_authors_code(case: str):
    """Sampled outputs are those of the authors' modules.

    Parameters are drawn from their own names, and scaled by their fan-in. Decay rates keep their
    initial values.
    """
    row = AUTHORS[case]
    model = backbones.build(row["name"], **row["options"])
    for key, p in model.named_parameters():
        if "A_log" in key or "A_b_log" in key:
            continue
        std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
        p.data = drawn(key, tuple(p.shape)) * std

    # A batch of two, of whose output every so many-th value is stored.
    x = drawn("x", (2, 4, model.input_size, model.input_size))
    with torch.no_grad():
        out = model(x, torch.tensor(row["t"]), torch.tensor([3, 10]))
    ours = out.flatten()[:: row["stride"]]
    assert relative_rms(ours, torch.tensor(row["output"])) < 1e-5


@every_family
def test_runs_under_autocast_with_its_residual_stream_in_float32(name: str):
    model = randomise(network(name))
    with torch.no_grad():
        exact = model(*inputs(name))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs(name))
    assert relative_rms(out, exact) < 0.1


def depends(out: Tensor, x: Tensor) -> Tensor:
    """Return which positions of x (1, T, D) each position of the output (1, T, D) depends on."""
    rows = []
    for i in range(out.shape[1]):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        rows.append(grad[0].abs().sum(-1) > 0)
    return torch.stack(rows)


def test_mamba_is_causal_and_its_twin_reads_both_ways():
    """Mamba sees the past; of DiS's two scans, one sees the past and the other the future."""
    x = torch.randn(1, 9, 12, requires_grad=True)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(depends(randomise(Mamba(12))(x), x), past)
    mixer = randomise(BidirectionalMamba(12))
    assert depends(mixer(x), x).all()

    # A scan without b, c and skip keeps and reads nothing, so that the other one is seen alone.
    for silent, seen in (("_b", past), ("", past.T)):
        mixer = randomise(BidirectionalMamba(12))
        nn.init.zeros_(getattr(mixer, f"x_proj{silent}").weight)
        nn.init.zeros_(getattr(mixer, f"D{silent}"))
        assert torch.equal(depends(mixer(x), x), seen)


def test_dis_skips_carry_the_increments_of_the_in_blocks_last_in_first_out():
    """An out-block takes the mixer's output of its mirror among the in-blocks."""
    model = randomise(network("dis_s_2"))
    increments: list[Tensor] = []
    skips: list[Tensor] = []
    for block in model.in_blocks:
        block.mixer.register_forward_hook(lambda mixer, args, out: increments.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda block, args: skips.append(args[2]))
    model(*inputs("dis_s_2"))
    assert len(increments) == 2
    assert all(skip is out for skip, out in zip(skips, reversed(increments), strict=True))


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


def reads_in(branch: nn.Module, order: list[int]) -> bool:
    """Return whether each token depends on exactly those that are not behind it in an order."""
    tokens = len(order)
    x = torch.randn(1, tokens, 12, requires_grad=True)
    position = torch.empty(tokens, dtype=torch.long)
    position[order] = torch.arange(tokens)
    seen = depends(branch(x, torch.randn(1, 24)), x)
    return torch.equal(seen, position[:, None] >= position[None])


@pytest.mark.parametrize("order", [ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK])
def test_orders_of_a_grid_are_these_permutations(order: tuple[bool, bool]):
    tokens = torch.arange(12).view(1, 12, 1)
    assert reorder(tokens, (3, 4), order).flatten().tolist() == explicit(order, 3, 4)
    assert torch.equal(restore(reorder(tokens, (3, 4), order), (3, 4), order), tokens)


def test_dim_cycles_through_the_orders_and_back():
    """The blocks behind the middle one mirror the orders of those before it."""
    codes = {ROWS: 0, ROWS_BACK: -2, COLUMNS: 1, COLUMNS_BACK: -1}
    orders = [codes[scan_order(i, 49)] for i in range(49)]
    assert orders == [0] + [-2, 1, -1, 0] * 6 + [-1, 1, -2, 0] * 6


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
        if block.skip_linear is None:
            continue

        # A silent skip passes the tokens and adds nothing.
        of_tokens, of_skip = block.skip_linear[0], block.skip_linear[1]
        nn.init.eye_(of_tokens.weight)
        for parameter in (of_tokens.bias, of_skip.weight, of_skip.bias):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        model(*inputs("dim_l"))

    # One channel of the grids tells four orders apart.
    assert len({tuple(tokens[5:, 0].tolist()) for tokens in seen}) == 4
    leading, grid = seen[0][:5], seen[0][5:]
    for i, tokens in enumerate(seen):
        assert torch.equal(tokens[:5], leading)
        assert torch.equal(tokens[5:], grid[explicit(scan_order(i, 9), 6, 6)])


def test_dim_skips_join_blocks_that_read_the_grid_in_one_order():
    """Of seven blocks, the last three take the outputs of blocks 3, 2 and 1."""
    model = randomise(network("dim_l"))
    outputs: list[Tensor] = []
    skips: list[Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda block, args, out: outputs.append(out))
        if block.skip_linear is not None:
            of_skip = block.skip_linear[1]
            of_skip.register_forward_pre_hook(lambda linear, args: skips.append(args[0]))
    model(*inputs("dim_l"))

    # The very tensors are taken, without a copy.
    assert len(outputs) == 7
    sources = (outputs[3], outputs[2], outputs[1])
    assert all(skip is out for skip, out in zip(skips, sources, strict=True))


@pytest.mark.parametrize("raster", [False, True])
def test_dim_frames_its_grid_with_padding_tokens(raster: bool):
    """2x4 patches in a frame of 5x7 follow each token's own rule, behind two leading tokens."""
    # Smoothers that do nothing.
    frame = randomise(Frame(3, (2, 4), raster))
    for smoother in (frame.first_smoother, frame.last_smoother):
        nn.init.dirac_(smoother.weight, groups=3)
        nn.init.zeros_(smoother.bias)
    x = torch.randn(2, 2 + 8, 3)
    with torch.no_grad():
        out = frame(x)
        assert torch.equal(frame.take_off(out), x[:, 2:])

    # Three tokens separate the leading ones from the framed grid.
    assert out.shape == (2, 2 + 3 + 35, 3)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[0, 2:5], frame.pad_token_dec_split[0])

    # Outside the patches, padding tokens go by their count in raster order, or by row or column.
    count = 0
    for r in range(5):
        for c in range(7):
            token = out[1, 5 + 7 * r + c]
            if r < 2 and c < 4:
                assert torch.equal(token, x[1, 2 + 4 * r + c])
                continue
            by_place = r - 2 if r >= 2 else c - 4
            index = count % 3 if raster else by_place
            assert torch.equal(token, frame.pad_token[0, :, index])
            count += 1
    assert count == 35 - 8


def test_dimsum_spatial_scans_change_order_and_its_blocks_put_it_back():
    """A token reads those before it in the block's order, and its result stays in its place."""
    for index, order in enumerate((ROWS, ROWS_BACK, COLUMNS, COLUMNS_BACK)):
        branch = randomise(DiMSUMBlock(24, 3, (4, 4), index + 4)).spatial_mamba
        assert reads_in(branch, explicit(order, 4, 4))


@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("side", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_dimsum_windows_are_this_permutation(side: int, by_column: bool):
    """A grid has 4x4 windows; by column, rows and columns change places."""
    # The grid index of every token, window by window.
    width = side // 4
    corners = [(width * row, width * column) for row in range(4) for column in range(4)]
    order = []
    for top, left in corners:
        for r in range(top, top + width):
            for c in range(left, left + width):
                order.append(side * c + r if by_column else side * r + c)
    tokens = torch.arange(side**2).view(1, side**2, 1)
    ordered = windows(tokens, (side, side), by_column)
    assert ordered.flatten().tolist() == order
    assert torch.equal(unwindows(ordered, (side, side), by_column), tokens)

    # Without the wavelets, a block scans in this order. Block 1 goes by column, block 2 by row.
    index = 1 if by_column else 2
    branch = randomise(DiMSUMBlock(24, 3, (side, side), index)).freq_mamba
    branch.packet = branch.unpacket = lambda x: x
    assert reads_in(branch, order)


def test_dimsum_wavelet_packet_is_the_authors_arrangement():
    """The packet is two levels of the Haar transform by its definition, over 4.

    Token (p, q) of a cell holds channels 16 j + 4 p + q.
    """
    dim = 5
    side = 8
    branch = WaveletBranch(dim, 24, (side, side), 0).double()
    x = torch.randn(2, side * side, dim, dtype=torch.float64)

    def bands(image: Tensor) -> list[Tensor]:
        a, b, c, d = (image[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]

    # The bands of the second level lie beside each other in the order of the first.
    image = x.transpose(1, 2).reshape(2, dim, side, side)
    levels = []
    for first in bands(image):
        levels += bands(first)
    flat = torch.cat(levels, dim=1) / 4

    # Every token of the packet, from its cell and its place there.
    packet = branch.packet(x).view(2, side, side, dim)
    for r in range(side):
        for c in range(side):
            channels = [16 * j + 4 * (r % 4) + c % 4 for j in range(dim)]
            truth = flat[:, channels, r // 4, c // 4]
            assert torch.allclose(packet[:, r, c], truth, rtol=0, atol=1e-14)

    # The way back undoes it, with the same filters.
    assert relative_rms(branch.unpacket(branch.packet(x)), x) < 1e-15
    filters = torch.cat([branch.dwt.w_ll, branch.dwt.w_lh, branch.dwt.w_hl, branch.dwt.w_hh])
    assert torch.equal(filters, branch.idwt.filters)


def test_dimsum_shares_one_block_and_drops_the_residual_stream():
    """The shared block takes every second block's output, and the head takes the shared block's."""
    model = randomise(network("dimsum_l_2"))
    outputs: list[Tensor] = []
    shared: list[tuple[Tensor, Tensor]] = []
    read: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: outputs.append(out[0]))
    model.attn_block.register_forward_hook(lambda block, args, out: shared.append((args[0], out)))
    model.final_layer.register_forward_pre_hook(lambda layer, args: read.append(args[0]))
    model(*inputs("dimsum_l_2"))

    # Four blocks share one, which is called twice.
    assert len(outputs) == 4
    assert len(shared) == 2
    assert shared[0][0] is outputs[1]
    assert shared[1][0] is outputs[3]
    assert read[0] is shared[1][1]
