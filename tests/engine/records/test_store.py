"""Records survive what happens to a results folder: races, damage, other files, full disks."""

import errno
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.engine.records import files, store, tree
from experiments.engine.records.files import locked, try_lock, written_whole
from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Backbone, Cost, canonical, spec_id

SPEC = Cost(Backbone("net", dict(dim=8)), 8, 1, 10)
OTHER = Cost(Backbone("net", dict(dim=16)), 8, 1, 10)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_record_comes_back_as_it_was_written(tmp_path: Path):
    values = {"a": 1, "b": 0.1 + 0.2, "c": [1, None, "±"], "d": {"e": True}}
    written = Store(tmp_path).append(SPEC, "done", values, {"commit": "abc", "seconds": 1.5})
    (read,) = Store(tmp_path).here.by_id()[spec_id(SPEC)]
    assert read == written
    assert read.kind == "cost"
    assert read.status == "done"
    assert read.error is None
    assert read.values == values
    assert read.spec == canonical(SPEC, full=True)


def test_numbers_that_are_none_survive(tmp_path: Path):
    Store(tmp_path).append(SPEC, "done", {"a": math.nan, "b": math.inf, "c": -math.inf}, {})
    values = Store(tmp_path).here.latest(SPEC).values
    assert math.isnan(values["a"])
    assert values["b"] == math.inf
    assert values["c"] == -math.inf


def test_records_are_only_ever_added(tmp_path: Path):
    before: dict[str, bytes] = {}
    for number in range(5):
        Store(tmp_path).append(SPEC, "done", {"number": number}, {})
        after = everything(tmp_path)
        assert len(after) == number + 1
        assert before.items() <= after.items()
        before = after


def test_the_newest_record_of_a_status_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def append_at(minute: int, status: str, error: str | None = None) -> None:
        """Append a record as if it were so many minutes past a full hour."""
        utc = f"20200101T00{minute:02}00Z"
        clock = SimpleNamespace(gmtime=lambda _: None, strftime=lambda *_: utc)
        monkeypatch.setattr(store, "time", clock)
        Store(tmp_path).append(SPEC, status, {"minute": minute}, {}, error)

    append_at(3, "failed", "ValueError: no")
    append_at(2, "done")
    append_at(1, "done")
    append_at(4, "failed", "ValueError: no")

    # All of them stand in the order of their times, however they were written.
    records = Store(tmp_path)
    minutes = [record.values["minute"] for record in records.here.by_id()[spec_id(SPEC)]]
    assert minutes == [1, 2, 3, 4]
    assert records.here.latest(SPEC).values["minute"] == 2
    failed = records.here.latest(SPEC, status="failed")
    assert failed.values["minute"] == 4
    assert failed.error == "ValueError: no"

    # Neither another spec nor the reference has any.
    assert records.here.latest(OTHER) is None
    assert records.reference.latest(SPEC) is None


def test_a_failure_is_no_result(tmp_path: Path):
    Store(tmp_path).append(SPEC, "failed", {}, {}, "ValueError: no")
    assert Store(tmp_path).here.latest(SPEC) is None


def test_an_open_store_sees_its_own_records_and_others_after_a_refresh(tmp_path: Path):
    ours = Store(tmp_path)
    theirs = Store(tmp_path)
    assert ours.here.latest(SPEC) is None
    assert theirs.here.latest(SPEC) is None
    ours.append(SPEC, "done", {}, {})
    assert ours.here.latest(SPEC) is not None
    assert theirs.here.latest(SPEC) is None
    theirs.refresh()
    assert theirs.here.latest(SPEC) is not None


def test_reference_and_records_are_kept_apart(tmp_path: Path):
    Store(tmp_path).append(SPEC, "done", {}, {})
    (tmp_path / "records").rename(tmp_path / "reference")
    assert Store(tmp_path).here.latest(SPEC) is None
    assert Store(tmp_path).reference.latest(SPEC) is not None


GOOD = {
    "format": 1,
    "id": "f" * 16,
    "kind": "cost",
    "status": "done",
    "values": {},
    "provenance": {},
    "utc": "",
    "spec": {},
    "error": None,
}
STRANGERS = {
    "empty": b"",
    "cut": json.dumps(GOOD).encode()[:-9],
    "not text": b"\xff\xfe\x00{}",
    "a list": b"[1, 2]",
    "a string": b'"format"',
    "a number": b"1",
    "null": b"null",
    "another program's": b'{"name": "x"}',
    "another format": json.dumps(GOOD | {"format": 2}).encode(),
    "a field too many": json.dumps(GOOD | {"more": 1}).encode(),
    "a field too few": json.dumps({key: GOOD[key] for key in GOOD if key != "spec"}).encode(),
    "another id": json.dumps(GOOD | {"id": "e" * 16}).encode(),
    "no id": json.dumps(GOOD | {"id": ""}).encode(),
    "another kind": json.dumps(GOOD | {"kind": "train"}).encode(),
    "no values": json.dumps(GOOD | {"values": None}).encode(),
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_record_is_reported_and_skipped(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Store(tmp_path).append(SPEC, "done", {"a": 1}, {})
    name = f"{'f' * 16}-20200101T000000Z-abcdef.json"
    (tmp_path / "records" / "cost" / name).write_bytes(content)
    assert list(Store(tmp_path).here.by_id()) == [spec_id(SPEC)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: skipped cost/ffff")
    assert str(tmp_path) not in line


def test_a_folder_named_like_a_record_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "records" / "cost" / "folder.json").mkdir(parents=True)
    assert Store(tmp_path).here.by_id() == {}
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_writers_side_by_side_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from experiments.engine.records.store import Store\n"
        "from experiments.engine.specs.spec import Backbone, Cost\n"
        "for number in range(20):\n"
        "    spec = Cost(Backbone('net', dict(dim=number % 4)), 8, 1, 10)\n"
        "    bulk = [0.1] * 2000\n"
        "    values = {'writer': int(sys.argv[2]), 'number': number, 'bulk': bulk}\n"
        "    Store(Path(sys.argv[1])).append(spec, 'done', values, {})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(writer)])
        for writer in range(8)
    ]
    assert [writer.wait() for writer in writers] == [0] * 8

    # Every record of every writer is there once, and whole.
    records = Store(tmp_path).here.all()
    assert len(records) == 160
    written = {(record.values["writer"], record.values["number"]) for record in records}
    assert written == {(writer, number) for writer in range(8) for number in range(20)}
    for record in records:
        assert record.values["bulk"] == [0.1] * 2000

    # No reader was warned, and no temporary file is left.
    assert not capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))


