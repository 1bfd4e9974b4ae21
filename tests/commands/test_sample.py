"""`sample.py` draws by the sampler that it is told, and refuses in one line what it cannot draw."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray

from backbones import build
from backbones.diffusers_format import write_pipeline
from backbones.dit import DiT
from experiments import sample
from experiments.engine.records import files
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime.context import RunContext
from experiments.engine.sampling import samples
from experiments.engine.specs.spec import Evaluate
from tests.support.networks import randomise
from tests.support.score_scripts import Script


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(sample, capsys, monkeypatch)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--row", "nothing"], "has no row 'nothing'"),
        (["--row", "DiCo-S", "--num", "0"], "from 1 on"),
        (["--row", "DiCo-S"], "no finished checkpoint"),
    ],
)
def test_sampling_refuses_what_it_cannot_draw(
    arguments: list[str], complaint: str, script: Script, tmp_path: Path
):
    assert complaint in script.refuse("--table", 4, "--results", tmp_path, *arguments)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("DiCo-S", "no finished checkpoint"),
        (
            "ADM-U",
            "row 'ADM-U' is not the same in all of tables 1, 2, 8, 9; say which with --table",
        ),
        ("DiCo-X", "no table has a network as row 'DiCo-X'"),
        ("LlamaGen-3B", "no table has a network as row 'LlamaGen-3B'"),
    ],
)
def test_a_row_finds_its_table(row: str, complaint: str, script: Script, tmp_path: Path):
    """A row that several tables declare alike is one run, whichever of them is named."""
    arguments = ("--row", row, "--protocol", "digits", "--results", tmp_path)
    assert complaint in script.refuse(*arguments)


# ---- Samplers and resources


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Evaluate, RunContext]]:
    """What the script would draw; every drawing ends at once."""
    asked: list[tuple[Evaluate, RunContext]] = []

    def draw(spec: Evaluate, store: Store, context: RunContext, *_: object) -> None:
        asked.append((spec, context))
        raise ValueError("enough")

    monkeypatch.setattr(sample, "_draw_all", draw)
    monkeypatch.setattr(sample, "require_trained", lambda *_: None)
    return asked


def test_another_sampler_is_another_set(
    script: Script, drawings: list[tuple[Evaluate, RunContext]], tmp_path: Path
):
    options = ("--row", "DiCo-S", "--device", "cpu", "--results", tmp_path)
    assert script.refuse(*options) == "error: enough\n"
    script.refuse(*options, "--sampler", "dpm_solver_diffusers", "--steps", "20", "--compile")

    # Only the sampler's name and its number of steps differ.
    (plain, plain_context), (other, other_context) = drawings
    sampler = replace(plain.sampler, name="dpm_solver_diffusers", num_steps=20)
    assert plain.sampler.name != sampler.name
    assert other == replace(plain, sampler=sampler)

    # Compiling is a resource, which names no set.
    assert not plain_context.resources.compile
    assert other_context.resources.compile
    assert not other_context.resources.graphs


@pytest.mark.parametrize(
    "options, complaint",
    [
        (
            ["--sampler", "heun"],
            "unknown sampler 'heun'; known: ancestral, ddim, dpm_solver, dpm_solver_3s, "
            "dpm_solver_diffusers",
        ),
        (
            ["--steps", "0"],
            "--num, --steps and --batch take numbers from 1 on; --help lists the options",
        ),
        (["--graphs"], "CUDA graphs need a GPU, but this command uses cpu; leave out --graphs"),
    ],
)
def test_unknown_samplers_and_impossible_options_are_refused(
    options: list[str],
    complaint: str,
    script: Script,
    drawings: list[tuple[Evaluate, RunContext]],
    tmp_path: Path,
):
    named = ("--row", "DiCo-S", "--device", "cpu", "--results", tmp_path)
    assert script.refuse(*named, *options) == f"error: {complaint}\n"
    assert not drawings


# ---- Weights of a file


def draw_from(script: Script, file: Path, *options: object) -> tuple[str, ndarray]:
    """Draw four digits with a tiny DiT's weights; return what is warned of, and the images."""
    out = file.with_name(f"{file.name}.npz")
    named = ("--backbone", "dit_s_2", "--checkpoint", file, "--protocol", "digits", *options)
    shape = [f"--option={option}" for option in ("dim=24", "depth=2", "heads=3")]
    where = ("--device", "cpu", "--results", file.with_name("results"), "--out", out)
    status, _, errors = script.run(*named, *shape, *where, "--num", 4, "--steps", 2)
    assert status == 0, errors
    with np.load(out) as file_of_images:
        return errors, file_of_images["arr_0"]


