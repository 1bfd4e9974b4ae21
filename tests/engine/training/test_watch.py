"""What a training tells of its network's blocks, and of the step at which it diverged."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.engine.data.sets import load
from experiments.engine.numerics.network_parts import list_parts
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.specs.spec import Recipe, Train
from experiments.engine.training import stage as training_stage
from experiments.engine.training import trainer as training_trainer
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from experiments.engine.training.watch.blocks import Watch
from experiments.engine.training.watch.divergence import Diverged
from tests.support.trainings import DIGITS, FAMILIES

SPEC = Train(FAMILIES["dit"], DIGITS, Recipe(steps=4, batch=8, lr=1e-3))
BF16 = replace(SPEC, recipe=replace(SPEC.recipe, precision="bf16"))
# Above bfloat16's largest number, below float32's.
HIGH = 3.4e38


@pytest.fixture
def change_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Changes every network that a training builds."""
    build = training_trainer.build

    def change(how: Callable[[Any], None]) -> None:
        def changed(*arguments: Any) -> nn.Module:
            network = build(*arguments)
            with torch.no_grad():
                how(network)
            return network

        monkeypatch.setattr(training_trainer, "build", changed)

    return change


class ZeroRoot(nn.Module):
    """Add a root of zero, whose gradient is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x).sqrt()


def diagnose(spec: Train, folder: Path, watch_every: int = 0) -> tuple[str, dict[str, Any]]:
    """Return message and diagnosis of a training that diverges."""
    context = RunContext(folder, Resources(watch_every=watch_every, micro_batch=4))
    with pytest.raises(Diverged) as failure:
        run_training(spec, context)
    return str(failure.value), failure.value.values["diagnosis"]


# ---- The step that diverged


def test_an_overflow_in_bf16_names_its_module_and_that_fp32_is_finite(
    change_network: Callable[..., None], tmp_path: Path
):
    change_network(lambda network: network.blocks[1].attn.proj.bias.fill_(HIGH))
    message, diagnosis = diagnose(BF16, tmp_path)
    assert diagnosis["step"] == 1 and diagnosis["parameter"] is None
    assert diagnosis["passes"]["fp32"] == {"is_finite": True}

    # The first pass is of four images, and each of them meets the module.
    found = diagnosis["passes"]["bf16"]
    assert (found["module"], found["direction"]) == ("blocks.1.attn.proj", "forward")
    assert len(found["images"]) == len(found["times"]) == 4
    first = torch.zeros(4, 1, 8, 8), torch.zeros(4), False, slice(0, 4)
    times = Trainer(SPEC).draw(0, *first)[2]
    assert found["times"] == sorted(times.tolist())
    assert message.startswith("the loss is nan at step 1; lower the learning rate")
    assert "; run again: in bf16 blocks.1.attn.proj is the first whose output" in message
    assert message.endswith("; fp32 is finite")


def test_a_module_inside_which_values_overflow_is_named_itself(
    change_network: Callable[..., None], tmp_path: Path
):
    class Overflow(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * HIGH * HIGH)

    def wrap(network: Any) -> None:
        network.blocks[0].mlp = Overflow(network.blocks[0].mlp)

    # Both precisions say so, and name no part of the MLP.
    change_network(wrap)
    _, diagnosis = diagnose(BF16, tmp_path)
    modules = {mode: found["module"] for mode, found in diagnosis["passes"].items()}
    assert modules == dict.fromkeys(("bf16", "fp32"), "blocks.0.mlp")


def test_a_batch_that_is_not_finite_names_its_images_in_both_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = load(DIGITS)
    batch = training_stage.batch_indices(len(images), 8, 0, 2).tolist()
    take = type(images).take

    def spoilt(self: Any, indices: Any, *further: Any) -> Any:
        x, *others = take(self, indices, *further)
        x = x.clone()
        x[torch.as_tensor(indices) == batch[5]] = math.inf
        return x, *others

    # The image is the sixth of the third step, and so in its second pass.
    monkeypatch.setattr(type(images), "take", spoilt)
    message, diagnosis = diagnose(BF16, tmp_path)
    assert diagnosis["step"] == 3 and "at step 3;" in message
    for mode in ("bf16", "fp32"):
        found = diagnosis["passes"][mode]
        assert not found["is_finite"] and found["module"] == "images"
        assert found["images"] == [batch[5]] and len(found["times"]) == 1


def test_a_gradient_that_is_not_finite_ends_the_run_where_it_is_seen(
    change_network: Callable[..., None], tmp_path: Path
):
    def wrap(network: Any) -> None:
        network.blocks[0].mlp = nn.Sequential(network.blocks[0].mlp, ZeroRoot())

    # A watched step knows the norm of its gradient.
    change_network(wrap)
    message, diagnosis = diagnose(SPEC, tmp_path / "watched", watch_every=1)
    assert message.startswith("the gradient is not finite at step 1;")
    found = diagnosis["passes"]["fp32"]
    assert (found["module"], found["direction"]) == ("blocks.0.mlp.0.fc2", "backward")
    assert diagnosis["parameter"] is None

    # Without that, the weights are lost before the loss shows it.
    message, diagnosis = diagnose(SPEC, tmp_path / "unwatched")
    assert message.startswith("the loss is nan at step 2;")
    assert diagnosis["parameter"] is not None
    assert f"(first {diagnosis['parameter']})" in message


def test_a_bad_step_and_all_after_it_change_no_weight(monkeypatch: pytest.MonkeyPatch):
    passes = Trainer._forward_backward
    undisturbed = Trainer(SPEC)
    stepping = undisturbed.steps(load(DIGITS))
    next(stepping), next(stepping)

    def spoilt(self: Trainer, *inputs: Tensor) -> Tensor:
        loss = passes(self, *inputs)
        return loss * math.nan if self.step == 2 else loss

    # Two good steps, a bad one, and a good one that comes too late.
    monkeypatch.setattr(Trainer, "_forward_backward", spoilt)
    trainer = Trainer(SPEC)
    assert len(list(trainer.steps(load(DIGITS)))) == 4
    assert trainer.freeze.step == 2
    assert digest(trainer.model) == digest(undisturbed.model)


# ---- Looks at the blocks


def test_looks_tell_norms_and_values_and_change_no_bit():
    plain = Trainer(SPEC, Resources(watch_every=0))
    losses = torch.stack(list(plain.steps(load(DIGITS))))
    watched = Trainer(SPEC, Resources(watch_every=2, micro_batch=None))
    heard: dict[str, list[Tensor]] = {}
    for name, part in list_parts(watched.model).items():
        part.register_forward_hook(lambda _, __, y, name=name: heard.setdefault(name, []).append(y))
    assert torch.equal(torch.stack(list(watched.steps(load(DIGITS)))), losses)
    assert digest(watched.model) == digest(plain.model)

    # The gradients of the last step are still there, and its pass was the last one.
    assert [look.step for look in watched.looks] == [2, 4]
    line = watched.looks[-1].line()
    assert list(line["blocks"]) == list(list_parts(watched.model))
    assert {"x_embedder", "blocks.0", "blocks.1", "final_layer"} <= set(line["blocks"])
    for name, part in list_parts(watched.model).items():
        gradients = [p.grad.flatten() for p in part.parameters() if p.grad is not None]
        values = line["blocks"][name]
        assert values["gradient_norm"] == pytest.approx(torch.cat(gradients).norm().item(), 1e-5)
        assert values["largest"] >= heard[name][-1].abs().max().item() * (1 - 1e-5)
        assert values["saturated"] == 0
    total = torch.cat([p.grad.flatten() for p in watched.model.parameters() if p.grad is not None])
    assert line["gradient_norm"] == pytest.approx(total.norm().item(), 1e-5)


def test_saturated_values_are_counted_by_the_type_and_the_bounds():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()
            self.head = nn.Identity()
            self.weight = nn.Linear(1, 1)

    # Sigmoids of 8 are bounds to bfloat16 but not to float32; half of the range is 1.7e38.
    network = Gate()
    x = torch.tensor([-200.0, -8.0, 0.0, 3.0, 8.0])
    for dtype, share in ((torch.bfloat16, 3 / 5), (torch.float32, 1 / 5)):
        look = Watch(network).look(1, lambda dtype=dtype: network.gate(x.to(dtype)))
        assert look.line()["blocks"]["gate"]["saturated"] == pytest.approx(share)
    for dtype, high in ((torch.float16, 4e4), (torch.bfloat16, 2e38), (torch.float32, 2e38)):
        values = torch.tensor([1.0, -high, high / 4, 0.0]).to(dtype)
        look = Watch(network).look(1, lambda values=values: network.head(values))
        blocks = look.line()["blocks"]
        assert blocks["head"]["saturated"] == 1 / 4
        assert blocks["head"]["largest"] == pytest.approx(high, rel=1e-2)
        assert blocks["weight"] == {"gradient_norm": 0, "largest": 0, "saturated": 0}

    # What is not finite is nothing that JSON has a number for.
    look = Watch(network).look(1, lambda: network.head(torch.tensor([math.nan, 1.0])))
    assert look.line()["blocks"]["head"]["largest"] is None


def test_a_run_keeps_its_looks_in_a_file_beside_the_log(tmp_path: Path):
    path = tmp_path / "blocks.jsonl"
    path.write_text('{"step": 9, "gradient_norm": 1, "blocks": {}}\n')
    run_training(SPEC, RunContext(tmp_path, Resources(watch_every=2)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["blocks"]["blocks.1"]["gradient_norm"] > 0


def test_a_look_costs_less_than_a_hundredth_of_the_steps_between_two():
    """At the usual interval a look may cost two steps. It costs less than one."""
    trainer = Trainer(replace(SPEC, recipe=replace(SPEC.recipe, steps=99)), Resources())
    usual = trainer.watch_every
    steps = trainer.steps(load(DIGITS))

    def seconds(every: int) -> float:
        trainer.watch_every = every
        start = time.perf_counter()
        next(steps)
        return time.perf_counter() - start

    # Steps with and without a look, in turn.
    seconds(1), seconds(0)
    pairs = [(seconds(1), seconds(0)) for _ in range(7)]
    watched, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert watched / plain - 1 < usual / 100
