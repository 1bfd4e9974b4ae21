"""The timer times nothing that was not checked, records what it timed, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import backbones
from backbones import kernels
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.engine.jobs.execute import execute
from experiments.engine.numerics import cuda_graphs as capture
from experiments.engine.numerics.precision import precision, read_tf32_flags
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Ceilings, Cost, Recipe, Timing, Train
from experiments.engine.timing import cost
from experiments.engine.timing import profile as ceilings
from experiments.engine.timing import stage as timing
from experiments.engine.timing import tasks as timed_tasks
from experiments.engine.timing.tasks import Task
from experiments.engine.training import trainer as train
from tests.support.trainings import DIGITS

DIT = Backbone("dit_s_2", dict(depth=1, dim=24, heads=3))
DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
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
}
KEYS |= {
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

SEEN = {"memory_format": "any", "one_condition": False}


def spec(**changes: object) -> Timing:
    return Timing(
        **(dict(backbone=DIT, size=8, channels=1, num_classes=10, batch=2, device="cpu") | changes)
    )


@pytest.fixture
def nearly(monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation that is a tenth off."""
    wrong = Choice("nearly", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))
    monkeypatch.setattr(attention, "choices", {"nearly": wrong} | attention.choices)
    return "nearly"


def test_what_a_timing_holds():
    values = timing.measure_speed(spec(baseline=DICO))
    assert set(values) == KEYS and values["images_per_s"] > 0 and values["relative"] > 0
    assert timing.FEWEST <= values["runs"] <= timing.PAIRS and values["peak_memory_bytes"] is None


def test_a_timing_says_what_its_operators_move():
    two, three, four = (
        timing.measure_speed(spec(batch=batch))["bytes_moved"] for batch in (2, 3, 4)
    )
    weights = 4 * cost.count_backbone(Cost(DIT, 8, 1, 10))["params_total"]
    assert (
        two > weights / 2 and four - three == three - two > 4 * 2 * 16 * 24
    )  # the table of labels is read in part; a block's tokens in and out at least
    assert (
        timing.measure_speed(spec(compile=True))["bytes_moved"] is None
    )  # what is compiled into one is not seen


@pytest.mark.parametrize(
    "networks",
    [dict(backbone=DIT, baseline=DICO), dict(backbone=DICO, baseline=DIT)],
    ids=["subject", "baseline"],
)
def test_neither_network_is_timed_unchecked(networks: dict[str, Backbone], nearly: str):
    with pytest.raises(ValueError, match="dit_s_2 .*differs from its reference"):
        timing.measure_speed(spec(**networks, kernels={"attention": nearly}))


def test_a_system_of_several_networks_is_timed_whole_each_at_its_own_input(
    monkeypatch: pytest.MonkeyPatch,
):
    ran: list[tuple[str, tuple[int, ...]]] = []
    make = timed_tasks.build_network

    def heard(cost: Cost, spec: Timing, device: torch.device) -> torch.nn.Module:
        model = make(cost, spec, device)
        model.register_forward_pre_hook(
            lambda module, args: ran.append((type(module).__name__, tuple(args[0].shape)))
        )
        return model

    for module in (timing, timed_tasks):
        monkeypatch.setattr(module, "build_network", heard)
    upsampler = Backbone(
        "adm_up_256", dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(8,))
    )
    values = timing.measure_speed(
        spec(parts=(Cost(upsampler, 16, 2, 10),), baseline=DICO, baseline_input=(32, 4))
    )
    shapes = {("DiT", 1, 8), ("ADM", 2, 16), ("DiCo", 4, 32)}
    assert {(name, *shape[1:3]) for name, shape in ran} == shapes
    full = [name for name, shape in ran if shape[0] == 2]
    measured = values["runs"] * values["repeats"]
    assert full.count("DiT") == full.count("ADM") > measured < full.count("DiCo")


@pytest.mark.parametrize("mode", ["tf32", "bf16"])
def test_coarse_modes_let_rounding_pass_and_nothing_else(mode: str, nearly: str):
    real = spec(
        backbone=Backbone("dit_s_2", dict(depth=6)), size=32, channels=4, batch=1, precision=mode
    )
    with pytest.raises(ValueError, match="differs from its reference"):
        timing.measure_speed(replace(real, kernels={"attention": nearly}))
    values = timing.measure_speed(replace(real, kernels={"attention": "sdpa"}))
    assert values["matmul_tf32"] is values["cudnn_tf32"] is (mode == "tf32")


