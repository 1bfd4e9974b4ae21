"""What the benchmarks measure, as specs: their hashes name the records. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.engine.specs.spec import Backbone

# Tokens and width of every kernel's inputs: those of DiT-S/2 at 32x32 latents.
TOKENS, DIM = 256, 384


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation, timed forward and backward."""

    op: str
    choice: str
    device: str
    batch: int
    # Numeric mode; in 'bf16' the activations have that type and autocast is on.
    precision: str = "fp32"
    tokens: int = TOKENS
    dim: int = DIM


@dataclass(frozen=True)
class Steps:
    """Steps of one network on one device, beside those of other loops."""

    network: str
    # 'training' or 'sampling'.
    what: str
    batch: int
    device: str
    precision: str
    compile: bool = False
    graphs: bool = False
    # SHA-256 of the file with the other implementation.
    other: str | None = None


@dataclass(frozen=True)
class Neighbours:
    """Precision and recall of two sets of features."""

    # 'exact', with density and coverage, or 'half', in ADM's half-precision arithmetic.
    arithmetic: str
    device: str
    samples: int
    reference: int
    # Features per image.
    dim: int


@dataclass(frozen=True)
class Stall:
    """Training that writes a checkpoint in the background."""

    backbone: Backbone
    device: str
    batch: int
    # Steps between two checkpoints.
    every: int


@dataclass(frozen=True)
class Loader:
    """Latents of this size, drawn anew from moments, in shuffled batches."""

    size: int = 32
    batch: int = 256


@dataclass(frozen=True)
class SmallTrainings:
    """Trainings of small networks in one thread, beside those of another commit of this suite."""

    # Commit of the other tree.
    against: str
    # Height and width of the images.
    size: int
    channels: int
    batch: int
    # Labels of the rows.
    rows: tuple[str, ...]


@dataclass(frozen=True)
class StackedTrainings:
    """Seeds of small networks trained in one thread as one stack, beside the same one by one."""

    # Seeds in a stack.
    members: int
    size: int
    channels: int
    batch: int
    rows: tuple[str, ...]
