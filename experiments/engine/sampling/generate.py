"""Generate images in memory: run the sampler that a spec declares, batch by batch.

Every image comes from a seed of its own, so neither the batch nor the number of processes decides
which images there are. The algorithms themselves are in `diffusion/samplers.py`; `samples.py` keeps
generated images on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.engine.data.captioned.folders import is_coco
from experiments.engine.data.captioned.pictures import read_index
from experiments.engine.data.quantise import from_uint8, to_uint8, unfold
from experiments.engine.diffusion.build import build_diffusion
from experiments.engine.diffusion.cascade import ClassifierGradient, System, condition_on_low_res
from experiments.engine.diffusion.guidance import Guided, RisingScale
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.diffusion.samplers import bind_sampler, has_uniform_steps
from experiments.engine.numerics.cuda_graphs import Launch, run_eagerly
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.randomness import ImageNoise, seed_at
from experiments.engine.sampling.counting import CountingModel
from experiments.engine.sampling.scales import ScaleSampler
from experiments.engine.specs.spec import Checkpoint, Evaluate, Sampler, Train

Network = Model | System
ONE_AN_IMAGE = "one_an_image"  # a policy of labels


class NetworkSampler:
    """The sampler that a spec declares for one network, ready for any number of batches."""

    def __init__(
        self,
        train: Train | Checkpoint,
        sampler: Sampler,
        device: torch.device,
        gradient: Model | None = None,
        launch: Launch = run_eagerly,
    ) -> None:
        """Bind the sampler to the diffusion that the network was trained with.

        Args:
            train: what trained the network.
            sampler: the declared sampler.
            device: where the network is.
            gradient: a classifier's gradient to sample by.
            launch: makes of a step what is called in its place.
        """
        diffusion = build_diffusion(train.diffusion).to(device)

        self.data = train.data
        self.sampler = sampler
        self.device = device
        self.times = diffusion.times
        self.run = bind_sampler(sampler, diffusion, gradient, launch)

    def sample(self, model: Model, y: Tensor, seeds: list[int]) -> Tensor:
        """Sample a batch (n, C, H, W) for labels (n,), one seed for each image."""
        # Only the last step is kept.
        return deque(self.steps(model, y, seeds), maxlen=1).pop()

    def steps(self, model: Model, y: Tensor, seeds: list[int]) -> Iterator[Tensor]:
        """Yield a batch (n, C, H, W) after each step; the last one is sampled."""
        shape = (self.data.channels, self.data.size, self.data.size)
        scale: float | RisingScale = self.sampler.scale
        if self.sampler.power is not None and self.sampler.scale != 1:
            scale = RisingScale(self.sampler.scale, self.sampler.power, self.times[1])
        guided = Guided(
            model,
            scale,
            self.data.num_classes,
            channels=self.sampler.channels,
            interval=self.sampler.interval,
            times=self.times,
        )
        return self.run(guided, y, ImageNoise(seeds, shape, self.device))


def generate_images(
    spec: Evaluate,
    model: Network | CountingModel,
    device: torch.device,
    batch: int,
    within: range | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate the images of a spec in the order of their index.

    Args:
        spec: what is sampled, and how.
        model: the network or system that the spec names.
        device: where the model is.
        batch: images at a time.
        within: indices to generate; all by default.

    Yields:
        Images (n, C, H, W), unfolded, and their labels (n,), on the CPU.
    """
    model = model if isinstance(model, CountingModel) else CountingModel(model)
    within = range(spec.num) if within is None else within
    labels = labels_of(spec)
    seeds = image_seeds(spec.seed, spec.num)
    base = base_sampler(spec, model, device)

    # The upsampler's noise has seeds of its own.
    upsampler = None
    if spec.upsampler is not None:
        assert spec.upsampling is not None, "an upsampler needs a sampler"
        upsampler = NetworkSampler(spec.upsampler, spec.upsampling, device)
    upsampling_seeds = image_seeds(spec.seed, spec.num, "upsampled image")

    for start in range(within.start, within.stop, batch):
        indices = slice(start, min(start + batch, within.stop))
        y = labels[indices].to(device)
        with precision(spec.precision, device), model.once_per_caption(y):
            x = base.sample(model, y, seeds[indices])
            if upsampler is not None:
                # ADM's scripts write the small images to a file of 8 bits in between.
                assert model.upsampler is not None, "the spec names an upsampler"
                enlarge = condition_on_low_res(model.upsampler, from_uint8(to_uint8(x)))
                x = upsampler.sample(enlarge, y, upsampling_seeds[indices])
        yield unfold(x.cpu(), spec.data.fold), labels[indices]


def base_sampler(
    spec: Evaluate, model: CountingModel, device: torch.device
) -> NetworkSampler | ScaleSampler:
    """Return the sampler of the base model, guided by the system's classifier if there is one."""
    if predicts_tokens(spec):
        return ScaleSampler(spec.sampler)
    gradient = None
    if spec.classifier is not None:
        assert model.classifier is not None, "the spec names a classifier"
        gradient = ClassifierGradient(model.classifier, spec.sampler.classifier_scale)
    return NetworkSampler(spec.train, spec.sampler, device, gradient, model.launch)


def require_sampler(spec: Evaluate) -> None:
    """Raise ValueError, before any work, for a sampler that a spec's network lacks."""
    if predicts_tokens(spec):
        ScaleSampler(spec.sampler)
    else:
        bind_sampler(spec.sampler, build_diffusion(spec.train.diffusion))


def predicts_tokens(spec: Evaluate) -> bool:
    """Tell whether a spec's network predicts tokens, and no noise."""
    return isinstance(spec.train, Train) and spec.train.tokenizer is not None


def can_capture_steps(spec: Evaluate) -> bool:
    """Tell whether CUDA graphs can launch the steps of a spec's sampler.

    They cannot if steps differ, as those of scales do, nor with a classifier, whose gradient is
    computed in between.
    """
    if spec.classifier is not None or predicts_tokens(spec):
        return False
    return has_uniform_steps(spec.sampler, build_diffusion(spec.train.diffusion).times)


def labels_of(spec: Evaluate) -> Tensor:
    """Labels (num,) of the images of a spec, by its policy.

    'one_an_image' draws captions of different pictures that are not trained on.
    """
    if spec.labels == ONE_AN_IMAGE:
        if not is_coco(spec.data):
            raise ValueError(
                f"labels {ONE_AN_IMAGE} are captions of pictures, and {spec.data.name} has none; "
                "declare balanced or random"
            )
        return read_index().scored(spec.num, spec.seed)
    return image_labels(spec.labels, spec.num, spec.data.num_classes, spec.seed)


def image_labels(policy: str, num: int, num_classes: int, seed: int) -> Tensor:
    """Labels (num,) of the images by a policy.

    'balanced' cycles through the classes; 'random' draws each label from (seed, index). All are 0
    where there are no classes.
    """
    if not num_classes:
        return torch.zeros(num, dtype=torch.long)
    if policy == "balanced":
        return torch.arange(num) % num_classes
    if policy == "random":
        return torch.tensor([seed_at("label", seed, index) % num_classes for index in range(num)])
    raise ValueError(f"unknown label policy {policy!r}; known: balanced, random, {ONE_AN_IMAGE}")


def image_seeds(seed: int, num: int, of: str = "image") -> list[int]:
    """One seed for each image, all different, of the 32 bits that the CPU's generator reads.

    `of` names the noise, so that two networks of a system have different seeds.
    """
    base = seed_at(of, seed)
    return [(base + index) % 2**32 for index in range(num)]
