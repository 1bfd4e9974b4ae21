"""Errors of the system name operation, path and reason, and advise only what would help."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engine.cli import run_command
from experiments.engine.data.checks import open_array, read_classes
from experiments.engine.data.image_files import file_sha256, has_images
from experiments.engine.data.pictures import find_pictures
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.scheduled import work_in_job
from experiments.engine.machine import system_errors
from experiments.engine.machine.system_errors import explain, naming, require_file
from experiments.engine.records import files
from experiments.engine.records.files import read_json, written_whole
from experiments.engine.records.store import Store, read_record
from experiments.engine.runtime.group import one_line
from experiments.engine.specs.spec import Backbone, Cost
from tests.support.commands import call
from tests.support.paths import ROOT

ALL_ADVICE = set(system_errors.ADVICE.values())


def write(path: Path) -> None:
    with written_whole(path) as file:
        file.write(b"x")


class FullDisk(io.FileIO):
    """A file on a disk without space."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    return path / "full.json"


def refuse(number: int) -> Callable[[Path, pytest.MonkeyPatch], Path]:
    """Let the system refuse to open any file: root may open what others may not."""

    def prepare(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def fail(name: Path, *_: object) -> None:
            raise OSError(number, os.strerror(number), os.fspath(name))

        monkeypatch.setattr(files, "open", fail, raising=False)
        return path / "refused.json"

    return prepare


def put_folder(path: Path, _: pytest.MonkeyPatch) -> Path:
    (path / "taken" / "inner").mkdir(parents=True)
    return path / "taken"


def put_file(path: Path, _: pytest.MonkeyPatch) -> Path:
    (path / "file").write_text("")
    return path / "file" / "below.json"


def lengthen(path: Path, _: pytest.MonkeyPatch) -> Path:
    return path / ("x" * 300)


def close_circle(path: Path, _: pytest.MonkeyPatch) -> Path:
    (path / "circle").symlink_to(path / "circle")
    return path / "circle" / "a.json"


def take_kernel_folder(*_: object) -> Path:
    return Path("/proc/no-such.json")


WRITES = [
    (fill_disk, "write", errno.ENOSPC),
    (refuse(errno.EROFS), "write", errno.EROFS),
    (refuse(errno.EACCES), "write", errno.EACCES),
    (refuse(errno.EDQUOT), "write", errno.EDQUOT),
    (refuse(errno.EMFILE), "write", errno.EMFILE),
    (refuse(errno.EIO), "write", errno.EIO),
    (put_folder, "write", errno.EISDIR),
    (put_file, "make the folder", errno.EEXIST),
    (lengthen, "write", errno.ENAMETOOLONG),
    (close_circle, "make the folder", errno.ELOOP),
    (take_kernel_folder, "write", errno.ENOENT),
]


@pytest.mark.parametrize("prepare, operation, number", WRITES)
def test_what_cannot_be_written_is_named(
    prepare: Callable[[Path, pytest.MonkeyPatch], Path],
    operation: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    target = prepare(tmp_path, monkeypatch)
    with pytest.raises(OSError) as failure:
        write(target)
    monkeypatch.undo()

    # A loop of links may be found when the folder is made or looked at, under either number.
    text = explain(failure.value)
    named = target.parent if operation == "make the folder" else target
    reason = os.strerror(failure.value.errno)
    assert text.startswith(f"cannot {operation} {named}: {reason}"), text
    assert failure.value.errno in (number, errno.EEXIST)

    # It advises what would help, and nothing else.
    expected = system_errors.ADVICE[failure.value.errno]
    assert text.endswith(f"; {expected}")
    assert not any(advice in text for advice in ALL_ADVICE - {expected})
    assert "results" not in text and "\n" not in text


READERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: read_json(path, "repeat"), "read"),
    (file_sha256, "read"),
    (read_record, "read"),
    (open_array, "read"),
]


