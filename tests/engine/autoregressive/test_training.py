"""Networks that predict tokens: their loss, their tokenizer, and the stages from end to end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import backbones
from experiments.engine.autoregressive.objective import NextScale
from experiments.engine.autoregressive.tokenizer import cached_tokenizer, encode_tokens
from experiments.engine.data.sets import ImageSet, Part, load
from experiments.engine.jobs.execute import execute
from experiments.engine.judges import classifiers
from experiments.engine.records.store import Store
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling.samples import generate_samples
from experiments.engine.specs.alignment import Alignment
from experiments.engine.specs.spec import (
    Checkpoint,
    Diffusion,
    Evaluate,
    HeldOut,
    Recipe,
    Sampler,
    Train,
)
from experiments.engine.training import checkpoint
from experiments.engine.training.next_scale.tokens import encode_set, load_tokenizer
from experiments.engine.training.stage import run_training
from experiments.engine.training.trainer import Trainer
from tests.support.networks import randomise
from tests.support.tokens import DIGITS, NETWORK, RECIPE, SIDES, TOKENIZER, TOKENS, TRAIN

CPU = torch.device("cpu")
TOKENS_OF_IMAGE = sum(side**2 for side in SIDES)
EVALUATE = Evaluate(
    TRAIN, Sampler("scales", 3, 1.5, top_k=(9,), top_p=0.9), 12, "digits_judge", "balanced"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Results in which the small training is finished."""
    store = Store(tmp_path_factory.mktemp("results"))
    record = execute(TRAIN, store, Resources(checkpoint_every=2))
    assert record.status == "done", record.error
    return store


def pixels(num: int = 9) -> torch.Tensor:
    images = load(DIGITS)
    assert isinstance(images, ImageSet)
    return images.take(torch.arange(num))[0]


# ---- The loss


