"""Data of one's own: prepared folders of two classes and of none, known by their content."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import backbones
from experiments import prepare
from experiments.ablation import DICO_S
from experiments.declared.protocols import DIGITS
from experiments.engine.data.autoencoder import Autoencoder
from experiments.engine.data.encode import EncodingJob, encode_pictures
from experiments.engine.data.locate import own_data, require_features, seal_folder
from experiments.engine.data.pictures import find_pictures
from experiments.engine.data.sets import Part, load
from experiments.engine.diffusion.guidance import Guided
from experiments.engine.jobs.execute import execute
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources
from experiments.engine.sampling.generate import image_labels
from experiments.engine.specs.spec import Backbone, Data, HeldOut, Recipe, Sampler, Train, spec_id
from experiments.engine.specs.stages import evaluate_stage
from tests.support.latent_sets import ignore_progress

CPU = Resources("cpu")


def write_pictures(folder: Path, classes: dict[str, int]) -> None:
    """Write so many noisy pictures of 8 x 12 pixels for each class; "" is the folder itself."""
    draw = np.random.default_rng(0)
    for name, num in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(num):
            pixels = draw.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: dict[str, int]) -> Path:
    """Prepare pictures of so many classes by the command, at 8 pixels."""
    write_pictures(tmp_path / "pictures", classes)
    number = 0 if "" in classes else len(classes)
    words = ["pixels", "--size", "8", "--classes", number, "--images", tmp_path / "pictures"]
    words += ["--out", tmp_path / "set", "--workers", 1]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, words)])
    assert prepare.main() == 0
    return tmp_path / "set"


@pytest.fixture
def two_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch, {"rose": 12, "daisy": 10})


@pytest.fixture
def no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch, {"": 11})


def test_a_set_of_two_classes_is_what_was_prepared(two_classes: Path):
    data = own_data(two_classes, flip=True)
    assert (data.size, data.channels, data.num_classes, data.flip) == (8, 3, 2, True)
    images = load(data)
    assert (two_classes / "classes.txt").read_text() == "daisy\nrose\n"
    assert np.bincount(images.labels).tolist() == [10, 12]
    assert images.identity["data_sha256"] == data.sha256


def test_content_names_a_set_and_its_path_does_not(two_classes: Path, tmp_path: Path):
    data = own_data(two_classes)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(two_classes, copy)
    assert own_data(copy) == data

    # Other labels are another set.
    labels = np.load(copy / "labels.npy")
    np.save(copy / "labels.npy", 1 - labels)
    seal_folder(copy, 2)
    assert own_data(copy).sha256 != data.sha256


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "classes.txt"])
def test_a_set_whose_content_changed_is_refused_in_one_line(two_classes: Path, name: str):
    data = own_data(two_classes)
    content = bytearray((two_classes / name).read_bytes())
    content[-2] ^= 1
    (two_classes / name).write_bytes(content)
    for use in (lambda: own_data(two_classes), lambda: load(data)):
        with pytest.raises(ValueError, match="has changed since it was prepared; restore") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_split_is_declared(two_classes: Path):
    data = own_data(two_classes, split="held_out")
    sizes = [len(load(data, part)) for part in Part]
    assert sizes == [16, 2, 4]
    with pytest.raises(ValueError, match="used whole, so it has no test images"):
        load(own_data(two_classes), Part.TEST)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "8", "--classes", "3"], "holds 2 class folders, 3 are needed"),
        (["--size", "0", "--classes", "2"], "needs --size from 1 on"),
        (["--size", "8"], "--size takes one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    write_pictures(tmp_path / "pictures", {"a": 1, "b": 1})
    words = ["pixels", "--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "set")]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words, *options])
    assert prepare.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_arrays_are_prepared_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.save(tmp_path / "images.npy", np.arange(5 * 36, dtype=np.uint8).reshape(5, 1, 6, 6))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 2, 0, 1]))
    words = ["arrays", "--folder", str(tmp_path), "--classes", "3"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    assert prepare.main() == 0
    data = own_data(tmp_path)
    assert (data.size, data.channels, data.num_classes) == (6, 1, 3)
    with pytest.raises(ValueError, match=r"holds no data.json; prepare it"):
        own_data(tmp_path.parent)


def test_ids_of_other_sets_do_not_know_the_field():
    assert spec_id(Data("digits", 8, 1, 10)) == spec_id(Data("digits", 8, 1, 10, sha256=""))


def test_latents_are_declared_by_what_their_manifest_says(
    latents: Path, vae: Autoencoder, tmp_path: Path
):
    folder = tmp_path / "latents"
    shutil.copytree(latents, folder)
    seal_folder(folder, 3)
    data = own_data(folder)
    assert (data.size, data.channels, data.num_classes) == (8, 4, 3)
    assert (data.latents, data.vae) == ("moments", vae.encoder)
    assert np.bincount(load(data).labels).tolist() == [4, 4, 4]

    # A shard of other content is another set.
    shard = np.load(folder / "shard-00000.npy")
    shard[0, 0, 0] += 1
    np.save(folder / "shard-00000.npy", shard)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        load(data)


def test_latents_without_classes_are_encoded_and_loaded(
    pictures: Path, vae: Autoencoder, tmp_path: Path
):
    flat = find_pictures(pictures, 0)
    assert (flat.classes, set(flat.labels), len(flat.files)) == ((), {0}, 12)
    encode_pictures(EncodingJob(flat, vae, 64, shard=5), tmp_path / "set", ignore_progress)
    seal_folder(tmp_path / "set", 0)
    data = own_data(tmp_path / "set")
    assert data.num_classes == 0
    x, y = load(data).take(torch.arange(3), 0, torch.arange(3))
    assert (x.shape, y.tolist()) == ((3, 4, 8, 8), [0, 0, 0])


# ---- Without classes


@pytest.mark.parametrize("name", ["dit_s_2", "dico_s", "hourglass", "uvit_s_2", "ldm_4", "adm_64"])
def test_unconditional_networks_have_no_label_table(name: str):
    known = backbones.list_backbones()
    name = name if name in known else next(n for n in known if n.startswith(name.split("_")[0]))
    shape = dict(input_size=8, in_channels=3, num_classes=0)
    options = backbones.tiny_options_of(name) | shape
    model = backbones.build(name, **options)
    labelled = backbones.build(name, **options | dict(num_classes=5))
    assert not [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings < 2]

    def size(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    tables = [m for m in labelled.modules() if isinstance(m, nn.Embedding)]
    assert size(labelled) - size(model) == sum(table.weight.numel() for table in tables)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    model.eval()
    one, other = (model(x, t, torch.full((2,), label)) for label in (0, 4))
    assert torch.equal(one, other)


def test_guidance_without_classes_is_refused(no_classes: Path):
    data = own_data(no_classes)
    protocol = replace(DIGITS, data=data, sampler=Sampler(scale=1.5), features="inception")
    with pytest.raises(ValueError, match="have no classes to guide by; declare Sampler"):
        evaluate_stage(DICO_S, protocol, 0)
    with pytest.raises(ValueError, match="no labels to guide by; sample at scale 1"):
        Guided(lambda x, t, y: x, 2.0, 0, channels=None)
    assert image_labels("random", 3, 0, 0).tolist() == image_labels("balanced", 3, 0, 0).tolist()


def test_scores_of_another_set_are_refused(two_classes: Path):
    protocol = replace(DIGITS, data=own_data(two_classes))
    with pytest.raises(
        ValueError, match="scored on inception features, and digits_judge are those of"
    ):
        require_features(evaluate_stage(DICO_S, protocol, 0))


def small(data: Data) -> Train:
    shape = dict(input_size=8, in_channels=3, num_classes=data.num_classes)
    backbone = Backbone("hourglass", dict(dim=8, depths=(1, 1, 1, 1, 1)) | shape)
    return Train(backbone, data, Recipe(steps=2, batch=4, ema=0.5))


@pytest.mark.parametrize("classes", [2, 0])
def test_networks_train_on_both_kinds_of_sets(
    classes: int, tmp_path: Path, request: pytest.FixtureRequest
):
    folder = request.getfixturevalue("two_classes" if classes else "no_classes")
    data = own_data(folder, split="held_out")
    store, train = Store(tmp_path / "results"), small(data)
    record = execute(train, store, CPU)
    assert record.status == "done", record.error
    assert record.values["data_sha256"] == data.sha256
    scored = execute(HeldOut(train, "test"), store, CPU)
    assert scored.status == "done", scored.error
    assert scored.values["num"] == len(load(data, Part.TEST))
