"""Captions of digits as states of a sentence encoder: its tokens, its table, and a training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import prepare
from experiments.declared.protocols import DIGITS_TEXT_MINILM, DIGITS_TEXT_MINILM_POOLED
from experiments.engine.data import locate
from experiments.engine.data.captioned.grammar import captions_of
from experiments.engine.data.sets import load
from experiments.engine.runtime.context import RunContext
from experiments.engine.specs.spec import Data
from experiments.engine.specs.stages import Protocol, network, train_stage
from experiments.engine.texts.sentences import load_sentence_encoder
from experiments.engine.texts.tables import give_captions, table_of
from experiments.engine.texts.wordpiece import split_words
from experiments.engine.training.networks import build
from experiments.engine.training.stage import run_training
from experiments.text_to_image import TABLE_V2_3
from tests.support.sentences import CONFIG, WORDS, write_sentence_encoder

CPU = torch.device("cpu")
ROW = TABLE_V2_3.row("DiCo-CrossAttn")
TEXTS = [caption.text for caption in captions_of("digits_text")]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locate, "ROOT", tmp_path / "data")
    return write_sentence_encoder(tmp_path / "encoder")


def run_prepare(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "captions", *line.split()])
    return prepare.main()


def small(protocol: Protocol, captions: str) -> Protocol:
    """Return a protocol of two steps whose captions are states of the small encoder."""
    return replace(
        protocol,
        data=replace(protocol.data, captions=captions),
        recipe=replace(protocol.recipe, steps=2, batch=2, warmup=1, power_snapshots=0),
        options=protocol.options | dict(context_dim=12, dim=4, head_dim=4),
    )


def test_words_are_cut_and_lose_case_and_accents():
    assert split_words("  Café-Noir\t12's\n日本 a\u200bb \ufffd$") == (
        ["cafe", "-", "noir", "12", "'", "s", "日", "本", "ab", "$"]
    )


def test_the_longest_pieces_come_first_and_states_end_in_zeros(encoder: Path):
    sentences = load_sentence_encoder(encoder)
    ids = sentences.pieces.tokens("A nine ABOVE sevens")
    assert [WORDS[number] for number in ids] == (
        ["[CLS]", "a", "nine", "abo", "##ve", "seven", "##s", "[SEP]"]
    )
    states, pooled = sentences.encode(["a seven", "", "a nine left of a two"], 9)
    assert [int(row.any(1).sum()) for row in states] == [4, 2, 8]
    mean = states[0, :4].mean(0)
    torch.testing.assert_close(pooled[0], mean / mean.norm())

    # A text does not feel its neighbours, and its order counts.
    torch.testing.assert_close(sentences.encode(["a seven"], 9)[0][0], states[0], rtol=0, atol=0)
    exchanged = sentences.encode(["a two left of a seven"], 9)[0]
    named = sentences.encode(["a seven left of a two"], 9)[0]
    assert (named.sum(1) - exchanged.sum(1)).abs().max() > 1e-3

    for text, words in (("a seven above a cat", "no pieces of cat"), ("a " * 8, "10 tokens")):
        with pytest.raises(ValueError, match=words) as refusal:
            sentences.encode([text], 9)
        assert "\n" not in str(refusal.value)


def test_states_are_prepared_once_and_both_variants_train_on_them(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    name = load_sentence_encoder(encoder).name
    states, pooled = (
        small(protocol, name) for protocol in (DIGITS_TEXT_MINILM, DIGITS_TEXT_MINILM_POOLED)
    )
    with pytest.raises(ValueError, match="lacks the states of its captions .*prepare.py captions"):
        load(states.data)
    line = f"--protocol digits_text_minilm --encoder {encoder / 'model.safetensors'}"
    assert run_prepare(monkeypatch, line) == 0
    assert f"Data(captions={name!r})" in capsys.readouterr().out

    # The control's tokens all are the pooled vector, whose numbers are of order 1.
    table, control = table_of(states.data), table_of(pooled.data)
    expected, vectors = load_sentence_encoder(encoder).encode([*TEXTS, ""], 9)
    torch.testing.assert_close(table.context, expected)
    torch.testing.assert_close(control.context, 12**0.5 * vectors[:, None].expand(-1, 9, -1))
    assert table.pooled is control.pooled is None

    # Both are other runs than those on words, and say on which states they were trained.
    digests = []
    for protocol in (states, pooled):
        spec = train_stage(ROW, protocol, 0)
        assert spec.backbone.options["vocabulary"] is None
        folder = tmp_path / protocol.name
        digests.append(run_training(spec, RunContext(folder))["captions_sha256"])
    assert digests == [table.digest(), control.digest()]


def test_another_encoder_and_another_width_are_one_line(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    name = load_sentence_encoder(encoder).name
    line = "--protocol digits_text_minilm --encoder"
    assert run_prepare(monkeypatch, f"{line} {encoder}") == 0
    other = write_sentence_encoder(tmp_path / "other", seed=1)
    assert run_prepare(monkeypatch, f"{line} {other}") == 2
    message = capsys.readouterr().err
    assert f"of the encoder {name}" in message and message.count("\n") == 1

    # What is declared and what lies there must agree.
    protocol = small(DIGITS_TEXT_MINILM, name)
    data: Data = replace(protocol.data, captions="another")
    with pytest.raises(ValueError, match=f"of the encoder {name}, not of another"):
        give_captions(build(network(ROW, protocol), 0, CPU), data)
    wide = replace(protocol, options=protocol.options | dict(context_dim=384))
    with pytest.raises(ValueError, match="tokens of width 12, pooled None; this network reads"):
        give_captions(build(network(ROW, wide), 0, CPU), protocol.data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="roberta"), "model_type 'roberta'"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps 1e-05"),
        (dict(vocab_size=30), "the encoder has 30"),
        (dict(hidden_size=None), "describes no BERT encoder"),
    ],
)
def test_an_encoder_of_another_form_is_one_line(tmp_path: Path, changes: dict, words: str):
    sizes = {name: value for name, value in changes.items() if name == "vocab_size"}
    folder = write_sentence_encoder(tmp_path / "encoder", **sizes)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError) as refusal:
        load_sentence_encoder(folder)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
