"""Traced memory beside PyTorch's profiler, which hears the allocator, on networks of odd sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones import kernels
from backbones.kernels import rows
from experiments.declared.protocols import IMAGENET256, IMAGENET512
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.efficiency.memory import (
    Settings,
    network_id,
    read_needs,
    split_needs,
)
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train
from experiments.engine.specs.stages import train_stage
from experiments.engine.timing.memory.gpu import as_on_gpu
from experiments.engine.timing.memory.live import Storages, frees_at_once
from experiments.engine.timing.memory.measure import measure_peak
from experiments.engine.timing.memory.predict import write_all
from experiments.engine.timing.memory.trace import (
    build_meta,
    replace_by_fakes,
    trace_fake,
    trace_needs,
    trace_step,
)
from experiments.engine.training.trainer import Trainer
from experiments.main_results import DICO_H, DICO_XL, DIT_XL

DATA = Data("random", 12, 3, 5)
NETWORKS = {
    "dit_s_2": dict(dim=60, depth=2, heads=3),
    "dico_s": dict(dim=24, depths=(1, 1, 2, 1, 1)),
    "dic_s": dict(dim=20, depths=(2, 1, 1, 1, 2)),
}


def training(name: str, precision: str = "fp32", batch: int = 5, **options: object) -> Train:
    shape = dict(input_size=12, in_channels=3, num_classes=5)
    backbone = Backbone(name, NETWORKS.get(name, {}) | shape | options)
    return Train(backbone, DATA, Recipe(steps=2, batch=batch, precision=precision))


def measure(train: Train, recompute: bool) -> int:
    """Return the most bytes that the allocator gave to a step at once, by its own records."""
    trainer = Trainer(train, Resources(recompute=recompute))
    data = train.data
    x0 = torch.zeros(train.recipe.batch, data.channels, data.size, data.size)
    inputs = trainer.draw(0, x0, torch.zeros(len(x0), dtype=torch.long), False, trainer.shard)
    # Images and times lie there before.
    before = sum(x.nbytes for x in (x0, *inputs[1:]))
    return before + measure_peak(lambda: trainer.forward_backward(*inputs))


# Of what takes long, two combinations that differ in everything are fast.
FAST = (("dit_s_2", "fp32", False), ("dico_s", "bf16", True))
COMBINED = [
    pytest.param(*combination, marks=[] if combination in FAST else [pytest.mark.slow])
    for combination in itertools.product(("dit_s_2", "dico_s"), ("fp32", "bf16"), (False, True))
]


@pytest.mark.parametrize(("name", "precision", "recompute"), COMBINED)
def test_a_traced_peak_is_what_the_allocator_gave(name: str, precision: str, recompute: bool):
    train = training(name, precision)
    with kernels.use(**kernels.references()):
        measured = measure(train, recompute)
        traced = trace_fake(train, 5, recompute, as_gpu=False).peak
    assert traced == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["dit_s_2", "dico_s"])
def test_the_model_is_what_a_cpu_takes_for_networks_of_size_s(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
):
    """The model has no passes in C, which keep up to 15 % less for the way back."""
    train = train_stage(Row(name, Backbone(name)), IMAGENET256, seed=0)
    train = replace(train, recipe=replace(train.recipe, batch=4))
    parts = split_needs(trace_needs(train, recompute), Settings(), 4)
    predicted = parts.gradients + parts.activations
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with_passes = measure(train, recompute)
        monkeypatch.setattr(rows, "_shares_torchs_threads", lambda: False)
        measured = measure(train, recompute)
    finally:
        torch.set_num_threads(threads)
    assert predicted == pytest.approx(measured, rel=0.1)
    assert 0.85 * predicted < with_passes < 1.1 * predicted


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("dit_s_2", True), ("dico_s", False), pytest.param("dic_s", True, marks=pytest.mark.slow)],
)
def test_fake_tensors_leave_the_trace_of_real_ones(name: str, recompute: bool):
    train = training(name)
    with kernels.use(**kernels.references()):
        real = trace_step(Trainer(train, Resources(recompute=recompute)))
        fake = trace_fake(train, 5, recompute, as_gpu=False)
    assert fake == real


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "recompute"), COMBINED)
def test_lines_hold_for_every_number_of_images(name: str, precision: str, recompute: bool):
    """Each number of images is traced by itself; gradients come, or lie there before."""
    train = training(name, precision)
    needs = trace_needs(train, recompute)
    for images in (1, 7):
        trace = trace_fake(train, images, recompute)
        parts = split_needs(needs, Settings(), images)
        assert parts.gradients + parts.activations == trace.peak


def test_blocks_that_are_computed_again_need_less():
    kept, recomputed = (trace_needs(training("dit_s_2", depth=5), x) for x in (False, True))
    settings = Settings(accumulates=True)
    activations = [split_needs(x, settings, 8).activations for x in (kept, recomputed)]
    assert activations[1] < 0.5 * activations[0]


def test_states_are_those_of_a_trainer_after_a_step():
    train = training("dico_s")
    trainer = Trainer(train, Resources())
    trace_step(trainer)
    trainer.optimizer.step()
    parts = split_needs(trace_needs(train, recompute=False), Settings(), 5)
    assert parts.parameters == sum(p.nbytes for p in trainer.model.parameters())
    assert parts.averages == sum(p.nbytes for p in trainer.ema.parameters())
    assert parts.gradients == sum(p.grad.nbytes for p in trainer.model.parameters())
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]
    assert parts.optimiser == sum(x.nbytes for x in moments)


@pytest.mark.parametrize(
    "name",
    [
        "dico_s",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("dit_s_2", "dig_s_2", "uvit_l_2")),
    ],
)
def test_the_rules_of_a_gpu_keep_what_a_fake_gpu_keeps(name: str):
    """A fake GPU has CUDA's own autocast, and no backward pass; attention is written out."""
    kept = []
    for device in ("cuda", "cpu"):
        model = build_meta(training(name, **({} if name in NETWORKS else dict(dim=48, heads=3))))
        with FakeTensorMode(), as_on_gpu(), kernels.use(attention="reference"):
            replace_by_fakes([model], torch.device(device))
            x = torch.zeros(5, 3, 12, 12, device=device)
            t = torch.zeros(5, dtype=torch.long, device=device)
            storages = Storages([*model.parameters(), *model.buffers(), x, t])
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                with frees_at_once(), storages:
                    out = model.train()(x, t, t)
            finally:
                torch.set_autocast_enabled(device, False)
            kept.append(storages.alive_bytes)
            torch.clear_autocast_cache()
            assert out.requires_grad
    assert kept[1] == pytest.approx(kept[0], rel=0.03)


