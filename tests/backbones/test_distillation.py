"""Students of a U-Net: their start by the published rule, and BK-SDM's losses on known weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.distillation import Mimicked, inherit_weights, mimicked_pairs
from experiments.engine.diffusion.distillation.objective import Distilled
from experiments.engine.diffusion.iddpm import IDDPM
from tests.support.authors import draw_normal
from tests.support.paths import DATA
from tests.support.texts import CASES, draw_weights, inputs_of

LOSSES = json.loads((DATA / "distillation.json").read_text())
TINY = backbones.tiny_options_of("sd_1") | dict(num_classes=3)
TEACHER = TINY | dict(dim=32, num_res_blocks=2, depths=(1, 2, 0))


def unet(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = backbones.build("sd_1", **TEACHER | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def named(name: str) -> nn.Module:
    """Return the network of a case with the weights that diffusers' names seed."""
    diffusers = pytest.importorskip("diffusers")
    case = CASES[name]
    theirs = diffusers.UNet2DConditionModel(**case["diffusers"])
    state = draw_weights(theirs.state_dict(), theirs, case["gain"])
    model = backbones.build(case["name"], **case["options"])
    model.load_state_dict(model.from_checkpoint(state))
    return model.eval()


@pytest.mark.slow
def test_losses_are_those_of_the_authors_code():
    """The published terms between two networks with known weights, by diffusers' outputs."""
    teacher, student = named("sd15"), named("bk_small")
    x, t, text = inputs_of(CASES["sd15"])
    noise = draw_normal(17, tuple(x.shape)).float()
    process = Distilled(IDDPM.linear(), teacher, Mimicked.BLOCKS)
    with torch.no_grad():
        own, features = process.training_entry(student)(x, t, text)
        wanted, wanted_features = process.entry(x, t, text)

    def error(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().item()

    assert error(own, noise) == pytest.approx(LOSSES["task"], rel=1e-4)
    assert error(own, wanted) == pytest.approx(LOSSES["output"], rel=1e-4)
    errors = [error(*pair) for pair in zip(features, wanted_features, strict=True)]
    assert errors == pytest.approx(LOSSES["features"], rel=1e-4)


@pytest.mark.parametrize(
    "options", [dict(), dict(middle=False), dict(multipliers=(1, 1), depths=(1, 1), middle=False)]
)
def test_a_student_starts_from_the_parts_that_it_keeps(options: dict):
    teacher, student = unet(), unet(num_res_blocks=1, **dict(depths=(1, 1, 0)) | options)
    weights = inherit_weights(student, teacher)
    student.load_state_dict(weights)
    source = teacher.state_dict()

    # The first of two blocks stays in the encoder; the first and the last of three in the decoder.
    removed = 3 - len(student.depths)
    for own, theirs in ((1, 1), (2, 3), (3, 4)):
        name = "0.in_layers.2.weight"
        kept = source[f"input_blocks.{theirs}.{name}".replace("3.0.in_layers.2", "3.0.op")]
        name = f"input_blocks.{own}.{name}".replace("2.0.in_layers.2", "2.0.op")
        assert torch.equal(weights[name], kept)
    for own, theirs in ((0, 0), (1, 2), (2, 3), (3, 5)):
        name = "0.in_layers.2.weight"
        assert torch.equal(
            weights[f"output_blocks.{own}.{name}"],
            source[f"output_blocks.{theirs + 3 * removed}.{name}"],
        )

    # Of two transformer blocks, the first stays.
    first = "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(weights[first], source[first.replace("blocks.3", "blocks.4", 1)])


@pytest.mark.parametrize("mimicked", Mimicked)
def test_only_the_student_learns_and_its_features_fit_the_teachers(mimicked: Mimicked):
    teacher, student = unet(), unet(num_res_blocks=1, depths=(1, 1, 0), middle=False)
    process = Distilled(IDDPM.linear(), teacher, mimicked)
    entry = process.training_entry(student)
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 3])
    eps = torch.randn(2, 4, 16, 16)
    process.process = IDDPM(process.process.betas, torch.arange(1000), learned=False)
    losses = process.losses(entry, x, y, t, eps)
    assert losses["loss"].shape == (2,)
    expected = losses["task"] + losses["output"] + losses["feature"]
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    number = len(mimicked_pairs(student, teacher, mimicked))
    assert number == {Mimicked.BLOCKS: 6, Mimicked.SELF_ATTENTION: 6}[mimicked]

    # Hooks are gone after the call, and a student that equals its teacher has nothing to match.
    assert not any(module._forward_hooks for module in student.modules())
    twin = unet()
    twin.load_state_dict(teacher.state_dict())
    losses = process.losses(process.training_entry(twin), x, y, t, eps)
    assert losses["feature"].max() < 1e-9 and losses["output"].max() < 1e-9


def test_a_student_without_its_innermost_level_matches_before_the_residual():
    teacher = unet(depths=(1, 1, 1))
    student = unet(num_res_blocks=1, multipliers=(1, 1), depths=(1, 1), middle=False)
    pairs = mimicked_pairs(student, teacher, Mimicked.BLOCKS)
    assert pairs[-1] == (
        student.input_blocks[3][1].proj_out,
        teacher.input_blocks[5][1].proj_out,
    )
    assert len(pairs) == 4


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (lambda: unet(), lambda: unet(num_res_blocks=1), "exchange student and teacher"),
        (lambda: unet(dim=64), lambda: unet(), "give both the same widths"),
        (lambda: unet(), lambda: nn.Linear(1, 1), "not from Linear to TextUNet"),
    ],
)
def test_what_is_no_student_is_refused(student, teacher, words: str):
    with pytest.raises(ValueError, match=words):
        inherit_weights(student(), teacher())
