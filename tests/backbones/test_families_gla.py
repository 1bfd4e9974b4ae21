"""DiG's scan orders, names and refusals; DiffuSSM's pixels and directions. What every family must do is in test_backbones."""

import pytest
import torch
from torch import Tensor, nn

import backbones


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    for p in module.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator).to(p) * (
                p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            )
    return module


def scan_orders(height: int, width: int) -> list[list[int]]:
    """Where in row-major order each scanned token lies: rows, rows backwards, columns, columns backwards."""
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return [rows, rows[::-1], columns, columns[::-1]]


def test_dig_scans_in_four_orders_and_returns():
    """The same network with its tokens kept in row-major order and each block's order looked up."""
    model = randomise(backbones.build("dig_s_2", dim=24, heads=3, depth=8, input_size=10)).double()
    x, t, y = (
        torch.randn(2, 4, 10, 10, dtype=torch.float64),
        torch.tensor([3, 800]),
        torch.tensor([1000, 1]),
    )
    orders = scan_orders(5, 5)
    with torch.no_grad():
        tokens = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        for i, block in enumerate(model.blocks):
            order = orders[i % 4]
            scanned = block(tokens[:, order], c)
            tokens = torch.empty_like(tokens)
            tokens[:, order] = scanned
        expected = (
            model.final_layer(tokens, c)
            .view(2, 5, 5, 2, 2, 8)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(2, 8, 10, 10)
        )
        assert (model(x, t, y) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_dig_s_2_has_the_authors_keys():
    d, inner = 384, 1024
    keys = {"pos_embed": (1, 256, d), "y_embedder.embedding_table.weight": (1001, d)}
    biased = {
        "x_embedder.proj": (d, 4, 2, 2),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(12):
        block = {
            "attn.q_proj": (d // 2, d),
            "attn.k_proj": (d // 2, d),
            "attn.v_proj": (d, d),
            "attn.g_proj": (d, d),
            "attn.o_proj": (d, d),
        }
        block |= {
            "attn.gk_proj.0": (16, d),
            "attn.g_norm_swish_gate": (64,),
            "mlp.gate_proj": (2 * inner, d),
            "mlp.down_proj": (d, inner),
        }
        keys |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
        biased |= {
            f"blocks.{i}.attn.gk_proj.1": (d // 2, 16),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
            f"blocks.{i}.dw_conv": (d, 1, 3, 3),
        }
    keys |= {f"{name}.weight": shape for name, shape in biased.items()} | {
        f"{name}.bias": shape[:1] for name, shape in biased.items()
    }
    with torch.device("meta"):
        state = backbones.build("dig_s_2").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == keys


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
    assert not block.attn.gk_proj[1].bias.any() and bool(
        (block.attn.g_norm_swish_gate.weight == 1).all()
    )


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
    x, c = (
        torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True),
        torch.randn(1, 12, dtype=torch.float64),
    )
    for token in range(6):
        (gradient,) = torch.autograd.grad(layer(x, c)[0, token].sum(), x)
        assert bool(gradient.any(dim=-1).all())


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dig_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
        ("dig_s_2", {"heads": 5}, ["twice the heads", "384", "5"]),
        ("dig_s_2", {"depth": 6}, ["divisible by 4", "6"]),
        ("dig_s_2", {"mlp_ratio": 2}, ["mlp_ratio", "depth, dim, heads"]),
        ("diffussm_xl", {"input_size": 9}, ["divisible by group", "9"]),
    ],
)
def test_errors_name_what_is_known(name: str, options: dict[str, int], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        backbones.build(name, **options)
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)