@pytest.mark.parametrize("choice", ["nearly", "sdpa"])
def test_a_timing_leaves_no_trace(choice: str, nearly: str):
    before, threads = read_tf32_flags(), torch.get_num_threads()
    try:
        timing.measure_speed(spec(kernels={"attention": choice}))
    except ValueError:
        assert choice == nearly
    assert read_tf32_flags() == before and torch.get_num_threads() == threads
    assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
    q = torch.randn(1, 1, 4, 8)
    kernels.reset_used()
    attention(q, q, q)
    assert kernels.used() == {"attention": ["nearly"]}


def test_a_record_names_the_kernels_that_were_timed(tmp_path: Path):
    for forced, used in (({}, ["sdpa"]), ({"attention": "reference"}, ["reference"])):
        record = execute(spec(kernels=forced), Store(tmp_path), Resources())
        assert record.status == "done" and record.provenance["kernels"]["attention"] == used


TRAINED = Train(
    DIT.but(input_size=8, in_channels=1, num_classes=10), DIGITS, Recipe(steps=2, batch=4)
)


@pytest.mark.parametrize("stage", [spec(compile=True), TRAINED], ids=["timing", "training"])
def test_a_record_names_the_kernels_of_the_compiled_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Timing | Train
):
    """Not those of the check before it, which runs another graph: here one kernel is a candidate where the network is compiled alone."""
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
    record = execute(stage, Store(tmp_path), Resources(compile=True))
    assert record.status == "done", record.error
    assert record.provenance["kernels"]["attention"] == ["compiled"]


def test_a_refusal_is_a_failed_record(tmp_path: Path, nearly: str):
    record = execute(spec(kernels={"attention": nearly}), Store(tmp_path), Resources())
    assert (record.status, record.values) == ("failed", {}) and record.error.startswith(
        "ValueError: dit_s_2 with kernels"
    )


def test_the_baseline_itself_is_one_and_unknown_kernels_list_the_known():
    assert timing.measure_speed(spec(baseline=DIT))["relative"] == 1.0
    with pytest.raises(ValueError, match="flash, sdpa, reference"):
        timing.measure_speed(spec(kernels={"attention": "fast"}))
    with pytest.raises(ValueError, match="forward, training, sampling"):
        timing.measure_speed(spec(what="everything"))
    with pytest.raises(ValueError, match="channels_last, contiguous"):
        timing.measure_speed(spec(layout="blocked"))


def test_no_weight_that_matters_is_zero():
    model = timed_tasks.build_network(Cost(DIT, 8, 1, 10), spec(), torch.device("cpu"))
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])).abs().max() > 0


def test_weights_that_autocast_keeps_end_with_a_step_also_where_all_steps_are_timed_in_one_block():
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    with precision("bf16", torch.device("cpu")):
        for _ in range(2):
            with precision("bf16", torch.device("cpu")):
                out = layer(x)
            expected = torch.nn.functional.linear(
                x.bfloat16(), layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
            )
            assert torch.equal(out, expected)
            with torch.no_grad():
                layer.weight.mul_(2)


@pytest.mark.parametrize("what", ["training", "sampling"])
def test_steps_of_training_and_loops_of_sampling_are_timed_whole(
    what: str, monkeypatch: pytest.MonkeyPatch
):
    sizes: list[int] = []
    draw = timed_tasks.draw_network

    def heard(*args: object) -> torch.nn.Module:
        model = draw(*args)
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        return model

    monkeypatch.setattr(timed_tasks, "draw_network", heard)
    values = timing.measure_speed(spec(what=what, num_steps=3, batch=5))
    runs = values["runs"] * values["repeats"] * (3 if what == "sampling" else 1)
    assert values["images_per_s"] > 0 and sizes.count(10 if what == "sampling" else 5) >= runs


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    def forgets(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return reference(q, k.detach(), v, bias)

    monkeypatch.setattr(
        attention, "choices", {"forgets": Choice("forgets", forgets)} | attention.choices
    )
    assert timing.measure_speed(spec())["images_per_s"] > 0
    with pytest.raises(ValueError, match="its gradient differs from its reference"):
        timing.measure_speed(spec(what="training"))


def test_the_authors_mode_is_pytorchs_default_and_conditions_on_one_image(
    monkeypatch: pytest.MonkeyPatch,
):
    values = timing.measure_speed(
        spec(precision="as_published", kernels={"linear": "reference", "pointwise": "reference"})
    )
    assert (
        values["cudnn_tf32"],
        values["matmul_tf32"],
        values["cudnn_benchmark"],
        values["autocast"],
    ) == (True, False, False, None)
    seen: list[tuple[int, ...]] = []
    make = timed_tasks.build_network

    def heard(*args: object) -> torch.nn.Module:
        model = make(*args)
        model.register_forward_pre_hook(lambda module, args: seen.append(tuple(map(len, args))))
        return model

    for module in (timing, timed_tasks):
        monkeypatch.setattr(module, "build_network", heard)
    timing.measure_speed(spec(precision="as_published"))
    assert set(seen) == {(1, 1, 1), (2, 1, 1)}


def test_ceilings_are_rates_of_this_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64, 256))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**20)
    values = ceilings.measure_ceilings(Ceilings("cpu"))
    assert (
        values["macs_per_s"] > 1e9 and values["bytes_per_s"] > 1e8 and values["cudnn_tf32"] is False
    )


