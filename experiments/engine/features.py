"""Features for the scores. The digits classifier is trained once per machine, deterministically, and cached by content.

Its scores are named for what they are (`fd_digits`): they compare with each other, never with an Inception FID.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.data import ImageSet
from experiments.engine.files import locked, written_whole
from experiments.engine.randomness import generator_at, seed_at

STEPS, BATCH, LR, HELD_OUT = 600, 128, 3e-3, 297


class DigitsClassifier(nn.Module):
    """A small convolutional classifier: (N, 1, 8, 8) -> features (N, 64) and logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))     # (N, 64, 4, 4)
        features = F.relu(self.hidden(x.flatten(1)))      # (N, 64)
        return features, self.head(features)


def digits_classifier(images: ImageSet, cache: Path) -> tuple[DigitsClassifier, dict[str, float | str]]:
    """The classifier and what identifies it: its held-out accuracy and the SHA-256 of its weights.

    The cache is keyed by the data, this recipe and the torch version, so nothing stale is ever read.
    """
    from safetensors.torch import load_file, save

    content = hashlib.sha256(images.images.tobytes() + images.labels.tobytes())
    content.update(repr((STEPS, BATCH, LR, HELD_OUT, str(DigitsClassifier()), torch.__version__)).encode())
    path = cache / f"digits-{content.hexdigest()[:16]}.safetensors"
    with locked(cache / "digits.lock"):
        if not path.exists():
            weights = save(_train(images).state_dict())
            with written_whole(path) as file:
                file.write(weights)
    model = DigitsClassifier()
    model.load_state_dict(load_file(path))
    x, y = images.take(_split(len(images))[1])
    with torch.inference_mode():
        accuracy = (model(x)[1].argmax(1) == y).double().mean().item()
    return model.eval(), {"classifier_accuracy": accuracy, "classifier_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def _split(size: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(size, generator=generator_at("digits split"))
    return order[HELD_OUT:], order[:HELD_OUT]


def _train(images: ImageSet) -> DigitsClassifier:
    """Adam with cosine decay and shifts by up to one pixel, on one thread so that every run gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at("digits classifier"))
            model = DigitsClassifier()
        optimizer = torch.optim.Adam(model.parameters(), LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        train = _split(len(images))[0]
        for step in range(STEPS):
            draw = generator_at("digits batch", step)
            x, y = images.take(train[torch.randint(len(train), (BATCH,), generator=draw)])
            row, column = torch.randint(3, (2,), generator=draw).tolist()
            x = F.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, row : row + 8, column : column + 8]
            loss = F.cross_entropy(model(x)[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model


@torch.inference_mode()
def extract(model: DigitsClassifier, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and class probabilities (N, 10), float64."""
    features, logits = model(x)
    return features.double().numpy(), logits.double().softmax(1).numpy()
