"""The judge of CIFAR-10: its file, its features, and the images that it is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.engine.data.sets import ImageSet
from experiments.engine.judges import cifar
from experiments.engine.specs.spec import Data

PIXELS = Data("cifar10", size=32, channels=3, num_classes=10)


def image_set(num: int) -> ImageSet:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (num, 3, 32, 32), dtype=np.uint8)
    return ImageSet(images, np.arange(num) % 10, PIXELS)


def test_weights_survive_their_file_as_half_precision(tmp_path: Path):
    torch.manual_seed(0)
    network = cifar.ResidualClassifier().eval()
    path = tmp_path / "judge.safetensors"
    path.write_bytes(cifar.save_judge(network))
    loaded, sha256 = cifar.load_judge(path)

    assert path.stat().st_size < 1_000_000
    assert len(sha256) == 64
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name].half().to(tensor.dtype)), name


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "weights are missing"),
        (b"", "does not hold the CIFAR-10 judge's weights"),
        (b"not weights at all", "does not hold the CIFAR-10 judge's weights"),
        ("another", "does not hold the CIFAR-10 judge's weights"),
    ],
    ids=["missing", "empty", "text", "another network"],
)
def test_a_file_that_is_no_judge_is_refused(tmp_path: Path, content, message: str):
    path = tmp_path / "judge.safetensors"
    if content == "another":
        content = cifar.save_judge(torch.nn.Linear(2, 3))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        cifar.load_judge(path)
    assert "\n" not in str(refusal.value)


def test_features_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network = cifar.ResidualClassifier().eval()
    x, _ = image_set(5).take(torch.arange(5))
    features, logits = network(x)
    assert features.shape == (5, 128)
    assert logits.shape == (5, 10)
    alone, _ = network(x[2:3])
    assert torch.allclose(features[2:3], alone, atol=1e-5)


def test_an_augmented_image_is_a_shift_of_itself_or_of_its_mirror():
    x, _ = image_set(16).take(torch.arange(16))
    padded = torch.nn.functional.pad(x, (cifar.SHIFT,) * 4, mode="reflect")
    augmented = cifar._augment(x, torch.Generator().manual_seed(1))

    mirrored = 0
    for image, source in zip(augmented, padded, strict=True):
        places = [(r, c) for r in range(2 * cifar.SHIFT + 1) for c in range(2 * cifar.SHIFT + 1)]
        windows = [source[:, r : r + 32, c : c + 32] for r, c in places]
        plain = any(torch.equal(image, window) for window in windows)
        flipped = any(torch.equal(image, window.flip(-1)) for window in windows)
        assert plain != flipped
        mirrored += flipped
    assert 0 < mirrored < 16


def test_a_judge_learns_and_its_rate_ends_at_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cifar, "EPOCHS", 2)
    monkeypatch.setattr(cifar, "BATCH", 8)
    losses = [loss for _, loss, _ in cifar.train_judge(image_set(16))]
    again = [loss for _, loss, _ in cifar.train_judge(image_set(16))]
    assert losses == again
    assert cifar._lr_at(cifar.WARMUP) == cifar.PEAK_LR
    assert cifar._lr_at(1.0) == 0.0


def test_the_committed_judge_is_small_and_whole():
    network, sha256 = cifar.load_judge()
    assert sha256 == "e97f0a9c337b47fad76512d1b2e7d905004d8c2f63656a2b09401780c89a8ae7"
    assert cifar.JUDGE_WEIGHTS.stat().st_size < 1_000_000
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
