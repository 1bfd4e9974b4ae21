"""CLIP's tokens: how texts are cut, and how byte pairs are merged."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from experiments.engine.texts import tokenizer
from experiments.engine.texts.tokenizer import PACKAGED, Tokenizer, find_merges
from tests.support.coco import CONFIG, MERGES

VOCABULARY = CONFIG["vocab_size"]


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    path = tmp_path / "merges.txt"
    path.write_text("\n".join(["#version: 0.2", *MERGES, "z z"]) + "\n")
    return path


def test_words_are_cut_at_kinds_of_characters_and_contractions():
    text = "it's 25 o'clock, café's №½!! they'll_go"
    words = ["it", "'s", "2", "5", "o", "'", "clock", ",", "café", "'s", "№", "½", "!!"]
    assert tokenizer._split(text) == [*words, "they", "'ll", "_", "go"]


def test_pairs_merge_by_rank_and_ids_follow_the_vocabulary(merges: Path):
    clip = Tokenizer(merges, VOCABULARY)
    # 512 characters come before the merges: at</w>, cat</w>, do, dog</w>, th, the</w>, re, red</w>.
    assert clip.tokens("The  RED cat\n") == [517, 519, 513]
    assert clip.tokens("dot") == [514, 256 + ord("t") - ord("!")]
    assert clip.encode("a dog", 6).tolist() == [520, 256 + ord("a") - ord("!"), 515, 521, 521, 521]
    assert clip.encode("", 3).tolist() == [520, 521, 521]

    # A long text is cut before the end.
    assert clip.encode("dog dog dog dog", 4).tolist() == [520, 515, 515, 521]

    # Bytes that are not printable have units of their own.
    assert len(clip.tokens("日")) == 3


def test_the_vocabulary_of_a_package_is_found_and_has_the_same_hash(
    merges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clip = Tokenizer(merges, VOCABULARY)
    assert find_merges(tmp_path) == merges
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tokenizer, "PACKAGES", ())
    with pytest.raises(ValueError, match="holds no merges.txt.*pip install open-clip-torch"):
        find_merges(elsewhere)

    # A package that is installed, with more merges than CLIP uses.
    package = tmp_path / "packages" / "open_clip_like"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / PACKAGED).write_bytes(gzip.compress(merges.read_bytes()))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(tokenizer, "PACKAGES", ("open_clip_like",))
    packaged = Tokenizer(find_merges(elsewhere), VOCABULARY)
    assert packaged.sha256 == clip.sha256
    assert packaged.tokens("the red dog") == clip.tokens("the red dog")


def test_a_file_without_enough_merges_is_refused(merges: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="9 merges, and a vocabulary of 1000 needs 486"):
        Tokenizer(merges, 1000)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="holds no merges"):
        Tokenizer(tmp_path / "x.gz", VOCABULARY)
