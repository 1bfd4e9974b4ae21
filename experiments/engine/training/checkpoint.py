"""A run's own checkpoints: written whole and in the background, named by their checksum, the newest few and milestones kept."""

from __future__ import annotations

import copy
import errno
import hashlib
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from experiments.engine.records.files import sync_folder, written_whole

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


class Writer:
    """Saves in the background: `save` copies the state to host memory and returns; one save is under way at a time.

    Raises what a save failed with at the next `save` or at `wait`. `stalled` counts the seconds that callers waited.
    """

    def __init__(self, folder: Path, keep: int = 2, milestones: int | None = None) -> None:
        self.folder, self.keep, self.milestones, self.stalled = folder, keep, milestones, 0.0
        self._copy: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.wait()
        started = time.perf_counter()
        self._copy = _copied(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._save, args=(step,))
        self._thread.start()
        self.stalled += time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the last save is on disk."""
        started = time.perf_counter()
        self._join()
        self.stalled += time.perf_counter() - started
        if self._error:
            error, self._error = self._error, None
            raise error

    def _save(self, step: int) -> None:
        try:
            save(self.folder, step, self._copy, self.keep, self.milestones)
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._join()


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int = 2, milestones: int | None = None
) -> Path:
    """Write `state` as step-<step>-<sha256>.pt; keep the newest `keep` and every step that `milestones` divides.

    Raises OSError, and leaves the older ones, where the disk is or becomes full. Other files of this step and of
    later ones were found damaged by the run that now comes past them, and go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(
        ".step.staged.*.tmp"
    ):  # by processes that were killed: a run has one writer
        left.unlink()
    _require_space(folder, state)
    staged = folder / "step.staged"
    with written_whole(staged) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, writer)
        except RuntimeError:  # torch says that its archive broke; a full disk should be called one
            raise writer.error or RuntimeError("the checkpoint could not be written") from None
    path = staged.rename(folder / f"step-{step:08d}-{writer.digest.hexdigest()[:16]}.pt")
    sync_folder(folder)  # before an older one goes
    found = _newest_first(folder)
    earlier = [old for old in found if _step(old) < step or old == path]
    for old in (*(old for old in found if old not in earlier), *earlier[keep:]):
        if old not in earlier or not (milestones and _step(old) % milestones == 0):
            old.unlink()
    return path


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose checksum holds, or None. A damaged one is reported and the one before is used."""
    for path in _newest_first(folder):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if found == _NAME.fullmatch(path.name).group(2):
            return path
        print(
            f"warning: checkpoint {path.name} is damaged (its checksum is {found}); trying the one before",
            file=sys.stderr,
        )
    return None


def load(path: Path, map_location: torch.device | str = "cpu") -> tuple[int, dict[str, Any]]:
    """Step and state of a checkpoint that `newest_intact` found."""
    return _step(path), torch.load(path, map_location=map_location, weights_only=True)


def load_newest(
    folder: Path, map_location: torch.device | str = "cpu"
) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest intact checkpoint, or None."""
    path = newest_intact(folder)
    return load(path, map_location) if path else None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), reverse=True
    )


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def _copied(value: Any, before: Any) -> Any:
    """`value` with its tensors in host memory, in the buffers of an earlier copy where they fit; pinned if it came from a GPU."""
    if isinstance(value, Tensor):
        fits = isinstance(before, Tensor) and (before.shape, before.dtype, before.stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        )
        buffer = before if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        earlier = before if isinstance(before, dict) else {}
        result = copy.copy(
            value
        )  # with the version numbers that a state_dict carries as an attribute
        result.update((name, _copied(item, earlier.get(name))) for name, item in value.items())
        return result
    if isinstance(value, list | tuple):
        earlier = (
            before
            if isinstance(before, list | tuple) and len(before) == len(value)
            else [None] * len(value)
        )
        return type(value)(_copied(item, old) for item, old in zip(value, earlier, strict=True))
    return value


def _require_space(folder: Path, state: Any) -> None:
    needed, free = _num_bytes(state) + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: a checkpoint takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
        )


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    items = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return sum(map(_num_bytes, items))
