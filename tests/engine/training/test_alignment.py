"""Representation alignment: REPA's loss, its encoders, and trainings that declare it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.declared.protocols import CIFAR10_16
from experiments.engine.data import locate
from experiments.engine.data.sets import ImageSet
from experiments.engine.judges.cifar import load_judge
from experiments.engine.judges.encoders import load_encoder, prepare_pixels
from experiments.engine.numerics.weights import digest
from experiments.engine.runtime.context import RunContext
from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.spec import Backbone, Data, Recipe, Train, spec_id
from experiments.engine.specs.stages import train_stage
from experiments.engine.training import alignment
from experiments.engine.training import stage as training_stage
from experiments.engine.training.alignment import Aligned, alignment_loss, build_projector
from experiments.engine.training.networks import load_ema
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from experiments.engine.training.watch.divergence import Diverged
from experiments.related import ALIGNMENT, CIFAR_JUDGE
from tests.support.trainings import DIGITS

VALUES = Path(__file__).parents[2] / "data" / "outputs_repa.json"
CIFAR = Data("cifar10", 16, 12, 10, flip=True, fold=2)
SHAPE = dict(input_size=16, in_channels=12, num_classes=10)
DIT = Backbone("dit_s_2", dict(dim=24, depth=2, heads=3) | SHAPE)
ALIGNED = Alignment("blocks.0", CIFAR_JUDGE, hidden=20)
SPEC = Train(DIT, CIFAR, Recipe(steps=3, batch=4, lr=1e-3, ema=0.9), alignment=ALIGNED)


@cache
def images() -> ImageSet:
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (16, 12, 16, 16)).astype(np.float32)
    return ImageSet(x, draw.integers(0, 10, 16), CIFAR)


@cache
def published() -> Mapping[str, Any]:
    return json.loads(VALUES.read_text())


def drawn(seed: int, *shape: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.standard_normal(shape)).float()


# ---- The authors' arithmetic


def test_projection_loss_and_gradients_are_those_of_the_authors():
    values = published()["repa"]
    options = dict(input_size=6, in_channels=4, num_classes=7, patch=2, dim=24, depth=3, heads=3)
    network = backbones.build("sit_s_2", **options, learn_sigma=False)
    aligned = Aligned(network, network, "blocks.1")
    aligned.projector = build_projector(24, 20, 10)

    # Weights are drawn by the authors' names.
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    named |= {f"projectors.0.{name}": p for name, p in aligned.projector.named_parameters()}
    for name, p in named.items():
        noise = np.random.Generator(np.random.PCG64(crc32(name.encode())))
        p.data = torch.from_numpy(0.1 * noise.standard_normal(tuple(p.shape))).float()
    t, y = torch.tensor(values["t"]), torch.tensor(values["y"])
    velocity, projected = aligned(drawn(31, 2, 4, 6, 6), t, y)
    assert torch.allclose(velocity, torch.tensor(values["repa"]), atol=1e-5)
    assert torch.allclose(projected, torch.tensor(values["repa_features_0"]), atol=1e-5)

    # Their time is 1 at the noise, and the velocity leads there.
    data, noise = drawn(131, 2, 4, 6, 6), drawn(132, 2, 4, 6, 6)
    share = t[:, None, None, None]
    velocity, projected = aligned((1 - share) * data + share * noise, t, y)
    denoising = (velocity - (noise - data)).square().mean(dim=(1, 2, 3))
    pull = alignment_loss(projected, drawn(133, 2, 9, 10)).mean()
    assert pull.item() == pytest.approx(values["repa_projection"], abs=1e-6)
    total = denoising.mean() + 0.5 * pull
    assert total.item() == pytest.approx(values["repa_total"], abs=1e-5)
    total.backward()
    for name in values["grads"]:
        truth = torch.tensor(values[f"repa_grad/{name}"])
        error = (named[name].grad - truth).abs().max()
        assert error < 1e-5 * truth.abs().max(), name


def test_tokens_of_zero_have_no_direction_and_no_bad_gradient():
    projected = torch.zeros(2, 5, 3, requires_grad=True)
    alignment_loss(projected, torch.ones(2, 5, 3)).sum().backward()
    assert projected.grad is not None and projected.grad.isfinite().all()
    assert alignment_loss(torch.ones(1, 4, 7) * 3, torch.ones(1, 4, 7)).item() == pytest.approx(-1)


def test_pixels_are_prepared_as_the_authors_do():
    values = published()["repa_image"]
    pixels = np.random.Generator(np.random.PCG64(38)).integers(0, 256, (1, 3, 256, 256))
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    prepared = prepare_pixels(x, 224)[0, :, 3::41, 0::43]
    assert torch.allclose(prepared, torch.tensor(values), atol=1e-5)


def test_dino_is_read_from_a_file_and_its_positions_are_resampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import timm

    # A tiny network under the name of a large one.
    name = "vit_small_patch14_dinov2"
    build = partial(timm.create_model, depth=1, embed_dim=6, num_heads=2)
    whole = build(name, num_classes=0, img_size=518)
    monkeypatch.setattr(timm, "create_model", build)
    monkeypatch.setattr(locate, "ROOT", tmp_path)
    path = tmp_path / "encoders" / f"{name}.pth"
    path.parent.mkdir()
    torch.save(whole.state_dict(), path)
    known = Alignment("blocks.0", hashlib.sha256(path.read_bytes()).hexdigest(), encoder=name)

    # One feature for each token, whatever the size of the images; no class token.
    encoder = load_encoder(known, CIFAR, grid=5)
    features = encoder(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 25, 6)
    assert features.mean(dim=-1).abs().max() < 1e-5
    assert not any(p.requires_grad for p in encoder.parameters())

    # Another content, no file, and a file of something else.
    with pytest.raises(ValueError, match="has the SHA-256 .* declares 00"):
        load_encoder(replace(known, sha256="00"), CIFAR, 5)
    torch.save({"a": torch.zeros(1)}, path)
    other = replace(known, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="does not hold the weights of vit_small"):
        load_encoder(other, CIFAR, 5)
    with pytest.raises(ValueError, match="vit_base_patch14_dinov2 are missing: put them at"):
        load_encoder(replace(known, encoder="vit_base_patch14_dinov2"), CIFAR, 5)


def test_the_judges_map_is_what_it_averages_itself():
    x = torch.randn(2, 3, 32, 32)
    judge, sha256 = load_judge()
    assert sha256 == CIFAR_JUDGE
    features = load_encoder(ALIGNED, CIFAR, 8)(x)
    assert features.shape == (2, 64, 128)
    assert torch.allclose(features.mean(dim=1), judge(x)[0], atol=1e-5)


# ---- Trainings


def test_a_training_aligns_resumes_and_leaves_the_projection_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training_stage, "load", lambda data: images())
    record = run_training(SPEC, RunContext(tmp_path))
    assert record["alignment"]["tokens"] == 64
    assert record["alignment"]["encoder_sha256"] == CIFAR_JUDGE

    # The averaged network is a plain one.
    ema = load_ema(SPEC, tmp_path, torch.device("cpu"))
    assert list(ema.state_dict()) == list(backbones.build(DIT.name, **DIT.options).state_dict())

    # The projection moved, and a resumed training goes on to the same bits.
    whole = Trainer(SPEC)
    first = digest(whole.aligner.aligned.projector) if whole.aligner else ""
    steps = whole.steps(images())
    next(steps)
    resumed = Trainer(SPEC)
    resumed.restore(1, copy.deepcopy(whole.state()))
    for trainer in (whole, resumed):
        list(steps if trainer is whole else trainer.steps(images()))
        assert trainer.aligner is not None
    assert digest(resumed.model) == digest(whole.model)
    projectors = [trainer.aligner.aligned.projector for trainer in (whole, resumed)]
    assert digest(projectors[0]) == digest(projectors[1]) != first


@pytest.mark.parametrize("label", [row.label for row in ALIGNMENT.rows if row.alignment])
def test_every_row_of_the_table_names_a_block_that_is_there(label: str):
    protocol = replace(CIFAR10_16, recipe=replace(CIFAR10_16.recipe, batch=4), rates={})
    plain, aligned = (
        train_stage(ALIGNMENT.row(name), protocol, 1)
        for name in (label.removesuffix(" + REPA"), label)
    )
    assert replace(aligned, alignment=None) == plain and spec_id(aligned) != spec_id(plain)

    # Both start from the same weights and see the same draws.
    trainers = [Trainer(spec) for spec in (plain, aligned)]
    assert digest(trainers[0].model) == digest(trainers[1].model)
    losses = [next(trainer.steps(images())) for trainer in trainers]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert digest(trainers[0].model) != digest(trainers[1].model)


def test_an_alignment_that_is_no_number_names_the_layer_of_the_projection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def spoilt(*arguments: int) -> nn.Sequential:
        projector = build_projector(*arguments)
        nn.init.constant_(projector[2].bias, math.inf)
        return projector

    monkeypatch.setattr(training_stage, "load", lambda data: images())
    monkeypatch.setattr(alignment, "build_projector", spoilt)
    with pytest.raises(Diverged, match="the loss is nan at step 1;") as failure:
        run_training(SPEC, RunContext(tmp_path))
    found = failure.value.values["diagnosis"]["passes"]["fp32"]
    assert (found["module"], found["direction"]) == ("projector.2", "forward")


def test_alignment_is_of_no_id_that_lacks_it():
    assert spec_id(replace(SPEC, alignment=None)) == spec_id(Train(DIT, CIFAR, SPEC.recipe))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(block="blocks.7"),
            "DiT has no block 'blocks.7' to align; it has .*blocks.0, b",
        ),
        (dict(block="t_embedder"), "t_embedder hands on neither tokens nor a map"),
        (dict(encoder="clip"), "unknown encoder 'clip'; known: cifar_judge"),
        (dict(sha256="1" * 64), "has the SHA-256 e97f"),
    ],
)
def test_an_alignment_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as failure:
        Trainer(replace(SPEC, alignment=replace(ALIGNED, **changes)))
    assert "\n" not in str(failure.value)


def test_networks_and_data_that_do_not_fit_are_refused():
    dig = Backbone("dig_s_2", dict(dim=24, depth=4, heads=3) | SHAPE)
    second = replace(ALIGNED, block="blocks.1")
    with pytest.raises(ValueError, match="DiG after blocks.1 are not in the order of rows"):
        Trainer(replace(SPEC, backbone=dig, alignment=second))
    small = Backbone("dit_s_2", dict(dim=24, depth=2, heads=3, input_size=8, in_channels=1))
    with pytest.raises(ValueError, match="alignment needs images of 3 channels"):
        Trainer(replace(SPEC, backbone=small, data=DIGITS))
    dico = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)) | SHAPE)
    with pytest.raises(ValueError, match="8x8 places .* not 16x16"):
        Trainer(replace(SPEC, backbone=dico, alignment=replace(ALIGNED, block="encoder_level_1.0")))