@pytest.mark.parametrize(("graphs", "peak"), [(False, 300), (True, 900)], ids=["eager", "recorded"])
def test_the_peak_is_the_subjects_alone_and_leaves_its_first_run_out(
    graphs: bool, peak: int, monkeypatch: pytest.MonkeyPatch
):
    """With stand-ins for the device: the subject holds 100 bytes, the baseline 5000, and a first run tries convolutions in 800 more.

    A graph's later runs take nothing new, since their memory was counted as it was captured.
    """
    held = {"now": 0, "peak": 0}

    def take(num_bytes: int) -> None:
        held["peak"] = max(held["peak"], held["now"] + num_bytes)

    def task(network: Cost, spec: Timing, device: torch.device) -> Task:
        held["now"] += 100 if network.backbone == DIT else 5000
        take(0)
        runs = iter([800])
        return Task(lambda: take(next(runs, 0 if graphs else 200)), SEEN)

    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"])
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    stand_ins = {
        "check_against_reference": lambda *args: None,
        "free_memory": lambda device: None,
        "read_joules": lambda device: None,
        "build_task": task,
        "time_call": lambda call, *rest: call() or 1.0,
    }
    for name, stand_in in (stand_ins | {"precision": lambda *args: nullcontext()}).items():
        monkeypatch.setattr(timing, name, stand_in)
    values = timing.measure_speed(spec(device="cuda", baseline=DICO, graphs=graphs))
    assert values["peak_memory_bytes"] == peak and held["now"] == 5100


@pytest.mark.parametrize(
    ("taken", "stable", "runs"), [([3.0, 1.0, 1.04], True, 3), ([1.0, 2.0] * 9, False, 10)]
)
def test_a_timing_says_whether_its_warm_up_became_stable(
    taken: list[float], stable: bool, runs: int, monkeypatch: pytest.MonkeyPatch
):
    left = iter(taken)
    monkeypatch.setattr(timing, "time_call", lambda *args: next(left))
    assert (
        timing._warm(lambda: None, torch.device("cpu"), False) == (1, stable, None)
        and len(list(left)) == len(taken) - runs
    )


def test_the_baselines_own_rate_stands_beside_the_ratio(monkeypatch: pytest.MonkeyPatch):
    tasks = {name: Task(lambda: None, SEEN) for name in (DIT.name, DICO.name)}
    monkeypatch.setattr(timing, "build_task", lambda network, *rest: tasks[network.backbone.name])
    monkeypatch.setattr(
        timing, "time_call", lambda call, *rest: 0.125 if call is tasks[DIT.name] else 0.5
    )
    values = timing.measure_speed(spec(baseline=DICO))
    assert (values["images_per_s"], values["baseline_images_per_s"], values["relative"]) == (
        16,
        4,
        4,
    )
    assert timing.measure_speed(spec())["baseline_images_per_s"] is None


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("what", ["forward", "training", "sampling"])
@pytest.mark.parametrize(
    "fast", [dict(compile=True), dict(graphs=True)], ids=["compiled", "by graphs"]
)
def test_what_is_compiled_or_recorded_is_what_is_checked(
    fast: dict[str, bool], what: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
):
    """By stand-ins for the compiler and the recording, whose results are a tenth off where they are wrong."""
    sizes: set[int] = set()

    def stand_in(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: torch.Tensor) -> torch.Tensor:
            sizes.add(len(args[0]))
            return function(*args) * (1.1 if wrong else 1.0)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    for module in (capture, train, timed_tasks):
        monkeypatch.setattr(module, "require_gpu", lambda device: None)
    for module in (capture, train):
        monkeypatch.setattr(module, "CudaGraph", stand_in)
    timed = spec(what=what, num_steps=2, batch=3, **fast)
    if wrong:
        with pytest.raises(ValueError, match="compiled|by CUDA graphs"):
            timing.measure_speed(timed)
    else:
        timing.measure_speed(timed)
    assert sizes == {
        6 if what == "sampling" and "compile" in fast else 3
    }  # guidance doubles a batch; a step has it in it


