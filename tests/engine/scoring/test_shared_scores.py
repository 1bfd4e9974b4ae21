"""Features shared by a group: the same scores to the last bit, and a stopped run goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.engine.data import image_files as npz
from experiments.engine.data import locate
from experiments.engine.runtime import group as distributed
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling import samples
from experiments.engine.scoring import inception
from experiments.engine.scoring import measure as scoring_measure
from experiments.engine.scoring import stage as evaluate
from experiments.engine.scoring.inception import Inception
from experiments.engine.scoring.measure import measure, measure_shared
from experiments.engine.specs.spec import Backbone, Data, Evaluate, Recipe, Sampler, Train
from experiments.engine.training import stage as training_stage

SMALL = dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=3, num_classes=10)
TRAIN = Train(Backbone("dico_s", SMALL), Data("pixels", 8, 3, 10), Recipe(steps=2, batch=4))
SCORE = Evaluate(TRAIN, Sampler(num_steps=2), 23, "inception", "balanced")
DRAW = np.random.default_rng(0)


class Tiny(nn.Module):
    """A network of Inception's inputs and outputs, narrow, with one layer for each."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.Mixed_6d = nn.Module()
            self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 3, padding=1)
            self.pool, self.logits = nn.Linear(192, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.interpolate(x.float() / 128 - 1, (3, 3), mode="bilinear")
        pool = self.pool(self.Mixed_6d.branch1x1(x).relu().mean((2, 3)))
        return pool, self.logits(pool)


def member(rank: int, world: int, port: int, root: Path) -> None:
    """One rank that scores a finished run; the first leaves the values."""
    torch.set_num_threads(1)
    if world > 1:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ.update(own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})

    # Small data, a small extractor, and small pieces of everything.
    locate.ROOT = root / "data"
    evaluate.load_inception = lambda path, device: Inception(Tiny().eval(), "f" * 64, device)
    evaluate.require_features = lambda spec: None
    inception.BATCH = 2
    scoring_measure.PIECE = 6
    samples.CHUNK = 5

    # The pieces that this rank measures are counted.
    count = 0
    measure_piece = scoring_measure._measure_piece

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return measure_piece(*arguments)

    scoring_measure._measure_piece = counting
    group = distributed.join_group("cpu", 60.0)
    context = RunContext(root / f"runs-{world}" / "a", Resources(sample_batch=4), group)
    values = evaluate.run_evaluation(SCORE, root, context)
    (root / f"pieces-{world}-{rank}").write_text(str(count))
    if group.first:
        (root / f"values-{world}.json").write_text(json.dumps(values, sort_keys=True))


def score_in_group(world: int, root: Path) -> dict[str, Any]:
    """Return the values of the record that a group of so many processes leaves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.engine.jobs.execute"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # The ranks run side by side, and none hangs.
    arguments = [(rank, world, port, root) for rank in range(world)]
    ranks = [context.Process(target=member, args=of_rank) for of_rank in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world
    return json.loads((root / f"values-{world}.json").read_text())


def test_two_processes_extract_their_shares_and_score_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "data" / "pixels"
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", DRAW.uniform(-1, 1, (20, 3, 8, 8)).astype(np.float32))
    np.save(folder / "labels.npy", np.arange(20) % 10)
    monkeypatch.setattr(locate, "ROOT", tmp_path / "data")
    training_stage.run_training(TRAIN, RunContext(tmp_path / "runs-1" / "a"))
    shutil.copytree(tmp_path / "runs-1", tmp_path / "runs-2")
    assert score_in_group(2, tmp_path) == score_in_group(1, tmp_path)

    # Four pieces are of the 23 samples and four of the 20 references; two ranks take half each.
    names = ("1-0", "2-0", "2-1")
    assert [int((tmp_path / f"pieces-{name}").read_text()) for name in names] == [8, 4, 4]
    assert not list(tmp_path.glob("runs-*/*/features-*"))


class StoppedImages:
    """Images whose third piece cannot be read, since somebody stops the program."""

    def __init__(self, images: npz.ImageFile) -> None:
        self.images = images
        self.read_pieces: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> np.ndarray:
        self.read_pieces.append((start, stop))
        if start == 8:
            raise KeyboardInterrupt
        return self.images.read(start, stop)


def test_pieces_add_up_to_the_whole_and_are_not_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A measurement that was stopped goes on with the piece it stopped at."""
    monkeypatch.setattr(inception, "BATCH", 2)
    monkeypatch.setattr(scoring_measure, "PIECE", 4)
    images = DRAW.integers(0, 256, (11, 9, 7, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images)
    stored = npz.ImageFile(tmp_path / "a.npz")
    extractor = Inception(Tiny().eval(), "tiny")
    whole = measure(extractor, stored.batches(4))

    # Stop at the third piece, and go on.
    stopped = StoppedImages(stored)
    with pytest.raises(KeyboardInterrupt):
        measure_shared(extractor, stopped, tmp_path / "parts", RunContext(tmp_path))
    assert stopped.read_pieces == [(0, 4), (4, 8), (8, 11)]
    features = measure_shared(extractor, stored, tmp_path / "parts", RunContext(tmp_path))

    # The features are those of all images at once.
    for layer in ("pool", "spatial", "probabilities"):
        np.testing.assert_array_equal(getattr(features, layer), getattr(whole, layer))


def test_any_part_of_a_file_is_what_its_batches_say(tmp_path: Path):
    images = DRAW.integers(0, 256, (13, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    stored = npz.ImageFile(tmp_path / "a.npz")
    np.testing.assert_array_equal(np.concatenate(list(stored.batches(5))), images)
    for start, stop in ((0, 13), (3, 4), (12, 13), (5, 11)):
        np.testing.assert_array_equal(stored.read(start, stop), images[start:stop])
    with pytest.raises(ValueError, match="cut short"):
        stored.read(10, 14)
