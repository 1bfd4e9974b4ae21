"""Latents are decoded by the VAE that encoded them, or by a known one, or with a warning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.declared.protocols import DIGITS
from experiments.engine.data import locate
from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.quantise import to_uint8
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling.generate import generate_images
from experiments.engine.sampling.networks import decoder_warnings, load_decoder
from experiments.engine.sampling.samples import generate_samples
from experiments.engine.specs.spec import Checkpoint, Data, Evaluate
from experiments.engine.training.networks import build
from tests.support.sampling import CPU, SPEC, TINY, levels_of

LATENTS = Data("latents", size=8, channels=4, num_classes=10)


@pytest.fixture
def vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small VAE, which $DICO_VAE names."""
    pytest.importorskip("diffusers")
    from tests.support.latent_sets import write_vae

    folder = write_vae(tmp_path / "vae")
    monkeypatch.setenv("DICO_VAE", str(folder))
    return folder


# ---- Samples


@pytest.fixture
def spec() -> Evaluate:
    """Six images of a checkpoint that makes latents."""
    backbone = TINY.but(in_channels=4)
    return replace(SPEC, train=Checkpoint(backbone, LATENTS, "0" * 64), num=6)


@pytest.fixture
def context(spec: Evaluate, tmp_path: Path) -> RunContext:
    """A run that finds the weights of `spec`."""
    torch.save(build(spec.train.backbone, 0, CPU).state_dict(), tmp_path / "a.pt")
    resources = Resources(checkpoint=tmp_path / "a.pt", sample_batch=4)
    return RunContext(tmp_path / "runs" / "x", resources)


def test_latents_are_decoded_by_the_declared_vae(vae: Path, spec: Evaluate, context: RunContext):
    drawn = generate_samples(spec, context)
    autoencoder = load_autoencoder(str(vae))
    assert drawn.shape == (6, 8 * autoencoder.factor, 8 * autoencoder.factor, 3)
    assert drawn.origin["decoder"]["sha256"] == autoencoder.weights

    # Rounding may differ by a level.
    network = build(spec.train.backbone, 0, CPU).eval()
    latents = torch.cat([x for x, _ in generate_images(spec, network, CPU, 4)])
    expected = to_uint8(autoencoder.decode(latents)).permute(0, 2, 3, 1).numpy()
    off = np.abs(levels_of(drawn).astype(int) - expected[drawn.index])
    assert off.max() <= 1


def test_a_set_is_not_continued_by_another_vae(
    vae: Path,
    spec: Evaluate,
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from tests.support.latent_sets import write_vae

    generate_samples(spec, context)
    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="another decoder"):
        generate_samples(spec, context)


def test_latents_that_declare_another_vae_are_refused(
    vae: Path, spec: Evaluate, context: RunContext
):
    foreign = replace(spec, train=replace(spec.train, data=replace(LATENTS, vae="0" * 16)))
    with pytest.raises(ValueError, match="latents of another VAE"):
        generate_samples(foreign, context)


# ---- Warnings and manifests


def write_manifest(folder: Path, encoder: str) -> None:
    """Write the manifest of a set of latents that this encoder made."""
    folder.mkdir()
    manifest = {
        "latents": "moments",
        "shape": [2, 8, 8, 8],
        "num_classes": 10,
        "statistics": {"as_expected": True},
        "vae": {"name": "x", "encoder": encoder},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_unknown_vae_is_warned_of_unless_something_names_it(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    decoder = load_decoder(LATENTS, CPU).identity
    (warning,) = decoder_warnings(LATENTS, decoder)
    assert "not known to be sd-vae-ft-ema or sd-vae-ft-mse" in warning
    assert decoder["sha256"] in warning

    # A known VAE, a declared one, and pixels need no warning.
    assert not decoder_warnings(LATENTS, decoder | {"name": "sd-vae-ft-mse"})
    assert not decoder_warnings(replace(LATENTS, vae="0" * 16), decoder)
    assert not decoder_warnings(DIGITS.data, {})


def test_latents_are_decoded_by_the_vae_that_their_manifest_names(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    decoder = load_decoder(LATENTS, CPU).identity
    write_manifest(tmp_path / "latents", load_autoencoder(str(vae)).encoder)
    assert not decoder_warnings(LATENTS, decoder)
    load_decoder(LATENTS, CPU)


def test_another_vae_than_that_of_the_manifest_is_refused(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    decoder = load_decoder(LATENTS, CPU).identity
    write_manifest(tmp_path / "latents", "0" * 16)

    # The refusal says more than a warning would, so there is none.
    assert not decoder_warnings(LATENTS, decoder)
    encoder = load_autoencoder(str(vae)).encoder
    complaint = (
        f"set latents holds latents of another VAE .encoder {'0' * 16}. than .DICO_VAE "
        f"names .vae, encoder {encoder}"
    )
    with pytest.raises(ValueError, match=complaint):
        load_decoder(LATENTS, CPU)
