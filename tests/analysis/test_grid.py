"""Sample grids: images of a run in their own order, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import backbones
from analysis import grid
from analysis.grid import CAPTION, RECORDS, Layout, Subject
from analysis.query import TRAINED, trained_row, trained_rows
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.data.image_files import file_sha256
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling.generate import generate_images
from experiments.engine.specs.spec import spec_id
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.training.networks import load_ema
from experiments.main_results import TABLE_1
from tests.support.networks import randomise

SHORT = replace(
    DIGITS,
    recipe=replace(DIGITS.recipe, steps=1, warmup=1),
    sampler=replace(DIGITS.sampler, num_steps=2),
    num=20,
)
DICO = TABLE_4.rows[0]
CASCADE = TABLE_1.rows[0]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of one step: a row of Table 4, and the cascade of Table 1."""
    folder = tmp_path_factory.mktemp("results")
    store = Store(folder)
    for row in (DICO, CASCADE):
        for training in evaluate_stage(row, SHORT, 0).trainings:
            record = execute(training, store, Resources(device="cpu"))
            assert record.status == "done", record.error
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["grid", *map(str, arguments)])
    monkeypatch.setitem(grid.PROTOCOLS, "digits", SHORT)
    return grid.main()


def read_image(results: Path, name: str) -> Image.Image:
    return Image.open(results / "figures" / "samples" / f"{name}.png")


def test_a_grid_carries_the_caption_that_names_its_run(
    results: Path, monkeypatch: pytest.MonkeyPatch
):
    row = ("--table", 4, "--row", "DiCo-S", "--rows", 1, "--classes", 0, 4)
    assert run(monkeypatch, *row, "--results", results) == 0
    name = "digits_table4_DiCo-S_seed0"
    about = read_image(results, name).info
    record = Store(results).here.latest(train_stage(DICO, SHORT, 0))
    assert record is not None
    for words in (
        record.id,
        record.values["weights_sha256"],
        "DiCo-S of Table 4 on digits, training seed 0",
    ):
        assert words in about[CAPTION]
    assert about[RECORDS] == record.name

    # A second drawing writes the same bytes.
    path = results / "figures" / "samples" / f"{name}.png"
    assert path.with_suffix(".pdf").exists()
    first = path.read_bytes()
    assert run(monkeypatch, *row, "--results", results) == 0
    assert path.read_bytes() == first


def test_a_system_of_three_networks_is_drawn(results: Path, monkeypatch: pytest.MonkeyPatch):
    row = ("--table", 1, "--row", "ADM-U", "--rows", 1, "--classes", 7)
    assert run(monkeypatch, *row, "--results", results) == 0
    about = read_image(results, "digits_table1_ADM-U_seed0").info
    assert len(about[RECORDS].split()) == 3
    assert about[CAPTION].count("weights ") == 3


def save_checkpoint(name: str, file: Path, seed: int) -> list[str]:
    """Save a tiny network of random weights; return the options that describe it."""
    options = backbones.tiny_options_of(name)
    shape = dict(input_size=8, in_channels=1, num_classes=10)
    model = randomise(backbones.build(name, **options, **shape), seed)
    torch.save({"ema": model.state_dict()}, file)
    described = []
    for option, value in options.items():
        described += ["--option", f"{option}={json.dumps(value)}"]
    return described


@pytest.mark.parametrize("name", ["dico_s", "dit_s_2"])
def test_a_published_checkpoint_is_drawn_from_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other weights are other images, and no record is written."""
    shown = []
    for seed in (1, 2):
        # Draw two classes by the weights of a file.
        file = tmp_path / f"{seed}.pt"
        options = save_checkpoint(name, file, seed)
        network = ("--backbone", name, "--checkpoint", file, *options)
        size = ("--rows", 1, "--classes", 0, 4)
        assert run(monkeypatch, *network, *size, "--results", tmp_path) == 0

        # The caption names the file, and no record.
        image = read_image(tmp_path, f"digits_{name}_{file_sha256(file)[:8]}")
        caption = image.info[CAPTION]
        assert f"the published {name} under digits" in caption
        assert f"({file.name}, SHA-256 {file_sha256(file)}, key ema)" in caption
        assert image.info.get(RECORDS, "") == ""
        shown.append(image.tobytes())
    assert shown[0] != shown[1]
    assert not (tmp_path / "records").exists()


def test_the_images_are_those_of_the_evaluation(results: Path):
    """Classes in any choice and order give the images with which the run's evaluation begins."""
    spec = evaluate_stage(DICO, SHORT, 0)
    network = load_ema(spec.train, Store(results).run_dir(spec.train), CPU)
    scored = torch.cat([x for x, _ in generate_images(spec, network, CPU, batch=20)])
    drawn = grid.sample(spec, network, Layout([3, 0, 4, 9], rows=2))
    assert set(drawn) == {(row, label) for row in range(2) for label in (0, 3, 4, 9)}
    for (row, label), image in drawn.items():
        torch.testing.assert_close(image, scored[10 * row + label], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "4", "--row", "DiCo-Z"], "no row 'DiCo-Z'; known: 'DiCo-S'"),
        (
            ["--table", "4", "--row", "DWC 5x5", "--seed", "7"],
            'train it with: python experiments/ablation.py --table 4 --rows "DWC 5x5"',
        ),
        (
            ["--table", "8", "--row", "DiM-H", "--protocol", "imagenet256"],
            "train it with: python experiments/main_results.py "
            '--table 8 --rows "DiM-H" --protocol imagenet256',
        ),
        (
            ["--table", "9", "--row", "MaskGIT"],
            "row 'MaskGIT' of table 9 holds published numbers only",
        ),
        ([], "name --row, or --backbone and --checkpoint"),
        (["--row", "DiCo-S", "--key", "ema"], "--key and --option are for a checkpoint"),
        (["--backbone", "dico_s"], "--backbone and --checkpoint go together"),
        (
            ["--backbone", "dico_s", "--checkpoint", "none.pt", "--row", "DiCo-S"],
            "go together, and without --table, --row and --seed",
        ),
        (["--backbone", "dico_s", "--checkpoint", "none.pt"], "none.pt: no such checkpoint"),
        (["--table", "4", "--row", "DiCo-S", "--classes", "10"], "--classes labels from 0 to 9"),
    ],
)
def test_what_does_not_exist_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(monkeypatch, *arguments, "--results", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", TRAINED)
def test_every_row_with_a_network_can_be_asked_for(number: int):
    table = TRAINED[number]
    labels = trained_rows(table).keys()
    assert labels
    assert [trained_row(table, label).label for label in labels] == list(labels)
    assert {row.label for row in table.rows if row.backbone} <= labels


def test_guidance_of_another_scale_has_a_file_of_its_own():
    subject = Subject(evaluate_stage(DICO, DIGITS, 0), "digits_a_row", "a row")
    scaled = grid.with_scale(subject, 1.5)
    assert scaled.name == "digits_a_row_scale1.5"
    assert spec_id(scaled.spec) != spec_id(subject.spec)


def test_latents_without_their_decoder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DICO_VAE", str(tmp_path / "none"))
    subject = Subject(evaluate_stage(DICO, IMAGENET256, 0), "a", "a row")
    with pytest.raises(ValueError, match="VAE .* is neither"):
        grid.draw(subject, Layout([0, 1], rows=2), Store(tmp_path))
