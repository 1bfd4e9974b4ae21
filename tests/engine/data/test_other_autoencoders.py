"""Latents of any AutoencoderKL and of VA-VAE: their space, their decoder, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import backbones
from experiments import prepare
from experiments.engine.data import locate
from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.autoencoders import vavae
from experiments.engine.data.latents import LatentSet
from experiments.engine.data.locate import own_data
from experiments.engine.data.sets import load
from experiments.engine.sampling.networks import load_decoder
from experiments.engine.specs.latent_space import SD_SPACE, LatentSpace
from experiments.engine.specs.spec import Data, is_latent, spec_id
from tests.support.latent_sets import write_pictures, write_vae
from tests.support.networks import randomise

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY_VAVAE = dict(channels=6, dim=32, multipliers=(1, 1, 1), res_blocks=1)
FLUX = dict(
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
# Options of diffusers' class, with the space that they declare.
KINDS: dict[str, tuple[dict[str, Any], LatentSpace]] = {
    "sdxl": (dict(scaling_factor=0.13025), LatentSpace((0.13025,))),
    "flux": (FLUX, LatentSpace((0.3611,), (0.1159,))),
    "half the factor": (
        dict(scaling_factor=0.5, block_out_channels=(4, 4, 8)),
        LatentSpace((0.5,), factor=4),
    ),
    "by channel": (
        dict(
            scaling_factor=2.0, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0]
        ),
        LatentSpace((2.0, 1.0, 0.5, 0.25), (0.0, 1.0, 2.0, 3.0)),
    ),
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", each=2, classes=2)


def prepared(
    pictures: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, *options: object
) -> tuple[int, Path]:
    """Prepare a set of one's own at 32 pixels by the command; return its status and the folder."""
    out = vae.with_name("latents")
    words = ["latents", "--size", 32, "--classes", 2, "--images", pictures, "--out", out]
    words += ["--vae", vae, "--device", "cpu", "--workers", 1, *options]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, words)])
    monkeypatch.setenv("DICO_VAE", str(vae))
    return prepare.main(), out


