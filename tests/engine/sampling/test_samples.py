"""Images on disk: independent of the batch, resumed, shuffled with their labels, and scored."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.declared.protocols import DIGITS
from experiments.engine.data import locate as sources
from experiments.engine.data.autoencoder import load_autoencoder
from experiments.engine.data.image_files import ImageFile
from experiments.engine.data.quantise import to_uint8
from experiments.engine.data.sets import ImageSet, load
from experiments.engine.jobs.job import Job
from experiments.engine.jobs.progress import ProgressDisplay
from experiments.engine.records.comparison import incomparable
from experiments.engine.records.manifest import has_unknown_features
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.runtime.progress import Progress
from experiments.engine.sampling import samples
from experiments.engine.sampling.generate import generate_images, image_labels
from experiments.engine.sampling.networks import Decoder, decoder_warnings, load_decoder
from experiments.engine.sampling.samples import (
    ImageSource,
    fill_sample_folder,
    generate_samples,
)
from experiments.engine.scoring import inception
from experiments.engine.scoring import stage as evaluate
from experiments.engine.specs.spec import (
    Backbone,
    Checkpoint,
    Data,
    Evaluate,
    Recipe,
    Sampler,
    Train,
    spec_id,
)
from experiments.engine.training import stage as training_stage
from experiments.engine.training import trainer as train
from experiments.engine.training.trainer import build
from tests.support.networks import randomise

CPU = torch.device("cpu")
TINY = Backbone(
    "dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1), input_size=8, in_channels=1, num_classes=10)
)
SPEC = Evaluate(
    Train(TINY, DIGITS.data, Recipe(steps=1, batch=4)),
    Sampler(num_steps=3, channels=None),
    23,
    "digits",
    "random",
)
MADE = {"network": "1"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "CHUNK", 5)


def drawn(
    folder: Path,
    batch: int = 4,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
    spec: Evaluate = SPEC,
    **made: Any,
) -> samples.SampleSet:
    return fill_sample_folder(
        spec,
        folder,
        ImageSource(build(TINY, 0, CPU).eval(), Decoder(decode, {}), MADE | made),
        RunContext(folder, Resources(sample_batch=batch)),
    )


def levels(found: samples.SampleSet) -> np.ndarray:
    return np.concatenate(list(found.batches(7)))


def test_a_set_holds_every_image_once_quantised_in_the_order_of_its_labels(tmp_path: Path):
    found = drawn(tmp_path)
    x = torch.cat([x for x, _ in generate_images(SPEC, build(TINY, 0, CPU).eval(), CPU, 4)])
    expected = to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert (
        found.shape == (23, 8, 8, 3)
        and sorted(found.index) == list(range(23))
        and list(found.index) != list(range(23))
    )
    assert np.abs(levels(found).astype(int) - expected[found.index]).max() <= 1
    np.testing.assert_array_equal(
        found.labels, image_labels("random", 23, 10, 0).numpy()[found.index]
    )


def test_another_batch_size_draws_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At a size at which convolutions do round by the batch."""
    monkeypatch.setattr(samples, "CHUNK", 12)
    wide = TINY.but(dim=24, input_size=32)
    spec = replace(
        SPEC,
        train=replace(SPEC.train, backbone=wide, data=replace(SPEC.train.data, size=32)),
        num=12,
    )
    model = randomise(build(wide, 0, CPU)).eval()
    found = [
        samples.fill_sample_folder(
            spec,
            tmp_path / str(batch),
            ImageSource(model, Decoder(lambda x: x, {}), {}),
            RunContext(tmp_path, Resources(sample_batch=batch)),
        )
        for batch in (3, 8)
    ]
    np.testing.assert_array_equal(levels(found[0]), levels(found[1]))


def test_a_stopped_run_goes_on_and_draws_nothing_twice(tmp_path: Path):
    whole, asked = levels(drawn(tmp_path / "whole")), []

    def failing(x: Tensor) -> Tensor:
        asked.append(len(x))
        if sum(asked) > 12:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "cut", decode=failing)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "00000000.npy",
        "00000005.npy",
        "counts",
        "made.json",
    ]
    asked.clear()
    again = drawn(tmp_path / "cut", decode=lambda x: asked.append(len(x)) or x)
    assert sum(asked) == 13 and (levels(again) == whole).all()


def test_images_of_another_network_or_decoder_are_not_mixed(tmp_path: Path):
    drawn(tmp_path / "samples")
    with pytest.raises(ValueError, match="another network"):
        drawn(tmp_path / "samples", network="2")
    with pytest.raises(ValueError, match="another decoder"):
        drawn(tmp_path / "samples", decoder={})


