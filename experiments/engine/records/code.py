"""Which code a command runs: this tree's, and that of a study, a file outside the tree.

A study is loaded only because a command names its file. The command keeps a copy in its results
folder, which worker processes load. A job that waits in a queue runs what it was submitted with.
"""

from __future__ import annotations

import hashlib
import site
import sys
import traceback
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.engine.machine.system_errors import explain
from experiments.engine.records.files import written_whole
from experiments.engine.records.tree import REPOSITORY, require_tree, tree_digest
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.study import Study, sign

NAME = "STUDY"  # what a study file declares


@dataclass(frozen=True)
class StudyFile:
    """A study that is loaded."""

    path: Path
    # Of its content.
    digest: str
    # The current folder of the command, from which the study's own paths lead.
    folder: Path


@dataclass(frozen=True)
class Code:
    """The code of a process."""

    # The digest of this tree.
    tree: str
    study: StudyFile | None = None

    @property
    def digests(self) -> tuple[str, str]:
        """Return what identifies the code, wherever it lies."""
        return self.tree, self.study.digest if self.study else ""


class _Loaded:
    """The study of this process, with its content."""

    file: StudyFile | None = None
    content = b""
    study: Study | None = None


def own_code() -> Code:
    """Return the code of this process."""
    return Code(tree_digest(), _Loaded.file)


def require_code(code: Code, root: Path) -> None:
    """Make this process run the code of the command that started it: load its study.

    Args:
        code: of the command.
        root: the results folder, which keeps the study.

    Raises:
        ValueError: if this process imports another tree, or the kept study is not the command's.
    """
    require_tree(code.tree)
    if code.study is None:
        return
    content = _read(_kept(root, code.study.digest))
    if _digest(content) != code.study.digest:
        raise ValueError(
            f"{_kept(root, code.study.digest)} is not {code.study.path.name} as it was when the "
            "command started; remove that file, and start the command again"
        )
    try:
        with chdir(code.study.folder):
            _load(code.study.path, content)
    except OSError as error:
        raise ValueError(
            f"{code.study.path.name} cannot run in {code.study.folder}, where its command was "
            f"started: {error.strerror}; start it in a folder that all nodes share"
        ) from None


def require_same_code(first: Code) -> None:
    """Raise ValueError if this process runs other code than the first one of its group."""
    require_tree(first.tree)
    if own_code().digests != first.digests:
        raise ValueError(
            "this rank loaded another study than the first one; start all ranks with the same file"
        )


def load_study(path: Path) -> Study:
    """Run a study's file and return what it declares.

    Networks that its code makes carry its digest.

    Raises:
        ValueError: in one line, if the file cannot be read or run, declares no study, or redefines
            a registered name.
    """
    return _load(path.resolve(), _read(path))


def require_own_code(backbone: Backbone) -> None:
    """Raise ValueError if a network's code is that of a study which this process has not loaded."""
    loaded = _Loaded.file.digest if _Loaded.file else ""
    if backbone.code not in ("", loaded):
        raise ValueError(
            f"network {backbone.name} is of the study with digest {backbone.code}, which is not "
            "loaded; name the study's file, unchanged since the run"
        )


def keep_study(root: Path) -> None:
    """Write the loaded study to `studies/<digest>.py` of a results folder, unless it is there."""
    if _Loaded.file is None:
        return
    path = _kept(root, _Loaded.file.digest)
    if not path.exists():
        with written_whole(path) as file:
            file.write(_Loaded.content)


def _kept(root: Path, digest: str) -> Path:
    """Return where a results folder keeps a study."""
    return root / "studies" / f"{digest}.py"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the study cannot be read: {explain(error, 'read', path)}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _load(path: Path, content: bytes) -> Study:
    file = StudyFile(path, _digest(content), Path.cwd())
    if _Loaded.file and _Loaded.study:
        if _Loaded.file.digest == file.digest:
            return _Loaded.study
        raise ValueError(f"a process runs one study, and {_Loaded.file.path.name} is loaded")

    # The study registers networks while it runs.
    import backbones

    before, modules = backbones.registered_classes(), set(sys.modules)
    declared = _run(path, content)
    _require_one_file(path, set(sys.modules) - modules)
    after = backbones.registered_classes()
    changed = [name for name, cls in before.items() if after.get(name) is not cls]
    if changed:
        raise ValueError(f"{path.name} redefines {changed[0]!r}; choose another name")

    # What it registered tells which networks are its own.
    if not isinstance(declared, Study):
        raise ValueError(f"{path.name} declares no study: its last line is {NAME} = Study(...)")
    try:
        declared.check()
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    names = {name.removeprefix("mixer ") for name in set(after) - set(before)}
    study = sign(declared, names, file.digest)
    _Loaded.file, _Loaded.content, _Loaded.study = file, content, study
    return study


def _run(path: Path, content: bytes) -> Any:
    """Run a study as a module and return its STUDY. Raise ValueError, in one line, if it fails."""
    module = ModuleType(f"study_{_digest(content)}")
    module.__file__ = str(path)
    # Dataclasses and pickles look for the module of a class.
    sys.modules[module.__name__] = module

    # An error is told with the line of the study in which it arose.
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except SyntaxError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f"{path.name}, line {lines[-1]}" if lines else path.name
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{reason}") from None
    return getattr(module, NAME, None)


def _require_one_file(path: Path, imported: set[str]) -> None:
    """Raise ValueError if a study imported a module that lies beside it: the digest has but one."""
    installed = [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY]
    installed += map(Path, (*site.getsitepackages(), site.getusersitepackages()))
    for name in sorted(imported):
        place = getattr(sys.modules.get(name), "__file__", None)
        if place is None or Path(place) == path:
            continue
        beside = Path(place).resolve().is_relative_to(path.parent)
        if beside and not any(Path(place).is_relative_to(folder) for folder in installed):
            raise ValueError(
                f"{path.name} imports {Path(place).name} beside it, which its digest does not "
                "cover; put that code into the study's own file, or install it as a package"
            )