def missing(path: Path) -> tuple[Path, str, str]:
    return path / "gone", "No such file or directory", "check the path"


def folder(path: Path) -> tuple[Path, str, str]:
    (path / "folder").mkdir()
    return path / "folder", "Is a directory", "a folder is there"


def broken_link(path: Path) -> tuple[Path, str, str]:
    (path / "link").symlink_to(path / "lost")
    return path / "link", "No such file or directory", f"its link leads to {path}/lost"


def below_file(path: Path) -> tuple[Path, str, str]:
    (path / "file").write_text("")
    return path / "file" / "a", "Not a directory", "a file stands where a folder"


def too_long(path: Path) -> tuple[Path, str, str]:
    return path / ("y" * 256), "File name too long", "shorten the path"


def circle(path: Path) -> tuple[Path, str, str]:
    (path / "circle").symlink_to(path / "circle")
    return path / "circle", "Too many levels of symbolic links", "its links lead in a circle"


@pytest.mark.parametrize("read, operation", READERS, ids=["json", "digest", "record", "array"])
@pytest.mark.parametrize("damage", [missing, folder, broken_link, below_file, too_long, circle])
def test_what_cannot_be_read_is_named(
    damage: Callable[[Path], tuple[Path, str, str]],
    read: Callable[[Path], object],
    operation: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """One line names the path, the system's reason and what to do."""
    path, reason, advice = damage(tmp_path)

    def command() -> int:
        read(path)
        return 0

    # It gives no advice for another fault.
    assert run_command(command) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: cannot {operation} {path}: {reason}; {advice}"), text
    assert text.count("\n") == 1
    for word in ("results", "space", "damaged"):
        assert word not in text


@pytest.mark.parametrize(
    "damage, words",
    [
        (missing, "no such thing; do this"),
        (folder, "is a folder, and no thing; do this"),
        (broken_link, "its link leads to"),
        (lambda path: (Path("/dev/null"), "", ""), "is a pipe, socket or device"),
        (below_file, "no such thing"),
    ],
)
def test_what_stands_in_place_of_a_file_is_said(damage, words: str, tmp_path: Path):
    path, *_ = damage(tmp_path)
    with pytest.raises(ValueError, match=words) as failure:
        require_file(path, "thing", "do this")
    assert str(failure.value).startswith(f"{path}: ")


def error_of(read: Callable[[], object]) -> str:
    """Return what a reader says that must fail."""
    try:
        read()
    except ValueError as error:
        return str(error)
    except OSError as error:
        return explain(error)
    raise AssertionError("nothing failed")


def test_too_many_open_files_are_no_damage(tmp_path: Path):
    """The limit of this process is real here, and so is the reader's error."""
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3))
    (tmp_path / "classes.txt").write_text("a\n")

    # The number of one more open file is the last that is used.
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = open(os.devnull)  # noqa: SIM115
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held.fileno(), before[1]))
        texts = [
            error_of(lambda: open_array(tmp_path / "a.npy")),
            error_of(lambda: read_classes(tmp_path)),
            error_of(lambda: has_images(tmp_path / "a.npz")),
            error_of(lambda: find_pictures(tmp_path, 1)),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        held.close()

    # Every reader tells of the limit, and none asks for another file.
    for text in texts:
        assert f"{tmp_path}" in text
        assert "Too many open files" in text
        assert "ulimit -n" in text
        assert "again" not in text
        assert "damaged" not in text


def test_errors_about_other_files_and_of_the_network_stay_as_they_are(tmp_path: Path):
    with pytest.raises(OSError) as failure, naming("write", tmp_path / "target"):
        open(tmp_path / "source").close()
    assert explain(failure.value).startswith(f"cannot open {tmp_path}/source: No such file")
    with pytest.raises(OSError) as failure, naming("write", tmp_path / "target"):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    assert "target" not in explain(failure.value)
    assert explain(OSError("cannot identify image file")) == "cannot identify image file"


def test_a_renamed_file_is_named_with_both_names(tmp_path: Path):
    with pytest.raises(OSError) as failure:
        os.rename(tmp_path / "a", tmp_path / "b")
    text = explain(failure.value, "rename")
    assert text.startswith(f"cannot rename {tmp_path}/a to {tmp_path}/b: No such file")


def test_a_line_about_a_rank_names_the_path(tmp_path: Path):
    with pytest.raises(OSError) as failure:
        (tmp_path / "a").read_text()
    assert one_line(failure.value).startswith(f"FileNotFoundError: cannot open {tmp_path}/a: ")


COUNT = Cost(
    Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1))), size=8, channels=4, num_classes=10
)


