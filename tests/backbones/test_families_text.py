"""The text networks compute what the authors' modules compute, at two scales of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import backbones
from backbones import kernels
from backbones.captions import Text
from backbones.dico_text import DynamicConv, square_above
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import count_backbone
from tests.support.authors import digest_shapes, draw_normal, largest_error
from tests.support.texts import CASES, build_case, draw_weights, guide, inputs_of

OWN = ["uvit_t2i", "mmdit_t2i", "dico_t2i_cross", "dico_t2i_dwc"]
UNETS = ["sdxl", "koala_1b", "koala_700m", "sd15", "bk_small", "bk_tiny"]


@pytest.mark.parametrize("name", OWN)
def test_outputs_and_guidance_are_those_of_the_authors_modules(name: str):
    case = CASES[name]
    model = build_case(case)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    assert (len(state), digest_shapes(state)) == (case["entries"], case["digest"])
    with torch.no_grad():
        assert largest_error(model(*inputs_of(case)), case, case["output"]) < case["tolerance"]
        assert largest_error(guide(case, model), case, case["guided"]) < case["tolerance"]


def diffusers_unet(name: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(**CASES[name]["diffusers"]).eval()


@pytest.mark.parametrize("gain", [0.1, pytest.param(0.15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", UNETS)
def test_a_state_dict_of_diffusers_loads_strictly_and_gives_its_outputs(
    name: str, gain: float, tmp_path
):
    """Weights of diffusers' network load by their names, and give its output."""
    case = CASES[name]
    theirs = diffusers_unet(name)
    state = draw_weights(theirs.state_dict(), theirs, gain)
    theirs.load_state_dict(state)
    assert (len(state), digest_shapes(state)) == (case["entries"], case["digest"])
    torch.save(state, tmp_path / "unet.pt")

    # Our network takes the file.
    model = backbones.build(case["name"], **case["options"]).eval()
    backbones.load_published(model, tmp_path / "unet.pt")
    assert sum(p.numel() for p in model.parameters()) == case["params"]

    # Only some networks take pooled vectors and sizes.
    x, t, text = inputs_of(case)
    added = None
    if text.pooled is not None:
        added = dict(text_embeds=text.pooled, time_ids=text.sizes)
    with torch.no_grad():
        out = model(x, t, text)
        expected = theirs(x, t, text.context, added_cond_kwargs=added).sample
    assert (out - expected).abs().max() < 5e-5
    if gain == case["gain"]:
        assert largest_error(out, case, case["output"]) < case["tolerance"]


@pytest.mark.parametrize("name", ["bk_small", "koala_700m"])
def test_a_state_dict_of_another_model_is_refused_in_a_line(name: str, tmp_path):
    """The base model has layers that the smaller one lacks."""
    torch.save(
        diffusers_unet("sd15" if name == "bk_small" else "sdxl").state_dict(), tmp_path / "x.pt"
    )
    model = backbones.build(CASES[name]["name"], **CASES[name]["options"])
    with pytest.raises(ValueError, match="another model") as refusal:
        backbones.load_published(model, tmp_path / "x.pt")
    assert "\n" not in str(refusal.value)


def test_the_dynamic_convolution_alone_is_algorithm_1():
    """The last of 77 tokens fills the kernel of 9x9; token 0 acts from above and from the left."""
    case = CASES["text_dwconv"]
    part = DynamicConv(2, 2)
    part.mlp = nn.Identity()
    x, context = draw_normal(11, (2, 2, 4, 7)).float(), draw_normal(14, (2, 77, 2)).float()
    taps = part.prepare(context)
    assert taps.shape == (2, 81, 2)
    assert torch.equal(taps[:, 77:], context[:, 76:].expand(-1, 4, -1))
    assert largest_error(part(x, taps), case, case["output"]) < case["tolerance"]


def test_kernels_have_the_smallest_odd_square_of_taps():
    assert [square_above(tokens) for tokens in (1, 2, 9, 10, 16, 25, 77, 81, 82)] == [
        1, 9, 9, 25, 25, 25, 81, 81, 121,
    ]  # fmt: skip


