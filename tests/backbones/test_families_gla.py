"""What is particular to DiG and DiffuSSM: scan orders, initial weights, pixels and directions."""

import torch
from torch import Tensor, nn

import backbones
from tests.support.networks import randomise


def scan_orders(height: int, width: int) -> list[list[int]]:
    """Return the row-major places of the tokens in scanned order: rows, columns and both back."""
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return [rows, rows[::-1], columns, columns[::-1]]


def test_dig_scans_in_four_orders_and_returns():
    """The same network with its tokens kept in row-major order and each block's order looked up."""
    model = randomise(backbones.build("dig_s_2", dim=24, heads=3, depth=8, input_size=10)).double()
    x = torch.randn(2, 4, 10, 10, dtype=torch.float64)
    t = torch.tensor([3, 800])
    y = torch.tensor([1000, 1])
    orders = scan_orders(5, 5)
    with torch.no_grad():
        tokens = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)

        # A block scans in its order, and its tokens go back to their places.
        for i, block in enumerate(model.blocks):
            order = orders[i % 4]
            scanned = block(tokens[:, order], c)
            tokens = torch.empty_like(tokens)
            tokens[:, order] = scanned

        # 5x5 tokens of 2x2 pixels become an image of 10x10.
        patches = model.final_layer(tokens, c).view(2, 5, 5, 2, 2, 8)
        expected = patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 10, 10)
        error = (model(x, t, y) - expected).abs().max()
    assert error <= 1e-12 * expected.abs().max()


def test_dig_starts_with_quiet_mixers_and_identity_convolutions():
    block = backbones.build("dig_s_2", dim=192, heads=3, depth=4).blocks[1]
    x = torch.randn(2, 192, 7, 7)
    assert torch.equal(block.dw_conv(x), x)
    for layer, fans in (
        (block.attn.q_proj, 96 + 192),
        (block.attn.o_proj, 2 * 192),
        (block.attn.gk_proj[1], 16 + 96),
    ):
        bound = 2**-2.5 * (6 / fans) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not block.attn.gk_proj[1].bias.any()
    assert bool((block.attn.g_norm_swish_gate.weight == 1).all())


class Echo(nn.Module):
    """A layer or head that hands on the first features of what it is given."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x[..., : self.features]


def test_diffussm_puts_every_pixel_back():
    model = backbones.build(
        "diffussm_xl", dim=12, depth=1, states=3, input_size=8, learn_sigma=False
    )
    model.blocks, model.final_layer = nn.ModuleList([Echo(12)]), Echo(8)
    model.pos_embed.data.zero_()
    nn.init.eye_(model.x_embedder.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x)


def test_diffussm_layer_sees_both_directions_pixel_by_pixel():
    layer = randomise(
        backbones.build("diffussm_xl", dim=12, depth=1, states=3, input_size=8).blocks[0]
    ).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, 12, dtype=torch.float64)
    for token in range(6):
        (gradient,) = torch.autograd.grad(layer(x, c)[0, token].sum(), x)
        assert bool(gradient.any(dim=-1).all())
