"""A run's own checkpoints: written whole, named by their checksum, the last two kept."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from experiments.engine.files import written_whole

_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.pt")


class _HashingWriter:
    """Passes bytes on to a file and digests them; torch writes its archives front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as step-<step>-<sha256>.pt and remove all but the two newest."""
    staged = folder / "step.staged"
    with written_whole(staged) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, writer)
        except RuntimeError:  # torch says that its archive broke; a full disk should be called one
            raise writer.error or RuntimeError("the checkpoint could not be written") from None
    path = staged.rename(folder / f"step-{step:08d}-{writer.digest.hexdigest()[:16]}.pt")
    for old in _newest_first(folder)[2:]:
        old.unlink()
    return path


def load_newest(folder: Path, map_location: torch.device | str = "cpu") -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest intact checkpoint, or None. A damaged one is reported and the one before is used."""
    for path in _newest_first(folder):
        step, checksum = _NAME.fullmatch(path.name).groups()
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if found == checksum:
            return int(step), torch.load(path, map_location=map_location, weights_only=True)
        print(f"warning: checkpoint {path.name} is damaged (its checksum is {found}); trying the one before", file=sys.stderr)
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True)
