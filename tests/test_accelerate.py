"""Compiled networks compute what they computed, in training and sampling; graphs ask for a GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_train import CPU, DICO, DIGITS

from experiments.engine.capture import Captured, accelerate
from experiments.engine.data import load
from experiments.engine.spec import Backbone, Recipe, Train
from experiments.engine.timing import fill
from experiments.engine.train import Trainer, build, digest


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        accelerate(build(DICO, 0, CPU), compiled=False, graphs=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_compute_what_they_computed():
    model, compiled = (build(DICO, 0, CPU).eval() for _ in range(2))
    fill(model)
    fill(compiled)
    accelerate(compiled, compiled=True, graphs=False)
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected, out = model(*inputs), compiled(*inputs)
    assert (out - expected).norm() < 1e-5 * expected.norm() and digest(model) == digest(compiled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_has_the_same_losses():
    spec = Train(DICO, DIGITS, Recipe(steps=4, batch=16, lr=1e-3))
    eager, compiled = (torch.stack(list(Trainer(spec, CPU, compiled=flag).steps(load(DIGITS)))) for flag in (False, True))
    assert eager.isfinite().all() and (compiled - eager).abs().max() < 1e-4 * eager.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_network_computes_what_it_computed_for_every_shape_and_mode():
    model = build(DICO, 0, torch.device("cuda")).eval()
    fill(model)
    captured = Captured(model)
    for n, mode in ((3, False), (5, False), (3, True), (3, False)):
        inputs = torch.randn(n, 1, 8, 8, device="cuda"), torch.arange(n, device="cuda"), torch.arange(n, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, mode):
            assert torch.allclose(captured(*inputs), model(*inputs), rtol=1e-2 if mode else 1e-4, atol=1e-2 if mode else 1e-5)
    assert len(captured.graphs) == 3


@pytest.mark.parametrize("network", [DICO, Backbone("dit_s_2", dict(depth=1, dim=384)), Backbone("hourglass", dict(dim=8, depths=(1, 1, 1, 1, 1)))], ids=lambda b: b.name)
def test_a_network_compiles_as_one_graph(network: Backbone):
    """Where the compiler has to stop, at the choice of a kernel for example, it loses what it is for."""
    model = build(network.but(input_size=16, in_channels=4, num_classes=10), 0, CPU)
    found = torch._dynamo.explain(model)(torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.tensor([1, 2]))
    assert (found.graph_count, found.graph_break_count) == (1, 0), [str(reason.reason)[:200] for reason in found.break_reasons]
