"""What can be run, as frozen dataclasses, and the content id that names a run.

A spec holds everything that can change a number and nothing else. Its canonical form leaves out every field that
has its default, so a field added later keeps old ids valid. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol


class Spec(Protocol):
    """Any frozen dataclass whose content names a record, of whatever module."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class Backbone:
    """A registered network and the options that differ from its registered size."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def but(self, **options: Any) -> Backbone:
        return Backbone(self.name, self.options | options)


@dataclass(frozen=True)
class Data:
    """A labelled set as the network sees it: `channels` x `size` x `size`, latents or pixels in [-1, 1].

    Of VAE latents, `latents` says what is stored: posterior 'moments', drawn from anew at every visit, or 'fixed' samples.
    `vae` is 'sd-vae-ft' (ema and mse share their encoder) or the hash of another VAE's encoder.
    """

    name: str
    size: int
    channels: int
    num_classes: int
    flip: bool = False
    latents: str = "moments"
    vae: str = "sd-vae-ft"


@dataclass(frozen=True)
class Diffusion:
    """How data become noise, and what the network makes of it.

    'iddpm': `num_steps` steps of the named `betas`, which the network knows as `first_step` and on; it predicts the noise
    and, where `variance` is 'learned', a variance within the range of iDDPM (else 'fixed', the posterior's).
    An upsampler is also given the clean image, in sampling a sample, at side `low_res`.
    'classify': noise as in 'iddpm', and the network tells the class.
    'flow': the velocity on `path`, 'linear' or 'gvp', for times in [0, 1]; nothing else is read.
    """

    name: str = "iddpm"
    num_steps: int = 1000
    betas: str = "linear"
    variance: str = "learned"
    first_step: int = 0
    path: str = "linear"
    low_res: int | None = None


@dataclass(frozen=True)
class Recipe:
    """AdamW; linear `warmup` steps, then `decay` 'constant', 'linear' or 'cosine' (to `lr_min`); EMA of every parameter, none at 0.

    `grad_clip` is the largest norm of the whole gradient (None: any); `drop_path` the largest rate of stochastic depth.
    """

    steps: int
    batch: int
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"
    ema: float = 0.9999
    label_dropout: float = 0.1
    precision: str = "fp32"
    lr_min: float = 0.0
    eps: float = 1e-8
    grad_clip: float | None = None
    drop_path: float = 0.0


@dataclass(frozen=True)
class Train:
    """A training from nothing, or from the averaged weights of `init_from`, which may be of another size of image."""

    backbone: Backbone
    data: Data
    recipe: Recipe
    diffusion: Diffusion = Diffusion()
    seed: int = 0
    init_from: Train | None = None

    @property
    def trainings(self) -> tuple[Train, ...]:
        """Itself after those that it starts from."""
        return *(self.init_from.trainings if self.init_from else ()), self


@dataclass(frozen=True)
class Checkpoint:
    """Published weights in the place of a run of ours: the file's SHA-256, and the key in it under which they lie."""

    backbone: Backbone
    data: Data
    sha256: str
    key: str = "ema"
    diffusion: Diffusion = Diffusion()


@dataclass(frozen=True)
class Sampler:
    """`scale` 1 is no guidance; `channels` are the guided noise channels (None: all); `interval` in the network's times.

    `clip` keeps the estimates of clean data within the pixels' [-1, 1]; `eta` is ddim's; `atol` and `rtol` are dopri5's, which takes as many steps as they need; `form` of the noise and the
    last step of size `last_size` are the sde's. `classifier_scale` times the variance times a classifier's gradient moves the mean
    of a step (ADM, algorithms 1 and 2).
    """

    name: str = "ancestral"
    num_steps: int = 250
    scale: float = 1.0
    channels: int | None = 3
    interval: tuple[int, int] = (0, 1000)
    eta: float = 0.0
    atol: float = 1e-6
    rtol: float = 1e-3
    form: str = "sigma"
    last_step: str = "mean"
    last_size: float = 0.04
    clip: bool = False
    classifier_scale: float = 0.0


@dataclass(frozen=True)
class Evaluate:
    """Sample `num` images of the EMA network, each from (seed, index), and score them on `features`.

    A `classifier` of noisy images guides the sampler; an `upsampler` takes the samples, as 8-bit images, to its data's size by the
    sampler `upsampling`.
    """

    train: Train | Checkpoint
    sampler: Sampler
    num: int
    features: str
    labels: str = "random"
    seed: int = 0
    precision: str = "fp32"
    classifier: Train | None = None
    upsampler: Train | None = None
    upsampling: Sampler | None = None

    @property
    def data(self) -> Data:
        """What the images that are scored are like."""
        return (self.upsampler or self.train).data

    @property
    def trainings(self) -> tuple[Train, ...]:
        """The runs that it needs, in an order in which they can run."""
        return tuple(
            run
            for stage in (self.train, self.classifier, self.upsampler)
            if isinstance(stage, Train)
            for run in stage.trainings
        )


@dataclass(frozen=True)
class Timing:
    """Images a second of full batches of x, t and y on one device, and the ratio to `baseline` in the same run.

    `what` is timed: 'forward'; 'training', a step of the trainer, from the batch to the EMA; or 'sampling', guided images by
    `num_steps` ancestral steps, each of which sees twice the batch. `layout` is that of four-dimensional tensors.
    `parts` are further networks that make the system: an image passes each of them once, at an input of its own.
    `baseline_input` is the baseline's size and channels where they are not the subject's.
    """

    backbone: Backbone
    size: int
    channels: int
    num_classes: int
    batch: int
    device: str
    precision: str = "fp32"
    kernels: dict[str, str] = field(default_factory=dict)
    baseline: Backbone | None = None
    baseline_input: tuple[int, int] | None = None
    parts: tuple[Cost, ...] = ()
    what: str = "forward"
    num_steps: int = 250
    compile: bool = False
    graphs: bool = False
    layout: str = "channels_last"


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most in a numeric mode: the rates of large matrix products, and of copying memory."""

    device: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Profile:
    """Where the time of what is timed goes, without a baseline, compilation or graphs."""

    timing: Timing


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates of one forward pass at batch 1."""

    backbone: Backbone
    size: int
    channels: int
    num_classes: int


Stage = Train | Evaluate | Timing | Ceilings | Profile | Cost


def canonical(value: Any, full: bool = False) -> Any:
    """JSON-ready form, without the fields that have their defaults unless `full`; TypeError for what has no stable form."""
    if is_dataclass(value):
        shown = (f.name for f in fields(value) if full or getattr(value, f.name) != _default(f))
        return {"kind": type(value).__name__} | {
            name: canonical(getattr(value, name), full) for name in shown
        }
    if isinstance(value, dict):
        return {str(key): canonical(item, full) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [canonical(item, full) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} has no canonical form")


def spec_id(spec: Spec) -> str:
    """16 hexadecimal digits that name a spec by its content."""
    text = json.dumps(canonical(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kind_of(spec: Spec) -> str:
    """Folder name of a stage's records: train, evaluate, timing, ceilings, profile or cost."""
    return type(spec).__name__.lower()


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


CHANNELS, FACTOR = 4, 8  # of latents, and the pixels a side that one of their places stands for


def is_latent(data: Data) -> bool:
    return data.channels == CHANNELS
