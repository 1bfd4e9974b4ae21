"""The kernel benchmark times what it has checked, records it, and counts bytes as declared."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.declared.benchmarks import KERNELS, TARGETS
from experiments.engine.benchmarks import kernel_cases
from experiments.engine.benchmarks.kernel_cases import CASES, make_attention
from experiments.engine.benchmarks.kernels import (
    Result,
    Setup,
    compare,
    measure_kernels,
    record_kernel,
)
from experiments.engine.benchmarks.spec import Kernel
from experiments.engine.records.store import Store
from experiments.engine.timing import ceilings

TOKENS, DIM = 17, 64


@pytest.fixture(autouse=True)
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**16)
    monkeypatch.setattr(kernel_cases, "TOKENS", TOKENS)
    monkeypatch.setattr(kernel_cases, "DIM", DIM)


def test_every_declared_kernel_has_a_case():
    assert list(CASES) == list(KERNELS)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_every_implementation_here_is_checked_timed_and_recorded(tmp_path: Path, mode: str):
    store = Store(tmp_path)
    assert measure_kernels(KERNELS, [mode], Setup("cpu", batch=2, runs=2), store, TARGETS)

    # Every operation has its reference, and its fast paths on a CPU.
    records = store.here.all()
    choices = {(record.spec["op"], record.spec["choice"]) for record in records}
    assert {(name, "reference") for name in KERNELS} <= choices
    assert ("selective_scan", "loop") in choices
    assert ("gated_linear", "chunked") in choices
    assert ("attention", "sdpa") in choices
    for record in records:
        assert (record.kind, record.status) == ("kernel", "done")
        assert record.spec["precision"] == mode
        assert record.provenance["device"] == "cpu"
        assert record.provenance["kernels"] == {record.spec["op"]: [record.spec["choice"]]}
        values = record.values
        assert values["forward_ms"] > 0
        assert values["forward_backward_ms"] > 0
        share = values["gb_per_s"] / values["copy_gb_per_s"]
        assert 0 < values["share_of_copy"] == pytest.approx(share)
        if record.spec["choice"] == "reference":
            assert values["times_as_fast_as_reference"] == 1


def test_bytes_are_those_of_every_tensor_once_each_way():
    values = compare(attention, make_attention(2), limit=1e-4, runs=2)["reference"].values
    # q, k, v, the output and their gradients all have this many bytes.
    tensor = 4 * 2 * (DIM // 64) * TOKENS * 64
    forward, backward = 3 + 1, 3 + 1 + 3
    moved = values["gb_per_s"] * values["forward_backward_ms"] * 1e6
    assert moved == pytest.approx((forward + backward) * tensor)


def test_the_scan_in_triton_is_judged_by_its_share_of_a_copys_bandwidth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    times = dict(forward_ms=1.0, forward_backward_ms=3.0, times_as_fast_as_reference=2.0)
    for choice, bandwidth in (("triton", 2000.0), ("triton", 1999.0), ("loop", 1.0)):
        spec = Kernel("selective_scan", choice, "cpu", 1)
        record_kernel(Store(tmp_path), spec, Result(times | {"gb_per_s": bandwidth}), 5e12, TARGETS)
    reaches, misses, unjudged = capsys.readouterr().out.splitlines()
    assert reaches.endswith("reaches the 40 % asked of it")
    assert misses.endswith("misses the 40 % asked of it")
    assert unjudged.endswith("of a copy's")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, bias=None: 1.01 * reference(q, k, v),
        lambda q, k, v, bias=None: reference(q, k.detach(), v) + 0 * k.sum(),
    ],
    ids=["output", "gradient"],
)
def test_a_wrong_implementation_is_a_failed_record_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong
):
    choices = {"wrong": Choice("wrong", wrong)} | attention.choices
    monkeypatch.setattr(attention, "choices", choices)
    store = Store(tmp_path)
    setup = Setup("cpu", batch=1, runs=2)
    assert not measure_kernels(["attention"], ["fp32"], setup, store, TARGETS)
    record = store.here.latest(Kernel("attention", "wrong", "cpu", 1), status="failed")
    assert record.values == {}
    assert "differs from its reference" in record.error
    assert store.here.latest(Kernel("attention", "sdpa", "cpu", 1)) is not None
