"""Judges that are trained where they are needed: which of them is the same on every processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.engine.data.sets import ImageSet
from experiments.engine.judges import classifiers
from experiments.engine.judges.cells import CellClassifier
from experiments.engine.judges.classifiers import Exam, Lesson, PortableLesson
from experiments.engine.specs.spec import Data

PORTABLE = PortableLesson("portable", CellClassifier, steps=20, batch=16, lr=3e-3, shift=0)
PLAIN = Lesson("plain", CellClassifier, steps=20, batch=16, lr=3e-3, shift=0)


def weights_of(lesson: Lesson, cache: Path) -> dict[str, Tensor]:
    """Return the weights of a judge that is trained on random cells."""
    draw = np.random.default_rng(0)
    images = draw.standard_normal((40, 1, 8, 8)).astype(np.float32)
    cells = ImageSet(images, np.arange(40) % 11, Data("cells", 8, 1, 11))
    order = torch.arange(40)
    network, _ = classifiers.cached_classifier(
        lesson, "random cells", lambda: (cells, order), Exam(cells, order), cache
    )
    return network.state_dict()


def round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round losses as another processor might: up by one step of their precision."""
    cross_entropy = F.cross_entropy

    def rounded_up(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) * (1 + torch.finfo(logits.dtype).eps)

    monkeypatch.setattr(F, "cross_entropy", rounded_up)


@pytest.mark.parametrize("lesson", [PORTABLE, PLAIN], ids=lambda lesson: lesson.name)
def test_another_rounding_leaves_portable_weights_alone(tmp_path, monkeypatch, lesson):
    here = weights_of(lesson, tmp_path / "here")
    round_otherwise(monkeypatch)
    there = weights_of(lesson, tmp_path / "there")

    equal = all(torch.equal(here[name], there[name]) for name in here)
    assert equal == (lesson is PORTABLE)


def test_portable_weights_are_halves_and_nothing_else_is_left_in_double(tmp_path):
    for name, tensor in weights_of(PORTABLE, tmp_path).items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, tensor.half().float()), name
    assert torch.get_default_dtype() == torch.float32


def test_another_noise_makes_another_judge(tmp_path):
    quiet = PortableLesson("portable", CellClassifier, 20, 16, 3e-3, 0, noise=0.0)
    noisy, silent = weights_of(PORTABLE, tmp_path), weights_of(quiet, tmp_path)

    assert not torch.equal(noisy["conv1.weight"], silent["conv1.weight"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
