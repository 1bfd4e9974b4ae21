"""From photographs to scores, killed at every stage and begun again."""

from __future__ import annotations

import multiprocessing
import os
import signal
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
from tests.support.latent_sets import write_vae

SIDE, NUM = 64, 9


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs cut into six pictures each, an untrained VAE and untrained Inception."""
    pytest.importorskip("diffusers")
    pytest.importorskip("torch_fidelity")
    root = tmp_path_factory.mktemp("given")
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / "pictures" / name).mkdir(parents=True)
        for place in range(6):
            top, left = 213 * (place // 3), 213 * (place % 3)
            Image.fromarray(photograph[top : top + 213, left : left + 213]).save(
                root / "pictures" / name / f"{place}.jpg", quality=95
            )
    network, draw = inception.build_network(), torch.Generator().manual_seed(0)
    for weight in (weight for weight in network.parameters() if weight.dim() == 4):
        torch.nn.init.kaiming_normal_(
            weight, generator=draw
        )  # as it is made, its features hardly depend on the image
    torch.save(network.state_dict(), root / "inception.pth")
    write_vae(root / "vae")
    return root


def whole_path(given: Path, root: Path, dies: str) -> None:
    """Do all that is missing up to the record; the process is killed within the stage `dies`."""

    def dying(function: Callable, when: Callable[..., bool]) -> Callable:
        def called(*arguments: Any) -> Any:
            if when(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return called

    torch.set_num_threads(1)
    os.environ |= {"DICO_VAE": str(given / "vae"), "DICO_INCEPTION": str(given / "inception.pth")}
    sources.ROOT, inception.SHA256, samples.CHUNK, scoring_measure.PIECE, inception.BATCH = (
        root / "data",
        "",
        4,
        4,
        2,
    )
    pieces = []
    if dies == "encoding":
        shards.read_picture = dying(read_picture, lambda path, size: path.parent.name == "flower")
    elif dies == "training":
        Trainer._update = dying(Trainer._update, lambda trainer, *batch: trainer.step == 5)
    elif dies == "sampling":
        samples.to_uint8 = dying(samples.to_uint8, lambda x: pieces.append(0) or len(pieces) == 2)
    elif dies == "scoring":
        scoring_measure._measure_piece = dying(
            scoring_measure._measure_piece, lambda *piece: pieces.append(0) or len(pieces) == 2
        )
    pictures, vae = find_pictures(given / "pictures", 2), load_autoencoder(str(given / "vae"))
    data = Data(
        "photographs",
        size=SIDE // vae.factor,
        channels=4,
        num_classes=2,
        flip=True,
        vae=vae.encoder,
    )
    encode_pictures(
        EncodingJob(pictures, vae, SIDE, shard=5), root / "data" / data.name, lambda *counts: None
    )
    real = np.stack([read_picture(pictures.root / file, SIDE)[0] for file in pictures.files])
    np.savez(root / "data" / data.name / "reference.npz", arr_0=real)
    network = Backbone(
        "dico_s",
        dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=data.size, in_channels=4, num_classes=2),
    )
    train = Train(network, data, Recipe(steps=8, batch=4))
    store = Store(root / "results")
    for stage in (
        train,
        Evaluate(train, Sampler("ddim", num_steps=2), NUM, "inception", "balanced"),
    ):
        record = execute(stage, store, Resources(checkpoint_every=3))
        assert record.status == "done", record.error
    (root / "ids").write_text(f"{spec_id(train)} {record.id}")


def end_of(given: Path, root: Path, dies: str = "") -> int:
    """Exit code of a new process: after a backward pass a fork could not run another one."""
    process = multiprocessing.get_context("spawn").Process(
        target=whole_path, args=(given, root, dies)
    )
    process.start()
    process.join()
    return process.exitcode


def left(root: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, str]]:
    """Latents, the training's values and the scores."""
    train, evaluate = (root / "ids").read_text().split()
    (data,) = (root / "data").iterdir()
    latents = {
        path.name: path.read_bytes()
        for path in data.iterdir()
        if path.suffix == ".npy" or path.name == "manifest.json"
    }
    drawn = {
        path.name: path.read_bytes()
        for path in (root / "results" / "runs" / evaluate / "samples").glob("*.npy")
    }
    values = [Store(root / "results").here.by_id()[name][-1].values for name in (train, evaluate)]
    return (
        latents | drawn,
        values[0],
        {name: repr(value) for name, value in values[1].items() if name != "attempts"},
    )


@pytest.mark.slow
def test_killed_at_every_stage_the_path_ends_with_the_same_bits(given: Path, tmp_path: Path):
    assert end_of(given, tmp_path / "whole") == 0
    for dies in ("encoding", "training", "sampling", "scoring"):
        assert end_of(given, tmp_path / "killed", dies) == -signal.SIGKILL, dies
    assert end_of(given, tmp_path / "killed") == 0
    files, trained, scored = left(tmp_path / "whole")
    again_files, again_trained, again_scored = left(tmp_path / "killed")
    assert len(files) == 3 + 1 + 1 + 3 and again_files == files and again_scored == scored
    assert (again_trained["resumed_at"], again_trained["weights_sha256"]) == (
        3,
        trained["weights_sha256"],
    )
    found = {
        name: float(scored[name])
        for name in (
            "fid",
            "sfid",
            "is",
            "precision",
            "recall",
            "density",
            "coverage",
            "kid",
            "mind",
        )
    }
    assert (
        all(np.isfinite(value) for value in found.values())
        and found["fid"] > 1e-6
        and found["is"] > 1 - 1e-9
    )
    assert (
        "'num_images': 12" in scored["manifest"]
        and "'name': 'unknown'" in scored["manifest"]
        and "fewer than the 2048" in scored["warnings"]
    )
