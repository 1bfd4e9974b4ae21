"""The controlled stacks are DiCo and DiT, and differ from them in the mixer alone.

The published network's weights are loaded into the stack; outputs and gradients must agree.
"""

import re

import pytest
import torch
from torch import Tensor, nn

import backbones
from tests.support.networks import (
    randomise,
    relative_rms,
)


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
    """Compare output and input gradient, in both dtypes, after loading the renamed weights."""
    shapes = {key: value.shape for key, value in controlled.state_dict().items()}
    weights = renamed(randomise(published).state_dict(), names)
    state = {key: value.reshape(shapes[key]) for key, value in weights.items()}
    controlled.load_state_dict(state, strict=True)

    # A batch of two.
    x = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([3, 999])
    y = torch.tensor([1, 5])
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
    """For i < (depth-1)//2, blocks i and depth-2-i are reduced into the input of depth-1-i."""
    model = randomise(backbones.build("isotropic", input_size=6, dim=12, depth=depth, skips=True))
    num_skips = (depth - 1) // 2
    assert len(model.reduce) == num_skips

    # Keep what every block and every reduction takes and returns.
    taken: dict[nn.Module, Tensor] = {}
    returned: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        taken[module] = args[0]
        returned[module] = out

    for module in [*model.blocks, *model.reduce]:
        module.register_forward_hook(keep)
    model(torch.randn(2, 4, 6, 6), torch.tensor([3, 999]), torch.tensor([1, 5]))

    # The input of every block but the first, from the last block backwards.
    for i in range(depth - 1):
        before = model.blocks[depth - 2 - i]
        source = before
        if i < num_skips:
            source = model.reduce[num_skips - 1 - i]
            joined = torch.cat([returned[before], returned[model.blocks[i]]], dim=1)
            assert torch.equal(taken[source], joined)
        assert torch.equal(taken[model.blocks[depth - 1 - i]], returned[source])
