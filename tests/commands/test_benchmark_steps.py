"""Steps beside another implementation's: what is compared, which kernels the record names, and what becomes of one that does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import backbones
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments import benchmark_steps
from experiments.benchmark_steps import Steps, measure
from experiments.engine.records.store import Record, Store
from experiments.engine.specs.spec import Backbone, Ceilings, Cost
from experiments.engine.timing import ceilings, cost, networks
from experiments.engine.timing import tasks as timed_tasks

OTHER = (
    "import backbones\ndef make(): return backbones.build('dit_s_2', dim=24, depth=1, heads=3)\n"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = backbones.build("dit_s_2", dim=24, depth=1, heads=3)
    for module in (networks, timed_tasks):
        monkeypatch.setattr(module, "draw_network", lambda spec, device: copy.deepcopy(drawn))
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64,))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**16)


def recorded(store: Store) -> Record:
    (found,) = (
        record
        for records in store.here.by_id().values()
        for record in records
        if record.kind == "steps"
    )
    return found


@pytest.mark.parametrize("what", ["training", "sampling"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_record_holds_both_and_the_kernels_of_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, what: str, precision: str
):
    """The plain loops run in the same process, eager; here one kernel is a candidate where a network is compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        attention,
        "choices",
        {
            "compiled": Choice(
                "compiled", reference, pays=lambda *args: torch.compiler.is_compiling()
            )
        }
        | attention.choices,
    )
    (file := tmp_path / "other.py").write_text(OTHER)
    store = Store(tmp_path / "results")
    assert measure(
        Steps("dit_s_2", what, 2, "cpu", precision, compile=True), (file, "make"), 3, store
    )
    record = recorded(store)
    assert (
        record.provenance["kernels"]["attention"] == ["compiled"]
        and len(record.spec["other"]) == 64
    )
    assert all(
        record.values[name] > 0
        for name in ("ours_s", "plain_s", "theirs_s", "theirs / ours", "theirs / plain")
    )


def test_alone_the_overhead_is_that_over_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
):
    store = Store(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert measure(Steps("dit_s_2", "training", 2, "cpu", "fp32"), None, 3, store)
    values = recorded(store).values
    assert values["cudnn_benchmark"] is True
    assert (
        {"ours_s", "bare_s"} <= set(values)
        and not {"plain_s", "theirs_s"} & set(values)
        and values["overhead, ours / bare"] > 0
    )
    counted = cost.count_backbone(Cost(Backbone("dit_s_2"), 32, 4, 1000))["macs_core"]
    ceiling = store.here.latest(Ceilings("cpu")).values["macs_per_s"]
    assert (
        values["share_of_matmul"] * values["ours_s"] * ceiling == pytest.approx(3 * 2 * counted)
        and values["ceiling_macs_per_s"] == ceiling
    )


@pytest.mark.parametrize("fits", [2, 0])
def test_half_of_a_batch_that_does_not_fit_the_memory_is_tried(
    fits: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: None,
    capsys: pytest.CaptureFixture[str],
):
    compare = benchmark_steps._compare

    def within_memory(spec: Steps, *rest: object) -> tuple:
        if spec.batch > fits:
            raise torch.cuda.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 3 GiB.\nof many words"
            )
        return compare(spec, *rest)

    monkeypatch.setattr(benchmark_steps, "_compare", within_memory)
    asked = Steps("dit_s_2", "training", 11, "cpu", "fp32")
    assert measure(asked, None, 3, store := Store(tmp_path)) == bool(fits)
    record, printed = recorded(store), capsys.readouterr().out
    assert (record.status, record.spec["batch"]) == (
        ("done", 2) if fits else ("failed", 11)
    ) and "batch 5: CUDA out of memory" in printed
    assert fits or record.error == "CUDA out of memory. Tried to allocate 3 GiB."


def test_steps_of_what_computes_something_else_are_a_failed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
):
    monkeypatch.setattr(
        attention,
        "choices",
        {"wrong": Choice("wrong", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))}
        | attention.choices,
    )
    assert not measure(
        Steps("dit_s_2", "sampling", 2, "cpu", "fp32"), None, 3, store := Store(tmp_path)
    )
    assert "its output differs from its reference" in recorded(store).error


@pytest.mark.parametrize("fast", [{"compile": True}, {"graphs": True}])
def test_a_bare_loop_stands_beside_what_is_as_eager_alone(
    fast: dict[str, bool], monkeypatch: pytest.MonkeyPatch, small: None
):
    monkeypatch.setattr(timed_tasks, "build_task", lambda *_: None)
    spec = Steps("dit_s_2", "training", 2, "cpu", "fp32")
    assert [
        list(benchmark_steps._tasks(one, None, torch.device("cpu")))
        for one in (spec, replace(spec, **fast))
    ] == [["ours", "bare"], ["ours"]]


