"""What is printed of jobs while they run."""

from __future__ import annotations

import pytest

from experiments.engine.jobs.job import Job
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.runtime.progress import Progress
from tests.support.sampling import SPEC


@pytest.mark.parametrize(
    "lines, expected",
    [(True, "250 of 9250 images, 2.0 images/s, 1:15:00 left\n"), (False, "")],
    ids=["lines", "quiet"],
)
def test_without_a_terminal_each_chunk_of_a_drawing_is_a_line(
    lines: bool, expected: str, capsys: pytest.CaptureFixture[str]
):
    with ProgressDisplay(total=1, lines=lines) as display:
        display.notify(Job("a", (SPEC,)), "progress", Progress(250, 9250, 2.0))
    assert capsys.readouterr().err == expected
