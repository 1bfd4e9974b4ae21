"""Names of backbones, how they are built, and where a family departs from the contract test."""

from __future__ import annotations

import fnmatch
import inspect
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Exceptions:
    """Where a family departs from what tests/backbones/test_contract.py asks of every backbone.

    Every field but the sizes gives the reason in words; an empty one means no departure.
    """

    sizes: tuple[int, ...] = ()
    """Input sizes of the tests; by default three patches, or 8 and 12 without patches."""

    frozen: dict[str, str] = field(default_factory=dict)
    """Shell patterns of parameters that are not trained."""

    unreached: dict[str, str] = field(default_factory=dict)
    """Shell patterns of trained parameters whose gradient is zero, or that forward does not use."""

    open_head: str = ""
    """The untrained network does not predict zero."""

    drops_variance: str = ""
    """`learn_sigma` widens the head, but its second half is not part of the output."""

    no_null_label: str = ""
    """The published label table has no row for the null label."""

    fuses: str = ""
    """Evaluation mode computes the same function with other roundings."""

    uncounted: str = ""
    """No published count exists for the registered size."""


NO_EXCEPTIONS = Exceptions()


class Kind(Enum):
    """What a registered network is."""

    BACKBONE = "backbone"
    """Maps (x, t, y) to a prediction; the only kind that diffusion meets."""

    CLASSIFIER = "classifier"
    """Maps (x, t) to logits."""

    AUTOREGRESSIVE = "autoregressive"
    """Maps a label and coarser scales to the logits of tokens, in `forward`, `embed` and `step`."""

    TOKENIZER = "tokenizer"
    """Maps images to the tokens of an autoregressive network, and back."""

    AUTOENCODER = "autoencoder"
    """Maps images to the latents that diffusion works on, and back."""


@dataclass(frozen=True)
class Entry:
    """A registered name."""

    cls: type[nn.Module]
    """The network's class; its keyword-only arguments are the options."""

    options: dict[str, Any]
    """Options of the published size; the class's defaults hold for the rest."""

    tiny: dict[str, Any]
    """Options that shrink the family to a test's size."""

    aliases: dict[str, str]
    """Former names of options that ids of runs still hold, each with the option that it sets."""

    exceptions: Exceptions
    """Departures from the contract test."""

    guided_channels: int | None
    """Leading channels that the authors' classifier-free guidance changes; None for all."""

    kind: Kind
    """What the network is."""

    shared_names: dict[str, str]
    """Regular expressions in names of parameters, with what other families say there."""


_ENTRIES: dict[str, Entry] = {}


def register(
    cls: type[nn.Module],
    sizes: dict[str, dict[str, Any]],
    *,
    tiny: dict[str, Any],
    aliases: dict[str, str] | None = None,
    exceptions: Exceptions = NO_EXCEPTIONS,
    guided_channels: int | None = None,
    kind: str = Kind.BACKBONE.value,
    shared_names: dict[str, str] | None = None,
) -> None:
    """Register one line per published model.

    Args:
        cls: The network; its keyword-only arguments are the options.
        sizes: Name of each published model and the options that define it.
        tiny: Options with which the tests build the family.
        aliases: Former names of options that ids of runs still hold, each with the option that it
            sets. No listing shows them.
        exceptions: Departures from the contract test.
        guided_channels: How many leading channels the authors guide; None for all.
        kind: A value of Kind. Every kind has a listing of its own.
        shared_names: Regular expressions in names of parameters, with what replaces them. The
            results are the names of the controlled ablations, hourglass and isotropic.
    """
    for name, options in sizes.items():
        if name in _ENTRIES:
            raise ValueError(f"backbone {name!r} is registered twice; choose another name")
        _ENTRIES[name] = Entry(
            cls=cls,
            options=options,
            tiny=tiny,
            aliases=aliases or {},
            exceptions=exceptions,
            guided_channels=guided_channels,
            kind=Kind(kind),
            shared_names=shared_names or {},
        )


def registered_networks() -> dict[str, type[nn.Module]]:
    """Return the class of every registered name, classifiers included."""
    return {name: entry.cls for name, entry in _ENTRIES.items()}


