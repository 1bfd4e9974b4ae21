"""The kernel benchmark times what it has checked, records it, and counts bytes as declared."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbones.kernels.attention import attention as op
from backbones.kernels.attention import reference
from backbones.kernels.op import Choice
from experiments import benchmark_kernels
from experiments.benchmark_kernels import CASES, Kernel, attention, compare, run
from experiments.engine.records.store import Store
from experiments.engine.timing import ceilings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**16)
    monkeypatch.setattr(benchmark_kernels, "TOKENS", 17)
    monkeypatch.setattr(benchmark_kernels, "DIM", 64)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_every_implementation_here_is_checked_timed_and_recorded(tmp_path: Path, mode: str):
    store = Store(tmp_path)
    assert run(list(CASES), "cpu", [mode], 2, 2, store)
    found = [record for records in store.here.by_id().values() for record in records]
    assert {
        (record.kind, record.status, record.spec["precision"], record.provenance["device"])
        for record in found
    } == {("kernel", "done", mode, "cpu")}
    choices = {(record.spec["op"], record.spec["choice"]) for record in found}
    assert {(name, "reference") for name in CASES} <= choices and {
        ("selective_scan", "loop"),
        ("gated_linear", "chunked"),
        ("attention", "sdpa"),
    } <= choices
    for record in found:
        values = record.values
        assert record.provenance["kernels"] == {record.spec["op"]: [record.spec["choice"]]}
        assert (
            values["forward_ms"] > 0
            and values["forward_backward_ms"] > 0
            and 0
            < values["share_of_copy"]
            == pytest.approx(values["gb_per_s"] / values["copy_gb_per_s"])
        )
        assert values["times_as_fast_as_reference"] == 1 or record.spec["choice"] != "reference"


def test_bytes_are_those_of_every_tensor_once_each_way():
    found = compare(op, attention(2), 1e-4, 2)["reference"]
    tensor = 4 * 2 * 1 * 17 * 64  # q, k, v, the output and their gradients are alike
    in_forward, in_backward = 3 + 1, 3 + 1 + 3
    assert found["gb_per_s"] * found["forward_backward_ms"] * 1e6 == pytest.approx(
        (in_forward + in_backward) * tensor
    )


def test_the_scan_in_triton_is_judged_by_its_share_of_a_copys_bandwidth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values = dict(forward_ms=1.0, forward_backward_ms=3.0, times_as_fast_as_reference=2.0)
    for choice, bandwidth in (("triton", 2000.0), ("triton", 1999.0), ("loop", 1.0)):
        benchmark_kernels._record(
            Store(tmp_path),
            Kernel("selective_scan", choice, "cpu", 1),
            values | {"gb_per_s": bandwidth},
            5e12,
        )
    reaches, misses, unjudged = capsys.readouterr().out.splitlines()
    assert (
        reaches.endswith("reaches the 40 % asked of it")
        and misses.endswith("misses the 40 % asked of it")
        and unjudged.endswith("of a copy's")
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, bias=None: 1.01 * reference(q, k, v),
        lambda q, k, v, bias=None: reference(q, k.detach(), v) + 0 * k.sum(),
    ],
    ids=["output", "gradient"],
)
def test_what_is_not_the_reference_is_a_failed_record_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong
):
    monkeypatch.setattr(op, "choices", {"wrong": Choice("wrong", wrong)} | op.choices)
    store = Store(tmp_path)
    assert not run(["attention"], "cpu", ["fp32"], 1, 2, store)
    record = store.here.latest(Kernel("attention", "wrong", "cpu", 1), status="failed")
    assert record.values == {} and "differs from its reference" in record.error
    assert store.here.latest(Kernel("attention", "sdpa", "cpu", 1)) is not None
