"""The objective of a student that learns from a frozen teacher, beside its own task.

The loss is that of the task, plus the squared error to the teacher's prediction, plus the sum, over
pairs of features, of the squared error to the teacher's. All weights are 1.
Source: BK-SDM (arXiv:2305.15798), section 3.3. A teacher sees the same noisy images, times and
captions.

N images
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import backbones
from experiments.engine.diffusion.build import DiffusionProcess, build_diffusion
from experiments.engine.diffusion.iddpm import Model
from experiments.engine.specs.spec import Train

Features = list[Tensor]


class WithFeatures(nn.Module):
    """Call a network for its prediction and for the outputs of some of its modules, in order."""

    def __init__(self, network: nn.Module, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.modules_of_features = list(modules)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Features]:
        """Return the prediction (N, C, H, W) and the features, each with N rows."""
        with _heard(self.modules_of_features) as outputs:
            prediction = self.network(x, t, y)
        return prediction, [outputs[module] for module in self.modules_of_features]


@contextmanager
def _heard(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Keep the outputs of modules while they run."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs[module] = output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Distilled:
    """A process whose training also matches a teacher's prediction and features."""

    def __init__(
        self, process: DiffusionProcess, teacher: nn.Module, mimicked: backbones.Mimicked
    ) -> None:
        """Take a teacher, which is frozen.

        Args:
            process: makes noisy images and the loss of the task.
            teacher: a trained network.
            mimicked: whose outputs are matched.
        """
        self.process = process
        self.teacher = teacher.requires_grad_(False).eval()
        self.mimicked = mimicked
        self.entry: WithFeatures | None = None

    def training_entry(self, network: nn.Module) -> nn.Module:
        """Return what gives the prediction and the features of a student.

        Raises:
            ValueError: the student does not follow from the teacher.
        """
        pairs = backbones.mimicked_pairs(network, self.teacher, self.mimicked)
        self.entry = WithFeatures(self.teacher, [theirs for _, theirs in pairs])
        return WithFeatures(network, [own for own, _ in pairs])

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the times (n,) of the task."""
        return self.process.draw_times(n, generator)

    def losses(
        self, model: Model, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor
    ) -> dict[str, Tensor]:
        """Compute 'loss' and its terms 'task', 'output' and 'feature', each (N,)."""
        terms: dict[str, Tensor] = {}

        def student(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            assert self.entry is not None, "the student was prepared for training"
            prediction, features = model(x, t, y)
            with torch.no_grad():
                wanted, wanted_features = self.entry(x, t, y)
            terms["output"] = _error(prediction, wanted)
            pairs = zip(features, wanted_features, strict=True)
            terms["feature"] = torch.stack([_error(*pair) for pair in pairs]).sum(0)
            return prediction

        task = self.process.losses(student, x0, y, t, eps)["loss"]
        return terms | {"task": task, "loss": task + terms["output"] + terms["feature"]}


def build_objective(
    spec: Train, teacher: nn.Module | None, device: torch.device
) -> DiffusionProcess | Distilled:
    """Build what gives a training its times and losses.

    Raises:
        ValueError: a distillation lacks its teacher, declares unknown features, or is aligned too.
    """
    process = build_diffusion(spec.diffusion).to(device)
    if spec.distillation is None:
        return process
    if spec.alignment is not None:
        raise ValueError("a training is distilled or aligned, not both; leave out one of the two")
    if teacher is None:
        raise ValueError("a distillation needs its teacher; train it first")
    return Distilled(process, teacher, backbones.read_mimicked(spec.distillation.features))


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (N,)."""
    return (a - b).square().flatten(1).mean(1)
