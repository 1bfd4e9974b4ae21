"""Run measurements in order until the time is over, and bundle their records as they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.machine.environment import read_variable
from experiments.engine.machine.lifetime import bound
from experiments.engine.records.files import written_whole
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY

# Seconds that must be left to begin another part.
LEAST_LEFT = 5.0
# Seconds between two bundles.
BUNDLE_EVERY = 10.0
# Seconds that a part has to end once it is told to.
GRACE = 10.0


@dataclass(frozen=True)
class Session:
    """A limited time on a machine."""

    # When the session ends, by `time.monotonic`.
    end: float
    # Where the parts write their records.
    store: Store
    # The archive of all records, which is written again and again.
    bundle: Path | None = None

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def run(self, parts: Mapping[str, list[str]]) -> bool:
        """Run commands of the interpreter by name, in order.

        Returns:
            Whether all of them ended well.
        """
        good = True
        for name, command in parts.items():
            if self.left < LEAST_LEFT:
                print(f"== {name}: not begun, the time is over", flush=True)
                good = False
                continue
            started = time.monotonic()
            print(f"== {name}", flush=True)
            status = self.run_part(command)
            good = good and status == "done"
            print(f"== {name}: {status} after {time.monotonic() - started:.0f} s", flush=True)
        return good

    def run_part(self, command: list[str]) -> str:
        """Run one part until it or the session ends, and say how it ended."""
        # Tests write no records; everything else writes to this session's folder.
        if "pytest" not in command:
            command = [*command, "--results", str(self.store.root.resolve())]
        paths = [str(REPOSITORY), read_variable("PYTHONPATH")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen(
            bound([sys.executable, *command]),
            cwd=REPOSITORY,
            start_new_session=True,
            env=environment,
        )

        # Bundle what there is every few seconds, so that a cut loses little.
        status = None
        try:
            while status is None and self.left > 0:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(self.left, BUNDLE_EVERY))
                self.pack()
        finally:
            if status is None:
                _end_session(process)
        if status is None:
            self.pack()
            return "cut off by the time"
        return "done" if status == 0 else f"ended with {status}"

    def pack(self) -> None:
        """Write all records of the results folder into the bundle, whole or not at all."""
        records = self.store.root / "records"
        if self.bundle is None or not records.is_dir():
            return
        with (
            written_whole(self.bundle) as file,
            tarfile.open(fileobj=file, mode="w:gz") as archive,
        ):
            for record in sorted(records.glob("*/[!.]*.json")):
                archive.add(record, record.relative_to(self.store.root))


def _end_session(process: subprocess.Popen) -> None:
    """End a part and its workers, which would keep the device."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return
