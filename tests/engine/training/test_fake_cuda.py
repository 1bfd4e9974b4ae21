"""A training step of every family on a GPU that is not here: no wait, nothing elsewhere, types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.engine.diffusion.distillation import objective
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Cost, Data, Diffusion, Recipe, Train
from experiments.engine.timing.networks import training_diffusion
from experiments.engine.training import trainer as trainer_module
from experiments.engine.training.networks import build
from experiments.engine.training.trainer import Trainer
from tests.support.fake_cuda import CUDA, OnCuda, Watch, fake_cuda, move, really
from tests.support.networks import CLASSES, FAMILIES, Case

# A deep copy, as of the average, asks a tensor for its address.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
# Objectives of networks that have one of their own, and of flows.
OWN = {
    "DiMR": Diffusion(variance="fixed", scales=(0.3, 0.5, 1.0)),
    "DyDiT": Diffusion(used_share=0.5, share_steps=1, complete_steps=1),
    "SiT": Diffusion("flow", times="logit_normal", direction=1.0),
    "DiMSUM": Diffusion("flow", path="gvp"),
    "FlowDCN": Diffusion("flow"),
    "LightningDiT": Diffusion("flow"),
}
RECIPE = Recipe(steps=10, batch=2, precision="bf16", grad_clip=1.0, power_snapshots=2)


def train_of(name: str, case: Case) -> Train:
    """Return a training of a case by the objective of its family."""
    network = Cost(
        Backbone(case.name, case.options), case.size, case.options["in_channels"], CLASSES
    )
    data = Data("random", case.size, case.image_channels, CLASSES, flip=True)
    with torch.device("meta"):
        model = case.build()
    return Train(
        network.backbone, data, RECIPE, OWN.get(name) or training_diffusion(network, model)
    )


def step(
    spec: Train, patch: pytest.MonkeyPatch, steps: int = 1, micro_batch: int | None = None
) -> tuple[Trainer, Watch]:
    """Make training steps under watch, from the draws to the averages."""
    patch.setattr(trainer_module, "generator_at", lambda *place, device: OnCuda())
    patch.setattr(objective, "build_diffusion", really(objective.build_diffusion))
    model = build(spec.backbone, 0, torch.device("cpu"))
    data, batch = spec.data, spec.recipe.batch
    with fake_cuda():
        resources = Resources("cuda", watch_every=0, micro_batch=micro_batch)
        trainer = Trainer(spec, resources, model=move(model))
        x0 = torch.empty(batch, data.channels, data.size, data.size, device=CUDA)
        y = torch.zeros(batch, dtype=torch.long, device=CUDA)
        with Watch() as watch:
            for _ in range(steps):
                loss = trainer._update(x0, y, data.flip)
                trainer.step += 1
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    return trainer, watch


def check_state(trainer: Trainer) -> None:
    """Weights, gradients, averages and the optimiser's state are float32 on the GPU."""
    kept = [*trainer.model.parameters(), *trainer.ema.parameters()]
    kept += [p.grad for p in trainer.model.parameters() if p.grad is not None]
    for state in trainer.optimizer.state.values():
        kept += state.values()
    assert {(x.device.type, x.dtype) for x in kept} == {("cuda", torch.float32)}
    assert trainer.optimizer.state


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "DiT" else pytest.mark.slow) for n in FAMILIES],
)
def test_a_training_step_stays_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch):
    trainer, watch = step(train_of(name, FAMILIES[name]), monkeypatch)
    check_state(trainer)
    assert torch.bfloat16 in watch.products


@pytest.mark.parametrize("mode", ["fp32", "tf32", "as_published"])
def test_other_modes_multiply_in_float32(mode: str, monkeypatch: pytest.MonkeyPatch):
    spec = train_of("DiT", FAMILIES["DiT"])
    recipe = replace(spec.recipe, precision=mode)
    _, watch = step(replace(spec, recipe=recipe), monkeypatch)
    assert watch.products == {torch.float32}


@pytest.mark.slow
def test_later_steps_accumulation_and_stochastic_depth_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
):
    spec = train_of("DiS", FAMILIES["DiS"])
    spec = replace(spec, recipe=replace(RECIPE, warmup=1, drop_path=0.2))
    trainer, _ = step(spec, monkeypatch, steps=2, micro_batch=1)
    check_state(trainer)
    assert trainer.step == 2
