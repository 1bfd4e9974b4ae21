"""What the tests of the scripts around scores share: a call, sample files and a small extractor."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from backbones import build, tiny_options_of
from experiments.engine.data.image_files import write_images
from experiments.engine.scoring import inception, scores, stage
from experiments.engine.scoring.reference import Layer
from tests.support.extractors import Grey

# The layers of the stand-in for Inception.
NARROW_LAYERS = (Layer("pool", "mu", "sigma", 6), Layer("spatial", "mu_s", "sigma_s", 5))
# Eighty images of 4 x 4 pixels.
IMAGES = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Script:
    """A command script that runs in this process."""

    module: ModuleType
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Return the exit status, the output and the errors."""
        words = [self.module.__name__, *map(str, arguments)]
        self.monkeypatch.setattr(sys, "argv", words)
        status = self.module.main()
        return status, *self.capsys.readouterr()

    def refuse(self, *arguments: object) -> str:
        """Return the one line with which the script refuses its arguments."""
        status, _, error = self.run(*arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error


def use_grey_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scores come from `Grey` instead of Inception, without any weights."""
    monkeypatch.setattr(inception, "load_inception", lambda path, device: Grey())
    monkeypatch.setattr(stage, "load_inception", lambda path, device: Grey())
    monkeypatch.setattr(scores, "POOL", 6)


def write_samples(path: Path, images: np.ndarray, seed: int = 0, order: int = 0) -> Path:
    """Write images as a sampler of this suite does, in an order of their own."""
    index = np.random.default_rng(order).permutation(len(images))
    about = {
        "labels": "random",
        "seed": seed,
        "nfe": 7,
        "sampler": {"kind": "Sampler", "name": "ddim", "scale": 1.5},
    }
    write_images(path, iter([images[index]]), images.shape, index % 8, index, about)
    return path


def write_checkpoint(path: Path) -> Path:
    """Write a tiny network's weights, under the name that the script builds in full size."""
    network = build("dico_s", **tiny_options_of("dico_s"))
    torch.save({"ema": network.state_dict()}, path)
    return path
