"""Freed memory stays with the process where the C library lets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments.engine.numerics.device import describe_device, keep_memory
from experiments.engine.records.store import REPOSITORY

FAULTS = """
import resource, torch
from experiments.engine.numerics.device import keep_memory
assert not {kept} or keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in [16] * 20 + [100] * 20:
    torch.ones(megabytes * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_memory(), reason="this C library cannot be told to keep freed memory")
def test_blocks_of_a_kept_process_are_not_handed_out_page_by_page_again():
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(kept=kept)],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for kept in (False, True)
    ]
    assert faults[1] < faults[0] / 2  # small blocks that stay cut the large ones now and then


def test_records_say_what_the_process_keeps():
    assert (
        describe_device("cpu")["memory_kept"] is keep_memory()
        and describe_device("cpu")["device"] == "cpu"
    )
