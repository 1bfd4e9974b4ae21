"""What is particular to DiMR: the authors' outputs, branches, rounded depths and norms of time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.time_norms import TimeLayerNorm, TimeParameter, TimeRMSNorm
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import count_backbone
from tests.support.authors import (
    CASES,
    build_like_authors,
    digest_shapes,
    inputs_of,
    largest_error,
)
from tests.support.networks import randomise

AUTHORS = {name: case for name, case in CASES.items() if name.startswith("dimr")}
SHAPE = dict(in_channels=3, num_classes=7)


def network(name: str = "dimr_xl_2r", **options: Any) -> nn.Module:
    size = dict(input_size=12)
    return backbones.build(name, **backbones.tiny_options_of(name) | SHAPE | size | options)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 37, 1000]), torch.tensor([0, 3, 7])


@pytest.mark.parametrize("case", AUTHORS.values(), ids=AUTHORS)
def test_outputs_of_all_branches_are_those_of_the_authors_code(case: dict[str, Any]):
    model = build_like_authors(case)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    assert digest_shapes(model.state_dict()) == case["digest"]

    x, t, y = inputs_of(case)
    with torch.no_grad():
        *low, out = model.multiscale(x, t, y)
        same_t, unlabelled = model(x, t[1].expand(2), y), model(x, t, torch.full_like(y, 7))
    ours = dict(output=out, same_t=same_t, cfg=out + 0.4 * (out - unlabelled))
    ours |= {f"low{index}": value for index, value in enumerate(low)}
    for name, values in case["outputs"].items():
        assert largest_error(ours[name], case, values) < case["tolerance"], name


@pytest.mark.parametrize("name", ["dimr_xl_2r", "dimr_xl_3r"])
def test_heads_of_low_branches_can_be_left_out(name: str):
    """They serve the multi-scale loss alone, so the prediction keeps every bit."""
    model = randomise(network(name))
    without = network(name, low_heads=False)
    state = model.state_dict()

    # A checkpoint loses the heads of all branches but the last one's.
    kept = without.from_checkpoint(state)
    dropped = sorted(state.keys() - kept.keys())
    last = f"stages.{len(model.stages) - 1}."
    heads = {key for key in state if ".output_layer." in key}
    assert dropped == sorted(key for key in heads if not key.startswith(last))
    without.load_state_dict(kept, strict=True)
    assert model.from_checkpoint(state) == state

    # The prediction is the last branch's output, with and without the others.
    with torch.no_grad():
        outputs = model.multiscale(*inputs())
        assert [output.shape[-1] for output in outputs] == [12 // p for p in model.patches]
        assert torch.equal(without(*inputs()), outputs[-1])
        assert torch.equal(model(*inputs()), outputs[-1])
    assert len(without.multiscale(*inputs())) == 1


def test_the_multi_scale_loss_trains_every_parameter():
    model = randomise(network("dimr_xl_3r"))
    sum(output.square().mean() for output in model.multiscale(*inputs())).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_even_depths_are_rounded_up_as_the_authors_build_them():
    even, odd = network(depths=(4, 2)), network(depths=(5, 3))
    assert digest_shapes(even.state_dict()) == digest_shapes(odd.state_dict())
    assert [len(stage.blocks) for stage in even.stages] == [5, 3]
    assert [len(stage.skip_denses) for stage in even.stages] == [2, 1]
    with torch.device("meta"):
        published = backbones.build("dimr_xl_2r")
    assert [len(stage.blocks) for stage in published.stages] == [39, 21]


def test_exact_multiply_accumulates_in_every_convention():
    """Only the LayerNorms are norms that a counter sees: 11 million elements of XL/2R."""
    counts = count_backbone(Cost(Backbone("dimr_xl_2r"), size=32, channels=4, num_classes=1000))
    assert counts["macs_core"] == 160_176_366_720
    assert round(counts["macs_norms"] / 1e9, 4) == 160.1874

    # The authors' fused attention hides that its queries are scaled.
    queries = 39 * 257 * 960
    assert round((counts["macs_torchprofile"] - queries) / 1e9, 4) == 160.2573


def test_skips_are_taken_last_first_and_come_after_the_stream():
    model = randomise(network(depths=(5, 5)))
    outputs, joined = [], []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, args, out: outputs.append(out))
        for dense in stage.skip_denses:
            dense.register_forward_pre_hook(lambda module, args: joined.append(args[0]))
    model(*inputs())
    for start, places in ((0, [(2, 1), (3, 0)]), (5, [(2, 1), (3, 0)])):
        for stream, skip in places:
            expected = torch.cat([outputs[start + stream], outputs[start + skip]], dim=-1)
            assert torch.equal(joined.pop(0), expected)


def test_a_parameter_of_time_is_param0_when_noisy():
    """The authors' names say no side; exchanged, the outputs would still look plausible."""
    parameter = TimeParameter(4, 1.0)
    nn.init.constant_(parameter.param0, 3.0)
    nn.init.constant_(parameter.nodecay_weight, 99.0)
    values = parameter(torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(values[:, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_norms_keep_their_eps_where_the_authors_have_it():
    """RMS adds 1e-8 to the root, not under it; the LayerNorm has 1e-5 under the root."""
    x = torch.tensor([[1e-8, -1e-8]])
    s = torch.zeros(1)
    torch.testing.assert_close(TimeRMSNorm(2)(x, s), torch.tensor([[0.5, -0.5]]))
    expected = x / (1e-16 + 1e-5) ** 0.5
    torch.testing.assert_close(TimeLayerNorm(2)(x, s), expected, atol=1e-12, rtol=1e-5)


def test_starts_as_published():
    torch.manual_seed(0)
    model = network(dims=(96, 48), hidden=(192, 96))
    state = model.state_dict()
    tables = [key for key in state if "embed" in key or "query_key_value" in key or ".w2.w" in key]
    assert len(tables) == 3 + 3 + 3 + 3
    for key in tables:
        assert abs(state[key].std() / 0.02 - 1) < 0.1, key
    assert not any(value.any() for key, value in state.items() if "nodecay" in key)

    # As p0 = p1, a first step moves no slope and no offset of time.
    sum(output.square().mean() for output in model.multiscale(*inputs())).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.any()) == ("nodecay" not in key), key


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dims=(24,)), ["one number per branch", "dims (24,)", "depths (3, 2)"]),
        (dict(kernel_sizes=(4,)), ["one odd kernel size", "kernel_sizes (4,)"]),
        (dict(patches=(3, 2)), ["divide one another down to 1", "[3, 2]"]),
        (dict(input_size=7), ["divisible by the first", "7"]),
        (dict(heads=5), ["divisible by heads", "24", "5"]),
        (dict(depths=(0, 2)), ["depths of at least 1", "[0, 2]"]),
    ],
)
def test_impossible_branches_are_refused_in_one_line(options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        network(**options)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value
