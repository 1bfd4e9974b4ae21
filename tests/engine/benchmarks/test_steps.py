"""Steps beside another implementation's: what is compared, recorded, judged, and what fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import backbones
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.declared.benchmarks import TARGETS
from experiments.engine.benchmarks import steps
from experiments.engine.benchmarks.spec import Steps
from experiments.engine.benchmarks.steps import Measurement, Other, build_steps, measure_steps
from experiments.engine.benchmarks.targets import OVERHEAD, judge_steps
from experiments.engine.records.store import Record, Store
from experiments.engine.specs.spec import Backbone, Ceilings, Cost
from experiments.engine.timing import ceilings, cost, networks, tasks

CPU = torch.device("cpu")
TRAINING = Steps("dit_s_2", "training", 2, "cpu", "fp32")
OTHER_FILE = (
    "import backbones\ndef make(): return backbones.build('dit_s_2', dim=24, depth=1, heads=3)\n"
)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a tiny network in place of a registered one, and measure tiny ceilings."""
    tiny = backbones.build("dit_s_2", dim=24, depth=1, heads=3)
    for module in (networks, tasks, steps):
        monkeypatch.setattr(module, "draw_network", lambda spec, device: copy.deepcopy(tiny))
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64,))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**16)


def read_record(store: Store) -> Record:
    records = store.here.all()
    (record,) = (record for record in records if record.kind == "steps")
    return record


def add_choice(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    monkeypatch.setattr(attention, "choices", {choice.name: choice} | attention.choices)


@pytest.mark.parametrize("what", ["training", "sampling"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_record_holds_both_and_the_kernels_of_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, precision: str
):
    """The plain loops are eager; here one kernel is a candidate only in a compiled network."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    is_compiling = torch.compiler.is_compiling
    add_choice(monkeypatch, Choice("compiled", reference, pays=lambda *args: is_compiling()))

    # Compare with a network of another file.
    file = tmp_path / "other.py"
    file.write_text(OTHER_FILE)
    store = Store(tmp_path / "results")
    spec = Steps("dit_s_2", what, 2, "cpu", precision, compile=True)
    assert measure_steps(spec, Other(file, "make"), 3, store, TARGETS)

    record = read_record(store)
    assert record.provenance["kernels"]["attention"] == ["compiled"]
    assert len(record.spec["other"]) == 64
    for name in ("ours_s", "plain_s", "theirs_s", "theirs / ours", "theirs / plain"):
        assert record.values[name] > 0


def test_alone_the_overhead_is_that_over_the_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Store(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert measure_steps(TRAINING, None, 3, store, TARGETS)
    values = read_record(store).values
    assert values["cudnn_benchmark"] is True
    assert {"ours_s", "bare_s"} <= set(values)
    assert not {"plain_s", "theirs_s"} & set(values)
    assert values[OVERHEAD] > 0

    # The share counts three forward passes of the declared network for each image.
    counted = cost.count_backbone(Cost(Backbone("dit_s_2"), 32, 4, 1000))["macs_core"]
    ceiling = store.here.latest(Ceilings("cpu")).values["macs_per_s"]
    assert values["ceiling_macs_per_s"] == ceiling
    reached = values["share_of_matmul"] * values["ours_s"] * ceiling
    assert reached == pytest.approx(3 * 2 * counted)


@pytest.mark.parametrize("fits", [2, 0])
def test_half_of_a_batch_that_does_not_fit_the_memory_is_tried(
    fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The largest half that fits is recorded; where none fits, the failure is."""
    compare = steps._compare

    def compare_within_memory(spec: Steps, *rest: object) -> Measurement:
        if spec.batch > fits:
            raise torch.cuda.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 3 GiB.\nof many words"
            )
        return compare(spec, *rest)

    # Batches of 11, 5 and 2 are tried.
    monkeypatch.setattr(steps, "_compare", compare_within_memory)
    store = Store(tmp_path)
    assert measure_steps(replace(TRAINING, batch=11), None, 3, store, TARGETS) == bool(fits)
    assert "batch 5: CUDA out of memory" in capsys.readouterr().out
    record = read_record(store)
    if fits:
        assert (record.status, record.spec["batch"]) == ("done", 2)
    else:
        assert (record.status, record.spec["batch"]) == ("failed", 11)
        assert record.error == "CUDA out of memory. Tried to allocate 3 GiB."


def test_steps_that_compute_something_else_are_a_failed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wrong = Choice("wrong", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))
    add_choice(monkeypatch, wrong)
    store = Store(tmp_path)
    assert not measure_steps(replace(TRAINING, what="sampling"), None, 3, store, TARGETS)
    assert "its output differs from its reference" in read_record(store).error


@pytest.mark.parametrize("accelerated", [{"compile": True}, {"graphs": True}])
def test_a_bare_loop_stands_only_beside_an_eager_step(
    accelerated: dict[str, bool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(steps, "build_task", lambda *_: None)
    assert list(build_steps(TRAINING, None, CPU)) == ["ours", "bare"]
    assert list(build_steps(replace(TRAINING, **accelerated), None, CPU)) == ["ours"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("import no_such_package\n", "needs no_such_package"), ("", "has no make")],
)
def test_a_file_without_the_other_network_is_refused(content: str, message: str, tmp_path: Path):
    file = tmp_path / "other.py"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Other(file, "make").build()


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
def test_a_step_is_judged_by_the_targets_of_its_task_device_and_mode(
    spec: tuple, values: dict[str, float], asked: dict[str, float], missed: dict[str, float]
):
    verdict = judge_steps(Steps(*spec), values, TARGETS)
    assert verdict["asked"] == asked
    assert verdict["missed"] == pytest.approx(missed)


@pytest.fixture
def fixed_measurement(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measurement]:
    """Let every comparison have the same figures."""
    values = {
        "ours_s": 0.01,
        "theirs / ours": 1.222,
        "theirs / ours, spread": 0.04,
        OVERHEAD: 1.01,
        f"{OVERHEAD}, spread": 0.02,
        "matmul_tf32": False,
        "cudnn_tf32": False,
    }
    monkeypatch.setattr(
        steps, "_compare", lambda spec, *_: Measurement(spec, dict(values), kernels={})
    )


def test_a_record_and_its_line_say_what_was_asked_and_missed(
    tmp_path: Path, fixed_measurement: None, capsys: pytest.CaptureFixture[str]
):
    store = Store(tmp_path)
    assert measure_steps(TRAINING, None, 3, store, TARGETS)
    values = read_record(store).values
    assert values["asked"] == {"theirs / ours": 1.3, OVERHEAD: 1.02}
    assert values["missed"] == {"theirs / ours": pytest.approx(0.06)}
    assert (
        "theirs / ours 1.222 ±0.040 (asked 1.3: missed by 6 %); "
        "overhead, ours / bare 1.010 ±0.020 (asked 1.02: reached); ours "
    ) in capsys.readouterr().out
