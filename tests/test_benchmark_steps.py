"""Steps beside another implementation's: what is compared, which kernels the record names, and what becomes of one that does not fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import backbones
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments import benchmark_steps
from experiments.benchmark_steps import Steps, measure
from experiments.engine import timing
from experiments.engine.store import Store

OTHER = "import backbones\ndef make(): return backbones.build('dit_s_2', dim=24, depth=1, heads=3)\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "drawn", lambda spec, device: backbones.build("dit_s_2", dim=24, depth=1, heads=3).to(device))


@pytest.mark.parametrize("what", ["training", "sampling"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_record_holds_both_and_the_kernels_of_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, what: str, precision: str):
    """The plain loops run in the same process, eager; here one kernel is a candidate where a network is compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "choices", {"compiled": Choice("compiled", reference, pays=lambda *args: torch.compiler.is_compiling())} | attention.choices)
    (file := tmp_path / "other.py").write_text(OTHER)
    store = Store(tmp_path / "results")
    assert measure(Steps("dit_s_2", what, 2, "cpu", precision, compile=True), (file, "make"), 3, store)
    ((record,),) = store.records("records").values()
    assert record.provenance["kernels"]["attention"] == ["compiled"] and len(record.spec["other"]) == 64
    assert all(record.values[name] > 0 for name in ("ours_s", "plain_s", "theirs_s", "theirs / ours", "theirs / plain"))


def test_alone_the_overhead_is_that_over_the_bare_loop(tmp_path: Path, small: None):
    store = Store(tmp_path)
    assert measure(Steps("dit_s_2", "training", 2, "cpu", "fp32"), None, 3, store)
    ((record,),) = store.records("records").values()
    assert {name for name in record.values if name.endswith("_s")} == {"ours_s", "bare_s"} and record.values["overhead, ours / bare"] > 0


def test_what_does_not_fit_the_memory_is_a_failed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nof many words")

    monkeypatch.setattr(benchmark_steps, "_compare", fail)
    assert not measure(spec := Steps("dit_s_2", "training", 2, "cpu", "fp32"), None, 3, store := Store(tmp_path))
    assert store.latest(spec, status="failed").error == "CUDA out of memory. Tried to allocate 3 GiB." and "out of memory" in capsys.readouterr().out