def seen(folder: Path, data: Data) -> Tensor:
    """What a network sees of the first image, with the posterior's noise taken away."""
    images = load(data)
    assert isinstance(images, LatentSet)
    images.shards = [shard.copy() for shard in images.shards]
    for shard in images.shards:
        shard[:, :, data.channels :] = 0
    return images.take(torch.tensor([0]), 0, torch.tensor([0]))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_seen_in_the_space_of_its_config(
    kind: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    options, space = KINDS[kind]
    folder = write_vae(tmp_path / "vae", **options)
    status, out = prepared(pictures, folder, monkeypatch)
    assert status == 0, capsys.readouterr().err
    data = own_data(out)
    channels = options.get("latent_channels", 4)
    assert (data.channels, data.size, data.space) == (channels, 32 // space.factor, space)
    assert is_latent(data)

    # diffusers' own arithmetic, from the means that are stored.
    mean = np.load(out / "shard-00000.npy")[:1, 0, :channels]
    scale, shift = (
        np.reshape(np.array(part, np.float32), (-1, 1, 1)) for part in (space.scale, space.shift)
    )
    latents = seen(out, data)
    np.testing.assert_allclose(latents.numpy(), (mean - shift) * scale, rtol=1e-5, atol=1e-6)

    # The decoder undoes it.
    decoder = load_decoder(data, CPU)
    with torch.no_grad():
        vae = load_autoencoder(str(folder)).vae
        expected = vae.decode(torch.from_numpy(mean)).sample
    torch.testing.assert_close(decoder.decode(latents), expected, rtol=1e-4, atol=1e-5)
    assert decoder.identity["scale"] == space.describe()["scale"]

    # The manifest says so, with the statistics and what the autoencoder reaches.
    manifest = json.loads((out / "manifest.json").read_text())
    assert LatentSpace.read(manifest["vae"]) == space
    assert len(manifest["statistics"]["mean"]) == channels
    reach = json.loads((out / "reconstruction.json").read_text())
    assert (reach["num_measured"], reach["frechet"]) == (4, None)
    printed = capsys.readouterr().out
    assert f"reconstructions of 4 pictures: PSNR {reach['psnr']['mean']:.2f}" in printed


def write_vavae(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, backbones.vavae.VAVAE]:
    """Write the file of a tiny VA-VAE, which stands for the published network."""
    monkeypatch.setattr(vavae, "OPTIONS", TINY_VAVAE)
    torch.manual_seed(0)
    network = randomise(backbones.build("vavae_f16d32", **TINY_VAVAE)).eval()
    torch.save({"state_dict": network.state_dict()}, path)
    return path, network


def test_latents_of_va_vae_are_normalised_by_the_statistics_of_their_set(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, network = write_vavae(tmp_path / "vavae.pt", monkeypatch)
    status, out = prepared(pictures, file, monkeypatch, "--reconstructions", 0)
    assert status == 0
    data = own_data(out)
    assert (data.channels, data.size) == (6, 8)
    assert data.space is not None and data.space.factor == 4

    # Over the set with its flips and the posteriors' noise, every channel has mean 0, deviation 1.
    mean, deviation = np.split(np.load(out / "shard-00000.npy").astype(float), 2, axis=2)
    scale, shift = (np.reshape(part, (-1, 1, 1)) for part in (data.space.scale, data.space.shift))
    first = ((mean - shift) * scale).mean((0, 1, 3, 4))
    second = (((mean - shift) ** 2 + deviation**2) * scale**2).mean((0, 1, 3, 4))
    np.testing.assert_allclose(first, 0, atol=1e-6)
    np.testing.assert_allclose(second, 1, rtol=1e-5)

    # The network decodes what it has encoded.
    latents = seen(out, data)
    with torch.no_grad():
        expected = network.decode(torch.from_numpy(mean[:1, 0]).float())
    images = load_decoder(data, CPU).decode(latents)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert not (out / "reconstruction.json").exists()


def test_the_space_names_a_set_and_stable_diffusions_is_not_said():
    data = Data("own", 32, 4, 10)
    assert spec_id(replace(data, space=None)) == spec_id(data)
    spaces = (None, *(space for _, space in KINDS.values()))
    assert len({spec_id(replace(data, space=space)) for space in spaces}) == len(spaces)
    assert SD_SPACE.describe() == {"scale": 0.18215}
    for space in (SD_SPACE, *(space for _, space in KINDS.values())):
        assert LatentSpace.read(json.loads(json.dumps(space.describe()))) == space


# ---- What is refused


def drop(folder: Path, field: str) -> None:
    """Remove a field from a VAE's config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["latent_channels", "block_out_channels", "scaling_factor"])
def test_a_missing_config_field_is_named(field: str, tmp_path: Path):
    folder = write_vae(tmp_path / "vae")
    drop(folder, field)
    with pytest.raises(ValueError, match=rf"config\.json lacks {field}; add what") as failure:
        load_autoencoder(str(folder))
    assert "\n" not in str(failure.value)


def test_a_config_from_before_these_fields_is_stable_diffusions(tmp_path: Path):
    folder = write_vae(tmp_path / "vae")
    for field in ("scaling_factor", "shift_factor", "force_upcast"):
        drop(folder, field)
    assert load_autoencoder(str(folder)).space == SD_SPACE


def test_one_autoencoder_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_vae(tmp_path / "vae")
    file, network = write_vavae(tmp_path / "vavae.pt", monkeypatch)
    save_file(load_file(folder / WEIGHTS), tmp_path / "sd.safetensors")

    # A file is read as VA-VAE, and a folder as diffusers' network.
    with pytest.raises(ValueError, match="latent channels, and not of this VA-VAE with 6; a file"):
        load_autoencoder(str(tmp_path / "sd.safetensors"))
    save_file(network.state_dict(), folder / WEIGHTS)
    with pytest.raises(ValueError, match="VAE .*: its weights are those of another auto|cannot be"):
        load_autoencoder(str(folder))
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "VQModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is that of VQModel; only AutoencoderKL"):
        load_autoencoder(str(folder))


def test_latents_of_another_shape_or_scale_are_refused(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # A protocol's latents are Stable Diffusion's.
    folder = write_vae(tmp_path / "vae", **FLUX)
    monkeypatch.setattr(
        prepare, "LATENT_PROTOCOLS", {"imagenet256": prepare.PROTOCOLS["imagenet256"]}
    )
    monkeypatch.setattr("experiments.engine.data.pictures.find_pictures", lambda *_: _NoPictures())
    words = ["latents", "--protocol", "imagenet256", "--images", pictures, "--vae", folder]
    words += ["--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, words)])
    assert prepare.main() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "makes latents of 16 channels with scale 0.3611 after a shift by 0.1159" in error
    assert "set imagenet256 needs 4 channels with scale 0.18215, 8 pixels a side" in error
    assert not (tmp_path / "out").exists()

    # Neither does it decode them, nor those of another space.
    monkeypatch.setenv("DICO_VAE", str(folder))
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    for data in (Data("imagenet256", 4, 4, 2), Data("own", 4, 16, 2, space=LatentSpace((1.0,)))):
        with pytest.raises(ValueError, match="makes latents of 16 channels"):
            load_decoder(data, CPU)


class _NoPictures:
    """A listing of no pictures."""

    classes: tuple[str, ...] = ()
    left_out: dict[str, int] = {}
    files: tuple[str, ...] = ()


def test_fixed_samples_of_va_vae_are_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from experiments.engine.data.encode import EncodingJob, encode_pictures
    from experiments.engine.data.pictures import find_pictures

    file, _ = write_vavae(tmp_path / "vavae.pt", monkeypatch)
    job = EncodingJob(find_pictures(pictures, 2), load_autoencoder(str(file)), 32, latents="fixed")
    with pytest.raises(ValueError, match="prepare moments"):
        encode_pictures(job, tmp_path / "out", lambda done, total: None)
    assert not (tmp_path / "out").exists()
