"""From pictures to latents on disk: what is stored, killed, shared, resumed and refused."""

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

from experiments.engine.data import encode, latent_statistics
from experiments.engine.data.autoencoder import Autoencoder, load_autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.latent_statistics import compare_statistics
from experiments.engine.data.latents import SCALE, LatentSet
from experiments.engine.data.locate import read_manifest
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.records import files
from tests.support.latent_sets import (
    declared,
    ignore_progress,
    read_shards,
    write_pictures,
    write_vae,
)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, without locks and what was measured of the files."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in paths if path.suffix != ".lock"}


def write_times(folder: Path) -> dict[str, int]:
    """Return when every shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.npy")}


def in_processes(*jobs: Callable[[], object]) -> list[int]:
    """Return the exit codes of functions that run at once in copies of this process."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_shards_hold_the_posterior_of_each_picture_and_of_its_flip(job: EncodingJob, latents: Path):
    """A row holds mean and deviation of the VAE's posterior, as the network computes them."""
    stored = read_shards(latents)
    assert stored.shape == (12, 2, 8, 8, 8)
    assert stored.dtype == np.float32

    # Encode some pictures and their flips again, one by one.
    vae = job.vae.vae
    for index in (0, 1, 4, 11):
        pixels, _ = read_picture(job.pictures.root / job.pictures.files[index], 64)
        image = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        for flip, x in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
            deviation = (log_variance.double() / 2).exp().float()
            expected = torch.cat([mean, deviation], 1)[0].numpy()
            assert np.abs(stored[index, flip] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_manifest_says_what_was_made(job: EncodingJob, latents: Path):
    """The manifest counts pictures and shards, and holds the VAE and the latents' statistics."""
    manifest = json.loads((latents / "manifest.json").read_text())
    assert manifest["num_images"] == 12
    assert manifest["shards"] == [5, 5, 2]
    assert manifest["skipped"] == {}
    assert manifest["converted"] == {"L": 1, "CMYK": 1}
    assert manifest["vae"]["encoder"] == job.vae.encoder
    assert manifest["vae"]["scale"] == SCALE == 0.18215

    # The variance of latents is that of their means, plus the mean of their variances.
    stored = read_shards(latents).astype(float)
    axes = (0, 1, 3, 4)
    means = stored[:, :, :4]
    variance = means.var(axes) + (stored[:, :, 4:] ** 2).mean(axes)
    statistics = manifest["statistics"]
    assert np.allclose(statistics["mean"], means.mean(axes), atol=1e-4)
    assert np.allclose(statistics["deviation"], variance**0.5, atol=1e-4)
    assert not statistics["as_expected"]

    # Labels lie beside the shards, and nothing unfinished is left.
    assert np.load(latents / "labels.npy").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not list(latents.glob("*.tmp"))
    assert not list(latents.glob("shard*.lock"))


def test_two_processes_and_another_batch_make_the_same_bits(
    job: EncodingJob, latents: Path, tmp_path: Path
):
    """Two processes that share the work fill a folder with the bits of one process."""
    other = Autoencoder(job.vae.vae, job.vae.name, job.vae.device, batch=7)
    jobs = [replace(job, vae=other, workers=workers) for workers in (1, 3)]
    codes = in_processes(
        *(partial(encode_pictures, job, tmp_path, ignore_progress) for job in jobs)
    )
    assert codes == [0, 0]
    assert contents(tmp_path) == contents(latents)


def test_another_shard_size_changes_no_latent(job: EncodingJob, latents: Path, tmp_path: Path):
    """What a training draws does not depend on how the shards were cut."""
    encode_pictures(replace(job, shard=7), tmp_path, ignore_progress)
    order = torch.arange(12)
    drawn = LatentSet(latents, declared(job.vae)).take(order, 0, order)[0]
    other = LatentSet(tmp_path, declared(job.vae)).take(order, 0, order)[0]
    assert torch.equal(drawn, other)


def dying(
    function: Callable,
    condition: Callable[..., bool],
    before: Callable[..., object] = lambda *_: None,
) -> Callable:
    """Return a function that kills its process at a call, after doing something else."""

    def called(*arguments: object) -> object:
        if condition(*arguments):
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return called


def write_half(file: BinaryIO, rows: np.ndarray) -> None:
    file.write(b"half a shard")
    file.flush()


def encode_until_killed(job: EncodingJob, folder: Path, place: str) -> None:
    """Encode pictures in a process that is killed at a place of its work."""
    if place == "encoding":
        encode.read_picture = dying(read_picture, lambda path, *_: path.parent.name == "n02")
    elif place == "writing":
        of_second = "shard-00001"
        encode.np.save = dying(np.save, lambda file, rows: of_second in file.name, write_half)
    else:
        encode.write_json = dying(encode.write_json, lambda path, value: path.name == place)
    encode_pictures(job, folder, ignore_progress)


@pytest.mark.parametrize("place", ["encoding", "writing", "shard-00001.json", "manifest.json"])
def test_a_killed_run_leaves_nothing_half_and_goes_on(
    place: str, job: EncodingJob, latents: Path, tmp_path: Path
):
    """A run that was killed leaves whole shards only, and another run makes the rest."""
    killed = partial(encode_until_killed, job, tmp_path, place)
    assert in_processes(killed) == [-signal.SIGKILL]
    assert not (tmp_path / "manifest.json").exists()

    # Every shard with its description is whole.
    done = [path.with_suffix(".npy").name for path in tmp_path.glob("shard-*.json")]
    for name in done:
        assert (tmp_path / name).read_bytes() == (latents / name).read_bytes()

    # The next run leaves them as they are, and its folder is that of an undisturbed run.
    before = {name: write_times(tmp_path)[name] for name in done}
    encode_pictures(job, tmp_path, ignore_progress)
    assert contents(tmp_path) == contents(latents)
    after = write_times(tmp_path)
    assert {name: after[name] for name in done} == before


def test_a_finished_folder_is_left_as_it_is(job: EncodingJob, latents: Path):
    """A second run writes no shard, and reports at once that all pictures are done."""
    before = write_times(latents)
    reports = []
    encode_pictures(job, latents, lambda *counts: reports.append(counts))
    assert write_times(latents) == before
    assert set(reports) == {(12, 12)}


def test_damaged_folders_are_refused_in_a_line(job: EncodingJob, latents: Path, tmp_path: Path):
    """A shard or a manifest that cannot be read is named."""
    folder = tmp_path / "cut"
    shutil.copytree(latents, folder)

    # Shards that are cut, empty, text, or another array.
    shard = folder / "shard-00002.npy"
    whole = shard.read_bytes()
    for damaged in (whole[:200], b"", b"no array at all", (folder / "labels.npy").read_bytes()):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="shard-00002"):
            LatentSet(folder, declared(job.vae))

    # Manifests that are empty, or no JSON.
    for text in ("{}", "[]", "", '{"latents": 3'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json cannot be read"):
            read_manifest(folder, declared(job.vae))


def changed_job(job: EncodingJob, change: str, folder: Path) -> EncodingJob:
    """Return a job that differs in one thing."""
    match change:
        # Another VAE and other pictures are written into the folder.
        case "vae":
            other = load_autoencoder(str(write_vae(folder / "vae", seed=1)))
            return replace(job, vae=other)
        case "pictures":
            pictures = find_pictures(write_pictures(folder / "other", each=3), 3)
            return replace(job, pictures=pictures)
        case "size":
            return replace(job, size=72)
        case "shard":
            return replace(job, shard=6)
        case _:
            return replace(job, latents="fixed")


@pytest.mark.parametrize("change", ["vae", "size", "pictures", "shard", "latents"])
def test_a_folder_is_not_filled_with_something_else(
    change: str, job: EncodingJob, latents: Path, tmp_path: Path
):
    """A job whose latents would be others is refused in one line."""
    other = changed_job(job, change, tmp_path)
    with pytest.raises(ValueError, match="is being filled otherwise: ") as failure:
        encode_pictures(other, latents, ignore_progress)
    assert "\n" not in str(failure.value)


def test_a_damaged_picture_stops_the_run_or_is_counted(
    job: EncodingJob, pictures: Path, tmp_path: Path
):
    """A picture that cannot be decoded is named, and left out on request."""
    root = tmp_path / "pictures"
    folder = tmp_path / "latents"
    shutil.copytree(pictures, root)
    (root / "n01" / "1.JPEG").write_bytes(b"\xff\xd8 no picture")
    damaged = replace(job, pictures=find_pictures(root, 3))

    # The run stops before the shard of the picture.
    refusal = r"n01/1\.JPEG cannot be decoded: .*--corrupt skip"
    with pytest.raises(ValueError, match=refusal) as failure:
        encode_pictures(damaged, folder, ignore_progress)
    assert "\n" not in str(failure.value)
    assert not (folder / "shard-00001.json").exists()

    # Asked to skip, it counts the picture.
    skipping = replace(damaged, skip=True)
    manifest = encode_pictures(skipping, folder, ignore_progress)
    assert list(manifest["skipped"]) == ["n01/1.JPEG"]
    assert manifest["num_images"] == 11
    assert manifest["shards"] == [5, 4, 2]
    labels = LatentSet(folder, declared(job.vae)).labels
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4

    # A class without any picture is no class.
    for path in (root / "n01").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no image of n01 could be decoded"):
        encode_pictures(skipping, tmp_path / "none", ignore_progress)


def test_published_statistics_are_expected_within_the_tolerance():
    """Latents of the published VAE have these statistics, and other latents do not."""
    mean = np.array(latent_statistics.MEAN)
    deviation = np.array(latent_statistics.DEVIATION)

    def as_expected(mean: np.ndarray, deviation: np.ndarray) -> bool:
        return compare_statistics(mean, deviation, 1_281_167, 256)["as_expected"]

    # The statistics themselves, and others that are near.
    assert as_expected(mean, deviation)
    assert as_expected(mean + 0.04 * deviation, deviation * 0.96)

    # Scaled latents, too wide ones, those of another VAE, swapped channels, and too few.
    assert not as_expected(mean * 0.18215, deviation * 0.18215)
    assert not as_expected(mean, deviation * 1.1)
    assert not as_expected(np.array([5.81, 3.25, 0.12, -2.15]), deviation)
    assert not as_expected(mean[[1, 0, 2, 3]], deviation)
    assert not as_expected(mean[:3], deviation[:3])


def test_a_published_name_with_other_statistics_is_refused(job: EncodingJob, tmp_path: Path):
    impostor = Autoencoder(job.vae.vae, "sd-vae-ft-ema", job.vae.device, 1)
    with pytest.raises(ValueError, match="not what their names say"):
        encode_pictures(replace(job, vae=impostor), tmp_path, ignore_progress)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_seen_before_the_work(
    job: EncodingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(ValueError, match="the disk has 0.0 GB free"):
        encode_pictures(job, tmp_path, ignore_progress)
