"""Initial weights as a function of (seed, parameter name).

Networks that share a parameter's name start from equal weights there, so that a difference between
two trainings is a difference of the networks and not of their draws. Every parameter keeps its
family's own distribution: the constructor runs unchanged, and only the source of its random numbers
is replaced.

The numbers of a tensor are nested. A wider layer holds the narrower layer's numbers in its first
rows and columns, and a larger odd kernel holds the smaller kernel's numbers in its middle. Both are
scaled by what the constructor asks for, such as a bound that depends on the number of inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# random operators that overwrite a tensor, and those that return a new one
_IN_PLACE = {_aten.uniform_.default: "uniform", _aten.normal_.default: "normal"}
_NEW = {
    _aten.rand.default: "uniform",
    _aten.randn.default: "normal",
    _aten.rand_like.default: "uniform",
    _aten.randn_like.default: "normal",
}
# operators after which nothing of a tensor's earlier numbers is left
_OVERWRITING = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.copy_.default}


def build_by_name(
    construct: Callable[[], nn.Module], seed: int, shared_name: Callable[[str], str] = str
) -> nn.Module:
    """Build a network whose random parameters are drawn by (seed, name), each from its own stream.

    The constructor runs twice: first to learn which draw ends in which parameter, then with the
    draws replaced. `shared_name` maps a parameter's name to the name that other families know.

    Raises ValueError if a parameter comes from a random operator that cannot be drawn by name.
    """
    with _Listener() as heard:
        names = heard.names_of_draws(construct(), shared_name)
    with _Replacement(seed, names):
        return construct()


def nested_numbers(key: str, shape: tuple[int, ...], distribution: str) -> NDArray[np.float64]:
    """Return numbers of U[0, 1) or N(0, 1) for a tensor, nested in every dimension.

    Args:
        key: names the stream.
        shape: of the tensor. The last two of four dimensions are a kernel if equal and odd.
            Kernels are nested about their middle, other dimensions from the front.
        distribution: "uniform" or "normal".
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    stream = np.frombuffer(digest, dtype=np.uint64)

    def row(index: int, ring: int, count: int) -> NDArray[np.float64]:
        # Philox jumps to any counter, so that every row is a stream of its own
        counter = np.array([0, index, ring, 0], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=stream, counter=counter))
        if distribution == "uniform":
            return generator.random(count)
        return generator.standard_normal(count)

    if len(shape) == 4 and shape[-1] == shape[-2] and shape[-1] % 2 == 1:
        return _nested_kernel(shape, row)

    # every row is a stream, of which a narrower row is the beginning
    numbers = np.empty(shape)
    for position in np.ndindex(*shape[:-1]):
        numbers[position] = row(_row_index(position), 0, shape[-1])
    return numbers


def _row_index(position: tuple[int, ...]) -> int:
    """Return one number for a position, which does not depend on the extent of any dimension."""
    index = 0
    for coordinate in position:
        index = (index << 20) + coordinate
    return index % 2**64


def _nested_kernel(
    shape: tuple[int, ...], row: Callable[[int, int, int], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Fill kernels ring by ring from the middle; every ring of every output is a stream."""
    outputs, inputs, side, _ = shape
    offsets = np.arange(side) - side // 2
    distance = np.maximum(np.abs(offsets[:, None]), np.abs(offsets[None, :]))
    numbers = np.empty(shape)
    for ring in range(side // 2 + 1):
        on_ring = distance == ring
        places = int(on_ring.sum())
        for output in range(outputs):
            values = row(output, ring, inputs * places)
            numbers[output][:, on_ring] = values.reshape(inputs, places)
    return numbers


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class _Listener(TorchDispatchMode):
    """Hears a constructor and follows every random draw to the tensors that it ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_draws = 0
        # the draws whose numbers a storage holds, by the storage
        self.draws: dict[int, set[int]] = {}
        # storages are kept alive, so that no address is used twice
        self.kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = operator(*arguments, **(keywords or {}))
        inputs = [*_tensors(arguments), *_tensors(list((keywords or {}).values()))]
        outputs = list(_tensors(result))
        self.kept += [tensor.untyped_storage() for tensor in outputs]

        # a random operator begins a new draw; other operators hand on what their inputs hold
        if operator in _IN_PLACE or operator in _NEW:
            held = {self.num_draws}
            self.num_draws += 1
        else:
            sources = inputs[1:] if operator in _OVERWRITING else inputs
            held = set().union(*(self.draws.get(_storage(tensor), set()) for tensor in sources))
        for tensor in outputs:
            self.draws[_storage(tensor)] = held
        return result

    def names_of_draws(
        self, network: nn.Module, shared_name: Callable[[str], str]
    ) -> dict[int, str]:
        """Return the shared name of every draw that a parameter or buffer still holds."""
        names: dict[int, str] = {}
        held = [*network.named_parameters(), *network.named_buffers()]
        for name, tensor in held:
            for order, draw in enumerate(sorted(self.draws.get(_storage(tensor), set()))):
                names.setdefault(draw, f"{shared_name(name)}/{order}")
        return names


class _Replacement(TorchDispatchMode):
    """Gives a constructor's random operators the numbers of their parameters' streams."""

    def __init__(self, seed: int, names: dict[int, str]) -> None:
        super().__init__()
        self.seed = seed
        self.names = names
        self.num_draws = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        distribution = _IN_PLACE.get(operator) or _NEW.get(operator)
        if distribution is None:
            if torch.Tag.nondeterministic_seeded in operator.tags:
                raise ValueError(
                    f"initial weights cannot be drawn by name: a constructor calls {operator}; "
                    "use uniform or normal numbers there, or a recipe that draws in sequence"
                )
            return operator(*arguments, **keywords)

        # a draw that no parameter holds at the end may keep the global generator's numbers
        result = operator(*arguments, **keywords)
        name = self.names.get(self.num_draws)
        self.num_draws += 1
        if name is None:
            return result

        # the first scalars are a uniform's bounds, or a normal's mean and deviation
        scalars = arguments[1:3] if operator in _IN_PLACE else ()
        offset, scale = _offset_and_scale(distribution, scalars, keywords)
        numbers = nested_numbers(f"{self.seed}/{name}", tuple(result.shape), distribution)
        return result.copy_(torch.from_numpy(offset + scale * numbers))


def _offset_and_scale(
    distribution: str, scalars: tuple[float, ...], keywords: dict[str, Any]
) -> tuple[float, float]:
    """Return what turns standard numbers into the operator's."""
    if distribution == "uniform":
        low = scalars[0] if scalars else keywords.get("from", 0.0)
        high = scalars[1] if len(scalars) > 1 else keywords.get("to", 1.0)
        return low, high - low
    mean = scalars[0] if scalars else keywords.get("mean", 0.0)
    deviation = scalars[1] if len(scalars) > 1 else keywords.get("std", 1.0)
    return mean, deviation
