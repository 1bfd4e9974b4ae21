"""`evaluate_checkpoint.py` samples and scores a published checkpoint, or says what it lacks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbones import build, tiny_options_of
from experiments import evaluate_checkpoint
from experiments.declared.protocols import CIFAR10
from experiments.engine.data import locate
from experiments.engine.data.image_files import file_sha256
from experiments.engine.data.sets import ImageSet
from experiments.engine.records.store import read_record
from experiments.engine.scoring import stage
from experiments.engine.specs.spec import Backbone, Data, Sampler
from tests.support.score_scripts import Script, use_grey_extractor, write_checkpoint

Options = Sequence[object]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(evaluate_checkpoint, capsys, monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "net.pt")


def options_of(checkpoint: Path, name: str = "dico_s") -> Options:
    """The options that name a network and its weights."""
    return ("--backbone", name, "--checkpoint", checkpoint)


def use_tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tiny network stand for every checkpoint's, at a hundredth of a second per pass."""

    def load(backbone: Backbone, file: object) -> tuple[torch.nn.Module, str]:
        return build("dico_s", **tiny_options_of("dico_s")).eval(), "ema"

    monkeypatch.setattr(evaluate_checkpoint, "load_network", load)
    monkeypatch.setattr(evaluate_checkpoint, "_seconds_per_pass", lambda *arguments: 0.01)


# ---- Refusals before any work


def test_a_checkpoint_of_another_network_is_refused(
    checkpoint: Path, script: Script, tmp_path: Path
):
    results = tmp_path / "results"
    options = ("--protocol", "imagenet256", "--results", results)
    assert "another model" in script.refuse(*options_of(checkpoint), *options)
    assert not results.exists()


def test_a_checkpoint_that_is_not_there_is_refused(script: Script, tmp_path: Path):
    results = tmp_path / "results"
    options = ("--protocol", "imagenet256", "--results", results)
    error = script.refuse(*options_of(tmp_path / "none.pt"), *options)
    assert "no such checkpoint" in error
    assert not results.exists()


# ---- Dry runs


@pytest.fixture
def without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights of Inception, nor a reference, nor a VAE are there."""
    monkeypatch.setattr(locate, "ROOT", tmp_path / "nothing")
    monkeypatch.delenv("DICO_INCEPTION", raising=False)
    monkeypatch.setenv("DICO_VAE", "gone")
    use_tiny_network(monkeypatch)


def test_a_dry_run_says_what_is_missing_and_what_it_would_cost(
    checkpoint: Path, script: Script, without_files: None
):
    options = ("--device", "cpu", "--protocol", "imagenet256", "--dry-run")
    status, out, _ = script.run(*options_of(checkpoint), *options)
    assert status == 0

    # Three files are missing.
    assert "missing: the Inception weights" in out
    assert "missing: the reference VIRTUAL_imagenet256" in out
    assert "missing: VAE gone is neither" in out

    # 250 passes of a hundredth of a second for each of 50000 images.
    assert "250 evaluations an image" in out
    assert "about 34.7 hours" in out
    assert "9.8 GB" in out


def test_guidance_doubles_what_a_dry_run_expects(
    checkpoint: Path, script: Script, without_files: None
):
    options = ("--device", "cpu", "--protocol", "imagenet256_guided", "--dry-run")
    status, out, _ = script.run(*options_of(checkpoint), *options)
    assert status == 0
    assert "500 evaluations" in out
    assert "guidance scale 1.4" in out
    assert out.splitlines()[-1] == "total: about 69 h of process time"


def test_a_dry_run_on_slurm_prints_the_job(
    checkpoint: Path, script: Script, without_files: None, monkeypatch: pytest.MonkeyPatch
):
    """Its speed on the cluster's nodes is not known here, so no time is promised."""
    monkeypatch.setenv("DICO_SLURM_GPUS_PER_NODE", "4")
    options = ("--protocol", "imagenet256", "--cluster", "slurm", "--dry-run")
    status, out, _ = script.run(*options_of(checkpoint), *options)
    assert status == 0
    assert "one job: net.pt, 50000 images" in out
    assert "#SBATCH --gpus-per-node=4" in out
    assert "hours;" not in out


def test_a_run_that_lacks_a_file_ends_before_it_begins(
    checkpoint: Path, script: Script, without_files: None, tmp_path: Path
):
    results = tmp_path / "results"
    options = ("--device", "cpu", "--protocol", "imagenet256", "--results", results)
    error = script.refuse(*options_of(checkpoint), *options)
    assert "lacks the Inception weights" in error
    assert not results.exists()


def test_a_dry_run_opens_what_the_run_would_open(
    checkpoint: Path, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("diffusers")
    from tests.support.latent_sets import write_vae

    # Every file is there, and none of them can be used as it is.
    folder = tmp_path / "data" / "imagenet256"
    folder.mkdir(parents=True)
    (folder / "VIRTUAL_imagenet256_labeled.npz").write_bytes(b"<html>")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    monkeypatch.setattr(locate, "ROOT", tmp_path / "data")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "junk.pth"))
    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "vae")))
    use_tiny_network(monkeypatch)

    options = ("--device", "cpu", "--protocol", "imagenet256", "--dry-run")
    status, out, _ = script.run(*options_of(checkpoint), *options)
    assert status == 0
    assert "nothing is missing" not in out
    assert "missing:" not in out
    assert "unusable: junk.pth: not a readable checkpoint" in out
    assert "VIRTUAL_imagenet256_labeled.npz: not a readable .npz" in out
    assert "warning: decoded with an unknown VAE" in out

    # The manifest of the latents names their VAE, so it is opened too.
    (folder / "manifest.json").write_text("{}")
    _, out, _ = script.run(*options_of(checkpoint), *options)
    assert "unusable: imagenet256/manifest.json cannot be read" in out


