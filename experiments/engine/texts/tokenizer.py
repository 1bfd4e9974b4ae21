"""CLIP's tokens: pieces of lower-case words, by byte pairs that are merged in a fixed order.

The order of the merges is the whole vocabulary. It stands in merges.txt of a text encoder's folder,
or in the file that the package open-clip-torch or openai-clip bears.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy import ndarray

from experiments.engine.machine.system_errors import naming

MERGES = "merges.txt"
PACKAGED = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")
BYTES = 256
SPECIALS = 2  # the begin and the end, the last ids
END_OF_WORD = "</w>"
CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
# Runs of letters, single numerals, and runs of anything else, by the kinds of their characters.
WORD = re.compile(r"L+|N|O+")


@cache
def _characters() -> dict[int, str]:
    """Return the printable character that stands for each byte, the printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(BYTES + place) for place, byte in enumerate(others)}


def _kind(character: str) -> str:
    """Return L for a letter, N for a numeral, S for a space and O for all others."""
    if character.isspace():
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def _split(text: str) -> list[str]:
    """Cut a lower-case text into words, contractions, numerals and marks, without its spaces."""
    kinds = "".join(map(_kind, text))
    words, place = [], 0
    while place < len(text):
        match = CONTRACTION.match(text, place) or WORD.match(kinds, place)
        end = place + 1 if match is None else match.end()
        if match is not None:
            words.append(text[place:end])
        place = end
    return words


def find_merges(folder: Path) -> Path:
    """Return the file of merges of a text encoder's folder, or else of an installed package.

    Raises:
        ValueError: There is none.
    """
    own = folder / MERGES
    if own.is_file():
        return own
    for package in PACKAGES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / PACKAGED).is_file():
                return Path(place) / PACKAGED
    raise ValueError(
        f"{folder} holds no {MERGES}, the vocabulary of the text encoder; copy it there, or "
        "pip install open-clip-torch, which bears CLIP's"
    )


class Tokenizer:
    """CLIP's tokenizer.

    sha256: of the merges in their order, whatever the file that holds them.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        """Read a file of merges, as many as the vocabulary has.

        Raises:
            ValueError: The file is damaged or has fewer.
        """
        with naming("read", path):
            content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        except (OSError, EOFError, ValueError):
            raise ValueError(f"{path} holds no merges; copy the vocabulary again") from None

        # The first line says the version. OpenAI's file has more merges than CLIP uses.
        num = vocabulary - 2 * BYTES - SPECIALS
        pairs = [tuple(line.split()) for line in text.splitlines()[1:]]
        pairs = [pair for pair in pairs if pair][: max(num, 0)]
        if num < 0 or len(pairs) < num or any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"{path} holds {len(pairs)} merges, and a vocabulary of {vocabulary} needs {num}; "
                "copy the vocabulary of this very encoder"
            )
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        lines = "\n".join(" ".join(pair) for pair in pairs)
        self.sha256 = hashlib.sha256(lines.encode()).hexdigest()

        # Ids follow: characters, characters that end a word, merges, begin and end.
        characters = list(_characters().values())
        units = [*characters, *(unit + END_OF_WORD for unit in characters)]
        units += ["".join(pair) for pair in pairs]
        self.ids = {unit: number for number, unit in enumerate(units)}
        self.begin = vocabulary - 2
        self.end = vocabulary - 1
        self._known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end."""
        cleaned = unicodedata.normalize("NFC", " ".join(text.split())).lower()
        return [number for word in _split(cleaned) for number in self._word(word)]

    def encode(self, text: str, length: int) -> ndarray:
        """Return ids (length,): begin, the text, and ends. A long text is cut; see `tokens`."""
        inner = self.tokens(text)[: length - 2]
        ids = np.full(length, self.end, np.int64)
        ids[: len(inner) + 1] = [self.begin, *inner]
        return ids

    def _word(self, word: str) -> list[int]:
        """Return the ids of a word, which are merged once."""
        if word not in self._known:
            characters = _characters()
            units = [characters[byte] for byte in word.encode()]
            units[-1] += END_OF_WORD
            self._known[word] = [self.ids[unit] for unit in self._merge(units)]
        return self._known[word]

    def _merge(self, units: list[str]) -> list[str]:
        """Merge pairs of neighbours, those of the first rank everywhere before others."""
        while len(units) > 1:
            pairs = list(zip(units, units[1:], strict=False))
            first = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                return units
            merged: list[str] = []
            place = 0
            while place < len(units):
                is_pair = tuple(units[place : place + 2]) == first
                merged.append("".join(first) if is_pair else units[place])
                place += 2 if is_pair else 1
            units = merged
        return units
