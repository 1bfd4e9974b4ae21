"""Captioned digits: what trainings see, what a judge reads, and what an evaluation records."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backbones
from experiments.declared.protocols import DIGITS_TEXT, DIGITS_TEXT_RELATIONS
from experiments.engine.data.captioned.digits import digit_images
from experiments.engine.data.captioned.grammar import (
    NAME,
    RELATIONS_NAME,
    VOCABULARY,
    WORDS,
    Group,
    captions_of,
)
from experiments.engine.data.sets import Part, load
from experiments.engine.judges.cells import CLASSES
from experiments.engine.runtime.context import RunContext
from experiments.engine.scoring.captioned import stage
from experiments.engine.scoring.captioned.reading import read
from experiments.engine.scoring.stage import run_evaluation
from experiments.engine.specs.stages import evaluate_stage, train_stage
from experiments.engine.texts.tables import table_of
from experiments.engine.training.stage import run_training
from experiments.text_to_image import TABLE_V2_3

CAPTIONS = captions_of(NAME)
TEXTS = [caption.text for caption in CAPTIONS]


class NearestDigit(nn.Module):
    """A judge without a training: the class of the nearest digit that is trained on, or blank."""

    def __init__(self) -> None:
        super().__init__()
        images, digits = digit_images(trained=True)
        blank = np.full((1, 8, 8), -1, np.float32)
        self.images = torch.from_numpy(np.concatenate([images, blank])).flatten(1)
        self.classes = torch.tensor([*digits, CLASSES - 1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.cdist(x.flatten(1), self.images).argmin(1)
        return x.flatten(1), nn.functional.one_hot(self.classes[near], CLASSES).float()


JUDGE = NearestDigit()


def real(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a canvas of every caption, of digits that are not trained on."""
    rows = torch.arange(len(CAPTIONS))
    return load(DIGITS_TEXT.data, Part.TEST).take(rows, seed, rows)


def test_captions_are_known_words_and_forty_pairs_are_held_out():
    assert backbones.Vocabulary(WORDS).digest() == VOCABULARY
    assert Counter(caption.group for caption in CAPTIONS) == {
        Group.SINGLE: 10,
        Group.SEEN: 160,
        Group.HELD_OUT: 40,
    }
    assert len(captions_of(RELATIONS_NAME)) == DIGITS_TEXT_RELATIONS.data.num_classes

    # The mirror image of a pair that is held out is trained on.
    groups = {(c.digits, c.corners): c.group for c in CAPTIONS}
    for (digits, corners), group in groups.items():
        if group is Group.HELD_OUT:
            assert groups[digits[::-1], corners] is Group.SEEN
    with pytest.raises(ValueError, match="no captions are known of set 'letters'"):
        captions_of("letters")


def test_a_training_sees_no_held_out_pair_and_draws_digits_by_position():
    images = load(DIGITS_TEXT.data)
    rows = torch.arange(len(images))
    x, y = images.take(rows, 0, rows)
    groups = Counter(CAPTIONS[label].group for label in y.tolist())
    assert groups == {Group.SINGLE: 40, Group.SEEN: 160}
    again, _ = images.take(rows[60:90], 0, rows[60:90])
    other, _ = images.take(rows[60:90], 0, rows[60:90] + 1000)
    assert torch.equal(again, x[60:90]) and not torch.equal(other, again)

    # Nothing lies outside of the cells that the caption names.
    reading = read(JUDGE, x, y, CAPTIONS)
    assert all(reading.scores[name].all() for name in ("all", "digit", "layout"))


@pytest.mark.parametrize(
    ("changes", "part", "words"),
    [
        (dict(split="whole"), Part.TRAIN, "declare its split as held_out"),
        (dict(), Part.VALIDATION, "no validation images"),
        (dict(num_classes=10), Part.TRAIN, "210 captions"),
    ],
)
def test_another_declaration_is_refused(changes: dict, part: Part, words: str):
    with pytest.raises(ValueError, match=words):
        load(replace(DIGITS_TEXT.data, **changes), part)


