"""The VAE: what it decodes, and what is refused in one line."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.engine.data.autoencoder import PUBLISHED, identify_vae, load_autoencoder
from experiments.engine.data.encode import EncodingJob
from experiments.engine.sampling.networks import decoder_warnings
from experiments.engine.specs.spec import Data
from tests.support.latent_sets import write_vae


def test_a_vae_that_cannot_be_fetched_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError) as failure:
        load_autoencoder("sd-vae-ft-ema")
    assert (
        str(failure.value)
        == "VAE sd-vae-ft-ema cannot be loaded; name a folder with its config.json and "
        "diffusion_pytorch_model.safetensors (--vae, or $DICO_VAE) (no network)"
    )


def test_decoding_does_not_depend_on_how_many_are_asked_for(job: EncodingJob):
    codes = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = job.vae.decode(codes)
    assert images.shape == (5, 3, 64, 64) and torch.equal(images[3:], job.vae.decode(codes[3:]))
    with torch.no_grad():
        direct = job.vae.vae.decode(codes / 0.18215).sample
    assert (images - direct).abs().max() < 1e-5 * direct.abs().max()


@pytest.mark.parametrize(
    "what, words",
    [
        ("nowhere", "is neither sd-vae-ft-ema nor sd-vae-ft-mse nor a folder"),
        ("weights", r"/diffusion_pytorch_model\.safetensors: damaged or cut short"),
        ("config", r"/config\.json: no JSON"),
        ("no weights", "lacks diffusion_pytorch_model.safetensors"),
        ("no config", r"lacks config\.json"),
    ],
)
def test_a_vae_that_will_not_do_is_refused_in_a_line(what: str, words: str, tmp_path: Path):
    """A folder that is missing, damaged or of another network is named."""
    if what != "nowhere":
        write_vae(tmp_path / "vae")

    # Cut or remove one of its two files.
    config = tmp_path / "vae" / "config.json"
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    if what in ("weights", "config"):
        (weights if what == "weights" else config).write_bytes(b"cut")
    if what.startswith("no "):
        (weights if what == "no weights" else config).unlink()
    with pytest.raises(ValueError, match=words) as failure:
        load_autoencoder(str(tmp_path / "vae"))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "listed, source, blob, name",
    [
        (True, "my-vae", "", "sd-vae-ft-mse"),
        (True, "sd-vae-ft-ema", "", "sd-vae-ft-mse"),
        (False, "sd-vae-ft-mse", "", "unknown"),
        (False, "folder/sd-vae-ft-ema", "", "unknown"),
        (False, "sd-vae-ft-ema", "other", "unknown"),
        (False, "sd-vae-ft-ema", "digest", "sd-vae-ft-ema"),
        (False, "sd-vae-ft-mse", "digest", "unknown"),
    ],
)
def test_a_vae_is_known_by_its_hash(
    listed: bool, source: str, blob: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file of the hub's cache is a link to one that bears its digest as its name."""
    digest = hashlib.sha256(b"weights").hexdigest()
    if listed:
        publication = replace(PUBLISHED["sd-vae-ft-mse"], sha256=digest)
        monkeypatch.setitem(PUBLISHED, "sd-vae-ft-mse", publication)
    kept = tmp_path / (digest if blob == "digest" else "blob")
    kept.write_bytes(b"weights")
    link = tmp_path / "diffusion_pytorch_model.safetensors"
    link.symlink_to(kept)
    assert identify_vae(link, source) == name


@pytest.mark.parametrize("folder", ["my-vae", "sd-vae-ft-ema", "sd-vae-ft-mse"])
def test_a_folder_s_name_makes_no_vae_known(folder: str, tmp_path: Path):
    assert load_autoencoder(str(write_vae(tmp_path / folder))).name == "unknown"


@pytest.mark.parametrize(
    "dtype, words",
    [
        (torch.float32, ""),
        (torch.float64, ""),
        (torch.bfloat16, "are stored in bf16: they are rounded"),
        (torch.float16, "are stored in fp16: they are rounded"),
        (torch.float8_e4m3fn, "are stored in fp8"),
        (torch.int8, "stored as torch.int8, which is no floating-point type"),
        (torch.bool, "stored as torch.bool, which is no floating-point type"),
    ],
)
def test_rounded_weights_are_warned_of_and_recorded(
    dtype: torch.dtype, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_vae(tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    stored = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(stored, path, {"format": "pt"})
    if not dtype.is_floating_point:
        with pytest.raises(ValueError, match=words) as failure:
            load_autoencoder(str(tmp_path / "vae"))
        assert "\n" not in str(failure.value)
        return

    # What is made with the VAE says so too: the samples, and the scores on them.
    vae = load_autoencoder(str(tmp_path / "vae"))
    assert words in capsys.readouterr().err
    assert [words in text for text in vae.warnings] == ([True] if words else [])
    identity = {"name": "unknown", "sha256": vae.weights}
    if vae.warnings:
        identity["warnings"] = list(vae.warnings)
    data = Data("latents", size=8, channels=4, num_classes=3, vae=vae.encoder)
    assert decoder_warnings(data, identity) == list(vae.warnings)
