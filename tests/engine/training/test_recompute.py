"""Blocks that are computed again: the same bits with fewer kept tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from experiments.engine.data.sets import ImageSet
from experiments.engine.numerics.recompute import recompute_blocks
from experiments.engine.runtime.context import Resources
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train
from experiments.engine.training.networks import build
from experiments.engine.training.trainer import Trainer

DATA = Data("random", 8, 4, 5)
NETWORKS = {
    "dit_s_2": dict(dim=12, depth=2, heads=2),
    "dico_s": dict(dim=8, depths=(2, 1, 1, 1, 1)),
    "dis_s_2": dict(dim=12, depth=2),
    "dic_s": dict(dim=12, depths=(2, 1, 1, 1, 2)),
}


def spec_of(name: str) -> Train:
    options = NETWORKS[name] | dict(input_size=8, in_channels=4, num_classes=5)
    return Train(Backbone(name, options), DATA, Recipe(steps=2, batch=3))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_has_the_same_bits(name: str):
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(7, 4, 8, 8, generator=draw).numpy()
    labels = (torch.arange(7) % 5).numpy()

    trained = []
    for recompute in (False, True):
        trainer = Trainer(spec_of(name), Resources(recompute=recompute))
        losses = [loss.item() for loss in trainer.steps(ImageSet(images, labels, DATA))]
        trained.append((losses, trainer.model.state_dict(), trainer.ema.state_dict()))

    (losses, weights, averages), (again, same_weights, same_averages) = trained
    assert losses == again
    assert all(torch.equal(weights[key], same_weights[key]) for key in weights)
    assert all(torch.equal(averages[key], same_averages[key]) for key in averages)


@pytest.mark.parametrize("name", ["dit_s_2", "dic_s"])
def test_fewer_bytes_are_kept_for_the_backward_pass(name: str):
    kept = []
    for recompute in (False, True):
        model = build(spec_of(name).backbone, 0, torch.device("cpu"))
        if recompute:
            recompute_blocks(model)
        storages: dict[int, Tensor] = {}

        def keep(x: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x
            return x

        x, t = torch.randn(3, 4, 8, 8), torch.zeros(3, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(x, t, t)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(x.nbytes for at, x in storages.items() if at not in weights))
    assert kept[1] < 0.7 * kept[0]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks to compute again"):
        recompute_blocks(nn.Linear(2, 2))
