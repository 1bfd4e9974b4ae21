"""Where images go, judged before the first of them is drawn."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from experiments.engine.records.files import written_whole

SET = "set"  # name of the text in a PNG that holds the id of its set


def require_file(path: Path) -> None:
    """Raise ValueError if a file cannot be written, or would replace what is no plain file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file; name another --out")
    _probe(path.parent, "--out")


def require_own_folder(folder: Path, names: Collection[str], set_id: str) -> None:
    """Refuse a folder that cannot be written, or that holds anything but a part of one set.

    Args:
        folder: where PNGs go.
        names: the names of the set's files.
        set_id: the id that its files bear.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name another --png")
    _probe(folder, "--png")

    # What a killed command was writing is removed; anything else belongs to somebody.
    foreign = []
    for path in sorted(folder.iterdir()):
        unfinished = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if unfinished and unfinished[1] in names:
            path.unlink()
        elif path.name not in names or _read_set(path) != set_id:
            foreign.append(path.name)
    if foreign:
        raise ValueError(
            f"{folder} holds {len(foreign)} files that are not of these images, such as "
            f"{ascii(foreign[0])}; name an empty folder with --png"
        )


def _read_set(path: Path) -> str | None:
    """Return the id of the set that a PNG says it is of, or None."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get(SET)
    except (OSError, SyntaxError, ValueError):
        return None


def _probe(folder: Path, option: str) -> None:
    """Write and remove a file, so that a folder that cannot be written is known before any work."""
    probe = folder / ".probe"
    try:
        with written_whole(probe) as file:
            file.write(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder} ({error.strerror}); name another {option}"
        ) from None
