"""The locality probe's memory at the width and grid of DiT-XL at 512 pixels.

What a pass takes beyond the network grows with neither layers nor heads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest

from experiments.engine.records.tree import REPOSITORY

pytestmark = pytest.mark.slow

MIB = 2**20
TOKENS = 1024
WIDTH = 1152
PASS = """
import re, sys, torch, backbones
from analysis.probes import layers
from analysis.probes.implied import Written
from analysis.probes.locality import LocalityProbe, Settings

depth, heads, held = (int(argument) for argument in sys.argv[1:])
torch.set_num_threads(1)
options = dict(input_size=64, depth=depth, heads=heads, num_classes=10)
model = backbones.build("dit_xl_2", **options).eval()
watched = layers.layers(model)

kept = []

def keep_all_weights(q, k, place, *rest):
    # What streaming must not be: every layer's weights, written out and kept.
    kept.append(Written((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1), place))
    return kept[-1]

if held:
    layers.implied.Softmax = keep_all_weights
settings = Settings(
    queries=64, anchors=((0.5, 0.5),), gradient_queries=0, gradient_images=1, directions=1, memory=8
)
probe = LocalityProbe(model, watched, settings)
x, t, y = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.tensor([1])
with torch.no_grad():
    model(x, t, y)  # what the libraries set up once

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew from what is resident now
before = status("VmRSS")
probe(x, t, y)
assert len(probe.series) == depth
for series in probe.series.values():
    assert series.values[0].shape[0] == heads
print(1024 * (status("VmHWM") - before))
"""
# With these, freed memory goes back to the system, so that resident memory is what is held.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@cache
def peak(depth: int, heads: int, held: bool = False) -> float:
    """Return the peak memory of a probed pass beyond what was resident before it, in MiB."""
    command = [sys.executable, "-c", PASS, str(depth), str(heads), str(int(held))]
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout) / MIB


def weights_of_a_layer(heads: int) -> float:
    """Return the size of N x heads x T x T weights in float32, in MiB."""
    return 4 * heads * TOKENS**2 / MIB


def test_memory_grows_with_neither_layers_nor_heads():
    """Growth stays below an eighth of the added weights; 28 layers stream as these do."""
    base = peak(2, 16)
    assert peak(5, 16) - base < weights_of_a_layer(16) / 8
    assert peak(2, 48) - base < weights_of_a_layer(48 - 16) / 8

    # The MLP before and after its activation, q k v, input and output; and the probe's allowance.
    activations = 4 * TOKENS * (4 + 4 + 3 + 2) * WIDTH / MIB
    assert base < activations + 8


def test_weights_that_are_kept_are_noticed():
    assert peak(5, 16, held=True) - peak(5, 16) > 4 * weights_of_a_layer(16)
