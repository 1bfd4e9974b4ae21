"""Studies as a user runs them: a file in an empty folder, and the walk-through of STUDY.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from tests.support.commands import call

RUN = REPOSITORY / "experiments" / "run.py"

# Loads files in turn, and prints why each is refused.
LOADER = """
import sys
from pathlib import Path
from experiments.engine.records.code import load_study, own_code
for name in sys.argv[1:]:
    try:
        print(name, load_study(Path(name)).tables[0].title, own_code().study.digest)
    except ValueError as error:
        print(name, error)
"""
HEAD = """
from torch import nn
from backbones import MIXERS, register, register_mixer
from experiments.declared.protocols import DIGITS
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone
from experiments.engine.specs.study import Study
TABLE = Table(1, "mine", "a test", rows=(Row("DiCo", Backbone("dico_s")),))
"""
GOOD = HEAD + "STUDY = Study((TABLE,), (DIGITS,))\n"
BAD = {
    "registers.py": (
        HEAD + "register(nn.Linear, dict(dico_s={}), tiny={})\n",
        "registers.py, line 9: backbone 'dico_s' is registered twice; choose another name",
    ),
    "mixes.py": (
        HEAD + "register_mixer('conv', nn.Identity)\n",
        "mixes.py, line 9: mixer 'conv' is registered twice; choose another name",
    ),
    "fails.py": ("\n1 / 0\n", "fails.py, line 2: ZeroDivisionError: division by zero"),
    "broken.py": ("x = (\n", "broken.py, line 1: '(' was never closed"),
    "silent.py": (HEAD, "silent.py declares no study: its last line is STUDY = Study(...)"),
    "empty.py": (HEAD + "STUDY = Study((), (DIGITS,))\n", "empty.py: Study declares no Table;"),
    "beside.py": (
        "import sys\nsys.path.append(__file__.rpartition('/')[0])\nimport helper\n",
        "beside.py imports helper.py beside it, which its digest does not cover;",
    ),
}
OVERWRITES = GOOD + "MIXERS['conv'] = nn.Identity\n"


def run_in(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder that holds a study, as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path):
    files = {name: text for name, (text, _) in BAD.items()}
    files |= {"good.py": GOOD, "helper.py": "", "other.py": GOOD + "\n", "over.py": OVERWRITES}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    names = [*BAD, "absent.py", "good.py", "good.py", "other.py"]
    done = run_in(tmp_path, "-c", LOADER, *names)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stderr
    for line, (_, message) in zip(lines, BAD.values(), strict=False):
        assert message in line
    absent, first, again, other = lines[len(BAD) :]
    assert absent.startswith("absent.py the study cannot be read: ")
    assert re.fullmatch(r"good.py mine [0-9a-f]{16}", first)
    assert again == first
    assert other == "other.py a process runs one study, and good.py is loaded"


@pytest.mark.slow
def test_an_overwritten_name_is_refused_by_the_command(tmp_path: Path):
    (tmp_path / "over.py").write_text(OVERWRITES)
    done = run_in(tmp_path, RUN, "over.py", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: over.py redefines 'mixer conv'; choose another name\n"
    assert [path.name for path in tmp_path.iterdir()] == ["over.py"]


# ---- The walk-through


def walk_through() -> str:
    """Return the file that STUDY.md shows."""
    text = (REPOSITORY / "experiments" / "STUDY.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return code


def test_the_walk_through_takes_at_most_forty_lines():
    assert len(walk_through().splitlines()) <= 40
    assert "STUDY.md" in (REPOSITORY / "experiments" / "README.md").read_text()


def shortened(code: str) -> str:
    """Return the walk-through with its steps and widths cut down, and nothing else."""
    short_runs = (
        'source="this study", num=20, sampler=replace(DIGITS.sampler, num_steps=2), '
        "recipe=replace(DIGITS.recipe, steps=3, warmup=1, batch=8)"
    )
    for long, short in (('source="this study"', short_runs), ("dim=24", "dim=8")):
        assert code.count(long) == 1
        code = code.replace(long, short)
    return code


@pytest.mark.slow
def test_the_walk_through_is_counted_timed_and_scored(tmp_path: Path):
    study = tmp_path / "my_study.py"
    study.write_text(shortened(walk_through()))
    done = run_in(tmp_path, RUN, study.name, "--results", "out")
    assert done.returncode == 0, done.stderr

    # One table: parameters, Gflops, throughput and scores of both rows, over three seeds.
    assert done.stdout.startswith("Table 1: A mixer of shifts (this study)\n")
    assert "shifts (this machine, 3 seeds)" in done.stdout
    rows = {line.split(" ")[0]: line for line in done.stdout.splitlines() if " | " in line}
    for label in ("DiCo", "Shift"):
        groups = rows[label].split(" | ")
        assert len(groups) == 5
        assert not any("-" in group.split() for group in groups)
    assert "against the reference" not in done.stdout

    # The study is kept under its digest, which the network of its own carries.
    trained = [r for r in Store(tmp_path / "out").here.all() if r.kind == "train"]
    digests = {r.spec["backbone"].get("code", "") for r in trained}
    (kept,) = (tmp_path / "out" / "studies").iterdir()
    assert digests == {"", kept.stem}
    assert kept.read_text() == study.read_text()

    # The activation probe measures both networks, and the locality probe the new mixer.
    short = ("--images", 1, "--steps", 2, "--results", "out")
    locality = ("locality", "--gradients", 1, "--rows", "Shift")
    for words, labels in ((("channels",), ["DiCo", "Shift"]), (locality, ["Shift"])):
        probed = run_in(tmp_path, "-m", "analysis.probes", *words, "--study", study.name, *short)
        assert probed.returncode == 0, probed.stderr
        assert [line.split(":")[0] for line in probed.stdout.splitlines()] == labels

    # Nothing would run twice. Another network has another id, and DiCo keeps its own.
    planned = run_in(tmp_path, RUN, study.name, "--results", "out", "--dry-run").stdout
    study.write_text(study.read_text().replace("(-1, 3))", "(-2, 3))"))
    changed = run_in(tmp_path, RUN, study.name, "--results", "out", "--dry-run").stdout
    assert "would run" not in planned
    kinds = [line.split()[1] for line in changed.splitlines() if "would run" in line]
    scored = [*["evaluate"] * 3, *["heldout"] * 3]
    assert sorted(kinds) == ["cost", *scored, "timing", *["train"] * 3]


@pytest.mark.slow
def test_workers_of_submitit_and_single_rows_load_the_study(tmp_path: Path):
    study = tmp_path / "my_study.py"
    study.write_text(shortened(walk_through()))
    rows = ("--rows", "Shift", "--seeds", 0, "--results", "out")
    done = run_in(tmp_path, RUN, study.name, *rows, "--cluster", "local")
    assert done.returncode == 0, done.stderr

    # One row in two ranks, as torchrun starts them.
    single = ("--row", "Shift", "--seed", 1, "--device", "cpu", "--results", "out")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
    done = run_in(tmp_path, *torchrun, RUN, study.name, *single)
    assert done.returncode == 0, done.stderr
    records = [r for r in Store(tmp_path / "out").here.all() if r.kind == "train"]
    trained = {record.spec["seed"]: record for record in records}
    assert {seed: r.provenance["world_size"] for seed, r in trained.items()} == {0: 1, 1: 2}
    (kept,) = (tmp_path / "out" / "studies").iterdir()
    assert {record.spec["backbone"]["code"] for record in records} == {kept.stem}

    # Images of a training whose study has changed are not drawn.
    study.write_text(study.read_text() + "\n")
    images = call(
        REPOSITORY / "experiments" / "sample.py",
        *("--study", study, "--row", "Shift", "--num", 2, "--results", tmp_path / "out"),
    )
    assert images.returncode == 2
    assert f"run.py {study} --table 1 --rows" in images.stderr
