"""From pictures to training batches: killed, shared, resumed, and read in order of positions."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from experiments.engine.data import encode, latent_statistics, sets
from experiments.engine.data import locate as sources
from experiments.engine.data.autoencoder import Autoencoder, load_autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.latent_statistics import compare_statistics
from experiments.engine.data.latents import SCALE, LatentSet
from experiments.engine.data.locate import read_manifest
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.data.sets import batch_indices, iterate_batches, load
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.records import files
from experiments.engine.specs.spec import Backbone, Recipe, Train
from experiments.engine.training.trainer import Trainer
from tests.support.latent_sets import declared, ignore_progress, write_pictures, write_vae


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without locks and what was measured of the files."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix != ".lock" and not path.name.startswith(".")
    }


def in_processes(*jobs: Callable[[], object]) -> list[int]:
    """Exit codes of functions run at once in copies of this process."""
    started = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def test_shards_hold_the_posterior_of_each_picture_and_of_its_flip(job: EncodingJob, latents: Path):
    stored = np.concatenate([np.load(latents / f"shard-{number:05d}.npy") for number in range(3)])
    assert stored.shape == (12, 2, 8, 8, 8) and stored.dtype == np.float32
    for index in (0, 1, 4, 11):
        pixels, _ = read_picture(job.pictures.root / job.pictures.files[index], 64)
        image = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        for flip, x in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                mean, log_variance = job.vae.vae.quant_conv(job.vae.vae.encoder(x)).chunk(2, 1)
            expected = torch.cat([mean, (log_variance.double() / 2).exp().float()], 1)[0].numpy()
            assert np.abs(stored[index, flip] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_manifest_says_what_was_made(job: EncodingJob, latents: Path):
    manifest = json.loads((latents / "manifest.json").read_text())
    stored = np.concatenate(
        [np.load(latents / f"shard-{number:05d}.npy") for number in range(3)]
    ).astype(float)
    mean, variance = (
        stored[:, :, :4].mean((0, 1, 3, 4)),
        stored[:, :, :4].var((0, 1, 3, 4)) + (stored[:, :, 4:] ** 2).mean((0, 1, 3, 4)),
    )
    assert (
        manifest["num_images"] == 12
        and manifest["shards"] == [5, 5, 2]
        and manifest["skipped"] == {}
        and manifest["converted"] == {"L": 1, "CMYK": 1}
    )
    assert (
        manifest["vae"]["encoder"] == job.vae.encoder
        and manifest["vae"]["scale"] == SCALE == 0.18215
    )
    assert np.allclose(manifest["statistics"]["mean"], mean, atol=1e-4) and np.allclose(
        manifest["statistics"]["deviation"], variance**0.5, atol=1e-4
    )
    assert not manifest["statistics"]["as_expected"]
    assert np.load(latents / "labels.npy").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not [
        path
        for path in latents.iterdir()
        if path.suffix == ".tmp" or path.name.startswith("shard") and path.suffix == ".lock"
    ]


def test_two_processes_and_another_batch_make_the_same_bits(
    job: EncodingJob, latents: Path, tmp_path: Path
):
    other = Autoencoder(job.vae.vae, job.vae.name, job.vae.device, batch=7)
    jobs = [
        partial(encode_pictures, replace(job, vae=other, workers=n), tmp_path, ignore_progress)
        for n in (1, 3)
    ]
    assert in_processes(*jobs) == [0, 0]
    assert contents(tmp_path) == contents(latents)


def test_another_shard_size_changes_no_latent(job: EncodingJob, latents: Path, tmp_path: Path):
    encode_pictures(replace(job, shard=7), tmp_path, ignore_progress)
    one, other = (LatentSet(folder, declared(job.vae)) for folder in (latents, tmp_path))
    assert torch.equal(
        *(found.take(torch.arange(12), 0, torch.arange(12))[0] for found in (one, other))
    )


@pytest.mark.parametrize("place", ["encoding", "writing", "shard-00001.json", "manifest.json"])
def test_a_killed_run_leaves_nothing_half_and_goes_on(
    place: str, job: EncodingJob, latents: Path, tmp_path: Path
):
    def dying(
        function: Callable,
        when: Callable[..., bool],
        first: Callable[..., object] = lambda *_: None,
    ) -> Callable:
        def called(*arguments):
            if when(*arguments):
                first(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return called

    def write_half(file: BinaryIO, rows: np.ndarray) -> None:
        file.write(b"half a shard")
        file.flush()

    def killed() -> None:
        if place == "encoding":
            encode.read_picture = dying(read_picture, lambda path, size: path.parent.name == "n02")
        elif place == "writing":
            encode.np.save = dying(
                np.save, lambda file, rows: "shard-00001" in file.name, write_half
            )
        else:
            encode._write_json = dying(encode._write_json, lambda path, value: path.name == place)
        encode_pictures(job, tmp_path, ignore_progress)

    assert in_processes(killed) == [-signal.SIGKILL]
    assert not (tmp_path / "manifest.json").exists()
    done = {path.stem for path in tmp_path.glob("shard-*.json")}
    assert all(
        (tmp_path / f"{name}.npy").read_bytes() == (latents / f"{name}.npy").read_bytes()
        for name in done
    )
    before = {name: (tmp_path / f"{name}.npy").stat().st_mtime_ns for name in done}
    encode_pictures(job, tmp_path, ignore_progress)
    assert contents(tmp_path) == contents(latents)
    assert {name: (tmp_path / f"{name}.npy").stat().st_mtime_ns for name in done} == before


def test_a_finished_folder_is_left_as_it_is(job: EncodingJob, latents: Path):
    before = {path.name: path.stat().st_mtime_ns for path in latents.glob("shard-*.npy")}
    reports = []
    encode_pictures(job, latents, lambda *counts: reports.append(counts))
    assert {
        path.name: path.stat().st_mtime_ns for path in latents.glob("shard-*.npy")
    } == before and set(reports) == {(12, 12)}


def test_fixed_samples_are_one_draw_of_the_moments(job: EncodingJob, latents: Path, tmp_path: Path):
    encode_pictures(replace(job, latents="fixed"), tmp_path, ignore_progress)
    fixed, moments = (
        np.concatenate([np.load(folder / f"shard-{number:05d}.npy") for number in range(3)])
        for folder in (tmp_path, latents)
    )
    assert fixed.shape == (12, 2, 4, 8, 8)
    noise = (fixed / SCALE - moments[:, :, :4]) / moments[:, :, 4:]
    assert (
        abs(noise.mean()) < 0.04
        and abs(noise.std() - 1) < 0.03
        and abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.06
    )
    found = LatentSet(tmp_path, declared(job.vae, latents="fixed"))
    visits = torch.stack(
        [found.take(torch.tensor([3]), 0, torch.tensor([position]))[0][0] for position in range(40)]
    )
    assert {tuple(visit.flatten().tolist()) for visit in visits} == {
        tuple(row.ravel().tolist()) for row in fixed[3]
    }


def test_moments_are_drawn_anew_and_flips_are_half(job: EncodingJob, latents: Path):
    found, visits = LatentSet(latents, declared(job.vae)), 400
    drawn, labels = found.take(torch.full((visits,), 6), 3, torch.arange(visits))
    assert labels.tolist() == [1] * visits and len(drawn.unique(dim=0)) == visits
    stored = torch.from_numpy(np.load(latents / "shard-00001.npy")[1])
    noise = (drawn[:, None] / SCALE - stored[:, :4]) / stored[:, 4:]
    flipped = noise.flatten(2).var(-1).argmin(1)
    assert 150 < flipped.sum() < 250
    noise = noise[torch.arange(visits), flipped].double()
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02
    assert noise.mean(0).abs().max() < 0.3 and abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_without_flips_the_picture_itself_is_seen(job: EncodingJob, latents: Path):
    found = LatentSet(latents, declared(job.vae, flip=False))
    drawn = found.take(torch.full((200,), 6), 3, torch.arange(200))[0]
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
    monkeypatch.setattr(sets, "WORKERS", workers)
    found = LatentSet(latents, declared(job.vae))
    whole = found.take(
        torch.cat([batch_indices(12, 8, 5, step) for step in range(3)]), 5, torch.arange(24)
    )
    parts = []
    for rank in range(shares):
        part = slice(rank * batch // shares, (rank + 1) * batch // shares)
        parts.append(
            list(iterate_batches(found, batch, 5, range(24 // batch), torch.device("cpu"), part))
        )
    for kind in (0, 1):
        seen = torch.cat(
            [torch.cat([steps[step][kind] for steps in parts]) for step in range(24 // batch)]
        )
        assert torch.equal(seen, whole[kind])


def test_another_seed_sees_other_noise(job: EncodingJob, latents: Path):
    found, at = LatentSet(latents, declared(job.vae)), torch.arange(12)
    assert not torch.equal(found.take(at, 0, at)[0], found.take(at, 1, at)[0])


def test_the_set_is_found_by_its_manifest(
    job: EncodingJob, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    shutil.copytree(latents, tmp_path / "tiny")
    found = load(declared(job.vae))
    assert isinstance(found, LatentSet) and len(found) == 12 and not found.flip
    assert (
        found.identity["vae"]["weights"] == job.vae.weights
        and len(found.identity["data_sha256"]) == 64
    )


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


def test_damaged_folders_are_refused_in_a_line(job: EncodingJob, latents: Path, tmp_path: Path):
    folder = tmp_path / "cut"
    shutil.copytree(latents, folder)
    whole = (folder / "shard-00002.npy").read_bytes()
    for damaged in (whole[:200], b"", b"no array at all", (folder / "labels.npy").read_bytes()):
        (folder / "shard-00002.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="shard-00002"):
            LatentSet(folder, declared(job.vae))
    for text in ("{}", "[]", "", '{"latents": 3'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json cannot be read"):
            read_manifest(folder, declared(job.vae))


@pytest.mark.parametrize("change", ["vae", "size", "pictures", "shard", "latents"])
def test_a_folder_is_not_filled_with_something_else(
    change: str, job: EncodingJob, latents: Path, tmp_path: Path
):
    other = {
        "vae": lambda: replace(job, vae=load_autoencoder(str(write_vae(tmp_path / "vae", seed=1)))),
        "size": lambda: replace(job, size=72),
        "pictures": lambda: replace(
            job, pictures=find_pictures(write_pictures(tmp_path / "other", each=3), 3)
        ),
        "shard": lambda: replace(job, shard=6),
        "latents": lambda: replace(job, latents="fixed"),
    }[change]()
    with pytest.raises(ValueError, match="is being filled otherwise: ") as failure:
        encode_pictures(other, latents, ignore_progress)
    assert "\n" not in str(failure.value)


def test_a_damaged_picture_stops_the_run_or_is_counted(
    job: EncodingJob, pictures: Path, tmp_path: Path
):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    (root / "n01" / "1.JPEG").write_bytes(b"\xff\xd8 no picture")
    damaged = replace(job, pictures=find_pictures(root, 3))
    with pytest.raises(
        ValueError, match=r"n01/1\.JPEG cannot be decoded: .*--corrupt skip"
    ) as failure:
        encode_pictures(damaged, tmp_path / "latents", ignore_progress)
    assert (
        "\n" not in str(failure.value) and not (tmp_path / "latents" / "shard-00001.json").exists()
    )
    manifest = encode_pictures(replace(damaged, skip=True), tmp_path / "latents", ignore_progress)
    assert (
        list(manifest["skipped"]) == ["n01/1.JPEG"]
        and manifest["num_images"] == 11
        and manifest["shards"] == [5, 4, 2]
    )
    found = LatentSet(tmp_path / "latents", declared(job.vae))
    assert found.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    for path in (root / "n01").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no image of n01 could be decoded"):
        encode_pictures(replace(damaged, skip=True), tmp_path / "none", ignore_progress)


def test_the_trainer_sees_the_set_as_it_is_drawn(
    job: EncodingJob, latents: Path, monkeypatch: pytest.MonkeyPatch
):
    found, seen, losses = LatentSet(latents, declared(job.vae)), [], IDDPM.losses
    spec = Train(
        Backbone(
            "dico_s",
            dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=4, num_classes=3),
        ),
        found.data,
        Recipe(steps=3, batch=8),
        seed=5,
    )
    monkeypatch.setattr(
        IDDPM,
        "losses",
        lambda self, model, x0, *rest: (seen.append(x0), losses(self, model, x0, *rest))[1],
    )
    assert all(loss.isfinite() for loss in Trainer(spec).steps(found))
    order = torch.cat([batch_indices(12, 8, 5, step) for step in range(3)])
    assert torch.equal(torch.cat(seen), found.take(order, 5, torch.arange(24))[0])


def test_published_statistics_are_expected_within_the_tolerance():
    mean, deviation = np.array(latent_statistics.MEAN), np.array(latent_statistics.DEVIATION)
    assert compare_statistics(mean, deviation, 1_281_167, 256)["as_expected"]
    assert compare_statistics(mean + 0.04 * deviation, deviation * 0.96, 1_281_167, 256)[
        "as_expected"
    ]
    for wrong in (
        (mean * 0.18215, deviation * 0.18215),
        (mean, deviation * 1.1),
        (np.array([5.81, 3.25, 0.12, -2.15]), deviation),
        (mean[[1, 0, 2, 3]], deviation),
    ):
        assert not compare_statistics(*wrong, 1_281_167, 256)["as_expected"]
    assert not compare_statistics(mean[:3], deviation[:3], 1_281_167, 256)["as_expected"]


def test_a_published_name_with_other_statistics_is_refused(job: EncodingJob, tmp_path: Path):
    impostor = Autoencoder(job.vae.vae, "sd-vae-ft-ema", job.vae.device, 1)
    with pytest.raises(ValueError, match="not what their names say"):
        encode_pictures(replace(job, vae=impostor), tmp_path, ignore_progress)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_seen_before_the_work(
    job: EncodingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(ValueError, match="the disk has 0.0 GB free"):
        encode_pictures(job, tmp_path, ignore_progress)
