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
from analysis.query import TRAINED, trained_row, trained_rows
from experiments.ablation import TABLE_4
from experiments.declared.protocols import DIGITS, IMAGENET256
from experiments.engine.data.image_files import file_sha256
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling import generate
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.training.trainer import load_ema
from experiments.main_results import TABLE_1
from tests.support.networks import randomise

SHORT = replace(
    DIGITS,
    recipe=replace(DIGITS.recipe, steps=2, warmup=1),
    sampler=replace(DIGITS.sampler, num_steps=2),
    num=20,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of two steps: a row of Table 4, and the cascade of Table 1's."""
    folder = tmp_path_factory.mktemp("results")
    store = Store(folder)
    for row in (TABLE_4.rows[0], TABLE_1.rows[0]):
        for training in evaluate_stage(row, SHORT, 0).trainings:
            assert execute(training, store, Resources(device="cpu")).status == "done"
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["grid", *map(str, arguments)])
    monkeypatch.setitem(grid.PROTOCOLS, "digits", SHORT)
    return grid.main()


def test_a_grid_carries_the_caption_that_names_its_run(
    results: Path, monkeypatch: pytest.MonkeyPatch
):
    assert (
        run(
            monkeypatch,
            "--table",
            4,
            "--row",
            "DiCo-S",
            "--rows",
            1,
            "--classes",
            0,
            4,
            "--results",
            results,
        )
        == 0
    )
    path = results / "figures" / "samples" / "digits_table4_DiCo-S_seed0.png"
    about = Image.open(path).info
    record = Store(results).here.latest(train_stage(TABLE_4.rows[0], SHORT, 0))
    assert (
        record.id in about[grid.CAPTION]
        and record.values["weights_sha256"] in about[grid.CAPTION]
        and "DiCo-S of Table 4 on digits, training seed 0" in about[grid.CAPTION]
    )
    assert about[grid.RECORDS] == record.name and path.with_suffix(".pdf").exists()
    first = path.read_bytes()
    assert (
        run(
            monkeypatch,
            "--table",
            4,
            "--row",
            "DiCo-S",
            "--rows",
            1,
            "--classes",
            0,
            4,
            "--results",
            results,
        )
        == 0
        and path.read_bytes() == first
    )


def test_a_system_of_three_networks_is_drawn(results: Path, monkeypatch: pytest.MonkeyPatch):
    assert (
        run(
            monkeypatch,
            "--table",
            1,
            "--row",
            "ADM-U",
            "--rows",
            1,
            "--classes",
            7,
            2,
            "--results",
            results,
        )
        == 0
    )
    about = Image.open(results / "figures" / "samples" / "digits_table1_ADM-U_seed0.png").info
    assert len(about[grid.RECORDS].split()) == 3 and about[grid.CAPTION].count("weights ") == 3


@pytest.mark.parametrize("name", ["dico_s", "dit_s_2"])
def test_a_published_checkpoint_is_drawn_from_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A small network of random weights under its authors' names; other weights are other images."""
    shape, options = (
        dict(input_size=8, in_channels=1, num_classes=10),
        backbones.tiny_options_of(name),
    )
    given = [
        text
        for item in options.items()
        for text in ("--option", f"{item[0]}={json.dumps(item[1])}")
    ]
    shown = []
    for seed in (1, 2):
        file = tmp_path / f"{seed}.pt"
        torch.save(
            {"ema": randomise(backbones.build(name, **options, **shape), seed).state_dict()}, file
        )
        assert (
            run(
                monkeypatch,
                "--backbone",
                name,
                "--checkpoint",
                file,
                *given,
                "--rows",
                1,
                "--classes",
                0,
                4,
                "--results",
                tmp_path,
            )
            == 0
        )
        image = Image.open(
            tmp_path / "figures" / "samples" / f"digits_{name}_{file_sha256(file)[:8]}.png"
        )
        assert (
            f"the published {name} under digits" in image.info[grid.CAPTION]
            and f"({file.name}, SHA-256 {file_sha256(file)}, key ema)" in image.info[grid.CAPTION]
        )
        assert grid.RECORDS not in image.info or image.info[grid.RECORDS] == ""
        shown.append(image.tobytes())
    assert shown[0] != shown[1] and not (tmp_path / "records").exists()


def test_the_images_are_those_of_the_evaluation(results: Path):
    """Classes in any choice and order are the same images, and those with which the run's own evaluation begins."""
    spec = evaluate_stage(TABLE_4.rows[0], SHORT, 0)
    network = load_ema(spec.train, Store(results).run_dir(spec.train), torch.device("cpu"))
    scored = torch.cat(
        [x for x, _ in generate.generate_images(spec, network, torch.device("cpu"), batch=20)]
    )
    shown = grid._images(spec, network, [3, 0, 4, 9], 2, "cpu")
    assert set(shown) == {(line, label) for line in range(2) for label in (0, 3, 4, 9)}
    assert all(
        torch.allclose(image, scored[10 * line + label], atol=1e-5)
        for (line, label), image in shown.items()
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--table", "4", "--row", "DiCo-Z"], "no row 'DiCo-Z'; known: 'DiCo-S'"),
        (
            ["--table", "4", "--row", "DWC 5x5", "--seed", "7"],
            'train it with: python experiments/ablation.py --table 4 --rows "DWC 5x5"',
        ),
        (
            ["--table", "8", "--row", "DiM-H", "--protocol", "imagenet256"],
            'train it with: python experiments/main_results.py --table 8 --rows "DiM-H" --protocol imagenet256',
        ),
        (
            ["--table", "9", "--row", "MaskGIT"],
            "row 'MaskGIT' of table 9 holds published numbers only",
        ),
        ([], "say --row, or --backbone and --checkpoint"),
        (
            ["--row", "DiCo-S", "--key", "ema"],
            "say --row, or --backbone and --checkpoint, which alone take --key",
        ),
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
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert run(monkeypatch, *arguments, "--results", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 9])
def test_every_row_with_a_network_can_be_asked_for(number: int):
    table = TRAINED[number]
    assert [trained_row(table, label).label for label in trained_rows(table)] and {
        row.label for row in table.rows if row.backbone
    } <= trained_rows(table).keys()


def test_latents_without_their_decoder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DICO_VAE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="VAE .* is neither"):
        grid.draw(
            evaluate_stage(TABLE_4.rows[0], IMAGENET256, 0),
            Store(tmp_path),
            [0, 1],
            2,
            "a",
            "a row",
        )
