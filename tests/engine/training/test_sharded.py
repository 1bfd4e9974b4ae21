"""Networks that processes share: the losses of one process, checkpoints in parts, their bytes."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from experiments.engine.data.sets import load
from experiments.engine.numerics.parts import gather_state, own_parts
from experiments.engine.reporting.efficiency.memory import Settings, Sharding, split_needs
from experiments.engine.runtime.context import Resources
from experiments.engine.runtime.group import ALONE, Group, join_group
from experiments.engine.runtime.preemption import TRY_AGAIN
from experiments.engine.specs.spec import Backbone, Recipe, Train, spec_id
from experiments.engine.timing.memory.trace import trace_needs
from experiments.engine.training import checkpoint
from experiments.engine.training.averages import load_power_average
from experiments.engine.training.networks import build, load_ema
from experiments.engine.training.optimiser import build_optimizer, load_optimizer
from experiments.engine.training.sharded.files import read_parts, write_parts
from experiments.engine.training.sharded.network import list_sharded, shard_network
from experiments.engine.training.trainer import Trainer
from experiments.engine.training.watch import replay
from tests.support.groups import (
    BOUND,
    TRAIN,
    Fault,
    FaultKind,
    Work,
    declare,
    finished_record,
    run_group,
)
from tests.support.networks import FAMILIES, Case, randomise
from tests.support.trainings import CPU, DIGITS, SHAPE

RECIPE = replace(TRAIN.recipe, grad_clip=0.5, power_snapshots=2, label_dropout=0.2)
SPEC = replace(TRAIN, recipe=RECIPE)
RESOURCES = Resources(checkpoint_every=5, watch_every=4, timeout=BOUND, fully_shard=True)


@dataclass
class Touch:
    """What makes a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self.path)!r}, 'w')",))


def run_folder(root: Path) -> Path:
    return root / "runs" / spec_id(SPEC)


def checkpoints(root: Path) -> list[Path]:
    return sorted((run_folder(root) / "checkpoints").glob("step-*"))


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(root) / name).read_text().splitlines()]


# ---- Folders of parts, written by one process


def state(value: float) -> dict[str, Any]:
    """A state with what a real one holds: nested tensors, counters, plain numbers, no losses."""
    return {
        "model": {"a.weight": torch.full((3, 5), value), "b": torch.full((7,), -value)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(value)}, 11: {"exp_avg": torch.ones(2, 2)}},
            "param_groups": [{"lr": value, "betas": (0.9, 0.99), "params": [0, 11]}],
        },
        "losses": torch.empty(0),
    }


def damage(folder: Path, name: str) -> None:
    (part,) = folder.glob(name)
    part.write_bytes(part.read_bytes()[:-1])


def test_a_folder_of_parts_gives_back_what_it_took(tmp_path: Path):
    checkpoint.save_parts(tmp_path, 10, state(2.0), ALONE)
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    step, loaded = newest
    torch.testing.assert_close(loaded, state(2.0), rtol=0, atol=0)
    assert step == 10


def test_reading_a_folder_runs_none_of_its_code(tmp_path: Path):
    """The list of parts is a pickle, which may name any function."""
    folder = write_parts(tmp_path, {"x": torch.ones(3)}, ALONE)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ValueError, match="do not use this folder"):
        read_parts(folder)
    assert not (tmp_path / "ran").exists()


def test_folders_and_files_replace_each_other(tmp_path: Path):
    for step in (10, 20, 30):
        checkpoint.save_parts(tmp_path, step, state(step), ALONE, milestones=10 if step < 20 else 0)
    checkpoint.save(tmp_path, 40, state(40))
    assert [path.name[5:13] for path in sorted(tmp_path.iterdir())] == ["00000030", "00000040"]
    checkpoint.save_parts(tmp_path, 50, state(50), ALONE, keep=1)
    assert [path.name[5:13] for path in tmp_path.iterdir()] == ["00000050"]


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("__0_0.distcp", Path.unlink, "its part __0_0.distcp is missing"),
        ("__0_0.distcp", None, "its part __0_0.distcp is not what was written"),
        (".metadata", None, "its part .metadata is not what was written"),
        ("manifest.json", Path.unlink, "its manifest.json is missing"),
        ("manifest.json", None, "its manifest.json is not what was written"),
    ],
)
def test_a_lost_or_damaged_part_leads_to_the_checkpoint_before(
    name: str, harm: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for step in (10, 20):
        checkpoint.save_parts(tmp_path, step, state(step), ALONE)
    (folder,) = tmp_path.glob("step-00000020-*")
    if harm:
        harm(folder / name)
    else:
        damage(folder, name)
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None and newest[0] == 10
    assert capsys.readouterr().err == (
        f"warning: checkpoint {folder.name} is damaged ({said}; put it back to resume there); "
        "trying the one before\n"
    )

    # A run that came past it removes it.
    checkpoint.save_parts(tmp_path, 15, state(15), ALONE)
    assert not folder.exists()


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save_parts(tmp_path, 10, state(1), ALONE)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="No space left on device: a checkpoint takes"):
        checkpoint.save_parts(tmp_path, 20, state(2), ALONE)
    assert sorted(tmp_path.iterdir()) == before


