"""The probes' command line, their records and arrays, and the figures that read them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analysis.figures import probes as figures_probes
from analysis.figures.style import figure, save
from analysis.probes.__main__ import main
from analysis.probes.declared import PROBES, Channels, arrays_of, declared
from analysis.query import TRAINED, trained_rows
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, DIGITS_WHOLE, PROTOCOLS
from experiments.engine.records.store import Record, Store
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.specs.rows import Row
from experiments.engine.specs.spec import Evaluate, spec_id
from experiments.engine.specs.stages import Protocol, evaluate_stage, train_stage
from experiments.engine.training import checkpoint
from experiments.engine.training.networks import build

DICO = TABLE_4.rows[0]
CPU = torch.device("cpu")


def network() -> nn.Module:
    return build(train_stage(DICO, DIGITS, 0).backbone, 0, CPU)


def save_as_finished(model: nn.Module, results: Path) -> None:
    """Store weights as the last checkpoint of DiCo-S on digits."""
    spec = train_stage(DICO, DIGITS, 0)
    folder = Store(results).run_dir(spec) / "checkpoints"
    checkpoint.save(folder, spec.recipe.steps, {"ema": model.state_dict()})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run of DiCo-S: random weights, stored as its last step's."""
    root = tmp_path_factory.mktemp("results")
    model = network()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_as_finished(model, root)
    return root


def probe(results: Path, name: str, *options: str) -> int:
    row = ("--table", "4", "--rows", "DiCo-S")
    size = ("--images", "1", "--steps", "2")
    return main([name, *options, *row, *size, "--results", str(results)])


def records_of(results: Path, kind: str) -> list[Record]:
    return [record for record in Store(results).here.all() if record.kind == kind]


@pytest.mark.parametrize("name", ["locality", "channels", "features"])
def test_a_probe_writes_a_record_and_its_arrays_once(
    results: Path, capsys: pytest.CaptureFixture[str], name: str
):
    options = ("--gradients", "1") if name == "locality" else ()
    assert probe(results, name, *options) == 0
    (record,) = records_of(results, name)
    assert record.id in capsys.readouterr().out
    assert record.spec["images"] == 1
    assert record.provenance["weights_sha256"]

    folder = results / "records" / name
    with np.load(folder / record.values["arrays"], allow_pickle=False) as arrays:
        assert len(arrays["timesteps"]) == 2
        for key in arrays.files:
            if arrays[key].dtype.kind == "f":
                assert np.isfinite(arrays[key]).all(), key

    # A second run finds the record.
    assert probe(results, name, *options) == 0
    assert "done before" in capsys.readouterr().out


def test_equal_arrays_of_a_repeated_probe_are_one_file(results: Path):
    folder = results / "records" / "channels"
    assert probe(results, "channels", "--again") == 0
    names = {path.name for path in folder.glob("*.npz")}
    assert probe(results, "channels", "--again") == 0
    assert {path.name for path in folder.glob("*.npz")} == names