# A process that makes a file under a lock; nobody else may have made it.
ALONE_INSIDE = """
import sys, time
from pathlib import Path
from experiments.engine.records.files import locked

folder = Path(sys.argv[1])
with locked(folder / "lock"):
    (folder / "inside").touch(exist_ok=False)
    time.sleep(0.02)
    (folder / "inside").unlink()
"""

# A process that prints a word once it has a lock.
SAYS_INSIDE = """
import sys
from pathlib import Path
from experiments.engine.records.files import locked

with locked(Path(sys.argv[1])):
    print("inside")
"""


def test_a_lock_keeps_a_second_process_out(tmp_path: Path):
    """Of four processes, one at a time makes a file that must not be there."""
    command = [sys.executable, "-c", ALONE_INSIDE, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4

    # The lock is free again.
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("name", ["lock", "plan.lock", "runs/a/lock", "a b.lock", "ü.lock"])
def test_who_waits_for_a_lock_says_who_holds_it(name: str, tmp_path: Path):
    """A process that waits prints one line that names this process, and then goes on."""
    command = [sys.executable, "-c", SAYS_INSIDE, str(tmp_path / name)]
    with locked(tmp_path / name):
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        line = waiting.stderr.readline().decode()

    # Nothing more is printed once the lock is free.
    assert line.startswith("waiting for ")
    assert f"held by process {os.getpid()} on {socket.gethostname()} for " in line
    assert waiting.communicate() == (b"inside\n", b"")


def test_a_file_system_without_locks_lets_everyone_through_and_other_errors_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Errors that say that there are no locks are passed over; a broken disk is not."""

    def refuse_with(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.fcntl, "flock", refuse)

    # No locks on this file system.
    for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
        refuse_with(number)
        with locked(tmp_path / "lock"), try_lock(tmp_path / "lock") as free:
            assert free, number

    # An error of the disk.
    refuse_with(errno.EIO)
    with pytest.raises(OSError), locked(tmp_path / "lock"):
        pass


def test_a_whole_file_appears_with_its_folder(tmp_path: Path):
    with written_whole(tmp_path / "a" / "b") as file:
        file.write(b"x" * 100)
        assert not (tmp_path / "a" / "b").exists()
    assert everything(tmp_path) == {"a/b": b"x" * 100}


def _raises(file: object) -> None:
    raise RuntimeError("body")


@pytest.mark.parametrize(
    "body, broken",
    [
        (_raises, None),
        (KeyboardInterrupt, None),
        (no_space, None),
        (lambda file: file.write(b"new"), "fsync"),
        (lambda file: file.write(b"new"), "replace"),
    ],
    ids=["body raises", "interrupted", "full while writing", "full at the end", "not renamed"],
)
def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(
    body: Callable, broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "target").write_bytes(b"old")
    if broken:
        monkeypatch.setattr(files.os, broken, no_space)
    with (
        pytest.raises((RuntimeError, KeyboardInterrupt, OSError)),
        written_whole(tmp_path / "target") as file,
    ):
        if body is KeyboardInterrupt:
            raise body
        body(file)
    assert everything(tmp_path) == {"target": b"old"}


def test_a_writable_folder_stays_empty(tmp_path: Path):
    Store(tmp_path / "results").check_writable()
    assert everything(tmp_path) == {}


def test_a_path_under_a_file_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="^cannot write results to .*--results$") as failure:
            Store(folder).check_writable()
        assert f"to {folder}: " in str(failure.value)
        assert "Not a directory; a file stands" in str(failure.value)
        assert Store(folder).here.by_id() == {}
    assert everything(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_folder_is_known_before_any_work(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(ValueError, match=os.strerror(code)):
        Store(tmp_path).check_writable()
    assert everything(tmp_path) == {}
    with pytest.raises(OSError):
        Store(tmp_path).append(SPEC, "done", {}, {})
    assert everything(tmp_path) == {}


def test_provenance_holds_what_the_tree_says_of_itself():
    commit = tree.tree_commit()
    values = store.provenance()
    assert values["commit"] == commit.hash
    assert values["dirty"] == commit.dirty
    assert values["code"] == tree.tree_digest()
