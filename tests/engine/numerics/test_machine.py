"""A process keeps freed memory if the C library allows it, and reads energy if the driver does."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments.engine.numerics import device as machine
from experiments.engine.numerics.device import describe_device, keep_memory, read_joules
from experiments.engine.records.tree import REPOSITORY

CPU, GPU = torch.device("cpu"), torch.device("cuda")

# Prints the page faults of blocks that are freed at once, before and after memory is kept.
FAULTS = """
import resource, torch
from experiments.engine.numerics.device import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in [16] * 20 + [100] * 20:
        torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_memory(), faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_memory(), reason="this C library cannot be told to keep freed memory")
def test_a_process_that_keeps_memory_faults_blocks_in_less_often():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert kept == "True"
    # Small blocks that stay cut the large ones now and then, so some faults remain.
    assert int(after) < int(before) / 2


def test_provenance_names_the_device_and_whether_memory_is_kept():
    description = describe_device("cpu")
    assert description["device"] == "cpu"
    assert description["memory_kept"] is keep_memory()


class DriverError(Exception):
    """What a driver without an energy counter raises."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for NVML and for a GPU, whose UUID finds the device."""
    driver = SimpleNamespace(
        NVMLError=DriverError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": 2500}[handle],
    )
    properties = SimpleNamespace(uuid="abc")

    # The library is opened once, and again by the next test.
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    machine._open_nvml.cache_clear()
    yield driver
    machine._open_nvml.cache_clear()


def test_energy_is_read_in_joules_from_the_gpu_of_the_same_uuid(nvml: SimpleNamespace):
    assert read_joules(GPU) == 2.5
    assert read_joules(CPU) is None


@pytest.mark.parametrize(
    "call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"]
)
def test_a_driver_that_refuses_leaves_no_energy_figure(nvml: SimpleNamespace, call: str):
    def refuse(*args: object) -> None:
        raise DriverError

    setattr(nvml, call, refuse)
    assert read_joules(GPU) is None


def test_without_the_package_there_is_no_energy_figure(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_joules(GPU) is None
