"""The locality probe's memory at the width and grid of XL at 512: what a pass takes beyond the network grows with neither layers nor heads."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest

from experiments.engine.records.store import REPOSITORY

MIB = 2**20
TOKENS, WIDTH = 1024, 1152
PASS = """
import re, sys, torch, backbones
from analysis.probes import layers
from analysis.probes.implied import Softmax, Written
from analysis.probes.locality import LocalityProbe, Settings

depth, heads, held = (int(argument) for argument in sys.argv[1:])
torch.set_num_threads(1)
model = backbones.build("dit_xl_2", input_size=64, depth=depth, heads=heads, num_classes=10).eval()
watched = layers.layers(model)
if held:  # what streaming must not be: every layer's weights, written out and kept
    kept = []
    dense = lambda q, k, place, *rest: kept.append(Written((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1), place)) or kept[-1]
    layers.implied.Softmax = dense
probe = LocalityProbe(model, watched, Settings(queries=64, anchors=((0.5, 0.5),), gradient_queries=0, gradient_images=1, directions=1, memory=8))
x, t, y = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.tensor([1])
with torch.no_grad():
    model(x, t, y)  # what the libraries set up once

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew from what is resident now
before = status("VmRSS")
probe(x, t, y)
assert len(probe.parts) == depth and all(part.values[0].shape[0] == heads for part in probe.parts.values())
print(1024 * (status("VmHWM") - before))
"""


@cache
def taken(depth: int, heads: int, held: bool = False) -> float:
    """Peak memory of a probed pass over what was resident before it, in MiB."""
    command = [sys.executable, "-c", PASS, str(depth), str(heads), str(int(held))]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }  # what is freed is given back: resident is what is held
    return (
        int(
            subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        / MIB
    )


def weights_of_a_layer(heads: int) -> float:
    """N x heads x T x T in float32, in MiB."""
    return 4 * heads * TOKENS**2 / MIB


@pytest.mark.slow
def test_memory_grows_with_neither_layers_nor_heads():
    """By less than an eighth of what one more layer's weights, or one layer's of the heads more, would take; 28 layers stream as these do."""
    base = taken(2, 16)
    assert taken(5, 16) - base < weights_of_a_layer(16) / 8
    assert taken(2, 48) - base < weights_of_a_layer(48 - 16) / 8
    activations = (
        4 * TOKENS * (4 + 4 + 3 + 2) * WIDTH / MIB
    )  # MLP before and after its activation, q k v, input and output
    assert base < activations + 8  # the probe's own allowance


@pytest.mark.slow
def test_weights_that_are_kept_are_noticed():
    assert taken(5, 16, held=True) - taken(5, 16) > 4 * weights_of_a_layer(16)
