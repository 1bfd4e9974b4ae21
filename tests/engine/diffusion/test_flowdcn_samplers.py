"""FlowDCN's samplers: a short last step, Heun's method with one evaluation, multistep methods."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.engine.diffusion.flow import Flow
from experiments.engine.diffusion.flow_samplers import Adams
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.diffusion.samplers import bind_sampler, has_uniform_steps
from experiments.engine.specs.spec import Sampler
from tests.support.authors import draw_normal
from tests.support.flows import labels, sample
from tests.support.paths import DATA

# Outputs of the authors' code on a field of sines.
CASE = json.loads((DATA / "outputs_objectives.json").read_text())["flowdcn_sampling"]
NULL = 1000
SAMPLERS = {
    "flowdcn_euler": Sampler("euler_short_last"),
    "flowdcn_heun": Sampler("heun_short_last"),
    "flowdcn_sde": Sampler("sde", form="linear", last_step="euler"),
    "flowdcn_sde_preserve": Sampler("sde", form="half-linear", last_step="euler"),
    "flowdcn_adams2": Sampler("adams2"),
    "flowdcn_adams4": Sampler("adams4"),
}


class GivenNoise:
    """The start, and then noise from the case's own stream."""

    def __init__(self) -> None:
        self.start: Tensor | None = draw_normal(CASE["seeds"]["start"], CASE["shape"]).float()
        self.stream = np.random.Generator(np.random.PCG64(CASE["seeds"]["noise"]))

    def draw(self) -> Tensor:
        start, self.start = self.start, None
        if start is not None:
            return start
        return torch.from_numpy(self.stream.standard_normal(CASE["shape"])).float()


class Field:
    """A velocity with a label and one without, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        wave = torch.sin(2 * x + t.reshape(-1, 1, 1, 1))
        labelled = wave + 0.3 * x.roll(1, dims=1)
        return torch.where((y == NULL).reshape(-1, 1, 1, 1), 0.5 * wave - 0.1 * x, labelled)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_the_authors_code(name: str):
    """Guided on all channels; every step costs one evaluation."""
    field = Field()
    spec = SAMPLERS[name]
    spec = Sampler(spec.name, CASE["num_steps"], form=spec.form, last_step=spec.last_step)
    guided = Guided(field, CASE["scale"], NULL, channels=None)
    end = sample(bind_sampler(spec, Flow("linear")), guided, torch.tensor([3, 5]), GivenNoise())
    assert end.flatten().tolist() == pytest.approx(CASE["outputs"][name], abs=2e-6)
    assert field.calls == CASE["num_steps"]
    assert has_uniform_steps(spec, (0.0, 1.0)) == (spec.name == "sde")


@pytest.mark.parametrize("order", [2, 4])
def test_multistep_methods_integrate_polynomials(order: int):
    """A slope of t^(order - 1) is exact once as many slopes are known; the first steps are not."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (t.double() ** (order - 1)).reshape(-1, 1, 1, 1).expand_as(x)

    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    xs = [start, *Adams(7, order)(model, labels(1), start)]
    moves = [(after - before).item() for before, after in pairwise(xs)]
    ends = [(step / 7) ** order / order for step in range(8)]
    exact = [after - before for before, after in pairwise(ends)]
    assert moves[order - 1 :] == pytest.approx(exact[order - 1 :], abs=1e-7)
    assert abs(moves[0] - exact[0]) > 1e-5


@pytest.mark.parametrize(
    "spec", [Sampler("euler_short_last", 1), Sampler("heun_short_last", 4, last_size=1.0)]
)
def test_impossible_last_steps_are_refused(spec: Sampler):
    with pytest.raises(ValueError, match="takes two steps or more and a size between 0 and 1"):
        sample(bind_sampler(spec, Flow("linear")), Field(), labels(2), torch.zeros(2, 1, 2, 2))