def test_moments_of_another_layout_are_laid_out_as_their_weights():
    """A file of parts knows no channels-last weights, and the fused update reads side by side."""
    weights = []
    for is_resumed in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        state: dict[str, Any] = {}
        for _ in range(2):
            optimizer = build_optimizer(conv, RECIPE, is_sharded=False)
            if state and is_resumed:
                for values in state["state"].values():
                    values |= {name: x.contiguous() for name, x in values.items()}
            if state:
                load_optimizer(optimizer, state)
            optimizer.zero_grad()
            conv(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        weights.append(conv.weight)
    assert torch.equal(*weights)


def test_one_process_holds_everything_by_itself():
    trainer = Trainer(SPEC, RESOURCES)
    assert not trainer.is_parted
    assert not any(isinstance(p, DTensor) for p in trainer.model.parameters())


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_a_part_is_used_only_while_its_module_runs(case: Case):
    """Before and after that, its parameters are no numbers here; they are cut in a training."""
    network = randomise(case.build())
    inputs = case.inputs()
    with torch.no_grad():
        expected = network(*inputs)
    seen: set[nn.Parameter] = set()
    for module in list_sharded(network):
        own = [p for p in module.parameters() if p not in seen]
        seen |= set(own)
        kept = [p.detach().clone() for p in own]

        def give(*_: Any, own: list[nn.Parameter] = own, kept: list[Tensor] = kept) -> None:
            for p, values in zip(own, kept, strict=True):
                p.data.copy_(values)

        def take(*_: Any, own: list[nn.Parameter] = own) -> None:
            for p in own:
                p.data.fill_(torch.nan)

        take()
        module.register_forward_pre_hook(give)
        module.register_forward_hook(take)
    with torch.no_grad():
        assert torch.equal(network(*inputs), expected)


def test_a_weight_that_cannot_be_cut_is_refused():
    network = nn.Linear(2, 2)
    network.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="scale of Linear is a single number.*leave out fully_sh"):
        shard_network(network, CPU)


