"""Steps beside another implementation's: what is compared, which kernels the record names, and what becomes of one that does not fit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

import backbones
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments import benchmark_steps
from experiments.benchmark_steps import Steps, measure
from experiments.engine import ceilings, cost, timed_tasks
from experiments.engine.spec import Backbone, Ceilings, Cost
from experiments.engine.store import Record, Store

OTHER = "import backbones\ndef make(): return backbones.build('dit_s_2', dim=24, depth=1, heads=3)\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = backbones.build("dit_s_2", dim=24, depth=1, heads=3)
    monkeypatch.setattr(timed_tasks, "drawn", lambda spec, device: copy.deepcopy(drawn))
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64,))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**16)


def recorded(store: Store) -> Record:
    (found,) = (record for records in store.records("records").values() for record in records if record.kind == "steps")
    return found


@pytest.mark.parametrize("what", ["training", "sampling"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_record_holds_both_and_the_kernels_of_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, what: str, precision: str):
    """The plain loops run in the same process, eager; here one kernel is a candidate where a network is compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "choices", {"compiled": Choice("compiled", reference, pays=lambda *args: torch.compiler.is_compiling())} | attention.choices)
    (file := tmp_path / "other.py").write_text(OTHER)
    store = Store(tmp_path / "results")
    assert measure(Steps("dit_s_2", what, 2, "cpu", precision, compile=True), (file, "make"), 3, store)
    record = recorded(store)
    assert record.provenance["kernels"]["attention"] == ["compiled"] and len(record.spec["other"]) == 64
    assert all(record.values[name] > 0 for name in ("ours_s", "plain_s", "theirs_s", "theirs / ours", "theirs / plain"))


def test_alone_the_overhead_is_that_over_the_bare_loop(tmp_path: Path, small: None):
    store = Store(tmp_path)
    assert measure(Steps("dit_s_2", "training", 2, "cpu", "fp32"), None, 3, store)
    values = recorded(store).values
    assert {"ours_s", "bare_s"} <= set(values) and not {"plain_s", "theirs_s"} & set(values) and values["overhead, ours / bare"] > 0
    counted = cost.run(Cost(Backbone("dit_s_2"), 32, 4, 1000))["macs_core"]
    ceiling = store.latest(Ceilings("cpu")).values["macs_per_s"]
    assert values["share_of_matmul"] * values["ours_s"] * ceiling == pytest.approx(3 * 2 * counted) and values["ceiling_macs_per_s"] == ceiling


@pytest.mark.parametrize("fits", [2, 0])
def test_half_of_a_batch_that_does_not_fit_the_memory_is_tried(fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, capsys: pytest.CaptureFixture[str]):
    compare = benchmark_steps._compare

    def within_memory(spec: Steps, *rest: object) -> tuple:
        if spec.batch > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nof many words")
        return compare(spec, *rest)

    monkeypatch.setattr(benchmark_steps, "_compare", within_memory)
    asked = Steps("dit_s_2", "training", 11, "cpu", "fp32")
    assert measure(asked, None, 3, store := Store(tmp_path)) == bool(fits)
    record, printed = recorded(store), capsys.readouterr().out
    assert (record.status, record.spec["batch"]) == (("done", 2) if fits else ("failed", 11)) and "batch 5: CUDA out of memory" in printed
    assert fits or record.error == "CUDA out of memory. Tried to allocate 3 GiB."


def test_steps_of_what_computes_something_else_are_a_failed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None):
    monkeypatch.setattr(attention, "choices", {"wrong": Choice("wrong", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))} | attention.choices)
    assert not measure(Steps("dit_s_2", "sampling", 2, "cpu", "fp32"), None, 3, store := Store(tmp_path))
    assert "its output differs from its reference" in recorded(store).error


def test_without_another_implementation_a_call_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["benchmark_steps.py", "--networks", "dit_s_2", "--tasks", "sampling", "--rounds", "3", "--batch", "1", "--results", str(tmp_path)])
    assert benchmark_steps.main() == 0
    assert capsys.readouterr().out.startswith("dit_s_2: without --against dit_s_2=FILE:NAME no step of another implementation is measured\n")
