"""The timer times nothing that was not checked, records what it timed, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbones import kernels
from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.engine import timing
from experiments.engine.execute import execute
from experiments.engine.precision import flags
from experiments.engine.spec import Backbone, Cost, Timing
from experiments.engine.store import Store
from experiments.engine.train import Resources

DIT = Backbone("dit_s_2", dict(depth=1, dim=24, heads=3))
DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
KEYS = {"images_per_s", "images_per_s_spread", "relative", "relative_spread", "runs", "peak_memory_bytes", "matmul_tf32", "cudnn_tf32"}


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

    def heard(cost: Cost, device: torch.device) -> torch.nn.Module:
        model = make(cost, device)
        model.register_forward_pre_hook(lambda module, args: ran.append((type(module).__name__, tuple(args[0].shape))))
        return model

    monkeypatch.setattr(timing, "_network", heard)
    upsampler = Backbone("adm_up_256", dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(8,)))
    values = timing.run(spec(parts=(Cost(upsampler, 16, 2, 10),), baseline=DICO, baseline_input=(32, 4)))
    shapes = {("DiT", 1, 8), ("ADM", 2, 16), ("DiCo", 4, 32)}
    assert {(name, *shape[1:3]) for name, shape in ran} == shapes
    full = [(name, *shape[1:3]) for name, shape in ran if shape[0] == 2]
    assert len(full) == 3 * (timing.WARM_UP + values["runs"]) and all(set(full[i : i + 3]) == shapes for i in range(0, len(full), 3))


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
        assert record.status == "done" and record.provenance["kernels"] == {"attention": used}


def test_a_refusal_is_a_failed_record(tmp_path: Path, nearly: str):
    record = execute(spec(kernels={"attention": nearly}), Store(tmp_path), Resources(), lambda *progress: None)
    assert (record.status, record.values) == ("failed", {}) and record.error.startswith("ValueError: dit_s_2 with kernels")
