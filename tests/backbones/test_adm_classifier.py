"""ADM's classifier of noisy images: the authors' counts, names and outputs, and its refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.checkpoint import load_published
from experiments.engine.timing.cost import MacCounter
from tests.support.networks import randomise, relative_rms

CLASSES = 7
# Measured on the authors' modules: parameters, core Gmacs, entries of the state_dict, and a digest
# of their names and shapes.
PUBLISHED = {
    "adm_classifier_64": (65_438_568, 19.0790, 307, "0b7fc9917ffd8325"),
    "adm_classifier_128": (42_568_040, 21.0403, 221, "e717337216e06448"),
    "adm_classifier_256": (54_096_360, 73.3486, 249, "bc098f973cf9f8b9"),
    "adm_classifier_512": (54_448_360, 112.7669, 281, "2a24b6c641814825"),
}
# Logits of the second sample, from the authors' module in float64 with these weights and inputs.
THEIRS = [
    0.369861287336,
    0.044598441025,
    -0.581038882315,
    -0.163559649637,
    0.401689026692,
    0.086816576303,
    -0.651386296362,
]


def classifier(**options: object) -> nn.Module:
    """A classifier of 16 x 16 pixels into a few classes."""
    tiny = backbones.tiny_options_of("adm_classifier_64")
    return backbones.build("adm_classifier_64", **tiny | dict(num_classes=CLASSES) | options)


def inputs() -> tuple[Tensor, Tensor]:
    """Three images and their times."""
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])


def test_classifiers_are_listed_apart_from_backbones():
    assert backbones.list_classifiers() == sorted(PUBLISHED)
    assert not set(PUBLISHED) & set(backbones.list_backbones())


def test_an_unknown_classifier_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="adm_classifier_64"):
        backbones.build("adm_classifier_32")


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_names_of_weights_are_the_authors(name: str):
    params, core_gmacs, entries, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = backbones.build(name)
        side = model.input_size
        with MacCounter() as macs:
            logits = model(torch.empty(1, 3, side, side), torch.empty(1))

    # Shapes and counts.
    assert logits.shape == (1, 1000)
    assert sum(weight.numel() for weight in model.parameters()) == params
    assert macs.core / 1e9 == pytest.approx(core_gmacs, abs=0.51e-4)

    # Names and shapes of the weights.
    state = model.state_dict()
    lines = sorted(f"{key} {list(value.shape)}" for key, value in state.items())
    assert len(lines) == entries
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == keys


@torch.no_grad()
def test_the_output_is_that_of_the_authors_module():
    model = randomise(classifier()).double()
    x, t = inputs()
    logits = model(x.double(), t)
    assert relative_rms(logits[1], torch.tensor(THEIRS, dtype=torch.float64)) < 1e-7
    assert relative_rms(model.float()(x, t), logits) < 1e-5


@torch.no_grad()
def test_the_output_of_an_image_does_not_depend_on_the_batch():
    model = randomise(classifier()).double()
    x, t = inputs()
    logits = model(x.double(), t)
    for i in range(3):
        alone = model(x[i : i + 1].double(), t[i : i + 1])
        assert relative_rms(alone[0], logits[i]) < 1e-12


def test_gradients_reach_every_parameter():
    # A norm's group of one channel would take away its bias, hence the widths.
    model = randomise(classifier(multipliers=(1, 1, 2))).double()
    x, t = inputs()
    model(x.double(), t).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.norm() > 1e-6 * weight.norm(), name


def test_checkpoints_load_strictly(tmp_path: Path):
    model = randomise(classifier())
    torch.save(model.state_dict(), tmp_path / "classifier.pt")
    other = classifier()
    load_published(other, tmp_path / "classifier.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key

    # A deeper network has weights that the file lacks.
    with pytest.raises(ValueError, match="missing"):
        load_published(classifier(num_res_blocks=2), tmp_path / "classifier.pt")


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"input_size": 18}, "divisible by 4"),
        ({"dim": 48}, "divisible by 32"),
        ({"head_dim": 24}, "head_dim 24"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        classifier(**options)


def test_inputs_of_another_size_are_refused():
    with pytest.raises(ValueError, match="takes inputs of 16x16, got 8x8"):
        classifier()(torch.zeros(1, 3, 8, 8), torch.zeros(1))
