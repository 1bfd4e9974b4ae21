"""The judge of CIFAR-10: a residual classifier with committed weights, whose features score images.

It is trained once on the training part alone, by stochastic gradient descent with a learning rate
that rises and falls linearly. Its weights are stored as float16 and used as float32. Scores on its
features bear its name, and records hold the hash of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from experiments.engine.data.locate import JUDGE_WEIGHTS
from experiments.engine.data.sets import ImageSet, Part, load
from experiments.engine.judges.classifiers import accuracy
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.records.files import written_whole
from experiments.engine.specs.spec import Data

EPOCHS = 16
BATCH = 128
PEAK_LR = 0.15
WARMUP = 0.2  # share of the steps in which the learning rate rises
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SMOOTHING = 0.1  # of the labels
SHIFT = 4  # pixels by which an image is shifted at most, in both directions


class ResidualClassifier(nn.Module):
    """Two residual blocks between convolutions of stride 2, 0.46M parameters.

    (N, 3, 32, 32) -> features (N, 128) and logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32)
        self.down1 = _convolution(32, 64, stride=2)
        self.block1 = nn.Sequential(_convolution(64, 64), _convolution(64, 64))
        self.down2 = _convolution(64, 128, stride=2)
        self.block2 = nn.Sequential(_convolution(128, 128), _convolution(128, 128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down1(self.stem(x))  # (N, 64, 16, 16)
        x = x + self.block1(x)
        x = self.down2(x)  # (N, 128, 8, 8)
        x = x + self.block2(x)
        features = x.mean((2, 3))  # (N, 128)
        return features, self.head(features)


def _convolution(dim_in: int, dim_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(dim_in, dim_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(dim_out), nn.ReLU())


def load_judge(path: Path = JUDGE_WEIGHTS) -> tuple[nn.Module, str]:
    """Load the judge in eval mode, with the SHA-256 of its file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise ValueError(
            f"the CIFAR-10 judge's weights are missing: {path}; "
            "restore them with git, or train a judge with python experiments/prepare.py judge"
        )
    content = path.read_bytes()
    network = ResidualClassifier().eval()
    try:
        weights = {name: tensor.float() for name, tensor in load(content).items()}
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold the CIFAR-10 judge's weights: {reason}") from None
    backbones.check_values(network, network.state_dict(), path.name)
    return network, hashlib.sha256(content).hexdigest()


def save_judge(network: nn.Module) -> bytes:
    """Return the file of a judge's weights, float16."""
    from safetensors.torch import save

    weights = network.state_dict()
    return save({name: tensor.half().contiguous() for name, tensor in weights.items()})


def train_judge(images: ImageSet) -> Iterator[tuple[int, float, nn.Module]]:
    """Train a judge, and yield after each epoch its number, its mean loss and the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at("cifar judge"))
        network: nn.Module = ResidualClassifier()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), PEAK_LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = len(images) // BATCH
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator_at("cifar judge order", epoch))
        total = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _lr_at((epoch * steps + step) / (EPOCHS * steps))

            # One step on shifted and mirrored images.
            indices = order[step * BATCH : (step + 1) * BATCH]
            x, y = images.take(indices)
            x = _augment(x, generator_at("cifar judge batch", epoch, step))
            loss = F.cross_entropy(network(x)[1], y, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield epoch + 1, total / steps, network


def _lr_at(progress: float) -> float:
    """Return the learning rate at a share of the training."""
    if progress < WARMUP:
        return PEAK_LR * progress / WARMUP
    return PEAK_LR * (1 - progress) / (1 - WARMUP)


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image (N, C, H, W) by up to SHIFT pixels, and mirror half of them."""
    n, _, height, width = x.shape
    padded = F.pad(x, (SHIFT,) * 4, mode="reflect")
    shifts = torch.randint(2 * SHIFT + 1, (n, 2), generator=generator)
    rows = shifts[:, :1] + torch.arange(height)  # (N, H)
    columns = shifts[:, 1:] + torch.arange(width)  # (N, W)

    # Reading the columns backwards mirrors an image.
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(n)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def make_judge(data: Data, path: Path, report: Callable[[str], None]) -> str:
    """Train the judge of CIFAR-10 on the training part and write it; say how good it is.

    Args:
        data: CIFAR-10, split, with its pixels as they are.
        path: of the weights.
        report: hears of every epoch.
    """
    train, test = load(data), load(data, Part.TEST)
    assert isinstance(train, ImageSet)
    assert isinstance(test, ImageSet)

    # The last epoch's network is the judge; no part chooses among them.
    network = None
    for epoch, loss, trained in train_judge(train):
        report(f"epoch {epoch} of {EPOCHS}: loss {loss:.4f}")
        network = trained
    assert network is not None, "a judge takes at least one epoch"
    with written_whole(path) as file:
        file.write(save_judge(network.eval()))
    judge, sha256 = load_judge(path)
    return f"{path}: {accuracy(judge, test):.2%} of the test images, sha256 {sha256}"
