"""Features of small classifiers, each trained once per machine, deterministically, and cached.

Scores on them are named for what they are (`fd_digits`, `fd_cifar_classifier`): they compare with
each other, never with an Inception FID.
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

import backbones
from experiments.engine.data.cifar10 import file_digest
from experiments.engine.data.locate import find_cifar10, folder_of
from experiments.engine.data.sets import ImageSet, load
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.records.files import locked, written_whole
from experiments.engine.specs.spec import Data

HELD_OUT = 297  # digits that the classifier does not see in training
BATCH = 2000  # images whose features are computed at a time

# What identifies a classifier: its accuracy on images held out, and the SHA-256 of its weights.
# A warning about the stored weights stands beside them.
Identity = dict[str, float | str]


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
    """Three normalised convolutions, averaged over places.

    (N, 3, 32, 32) -> features (N, 64) and logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 48), (48, 96), (96, 160))
        self.convs = nn.ModuleList(
            nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1, bias=False)
            for dim_in, dim_out in widths
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim_out) for _, dim_out in widths)
        self.hidden = nn.Linear(160, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))  # (N, 48, 16, 16), (N, 96, 8, 8), (N, 160, 4, 4)
        features = F.relu(self.hidden(x.mean((2, 3))))  # (N, 64)
        return features, self.head(features)


@dataclass(frozen=True)
class Lesson:
    """How a classifier is trained: by Adam with cosine decay.

    The name of this class, its fields and their order are part of the cache's key.
    """

    name: str
    network: type[nn.Module]
    steps: int
    batch: int
    lr: float
    # Images are shifted by up to this many pixels.
    shift: int
    # Whether half of each batch is mirrored.
    flip: bool = False


@dataclass(frozen=True)
class PortableLesson(Lesson):
    """A lesson on noisy images that gives the same weights on processors that round differently.

    Draws and arithmetic are float64, where other roundings move a weight by far less than a step
    of float16. The trained weights are rounded to float16.
    """

    # Each image's noise has its own deviation, from 0 up to this one.
    noise: float = 0.1


@dataclass(frozen=True)
class Exam:
    """Images on which a trained classifier's accuracy is measured."""

    images: ImageSet
    # Indices of the images, (N,).
    indices: Tensor


DIGITS = Lesson("digits", DigitsClassifier, steps=600, batch=128, lr=3e-3, shift=1)
DIGITS_JUDGE = Lesson("digits judge", DigitsClassifier, steps=600, batch=128, lr=3e-3, shift=1)
CIFAR = Lesson("cifar", CifarClassifier, steps=2500, batch=128, lr=3e-3, shift=2, flip=True)


def digits_classifier(images: ImageSet, cache: Path) -> tuple[nn.Module, Identity]:
    """Return the classifier of the digits, and what identifies it."""
    order = torch.randperm(len(images), generator=generator_at("digits split"))
    content = images.images.tobytes() + images.labels.tobytes() + str(HELD_OUT).encode()
    return cached_classifier(
        DIGITS,
        hashlib.sha256(content).hexdigest(),
        lambda: (images, order[HELD_OUT:]),
        Exam(images, order[:HELD_OUT]),
        cache,
    )


def digits_judge(train: ImageSet, test: ImageSet, cache: Path) -> tuple[nn.Module, Identity]:
    """Return the classifier of the digits' training part, tested on their test part."""
    content = train.images.tobytes() + train.labels.tobytes()
    return cached_classifier(
        DIGITS_JUDGE,
        hashlib.sha256(content).hexdigest(),
        lambda: (train, torch.arange(len(train))),
        Exam(test, torch.arange(len(test))),
        cache,
    )


def cifar_classifier(data: Data, test: ImageSet, cache: Path) -> tuple[nn.Module, Identity]:
    """Return the classifier of CIFAR-10's training images, tested on its test images."""

    def training_images() -> tuple[ImageSet, Tensor]:
        images = load(data)
        assert isinstance(images, ImageSet)
        return images, torch.arange(len(images))

    return cached_classifier(
        CIFAR,
        file_digest(find_cifar10(folder_of(data), "train")),
        training_images,
        Exam(test, torch.arange(len(test))),
        cache,
    )