# ---- What the options mean


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Backbone]:
    """The networks that the script asks for; none is loaded."""
    backbones: list[Backbone] = []

    def load(backbone: Backbone, file: object) -> tuple[None, str]:
        backbones.append(backbone)
        return None, "ema"

    monkeypatch.setattr(evaluate_checkpoint, "load_network", load)
    monkeypatch.setattr(evaluate_checkpoint, "_seconds_per_pass", lambda *arguments: 0.01)
    return backbones


@pytest.mark.parametrize(
    "name, size, sampler",
    [
        ("sit_s_2", 256, "sde"),
        ("uvit_l_4", 512, "dpm_solver"),
        ("dim_l", 256, "dpm_solver"),
        ("dimsum_l_2", 256, "dopri5"),
        ("dit_s_2", 256, "ancestral"),
    ],
)
def test_a_network_is_sampled_by_its_own_objectives_sampler(
    name: str, size: int, sampler: str, checkpoint: Path, script: Script, built: list[Backbone]
):
    options = ("--device", "cpu", "--protocol", f"imagenet{size}", "--dry-run")
    status, out, _ = script.run(*options_of(checkpoint, name), *options)
    assert status == 0
    assert f"images, {sampler}, " in out


def test_an_option_of_the_network_is_read_as_python(
    checkpoint: Path, script: Script, built: list[Backbone]
):
    options = ("--device", "cpu", "--protocol", "imagenet256", "--dry-run", "--option")
    status, _, _ = script.run(*options_of(checkpoint, "sit_s_2"), *options, "learn_sigma=false")
    assert status == 0
    assert built[0].options["learn_sigma"] is False

    error = script.refuse(*options_of(checkpoint, "sit_s_2"), *options, "learn_sigma=maybe")
    assert "NAME=VALUE" in error


@pytest.mark.parametrize(
    "options, resources",
    [
        (["cpu", "--compile"], {"compile": True}),
        (["cuda", "--graphs", "--batch", "3"], {"sample_batch": 3, "graphs": True}),
    ],
)
def test_what_makes_the_sampling_of_a_checkpoint_faster_is_a_resource(
    options: list[str],
    resources: dict[str, Any],
    script: Script,
    built: list[Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Options of speed reach the plan's resources, beside the checkpoint."""
    plans = []
    monkeypatch.setattr(evaluate_checkpoint, "carry_out", lambda plan, *_: plans.append(plan))
    (tmp_path / "net.pt").write_bytes(b"")
    named = options_of(tmp_path / "net.pt")
    status, _, _ = script.run(*named, "--protocol", "imagenet256", "--device", *options)
    assert status == 0

    # The checkpoint itself is another resource.
    (plan,) = plans
    others = {name: value for name, value in plan.resources.items() if name != "checkpoint"}
    assert others == resources


def test_graphs_need_a_gpu(script: Script, built: list[Backbone], tmp_path: Path):
    (tmp_path / "net.pt").write_bytes(b"")
    options = ("--protocol", "imagenet256", "--device", "cpu", "--graphs")
    assert script.refuse(*options_of(tmp_path / "net.pt"), *options) == (
        "error: CUDA graphs need a GPU, but this command uses cpu; leave out --graphs\n"
    )


# ---- The whole path


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options of a run of twelve images of 8 x 8 pixels, scored by a small extractor."""
    use_grey_extractor(monkeypatch)
    data = Data("pixels", size=8, channels=3, num_classes=10)
    tiny = dict(dim=8, depths=(1, 1, 1, 1, 1))
    network = build("dico_s", input_size=8, in_channels=3, num_classes=10, **tiny)
    torch.save({"ema": network.state_dict(), "args": Namespace(lr=1)}, tmp_path / "net.pt")

    # A protocol of these images, whose reference is drawn here.
    protocol = replace(CIFAR10, name="tiny", data=data, sampler=Sampler(num_steps=2), num=12)
    monkeypatch.setattr(evaluate_checkpoint, "PROTOCOLS", {"tiny": protocol})
    pixels = np.random.default_rng(0).uniform(-1, 1, (30, 3, 8, 8)).astype(np.float32)
    images = ImageSet(pixels, np.arange(30) % 10, data)
    monkeypatch.setattr(stage, "load", lambda data: images)
    (tmp_path / "weights").write_bytes(b"")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "weights"))

    where = ("--device", "cpu", "--cluster", "debug", "--results", tmp_path / "results")
    shape = ("--option", "dim=8", "--option", "depths=[1,1,1,1,1]")
    return (*options_of(tmp_path / "net.pt"), "--protocol", "tiny", *where, *shape)


def test_there_is_nothing_to_report_before_the_run(script: Script, small_run: Options):
    assert script.refuse(*small_run, "--report") == (
        "error: there is no record of net.pt under tiny yet; leave out --report\n"
    )


def test_a_checkpoint_is_sampled_scored_and_recorded(
    script: Script, small_run: Options, tmp_path: Path
):
    status, out, errors = script.run(*small_run)
    assert status == 0, errors
    assert "net.pt (key ema), tiny, manifest " in out
    assert "FID-12 " in out
    assert "network evaluations per image: 2\n" in out
    assert "the paper has no such row" in out
    assert "loss" not in out

    # The record names the weights.
    folder = tmp_path / "results" / "records" / "evaluate"
    (path,) = folder.glob("*.json")
    values = read_record(path).values
    assert values["nfe"] == 2
    assert values["manifest"]["model"]["sha256"] == file_sha256(tmp_path / "net.pt")

    # A second call prints the same scores and runs nothing.
    status, again, _ = script.run(*small_run)
    assert status == 0
    assert out.endswith(again)
    assert list(folder.iterdir()) == [path]
