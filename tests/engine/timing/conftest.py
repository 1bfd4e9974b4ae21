"""A clock without patience, and kernels that compute something else."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from backbones.kernels.attention import attention, reference
from backbones.kernels.op import Choice
from experiments.engine.timing import clock, stage


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a measurement and a warm-up end at once; their figures do not matter here."""
    monkeypatch.setitem(clock.LEAST_SECONDS, "cpu", 0.001)
    monkeypatch.setattr(clock, "PATIENCE", 0.05)
    monkeypatch.setattr(stage, "PATIENCE", 0.05)


@pytest.fixture
def one_second_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call, warm or timed, run once and take a second."""
    for module in (clock, stage):
        monkeypatch.setattr(module, "time_call", lambda call, *rest: call() or 1.0)


@pytest.fixture
def nearly(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a choice of attention that is a tenth off, and return its name."""
    wrong = Choice("nearly", lambda q, k, v, bias=None: 1.1 * reference(q, k, v, bias))
    monkeypatch.setattr(attention, "choices", {"nearly": wrong} | attention.choices)
    return "nearly"


@pytest.fixture
def compiled_choice(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a choice of attention that only a compiled network takes; compilation is a stand-in."""
    only_compiled = Choice("compiled", reference, pays=lambda *args: torch.compiler.is_compiling())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "choices", {"compiled": only_compiled} | attention.choices)
    return "compiled"