def test_anchors_are_chosen_and_all_of_them_drawn(results: Path):
    """Anchors are fractions of the grid; each has its map, and its frame in the figure."""
    anchors = ("0,0", "0.25,1", "0.5,0.5")
    assert probe(results, "locality", "--gradients", "0", "--anchors", *anchors) == 0
    records = records_of(results, "locality")
    (record,) = [record for record in records if len(record.spec["anchors"]) == 3]
    arrays = arrays_of(Store(results).here, record)
    height, width = arrays["grid_0"]
    tokens = [[0, 0], [height // 4, width - 1], [height // 2, width // 2]]
    assert arrays["anchors_0"].tolist() == tokens
    assert arrays["maps_0"].shape[2:] == (3, height, width)

    # Every map is drawn, with a red frame around its own token.
    panel = figure(1, 1)[1]
    figures_probes.draw_maps([panel], figures_probes.Probed("DiCo-S", arrays, {}))
    red = [patch for patch in panel.patches if patch.get_edgecolor()[:3] == (1, 0, 0)]
    drawn = []
    for patch, image in zip(red, panel.images, strict=True):
        drawn.append((patch.get_y(), patch.get_x() - image.get_extent()[0]))
    assert drawn == [(row, pytest.approx(column)) for row, column in tokens]


def test_weights_that_a_later_training_replaced_are_probed_anew(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = shutil.copytree(results, tmp_path / "results")
    assert probe(own, "features") == 0
    training = declared("features", DICO, DIGITS, 0).train
    Store(own).append(training, "done", {"weights_sha256": "of another training"}, {})
    capsys.readouterr()
    assert probe(own, "features") == 0
    assert "done before" not in capsys.readouterr().out


def weights_of_record(record: Record) -> str:
    if record.kind == "evaluate":
        return record.values["manifest"]["model"]["weights_sha256"]
    return record.provenance["weights_sha256"]


def weights_of_training(record: Record) -> str:
    return record.values["weights_sha256"]


def specs_of_training(evaluate: Evaluate, row: Row, protocol: Protocol, seed: int) -> list[Any]:
    """Return the probes of a training, and its score if it is of this one network."""
    specs: list[Any] = [declared(name, row, protocol, seed) for name in PROBES]
    if evaluate.trainings == evaluate.train.trainings:
        specs.append(evaluate)
    return specs


@pytest.mark.slow
def test_committed_probes_and_scores_are_of_the_committed_weights():
    """A system's score names the weights of all its networks together and is left out."""
    store = Store()
    num_checked = 0
    others = set()
    tables = TRAINED.values()
    for table, protocol, seed in itertools.product(tables, PROTOCOLS.values(), REFERENCE_SEEDS):
        for row in trained_rows(table).values():
            evaluate = evaluate_stage(row, protocol, seed)
            training = store.reference.latest(evaluate.train)

            # Whatever is recorded of a row, protocol and seed names the training's weights.
            for spec in specs_of_training(evaluate, row, protocol, seed):
                record = store.reference.latest(spec)
                if record is None:
                    continue
                num_checked += 1
                if training is None or weights_of_record(record) != weights_of_training(training):
                    others.add(record.name)
    assert num_checked > 100
    assert not others


def test_rows_that_are_not_trained_are_named_with_the_command_that_trains_them(
    results: Path, capsys: pytest.CaptureFixture[str]
):
    row = ["--table", "4", "--rows", "w/o CCA"]
    assert main(["channels", *row, "--results", str(results)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    command = 'experiments/ablation.py --table 4 --rows "w/o CCA" --protocol digits --seeds 0'
    assert f"train with: python {command}" in line


BAD_ANCHORS = ("0.5", "a,b", "0,1.5", "nan,0", "0,0,0", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("locality", "name exactly one of --table"),
        ("locality --table 4 --rows none", "has no row 'none'"),
        ("locality --rows none", "no table has a network as row 'none'"),
        ("locality --rows ADM-U", "say which with --table"),
        ("locality --rows DiCo-S", "not trained here: DiCo-S"),
        ("channels --table 4 --gradients 2", "belongs to locality"),
        ("channels --table 4 --steps 0", "--steps takes a number from 1 on"),
        ("locality --checkpoint gone.pt --backbone dico_s", "no such checkpoint"),
        ("features --diffusers gone", "locality alone"),
        ("channels --table 4 --anchors 0,0", "--anchors belongs to locality"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main([*arguments.split(), "--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("text", BAD_ANCHORS)
def test_bad_anchors_are_one_line(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    row = ["--table", "4", "--anchors", "0,1", text]
    assert main(["locality", *row, "--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"such as 0.5,0.25, not {text!r}" in line


def test_weights_that_are_nan_leave_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = network()
    nn.init.constant_(model.x_embedder.proj.weight, torch.nan)
    save_as_finished(model, tmp_path)
    assert probe(tmp_path, "channels") == 2
    assert "not finite" in capsys.readouterr().err
    assert not list((tmp_path / "records").rglob("*.json"))


def test_too_little_memory_says_what_to_do(results: Path, capsys: pytest.CaptureFixture[str]):
    row = ["--table", "4", "--rows", "DiCo-S", "--images", "400", "--steps", "2"]
    assert main(["locality", *row, "--memory", "1", "--results", str(results)]) == 2
    assert "allow more with --memory" in capsys.readouterr().err


def test_a_published_checkpoint_is_probed_by_its_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The network has DiCo-S's published size, since a checkpoint is loaded into that."""
    published = train_stage(DICO, DIGITS, 0).backbone.but(dim=128, depths=(5, 4, 4, 4, 4))
    state = build(published, 0, CPU).state_dict()
    file = tmp_path / "dico.pt"
    torch.save({name: torch.randn_like(tensor) * 0.02 for name, tensor in state.items()}, file)

    # Its record holds the checksum of its weights.
    size = ["--images", "1", "--steps", "2", "--results", str(tmp_path)]
    assert main(["channels", "--checkpoint", str(file), "--backbone", "dico_s", *size]) == 0
    (path,) = (tmp_path / "records" / "channels").glob("*.json")
    assert len(json.loads(path.read_text())["spec"]["weights"]) == 64

    # Another network does not take it.
    assert main(["channels", "--checkpoint", str(file), "--backbone", "dit_s_2", *size]) == 2
    assert "checkpoint of another model" in capsys.readouterr().err


def test_ids_of_probes_are_pinned():
    assert spec_id(declared("locality", DICO, DIGITS_WHOLE, 0)) == "0a89491fc83e90aa"
    assert spec_id(declared("channels", DICO, DIGITS_WHOLE, 0)) == "7a53ce09adcc3741"
    assert spec_id(declared("features", DICO, DIGITS_WHOLE, 0)) == "3f7941c83bc0ec0a"
    assert isinstance(declared("channels", DICO, DIGITS, 0), Channels)


@pytest.mark.slow
def test_figures_are_the_same_bytes_twice(tmp_path: Path):
    for folder in ("first", "second"):
        save(figures_probes.channel_activation(Store()), tmp_path / folder, "figure")
    for form in ("png", "pdf"):
        first = (tmp_path / "first" / f"figure.{form}").read_bytes()
        assert first == (tmp_path / "second" / f"figure.{form}").read_bytes(), form


def test_a_figure_without_records_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no reference record of features on digits"):
        figures_probes.feature_maps(Store(tmp_path))


def test_damaged_arrays_are_refused(results: Path):
    assert probe(results, "features", "--again") == 0
    record = records_of(results, "features")[-1]
    path = results / "records" / "features" / record.values["arrays"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        arrays_of(Store(results).here, record)
    path.unlink()
    with pytest.raises(ValueError, match="missing beside its record"):
        arrays_of(Store(results).here, record)
