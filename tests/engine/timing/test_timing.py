"""The timer records what it timed, keeps the baseline apart, and leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backbones import kernels
from backbones.kernels.attention import attention
from experiments.engine.jobs.execute import execute
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Ceilings, Cost, Recipe, Timing, Train
from experiments.engine.timing import ceilings, clock, cost, stage
from experiments.engine.timing.clock import WarmUp, warm_up
from experiments.engine.timing.stage import measure_speed
from experiments.engine.timing.tasks import Task
from tests.support.timing import CPU, DICO, DIT, declare_timing, hear_calls
from tests.support.trainings import DIGITS

KEYS = {
    "images_per_s",
    "images_per_s_spread",
    "baseline_images_per_s",
    "relative",
    "relative_spread",
    "runs",
    "repeats",
    "stable",
    "peak_memory_bytes",
    "joules_per_image",
    "bytes_moved",
    "matmul_tf32",
    "cudnn_tf32",
    "autocast",
    "cudnn_benchmark",
    "memory_format",
    "compiled",
    "graphs",
    "one_condition",
    "baseline_one_condition",
}


def test_a_record_of_a_timing_has_all_fields():
    values = measure_speed(declare_timing(baseline=DICO))
    assert set(values) == KEYS
    assert values["images_per_s"] > 0
    assert values["relative"] > 0
    assert stage.FEWEST_ROUNDS <= values["runs"] <= stage.MOST_ROUNDS
    assert values["peak_memory_bytes"] is None


def test_a_timing_says_what_its_operators_move(compiled_choice: str):
    moved = [measure_speed(declare_timing(batch=n))["bytes_moved"] for n in (2, 3, 4)]
    weights = 4 * cost.count_backbone(Cost(DIT, 8, 1, 10))["params_total"]
    # The table of labels is read in part only, so less than all weights may be read.
    assert moved[0] > weights / 2
    # Every image costs the same: at least the tokens into and out of a block, in float32.
    tokens, dim = 16, 24
    assert moved[2] - moved[1] == moved[1] - moved[0] > 4 * 2 * tokens * dim
    # The operators of a compiled network are not seen.
    assert measure_speed(declare_timing(compile=True))["bytes_moved"] is None


def test_a_system_of_several_networks_is_timed_whole_each_at_its_own_input(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[tuple[str, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((type(module).__name__, tuple(inputs[0].shape)))

    hear_calls(monkeypatch, note)
    upsampler = Backbone(
        "adm_up_256", dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(8,))
    )
    values = measure_speed(
        declare_timing(parts=(Cost(upsampler, 16, 2, 10),), baseline=DICO, baseline_input=(32, 4))
    )
    inputs = {(name, *shape[1:3]) for name, shape in calls}
    assert inputs == {("DiT", 1, 8), ("ADM", 2, 16), ("DiCo", 4, 32)}
    # Checks are at batch 1; both parts of the system run equally often at the full batch.
    full = [name for name, shape in calls if shape[0] == 2]
    measured = values["runs"] * values["repeats"]
    assert full.count("DiT") == full.count("ADM") > measured < full.count("DiCo")


@pytest.mark.parametrize("choice", ["nearly", "sdpa"])
def test_a_timing_leaves_no_trace(choice: str, nearly: str):
    before, threads = read_tf32_flags(), torch.get_num_threads()
    try:
        measure_speed(declare_timing(kernels={"attention": choice}))
    except ValueError:
        assert choice == nearly
    assert read_tf32_flags() == before
    assert torch.get_num_threads() == threads
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_inference_mode_enabled()

    # Nothing is forced any more: the first choice that supports the call is taken.
    q = torch.randn(1, 1, 4, 8)
    kernels.reset_used()
    attention(q, q, q)
    assert kernels.used() == {"attention": ["nearly"]}


@pytest.mark.parametrize(
    ("forced", "used"), [({}, ["sdpa"]), ({"attention": "reference"}, ["reference"])]
)
def test_a_record_names_the_kernels_that_were_timed(
    forced: dict[str, str], used: list[str], tmp_path: Path
):
    spec = declare_timing(kernels=forced)
    record = execute(spec, Store(tmp_path), Resources())
    assert record.status == "done"
    assert record.provenance["kernels"]["attention"] == used


TRAINED = Train(
    DIT.but(input_size=8, in_channels=1, num_classes=10), DIGITS, Recipe(steps=2, batch=4)
)


@pytest.mark.parametrize(
    "spec", [declare_timing(compile=True), TRAINED], ids=["timing", "training"]
)
def test_a_record_names_the_kernels_of_the_compiled_graph(
    tmp_path: Path, compiled_choice: str, spec: Timing | Train
):
    """The check before it runs another graph, whose kernels are not named."""
    resources = Resources(compile=isinstance(spec, Train))
    record = execute(spec, Store(tmp_path), resources)
    assert record.status == "done", record.error
    assert record.provenance["kernels"]["attention"] == [compiled_choice]


def test_a_refusal_is_a_failed_record(tmp_path: Path, nearly: str):
    spec = declare_timing(kernels={"attention": nearly})
    record = execute(spec, Store(tmp_path), Resources())
    assert record.status == "failed"
    assert record.values == {}
    assert record.error.startswith("ValueError: dit_s_2 with kernels")


def test_a_network_beside_itself_is_exactly_as_fast():
    assert measure_speed(declare_timing(baseline=DIT))["relative"] == 1.0


def test_autocasts_cached_weights_end_with_a_step_also_inside_another_block():
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    with precision("bf16", CPU):
        for _ in range(2):
            with precision("bf16", CPU):
                out = layer(x)
            weight, bias = layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
            assert torch.equal(out, torch.nn.functional.linear(x.bfloat16(), weight, bias))
            with torch.no_grad():
                layer.weight.mul_(2)


def test_the_authors_mode_is_pytorchs_default_and_conditions_on_one_image(
    monkeypatch: pytest.MonkeyPatch,
):
    plain = {"linear": "reference", "pointwise": "reference"}
    values = measure_speed(declare_timing(precision="as_published", kernels=plain))
    assert values["cudnn_tf32"] is True
    assert values["matmul_tf32"] is False
    assert values["cudnn_benchmark"] is False
    assert values["autocast"] is None

    lengths: set[tuple[int, ...]] = set()
    hear_calls(monkeypatch, lambda module, inputs: lengths.add(tuple(map(len, inputs))))
    measure_speed(declare_timing(precision="as_published"))
    assert lengths == {(1, 1, 1), (2, 1, 1)}  # of x, t and y, in the check and in the timing


def test_ceilings_are_rates_of_this_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64, 256))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**20)
    values = ceilings.measure_ceilings(Ceilings("cpu"))
    assert values["macs_per_s"] > 1e9
    assert values["bytes_per_s"] > 1e8
    assert values["cudnn_tf32"] is False


@pytest.mark.parametrize(("graphs", "peak"), [(False, 300), (True, 900)], ids=["eager", "captured"])
def test_the_peak_is_the_subjects_alone_and_leaves_its_first_run_out(
    graphs: bool, peak: int, monkeypatch: pytest.MonkeyPatch
):
    """Stand-ins: the subject holds 100 bytes, the baseline 5000; a first run needs 800 more.

    A captured graph allocates nothing in later runs, so its first run counts.
    """
    memory = {"now": 0, "peak": 0}

    def take(num_bytes: int) -> None:
        memory["peak"] = max(memory["peak"], memory["now"] + num_bytes)

    def build_task(network: Cost, spec: Timing, device: torch.device) -> Task:
        memory["now"] += 100 if network.backbone == DIT else 5000
        take(0)
        first_run = iter([800])
        return Task(lambda: take(next(first_run, 0 if graphs else 200)))

    # A GPU whose memory is a number, and a clock that is none.
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"])
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    stand_ins = {
        "check_against_reference": lambda *args: None,
        "free_memory": lambda device: None,
        "read_joules": lambda device: None,
        "build_task": build_task,
        "precision": lambda *args: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(stage, name, stand_in)
    for module in (clock, stage):
        monkeypatch.setattr(module, "time_call", lambda call, *rest: call() or 1.0)

    values = measure_speed(declare_timing(device="cuda", baseline=DICO, graphs=graphs))
    assert values["peak_memory_bytes"] == peak
    assert memory["now"] == 5100


@pytest.mark.parametrize("before_and_after", [(0.0, 60.0), (None, None)])
def test_energy_is_that_of_one_image(
    before_and_after: tuple[float | None, float | None],
    one_second_clock: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """Stand-ins: every round uses 60 joules for its repeats of two images."""
    readings = iter(before_and_after * stage.MOST_ROUNDS)
    monkeypatch.setattr(stage, "read_joules", lambda device: next(readings))
    values = measure_speed(declare_timing())
    expected = 60.0 / (2 * values["repeats"]) if before_and_after[1] else None
    assert values["joules_per_image"] == expected


@pytest.mark.parametrize(
    ("seconds", "stable", "runs"), [([3.0, 1.0, 1.04], True, 3), ([1.0, 2.0] * 9, False, 10)]
)
def test_a_warm_up_says_whether_the_time_became_stable(
    seconds: list[float], stable: bool, runs: int, monkeypatch: pytest.MonkeyPatch
):
    left = iter(seconds)
    monkeypatch.setattr(clock, "time_call", lambda *args: next(left))
    monkeypatch.setattr(clock, "PATIENCE", 10.0)
    assert warm_up(lambda: None, CPU, captured=False) == WarmUp(1, stable, None)
    assert len(list(left)) == len(seconds) - runs


def test_the_baselines_own_rate_stands_beside_the_ratio(monkeypatch: pytest.MonkeyPatch):
    tasks = {name: Task(lambda: None) for name in (DIT.name, DICO.name)}
    monkeypatch.setattr(stage, "build_task", lambda network, *rest: tasks[network.backbone.name])
    for module in (clock, stage):
        monkeypatch.setattr(
            module, "time_call", lambda call, *rest: 0.125 if call is tasks[DIT.name] else 0.5
        )
    values = measure_speed(declare_timing(baseline=DICO))
    rates = values["images_per_s"], values["baseline_images_per_s"], values["relative"]
    assert rates == (16, 4, 4)
    assert measure_speed(declare_timing())["baseline_images_per_s"] is None
