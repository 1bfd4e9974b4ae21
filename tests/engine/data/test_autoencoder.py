"""The VAE: what it decodes, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.encode import EncodingJob
from tests.support.latent_sets import write_vae


def test_a_vae_that_cannot_be_fetched_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError) as failure:
        load_autoencoder("sd-vae-ft-ema")
    assert (
        str(failure.value)
        == "VAE sd-vae-ft-ema cannot be loaded; give --vae a folder with its config.json and "
        "diffusion_pytorch_model.safetensors (no network)"
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
