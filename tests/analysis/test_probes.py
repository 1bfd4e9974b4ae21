"""The probes' command line on a run of one step, their records and arrays, and the figures that read them."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from analysis.figures import probes as figures_probes
from analysis.figures.style import figure, save
from analysis.probes.__main__ import main
from analysis.probes.declared import PROBES, Channels, arrays_of, declared
from analysis.query import TRAINED, trained_rows
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, PROTOCOLS
from experiments.engine.records.store import Store
from experiments.engine.reporting.lookup import REFERENCE_SEEDS
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.training import checkpoint
from experiments.engine.training.trainer import build

DICO = TABLE_4.rows[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with DiCo-S as finished as it gets without training: random weights under the last step's name."""
    root = tmp_path_factory.mktemp("results")
    spec = train_stage(DICO, DIGITS, 0)
    model = build(spec.backbone, 0, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(
        Store(root).run_dir(spec) / "checkpoints", spec.recipe.steps, {"ema": model.state_dict()}
    )
    return root


def probe(results, *arguments: str) -> int:
    return main(
        [
            *arguments,
            "--table",
            "4",
            "--rows",
            "DiCo-S",
            "--images",
            "2",
            "--steps",
            "2",
            "--results",
            str(results),
        ]
    )


@pytest.mark.parametrize("name", ["locality", "channels", "features"])
def test_a_probe_writes_a_record_and_its_arrays_once(results, capsys, name: str):
    more = ("--gradients", "2") if name == "locality" else ()
    assert probe(results, name, *more) == 0
    first = capsys.readouterr().out
    (path,) = (results / "records" / name).glob("*.json")
    record = json.loads(path.read_text())
    assert (
        record["kind"] == name
        and record["id"] in first
        and record["spec"]["images"] == 2
        and record["provenance"]["weights_sha256"]
    )
    with np.load(
        results / "records" / name / record["values"]["arrays"], allow_pickle=False
    ) as arrays:
        assert len(arrays["timesteps"]) == 2 and all(
            np.isfinite(arrays[key]).all() for key in arrays.files if arrays[key].dtype.kind == "f"
        )
    assert probe(results, name, *more) == 0 and "done before" in capsys.readouterr().out
    names = {path.name for path in (results / "records" / name).glob("*.npz")}
    assert probe(results, name, *more, "--again") == 0
    assert {
        path.name for path in (results / "records" / name).glob("*.npz")
    } == names  # equal arrays are one file


def test_anchors_are_chosen_and_all_of_them_drawn(results, capsys):
    assert (
        probe(results, "locality", "--gradients", "0", "--anchors", "0,0", "0.25,1", "0.5,0.5") == 0
    )
    store = Store(results)
    (record,) = [
        record
        for records in store.here.by_id().values()
        for record in records
        if record.kind == "locality" and len(record.spec["anchors"]) == 3
    ]
    arrays = arrays_of(store, record)
    height, width = arrays["grid_0"]
    assert arrays["anchors_0"].tolist() == [
        [0, 0],
        [height // 4, width - 1],
        [height // 2, width // 2],
    ] and arrays["maps_0"].shape[2:] == (3, height, width)
    panel = figure(1, 1)[1]
    figures_probes._draw_maps([panel], "DiCo-S", arrays)
    red = [patch for patch in panel.patches if patch.get_edgecolor()[:3] == (1, 0, 0)]
    assert len(panel.images) == len(red) == 3
    assert [
        (patch.get_y(), patch.get_x() - image.get_extent()[0])
        for patch, image in zip(red, panel.images, strict=True)
    ] == [(row, pytest.approx(column)) for row, column in arrays["anchors_0"]]


def test_a_probe_of_weights_that_a_later_training_replaced_is_made_anew(results, tmp_path, capsys):
    own = shutil.copytree(results, tmp_path / "results")
    assert probe(own, "features") == 0
    Store(own).append(
        declared("features", DICO, DIGITS, 0).train,
        "done",
        {"weights_sha256": "of another training"},
        {},
    )
    capsys.readouterr()
    assert probe(own, "features") == 0 and "done before" not in capsys.readouterr().out


def test_committed_probes_and_scores_are_of_the_committed_weights():
    """Of every row that is one network; a system's score names the weights of all its networks together."""
    store, seen, others = Store(), 0, set()
    for table in TRAINED.values():
        for row, protocol, seed in itertools.product(
            trained_rows(table).values(), PROTOCOLS.values(), REFERENCE_SEEDS
        ):
            evaluate = evaluate_stage(row, protocol, seed)
            trained = store.reference.latest(evaluate.train)
            alone = evaluate.trainings == evaluate.train.trainings
            for spec in (evaluate, *(declared(probe, row, protocol, seed) for probe in PROBES)):
                if (record := store.reference.latest(spec)) and (alone or spec is not evaluate):
                    told = (
                        record.values["manifest"]["model"]
                        if spec is evaluate
                        else record.provenance
                    )
                    seen += 1
                    others |= (
                        {record.name}
                        if trained is None
                        or told["weights_sha256"] != trained.values["weights_sha256"]
                        else set()
                    )
    assert seen > 100 and not others


def test_rows_that_are_not_trained_here(results, capsys):
    assert main(["channels", "--table", "4", "--rows", "w/o CCA", "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert (
        'train with: python experiments/ablation.py --table 4 --rows "w/o CCA" --protocol digits --seeds 0'
        in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["locality"], "name one of --table"),
        (["locality", "--table", "4", "--rows", "none"], "has no row 'none'"),
        (["locality", "--rows", "none"], "no table has a network as row 'none'"),
        (["locality", "--rows", "ADM-U"], "say which with --table"),
        (["locality", "--rows", "DiCo-S"], "not trained here: DiCo-S"),
        (["channels", "--table", "4", "--gradients", "2"], "belongs to locality"),
        (["channels", "--table", "4", "--steps", "0"], "--steps takes a number from 1 on"),
        (["locality", "--checkpoint", "gone.pt", "--backbone", "dico_s"], "no such checkpoint"),
        (["features", "--diffusers", "gone"], "locality alone"),
        (["channels", "--table", "4", "--anchors", "0,0"], "--anchors belongs to locality"),
        *(
            (
                ["locality", "--table", "4", "--anchors", "0,1", text],
                f"such as 0.5,0.25, not {text!r}",
            )
            for text in ("0.5", "a,b", "0,1.5", "nan,0", "0,0,0", "")
        ),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, message):
    assert main([*arguments, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.rglob("*.json"))


def test_too_little_memory_and_weights_that_are_nan_leave_no_record(results, tmp_path, capsys):
    spec = train_stage(DICO, DIGITS, 0)
    model = build(spec.backbone, 0, torch.device("cpu"))
    torch.nn.init.constant_(model.x_embedder.proj.weight, torch.nan)
    checkpoint.save(
        Store(tmp_path).run_dir(spec) / "checkpoints",
        spec.recipe.steps,
        {"ema": model.state_dict()},
    )
    assert probe(tmp_path, "channels") == 2 and "not finite" in capsys.readouterr().err
    assert (
        main(
            [
                "locality",
                "--table",
                "4",
                "--rows",
                "DiCo-S",
                "--images",
                "400",
                "--steps",
                "2",
                "--memory",
                "1",
                "--results",
                str(results),
            ]
        )
        == 2
    )
    assert "allow more with --memory" in capsys.readouterr().err
    assert not list((tmp_path / "records").rglob("*.json"))


def test_a_published_checkpoint(tmp_path, capsys):
    weights = build(
        train_stage(DICO, DIGITS, 0).backbone.but(dim=128, depths=(5, 4, 4, 4, 4)),
        0,
        torch.device("cpu"),
    ).state_dict()
    torch.save(
        {name: torch.randn_like(tensor) * 0.02 for name, tensor in weights.items()},
        tmp_path / "dico.pt",
    )
    assert (
        main(
            [
                "channels",
                "--checkpoint",
                str(tmp_path / "dico.pt"),
                "--backbone",
                "dico_s",
                "--images",
                "1",
                "--steps",
                "2",
                "--results",
                str(tmp_path),
            ]
        )
        == 0
    )
    (path,) = (tmp_path / "records" / "channels").glob("*.json")
    assert len(json.loads(path.read_text())["spec"]["weights"]) == 64
    assert (
        main(
            [
                "channels",
                "--checkpoint",
                str(tmp_path / "dico.pt"),
                "--backbone",
                "dit_s_2",
                "--results",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert "checkpoint of another model" in capsys.readouterr().err


def test_ids_of_probes_are_pinned():
    assert spec_id(declared("channels", DICO, DIGITS, 0)) == "7a53ce09adcc3741"
    assert spec_id(declared("features", DICO, DIGITS, 0)) == "3f7941c83bc0ec0a"
    assert isinstance(declared("channels", DICO, DIGITS, 0), Channels)


def test_figures_are_the_same_bytes_twice(tmp_path):
    store = Store()
    for folder in ("a", "b"):
        save(figures_probes.channel_activation(store), tmp_path / folder, "figure")
    assert all(
        (tmp_path / "a" / f"figure.{form}").read_bytes()
        == (tmp_path / "b" / f"figure.{form}").read_bytes()
        for form in ("png", "pdf")
    )


def test_a_figure_without_records_says_so(tmp_path):
    with pytest.raises(ValueError, match="no reference record of features on digits"):
        figures_probes.feature_maps(Store(tmp_path))


def test_damaged_arrays_are_refused(results):
    assert probe(results, "features", "--again") == 0
    store = Store(results)
    record = [
        record
        for records in store.here.by_id().values()
        for record in records
        if record.kind == "features"
    ][-1]
    path = results / "records" / "features" / record.values["arrays"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="damaged"):
        arrays_of(store, record)
    path.unlink()
    with pytest.raises(ValueError, match="missing beside its record"):
        arrays_of(store, record)
