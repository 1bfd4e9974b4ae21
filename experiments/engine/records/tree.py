"""Which code runs: the tree of the command, its digest and its commit.

Worker processes must run the code of the command that started them. `own_environment` makes them
import it, whatever their current folder or PYTHONPATH offers. `require_tree` refuses a worker of
another tree.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.machine.environment import read_variable

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGES = ("backbones", "experiments", "analysis")


@dataclass(frozen=True)
class Commit:
    """The version of this tree, as far as it can be told."""

    # None: it cannot be told, and `reason` says why
    hash: str | None
    # whether tracked files other than results differ from the commit; None where git has nothing
    # to say
    dirty: bool | None
    reason: str = ""


@functools.cache
def tree_commit() -> Commit:
    """Return the commit of this tree: git's, or else $DICO_COMMIT, or else none."""
    top = _git("rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == REPOSITORY:
        # New results do not change what the code does.
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        commit = _git("rev-parse", "HEAD")
        if commit:
            return Commit(commit, None if changes is None else bool(changes))

    named = read_variable("DICO_COMMIT")
    if named:
        return Commit(named, None)
    if top is None:
        reason = "git knows no repository here, or is not installed"
    elif Path(top).resolve() == REPOSITORY:
        reason = "the repository has no commit yet"
    else:
        reason = f"the code lies within another repository, {top}"
    return Commit(None, None, reason)


@functools.cache
def warn_without_commit() -> None:
    """Say once, with the reason, that records will not name a commit."""
    commit = tree_commit()
    if commit.hash is None:
        print(
            f"warning: records name no commit: {commit.reason}; set DICO_COMMIT to name one",
            file=sys.stderr,
        )


@functools.cache
def tree_digest() -> str:
    """Return a hash of every Python file of this tree's packages, by name and content."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            total.update(f"{path.relative_to(REPOSITORY)}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def require_tree(digest: str) -> None:
    """Raise ValueError if this process runs other code than the one that gave the digest."""
    if tree_digest() != digest:
        raise ValueError(
            f"this worker imports other code, from {REPOSITORY}, than the command that started it; "
            "do not edit the code while a command runs, and start the command again"
        )


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python imports this tree before others of the same names."""
    others = [
        entry
        for entry in environment.get("PYTHONPATH", "").split(os.pathsep)
        if entry and Path(entry).resolve() != REPOSITORY
    ]
    path = os.pathsep.join([str(REPOSITORY), *others])
    # PYTHONSAFEPATH keeps the current folder off the path of `python -m` and `python -c`.
    return dict(environment) | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _git(*command: str) -> str | None:
    """Return what git prints about this tree, or None if it fails.

    Variables such as $GIT_DIR, which a hook sets, would make git speak of another repository.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    # A tree without git, or without a repository, still leaves a record.
    try:
        done = subprocess.run(
            ["git", *command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