def every_family() -> dict[str, Timing]:
    """One tiny network of every family, and those of a family that are called or conditioned in another way."""
    names = {name.partition("_")[0]: name for name in reversed(backbones.list_backbones())} | {
        "adm": "adm_base_64",
        "upsampler": "adm_up_256",
        "unguided ldm": "ldm_8",
    }
    tiny = {
        family: Backbone(name, backbones.tiny_options_of(name)) for family, name in names.items()
    }
    unet = dict(dim=32, multipliers=(1, 2), attention_at=(4,))
    return {
        family: spec(
            backbone=network.but(**unet) if "multipliers" in network.options else network,
            channels=6 if family == "upsampler" else 3,
        )
        for family, network in tiny.items()
    }


TOKENS = ("uvit", "dim", "dis")  # families that make tokens of time and label


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call, warm or timed, is made once and takes a second."""
    monkeypatch.setattr(timing, "time_call", lambda call, *rest: call() or 1.0)


@pytest.mark.parametrize("what", ["forward", "training", "sampling", "as_published"])
@pytest.mark.parametrize("family", every_family())
def test_every_family_is_timed_at_every_task_and_as_published(
    family: str, what: str, briefly: None, monkeypatch: pytest.MonkeyPatch
):
    """Every image of a batch passes the network: once, forward and backward; in sampling with a second one for guidance, in every step."""
    seen: list[tuple[int, ...]] = []
    draw = timed_tasks.draw_network

    def heard(*args: object) -> torch.nn.Module:
        model = draw(*args)
        model.register_forward_pre_hook(
            lambda module, args: seen.append((*args[0].shape[:2], len(args[1]), len(args[2])))
        )
        return model

    monkeypatch.setattr(timed_tasks, "draw_network", heard)
    timed = every_family()[family]
    timed = (
        replace(timed, precision="as_published", layout="contiguous")
        if what == "as_published"
        else replace(timed, what=what, num_steps=2)
    )
    values = timing.measure_speed(timed)
    shared = what == "as_published" and family not in TOKENS
    given = 4 if what == "sampling" else 2
    assert values["images_per_s"] == 2 and values["one_condition"] is shared
    assert (given, timed.channels, *([1, 1] if shared else [given] * 2)) in seen


@pytest.mark.parametrize("family", sorted(every_family().keys() - set(TOKENS)))
def test_one_condition_for_all_is_the_same_for_each(family: str):
    timed = every_family()[family]
    network = Cost(timed.backbone, timed.size, timed.channels, timed.num_classes)
    model, (x, t, y) = (
        timed_tasks.build_network(network, timed, torch.device("cpu")),
        timed_tasks.draw_inputs(network, timed, torch.device("cpu")),
    )
    with torch.inference_mode():
        assert torch.allclose(
            model(x, t[:1], y[:1]), model(x, t[:1].repeat(2), y[:1].repeat(2)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("layout", timed_tasks.LAYOUTS)
def test_the_layout_is_read_back(layout: str, briefly: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timed_tasks, "_layout", lambda spec: timed_tasks.LAYOUTS[layout])
    for what in ("forward", "training", "sampling"):
        assert (
            timing.measure_speed(
                spec(backbone=DICO, channels=3, what=what, num_steps=2, layout="asked for")
            )["memory_format"]
            == layout
        )


def test_a_layout_is_that_of_tensors_that_tell():
    image, other = (
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    )
    pixels, single = torch.zeros(2, 3, 1, 1), torch.zeros(2, 1, 4, 5)
    assert [
        timed_tasks.read_layout(*tensors)
        for tensors in ([image, pixels], [other, single], [image, other], [pixels, single])
    ] == ["contiguous", "channels_last", "channels_last, contiguous", "any"]


def test_the_compiled_passes_of_an_upsampler_are_checked_on_images(
    monkeypatch: pytest.MonkeyPatch, briefly: None
):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert (
        timing.measure_speed(replace(every_family()["upsampler"], what="training", compile=True))[
            "images_per_s"
        ]
        == 2
    )
