"""The timer times nothing that was not checked, records what it timed, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from test_train import DIGITS

from backbones import kernels
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.engine import ceilings, timing
from experiments.engine.execute import execute
from experiments.engine.precision import flags, precision
from experiments.engine.spec import Backbone, Ceilings, Cost, Recipe, Timing, Train
from experiments.engine.store import Store
from experiments.engine.train import Resources

DIT = Backbone("dit_s_2", dict(depth=1, dim=24, heads=3))
DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
KEYS = {"images_per_s", "images_per_s_spread", "relative", "relative_spread", "runs", "repeats", "peak_memory_bytes", "joules_per_image"}
KEYS |= {"matmul_tf32", "cudnn_tf32", "autocast", "cudnn_benchmark", "memory_format", "compiled"}


def spec(**changes: object) -> Timing:
    return Timing(**(dict(backbone=DIT, size=8, channels=1, num_classes=10, batch=2, device="cpu") | changes))


@pytest.fixture
def nearly(monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation that is a tenth off."""
    wrong = Choice("nearly", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))
    monkeypatch.setattr(attention, "choices", {"nearly": wrong} | attention.choices)
    return "nearly"


def test_what_a_timing_holds():
    values = timing.run(spec(baseline=DICO))
    assert set(values) == KEYS and values["images_per_s"] > 0 and values["relative"] > 0
    assert timing.FEWEST <= values["runs"] <= timing.PAIRS and values["peak_memory_bytes"] is None


@pytest.mark.parametrize("networks", [dict(backbone=DIT, baseline=DICO), dict(backbone=DICO, baseline=DIT)], ids=["subject", "baseline"])
def test_neither_network_is_timed_unchecked(networks: dict[str, Backbone], nearly: str):
    with pytest.raises(ValueError, match="dit_s_2 .*differs from its reference"):
        timing.run(spec(**networks, kernels={"attention": nearly}))


def test_a_system_of_several_networks_is_timed_whole_each_at_its_own_input(monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, tuple[int, ...]]] = []
    make = timing._network

    def heard(cost: Cost, spec: Timing, device: torch.device) -> torch.nn.Module:
        model = make(cost, spec, device)
        model.register_forward_pre_hook(lambda module, args: ran.append((type(module).__name__, tuple(args[0].shape))))
        return model

    monkeypatch.setattr(timing, "_network", heard)
    upsampler = Backbone("adm_up_256", dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(8,)))
    values = timing.run(spec(parts=(Cost(upsampler, 16, 2, 10),), baseline=DICO, baseline_input=(32, 4)))
    shapes = {("DiT", 1, 8), ("ADM", 2, 16), ("DiCo", 4, 32)}
    assert {(name, *shape[1:3]) for name, shape in ran} == shapes
    full = [name for name, shape in ran if shape[0] == 2]
    measured = values["runs"] * values["repeats"]
    assert full.count("DiT") == full.count("ADM") > measured < full.count("DiCo")


@pytest.mark.parametrize("mode", ["tf32", "bf16"])
def test_coarse_modes_let_rounding_pass_and_nothing_else(mode: str, nearly: str):
    real = spec(backbone=Backbone("dit_s_2", dict(depth=6)), size=32, channels=4, batch=1, precision=mode)
    with pytest.raises(ValueError, match="differs from its reference"):
        timing.run(replace(real, kernels={"attention": nearly}))
    values = timing.run(replace(real, kernels={"attention": "sdpa"}))
    assert values["matmul_tf32"] is values["cudnn_tf32"] is (mode == "tf32")


@pytest.mark.parametrize("choice", ["nearly", "sdpa"])
def test_a_timing_leaves_no_trace(choice: str, nearly: str):
    before, threads = flags(), torch.get_num_threads()
    try:
        timing.run(spec(kernels={"attention": choice}))
    except ValueError:
        assert choice == nearly
    assert flags() == before and torch.get_num_threads() == threads
    assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
    q = torch.randn(1, 1, 4, 8)
    kernels.reset_used()
    attention(q, q, q)
    assert kernels.used() == {"attention": ["nearly"]}


def test_a_record_names_the_kernels_that_were_timed(tmp_path: Path):
    for forced, used in (({}, ["sdpa"]), ({"attention": "reference"}, ["reference"])):
        record = execute(spec(kernels=forced), Store(tmp_path), Resources(), lambda *progress: None)
        assert record.status == "done" and record.provenance["kernels"]["attention"] == used


