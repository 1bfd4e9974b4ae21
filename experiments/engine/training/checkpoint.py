"""A run's own checkpoints: files written whole and in the background, named by their checksum.

A network that processes share is written as a folder of parts until its training has finished. The
newest few checkpoints are kept, and milestones for good.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from experiments.engine.numerics.parts import part_state
from experiments.engine.records.files import file_sha256, sync_folder, written_whole
from experiments.engine.records.trained import CHECKPOINT_NAME
from experiments.engine.runtime.group import Group


class Writer:
    """Saves in the background, one checkpoint at a time.

    `save` copies the state to host memory and returns. What a save failed with is raised by the
    next `save` or `wait`.

    Attributes:
        stalled: Seconds that callers have waited.
    """

    def __init__(self, folder: Path, keep: int = 2, milestones: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.milestones = milestones
        self.stalled = 0.0
        self._copy: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state, and write it in the background."""
        self.wait()
        started = time.perf_counter()
        self._copy = _copy_to_host(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._save, args=(step,))
        self._thread.start()
        self.stalled += time.perf_counter() - started

    def save_parts(self, step: int, state: dict[str, Any], group: Group) -> None:
        """Write a state that the processes share. All of them call this, and wait for the disk."""
        self.wait()
        started = time.perf_counter()
        save_parts(self.folder, step, state, group, self.keep, self.milestones)
        self.stalled += time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        started = time.perf_counter()
        self._join()
        self.stalled += time.perf_counter() - started
        if self._error:
            error, self._error = self._error, None
            raise error

    def _save(self, step: int) -> None:
        try:
            save(self.folder, step, self._copy, self.keep, self.milestones)
        except BaseException as error:  # raised by the next wait
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
    """Write `state` as step-<step>-<sha256>.pt.

    The newest `keep` checkpoints stay, and every step that `milestones` divides.

    Raises:
        OSError: The disk is or becomes full. The older checkpoints stay then.
    """
    # A run has one writer, so staged files are of processes that were killed.
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step.staged.*.tmp"):
        leftover.unlink()

    _require_space(folder, state)
    staged = folder / "step.staged"
    digest = _write(staged, state)
    path = staged.rename(folder / f"step-{step:08d}-{digest[:16]}.pt")

    # The new checkpoint is safe before an older one goes.
    sync_folder(folder)
    _remove_superseded(folder, path, keep, milestones)
    return path


def save_parts(
    folder: Path,
    step: int,
    state: dict[str, Any],
    group: Group,
    keep: int = 2,
    milestones: int | None = None,
) -> None:
    """Write a state that processes share as the folder step-<step>-<sha256>. All call this.

    Raises:
        OSError: The disk is or becomes full. The older checkpoints stay then.
        ValueError: The processes do not see each other's files.
    """
    from experiments.engine.training.sharded import files

    if group.first:
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder, state)
    staged = files.write_parts(folder, state, group)

    # The new checkpoint is safe before an older one goes.
    if group.first:
        path = staged.rename(folder / f"step-{step:08d}-{files.digest_of(staged)[:16]}")
        sync_folder(folder)
        _remove_superseded(folder, path, keep, milestones)


def _write(path: Path, state: dict[str, Any]) -> str:
    """Write a state and return its SHA-256."""
    with written_whole(path) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(state, writer)  # type: ignore[arg-type]
        except RuntimeError:
            # PyTorch says that its archive broke, which hides that the disk is full.
            raise writer.error or RuntimeError("the checkpoint could not be written") from None
    return writer.digest.hexdigest()


