"""From photographs to scores, killed at every stage and begun again."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments.engine.data import encode as shards
from experiments.engine.data import locate as sources
from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling import samples
from experiments.engine.scoring import inception
from experiments.engine.scoring import measure as scoring_measure
from experiments.engine.specs.spec import Backbone, Data, Evaluate, Recipe, Sampler, Train, spec_id
from experiments.engine.training.trainer import Trainer
from tests.support.latent_sets import ignore_progress, write_vae

SIDE = 64
NUM = 9


@pytest.fixture(scope="module")
def sources_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs cut into six pictures each, an untrained VAE and untrained Inception."""
    pytest.importorskip("diffusers")
    pytest.importorskip("torch_fidelity")
    root = tmp_path_factory.mktemp("sources")
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        folder = root / "pictures" / name
        folder.mkdir(parents=True)
        for place in range(6):
            top = 213 * (place // 3)
            left = 213 * (place % 3)
            cut = Image.fromarray(photograph[top : top + 213, left : left + 213])
            cut.save(folder / f"{place}.jpg", quality=95)
    write_vae(root / "vae")

    # By Inception's own initial weights, features hardly depend on the image.
    network = inception.build_network()
    draw = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight, generator=draw)
    torch.save(network.state_dict(), root / "inception.pth")
    return root


def dying(function: Callable, condition: Callable[..., bool]) -> Callable:
    """Return a function that kills its process at a call."""

    def called(*arguments: Any) -> Any:
        if condition(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return called


def is_second() -> Callable[..., bool]:
    """Return a condition that is true of the second call."""
    calls = itertools.count(1)
    return lambda *_: next(calls) == 2


def has_saved(root: Path) -> Callable[..., bool]:
    """Return a condition that is true at the sixth step, once the checkpoint of the third is there.

    Checkpoints are written aside, which may take longer than two steps.
    """

    def condition(trainer: Trainer, *_: Any) -> bool:
        if trainer.step != 5:
            return False
        end = time.monotonic() + 60
        while not list(root.glob("results/runs/*/checkpoints/step-00000003-*.pt")):
            assert time.monotonic() < end, "no checkpoint of the third step was written"
            time.sleep(0.1)
        return True

    return condition


def arm(stage: str, root: Path) -> None:
    """Let the process be killed within a stage, or within none."""
    if stage == "encoding":
        shards.read_picture = dying(read_picture, lambda path, *_: path.parent.name == "flower")
    elif stage == "training":
        Trainer._update = dying(Trainer._update, has_saved(root))
    elif stage == "sampling":
        samples.to_uint8 = dying(samples.to_uint8, is_second())
    elif stage == "scoring":
        measure_piece = scoring_measure._measure_piece
        scoring_measure._measure_piece = dying(measure_piece, is_second())


def prepare_latents(origin: Path, root: Path) -> Data:
    """Encode the pictures, and write them as the reference of scores."""
    pictures = find_pictures(origin / "pictures", 2)
    vae = load_autoencoder(str(origin / "vae"))
    size = SIDE // vae.factor
    data = Data("photographs", size, channels=4, num_classes=2, flip=True, vae=vae.encoder)
    folder = root / "data" / data.name
    encode_pictures(EncodingJob(pictures, vae, SIDE, shard=5), folder, ignore_progress)
    real = np.stack([read_picture(pictures.root / file, SIDE)[0] for file in pictures.files])
    np.savez(folder / "reference.npz", arr_0=real)
    return data


def whole_path(origin: Path, root: Path, dies: str) -> None:
    """Do all that is missing up to the record; the process is killed within the stage `dies`."""
    torch.set_num_threads(1)
    os.environ["DICO_VAE"] = str(origin / "vae")
    os.environ["DICO_INCEPTION"] = str(origin / "inception.pth")

    # Small chunks and pieces, so that a stage can be killed in its middle.
    sources.ROOT = root / "data"
    inception.SHA256 = ""
    inception.BATCH = 2
    samples.CHUNK = 4
    scoring_measure.PIECE = 4
    arm(dies, root)

    # From pictures to latents, from latents to weights, and from weights to scores.
    data = prepare_latents(origin, root)
    shape = dict(input_size=data.size, in_channels=4, num_classes=2)
    network = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)) | shape)
    train = Train(network, data, Recipe(steps=8, batch=4))
    evaluate = Evaluate(train, Sampler("ddim", num_steps=2), NUM, "inception", "balanced")
    for stage in (train, evaluate):
        record = execute(stage, Store(root / "results"), Resources(checkpoint_every=3))
        assert record.status == "done", record.error
    (root / "ids").write_text(f"{spec_id(train)} {spec_id(evaluate)}")


def end_of(origin: Path, root: Path, dies: str = "") -> int:
    """Return the exit code of a process that goes the path.

    The process is new: after a backward pass a fork could not run another one.
    """
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=whole_path, args=(origin, root, dies))
    process.start()
    process.join()
    return process.exitcode


def results_of(root: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, str]]:
    """Return the files of latents and samples, the training's values and the scores."""
    train, evaluate = (root / "ids").read_text().split()
    (data,) = (root / "data").iterdir()
    drawn = root / "results" / "runs" / evaluate / "samples"
    paths = [*data.glob("*.npy"), data / "manifest.json", *drawn.glob("*.npy")]

    # Attempts tell how often the process was killed.
    records = Store(root / "results").here.by_id()
    scores = dict(records[evaluate][-1].values)
    scores.pop("attempts", None)
    texts = {name: repr(value) for name, value in scores.items()}
    return {path.name: path.read_bytes() for path in paths}, records[train][-1].values, texts


@pytest.mark.slow
def test_killed_at_every_stage_the_path_ends_with_the_same_bits(
    sources_folder: Path, tmp_path: Path
):
    """A path that was killed in every stage leaves the files and scores of an undisturbed one."""
    assert end_of(sources_folder, tmp_path / "whole") == 0
    for dies in ("encoding", "training", "sampling", "scoring"):
        assert end_of(sources_folder, tmp_path / "killed", dies) == -signal.SIGKILL, dies
    assert end_of(sources_folder, tmp_path / "killed") == 0

    # Three shards, labels, a manifest and three chunks of samples.
    files, training, scores = results_of(tmp_path / "whole")
    again_files, again_training, again_scores = results_of(tmp_path / "killed")
    assert len(files) == 3 + 1 + 1 + 3
    assert again_files == files
    assert again_scores == scores
    assert again_training["resumed_at"] == 3
    assert again_training["weights_sha256"] == training["weights_sha256"]

    # Every score is a number, and images differ from the real ones and from each other.
    names = "fid sfid is precision recall density coverage kid mind"
    values = {name: float(scores[name]) for name in names.split()}
    assert all(np.isfinite(value) for value in values.values())
    assert values["fid"] > 1e-6
    assert values["is"] > 1 - 1e-9

    # The record says what was scored, and what such scores are worth.
    assert "'num_images': 12" in scores["manifest"]
    assert "'name': 'unknown'" in scores["manifest"]
    assert "fewer than the 2048" in scores["warnings"]
