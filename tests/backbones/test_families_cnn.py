"""What is particular to SiT, DiC, U-DiT and U-ViT; the contract holds them to the rest."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.udit import DownsampledAttention, UDiT, rotary_table
from tests.support.networks import randomise, relative_rms

CHANNELS = 3
CLASSES = 7
SIZES = {"sit_s_2": 6, "dit_s_2": 6, "uvit_l_2": 6, "dic_s": 8, "udit_s": 16}  # of the inputs


def network(name: str, **options: Any) -> nn.Module:
    shape = dict(input_size=SIZES[name], in_channels=CHANNELS, num_classes=CLASSES)
    return backbones.build(name, **backbones.tiny_options_of(name) | shape | options)


def inputs(size: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(batch, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


@pytest.mark.parametrize(
    "name", ["dico_s", "dit_s_2", "sit_s_2", "udit_s", "dig_s_2", "diffussm_xl", "hourglass"]
)
def test_modulations_start_closed(name: str):
    """Every block of an adaLN-Zero family starts as the identity."""
    state = backbones.build(name, **backbones.tiny_options_of(name)).state_dict()
    modulations = {key: value for key, value in state.items() if "adaLN_modulation" in key}
    assert modulations
    assert not any(value.any() for value in modulations.values())


def test_sit_is_the_first_half_of_dit():
    """SiT is DiT without its half for the variance, with the same weights and times in [0, 1]."""
    sit = randomise(network("sit_s_2"))
    dit = network("dit_s_2", **backbones.tiny_options_of("sit_s_2"), input_size=6)
    dit.load_state_dict(sit.state_dict(), strict=True)
    x, _, y = inputs(6)
    t = torch.tensor([0.0, 0.3, 1.0])
    out = sit(x, t, y)
    assert torch.equal(out, dit(x, t, y)[:, :CHANNELS])
    assert (out[0] != out[1]).any()
    assert not torch.equal(out, sit(x, 1000 * t, y))


def test_dic_starts_with_open_gates():
    """The authors' zeroing of the blocks finds nothing; their largest weight for S is 0.125 too."""
    torch.manual_seed(0)
    model = backbones.build("dic_s")

    # Modulations start as Glorot's uniform draw, which nearly reaches its bound.
    for stages in (model.enc_blocks, model.lat_blocks, model.dec_blocks):
        for affine in (block["conv"].affine[1] for stage in stages for block in stage):
            bound = math.sqrt(6 / sum(affine.weight.shape))
            assert 0.99 * bound < affine.weight.abs().max() <= bound
            assert not affine.bias.any()

    # Only the weights of the last layer are zero.
    weights = {key: value for key, value in model.state_dict().items() if key.endswith("weight")}
    zero = {key for key, value in weights.items() if not value.any()}
    assert zero == {"final_layer.out_proj.weight", "final_layer.adaLN_modulation.1.weight"}


def record_output(record: dict[tuple[int, int], Tensor], at: tuple[int, int], block: nn.Module):
    """Keep what a block returns."""
    block.register_forward_hook(lambda module, args, out: record.update({at: out}))


def record_input(record: dict[tuple[int, int], Tensor], at: tuple[int, int], block: nn.Module):
    """Keep what a block takes."""
    block.register_forward_pre_hook(lambda module, args: record.update({at: args[0]}))


def test_dic_skips_join_every_third_block_counted_from_the_bottleneck():
    """Encoder and decoder mirror each other at every third block, whatever their depths."""
    # Keep the encoder's outputs and the decoder's inputs by level and place.
    model = randomise(network("dic_s", depths=(7, 4, 2, 5, 8)))
    outputs: dict[tuple[int, int], Tensor] = {}
    taken: dict[tuple[int, int], Tensor] = {}
    for level in (0, 1):
        for i, block in enumerate(model.enc_blocks[level]):
            record_output(outputs, (level, i), block["conv"])
        for i, block in enumerate(model.dec_blocks[1 - level]):
            record_input(taken, (level, i), block["conv"])
    model(*inputs(8))

    # A block with a skip takes more channels than its level has: the skip lies behind them.
    sources = {}
    for (level, i), x in taken.items():
        width = outputs[level, 0].shape[1]
        if x.shape[1] > width:
            skip = x[:, width:]
            sources[level, i] = [at for at, out in outputs.items() if torch.equal(out, skip)]
    assert sources == {
        (1, 0): [(1, 3)],
        (1, 3): [(1, 0)],
        (0, 0): [(0, 6)],
        (0, 3): [(0, 3)],
        (0, 6): [(0, 0)],
    }


def relative_error_of_eval(model: nn.Module) -> float:
    """Return the error of the fused network against the spelled-out one, on the same weights."""
    with torch.no_grad():
        spelled = model.train()(*inputs(16))
        fused = model.eval()(*inputs(16))
    assert not torch.equal(spelled, fused)
    return relative_rms(fused, spelled)


