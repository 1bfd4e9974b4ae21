"""From pictures to training batches: killed, shared, resumed, and read back in the order of positions."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import prepare_latents
from experiments.declared.protocols import IMAGENET256
from experiments.engine.data import encode as shards
from experiments.engine.data import locate as sources
from experiments.engine.data.autoencoder import Autoencoder, load_autoencoder
from experiments.engine.data.encode import EncodingJob, compare_statistics, encode_pictures
from experiments.engine.data.latents import SCALE, LatentSet
from experiments.engine.data.locate import read_manifest
from experiments.engine.data.pictures import find_pictures, read_picture
from experiments.engine.data.sets import batch_indices, iterate_batches, load_data
from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.specs.spec import Backbone, Recipe, Train
from experiments.engine.training.trainer import Trainer
from tests.support.latent_sets import declared, small_vae, write_pictures, write_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def work(vae: Autoencoder, pictures: Path) -> EncodingJob:
    return EncodingJob(find_pictures(pictures, 3), vae, 64, shard=5)


@pytest.fixture(scope="module")
def made(work: EncodingJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode_pictures(work, folder, quiet)
    return folder


def quiet(done: int, total: int) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def in_processes(*jobs: Callable[[], object]) -> list[int]:
    """Exit codes of functions run at once in copies of this process."""
    started = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def test_shards_hold_the_posterior_of_each_picture_and_of_its_flip(work: EncodingJob, made: Path):
    stored = np.concatenate([np.load(made / f"shard-{number:05d}.npy") for number in range(3)])
    assert stored.shape == (12, 2, 8, 8, 8) and stored.dtype == np.float32
    for index in (0, 1, 4, 11):
        pixels, _ = read_picture(work.pictures.root / work.pictures.files[index], 64)
        image = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        for flip, x in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                mean, log_variance = work.vae.vae.quant_conv(work.vae.vae.encoder(x)).chunk(2, 1)
            expected = torch.cat([mean, (log_variance.double() / 2).exp().float()], 1)[0].numpy()
            assert np.abs(stored[index, flip] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_manifest_says_what_was_made(work: EncodingJob, made: Path):
    manifest = json.loads((made / "manifest.json").read_text())
    stored = np.concatenate(
        [np.load(made / f"shard-{number:05d}.npy") for number in range(3)]
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
        manifest["vae"]["encoder"] == work.vae.encoder
        and manifest["vae"]["scale"] == SCALE == 0.18215
    )
    assert np.allclose(manifest["statistics"]["mean"], mean, atol=1e-4) and np.allclose(
        manifest["statistics"]["deviation"], variance**0.5, atol=1e-4
    )
    assert not manifest["statistics"]["as_expected"]
    assert np.load(made / "labels.npy").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not [
        path
        for path in made.iterdir()
        if path.name.startswith(".") or path.name.startswith("shard") and path.suffix == ".lock"
    ]


def test_two_processes_and_another_batch_make_the_same_bits(
    work: EncodingJob, made: Path, tmp_path: Path
):
    other = Autoencoder(work.vae.vae, work.vae.name, work.vae.device, batch=7)
    jobs = [
        lambda part=replace(work, vae=other, workers=n): encode_pictures(part, tmp_path, quiet)
        for n in (1, 3)
    ]
    assert in_processes(*jobs) == [0, 0]
    assert contents(tmp_path) == contents(made)


def test_another_shard_size_changes_no_latent(work: EncodingJob, made: Path, tmp_path: Path):
    encode_pictures(replace(work, shard=7), tmp_path, quiet)
    one, other = (LatentSet(folder, declared(work.vae)) for folder in (made, tmp_path))
    assert torch.equal(
        *(found.take(torch.arange(12), 0, torch.arange(12))[0] for found in (one, other))
    )


@pytest.mark.parametrize("place", ["encoding", "writing", "shard-00001.json", "manifest.json"])
def test_a_killed_run_leaves_nothing_half_and_goes_on(
    place: str, work: EncodingJob, made: Path, tmp_path: Path
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

    def killed() -> None:
        if place == "encoding":
            shards.read_picture = dying(read_picture, lambda path, size: path.parent.name == "n02")
        elif place == "writing":
            half = lambda file, rows: (file.write(b"half a shard"), file.flush())
            shards.np.save = dying(np.save, lambda file, rows: "shard-00001" in file.name, half)
        else:
            shards._write_json = dying(shards._write_json, lambda path, value: path.name == place)
        encode_pictures(work, tmp_path, quiet)

    assert in_processes(killed) == [-signal.SIGKILL]
    assert not (tmp_path / "manifest.json").exists()
    done = {path.stem for path in tmp_path.glob("shard-*.json")}
    assert all(
        (tmp_path / f"{name}.npy").read_bytes() == (made / f"{name}.npy").read_bytes()
        for name in done
    )
    before = {name: (tmp_path / f"{name}.npy").stat().st_mtime_ns for name in done}
    encode_pictures(work, tmp_path, quiet)
    assert contents(tmp_path) == contents(made)
    assert {name: (tmp_path / f"{name}.npy").stat().st_mtime_ns for name in done} == before


def test_a_finished_folder_is_left_as_it_is(work: EncodingJob, made: Path):
    before = {path.name: path.stat().st_mtime_ns for path in made.glob("shard-*.npy")}
    reports = []
    encode_pictures(work, made, lambda *counts: reports.append(counts))
    assert {
        path.name: path.stat().st_mtime_ns for path in made.glob("shard-*.npy")
    } == before and set(reports) == {(12, 12)}


def test_fixed_samples_are_one_draw_of_the_moments(work: EncodingJob, made: Path, tmp_path: Path):
    encode_pictures(replace(work, latents="fixed"), tmp_path, quiet)
    fixed, moments = (
        np.concatenate([np.load(folder / f"shard-{number:05d}.npy") for number in range(3)])
        for folder in (tmp_path, made)
    )
    assert fixed.shape == (12, 2, 4, 8, 8)
    noise = (fixed / SCALE - moments[:, :, :4]) / moments[:, :, 4:]
    assert (
        abs(noise.mean()) < 0.04
        and abs(noise.std() - 1) < 0.03
        and abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.06
    )
    found = LatentSet(tmp_path, declared(work.vae, latents="fixed"))
    visits = torch.stack(
        [found.take(torch.tensor([3]), 0, torch.tensor([position]))[0][0] for position in range(40)]
    )
    assert {tuple(visit.flatten().tolist()) for visit in visits} == {
        tuple(row.ravel().tolist()) for row in fixed[3]
    }


def test_moments_are_drawn_anew_and_flips_are_half(work: EncodingJob, made: Path):
    found, visits = LatentSet(made, declared(work.vae)), 400
    latents, labels = found.take(torch.full((visits,), 6), 3, torch.arange(visits))
    assert labels.tolist() == [1] * visits and len(latents.unique(dim=0)) == visits
    stored = torch.from_numpy(np.load(made / "shard-00001.npy")[1])
    noise = (latents[:, None] / SCALE - stored[:, :4]) / stored[:, 4:]
    flipped = noise.flatten(2).var(-1).argmin(1)
    assert 150 < flipped.sum() < 250
    noise = noise[torch.arange(visits), flipped].double()
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02
    assert noise.mean(0).abs().max() < 0.3 and abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_without_flips_the_picture_itself_is_seen(work: EncodingJob, made: Path):
    found = LatentSet(made, declared(work.vae, flip=False))
    latents = found.take(torch.full((200,), 6), 3, torch.arange(200))[0]
    mean, deviation = np.split(np.load(made / "shard-00001.npy")[1, 0], 2)
    assert ((latents.mean(0).numpy() / SCALE - mean) / deviation).std() < 0.1


@pytest.mark.parametrize("batch, shares, workers", [(4, 1, 1), (4, 2, 2), (12, 3, 4)])
def test_any_batch_share_and_worker_sees_the_same_sequence(
    work: EncodingJob, made: Path, batch: int, shares: int, workers: int
):
    found = LatentSet(made, declared(work.vae))
    whole = found.take(
        torch.cat([batch_indices(12, 8, 5, step) for step in range(3)]), 5, torch.arange(24)
    )
    parts = []
    for rank in range(shares):
        part = slice(rank * batch // shares, (rank + 1) * batch // shares)
        parts.append(
            list(
                iterate_batches(
                    found, batch, 5, range(24 // batch), torch.device("cpu"), part, workers
                )
            )
        )
    for kind in (0, 1):
        seen = torch.cat(
            [torch.cat([steps[step][kind] for steps in parts]) for step in range(24 // batch)]
        )
        assert torch.equal(seen, whole[kind])


def test_another_seed_sees_other_noise(work: EncodingJob, made: Path):
    found, at = LatentSet(made, declared(work.vae)), torch.arange(12)
    assert not torch.equal(found.take(at, 0, at)[0], found.take(at, 1, at)[0])


def test_the_set_is_found_by_its_manifest(
    work: EncodingJob, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    shutil.copytree(made, tmp_path / "tiny")
    found = load_data(declared(work.vae))
    assert isinstance(found, LatentSet) and len(found) == 12 and not found.flip
    assert (
        found.identity["vae"]["weights"] == work.vae.weights
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
    options: dict, words: str, work: EncodingJob, made: Path
):
    with pytest.raises(ValueError, match=words) as failure:
        LatentSet(made, declared(work.vae, **options))
    assert "\n" not in str(failure.value)


def test_damaged_folders_are_refused_in_a_line(work: EncodingJob, made: Path, tmp_path: Path):
    folder = tmp_path / "cut"
    shutil.copytree(made, folder)
    whole = (folder / "shard-00002.npy").read_bytes()
    for damaged in (whole[:200], b"", b"no array at all", (folder / "labels.npy").read_bytes()):
        (folder / "shard-00002.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="shard-00002"):
            LatentSet(folder, declared(work.vae))
    for text in ("{}", "[]", "", '{"latents": 3'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json cannot be read"):
            read_manifest(folder, declared(work.vae))


@pytest.mark.parametrize("change", ["vae", "size", "pictures", "shard", "latents"])
def test_a_folder_is_not_filled_with_something_else(
    change: str, work: EncodingJob, made: Path, tmp_path: Path
):
    other = {
        "vae": lambda: replace(
            work, vae=load_autoencoder(str(write_vae(tmp_path / "vae", seed=1)))
        ),
        "size": lambda: replace(work, size=72),
        "pictures": lambda: replace(
            work, pictures=find_pictures(write_pictures(tmp_path / "other", each=3), 3)
        ),
        "shard": lambda: replace(work, shard=6),
        "latents": lambda: replace(work, latents="fixed"),
    }[change]()
    with pytest.raises(ValueError, match="is being filled otherwise: ") as failure:
        encode_pictures(other, made, quiet)
    assert "\n" not in str(failure.value)


def test_a_damaged_picture_stops_the_run_or_is_counted(
    work: EncodingJob, pictures: Path, tmp_path: Path
):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    (root / "n01" / "1.JPEG").write_bytes(b"\xff\xd8 no picture")
    damaged = replace(work, pictures=find_pictures(root, 3))
    with pytest.raises(
        ValueError, match=r"n01/1\.JPEG cannot be decoded: .*--corrupt skip"
    ) as failure:
        encode_pictures(damaged, tmp_path / "latents", quiet)
    assert (
        "\n" not in str(failure.value) and not (tmp_path / "latents" / "shard-00001.json").exists()
    )
    manifest = encode_pictures(replace(damaged, skip=True), tmp_path / "latents", quiet)
    assert (
        list(manifest["skipped"]) == ["n01/1.JPEG"]
        and manifest["num_images"] == 11
        and manifest["shards"] == [5, 4, 2]
    )
    found = LatentSet(tmp_path / "latents", declared(work.vae))
    assert found.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    for path in (root / "n01").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no image of n01 could be decoded"):
        encode_pictures(replace(damaged, skip=True), tmp_path / "none", quiet)


def test_the_trainer_sees_the_set_as_it_is_drawn(
    work: EncodingJob, made: Path, monkeypatch: pytest.MonkeyPatch
):
    found, seen, losses = LatentSet(made, declared(work.vae)), [], IDDPM.losses
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


def test_the_command_prepares_a_protocol_and_goes_on(
    work: EncodingJob,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    protocol = replace(IMAGENET256, data=declared(work.vae))
    monkeypatch.setattr(prepare_latents, "LATENT_PROTOCOLS", {"imagenet256": protocol})
    vae, pictures = write_vae(tmp_path / "vae"), str(work.pictures.root)
    monkeypatch.setattr(
        sys,
        "argv",
        f"prepare --protocol imagenet256 --images {pictures} --vae {vae} --out {tmp_path / 'out'} --shard 5 --device cpu".split(),
    )
    assert prepare_latents.main() == 0
    printed = capsys.readouterr()
    assert (
        "12 images in 3 shards, 0 skipped; converted to RGB: 1 CMYK, 1 L\n" in printed.out
        and "differ from sd-vae-ft's" in printed.out
    )
    assert (
        "5 of 12 images, " in printed.err
        and printed.err.count(" left") == 3
        and work.vae.encoder in printed.err
    )
    for number in range(3):
        assert (tmp_path / "out" / f"shard-{number:05d}.npy").read_bytes() == (
            made / f"shard-{number:05d}.npy"
        ).read_bytes()
    assert prepare_latents.main() == 0 and " left" not in capsys.readouterr().err
    older = tmp_path / "out" / "shard-00001.json"
    older.write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads(older.read_text()).items()
                if key != "converted"
            }
        )
    )
    assert (
        prepare_latents.main() == 0
        and "converted to RGB: unknown, older shards do not say" in capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--shard", "6"])
    assert prepare_latents.main() == 2
    assert (
        capsys.readouterr().err.startswith("error: ")
        and json.loads((tmp_path / "out" / "manifest.json").read_text())["num_images"] == 12
    )


def test_published_statistics_are_expected_within_the_tolerance():
    mean, deviation = np.array(shards.MEAN), np.array(shards.DEVIATION)
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


def test_a_published_name_with_other_statistics_is_refused(work: EncodingJob, tmp_path: Path):
    impostor = Autoencoder(work.vae.vae, "sd-vae-ft-ema", work.vae.device, 1)
    with pytest.raises(ValueError, match="not what their names say"):
        encode_pictures(replace(work, vae=impostor), tmp_path, quiet)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_seen_before_the_work(
    work: EncodingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        shards.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(ValueError, match="the disk has 0.0 GB free"):
        encode_pictures(work, tmp_path, quiet)


def test_a_vae_that_cannot_be_fetched_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError) as failure:
        load_autoencoder("sd-vae-ft-ema")
    assert (
        str(failure.value)
        == "VAE sd-vae-ft-ema cannot be loaded; give --vae a folder with its config.json and diffusion_pytorch_model.safetensors (no network)"
    )


def test_decoding_does_not_depend_on_how_many_are_asked_for(work: EncodingJob):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = work.vae.decode(latents)
    assert images.shape == (5, 3, 64, 64) and torch.equal(images[3:], work.vae.decode(latents[3:]))
    with torch.no_grad():
        direct = work.vae.vae.decode(latents / 0.18215).sample
    assert (images - direct).abs().max() < 1e-5 * direct.abs().max()


@pytest.mark.parametrize(
    "what, words",
    [
        ("nowhere", "is neither sd-vae-ft-ema nor sd-vae-ft-mse nor a folder"),
        ("weights", "cannot be loaded"),
        ("scale", "scales its latents by 0.5"),
        ("size", "makes 4 channels of 4 pixels"),
    ],
)
def test_a_vae_that_will_not_do_is_refused_in_a_line(what: str, words: str, tmp_path: Path):
    if what != "nowhere":
        write_vae(
            tmp_path / "vae",
            **{"scale": dict(scaling_factor=0.5), "size": dict(block_out_channels=(4, 4, 8))}.get(
                what, {}
            ),
        )
    if what == "weights":
        (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=words) as failure:
        load_autoencoder(str(tmp_path / "vae"))
    assert "\n" not in str(failure.value)
