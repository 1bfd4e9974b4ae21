"""Every family is timed whole, at every task, at the inputs and in the layout that are declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import related
from experiments.declared import timings
from experiments.engine.specs.spec import Cost, Timing
from experiments.engine.timing import networks, tasks
from experiments.engine.timing.networks import LAYOUTS, build_network, draw_inputs, read_layout
from experiments.engine.timing.stage import measure_speed
from tests.support.timing import (
    CPU,
    DICO,
    DIT,
    TOKENS,
    declare_timing,
    every_family,
    hear_calls,
)
from tests.support.tokens import NETWORK, TOKENIZER

SCALES = Timing(NETWORK, 4, 6, 10, 2, "cpu", tokenizer=TOKENIZER.backbone)
FAMILIES = every_family()
# Training and sampling are the same loops for all; the fast tests run them for two families.
EVERY_TASK = [
    pytest.param(
        family,
        what,
        id=f"{family}-{what}",
        marks=[] if what == "forward" or family in ("dico", "uvit") else [pytest.mark.slow],
    )
    for family in FAMILIES
    for what in ("forward", "training", "sampling", "as_published")
]


def test_unknown_tasks_layouts_and_kernels_list_the_known_ones():
    with pytest.raises(ValueError, match="forward, training, sampling"):
        measure_speed(declare_timing(what="everything"))
    with pytest.raises(ValueError, match="channels_last, contiguous"):
        measure_speed(declare_timing(layout="blocked"))
    with pytest.raises(ValueError, match="flash, efficient, rows, sdpa, reference"):
        measure_speed(declare_timing(kernels={"attention": "fast"}))


def test_no_weight_that_matters_is_zero():
    model = build_network(Cost(DIT, 8, 1, 10), declare_timing(), CPU)
    out = model(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))
    assert out.abs().max() > 0


@pytest.mark.parametrize(("what", "batch", "steps"), [("training", 5, 1), ("sampling", 10, 3)])
def test_steps_of_training_and_loops_of_sampling_are_timed_whole(
    what: str, batch: int, steps: int, monkeypatch: pytest.MonkeyPatch
):
    """In sampling, guidance doubles the batch of five."""
    batches: list[int] = []
    hear_calls(monkeypatch, lambda module, inputs: batches.append(len(inputs[0])))
    values = measure_speed(declare_timing(what=what, num_steps=3, batch=5))
    assert values["images_per_s"] > 0
    assert batches.count(batch) >= values["runs"] * values["repeats"] * steps


@pytest.mark.parametrize(("family", "what"), EVERY_TASK)
def test_every_family_is_timed_at_every_task_and_as_published(
    family: str, what: str, one_second_clock: None, monkeypatch: pytest.MonkeyPatch
):
    """The network sees every image of a batch, in sampling with a second one for guidance."""
    shapes: set[tuple[int, ...]] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, t, y = inputs[:3]
        shapes.add((len(x), x.shape[1], len(t), len(y)))

    # Time a task, or the network as it was published.
    hear_calls(monkeypatch, note)
    spec = FAMILIES[family]
    if what == "as_published":
        spec = replace(spec, precision="as_published", layout="contiguous")
    else:
        spec = replace(spec, what=what, num_steps=2)
    values = measure_speed(spec)

    # As published, one condition serves the whole batch unless it becomes tokens.
    one_condition = what == "as_published" and family not in TOKENS
    batch = 4 if what == "sampling" else 2
    conditions = 1 if one_condition else batch
    assert values["images_per_s"] == 2
    assert values["one_condition"] is one_condition
    assert (batch, spec.channels, conditions, conditions) in shapes


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(TOKENS)))
def test_one_condition_for_the_batch_equals_the_same_for_each_image(family: str):
    spec = FAMILIES[family]
    network = Cost(spec.backbone, spec.size, spec.channels, spec.num_classes)
    model = build_network(network, spec, CPU)
    x, t, y = draw_inputs(network, spec, CPU)
    t, y = t[:1], y[:1]
    with torch.inference_mode():
        shared, repeated = model(x, t, y), model(x, t.repeat(2), y.repeat(2))
    assert torch.allclose(shared, repeated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_read_back(
    layout: str, one_second_clock: None, monkeypatch: pytest.MonkeyPatch
):
    """The record holds the layout of the tensors, not the declared word."""
    for module in (networks, tasks):
        monkeypatch.setattr(module, "layout_of", lambda spec: LAYOUTS[layout])
    for what in ("forward", "training", "sampling"):
        spec = declare_timing(backbone=DICO, channels=3, what=what, num_steps=2, layout="declared")
        assert measure_speed(spec)["memory_format"] == layout


def test_tensors_that_lie_in_both_layouts_tell_nothing():
    contiguous = torch.zeros(2, 3, 4, 5)
    channels_last = contiguous.to(memory_format=torch.channels_last)
    one_pixel, one_channel = torch.zeros(2, 3, 1, 1), torch.zeros(2, 1, 4, 5)
    assert read_layout(contiguous, one_pixel) == "contiguous"
    assert read_layout(channels_last, one_channel) == "channels_last"
    assert read_layout(contiguous, channels_last) == "channels_last, contiguous"
    assert read_layout(one_pixel, one_channel) == "any"


# ---- Networks that predict tokens


@pytest.mark.parametrize("what", ["forward", "training", "sampling"])
def test_a_network_that_predicts_tokens_is_timed_at_every_task(what: str, one_second_clock: None):
    """Beside a network that predicts noise, at an input of its own."""
    spec = replace(SCALES, what=what, num_steps=2, baseline=DIT, baseline_input=(8, 1))
    values = measure_speed(spec)
    assert values["images_per_s"] == 2
    assert values["baseline_images_per_s"] == 2


@pytest.mark.parametrize("task", timings.TASKS)
def test_every_declared_task_of_the_small_network_can_be_timed(task: str, one_second_clock: None):
    """Its baseline predicts noise, and is sampled in several steps."""
    table = related.SMALL_SPEED
    (stage,) = timings.stages(table, [table.row("VAR")], "cpu", task, named=True)
    assert measure_speed(replace(stage, batch=2))["images_per_s"] == 2


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(tokenizer=None), "no diffusion trains or samples"),
        (dict(what="sampling", compile=True), "for a forward pass alone; leave out both"),
    ],
)
def test_timings_of_tokens_that_mean_nothing_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        measure_speed(replace(SCALES, **fields))
