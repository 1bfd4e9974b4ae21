"""What can be run, as frozen dataclasses, and the content id that names a run.

A spec holds everything that can change a number and nothing else. Its canonical form is made in
`form.py`. Class and field names are part of it: never rename one. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.form import UNSAID
from experiments.engine.specs.form import Spec as Spec
from experiments.engine.specs.form import canonical as canonical
from experiments.engine.specs.form import spec_id as spec_id
from experiments.engine.specs.latent_space import LatentSpace
from experiments.engine.specs.weights import Weights

LATENT_CHANNELS = 4
FACTOR = 8  # pixels per side that one place of a latent stands for


@dataclass(frozen=True)
class Backbone:
    """A registered network."""

    # Registered name.
    name: str
    # Options that differ from those of the registered size.
    options: dict[str, Any] = field(default_factory=dict)
    # Digest of the study whose code makes the network or a part of it; "": this tree's code.
    code: str = field(default="", metadata=UNSAID)

    def but(self, **options: Any) -> Backbone:
        """Return the network with further options."""
        return replace(self, options=self.options | options)


@dataclass(frozen=True)
class Data:
    """A labelled set as the network sees it: latents, or pixels in [-1, 1]."""

    name: str
    # Height and width.
    size: int
    channels: int
    # 0: the set has no classes, and networks have no label table.
    num_classes: int
    # Whether half of the visits see a mirrored image.
    flip: bool = False
    # Stored of VAE latents: posterior 'moments', drawn anew at every visit, or 'fixed' samples.
    latents: str = "moments"
    # 'sd-vae-ft' (ema and mse share their encoder), or the hash of another VAE's encoder.
    vae: str = "sd-vae-ft"
    # Side of the squares of pixels that are folded into channels; 1: pixels are as they are.
    fold: int = 1
    # 'whole': trained on, and scored against, all images. 'held_out': the set is parted into images
    # to train on, images for choices (validation), and images that are only reported (test).
    split: str = "whole"
    # Hash or published name of the encoder of the captions that labels stand for; '': classes.
    captions: str = field(default="", metadata=UNSAID)
    # Whether every token of a caption has the caption's pooled vector in place of its own state.
    pooled: bool = field(default=False, metadata=UNSAID)
    # Digest of a prepared folder's content, of data of one's own; "": a set that the suite knows.
    sha256: str = field(default="", metadata=UNSAID)
    # Of latents that are not Stable Diffusion's: how a network sees them.
    space: LatentSpace | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class Diffusion:
    """How data become noise, and what the network makes of the noise."""

    # 'iddpm': the network predicts the noise. 'classify': noise as in 'iddpm', and the network
    # tells the class. 'flow': the network predicts the velocity for times in [0, 1]; of the other
    # fields only `path`, `times` and `direction` are read.
    name: str = "iddpm"
    # Number of noise levels.
    num_steps: int = 1000
    # Name of the schedule.
    betas: str = "linear"
    # 'learned': the network also predicts a variance within the range of iDDPM. 'fixed': the
    # variance is the posterior's.
    variance: str = "learned"
    # What the network calls the first noise level.
    first_step: int = 0
    # 'linear' or 'gvp'.
    path: str = "linear"
    # Side of the clean image that an upsampler is given beside the noise; in sampling, a sample.
    low_res: int | None = None
    # How a flow's training draws times: 'uniform' or 'logit_normal'.
    times: str = "uniform"
    # Of a flow: weight of the loss of the velocity's direction.
    direction: float = 0.0
    # Of a network that predicts at several resolutions: weights of its losses, low to high.
    scales: tuple[float, ...] = ()
    # Of a network with gates: the share of its gated work that it is to use on average; None: its
    # gates are not trained.
    used_share: float | None = None
    # Training steps over which the share that is asked for falls from 1 to `used_share`.
    share_steps: int = 0
    # First training steps in which the network without gates has a loss too.
    complete_steps: int = 0


@dataclass(frozen=True)
class Recipe:
    """A training by AdamW."""

    # Optimiser steps.
    steps: int
    # Images per step.
    batch: int
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    # Steps over which the learning rate rises linearly.
    warmup: int = 0
    # What follows the warm-up: 'constant', 'linear' or 'cosine' (down to `lr_min`).
    decay: str = "constant"
    # Decay of the averaged weights, of every parameter; 0 averages nothing.
    ema: float = 0.9999
    # Share of labels that are replaced by the null label.
    label_dropout: float = 0.1
    precision: str = "fp32"
    lr_min: float = 0.0
    eps: float = 1e-8
    # Largest norm of the whole gradient; None: any.
    grad_clip: float | None = None
    # Largest rate of stochastic depth.
    drop_path: float = 0.0
    # How initial weights are drawn. 'in_order': from one stream, in the constructor's order.
    # 'by_name': each parameter from a stream of its own, by (seed, name), so that networks start
    # from equal weights where they have the same parameter.
    initial: str = "in_order"
    # How often, evenly spread over the steps, two power-function averages are stored, from which
    # the average of any length is rebuilt; 0: never.
    power_snapshots: int = 0


@dataclass(frozen=True)
class Tokenizer:
    """What turns images into tokens scale by scale, and back.

    Every machine trains it once, on the images of the training that declares it, without labels.
    """

    # A registered tokenizer.
    backbone: Backbone
    # Optimiser steps, and images per step.
    steps: int = 400
    batch: int = 64
    lr: float = 2e-3
    # Steps after which codes that no image uses are drawn anew.
    revive_every: int = 100


@dataclass(frozen=True)
class Train:
    """A training, from nothing, from another one's averaged weights, or from those of a file."""

    backbone: Backbone
    data: Data
    recipe: Recipe
    diffusion: Diffusion = Diffusion()
    seed: int = 0
    # The training or the file that this one continues; its images may have another size.
    init_from: Train | Weights | None = None
    # The alignment of its tokens with an encoder's features; None: it denoises alone.
    alignment: Alignment | None = field(default=None, metadata=UNSAID)
    # What it learns of another training's network, beside its task; None: nothing.
    distillation: Distillation | None = field(default=None, metadata=UNSAID)
    # Of an autoregressive network: whose tokens it predicts, in the place of `diffusion`.
    tokenizer: Tokenizer | None = field(default=None, metadata=UNSAID)

    @property
    def trainings(self) -> tuple[Train, ...]:
        """Return this training after those that it starts or learns from."""
        start = self.init_from.trainings if isinstance(self.init_from, Train) else ()
        taught = self.distillation.teacher.trainings if self.distillation else ()
        return (*start, *taught, self)