def test_a_file_and_a_folder_of_the_same_weights_draw_the_same_images(
    script: Script, tmp_path: Path
):
    shape = dict(in_channels=1, num_classes=10, dim=24, depth=2, heads=3)
    model = randomise(build("dit_s_2", input_size=8, time_divisor=127, mlp_norm_eps=1e-5, **shape))
    assert isinstance(model, DiT)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    write_pipeline(model, tmp_path / "folder")

    # The folder says with which numerics its network was trained; the file cannot.
    _, of_folder = draw_from(script, tmp_path / "folder")
    numerics = ("--option=time_divisor=127", "--option=mlp_norm_eps=1e-5")
    warnings, of_file = draw_from(script, tmp_path / "net.pt", *numerics)
    np.testing.assert_array_equal(of_file, of_folder)
    assert "another size" not in warnings

    # Weights for another size draw too, and it is said.
    small = build("dit_s_2", input_size=4, **shape)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    warnings, _ = draw_from(script, tmp_path / "small.pt")
    assert "of another size than the samples: pos_embed recomputed for this size" in warnings


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--checkpoint", "net.pt"], "--checkpoint and --backbone go together"),
        (["--row", "DiCo-S", "--key", "ema"], "--key and --option are of a checkpoint"),
        (["--row", "DiCo-S", "--checkpoint", "net.pt"], "not allowed with argument --row"),
        ([], "one of the arguments --row --checkpoint is required"),
        (["--backbone", "dit_s_2", "--checkpoint", "net.pt"], "net.pt: no such checkpoint"),
    ],
)
def test_what_names_no_weights_is_refused(options: list[str], complaint: str, script: Script):
    assert complaint in script.refuse(*options)


# ---- Targets


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--out", "paper.npz"], "holds other content; remove it or name another --out"),
        (["--out", "folder"], "is no plain file; name another --out"),
        (["--out", "paper.npz/a.npz"], "name another --out"),
        (["--png", "folder"], "holds 1 files that are not of these images, such as 'mine.txt'"),
        (["--png", "paper.npz"], "is no folder; name another --png"),
        (["--png", "/proc/images"], "cannot write into /proc/images"),
    ],
)
def test_a_target_that_is_taken_is_refused_before_an_image_is_drawn(
    options: list[str],
    complaint: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """A file or a folder of somebody else is named, and stays as it is."""
    monkeypatch.setattr(sample, "require_trained", lambda *_: None)

    def draw(spec: Evaluate, context: RunContext, check: Callable[[dict[str, str]], None]) -> None:
        check({"network": "0" * 16})
        pytest.fail("an image is drawn")

    # A file and a folder that hold other things.
    monkeypatch.setattr(samples, "generate_samples", draw)
    (tmp_path / "paper.npz").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    name, target = options
    named = ("--row", "DiCo-S", "--device", "cpu", "--results", tmp_path / "results")
    assert complaint in script.refuse(*named, name, tmp_path / target)
    assert (tmp_path / "paper.npz").read_text() == "mine"


@pytest.mark.parametrize("option", ["--out", "--png"])
def test_images_that_do_not_fit_are_refused(
    option: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One disk is full, the others have room for ten images of 8 x 8 pixels."""
    monkeypatch.setattr(sample, "require_trained", lambda *_: None)
    usage = shutil.disk_usage(tmp_path)

    # The full disk lacks one byte.
    def measure_disk(folder: Path) -> object:
        return usage._replace(free=10 * 3 * 8 * 8 - (folder.name == "full"))

    monkeypatch.setattr(files.shutil, "disk_usage", measure_disk)
    named = ("--row", "DiCo-S", "--num", 10, "--device", "cpu", "--results", tmp_path / "results")
    target = tmp_path / "full" / "a.npz" if option == "--out" else tmp_path / "full"
    error = script.refuse(*named, option, target)
    assert f"full needs 0.0 GB more and the disk has 0.0 GB free; name another {option}" in error


# ---- Several processes

# The second process fails at once, while the first one is at its work.
FAILING = """
import sys, time
from experiments import sample
from experiments.engine.runtime import failures
from experiments.engine.sampling import samples

def generate_samples(spec, context, check):
    if context.group.rank == 1:
        raise KeyError("boom")
    time.sleep(600)

sample.require_trained = lambda *_: None
failures.POLL, failures.GRACE, samples.generate_samples = 0.1, 1.0, generate_samples
sys.argv = ["sample.py", "--row", "DiCo-S", "--device", "cpu", "--results", sys.argv[1]]
sys.exit(sample.main())
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_at_their_work(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(rank: int) -> subprocess.Popen[str]:
        names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return subprocess.Popen(
            [sys.executable, "-c", FAILING, str(tmp_path)],
            env=os.environ | names | own,
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )

    # Both say which rank failed, and neither prints where.
    ranks = [start(0), start(1)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 2], errors
    for error in errors:
        assert "error: rank 1: KeyError: 'boom'\n" in error
        assert "Traceback" not in error