@pytest.mark.parametrize(
    "place, words",
    [
        ("records", "make the folder {root}/records"),
        ("runs", "make the folder {root}/runs"),
    ],
)
def test_a_scheduled_job_names_what_it_cannot_make(place: str, words: str, tmp_path: Path):
    root = tmp_path / "results"
    root.mkdir()
    (root / place).write_text("")
    error = work_in_job(Job("a", (COUNT,)), root, "cpu", 1)
    assert error is not None
    if place == "records":
        assert f"cannot write results to {root}: cannot make the folder {root}/records" in error
        assert "File exists" in error
    else:
        assert f"cannot {words.format(root=root)}: " in error or f"{root}/runs" in error
    assert "space" not in error


@pytest.mark.parametrize("culprit", ["samples", "reference"])
@pytest.mark.parametrize("damage", ["cut", "text", "missing", "folder", "no images"])
def test_of_two_files_of_one_name_the_one_at_fault_is_named(
    culprit: str, damage: str, tmp_path: Path
):
    """A message holds the path of the bad file, and not that of the good one."""
    from experiments.engine.scoring.reference import check_reference

    # Two good files.
    paths = {}
    for role in ("samples", "reference"):
        paths[role] = tmp_path / role / "images.npz"
        paths[role].parent.mkdir()
        np.savez(paths[role], arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    good = paths["reference" if culprit == "samples" else "samples"]
    bad = paths[culprit]

    # Damage one of them, or remove it.
    content = bad.read_bytes()
    bad.unlink()
    if damage == "cut":
        bad.write_bytes(content[:100])
    elif damage == "text":
        bad.write_text("<html>")
    elif damage == "folder":
        bad.mkdir()
    elif damage == "no images":
        np.savez(bad, other=np.zeros(3))

    check_reference(good)
    with pytest.raises(ValueError) as failure:
        check_reference(bad)
    assert str(failure.value).startswith(f"{bad}: ")
    assert str(good) not in str(failure.value)


@pytest.mark.parametrize("culprit", ["a", "b"])
def test_of_two_records_the_one_at_fault_is_named(culprit: str, tmp_path: Path):
    record = next((ROOT / "results" / "reference" / "evaluate").glob("*.json"))
    for name in ("a", "b"):
        (tmp_path / name / "evaluate").mkdir(parents=True)
        shutil.copy(record, tmp_path / name / "evaluate" / "scores.json")
    paths = [tmp_path / name / "evaluate" / "scores.json" for name in ("a", "b")]
    bad = tmp_path / culprit / "evaluate" / "scores.json"
    bad.write_text("{")
    done = call(ROOT / "experiments" / "diff_protocol.py", *paths)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {bad}: no record")


def test_a_read_only_results_folder_is_refused_with_its_path(tmp_path: Path):
    """The kernel's own folder, where nobody can make a folder."""
    with pytest.raises(ValueError, match=r"^cannot write results to /proc/none: ") as failure:
        Store(Path("/proc/none")).check_writable()
    assert "space" not in str(failure.value)
    done = subprocess.run(
        [sys.executable, ROOT / "experiments/ablation.py", "--table", "5", "--results", "/proc/a"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and "cannot write results to /proc/a: " in done.stderr