@dataclass(frozen=True)
class Distillation:
    """What a smaller network learns of a larger one: its prediction and some of its features."""

    # Its averaged weights are the teacher, which is frozen.
    teacher: Train
    # Whose outputs are matched: 'blocks', of whole levels, or 'self_attention'.
    features: str = "blocks"
    # Whether the student starts from the teacher's weights of the parts that it keeps.
    inherits: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """Published weights in the place of a training of ours."""

    backbone: Backbone
    data: Data
    # SHA-256 of the file.
    sha256: str
    # Key in the file under which the weights lie.
    key: str = "ema"
    diffusion: Diffusion = Diffusion()


@dataclass(frozen=True)
class Sampler:
    """How images are sampled."""

    name: str = "ancestral"
    num_steps: int = 250
    # Guidance scale; 1 is no guidance.
    scale: float = 1.0
    # Number of noise channels that are guided; None: all.
    channels: int | None = 3
    # When guidance applies, in the network's times.
    interval: tuple[float, float] = (0, 1000)
    # Of 'ddim': the share of noise that is drawn anew.
    eta: float = 0.0
    # Of 'dopri5', which takes as many steps as its tolerances need.
    atol: float = 1e-6
    rtol: float = 1e-3
    # Of 'sde': the form of the noise, and kind and size of the last step.
    form: str = "sigma"
    last_step: str = "mean"
    last_size: float = 0.04
    # Whether estimates of clean data are kept within the pixels' [-1, 1].
    clip: bool = False
    # Scale of a classifier's gradient, times the variance, by which the mean of a step moves (ADM,
    # algorithms 1 and 2).
    classifier_scale: float = 0.0
    # Of 'scales', which draws the tokens of a scale in each step: how many of the likeliest codes
    # stay, by scale; one number holds for all scales, and none or 0 keeps all codes. Guidance rises
    # linearly from none at the first scale to `scale` at the last.
    top_k: tuple[int, ...] = ()
    # The probability that the likeliest of these codes have together; 0: all stay.
    top_p: float = 0.0
    # By which the logits of the remaining codes are divided, by scale as `top_k`.
    temperatures: tuple[float, ...] = ()
    # Of 'euler': each time t of the even grid becomes shift t / (1 + (shift - 1) t). Below 1, steps
    # are shorter near the noise.
    shift: float = 1.0
    # The power of a scale that is 1 at the noise and `scale` at the data: 1 + (scale - 1)
    # (1 - cos(pi (1 - t / T) ** power)) / 2 at time t of T; None: the same scale everywhere.
    power: float | None = None


