"""Randomness as a function of position, so that a restart or another number of processes changes nothing."""

from __future__ import annotations

import hashlib

import torch


def seed_at(*position: int | str) -> int:
    """A 63-bit seed for a position such as ("train", seed, step). Equal positions give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its position."""
    return torch.Generator(device).manual_seed(seed_at(*position))
