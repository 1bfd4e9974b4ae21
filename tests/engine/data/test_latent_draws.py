"""Latents as a training draws them: by position, from their moments, whatever the batch."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.engine.data import locate as sources
from experiments.engine.data import sets
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.latents import SCALE, LatentSet
from experiments.engine.data.sets import batch_indices, iterate_batches, load
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.specs.spec import Backbone, Recipe, Train
from experiments.engine.training.trainer import Trainer
from tests.support.latent_sets import declared, ignore_progress, read_shards


def test_fixed_samples_are_one_draw_of_the_moments(job: EncodingJob, latents: Path, tmp_path: Path):
    """A fixed latent is mean plus deviation times normal noise, which every visit sees again."""
    encode_pictures(replace(job, latents="fixed"), tmp_path, ignore_progress)
    fixed = read_shards(tmp_path)
    moments = read_shards(latents)
    assert fixed.shape == (12, 2, 4, 8, 8)

    # The noise is normal, and that of a flip is another one.
    noise = (fixed / SCALE - moments[:, :, :4]) / moments[:, :, 4:]
    assert abs(noise.mean()) < 0.04
    assert abs(noise.std() - 1) < 0.03
    correlation = np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]
    assert abs(correlation) < 0.06

    # Forty visits of picture 3 see its two rows and nothing else.
    latent_set = LatentSet(tmp_path, declared(job.vae, latents="fixed"))
    seen = set()
    for position in range(40):
        visit, _ = latent_set.take(torch.tensor([3]), 0, torch.tensor([position]))
        seen.add(tuple(visit[0].flatten().tolist()))
    assert seen == {tuple(row.ravel().tolist()) for row in fixed[3]}


def test_moments_are_drawn_anew_and_flips_are_half(job: EncodingJob, latents: Path):
    """Every visit of a picture draws normal noise of its own, of the picture or of its flip."""
    visits = 400
    latent_set = LatentSet(latents, declared(job.vae))
    drawn, labels = latent_set.take(torch.full((visits,), 6), 3, torch.arange(visits))
    assert labels.tolist() == [1] * visits
    assert len(drawn.unique(dim=0)) == visits

    # By the moments that were not used, the noise would be far larger.
    stored = torch.from_numpy(np.load(latents / "shard-00001.npy")[1])
    noise = (drawn[:, None] / SCALE - stored[:, :4]) / stored[:, 4:]
    flipped = noise.flatten(2).var(-1).argmin(1)
    assert 150 < flipped.sum() < 250

    # The noise is normal at every place, and that of a visit tells nothing of the next one.
    noise = noise[torch.arange(visits), flipped].double()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.02
    assert noise.mean(0).abs().max() < 0.3
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_without_flips_the_picture_itself_is_seen(job: EncodingJob, latents: Path):
    """The mean over many visits is the mean of the picture's own posterior."""
    latent_set = LatentSet(latents, declared(job.vae, flip=False))
    drawn = latent_set.take(torch.full((200,), 6), 3, torch.arange(200))[0]
    mean, deviation = np.split(np.load(latents / "shard-00001.npy")[1, 0], 2)
    assert ((drawn.mean(0).numpy() / SCALE - mean) / deviation).std() < 0.1


@pytest.mark.parametrize("batch, shares, workers", [(4, 1, 1), (4, 2, 2), (12, 3, 4)])
def test_any_batch_share_and_worker_sees_the_same_sequence(
    job: EncodingJob,
    latents: Path,
    batch: int,
    shares: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """The shares of all ranks, put together step by step, are the sequence of positions."""
    monkeypatch.setattr(sets, "WORKERS", workers)
    latent_set = LatentSet(latents, declared(job.vae))
    order = torch.cat([batch_indices(12, 8, 5, step) for step in range(3)])
    whole = latent_set.take(order, 5, torch.arange(24))

    # Every rank reads its share of every batch.
    steps = range(24 // batch)
    cpu = torch.device("cpu")
    of_ranks = []
    for rank in range(shares):
        share = slice(rank * batch // shares, (rank + 1) * batch // shares)
        of_ranks.append(list(iterate_batches(latent_set, batch, 5, steps, cpu, share)))

    # Latents, and labels.
    for kind in (0, 1):
        seen = [batches[step][kind] for step in steps for batches in of_ranks]
        assert torch.equal(torch.cat(seen), whole[kind])


def test_another_seed_sees_other_noise(job: EncodingJob, latents: Path):
    latent_set = LatentSet(latents, declared(job.vae))
    order = torch.arange(12)
    assert not torch.equal(latent_set.take(order, 0, order)[0], latent_set.take(order, 1, order)[0])


def test_the_set_is_found_by_its_manifest(
    job: EncodingJob, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder with a manifest is loaded by its name, and identified by weights and data."""
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    shutil.copytree(latents, tmp_path / "tiny")
    latent_set = load(declared(job.vae))
    assert isinstance(latent_set, LatentSet)
    assert len(latent_set) == 12
    assert not latent_set.flip
    assert latent_set.identity["vae"]["weights"] == job.vae.weights
    assert len(latent_set.identity["data_sha256"]) == 64


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vae="sd-vae-ft"), "made with another VAE"),
        (dict(vae="0123456789abcdef"), "this run declares 0123456789abcdef"),
        (dict(size=16), r"shape \[2, 8, 8, 8\], not \[2, 8, 16, 16\]"),
        (dict(num_classes=4), "num_classes 3, not 4"),
        (dict(latents="fixed"), "latents moments, not fixed"),
    ],
)
def test_latents_of_another_kind_are_refused(
    options: dict, words: str, job: EncodingJob, latents: Path
):
    with pytest.raises(ValueError, match=words) as failure:
        LatentSet(latents, declared(job.vae, **options))
    assert "\n" not in str(failure.value)


def test_the_trainer_sees_the_set_as_it_is_drawn(
    job: EncodingJob, latents: Path, monkeypatch: pytest.MonkeyPatch
):
    """The inputs of a training's losses are the latents in the order of positions."""
    latent_set = LatentSet(latents, declared(job.vae))
    shape = dict(input_size=8, in_channels=4, num_classes=3)
    network = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)) | shape)
    spec = Train(network, latent_set.data, Recipe(steps=3, batch=8), seed=5)

    # Keep what the losses are given.
    inputs = []
    losses = IDDPM.losses

    def keeping(self: IDDPM, model: object, x0: torch.Tensor, *rest: object) -> object:
        inputs.append(x0)
        return losses(self, model, x0, *rest)

    monkeypatch.setattr(IDDPM, "losses", keeping)
    assert all(loss.isfinite() for loss in Trainer(spec).steps(latent_set))
    order = torch.cat([batch_indices(12, 8, 5, step) for step in range(3)])
    assert torch.equal(torch.cat(inputs), latent_set.take(order, 5, torch.arange(24))[0])
