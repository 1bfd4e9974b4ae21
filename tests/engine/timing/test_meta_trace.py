"""Work that is traced on the meta device equals counts and closed forms, forward and backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import kernels
from experiments.engine.reporting.efficiency.roofline import Unit, Work
from experiments.engine.specs.spec import Backbone, Cost, Timing
from experiments.engine.timing.cost import count_backbone
from experiments.engine.timing.meta.trace import Tracer, trace_timing

DIT = Backbone("dit_s_2", dict(dim=12, depth=1, heads=2))
DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)))
DIS = Backbone("dis_s_2", dict(dim=12, depth=2))


def timing(backbone: Backbone, task: str = "forward") -> Timing:
    """Return a timing of a batch of 3 images of 8x8, in 2 steps if it samples."""
    return Timing(backbone, 8, 4, 5, 3, "cuda", what=task, num_steps=2)


def macs_of(work: list[Work], *units: Unit) -> int:
    return sum(each.macs * each.calls for each in work if not units or each.unit in units)


@pytest.mark.parametrize("backbone", [DIT, DICO, DIS], ids=lambda backbone: backbone.name)
def test_a_trace_has_the_multiply_accumulates_of_the_counter(backbone: Backbone):
    """The counter is at batch 1 and sees attention written out; sampling takes twice the batch."""
    core = count_backbone(Cost(backbone, 8, 4, 5))["macs_core"]
    assert macs_of(trace_timing(timing(backbone))) == 3 * core
    assert macs_of(trace_timing(timing(backbone, "sampling"))) == 2 * 2 * 3 * core


def test_a_training_step_has_two_gradients_of_every_product():
    """Images and frequencies of times need no gradient, so their first layers have one."""
    forward = macs_of(trace_timing(timing(DIT)), Unit.LINEAR, Unit.CONVOLUTION)
    training = macs_of(trace_timing(timing(DIT, "training")), Unit.LINEAR, Unit.CONVOLUTION)
    first_layers = 3 * (16 * 16 * 12 + 256 * 12)
    assert training == 3 * forward - first_layers


def test_the_bytes_of_a_layer_are_those_of_the_closed_form():
    """Under autocast the input is cast once, and what follows the product stays narrow."""
    with torch.device("meta"):
        layer, x = nn.Linear(3, 5), torch.empty(2, 3)
    with torch.no_grad(), Tracer(layer, trains=False) as tracer:
        F.gelu(layer(x))
    operands = 2 * 3 + 3 * 5 + 5 + 2 * 5
    assert tracer.work == Counter(
        [
            Work(Unit.PLAIN, 0, 0, 2 * 3 * (4 + 2)),
            Work(Unit.LINEAR, 2 * 3 * 5, 4 * operands, 2 * operands),
            Work(Unit.PLAIN, 0, 4 * 2 * 10, 2 * 2 * 10),
        ]
    )


def test_weights_are_cast_in_training_alone_and_norms_are_wide():
    """A norm's output is float32, so the next product casts it."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4))
        x = torch.empty(2, 3)
    with torch.no_grad(), Tracer(model, trains=True) as tracer:
        model(x)
    casts = [each.bytes_bf16 for each in tracer.work if not each.bytes]
    assert sorted(casts) == sorted([6 * 2 * 3, 6 * 3 * 4])
    (norm,) = (each for each in tracer.work if each.bytes and each.unit is Unit.PLAIN)
    # The norm reads 8 narrow values and its own 8 weights, and writes 8 values and statistics.
    assert norm.bytes - norm.bytes_bf16 == 2 * 8


def test_fused_operators_count_as_one():
    """Attention and a recurrence have one operator forward and one backward."""
    with torch.device("meta"):
        q = torch.empty(2, 1, 6, 4, requires_grad=True)
        u = torch.empty(1, 3, 7, requires_grad=True)
        a, b = torch.empty(3, 2), torch.empty(1, 2, 7)
        d, bias = torch.empty(3), torch.empty(3)
    with kernels.use(attention="efficient"), Tracer(nn.Identity(), trains=True) as tracer:
        kernels.attention(q, q, q).sum().backward()
        kernels.selective_scan(u, u, a, b, b, d, u, bias).sum().backward()
    attention = Counter({w: n for w, n in tracer.work.items() if w.unit is Unit.ATTENTION})
    products = 2 * 6 * 6 * 4
    assert sorted(work.macs for work in attention.elements()) == [2 * products, 4 * products]
    scans = sorted(work.macs for work in tracer.work if work.unit is Unit.PLAIN and work.macs)
    assert scans == [2 * 3 * 7 * 2, 3 * 2 * 3 * 7 * 2]
    assert u.grad is not None
    assert u.grad.shape == u.shape


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="to predict; known: forward, training, sampling"):
        trace_timing(replace(timing(DIT), what="resting"))