def test_the_table_holds_the_words_and_refuses_others():
    table = table_of(DIGITS_TEXT.data)
    assert table.ids is not None and table.ids.shape == (211, 9)
    vocabulary = backbones.Vocabulary(WORDS)
    with pytest.raises(ValueError, match="no word 'cat'"):
        vocabulary.encode(["a cat left of a two"], 9)


def test_a_judge_tells_exchanged_missing_and_stray_digits():
    x, y = real()
    right = read(JUDGE, x, y, CAPTIONS)
    assert right.mean("all", Group.HELD_OUT)[0] > 0.9
    assert right.mean("layout", Group.SEEN) == (1.0, 0.0)

    # Canvases of the mirror captions have the right words in the wrong places.
    mirror = {(c.digits[::-1], c.corners): n for n, c in enumerate(CAPTIONS)}
    labels = torch.tensor([mirror[c.digits, c.corners] for c in CAPTIONS])
    swapped = read(JUDGE, x, labels, CAPTIONS)
    assert swapped.mean("swapped", Group.SEEN)[0] > 0.7  # doubles are not counted
    assert swapped.mean("all", Group.SEEN)[0] < 0.2
    distinct = [c.digits != c.digits[::-1] for c in CAPTIONS]
    assert (swapped.scores["swapped"] + swapped.scores["all"] <= 1).all()
    assert not swapped.scores["swapped"][~np.array(distinct)].any()

    # A blank cell and a stray digit are no layout.
    pair = TEXTS.index("a one left of a two")
    blank, stray = x[pair : pair + 1].clone(), x[pair : pair + 1].clone()
    blank[..., 8:] = -1
    stray[..., :4, :4] = 1
    for canvas in (blank, stray):
        assert read(JUDGE, canvas, torch.tensor([pair]), CAPTIONS).scores["layout"] == 0


def test_the_distance_to_real_canvases_grows_with_noise():
    x, y = real()
    other = read(JUDGE, *real(1), CAPTIONS)
    noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    near, error = read(JUDGE, x, y, CAPTIONS).distance(other)
    assert 0 < near < read(JUDGE, noisy, y, CAPTIONS).distance(other)[0]
    assert 0 < error < near


def test_an_evaluation_records_scores_real_images_and_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    identity = {"classifier_accuracy": 1.0, "classifier_sha256": "0"}
    monkeypatch.setattr(stage, "cell_judge", lambda cache: (JUDGE, identity))
    monkeypatch.setattr(stage, "COURSE_STEPS", 2)
    protocol = replace(
        DIGITS_TEXT,
        recipe=replace(DIGITS_TEXT.recipe, steps=2, batch=4, warmup=1, power_snapshots=2),
        sampler=replace(DIGITS_TEXT.sampler, num_steps=2),
        num=210,
    )
    row = TABLE_V2_3.row("DiCo-DWC")
    row = replace(row, small=row.small | dict(dim=4))
    context = RunContext(tmp_path / "run")
    context.folder.mkdir()
    run_training(train_stage(row, protocol, 0), context)

    values = run_evaluation(evaluate_stage(row, protocol, 0), tmp_path, context)
    assert values["all_held_out"] < 0.2 < 0.9 < values["all_held_out_real"]
    assert values["fd_digits_text"] > 2 * values["fd_digits_text_real"]
    assert values["course"]["steps"] == [1, 2]
    assert len(values["course"]["all_held_out"]) == 2 and values["binding_step"] is None
    assert values["manifest"]["measure"]["reference"]["split"] == "test"

    # Other data have no cells to read.
    with pytest.raises(ValueError, match="read captioned digits"):
        stage.score_captioned(
            replace(
                evaluate_stage(row, protocol, 0),
                train=replace(
                    train_stage(row, protocol, 0), data=replace(protocol.data, name="digits")
                ),
            ),
            tmp_path,
            context,
        )
