"""Where images go, judged before the first of them is drawn."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.engine.data.image_files import ImageFile
from experiments.engine.records.files import require_folder, require_target, take_lock

SET = "set"  # name of the text in a PNG that holds the id of its set

# The options that name targets.
OUT = "--out"
PNG = "--png"


def require_own_file(path: Path, about: Mapping[str, Any], num: int) -> None:
    """Refuse a file that cannot be written, or that holds anything but this set of images.

    Args:
        path: where the set goes. An empty file holds nothing.
        about: what the file says of its set.
        num: how many images it holds.
    """
    require_target(path, OUT)
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        images = ImageFile(path)
        origin = images.origin or {}
        same = len(images) == num and all(origin.get(key) == about[key] for key in about)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"{path} is there and holds other content; remove it or name another {OUT}"
        )


def require_own_folder(folder: Path, names: Collection[str], set_id: str) -> None:
    """Refuse a folder that cannot be written, or that holds anything but a part of one set.

    Args:
        folder: where PNGs go.
        names: the names of the set's files.
        set_id: the id that its files bear.
    """
    require_folder(folder, PNG)

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
            f"{ascii(foreign[0])}; name an empty folder with {PNG}"
        )


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this command alone; a lock on the folder itself leaves no file in it.

    Raises:
        ValueError: another command holds the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not take_lock(descriptor, wait=False):
            raise ValueError(f"another command is writing into {folder}; name another {PNG}")
        yield
    finally:
        os.close(descriptor)


def _read_set(path: Path) -> str | None:
    """Return the id of the set that a PNG says it is of, or None."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get(SET)
    except (OSError, SyntaxError, ValueError):
        return None