def test_what_is_traced_is_kept_and_not_traced_again(tmp_path: Path):
    told: list[str] = []
    trainings = [training("dit_s_2", mode, depth=1) for mode in ("fp32", "fp32")]
    write_all(trainings, tmp_path, told.append)
    write_all(trainings, tmp_path, told.append)
    assert told == ["dit_s_2 at 12x12, fp32"]
    name = network_id(trainings[0].backbone)
    assert list(read_needs(tmp_path)) == [(name, "fp32", False), (name, "fp32", True)]


def test_what_is_not_traced_is_refused():
    aligned = replace(training("dit_s_2"), data=replace(DATA, captions="0" * 64))
    with pytest.raises(ValueError, match="only trainings that hold one network"):
        trace_needs(aligned, recompute=False)
    with pytest.raises(ValueError, match="a multiple of 241"):
        trace_needs(training("dit_s_2", dim=964, heads=2, depth=1), recompute=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "protocol", "images"),
    [(DICO_H, IMAGENET256, 32), (DICO_XL, IMAGENET512, 8), (DIT_XL, IMAGENET256, 16)],
    ids=["DiCo-H", "DiCo-XL at 512", "DiT-XL/2"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_committed_lines_are_those_of_fake_traces(row, protocol, images: int, precision: str):
    train = train_stage(row, protocol, seed=0)
    train = replace(train, recipe=replace(train.recipe, precision=precision))
    known = read_needs(REPOSITORY / "results")
    for recompute in (False, True):
        needs = known[network_id(train.backbone), precision, recompute]
        parts = split_needs(needs, Settings(), images)
        traced = trace_fake(train, images, recompute).peak
        assert parts.gradients + parts.activations == pytest.approx(traced, rel=0.1)