OVERHEAD = "overhead, ours / bare"


@pytest.mark.parametrize(
    ("spec", "values", "asked", "missed"),
    [
        (
            ("dico_s", "training", 8, "cpu", "fp32"),
            {"theirs / ours": 1.17, OVERHEAD: 1.01},
            {"theirs / ours": 1.3, OVERHEAD: 1.02},
            {"theirs / ours": 0.1},
        ),
        (
            ("dico_s", "sampling", 8, "cpu", "fp32"),
            {"theirs / ours": 1.3, "theirs / plain": 0.9},
            {"theirs / ours": 1.3},
            {},
        ),
        (
            ("dit_s_2", "training", 8, "cpu", "fp32"),
            {OVERHEAD: 1.071},
            {OVERHEAD: 1.02},
            {OVERHEAD: 0.05},
        ),
        (
            ("dit_s_2", "training", 8, "cpu", "bf16"),
            {"theirs / ours": 0.5, "share_of_matmul": 0.1},
            {},
            {},
        ),
        (
            ("dico_xl", "training", 64, "cuda", "tf32"),
            {"theirs / ours": 1.2, "share_of_matmul": 0.1},
            {"theirs / ours": 1.5},
            {"theirs / ours": 0.2},
        ),
        (
            ("dico_xl", "training", 64, "cuda", "bf16"),
            {"theirs / ours": 2.1, "share_of_matmul": 0.3},
            {"theirs / ours": 2, "share_of_matmul": 0.4},
            {"share_of_matmul": 0.25},
        ),
        (
            ("dit_xl_2", "training", 64, "cuda", "bf16"),
            {"share_of_matmul": 0.6},
            {"share_of_matmul": 0.5},
            {},
        ),
        (
            ("dit_xl_2", "sampling", 64, "cuda", "tf32"),
            {"theirs / ours": 1.8},
            {"theirs / ours": 2},
            {"theirs / ours": 0.1},
        ),
        (("dit_xl_2", "sampling", 64, "cuda", "fp32"), {"theirs / ours": 1.8}, {}, {}),
    ],
)
def test_what_is_asked_of_a_step_and_by_how_much_it_is_missed(
    spec: tuple, values: dict[str, float], asked: dict[str, float], missed: dict[str, float]
):
    found = benchmark_steps.judged(Steps(*spec), values)
    assert found["asked"] == asked and found["missed"] == pytest.approx(missed)


def test_a_record_and_its_line_say_what_was_asked_and_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, capsys: pytest.CaptureFixture[str]
):
    timed = {
        "ours_s": 0.01,
        "theirs / ours": 1.222,
        "theirs / ours, spread": 0.04,
        OVERHEAD: 1.01,
        f"{OVERHEAD}, spread": 0.02,
        "matmul_tf32": False,
        "cudnn_tf32": False,
    }
    monkeypatch.setattr(benchmark_steps, "_compare", lambda *_: (dict(timed), {}))
    assert measure(
        Steps("dit_s_2", "training", 2, "cpu", "fp32"), None, 3, store := Store(tmp_path)
    )
    values, said = recorded(store).values, capsys.readouterr().out
    assert values["asked"] == {"theirs / ours": 1.3, OVERHEAD: 1.02} and values["missed"] == {
        "theirs / ours": pytest.approx(0.06)
    }
    assert (
        "theirs / ours 1.222 ±0.040 (asked 1.3: missed by 6 %); overhead, ours / bare 1.010 ±0.020 (asked 1.02: reached); ours "
        in said
    )


def test_without_another_implementation_a_call_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "sys.argv",
        [
            "benchmark_steps.py",
            "--networks",
            "dit_s_2",
            "--tasks",
            "sampling",
            "--rounds",
            "3",
            "--batch",
            "1",
            "--results",
            str(tmp_path),
        ],
    )
    assert benchmark_steps.main() == 0
    assert capsys.readouterr().out.startswith(
        "dit_s_2: without --against dit_s_2=FILE:NAME no step of another implementation is measured\n"
    )


def test_graphs_on_a_cpu_are_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "sys.argv", ["benchmark_steps.py", "--graphs", "--results", str(tmp_path / "results")]
    )
    assert benchmark_steps.main() == 2 and not (tmp_path / "results").exists()
    assert (
        capsys.readouterr().err
        == "error: CUDA graphs need a GPU, but this command uses cpu; leave out --graphs\n"
    )
