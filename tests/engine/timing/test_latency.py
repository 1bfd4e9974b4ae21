"""Latency of single passes, and the memory of inference beside what was traced without running."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backbones import build, kernels
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Cost, Latency, Timing
from experiments.engine.timing import clock
from experiments.engine.timing.inference import latency
from experiments.engine.timing.inference.latency import measure_latency
from experiments.engine.timing.inference.trace import trace_inference, trace_passes
from experiments.engine.timing.networks import draw_network, list_networks, size_backbone
from experiments.engine.timing.tasks import Task
from tests.support.timing import CPU, DICO, DIT, declare_timing, hear_calls

KEYS = {
    "latency_s",
    "latency_p95_s",
    "passes",
    "stable",
    "weights_bytes",
    "peak_memory_bytes_one",
    "peak_memory_bytes_batch",
    "matmul_tf32",
    "cudnn_tf32",
    "autocast",
    "cudnn_benchmark",
    "memory_format",
    "one_condition",
    "compiled",
    "graphs",
}


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PATIENCE", 0.0)


def test_single_images_are_timed_and_a_full_batch_is_only_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lengths: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lengths.append(len(inputs[0]))

    hear_calls(monkeypatch, note)
    record = execute(Latency(declare_timing(batch=7)), Store(tmp_path), Resources())
    assert record.status == "done", record.error
    assert set(record.values) == KEYS
    assert record.values["passes"] == latency.FEWEST_PASSES
    assert lengths.count(1) > latency.FEWEST_PASSES
    assert set(lengths) == {1, 7}
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "packed"])
def test_the_weights_of_a_packed_network_take_a_byte_for_four(packed: bool):
    options = dict(dim=48, depth=2, heads=3, packed=packed)
    timing = declare_timing(backbone=Backbone("terdit_600m", options))
    values = measure_latency(Latency(timing))
    model = build("terdit_600m", **size_backbone(list_networks(timing)[0]).options)
    tensors = [*model.parameters(), *model.buffers()]
    assert values["weights_bytes"] == sum(x.nbytes for x in tensors)
    assert values["peak_memory_bytes_one"] > values["weights_bytes"]
    assert any(x.dtype == torch.uint8 for x in tensors) == packed


def test_a_latency_is_the_median_and_the_time_that_19_of_20_passes_stay_within(
    monkeypatch: pytest.MonkeyPatch,
):
    """Stand-ins: nineteen passes take 1 to 19 seconds, and one takes 100."""
    seconds = [100.0, *map(float, range(1, 20))]
    monkeypatch.setattr(clock, "time_call", lambda *args: 1.0)
    left = iter(seconds)
    monkeypatch.setattr(latency, "time_call", lambda *args: next(left))
    values = measure_latency(Latency(declare_timing()))
    assert values["latency_s"] == statistics.median(seconds) == 10.5
    assert 19 < values["latency_p95_s"] < 100


@pytest.mark.parametrize("network", [DIT, DICO], ids=lambda network: network.name)
def test_traced_memory_is_what_the_allocator_gave(network: Backbone):
    """The same operators run here and in the trace, for a system of two networks too."""
    parts = (Cost(DIT, 12, 3, 5),) if network is DICO else ()
    timing = declare_timing(backbone=network, batch=5, parts=parts)
    with kernels.use(**kernels.references()):
        values = measure_latency(Latency(timing))
        networks = [draw_network(size_backbone(each), CPU) for each in list_networks(timing)]
        weights = sum(x.nbytes for network in networks for x in network.state_dict().values())
        for batch, name in ((1, "one"), (5, "batch")):
            traced = weights + trace_passes(timing, batch, as_gpu=False).peak
            assert traced == pytest.approx(values[f"peak_memory_bytes_{name}"], rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_lines_hold_for_every_batch(precision: str):
    timing = declare_timing(backbone=DICO, size=12, channels=3, precision=precision)
    weights, lines = trace_inference(timing)
    for batch in (1, 7, 64):
        assert max(line.at(batch) for line in lines) == trace_passes(timing, batch).peak

    # Autocast keeps the weights of products in bf16, half as wide, beside the others.
    cast = lines[0].fixed / weights
    assert 0.3 < cast <= 0.5 if precision == "bf16" else cast < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit_s_2", "dico_s"])
def test_the_model_is_what_a_cpu_takes_for_networks_of_size_s(name: str):
    """The CPU takes its own operators; at batch 1 these copy weights of convolutions."""
    timing = Timing(Backbone(name), 32, 4, 1000, batch=4, device="cpu")
    weights, lines = trace_inference(timing)
    values = measure_latency(Latency(timing))
    one, batch = (weights + max(line.at(n) for line in lines) for n in (1, 4))
    assert one == pytest.approx(values["peak_memory_bytes_one"], rel=0.1)
    assert batch == pytest.approx(values["peak_memory_bytes_batch"], rel=0.1)
    # Activations alone are within the same bound, so that weights hide nothing.
    activations = values["peak_memory_bytes_batch"] - weights
    assert batch - weights == pytest.approx(activations, rel=0.1)


def test_on_a_gpu_the_peaks_are_those_of_each_batch_alone(monkeypatch: pytest.MonkeyPatch):
    """Stand-ins: a network holds 100 bytes, and a pass takes 10 for every image."""
    memory = {"now": 0, "peak": 0}

    def build_task(network: Cost, spec: Timing, device: torch.device) -> Task:
        memory["now"] = 100
        return Task(lambda: memory.update(peak=100 + 10 * spec.batch))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])

    def no_precision(*args: object) -> AbstractContextManager[None]:
        return nullcontext()

    stand_ins = {
        "check_against_reference": lambda *args: None,
        "free_memory": lambda device: None,
        "build_task": build_task,
        "precision": no_precision,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(latency, name, stand_in)
    for module in (clock, latency):
        monkeypatch.setattr(module, "time_call", lambda call, *rest: call() or 1.0)
    values = measure_latency(Latency(declare_timing(device="cuda", batch=8)))
    assert values["peak_memory_bytes_one"] == 110
    assert values["peak_memory_bytes_batch"] == 180
