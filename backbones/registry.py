"""Names of backbones and how they are built."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any

from torch import nn

_REGISTRY: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {}
_CLASSIFIERS: set[str] = set()
_GUIDED_CHANNELS: dict[type[nn.Module], int | None] = {}


def register(
    cls: type[nn.Module],
    sizes: dict[str, dict[str, Any]],
    tiny: dict[str, Any],
    classifier: bool = False,
    guided_channels: int | None = None,
) -> None:
    """Register one line per published size; `tiny` are the overrides with which the tests build the family.

    A `classifier` maps (x, t) to logits; it is built like a backbone and listed apart.
    `guided_channels` is the number of leading channels that the family's authors guide; None guides all.
    """
    _GUIDED_CHANNELS[cls] = guided_channels
    for name, options in sizes.items():
        if name in _REGISTRY:
            raise ValueError(f"backbone {name!r} is registered twice")
        _REGISTRY[name] = (cls, options, tiny)
        if classifier:
            _CLASSIFIERS.add(name)


def list_backbones(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, e.g. `dit_*_2`."""
    return sorted(fnmatch.filter(_REGISTRY.keys() - _CLASSIFIERS, pattern))


def list_classifiers(pattern: str = "*") -> list[str]:
    """Registered names of classifiers of noisy images that match a shell pattern."""
    return sorted(fnmatch.filter(_CLASSIFIERS, pattern))


def _entry(name: str) -> tuple[type[nn.Module], dict[str, Any], dict[str, Any]]:
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown backbone {name!r}; known: {', '.join([*list_backbones(), *list_classifiers()])}"
        )
    return _REGISTRY[name]


def options_of(name: str) -> dict[str, Any]:
    """Every option of a backbone with the value that `build(name)` gives it."""
    cls, options, _ = _entry(name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return defaults | options


def tiny_options_of(name: str) -> dict[str, Any]:
    """Overrides that shrink a backbone to a test's size."""
    return dict(_entry(name)[2])


def guided_channels_of(model: nn.Module) -> int | None:
    """Number of leading channels that classifier-free guidance changes; None means all of them.

    Raises ValueError if the network's class is not registered.
    """
    if type(model) not in _GUIDED_CHANNELS:
        raise ValueError(f"{type(model).__name__} is not a registered backbone; give its channels")
    return _GUIDED_CHANNELS[type(model)]


def build(name: str, **options: Any) -> nn.Module:
    """Build a registered backbone; keyword options override its size.

    Raises ValueError for an unknown name or option (the known ones are listed) and for sizes it cannot take.
    """
    cls, _, _ = _entry(name)
    known = options_of(name)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    return cls(**(known | options))