def test_packed_files_read_back_with_labels_order_and_origin(tmp_path: Path):
    found = drawn(tmp_path / "samples")
    found.pack(tmp_path / "a.npz")
    packed = ImageFile(tmp_path / "a.npz")
    np.testing.assert_array_equal(np.concatenate(list(packed.batches())), levels(found))
    np.testing.assert_array_equal(packed.labels, found.labels)
    np.testing.assert_array_equal(packed.index, found.index)
    assert packed.origin == MADE | {
        "data": "digits",
        "labels": "random",
        "order": samples.ORDER,
        "seed": 0,
        "precision": "fp32",
        "nfe": 3,
    }


def test_pngs_are_lossless_and_named_by_index_and_label(tmp_path: Path):
    from PIL import Image

    found = drawn(tmp_path / "samples")
    found.write_png(tmp_path / "png")
    names = [f"{i:06d}-{y}.png" for i, y in zip(found.index, found.labels, strict=True)]
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == sorted(names)
    np.testing.assert_array_equal(
        np.stack([np.asarray(Image.open(tmp_path / "png" / name)) for name in names]), levels(found)
    )


def test_a_network_that_diverged_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not finite"):
        drawn(tmp_path, decode=lambda x: x / 0)


def test_a_published_checkpoint_is_sampled_under_its_own_id(tmp_path: Path):
    model = build(TINY, 0, CPU)
    torch.save({"ema": model.state_dict()}, tmp_path / "a.pt")
    spec = replace(SPEC, train=Checkpoint(TINY, DIGITS.data, "0" * 64))
    assert (
        len(
            {
                spec_id(spec),
                spec_id(SPEC),
                spec_id(replace(spec, train=replace(spec.train, sha256="1" * 64))),
            }
        )
        == 3
    )
    found = generate_samples(
        spec,
        RunContext(
            tmp_path / "runs" / "x", Resources(checkpoint=tmp_path / "a.pt", sample_batch=4)
        ),
    )
    assert (tmp_path / "runs" / spec_id(spec) / "samples").is_dir()
    np.testing.assert_array_equal(levels(found), levels(drawn(tmp_path / "direct")))


def test_latents_are_decoded_by_the_declared_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("diffusers")
    from tests.support.latent_sets import write_vae

    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "vae")))
    data, backbone = (
        Data("latents", size=8, channels=4, num_classes=10),
        Backbone("dico_s", TINY.options | dict(in_channels=4)),
    )
    model = build(backbone, 0, CPU)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    spec = replace(SPEC, train=Checkpoint(backbone, data, "0" * 64), num=6)
    resources = Resources(checkpoint=tmp_path / "a.pt", sample_batch=4)
    context = RunContext(tmp_path / "runs" / "x", resources)
    found = generate_samples(spec, context)
    vae = load_autoencoder(str(tmp_path / "vae"))
    x = vae.decode(torch.cat([x for x, _ in generate_images(spec, model.eval(), CPU, 4)]))
    assert (
        np.abs(
            levels(found).astype(int) - to_uint8(x).permute(0, 2, 3, 1).numpy()[found.index]
        ).max()
        <= 1
    )
    assert (
        found.shape == (6, 8 * vae.factor, 8 * vae.factor, 3)
        and found.origin["decoder"]["sha256"] == vae.weights
    )
    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="another decoder"):
        generate_samples(spec, context)
    foreign = replace(spec, train=replace(spec.train, data=replace(data, vae="0" * 16)))
    with pytest.raises(ValueError, match="latents of another VAE"):
        generate_samples(foreign, context)