def test_udit_fuses_beside_its_parameters():
    model = randomise(network("udit_s"))
    before = copy.deepcopy(model.state_dict())
    buffers = list(model.buffers())
    for _ in range(2):
        assert relative_error_of_eval(model) <= 1e-5
        model.eval().eval()
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)
        assert list(model.buffers()) == buffers == []


@pytest.mark.parametrize("change", ["load", "write", "replace", "cast", "copy"])
def test_udit_sees_weights_changed_in_eval_mode(change: str):
    """However weights are changed in eval mode, the fused kernels follow them."""
    model = randomise(network("udit_s"), seed=0).eval()
    other = randomise(network("udit_s"), seed=1)
    x, t, y = inputs(16)
    with torch.no_grad():
        stale = model(x, t, y)

        # Change the weights, or what holds them, after the first call has fused them.
        if change == "copy":
            model = copy.deepcopy(model)
        if change == "cast":
            other, model, x = other.double(), model.double(), x.double()
        if change == "write":
            torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 1.0)
        else:
            model.load_state_dict(other.state_dict(), assign=change == "replace")

        # The output is that of the new weights, and not that of the old ones.
        truth = other(x, t, y)
        assert relative_rms(model(x, t, y), truth) <= 1e-5
        assert relative_rms(stale, truth) > 1e-5


def test_udit_attends_within_a_sub_grid():
    """A changed pixel changes the outputs of its own sub-grid of every second pixel alone."""
    torch.manual_seed(0)
    attention = DownsampledAttention(16, heads=2)
    nn.init.zeros_(attention.downsampler["layer"].weight)
    x = torch.randn(1, 16, 8, 12)
    rotation = rotary_table((4, 6), 8, like=x)

    # Change one pixel, and see where the output changes.
    moved = x.clone()
    moved[:, :, 5, 2] += 1
    with torch.no_grad():
        difference = attention(moved, rotation) - attention(x, rotation)
    changed = difference.abs().amax(dim=1)[0] > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(changed, expected)


def test_udit_turns_pairs_by_column_and_row_in_turn():
    """Pairs of channels are turned by their column and their row alternately."""
    table = rotary_table((2, 3), 8, like=torch.zeros(1, dtype=torch.float64))
    for token in range(6):
        row, column = divmod(token, 3)
        for pair, position in enumerate((column, row, column, row)):
            angle = position * 10000 ** (-4 * (pair // 2) / 8)
            turn = complex(math.cos(angle), math.sin(angle))
            assert abs(table[token, pair].item() - turn) < 1e-14


def test_udit_blocks_of_real_size_fuse_to_float32_accuracy():
    """Blocks of the published width lose no accuracy when their kernels are fused."""
    torch.manual_seed(0)
    shape = dict(input_size=16, in_channels=CHANNELS, num_classes=CLASSES)
    model = randomise(UDiT(dim=96, depths=(1, 1, 1, 1, 1), **shape))
    assert relative_error_of_eval(model) <= 1e-5


def test_uvit_skips_are_taken_last_first():
    """An out-block takes the output of its mirror among the in-blocks."""
    model = randomise(network("uvit_l_2"))
    outputs = []
    skips = []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: skips.append(args[1]))
    model(*inputs(6))
    assert len(outputs) == len(skips) == 2
    assert all(torch.equal(skip, out) for skip, out in zip(skips, reversed(outputs), strict=True))


def test_uvit_starts_as_published():
    """Weights start with a deviation of 0.02, labels with 1, and biases at zero."""
    torch.manual_seed(0)
    model = backbones.build("uvit_l_2", depth=2)

    # A layer of every kind, and the position embedding.
    middle = model.mid_block
    for weight in (
        middle.attn.qkv.weight,
        middle.mlp.fc2.weight,
        model.out_blocks[0].skip_linear.weight,
        model.decoder_pred.weight,
        model.pos_embed,
    ):
        assert abs(weight.std() / 0.02 - 1) < 0.02
    assert model.pos_embed.requires_grad
    assert abs(model.label_emb.weight.std() - 1) < 0.02

    # Every bias.
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert not any(layer.bias.any() for layer in linears if layer.bias is not None)


def test_uvit_without_its_conv_head_ends_with_the_patches():
    """The convolution of the head is applied to what the network without it returns."""
    with_head = randomise(network("uvit_l_2"))
    state = with_head.state_dict()
    without = network("uvit_l_2", conv_head=False)
    rest = {key: value for key, value in state.items() if not key.startswith("final_layer")}
    without.load_state_dict(rest, strict=True)
    out = without(*inputs(6))
    assert torch.equal(with_head(*inputs(6)), with_head.final_layer(out))
