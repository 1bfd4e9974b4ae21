"""Captions as conditions: tables, the null caption, work that is done once, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import backbones
from backbones.captions import Captions, CaptionTable, Text, TextNetwork, once_per_caption
from backbones.words import Vocabulary, WordEncoder
from experiments.engine.diffusion.guidance import Guided
from tests.support.networks import randomise

NAMES = ["dico_cross_s_t2i", "dico_dwc_s_t2i", "uvit_s_2_t2i", "mmdit_t2i", "sd_1", "sdxl"]
CAPTIONS = 4
every_network = pytest.mark.parametrize("name", NAMES)


def network(name: str, **options: object) -> TextNetwork:
    shape = dict(input_size=8, in_channels=3, num_classes=CAPTIONS)
    tiny = backbones.tiny_options_of(name)
    model = backbones.build(name, **tiny | shape | options)
    assert isinstance(model, TextNetwork)
    return randomise(model).eval()


def table_for(model: TextNetwork, encoder: str = "abc") -> CaptionTable:
    captions = model.captions
    draw = torch.Generator().manual_seed(3)
    context = torch.randn(CAPTIONS + 1, captions.tokens, captions.dim, generator=draw)
    pooled = None
    if captions.pooled_dim is not None:
        pooled = torch.randn(CAPTIONS + 1, captions.pooled_dim, generator=draw)
    return CaptionTable(context, pooled, encoder=encoder)


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(3, 3, 8, 8, generator=draw), torch.tensor([0.3, 0.3, 0.3])


@every_network
def test_an_index_is_its_row_and_the_null_caption_is_the_last_one(name: str):
    model = network(name)
    table = table_for(model)
    model.captions.give(table)
    x, t = inputs()
    y = torch.tensor([2, CAPTIONS, 0])
    text = Text(table.context[y], None if table.pooled is None else table.pooled[y])
    with torch.no_grad():
        out = model(x, t, y)
        assert torch.equal(out, model(x, t, text))

        # A dropped caption is the null caption, and no other.
        dropped = torch.where(torch.tensor([True, False, False]), CAPTIONS, y)
        null = model(x, t, dropped)
    assert torch.equal(null[1:], out[1:])
    assert (null[0] - out[0]).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(null, model(x, t, torch.tensor([CAPTIONS, CAPTIONS, 0])))


@every_network
def test_work_done_once_per_caption_equals_the_uncached_path(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Guidance doubles the batch, and the null caption is one row however often it is asked for."""
    model = network(name).double()
    model.captions.give(table_for(model).map(Tensor.double))
    x, t = inputs()
    y = torch.tensor([2, 0, 2])
    guided = Guided(model, 2.0, CAPTIONS, channels=None)
    batches: list[int] = []
    work = model.text_work

    def note(text: Text) -> tuple[Tensor, ...]:
        batches.append(len(text.context))
        return work(text)

    monkeypatch.setattr(model, "text_work", note)
    with torch.no_grad():
        expected = [guided(x.double(), t + i, y) for i in range(3)]
        plain = model(x.double(), t, y)
        assert batches == [6, 6, 6, 3]
        batches.clear()
        with once_per_caption(model, y):
            again = [guided(x.double(), t + i, y) for i in range(3)]
            alone = model(x.double(), t, y)
        assert batches == [3]
        torch.testing.assert_close(again, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(alone, plain, rtol=1e-11, atol=1e-11)

        # A caption that was not announced is refused, and nothing is kept afterwards.
        with once_per_caption(model, y), pytest.raises(IndexError):
            model(x.double(), t, torch.tensor([1, 0, 2]))
        assert torch.equal(model(x.double(), t, y), plain)


def test_guidance_takes_the_pooled_vector_of_the_null_caption_too():
    model = network("sdxl")
    table = table_for(model)
    model.captions.give(table)
    x, t = inputs()
    y = torch.tensor([2, 0, 1])
    null = torch.full_like(y, CAPTIONS)

    # The two halves are written out, and one with the tokens of null alone.
    with torch.no_grad():
        guided = Guided(model, 2.0, CAPTIONS, channels=None)(x, t, y)
        conditional, unconditional = (
            model(x, t, Text(table.context[rows], table.pooled[rows])) for rows in (y, null)
        )
        wrong = model(x, t, Text(table.context[null], table.pooled[y]))
    expected = unconditional + 2 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    assert (wrong - unconditional).abs().max() > 1e-3


def test_the_table_is_no_weight_and_moves_with_the_weights():
    model = network("uvit_s_2_t2i")
    names = set(model.state_dict())
    table = table_for(model)
    model.captions.give(table)
    assert set(model.state_dict()) == names
    assert not list(model.captions.parameters()) and not list(model.buffers())

    average = copy.deepcopy(model)
    assert average.captions.table is table
    average.double()
    assert average.captions.table.context.dtype == torch.float64
    assert model.captions.table is table

    # The digest tells tables apart, and the encoder is part of it.
    assert table.digest() == table.map(Tensor.clone).digest()
    other = CaptionTable(table.context, encoder="other")
    changed = CaptionTable(table.context + 1e-6, encoder="abc")
    assert len({table.digest(), other.digest(), changed.digest()}) == 3


def test_without_a_table_indices_have_codes_that_differ():
    model = network("sdxl")
    text = model.captions(torch.arange(CAPTIONS + 1))
    assert torch.pdist(text.context.flatten(1)).min() > 0.1
    assert torch.pdist(text.pooled).min() > 0.01
    with pytest.raises(IndexError, match=r"0\.\.4"):
        model.captions(torch.tensor([CAPTIONS + 1]))


VOCABULARY = Vocabulary(["a", "left", "of", "seven", "two"])
SENTENCES = ["a seven", "a seven left of a two", "a two left of a seven"]


def test_words_become_ids_with_a_null_caption_after_them():
    ids = VOCABULARY.encode(SENTENCES, 9)
    assert ids.shape == (4, 9)
    assert ids[0].tolist() == [0, 2, 5, 1, 1, 1, 1, 1, 1]
    assert ids[3].tolist() == [0] + [1] * 8
    assert len(VOCABULARY) == 7
    assert VOCABULARY.digest() != Vocabulary(["a"]).digest()


@every_network
def test_a_word_encoder_is_trained_along(name: str):
    """Its weights have gradients, and the same words in another order are another caption."""
    if name == "sdxl":
        with pytest.raises(ValueError, match="no pooled vector"):
            network(name, vocabulary=7)
        return
    options = dict(num_classes=3, context_tokens=9, context_dim=8, vocabulary=len(VOCABULARY))
    model = network(name, **options).double()
    model.captions.give(CaptionTable(ids=VOCABULARY.encode(SENTENCES, 9)))

    # Gradients reach the encoder.
    x, t = inputs()
    out = model(x.double(), t, torch.tensor([1, 2, 3]))
    out.square().sum().backward()
    for key, parameter in model.captions.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key

    # Captions 1 and 2 have the same words.
    with torch.no_grad():
        same = x[:1].double().expand(2, -1, -1, -1)
        one, other = model(same, t[:2], torch.tensor([1, 2]))
    assert (one - other).abs().max() > 1e-4


def test_a_word_encoder_of_the_protocol_has_35_thousand_parameters():
    encoder = WordEncoder(18, 9, 64)
    assert sum(p.numel() for p in encoder.parameters()) == 35_328
    assert encoder.words.weight.std().item() == pytest.approx(0.5, rel=0.1)
    kept = backbones.build(
        "dico_dwc_s_t2i",
        **backbones.tiny_options_of("dico_dwc_s_t2i") | dict(vocabulary=300, context_dim=8),
    )
    assert kept.captions.encoder.words.weight.std().item() == pytest.approx(0.5, rel=0.1)


def states(captions: int = CAPTIONS, tokens: int = 5, dim: int = 10) -> CaptionTable:
    return CaptionTable(torch.zeros(captions + 1, tokens, dim), encoder="abc")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (states(tokens=6), ["caption of 6 tokens is longer than the context of 5"]),
        (states(tokens=4), ["4 tokens of width 10", "another text encoder"]),
        (states(dim=12), ["width 12", "width 10", "another text encoder"]),
        (states(captions=0), ["empty"]),
        (states(captions=5), ["5 captions", "num_classes=5"]),
        (CaptionTable(), ["states (context) or ids"]),
        (CaptionTable(ids=torch.zeros(5, 5, dtype=torch.long)), ["reads states"]),
        (CaptionTable(states().context, torch.zeros(5, 3), encoder="abc"), ["pooled 3"]),
        (CaptionTable(states().context, encoder="xyz"), ["encoder xyz", "not of abc"]),
        (CaptionTable(states().context), ["without a hash", "not of abc"]),
    ],
)
def test_a_table_that_is_not_the_networks_is_refused_in_a_line(
    table: CaptionTable, words: list[str]
):
    captions = Captions(CAPTIONS, 5, 10)
    with pytest.raises(ValueError) as refusal:
        captions.give(table, encoder="abc")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)
    assert captions.table is None


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(4, 10), ["10 tokens is longer than the context of 9"]),
        (torch.zeros(4, 8), ["need 9 tokens, got 8", "pad"]),
        (torch.full((4, 9), 7), ["0..6", "7..7", "another vocabulary"]),
        (None, ["reads ids"]),
    ],
)
def test_ids_that_are_not_the_encoders_are_refused_in_a_line(ids: Tensor | None, words: list[str]):
    captions = Captions(3, 9, 8, vocabulary=7)
    table = states(captions=3, tokens=9, dim=8) if ids is None else CaptionTable(ids=ids.long())
    with pytest.raises(ValueError) as refusal:
        captions.give(table)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([], ["empty"]),
        (["a nine"], ["'nine'", "known: a, left, of, seven, two"]),
        (["a " * 9], ["10 tokens", "context of 9"]),
    ],
)
def test_captions_that_cannot_be_encoded_are_refused_in_a_line(
    captions: list[str], words: list[str]
):
    with pytest.raises(ValueError) as refusal:
        VOCABULARY.encode(captions, 9)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_text_of_another_shape_is_refused_at_the_call():
    model = network("mmdit_t2i")
    x, t = inputs()
    with pytest.raises(ValueError, match="longer than the context of 5"):
        model(x, t, Text(torch.zeros(3, 6, 10)))
    with pytest.raises(ValueError, match="at least one caption"):
        backbones.build("mmdit_t2i", num_classes=0)
