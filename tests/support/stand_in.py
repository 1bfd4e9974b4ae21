"""A CPU that stands in for a GPU: tensors say that they are on `cuda`, and have values.

`replace_device` changes torch for the rest of the process. Everything that this suite asks of
`torch.cuda` has an answer: queries, streams, synchronisation, memory, energy and graphs. A graph
notes the operators of its capture and runs them again. Fused kernels of a GPU are not taken, since
`is_cuda` stays false.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.kernels.op import _ops

NAME = "a CPU in place of a GPU"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# What makes tensors where `device` says.
FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones "
    "ones_like rand rand_like randint randint_like randn randn_like randperm tensor zeros "
    "zeros_like"
)
METHODS = "new_empty new_full new_ones new_tensor new_zeros to"
# Joules that a GPU has used so far, in thousandths; every question finds it higher.
_energy = iter(range(1000, 10**9, 1000))


class Generator(torch.Generator):
    """A generator of the CPU that says where it was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self._asked = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._asked


class Autocast(torch.autocast):
    """Autocast of the CPU, whichever device is named."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Profile(torch.profiler.profile):
    """A profile of the CPU's activities, whichever are named."""

    def __init__(self, activities: Any = None, **kwargs: Any) -> None:
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU], **kwargs)


class Stream:
    """A queue of work that is always done."""

    def wait_stream(self, other: Stream) -> None:
        """Wait for nothing."""

    def is_capturing(self) -> bool:
        """Return that nothing is captured."""
        return False


class Graph:
    """Operators in the order of their capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        """Run the operators again, and put their results where those of the capture are."""
        assert self.calls, "a graph is replayed that captured nothing"
        with torch.inference_mode():
            for func, args, kwargs, captured in self.calls:
                again = func(*args, **kwargs)
                for before, now in zip(tree_leaves(captured), tree_leaves(again), strict=True):
                    if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                        before.copy_(now)


class Capture(TorchDispatchMode):
    """Notes every operator, forward and backward, in a graph."""

    def __init__(self, graph: Graph, capture_error_mode: str = "global") -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


def replace_device() -> None:
    """Let torch of this process find one GPU, which is the CPU."""
    # A block that makes tensors elsewhere, on `meta`, knows the factories as they are now.
    _device_constructors()
    for name in FACTORIES.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in METHODS.split():
        setattr(Tensor, name, _on_cpu(getattr(Tensor, name)))

    Tensor.device = property(_device_of)
    Tensor.pin_memory = lambda x: x
    torch.Generator = Generator

    # Numeric modes and compilation.
    torch.autocast = Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, _about_cpu(getattr(torch, name)))
    torch.compile = _compile
    torch.profiler.profile = Profile

    for name, answer in _answers().items():
        setattr(torch.cuda, name, answer)
    torch.accelerator.current_stream = lambda *args: Stream()
    sys.modules["pynvml"] = _energy_meter()

    # Passes in C are of CPUs alone, and no graph notes them.
    for op in _ops.values():
        op.choices.pop("rows", None)


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make on the CPU what is asked for on the GPU, and pin nothing."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _real(kwargs["device"])
        return make(*map(_real, args), **kwargs)

    return run


def _real(x: Any) -> Any:
    if isinstance(x, torch.device):
        return CPU if x.type == "cuda" else x
    return "cpu" if isinstance(x, str) and x.partition(":")[0] == "cuda" else x


def _device_of(x: Tensor) -> torch.device:
    """Say that a tensor with values is on the GPU, to all but torch itself."""
    device = torch._C.TensorBase.device.__get__(x)
    if device.type != "cpu":
        return device
    asks = sys._getframe(1).f_globals.get("__name__", "")
    return device if asks.partition(".")[0] == "torch" else CUDA


def _about_cpu(ask: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: ask(*map(_real, args))


def _compile(run: Any, **options: Any) -> Any:
    """Count a compilation, and leave the code as it is."""
    counters["stats"]["unique_graphs"] += 1
    return run


def _answers() -> dict[str, Any]:
    """Return what takes the place of functions of `torch.cuda`."""
    card = SimpleNamespace(
        name=NAME, uuid="0", major=9, minor=0, total_memory=2**37, multi_processor_count=1
    )
    peak = {"bytes": 2**20}
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *args: NAME,
        "get_device_properties": lambda *args: card,
        "get_device_capability": lambda *args: (card.major, card.minor),
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *args: None,
        "max_memory_allocated": lambda *args: peak["bytes"],
        "Stream": Stream,
        "current_stream": lambda *args: Stream(),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": Capture,
    }


def _energy_meter() -> ModuleType:
    """Return a module like the package that reads a GPU's energy."""
    module = ModuleType("pynvml")
    module.NVMLError = RuntimeError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(_energy)
    return module