class _HashingWriter:
    """Passes bytes on to a file and digests them. PyTorch writes its archives front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _remove_superseded(folder: Path, newest: Path, keep: int, milestones: int | None) -> None:
    """Remove the checkpoints that a new one replaces."""
    step = _step(newest)
    earlier = []
    for path in _newest_first(folder):
        if path == newest or _step(path) < step:
            earlier.append(path)
        else:
            # Other files of this step and of later ones were damaged: the run came past them.
            _remove(path)

    for path in earlier[keep:]:
        if not milestones or _step(path) % milestones != 0:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; of a folder, no part stays under its name."""
    if not path.is_dir():
        path.unlink()
        return
    from experiments.engine.training.sharded import files

    leftover = path.rename(path.with_name(files.STAGED))
    shutil.rmtree(leftover)


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint whose checksum holds, and warn of damaged ones before it."""
    return next((path for _, path in intact(folder)), None)


def intact(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of the checkpoints whose checksum holds, newest first.

    Damaged ones are warned of.
    """
    for path in _newest_first(folder):
        damage = _find_damage(path)
        if damage is None:
            yield _step(path), path
            continue
        print(
            f"warning: checkpoint {path.name} is damaged ({damage}); trying the one before",
            file=sys.stderr,
        )


def _find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if its checksum holds."""
    digest = _parse(path)[1]
    if path.is_dir():
        from experiments.engine.training.sharded import files

        damage = files.find_damage(path, digest)
        return f"{damage}; put it back to resume there" if damage else None
    checksum = file_sha256(path)[:16]
    return None if checksum == digest else f"its checksum is {checksum}"


def load(
    path: Path, map_location: torch.device | str = "cpu", like: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """Return step and state of an intact checkpoint.

    Args:
        path: Of the checkpoint, a file or a folder.
        map_location: Where whole tensors go.
        like: A nested state. Tensors that processes share there are read as their parts.
    """
    if path.is_dir():
        from experiments.engine.training.sharded import files

        return _step(path), files.read_parts(path, map_location, like)

    # What each process takes only a part of is not read at once.
    state = torch.load(
        path, map_location=map_location, weights_only=True, mmap=True if like else None
    )
    return _step(path), part_state(state, like) if like else state


def load_newest(
    folder: Path, map_location: torch.device | str = "cpu"
) -> tuple[int, dict[str, Any]] | None:
    """Return step and state of the newest intact checkpoint, or None."""
    path = newest_intact(folder)
    return load(path, map_location) if path else None


def _newest_first(folder: Path) -> list[Path]:
    names = (path for path in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name))
    return sorted(names, reverse=True)


def _parse(path: Path) -> tuple[int, str]:
    """Return the step and the checksum in a checkpoint's name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), match[2]


def _step(path: Path) -> int:
    return _parse(path)[0]


def _copy_to_host(value: Any, before: Any) -> Any:
    """Return `value` with its tensors in host memory.

    Args:
        value: Nested dictionaries, lists and tuples, with tensors from any device.
        before: An earlier copy, whose buffers are reused if they fit.
    """
    if isinstance(value, Tensor):
        return _copy_tensor(value, before)

    if isinstance(value, dict):
        earlier = before if isinstance(before, dict) else {}
        # A plain copy keeps the version numbers that a state_dict carries as an attribute.
        result = copy.copy(value)
        for name, item in value.items():
            result[name] = _copy_to_host(item, earlier.get(name))
        return result

    # A sequence is copied item by item, into the buffers of an earlier copy of equal length.
    if isinstance(value, list | tuple):
        fits = isinstance(before, list | tuple) and len(before) == len(value)
        olds = before if fits else [None] * len(value)
        return type(value)(_copy_to_host(*pair) for pair in zip(value, olds, strict=True))

    return value


def _copy_tensor(value: Tensor, before: Any) -> Tensor:
    """Copy a tensor to host memory, which is pinned if the tensor came from a GPU."""
    fits = (
        isinstance(before, Tensor)
        and before.shape == value.shape
        and before.dtype == value.dtype
        and before.stride() == value.stride()
    )
    pinned = value.is_cuda
    buffer = before if fits else torch.empty_like(value, device="cpu", pin_memory=pinned)
    return buffer.copy_(value.detach(), non_blocking=True)


def _require_space(folder: Path, state: Any) -> None:
    """Raise OSError if a state does not fit on the disk."""
    needed = _num_bytes(state) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: a checkpoint takes {needed / 1e9:.2f} GB "
            f"and {free / 1e9:.2f} GB are free",
            os.fspath(folder),
        )


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_num_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_num_bytes(item) for item in value)
    return 0