# ---- Trainings by several processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    root = tmp_path_factory.mktemp("alone")
    assert run_group(1, Work(root, SPEC, resources=RESOURCES)) == [0]
    return root


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes that share a network and were stopped after step 7 or 8."""
    root = tmp_path_factory.mktemp("stopped")
    work = Work(root, SPEC, Fault(FaultKind.REQUEUE, 0, 6), resources=RESOURCES)
    assert run_group(2, work) == [TRY_AGAIN] * 2
    return root


def ema_of(root: Path) -> dict[str, Tensor]:
    return load_ema(SPEC, run_folder(root), CPU).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_goes_on_to_the_losses_of_one(
    world_size: int, alone: Path, stopped: Path, tmp_path: Path
):
    root = shutil.copytree(stopped, tmp_path / "results")
    assert all(path.is_dir() for path in checkpoints(root))
    assert run_group(world_size, Work(root, SPEC, resources=RESOURCES)) == [0] * world_size
    assert finished_record(root, SPEC).values["resumed_at"] in (7, 8)

    # Losses, and gradients; a look that no line of the log followed is not kept at a stop.
    losses, expected = ([line["loss"] for line in lines(x, "log.jsonl")] for x in (root, alone))
    assert losses == pytest.approx(expected, rel=1e-4)
    norms, expected_norms = (
        {line["step"]: line["gradient_norm"] for line in lines(x, "blocks.jsonl")}
        for x in (root, alone)
    )
    assert norms.keys() >= {4, 12}
    assert norms == pytest.approx({step: expected_norms[step] for step in norms}, rel=1e-4)

    # What sampling reads: the average, and those that are rebuilt.
    torch.testing.assert_close(ema_of(root), ema_of(alone), rtol=1e-3, atol=1e-5)
    rebuilt = []
    for results in (root, alone):
        model = build(SPEC.backbone, 0, CPU)
        load_power_average(model, SPEC, run_folder(results), 0.1)
        rebuilt.append(model.state_dict())
    torch.testing.assert_close(rebuilt[0], rebuilt[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_lost_a_part_goes_on_from_the_checkpoint_before(stopped: Path, tmp_path: Path):
    root = shutil.copytree(stopped, tmp_path / "results")
    (checkpoints(root)[-1] / "__1_0.distcp").unlink()
    assert run_group(1, Work(root, SPEC)) == [0]
    assert finished_record(root, SPEC).values["resumed_at"] == 5


# ---- What a process holds

ODD = Train(
    Backbone("dit_s_2", dict(dim=60, depth=3, heads=3) | SHAPE),
    DIGITS,
    Recipe(steps=3, batch=6, lr=1e-3, ema=0.5),
)


def measure_step(trainer: Trainer) -> int:
    """Return the most bytes that the allocator gave to the passes of a step at once."""
    x0 = torch.zeros(3, DIGITS.channels, DIGITS.size, DIGITS.size)
    inputs = trainer.draw(1, x0, torch.zeros(3, dtype=torch.long), False, trainer.shard)
    trainer.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.forward_backward(*inputs)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    ordered = sorted(events, key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in ordered))


def hold(group: Group, port: int, work: Work) -> None:
    """Make a step as one of several processes, and note its bytes, weights and a bad step."""
    torch.set_num_threads(1)
    declare(group, port)
    group = join_group("cpu", BOUND)
    trainer = Trainer(ODD, work.resources, group)
    images = load(DIGITS)

    # Weights of another network are taken over, part by part.
    other = build(ODD.backbone, 1, CPU)
    trainer.start_from(other)
    begun = gather_state(trainer.own_state(), keeps=True)
    steps = trainer.steps(images)
    next(steps)
    peak = measure_step(trainer)

    # Bytes after a step.
    parameters = list(trainer.model.parameters())
    moments = [x for values in trainer.optimizer.state.values() for x in values.values() if x.ndim]
    held = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimiser": moments,
        "averages": list(trainer.ema.parameters()),
    }
    sizes = {name: sum(x.nbytes for x in own_parts(tensors)) for name, tensors in held.items()}

    # One process spoils a weight of its own; all of them find it.
    name = "blocks.1.mlp.fc2.weight"
    spoiled = dict(trainer.model.named_parameters())[name]
    if not group.first:
        own_parts([spoiled])[0][-1, -1] = torch.inf
    next(steps)
    found = {
        "peak": peak,
        "bytes": sizes,
        "begun": begun,
        "diagnosis": replay.replay(trainer, images),
    }
    torch.save(found, work.root / f"held-{group.rank}.pt")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("held")
    assert run_group(2, Work(root, ODD, resources=RESOURCES), hold) == [0, 0]
    return [torch.load(root / f"held-{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_a_process_holds_the_bytes_that_the_model_of_memory_says(held: list[dict[str, Any]]):
    parts = split_needs(trace_needs(ODD, recompute=False), Settings(2, Sharding.ALL), 3)
    for each in held:
        for name, nbytes in each["bytes"].items():
            assert nbytes == pytest.approx(getattr(parts, name), rel=0.02), name


@pytest.mark.slow
def test_the_passes_of_a_process_need_what_the_model_of_memory_says(held: list[dict[str, Any]]):
    """The model adds peaks that come one after the other, so it may say more."""
    parts = split_needs(trace_needs(ODD, recompute=False), Settings(2, Sharding.ALL), 3)
    for each in held:
        assert 0.6 < each["peak"] / (parts.gradients + parts.activations) < 1.1


@pytest.mark.slow
def test_a_shared_network_takes_over_weights(held: list[dict[str, Any]]):
    expected = build(ODD.backbone, 1, CPU).state_dict()
    for each in held:
        for name in ("model", "ema"):
            taken = each["begun"][name]
            assert all(torch.equal(taken[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_all_processes_find_what_one_of_them_spoiled(held: list[dict[str, Any]]):
    first, second = (each["diagnosis"] for each in held)
    assert first == second
    assert first["parameter"] == "blocks.1.mlp.fc2.weight"
    assert first["passes"]["fp32"]["module"] == "blocks.1.mlp.fc2"