def cached_classifier(
    lesson: Lesson,
    content: str,
    training_images: Callable[[], tuple[ImageSet, Tensor]],
    exam: Exam,
    cache: Path,
) -> tuple[nn.Module, Identity]:
    """Return a classifier from the cache, or train it and keep it there.

    Args:
        lesson: how the classifier is trained.
        content: digest of the training data.
        training_images: loads the training images and the indices of those to use.
        exam: what the accuracy is measured on.
        cache: folder of the weights. Training data, lesson and torch version name the file, so
            nothing stale is ever read.
    """
    from safetensors.torch import save

    content_of_cache = (content, lesson, str(lesson.network()), torch.__version__)
    key = hashlib.sha256(repr(content_of_cache).encode()).hexdigest()[:16]
    path = cache / f"{lesson.name}-{key}.safetensors"

    # Other processes wait here while one trains.
    with locked(cache / f"{lesson.name}.lock"):
        if not path.exists():
            images, indices = training_images()
            weights = save(_train(lesson, images, indices).state_dict())
            with written_whole(path) as file:
                file.write(weights)

    # The accuracy is that of the stored weights.
    model = lesson.network().eval()
    warnings: list[str] = []
    backbones.load_published(model, path, warn=warnings.append)
    identity: Identity = {
        "classifier_accuracy": accuracy(model, exam.images, exam.indices),
        "classifier_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    }
    if warnings:
        identity["classifier_warning"] = "; ".join(warnings)
    return model, identity


def _train(lesson: Lesson, images: ImageSet, indices: Tensor) -> nn.Module:
    """Train a classifier on one thread, so that every run gives the same bits."""
    portable = isinstance(lesson, PortableLesson)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if portable else torch.float32)
    try:
        # The seed of the initial weights follows from the lesson's name.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at(f"{lesson.name} classifier"))
            model = lesson.network()

        # Each batch follows from the lesson and the step.
        optimizer = torch.optim.Adam(model.parameters(), lesson.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lesson.steps)
        for step in range(lesson.steps):
            x, y = _draw_batch(lesson, images, indices, step)
            loss = F.cross_entropy(model(x)[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)

    return model.half().float() if portable else model


def _draw_batch(
    lesson: Lesson, images: ImageSet, indices: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a step, shifted and mirrored as the lesson says."""
    draw = generator_at(f"{lesson.name} batch", step)
    chosen = indices[torch.randint(len(indices), (lesson.batch,), generator=draw)]
    x, y = images.take(chosen)

    # One shift serves the whole batch.
    height, width = x.shape[2:]
    row, column = torch.randint(2 * lesson.shift + 1, (2,), generator=draw).tolist()
    padded = F.pad(x, (lesson.shift,) * 4, value=-1.0)
    x = padded[:, :, row : row + height, column : column + width]

    if lesson.flip:
        half = len(x) // 2
        x = torch.cat([x[:half].flip(-1), x[half:]])
    if isinstance(lesson, PortableLesson):
        x = x.double()
        deviations = lesson.noise * torch.rand(len(x), 1, 1, 1, generator=draw)
        x = x + deviations * torch.randn(x.shape, generator=draw)
    return x, y


def accuracy(model: nn.Module, images: ImageSet, indices: Tensor | None = None) -> float:
    """Return the share of images, all or those at some indices, whose class is recognised."""
    x, y = images.take(torch.arange(len(images)) if indices is None else indices)
    return float((extract(model, x)[1].argmax(1) == y.numpy()).mean())


@torch.inference_mode()
def extract(model: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, d) and class probabilities (N, C) of images, float64."""
    batches = [model(batch) for batch in x.split(BATCH)]
    features = torch.cat([features for features, _ in batches])
    logits = torch.cat([logits for _, logits in batches])
    return features.double().numpy(), logits.double().softmax(1).numpy()