TRAINED = Train(DIT.but(input_size=8, in_channels=1, num_classes=10), DIGITS, Recipe(steps=2, batch=4))


@pytest.mark.parametrize("stage", [spec(compile=True), TRAINED], ids=["timing", "training"])
def test_a_record_names_the_kernels_of_the_compiled_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Timing | Train):
    """Not those of the check before it, which runs another graph: here one kernel is a candidate where the network is compiled alone."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "choices", {"compiled": Choice("compiled", reference, pays=lambda *args: torch.compiler.is_compiling())} | attention.choices)
    record = execute(stage, Store(tmp_path), Resources(compile=True), lambda *progress: None)
    assert record.status == "done", record.error
    assert record.provenance["kernels"]["attention"] == ["compiled"]


def test_a_refusal_is_a_failed_record(tmp_path: Path, nearly: str):
    record = execute(spec(kernels={"attention": nearly}), Store(tmp_path), Resources(), lambda *progress: None)
    assert (record.status, record.values) == ("failed", {}) and record.error.startswith("ValueError: dit_s_2 with kernels")


def test_the_baseline_itself_is_one_and_unknown_kernels_list_the_known():
    assert timing.run(spec(baseline=DIT))["relative"] == 1.0
    with pytest.raises(ValueError, match="flash, sdpa, reference"):
        timing.run(spec(kernels={"attention": "fast"}))
    with pytest.raises(ValueError, match="forward, training, sampling"):
        timing.run(spec(what="everything"))
    with pytest.raises(ValueError, match="channels_last, contiguous"):
        timing.run(spec(layout="blocked"))


def test_no_weight_that_matters_is_zero():
    model = timing._network(Cost(DIT, 8, 1, 10), spec(), torch.device("cpu"))
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])).abs().max() > 0


def test_weights_that_autocast_keeps_end_with_a_step_also_where_all_steps_are_timed_in_one_block():
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    with precision("bf16", torch.device("cpu")):
        for _ in range(2):
            with precision("bf16", torch.device("cpu")):
                out = layer(x)
            expected = torch.nn.functional.linear(x.bfloat16(), layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16())
            assert torch.equal(out, expected)
            with torch.no_grad():
                layer.weight.mul_(2)


@pytest.mark.parametrize("what", ["training", "sampling"])
def test_steps_of_training_and_loops_of_sampling_are_timed_whole(what: str, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    draw = timing.drawn

    def heard(*args: object) -> torch.nn.Module:
        model = draw(*args)
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        return model

    monkeypatch.setattr(timing, "drawn", heard)
    values = timing.run(spec(what=what, num_steps=3, batch=5))
    runs = values["runs"] * values["repeats"] * (3 if what == "sampling" else 1)
    assert values["images_per_s"] > 0 and sizes.count(10 if what == "sampling" else 5) >= runs


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    def forgets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return reference(q, k.detach(), v, bias)

    monkeypatch.setattr(attention, "choices", {"forgets": Choice("forgets", forgets)} | attention.choices)
    assert timing.run(spec())["images_per_s"] > 0
    with pytest.raises(ValueError, match="its gradient differs from its reference"):
        timing.run(spec(what="training"))


def test_the_authors_mode_is_pytorchs_default_and_conditions_on_one_image(monkeypatch: pytest.MonkeyPatch):
    values = timing.run(spec(precision="as_published", kernels={"linear": "reference", "pointwise": "reference"}))
    assert (values["cudnn_tf32"], values["matmul_tf32"], values["cudnn_benchmark"], values["autocast"]) == (True, False, False, None)
    seen: list[tuple[int, ...]] = []
    make = timing._network

    def heard(*args: object) -> torch.nn.Module:
        model = make(*args)
        model.register_forward_pre_hook(lambda module, args: seen.append(tuple(map(len, args))))
        return model

    monkeypatch.setattr(timing, "_network", heard)
    timing.run(spec(precision="as_published"))
    assert set(seen) == {(1, 1, 1), (2, 1, 1)}


def test_ceilings_are_rates_of_this_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ceilings.SIDES, "cpu", (64, 256))
    monkeypatch.setitem(ceilings.COPIED, "cpu", 2**20)
    values = ceilings.run(Ceilings("cpu"))
    assert values["macs_per_s"] > 1e9 and values["bytes_per_s"] > 1e8 and values["cudnn_tf32"] is False
