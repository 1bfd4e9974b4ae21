"""Features of small classifiers, each trained once per machine, deterministically, and cached by content.

Scores on them are named for what they are (`fd_digits`, `fd_cifar_classifier`): they compare with each other, never with an Inception FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.engine.data.cifar10 import file_digest
from experiments.engine.data.locate import find_cifar10, folder_of
from experiments.engine.data.sets import ImageSet, load_data
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.records.files import locked, written_whole
from experiments.engine.specs.spec import Data

HELD_OUT, BATCH = (
    297,
    2000,
)  # digits that the classifier does not see; images whose features are taken at a time


class DigitsClassifier(nn.Module):
    """A small convolutional classifier: (N, 1, 8, 8) -> features (N, 64) and logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))  # (N, 64, 4, 4)
        features = F.relu(self.hidden(x.flatten(1)))  # (N, 64)
        return features, self.head(features)


class CifarClassifier(nn.Module):
    """Three normalised convolutions, averaged over places: (N, 3, 32, 32) -> features (N, 64) and logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(given, made, 3, stride=2, padding=1, bias=False)
            for given, made in ((3, 48), (48, 96), (96, 160))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in (48, 96, 160))
        self.hidden = nn.Linear(160, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))  # (N, 48, 16, 16), (N, 96, 8, 8), (N, 160, 4, 4)
        features = F.relu(self.hidden(x.mean((2, 3))))  # (N, 64)
        return features, self.head(features)


@dataclass(frozen=True)
class Lesson:
    """How a classifier is trained: Adam with cosine decay, shifts by up to `shift` pixels, and with `flip` mirrored halves of each batch."""

    name: str
    network: type[nn.Module]
    steps: int
    batch: int
    lr: float
    shift: int
    flip: bool = False


DIGITS = Lesson("digits", DigitsClassifier, steps=600, batch=128, lr=3e-3, shift=1)
CIFAR = Lesson("cifar", CifarClassifier, steps=2500, batch=128, lr=3e-3, shift=2, flip=True)


def digits_classifier(images: ImageSet, cache: Path) -> tuple[nn.Module, dict[str, float | str]]:
    """The classifier of the digits, and what identifies it: its accuracy on images held out and the SHA-256 of its weights."""
    order = torch.randperm(len(images), generator=generator_at("digits split"))
    content = hashlib.sha256(
        images.images.tobytes() + images.labels.tobytes() + str(HELD_OUT).encode()
    ).hexdigest()
    return _classifier(
        DIGITS, content, lambda: (images, order[HELD_OUT:]), images, order[:HELD_OUT], cache
    )


def cifar_classifier(
    data: Data, test: ImageSet, cache: Path
) -> tuple[nn.Module, dict[str, float | str]]:
    """The classifier of CIFAR-10's training images, with its accuracy on the test images."""

    def training() -> tuple[ImageSet, Tensor]:
        images = load_data(data)
        return images, torch.arange(len(images))

    return _classifier(
        CIFAR,
        file_digest(find_cifar10(folder_of(data), "train")),
        training,
        test,
        torch.arange(len(test)),
        cache,
    )


def _classifier(
    lesson: Lesson,
    content: str,
    training: Callable[[], tuple[ImageSet, Tensor]],
    tested: ImageSet,
    held_out: Tensor,
    cache: Path,
) -> tuple[nn.Module, dict[str, float | str]]:
    """The cache is keyed by the training data (`content`), the lesson and the torch version, so nothing stale is ever read."""
    from safetensors.torch import load_file, save

    key = hashlib.sha256(
        repr((content, lesson, str(lesson.network()), torch.__version__)).encode()
    ).hexdigest()[:16]
    path = cache / f"{lesson.name}-{key}.safetensors"
    with locked(cache / f"{lesson.name}.lock"):
        if not path.exists():
            weights = save(_train(lesson, *training()).state_dict())
            with written_whole(path) as file:
                file.write(weights)
    model = lesson.network().eval()
    model.load_state_dict(load_file(path))
    x, y = tested.take(held_out)
    accuracy = (extract(model, x)[1].argmax(1) == y.numpy()).mean().item()
    return model, {
        "classifier_accuracy": accuracy,
        "classifier_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    }


def _train(lesson: Lesson, images: ImageSet, chosen: Tensor) -> nn.Module:
    """On one thread, so that every run gives the same bits."""
    threads, margin = torch.get_num_threads(), (lesson.shift,) * 4
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at(f"{lesson.name} classifier"))
            model = lesson.network()
        optimizer = torch.optim.Adam(model.parameters(), lesson.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lesson.steps)
        for step in range(lesson.steps):
            draw = generator_at(f"{lesson.name} batch", step)
            x, y = images.take(chosen[torch.randint(len(chosen), (lesson.batch,), generator=draw)])
            row, column = torch.randint(2 * lesson.shift + 1, (2,), generator=draw).tolist()
            x = F.pad(x, margin, value=-1.0)[
                :, :, row : row + x.shape[2], column : column + x.shape[3]
            ]
            if lesson.flip:
                x = torch.cat([x[: len(x) // 2].flip(-1), x[len(x) // 2 :]])
            loss = F.cross_entropy(model(x)[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model


@torch.inference_mode()
def extract(model: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and class probabilities (N, 10), float64."""
    features, logits = (
        torch.cat(part) for part in zip(*(model(part) for part in x.split(BATCH)), strict=True)
    )
    return features.double().numpy(), logits.double().softmax(1).numpy()
