"""A training keeps two power-function averages, from which others are rebuilt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.engine.data.sets import load
from experiments.engine.numerics.power_average import decay_at
from experiments.engine.records.manifest import declared
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling.networks import load_networks
from experiments.engine.specs.spec import Checkpoint, Evaluate, Sampler, canonical, spec_id
from experiments.engine.training import averages
from experiments.engine.training.averages import load_power_average, update_average
from experiments.engine.training.networks import build
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from tests.support.trainings import CPU, DICO, SPEC, STEPS

NUM = 7
KEPT = replace(SPEC, recipe=replace(SPEC.recipe, power_snapshots=NUM))
EVERY_3 = Resources(checkpoint_every=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_training(KEPT, RunContext(folder, EVERY_3))
    return folder


def stored(folder: Path) -> list[str]:
    """Names of the stored averages, which hold their digests."""
    return sorted(path.name for path in (folder / averages.FOLDER).iterdir())


def evaluation(width: float | None) -> Evaluate:
    return Evaluate(KEPT, Sampler(num_steps=2), 4, "digits", average=width)


def test_old_trainings_keep_nothing_and_their_ids(tmp_path: Path):
    values = run_training(replace(SPEC, recipe=replace(SPEC.recipe, steps=2)), RunContext(tmp_path))
    assert "power_averages" not in values
    assert not (tmp_path / averages.FOLDER).exists()
    assert "power_snapshots" not in str(canonical(SPEC))
    assert spec_id(KEPT) != spec_id(SPEC)
    assert spec_id(evaluation(0.1)) != spec_id(evaluation(None))


def test_the_averages_change_nothing_of_the_training(finished: Path, tmp_path: Path):
    values = run_training(SPEC, RunContext(tmp_path, EVERY_3))
    again = run_training(KEPT, RunContext(finished, EVERY_3))
    assert again["weights_sha256"] == values["weights_sha256"]
    assert again["power_averages"]["steps"] == [2, 4, 6, 8, 10, 12, 14]


def test_a_resumed_training_stores_the_same_bits(finished: Path, tmp_path: Path):
    """The run was killed after step 12, before what came later was on disk."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in (*folder.glob("checkpoints/step-*14-*"), *folder.glob("averages/step-*14-*")):
        path.unlink()
    assert len(stored(folder)) == NUM - 1
    assert run_training(KEPT, RunContext(folder, EVERY_3))["resumed_at"] == 12
    assert stored(folder) == stored(finished)


def test_a_rebuilt_average_is_the_directly_kept_one_within_the_published_error(finished: Path):
    """Kept widths come back to rounding, and their parts never hold the initial weights."""
    trainer = Trainer(KEPT)
    widths = (0.05, 0.075, 0.10, 0.15, 0.20)
    names = [name for name, _ in trainer.model.named_parameters()]
    direct = {
        width: [torch.full_like(p, 99.0, dtype=torch.float64) for p in trainer.model.parameters()]
        for width in widths
    }
    for _ in trainer.steps(load(KEPT.data)):
        weights = [p.detach().double() for p in trainer.model.parameters()]
        for width, average in direct.items():
            update_average(average, weights, decay_at(width, trainer.step))

    last = torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])
    for width, average in direct.items():
        model = build(KEPT.backbone, KEPT.seed, CPU)
        rebuilt = load_power_average(model, KEPT, finished, width)
        state = model.state_dict()
        by_fit = torch.cat([state[name].flatten().double() for name in names])
        expected = torch.cat([tensor.flatten() for tensor in average])
        error = (by_fit - expected).norm() / (expected - last).norm()
        assert error < max(rebuilt.error, 1e-4), width


def test_evaluations_load_the_average_that_they_name(finished: Path):
    context = RunContext(finished)
    by_decay = load_networks(evaluation(None), context)
    narrow, wide = (load_networks(evaluation(width), context) for width in (0.02, 0.2))
    assert by_decay.warnings == wide.warnings == ()
    assert "rebuilt with 27% of error in its profile from 7 snapshots" in narrow.warnings[0]
    parameters = [next(loaded.network.parameters()) for loaded in (by_decay, narrow, wide)]
    assert not torch.equal(parameters[0], parameters[1])
    assert not torch.equal(parameters[1], parameters[2])
    manifest = declared(canonical(evaluation(0.2), full=True))
    assert manifest["model"]["average"] == {"power_width": 0.2}


def test_the_share_of_first_weights_is_said_and_warned_of():
    """Decay 0.99 over a quarter of 650 steps leaves a fifth."""
    recipe = replace(SPEC.recipe, steps=162, ema=0.99)
    share = averages.initial_share(recipe)
    assert share == pytest.approx(0.196, abs=1e-3)
    assert averages.warn_of_initial_share(share)[0].startswith("19.6% of the average are still")
    assert averages.warn_of_initial_share(0.009) == []
    assert averages.initial_share(recipe, 0.1) == 0


@pytest.mark.parametrize(
    "spec, width, complaint",
    [
        (SPEC, 0.1, "kept no power-function averages"),
        (KEPT, 0.3, "above 0 and below 0.2887"),
        (Checkpoint(DICO, SPEC.data, "0" * 64), 0.1, "holds one average"),
    ],
)
def test_averages_that_cannot_be_rebuilt_are_refused(
    spec, width: float, complaint: str, finished: Path
):
    with pytest.raises(ValueError, match=complaint):
        load_networks(replace(evaluation(width), train=spec), RunContext(finished))


def test_a_missing_or_damaged_average_is_named(finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (path,) = folder.glob("averages/step-*08-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="lacks intact averages of step 8"):
        load_networks(evaluation(0.1), RunContext(folder))


def test_more_snapshots_than_steps_are_refused(tmp_path: Path):
    spec = replace(KEPT, recipe=replace(KEPT.recipe, power_snapshots=STEPS + 1))
    with pytest.raises(ValueError, match="0 to 14 times, not 15 times"):
        run_training(spec, RunContext(tmp_path))
    assert not list(tmp_path.iterdir())
