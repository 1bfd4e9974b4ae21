"""A GPU is there if torch says so, whatever the names of its devices."""

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.engine import cli
from experiments.engine.machine import gpu
from experiments.engine.records.tree import REPOSITORY

NO_DRIVER = "libnone-of-this-name.so"


def fake_torch(usable: bool) -> SimpleNamespace:
    cuda = SimpleNamespace(is_available=lambda: usable)
    return SimpleNamespace(cuda=cuda, __version__="9.9", version=SimpleNamespace(cuda="13.0"))


@pytest.mark.parametrize(
    ("node", "driver", "absent"),
    [
        (None, NO_DRIVER, True),
        ("nvidia0", NO_DRIVER, False),
        ("nvidia3", NO_DRIVER, False),
        ("nvidiactl", NO_DRIVER, False),
        ("dxg", NO_DRIVER, False),
        ("kfd", NO_DRIVER, False),
        ("nvhost-gpu", NO_DRIVER, False),
        # a driver without a device may reach GPUs of another machine
        (None, "libc.so.6", False),
        ("null", NO_DRIVER, True),
    ],
)
def test_what_tells_that_there_is_certainly_no_gpu(
    node: str | None, driver: str, absent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu, "DRIVER", driver)
    if node:
        (tmp_path / node).touch()
    assert gpu.is_certainly_absent(tmp_path) is absent


@pytest.mark.parametrize("usable", [True, False])
def test_torch_has_the_last_word(usable: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(usable))
    device = "cuda" if usable else "cpu"
    args = argparse.Namespace(cluster="here", device=None)
    assert cli.device_of(args, "DiCo-S") == gpu.choose_device(None) == device
    assert gpu.choose_device("cpu") == "cpu" and gpu.choose_device("cuda") == "cuda"


def test_a_gpu_that_torch_cannot_use_is_refused_with_its_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(False))
    gpu.require_device("cpu")
    with pytest.raises(ValueError, match="no usable GPU: torch 9.9 was built for CUDA 13.0"):
        gpu.require_device("cuda")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(True))
    gpu.require_device("cuda")


def test_torch_is_asked_once_and_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A library that writes a letter whenever it is imported is imported once, and not here."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"open({str(tmp_path / 'asked')!r}, 'a').write('x')\n"
        "class cuda:\n    is_available = staticmethod(lambda: True)\n"
        "class version:\n    cuda = None\n"
        "__version__ = '1'\n"
    )

    # Ask twice, from the start.
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "is_certainly_absent", lambda: False)
    gpu._ask_in_a_process.cache_clear()
    try:
        assert gpu.has_gpu()
        assert gpu.choose_device(None) == "cuda"
        gpu.require_device("cuda")
    finally:
        gpu._ask_in_a_process.cache_clear()
    assert (tmp_path / "asked").read_text() == "x"
    assert "torch" not in sys.modules


def test_no_command_decides_by_itself():
    """Only the one module asks torch, and no file looks for the name of a device."""
    pattern = "cuda.is_available|/dev/nvidia"
    command = ["grep", "-rlE", pattern, "experiments", "analysis", "--include=*.py"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert listed.stdout.split() == ["experiments/engine/machine/gpu.py"]
