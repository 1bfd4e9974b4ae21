"""A tiny set of latents that the tests of this folder share; nobody changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.engine.data.autoencoder import Autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.pictures import find_pictures
from tests.support.latent_sets import ignore_progress, small_vae, write_pictures


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    pytest.importorskip("diffusers")
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of four pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def job(vae: Autoencoder, pictures: Path) -> EncodingJob:
    """Moments of 64-pixel crops in shards of five pictures."""
    return EncodingJob(find_pictures(pictures, 3), vae, 64, shard=5)


@pytest.fixture(scope="session")
def latents(job: EncodingJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the job fills."""
    folder = tmp_path_factory.mktemp("latents")
    encode_pictures(job, folder, ignore_progress)
    return folder
