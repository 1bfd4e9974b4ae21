"""The convolution with a caption's kernels equals an explicit loop, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from backbones import kernels
from experiments.engine.timing.cost import MacCounter
from tests.support.interpreter import INTERPRETED
from tests.support.kernels import with_gradients

HERE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
CHOICES = ["grouped", "reference"] + ["triton"] * (INTERPRETED or torch.cuda.is_available())
# Samples, channels, grid and side of the kernels; a kernel may be larger than its image.
SIZES = [(1, 1, (1, 1), 3), (1, 3, (4, 7), 9), (3, 70, (9, 5), 3), (2, 5, (1, 6), 5)]


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def looped(x: Tensor, taps: Tensor) -> Tensor:
    """Loop over samples, pixels and taps; all channels of a pixel at once."""
    n, _, height, width = x.shape
    side = int(taps.shape[1] ** 0.5)
    images = []
    for sample in range(n):
        pixels = []
        for i, j in itertools.product(range(height), range(width)):
            # The weighted sum of the pixels around, without those outside of the image.
            total = torch.zeros_like(x[sample, :, 0, 0])
            for tap in range(side**2):
                row = i + tap // side - side // 2
                column = j + tap % side - side // 2
                if 0 <= row < height and 0 <= column < width:
                    total = total + taps[sample, tap] * x[sample, :, row, column]
            pixels.append(total)
        images.append(torch.stack(pixels, dim=1).view(-1, height, width))
    return torch.stack(images)


def run(choice: str, x: Tensor, taps: Tensor) -> Tensor:
    """Run the named implementation; Triton's runs on a CPU in its interpreter."""
    if choice == "triton":
        from backbones.kernels.sample_depthwise_triton import sample_depthwise

        return sample_depthwise(x, taps, int(taps.shape[1] ** 0.5))
    with kernels.use(sample_depthwise=choice):
        return kernels.sample_depthwise(x, taps)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "channels", "grid", "side"), SIZES)
def test_the_convolution_of_samples_is_its_loop(
    choice: str,
    layout: torch.memory_format,
    n: int,
    channels: int,
    grid: tuple[int, int],
    side: int,
):
    """Every choice gives the loop's output and gradients, in either layout."""
    inputs = normal((n, channels, *grid), (n, side**2, channels))
    truth = with_gradients(looped, inputs)

    # In float32, where this machine computes.
    x, taps = (tensor.to(HERE, torch.float32) for tensor in inputs)
    own = [x.contiguous(memory_format=layout), taps]
    values = with_gradients(lambda *args: run(choice, *args), own)
    for value, expected in zip(values, truth, strict=True):
        assert value.shape == expected.shape
        assert (value.cpu() - expected).norm() < 2e-6 * expected.norm()


def test_it_is_counted_alike_and_selected_in_one_place():
    x, taps = (part.float() for part in normal((2, 3, 4, 5), (2, 9, 3)))
    for choice in ("grouped", "reference"):
        with kernels.use(sample_depthwise=choice), MacCounter() as macs:
            kernels.sample_depthwise(x, taps)
        assert (macs.core, macs.extra) == (2 * 3 * 4 * 5 * 9, 0)
    kernels.reset_used()
    kernels.sample_depthwise(x, taps)
    assert kernels.used() == {"sample_depthwise": ["grouped"]}
    assert kernels.sample_depthwise(x.to("meta"), taps.to("meta")).shape == x.shape


@pytest.mark.parametrize("choice", ["grouped", "reference"])
@pytest.mark.parametrize("taps", [4, 8, 77])
def test_taps_that_fill_no_odd_square_are_refused(choice: str, taps: int):
    with pytest.raises(ValueError, match=f"odd square.*got {taps}"):
        run(choice, torch.zeros(1, 2, 3, 3), torch.zeros(1, taps, 2))