def test_latents_are_decoded_by_the_vae_that_their_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a manifest a warning is given, unless the VAE or the declaration is known."""
    pytest.importorskip("diffusers")
    from tests.support.latent_sets import write_vae

    monkeypatch.setenv("DICO_VAE", str(write_vae(tmp_path / "vae")))
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    data = Data("latents", size=8, channels=4, num_classes=10)
    decoder = load_decoder(data, CPU).identity
    (warning,) = decoder_warnings(data, decoder)
    assert (
        "not known to be sd-vae-ft-ema or sd-vae-ft-mse" in warning and decoder["sha256"] in warning
    )
    assert (
        not decoder_warnings(data, decoder | {"name": "sd-vae-ft-mse"})
        and not decoder_warnings(replace(data, vae="0" * 16), decoder)
        and not decoder_warnings(DIGITS.data, {})
    )
    encoder = load_autoencoder(str(tmp_path / "vae")).encoder
    (tmp_path / "latents").mkdir()
    for named, fits in ((encoder, True), ("0" * 16, False)):
        manifest = {
            "latents": "moments",
            "shape": [2, 8, 8, 8],
            "num_classes": 10,
            "statistics": {"as_expected": True},
            "vae": {"name": "x", "encoder": named},
        }
        (tmp_path / "latents" / "manifest.json").write_text(json.dumps(manifest))
        assert not decoder_warnings(data, decoder)
        with (
            nullcontext()
            if fits
            else pytest.raises(
                ValueError,
                match=f"set latents holds latents of another VAE .encoder {named}. than .DICO_VAE "
                f"names .vae, encoder {encoder}",
            )
        ):
            load_decoder(data, CPU)


@pytest.mark.slow
def test_the_inception_stage_runs_from_weights_to_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Untrained Inception in a file, pixels of three channels, training images as reference."""
    pytest.importorskip("torch_fidelity")
    data = Data("pixels", size=8, channels=3, num_classes=10)
    given = np.random.default_rng(0).uniform(-1, 1, (9, 3, 8, 8)).astype(np.float32)
    pixels = ImageSet(given, np.arange(9), data)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load", lambda asked: pixels if asked == data else load(asked))
    torch.save(inception.build_network().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("DICO_INCEPTION", str(tmp_path / "weights.pth"))
    backbone = Backbone("dico_s", TINY.options | dict(in_channels=3))
    spec = Evaluate(
        Train(backbone, data, Recipe(steps=2, batch=4)),
        Sampler(num_steps=2),
        11,
        "inception",
        "balanced",
    )
    training_stage.run_training(spec.train, RunContext(tmp_path / "runs" / "a"))
    heard: list[int] = []
    values = evaluate.run_evaluation(
        spec,
        tmp_path,
        RunContext(
            tmp_path / "runs" / "a",
            Resources(sample_batch=4),
            report=lambda progress: heard.append(progress.step),
        ),
    )
    assert heard == [5, 10, 11] and values["num"] == 11 and values["num_reference"] == 9
    assert (
        np.isfinite(
            [values[name] for name in ("fid", "sfid", "is", "precision", "recall", "kid")]
        ).all()
        and values["fid"] > 0
    )
    assert np.isnan(values["fid_se"]) and any(
        "fewer than the 2048" in text for text in values["warnings"]
    )
    measure = values["manifest"]["measure"]
    assert (
        measure["extractor"]["sha256"]
        and measure["reference"]["num_images"] == 9
        and measure["quantiser"] == samples.QUANTISER
    )
    assert json.loads(json.dumps(values["manifest"])) == values["manifest"]

    # The file is not the published one: its scores say so, and compare with none of the published.
    assert has_unknown_features(values)
    assert any("unknown Inception weights" in text for text in values["warnings"])
    published = json.loads(json.dumps(values["manifest"]))
    published["measure"]["extractor"]["name"] = inception.PUBLISHED
    assert incomparable(values["manifest"], published) == ["measure.extractor.name"]


def test_without_a_terminal_each_chunk_of_a_drawing_is_a_line(capsys: pytest.CaptureFixture[str]):
    for lines, said in ((True, "250 of 9250 images, 2.0 images/s, 1:15:00 left\n"), (False, "")):
        with ProgressDisplay(total=1, lines=lines) as display:
            display.notify(Job("a", (SPEC,)), "progress", Progress(250, 9250, 2.0))
        assert capsys.readouterr().err == said


def test_another_sampler_is_another_set_and_an_unknown_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from experiments import sample

    asked, given = [], []

    def drawn(spec: Evaluate, store: object, context: RunContext, *_: object) -> None:
        asked.append(spec.sampler)
        given.append((context.resources.compile, context.resources.graphs))
        raise ValueError("enough")

    monkeypatch.setattr(sample, "_draw_all", drawn)
    for options in (
        [],
        ["--sampler", "dpm_solver_diffusers", "--steps", "20", "--compile"],
        ["--sampler", "heun"],
        ["--steps", "0"],
        ["--graphs"],
    ):
        monkeypatch.setattr(
            "sys.argv",
            [
                "sample.py",
                "--row",
                "DiCo-S",
                "--device",
                "cpu",
                "--results",
                str(tmp_path),
                *options,
            ],
        )
        assert sample.main() == 2
    plain, other = asked
    assert (other.name, other.num_steps) == ("dpm_solver_diffusers", 20) and other == replace(
        plain, name=other.name, num_steps=20
    )
    said = capsys.readouterr().err.splitlines()
    assert said[2:] == [
        "error: unknown sampler 'heun'; known: ancestral, ddim, dpm_solver, dpm_solver_diffusers",
        "error: --num, --steps and --batch take numbers from 1 on; --help lists the options",
        "error: CUDA graphs need a GPU, but this command uses cpu; leave out --graphs",
    ]
    assert given == [(False, False), (True, False)]


FAILING = """
import sys, time
from experiments import sample
from experiments.engine.runtime import failures
from experiments.engine.sampling import samples

def sampled(spec, context):
    if context.group.rank == 1:
        raise KeyError("boom")
    time.sleep(600)

failures.POLL, failures.GRACE, samples.generate_samples = 0.1, 1.0, sampled
sys.argv = ["sample.py", "--row", "DiCo-S", "--device", "cpu", "--results", sys.argv[1]]
sys.exit(sample.main())
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_at_their_work(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names = dict(
            WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1])
        )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, str(tmp_path)],
            env=os.environ | names | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 2], said
    assert all(
        "error: rank 1: KeyError: 'boom'\n" in words and "Traceback" not in words for words in said
    ), said