ORDER_MATTERS = {
    "uvit_t2i": True,
    "dico_t2i_dwc": True,
    "mmdit_t2i": False,
    "dico_t2i_cross": False,
}


@pytest.mark.parametrize("name", ORDER_MATTERS)
def test_the_order_of_tokens_matters_where_a_token_has_a_place(name: str):
    case = CASES[name]
    model = build_case(case)
    x, t, text = inputs_of(case)
    with torch.no_grad():
        change = model(x, t, Text(text.context.flip(1))) - model(x, t, text)
    assert bool(change.abs().max() > 1e-2) == ORDER_MATTERS[name]
    assert ORDER_MATTERS[name] or change.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dico_t2i_cross", "dico_t2i_dwc"])
def test_a_fresh_dico_ignores_the_text_and_a_pooled_vector_is_an_option(name: str):
    """Text has no effect before training, and afterwards a pooled vector has one."""
    case = CASES[name]
    model = backbones.build(case["name"], **case["options"] | dict(pooled_dim=6))
    nn.init.normal_(model.final_layer.out_proj.weight)
    x, t, text = inputs_of(case)
    pooled = draw_normal(15, (2, 6)).float()
    with torch.no_grad():
        fresh = model(x, t, text._replace(pooled=pooled))
        assert fresh.any()
        other = model(x, t, Text(text.context.flip(0), pooled.flip(0)))
        assert torch.equal(fresh, other)

        # Open all paths, as a training does.
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        here = model(x, t, text._replace(pooled=pooled))
        there = model(x, t, text._replace(pooled=pooled.flip(0)))
    assert (here - there).abs().max() > 1e-3


# Giga multiply-accumulates by torchprofile's rule, and whether they hold the scaling of queries.
TORCHPROFILE = {
    ("uvit_s_2_t2i", 32): (16.2343, False),
    ("uvit_s_2_deep_t2i", 32): (21.2456, False),
    ("mmdit_t2i", 32): (60.4913, False),
    ("dico_cross_s_t2i", 32): (6.0868, True),
    ("dico_cross_xl_t2i", 32): (123.5221, True),
    ("dico_dwc_s_t2i", 32): (4.9184, True),
    ("dico_dwc_xl_t2i", 32): (94.8266, True),
    ("sd_1", 64): (401.7626, False),
    ("bk_sdm_base", 64): (261.5743, False),
    ("bk_sdm_small", 64): (255.5236, False),
    ("bk_sdm_tiny", 64): (242.8302, False),
    ("koala_700m", 128): (1351.0995, False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), TORCHPROFILE)
def test_the_papers_count_but_for_the_scaling_of_queries(name: str, size: int):
    """The suite counts that scaling everywhere; the modules of these authors do it unseen."""
    scaled = [0]

    def observe(op: str, *args: torch.Tensor) -> None:
        scaled[0] += args[0].numel() if op == "attention" else 0

    with kernels.observing(observe):
        counts = count_backbone(Cost(Backbone(name), size, channels=4, num_classes=1000))
    expected, includes = TORCHPROFILE[name, size]
    ours = counts["macs_torchprofile"] - (0 if includes else scaled[0])
    assert abs(ours / 1e9 - expected) < 1.01e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("dico_cross_s_t2i", 0.3747),
        ("dico_cross_b_t2i", 1.3928),
        ("dico_cross_l_t2i", 5.1736),
        ("dico_cross_xl_t2i", 7.8343),
        ("dico_dwc_s_t2i", 0.4882),
        ("dico_dwc_b_t2i", 1.2717),
        ("dico_dwc_l_t2i", 4.3913),
        ("dico_dwc_xl_t2i", 6.2250),
    ],
)
def test_work_that_a_caption_needs_once_is_counted_apart(name: str, giga: float):
    counts = count_backbone(Cost(Backbone(name), 32, channels=4, num_classes=1000))
    assert abs(counts["macs_once_per_caption"] / 1e9 - giga) < 0.51e-4


def test_networks_of_labels_have_no_such_work():
    counts = count_backbone(Cost(Backbone("dico_s"), 32, channels=4, num_classes=1000))
    assert "macs_once_per_caption" not in counts