@dataclass(frozen=True)
class Evaluate:
    """Sample images of the EMA network, each from (seed, index), and score them."""

    train: Train | Checkpoint
    sampler: Sampler
    # Number of images.
    num: int
    # What the scores are computed on: 'inception', 'digits', 'cifar_classifier', and for sets that
    # are split 'digits_judge' or 'cifar_judge'.
    features: str
    # Policy of the labels: 'random' or 'balanced', or of captions 'one_an_image'.
    labels: str = "random"
    seed: int = 0
    # Of sampling.
    precision: str = "fp32"
    # Classifier of noisy images that guides the sampler.
    classifier: Train | None = None
    # Takes the samples, as 8-bit images, to the size of its own data.
    upsampler: Train | None = None
    # The upsampler's sampler.
    upsampling: Sampler | None = None
    # Relative width of the power-function average of the weights of `train`, rebuilt from what the
    # training stored; None: the average by the recipe's decay.
    average: float | None = None

    @property
    def data(self) -> Data:
        """Return what the images that are scored are like."""
        return (self.upsampler or self.train).data

    @property
    def trainings(self) -> tuple[Train, ...]:
        """Return the trainings that this needs, in an order in which they can run."""
        trainings: list[Train] = []
        for stage in (self.train, self.classifier, self.upsampler):
            if isinstance(stage, Train):
                trainings += stage.trainings
        return tuple(trainings)


@dataclass(frozen=True)
class HeldOut:
    """Measure the denoising loss of the EMA network on images that the training has not seen.

    Images, times and noises are the same for every network and every training seed.
    """

    train: Train
    # Part of the data: 'validation' or 'test'.
    part: str
    # Number of images, the first ones of the part; None: all.
    num: int | None = None
    # Times and noises that every image meets in each bin.
    draws: int = 1
    # The bins of log SNR, one unit wide, that are scored: from `low` up to `high`.
    low: int = -4
    high: int = 5


@dataclass(frozen=True)
class Timing:
    """Images per second of full batches of x, t and y on one device, beside a baseline's."""

    backbone: Backbone
    size: int
    channels: int
    num_classes: int
    # Images per batch.
    batch: int
    device: str
    precision: str = "fp32"
    # Choices of kernels that are forced, by operation.
    kernels: dict[str, str] = field(default_factory=dict)
    # Timed in turn in the same run, for the ratio.
    baseline: Backbone | None = None
    # Size and channels of the baseline where they are not those of `backbone`.
    baseline_input: tuple[int, int] | None = None
    # Further networks that make the system. An image passes each once, at an input of its own.
    parts: tuple[Cost, ...] = ()
    # 'forward'; 'training', a step of the trainer from the batch to the EMA; or 'sampling', guided
    # images by ancestral steps, each of which sees twice the batch.
    what: str = "forward"
    # Steps of 'sampling'; of an autoregressive network 1, which draws all scales.
    num_steps: int = 250
    compile: bool = False
    graphs: bool = False
    # Of four-dimensional tensors.
    layout: str = "channels_last"
    # Makes images of the tokens of an autoregressive network, of which `size` is the side of the
    # last scale and `channels` those of a code. Its decoder is not timed.
    tokenizer: Backbone | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class Latency:
    """Seconds of forward passes of one image, and the memory of such a pass and of a full batch."""

    # Of a forward pass at the full batch, without a baseline.
    timing: Timing


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most: the rates of large matrix products and of copying memory."""

    device: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Profile:
    """Where the time of a timing goes, without a baseline, compilation or graphs."""

    timing: Timing


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates of one forward pass at batch 1.

    Of an autoregressive network, these are of all scales of an image: in one pass as in training,
    and in turn with a cache as in sampling.
    """

    backbone: Backbone
    # Side of the input, or of the last scale.
    size: int
    # Of the input, or of a code.
    channels: int
    num_classes: int
    # Makes images of an autoregressive network's tokens.
    tokenizer: Backbone | None = None
    # Takes over from the autoregressive network after its first `drafted_scales`; None: nothing.
    refiner: Backbone | None = None
    drafted_scales: int = 0


Stage = Train | Evaluate | HeldOut | Timing | Ceilings | Profile | Cost | Latency


def kind_of(spec: Spec) -> str:
    """Return the folder name of a stage's records: train, evaluate, timing and so on."""
    return type(spec).__name__.lower()


def is_latent(data: Data) -> bool:
    """Return whether a set holds latents, and not pixels."""
    return data.space is not None or data.channels == LATENT_CHANNELS
