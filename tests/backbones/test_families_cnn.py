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
    for stages in (model.enc_blocks, model.lat_blocks, model.dec_blocks):
        for affine in (block["conv"].affine[1] for stage in stages for block in stage):
            bound = math.sqrt(6 / sum(affine.weight.shape))
            assert 0.99 * bound < affine.weight.abs().max() <= bound
            assert not affine.bias.any()
    zero = {
        key
        for key, value in model.state_dict().items()
        if key.endswith("weight") and not value.any()
    }
    assert zero == {"final_layer.out_proj.weight", "final_layer.adaLN_modulation.1.weight"}


def test_dic_skips_join_every_third_block_counted_from_the_bottleneck():
    model = randomise(network("dic_s", depths=(7, 4, 2, 5, 8)))
    made = {}
    taken = {}
    for stage in (0, 1):
        for i, block in enumerate(model.enc_blocks[stage]):
            block["conv"].register_forward_hook(
                lambda module, args, out, at=(stage, i): made.update({at: out})
            )
        for i, block in enumerate(model.dec_blocks[1 - stage]):
            block["conv"].register_forward_pre_hook(
                lambda module, args, at=(stage, i): taken.update({at: args[0]})
            )
    model(*inputs(8))
    widths = {stage: made[stage, 0].shape[1] for stage in (0, 1)}
    joined = {at: x[:, widths[at[0]] :] for at, x in taken.items() if x.shape[1] > widths[at[0]]}
    sources = {
        at: [
            source
            for source, out in made.items()
            if out.shape == skip.shape and torch.equal(out, skip)
        ]
        for at, skip in joined.items()
    }
    assert sources == {
        (1, 0): [(1, 3)],
        (1, 3): [(1, 0)],
        (0, 0): [(0, 6)],
        (0, 3): [(0, 3)],
        (0, 6): [(0, 0)],
    }


def relative_error_of_eval(model: nn.Module) -> float:
    """Fused against spelled-out, on the same weights."""
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
    model = randomise(network("udit_s"), seed=0).eval()
    other = randomise(network("udit_s"), seed=1)
    x, t, y = inputs(16)
    with torch.no_grad():
        stale = model(x, t, y)
        if change == "copy":
            model = copy.deepcopy(model)
        if change == "cast":
            other, model, x = other.double(), model.double(), x.double()
        if change == "write":
            torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 1.0)
        else:
            model.load_state_dict(other.state_dict(), assign=change == "replace")
        assert (
            relative_rms(model(x, t, y), other(x, t, y))
            <= 1e-5
            < relative_rms(stale, other(x, t, y))
        )


def test_udit_attends_within_a_sub_grid():
    torch.manual_seed(0)
    attention = DownsampledAttention(16, heads=2)
    nn.init.zeros_(attention.downsampler["layer"].weight)
    x = torch.randn(1, 16, 8, 12)
    rotation = rotary_table((4, 6), 8, like=x)
    moved = x.clone()
    moved[:, :, 5, 2] += 1
    with torch.no_grad():
        changed = (attention(moved, rotation) - attention(x, rotation)).abs().amax(dim=1)[0] > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(changed, expected)


def test_udit_turns_pairs_by_column_and_row_in_turn():
    table = rotary_table((2, 3), 8, like=torch.zeros(1, dtype=torch.float64))
    for token in range(6):
        row, column = divmod(token, 3)
        for pair, position in enumerate((column, row, column, row)):
            angle = position * 10000 ** (-4 * (pair // 2) / 8)
            assert (
                abs(table[token, pair].item() - complex(math.cos(angle), math.sin(angle))) < 1e-14
            )


def test_udit_blocks_of_real_size_fuse_to_float32_accuracy():
    torch.manual_seed(0)
    model = randomise(
        UDiT(
            dim=96, depths=(1, 1, 1, 1, 1), input_size=16, in_channels=CHANNELS, num_classes=CLASSES
        )
    )
    assert relative_error_of_eval(model) <= 1e-5


def test_uvit_skips_are_taken_last_first():
    model = randomise(network("uvit_l_2"))
    made = []
    taken = []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, out: made.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: taken.append(args[1]))
    model(*inputs(6))
    assert len(made) == len(taken) == 2
    assert all(torch.equal(a, b) for a, b in zip(made, reversed(taken), strict=True))


def test_uvit_starts_as_published():
    torch.manual_seed(0)
    model = backbones.build("uvit_l_2", depth=2)
    middle = model.mid_block
    for weight in (
        middle.attn.qkv.weight,
        middle.mlp.fc2.weight,
        model.out_blocks[0].skip_linear.weight,
        model.decoder_pred.weight,
        model.pos_embed,
    ):
        assert abs(weight.std() / 0.02 - 1) < 0.02
    assert abs(model.label_emb.weight.std() - 1) < 0.02
    assert model.pos_embed.requires_grad
    assert not any(
        layer.bias.any()
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None
    )


def test_uvit_without_its_conv_head_ends_with_the_patches():
    with_head = randomise(network("uvit_l_2"))
    without = network("uvit_l_2", conv_head=False)
    state = {
        key: value
        for key, value in with_head.state_dict().items()
        if not key.startswith("final_layer")
    }
    without.load_state_dict(state, strict=True)
    out = without(*inputs(6))
    assert torch.equal(with_head(*inputs(6)), with_head.final_layer(out))