def list_backbones(pattern: str = "*") -> list[str]:
    """List the registered backbones that match a shell pattern, e.g. `dit_*_2`."""
    return _list(Kind.BACKBONE, pattern)


def list_classifiers(pattern: str = "*") -> list[str]:
    """List the registered classifiers of noisy images that match a shell pattern."""
    return _list(Kind.CLASSIFIER, pattern)


def list_autoregressive(pattern: str = "*") -> list[str]:
    """List the registered networks that draw tokens scale by scale, by a shell pattern."""
    return _list(Kind.AUTOREGRESSIVE, pattern)


def list_tokenizers(pattern: str = "*") -> list[str]:
    """List the registered tokenizers that match a shell pattern."""
    return _list(Kind.TOKENIZER, pattern)


def _list(kind: Kind, pattern: str) -> list[str]:
    names = [name for name, entry in _ENTRIES.items() if entry.kind is kind]
    return sorted(fnmatch.filter(names, pattern))


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        known = ", ".join(known for kind in Kind for known in _list(kind, "*"))
        raise ValueError(f"unknown backbone {name!r}; known: {known}")
    return _ENTRIES[name]


def kind_of(name: str) -> Kind:
    """Return what a registered network is."""
    return _entry(name).kind


def require_kind(name: str, kind: Kind) -> None:
    """Raise ValueError unless a registered network is of a kind."""
    actual = kind_of(name)
    if actual is not kind:
        known = ", ".join(_list(kind, "*"))
        raise ValueError(f"{name} is of kind {actual.value}, not {kind.value}; known: {known}")


def options_of(name: str) -> dict[str, Any]:
    """Return every option of a backbone with the value that `build(name)` gives it."""
    entry = _entry(name)
    parameters = inspect.signature(entry.cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return defaults | entry.options


def shared_name_of(name: str, parameter: str) -> str:
    """Return the name by which all families know a backbone's parameter.

    Networks that share a parameter's name can start from equal weights there.
    """
    for pattern, replacement in _entry(name).shared_names.items():
        parameter = re.sub(pattern, replacement, parameter)
    return parameter


def tiny_options_of(name: str) -> dict[str, Any]:
    """Return the options that shrink a backbone to a test's size."""
    return dict(_entry(name).tiny)


def exceptions_of(name: str) -> Exceptions:
    """Return where a backbone departs from the contract test."""
    return _entry(name).exceptions


def guided_channels_of(model: nn.Module) -> int | None:
    """Return how many leading channels classifier-free guidance changes; None for all.

    Raises:
        ValueError: If the network's class is not registered.
    """
    for entry in _ENTRIES.values():
        if entry.cls is type(model):
            return entry.guided_channels
    raise ValueError(f"{type(model).__name__} is not a registered backbone; give its channels")


def build(name: str, **options: Any) -> nn.Module:
    """Build a registered backbone; options override those of its size.

    With `num_classes=0` the network is unconditional: it has no label table, and ignores labels.

    Raises:
        ValueError: For an unknown name or option, with the known ones, and for impossible sizes.
    """
    entry, known = _entry(name), options_of(name)

    # A former name sets the option that it stood for.
    resolved: dict[str, Any] = {}
    for option, value in options.items():
        target = entry.aliases.get(option, option)
        if target in resolved:
            raise ValueError(f"{name}: {option} and another option both set {target}")
        resolved[target] = value

    if unknown := sorted(set(resolved) - set(known)):
        listed = ", ".join(sorted(known))
        raise ValueError(f"{name} has no option {', '.join(unknown)}; known: {listed}")
    model = entry.cls(**(known | resolved))
    if known.get("num_classes") and resolved.get("num_classes") == 0:
        _remove_label_tables(model)
    return model


class NoLabels(nn.Module):
    """Stand where a label table would, and add nothing: (N,) -> (N, D) of zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, y: Tensor) -> Tensor:
        return torch.zeros(*y.shape, self.dim, device=y.device)


def _remove_label_tables(model: nn.Module) -> None:
    """Replace the tables of a network without classes, which hold a null label at most."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding) and child.num_embeddings <= 1:
                setattr(parent, name, NoLabels(child.embedding_dim))