@torch.no_grad()
def test_the_loss_is_that_of_a_loop_over_images_and_scales():
    """Each scale is predicted from what its coarser scales add up to, without a mask."""
    model: Any = randomise(backbones.build(NETWORK.name, **NETWORK.options), seed=1)
    coder: Any = randomise(backbones.build(TOKENIZER.backbone.name, **TOKENIZER.backbone.options))
    tokens = torch.randint(24, (3, TOKENS_OF_IMAGE), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([2, 10, 7])
    losses = NextScale(coder).losses(model, tokens, y)

    for image in range(3):
        total, cache = 0.0, model.new_cache()
        features = torch.zeros(1, 6, SIDES[-1], SIDES[-1])
        label = y[image : image + 1]
        x = model.embed(label, torch.zeros(1, 0, 6))
        for scale, part in enumerate(tokens[image : image + 1].split(coder.lengths, dim=1)):
            probabilities = model.step(x, label, cache)[0].double().softmax(-1)
            total -= sum(math.log(probabilities[i, code]) for i, code in enumerate(part[0]))
            features = features + coder.contribution(scale, part)
            if scale + 1 < len(SIDES):
                following = coder.next_input(features, scale + 1)
                x = model.embed(label, following, cache.num_tokens)
        assert losses["loss"][image].item() == pytest.approx(total / TOKENS_OF_IMAGE, rel=1e-5)
    assert losses["tokens"].shape == tokens.shape


def test_labels_are_dropped_and_tokens_are_left_as_they_are(store: Store):
    trained = load_tokenizer(TRAIN, store.root / "runs", CPU)
    spec = replace(TRAIN, recipe=replace(RECIPE, label_dropout=0.5, batch=40))
    trainer = Trainer(spec, tokenizer=trained.network)
    tokens, y = encode_set(load(DIGITS), trained, CPU).take(torch.arange(40))
    drawn = trainer.draw(3, tokens, y, False, slice(None))
    assert len(drawn) == 2
    assert torch.equal(drawn[0], tokens)
    dropped = drawn[1] == 10
    assert 10 < dropped.sum() < 30
    assert torch.equal(drawn[1][~dropped], y[~dropped])


# ---- The tokenizer


def test_a_tokenizer_is_trained_once_and_found_by_its_content(tmp_path: Path):
    first = cached_tokenizer(TOKENIZER, pixels(), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    stamp = files[0].stat().st_mtime_ns
    again = cached_tokenizer(TOKENIZER, pixels(), tmp_path)
    assert again.identity == first.identity
    assert sorted(tmp_path.glob("*.safetensors")) == files
    assert files[0].stat().st_mtime_ns == stamp

    # It can be trained anew to the same bits, and other images or steps make another one.
    alone = cached_tokenizer(TOKENIZER, pixels(), tmp_path / "anew")
    assert alone.identity == first.identity
    cached_tokenizer(TOKENIZER, pixels(8), tmp_path)
    cached_tokenizer(replace(TOKENIZER, steps=2), pixels(), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.slow
def test_training_a_tokenizer_brings_images_nearer(tmp_path: Path):
    images = pixels(60)
    short = replace(TOKENIZER, batch=30, lr=5e-3, revive_every=10)
    few = cached_tokenizer(replace(short, steps=1), images, tmp_path)
    many = cached_tokenizer(replace(short, steps=40), images, tmp_path)
    assert many.identity["tokenizer_mse"] < 0.7 * few.identity["tokenizer_mse"]
    assert len(encode_tokens(many.network, images).unique()) > 8


# ---- Stages


def test_a_resumed_training_equals_an_uninterrupted_one(store: Store, tmp_path: Path):
    """The newest checkpoint is taken away, so that the run goes on from the second step."""
    whole = store.run_dir(TRAIN)
    resources = Resources(checkpoint_every=2, keep=9)
    folder = tmp_path / "run"
    run_training(TRAIN, RunContext(folder, resources))
    paths = {path.name[:13]: path for path in (folder / "checkpoints").iterdir()}
    for step, path in paths.items():
        if step != "step-00000002":
            path.unlink()
    values = run_training(TRAIN, RunContext(folder, resources))

    assert values["resumed_at"] == 2
    states = [checkpoint.load_newest(each / "checkpoints") for each in (whole, folder)]
    assert states[0] and states[1] and states[0][0] == states[1][0] == 5
    for part in ("model", "ema"):
        pairs = zip(states[0][1][part].items(), states[1][1][part].items(), strict=True)
        assert all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


@pytest.mark.slow
def test_samples_are_drawn_stored_and_scored_by_the_stages_of_diffusion(store: Store):
    record = execute(EVALUATE, store, Resources())
    assert record.status == "done", record.error
    assert record.values["nfe"] == 2 * len(SIDES)
    assert record.values["num"] == 12
    assert {"fd_digits_judge", "agreement", "near_training"} <= record.values.keys()
    (train,) = (store.here.latest(TRAIN),)
    assert train is not None
    assert record.values["tokenizer_sha256"] == train.values["tokenizer_sha256"]

    # A file of samples holds the same images, whatever the batch.
    context = RunContext(store.run_dir(TRAIN))
    samples = generate_samples(EVALUATE, context)
    assert samples.shape == (12, 8, 8, 3)
    assert samples.nfe == 2 * len(SIDES)
    assert samples.origin["tokenizer"] == {
        key: train.values[key] for key in ("tokenizer_sha256", "tokenizer_mse")
    }


def test_the_held_out_loss_is_the_cross_entropy_of_other_images(store: Store):
    record = execute(HeldOut(TRAIN, "test", num=20), store, Resources())
    assert record.status == "done", record.error
    assert "heldout_loss" not in record.values
    trained = load_tokenizer(TRAIN, store.root / "runs", CPU)
    test = load(DIGITS, Part.TEST)
    assert isinstance(test, ImageSet)
    x, y = test.take(torch.arange(20))
    state = checkpoint.load_newest(store.run_dir(TRAIN) / "checkpoints")
    assert state is not None
    model = backbones.build(NETWORK.name, **NETWORK.options)
    model.load_state_dict(state[1]["ema"])
    losses = NextScale(trained.network).losses(model, encode_tokens(trained.network, x), y)
    expected = losses["loss"].mean().item()
    assert record.values["heldout_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    weighted = sum(
        side**2 * mean for side, mean in zip(SIDES, record.values["by_scale"], strict=True)
    )
    assert weighted / TOKENS_OF_IMAGE == pytest.approx(expected, rel=1e-5)


# ---- Refusals


def tokenizer(**options: Any) -> dict[str, Any]:
    return dict(tokenizer=replace(TOKENIZER, backbone=TOKENIZER.backbone.but(**options)))


@pytest.mark.parametrize(
    "fields, words",
    [
        (tokenizer(vocabulary=25), "24 codes and the tokenizer 25"),
        pytest.param(
            tokenizer(sides=(1, 3, 4)),
            r"sides of scales and the tokenizer \(1, 3, 4\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            tokenizer(ch_mult=(1,)),
            "takes images of 1 x 4 x 4, and the set has 1 x 8 x 8",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            tokenizer(image_channels=3), "takes images of 3 x 8 x 8", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(tokenizer=None),
            "var_d16 predicts tokens, which no diffusion trains",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(backbone=replace(NETWORK, name="dit_s_2", options={})),
            "not autoregressive",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(diffusion=Diffusion("flow")), "leave out diffusion", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(alignment=Alignment("blocks.0", "0" * 64)),
            "leave out alignment",
            marks=pytest.mark.slow,
        ),
        (dict(data=replace(DIGITS, flip=True)), "leave out flip of its data"),
        pytest.param(
            dict(recipe=replace(RECIPE, drop_path=0.1)),
            "has no stochastic depth",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_trainings_that_fit_no_tokens_are_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words) as refusal:
        run_training(replace(TRAIN, **fields), RunContext(tmp_path / "run"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "sampler, words",
    [
        (Sampler("scales"), "one step for each of 3 scales, and not 250; declare num_steps=3"),
        (Sampler("ddim", 3), "unknown sampler 'ddim' of a network that predicts tokens"),
        (Sampler("scales", 3, top_k=(1, 2)), "one for each of 3, got 2"),
    ],
)
def test_samplers_that_fit_no_scales_are_refused(
    store: Store, sampler: Sampler, words: str, monkeypatch: pytest.MonkeyPatch
):
    judge = replace(classifiers.DIGITS_JUDGE, steps=5)
    monkeypatch.setattr(classifiers, "DIGITS_JUDGE", judge)
    record = execute(replace(EVALUATE, sampler=sampler), store, Resources())
    assert record.status == "failed"
    assert record.error is not None
    assert words in record.error


def test_diffusion_never_meets_a_network_that_predicts_tokens(store: Store, tmp_path: Path):
    """A published file of such a network is no diffusion's either."""
    published = Checkpoint(NETWORK, DIGITS, "0" * 64)
    context = RunContext(store.run_dir(TRAIN), Resources(checkpoint=tmp_path / "var_d16.pth"))
    with pytest.raises(ValueError, match="no diffusion trains or samples"):
        generate_samples(replace(EVALUATE, train=published), context)
    denoiser = Train(replace(NETWORK, name="var_d16"), DIGITS, Recipe(steps=1, batch=2))
    with pytest.raises(ValueError, match="no diffusion trains or samples"):
        Trainer(denoiser)
    assert TOKENS["vocabulary"] == 24
