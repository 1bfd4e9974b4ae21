"""Checkpoints of shared tensors: folders of torch.distributed.checkpoint, a part per process.

Beside the parts lie what holds no tensors, and a manifest with everything's checksum. The folder's
name holds the manifest's own. Any number of processes reads such a folder.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from experiments.engine.numerics.parts import is_part, map_tensors
from experiments.engine.records.files import file_sha256, sync_folder, written_whole
from experiments.engine.runtime.group import Group

MANIFEST = "manifest.json"
REST = "rest.pt"  # the state, without the values of its tensors
STAGED = ".parts.staged.tmp"
# What PyTorch's list of parts is made of, by module; dtypes beside.
LISTED = {
    "pathlib": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


def write_parts(folder: Path, state: dict[str, Any], group: Group) -> Path:
    """Write a state, each process its parts, and return the folder that holds them.

    All processes call this. The folder is not yet in its place.

    Args:
        folder: of the checkpoints.
        state: nested dictionaries. Plain tensors are the same in all processes.
        group: the processes.

    Raises:
        OSError: a process cannot write.
        ValueError: the processes do not see each other's files.
    """
    staged = folder / STAGED
    if group.first:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    group.broadcast(None)

    # An error of one process is raised by all.
    try:
        writer = dcp.FileSystemWriter(staged)
        with _may_be_alone():
            alone = group.world_size == 1
            dcp.save(_only_tensors(state), storage_writer=writer, no_dist=alone)
    except CheckpointException as failure:
        raise _cause(failure) from None

    # Each process reads what it wrote, and the first one keeps the checksums.
    own = sorted(staged.glob(f"__{group.rank}_*"))
    written = group.gather({path.name: file_sha256(path) for path in own})
    if group.first:
        _complete(staged, state, {name: sha for part in written for name, sha in part.items()})
    return staged


def _complete(staged: Path, state: dict[str, Any], files: dict[str, str]) -> None:
    """Write what is beside the parts, and the manifest at the end."""
    hidden = sorted(set(files) - {path.name for path in staged.iterdir()})
    if hidden:
        raise ValueError(
            f"part {hidden[0]} of a checkpoint lies where rank 0 does not see it; name a results "
            "folder that all nodes share"
        )
    with written_whole(staged / REST) as file:
        torch.save(
            map_tensors(state, lambda x, _: torch.empty(x.shape, dtype=x.dtype, device="meta")),
            file,
        )
    files |= {name: file_sha256(staged / name) for name in (".metadata", REST)}
    with written_whole(staged / MANIFEST) as file:
        file.write(json.dumps({"files": files}, indent=1).encode())
    sync_folder(staged)


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of a folder's manifest, which stands for all of its files."""
    return file_sha256(folder / MANIFEST)


def find_damage(folder: Path, digest: str) -> str | None:
    """Return what is wrong with a folder of parts; None if it is whole.

    Args:
        folder: of the parts.
        digest: the beginning of its manifest's checksum.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"its {MANIFEST} is missing"
    if not digest_of(folder).startswith(digest):
        return f"its {MANIFEST} is not what was written"
    for name, checksum in json.loads(path.read_bytes())["files"].items():
        if not (folder / name).is_file():
            return f"its part {name} is missing"
        if file_sha256(folder / name) != checksum:
            return f"its part {name} is not what was written"
    return None


def read_parts(
    folder: Path, device: torch.device | str = "cpu", like: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read the state in an intact folder, whatever number of processes wrote it.

    Args:
        folder: of the parts.
        device: where plain tensors go.
        like: a nested state. A tensor that is shared there is read as such a part of it.

    Raises:
        ValueError: the folder asks for code to be run.
    """

    def allocate(x: Tensor, other: Any) -> Tensor:
        if is_part(other):
            return torch.zeros_like(other, requires_grad=False)
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    # Each process reads for itself, and only what it holds.
    rest = torch.load(folder / REST, weights_only=True)
    state: dict[str, Any] = map_tensors(rest, allocate, like)
    with _may_be_alone():
        reader = _Reader(folder)
        reader.read_metadata()  # PyTorch would bury the error of a folder that asks for code
        dcp.load(_only_tensors(state), storage_reader=reader, no_dist=True)
    return state


class _Unpickler(pickle.Unpickler):
    """Build what a list of parts holds, and call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in LISTED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise ValueError(
                f"the list of a checkpoint's parts asks for {module}.{name}, which no such list "
                "needs: do not use this folder"
            )
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """A reader of parts that runs no code of a folder; PyTorch's own unpickles its list of them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def _may_be_alone() -> Iterator[None]:
    """Take no warning of a process that reads or writes by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _only_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return a nested state without what is no tensor, and without empty dictionaries."""
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            kept[name] = value.detach()
        elif isinstance(value, dict) and (inner := _only_tensors(value)):
            kept[name] = inner
    return kept


def _cause(failure: CheckpointException) -> BaseException:
    """Return the error behind PyTorch's list of them: a full disk before all others."""
    errors = [error for error, _ in failure.failures.values()]
    full = [x for x in errors if "No space left" in str(x) or isinstance(x, OSError)]
    if full and not isinstance(full[0], OSError):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return (full or errors)[0]
