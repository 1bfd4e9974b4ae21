"""BERT's tokens: the longest known pieces of lower-case words, by the list in vocab.txt."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

from experiments.engine.machine.system_errors import naming

VOCABULARY = "vocab.txt"
BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
INNER = "##"  # before a piece that does not begin its word
LONGEST = 100  # characters of a word; BERT knows no longer one
REPLACEMENT = "\ufffd"  # stands for a character that could not be read
# Blocks of characters that are words of their own, first and last code points.
IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


def _is_mark(character: str) -> bool:
    """Return whether a character is a word of its own: punctuation, or ASCII's other signs."""
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character != " "
    return unicodedata.category(character).startswith("P")


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in IDEOGRAPHS)


def split_words(text: str) -> list[str]:
    """Cut a text into lower-case words without accents, marks and ideographs."""
    # Accents fall away, and so does what is no text. Any space parts words.
    characters: list[str] = []
    for character in unicodedata.normalize("NFD", text):
        category = unicodedata.category(character)
        if character.isspace():
            characters.append(" ")
        elif category == "Mn" or category[0] == "C" or character == REPLACEMENT:
            continue
        elif _is_mark(character) or _is_ideograph(character):
            characters.append(f" {character} ")
        else:
            characters.append(character.lower())
    return "".join(characters).split()


class WordPieces:
    """BERT's tokenizer without cases.

    sha256: of the pieces in their order.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        """Read a file of pieces, as many as the encoder has, one a line.

        Raises:
            ValueError: The file is missing or damaged, or is of another encoder.
        """
        if not path.is_file():
            raise ValueError(
                f"{path.parent} holds no {path.name}, the vocabulary of the text encoder; copy it "
                "there"
            )
        with naming("read", path):
            content = path.read_bytes()
        try:
            pieces = content.decode().removesuffix("\n").split("\n")
        except ValueError:
            raise ValueError(f"{path} holds no text; copy the vocabulary again") from None
        self.ids = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
        missing = [piece for piece in (BEGIN, END) if piece not in self.ids]
        if len(self.ids) != vocabulary or missing:
            without = f" and lacks {', '.join(missing)}" if missing else ""
            raise ValueError(
                f"{path} holds {len(self.ids)} pieces{without}, and the encoder has {vocabulary}; "
                "copy the vocabulary of this very encoder"
            )
        lines = "".join(f"{piece}\n" for piece in self.ids)
        self.sha256 = hashlib.sha256(lines.encode()).hexdigest()

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text between begin and end.

        Raises:
            ValueError: No pieces make one of its words.
        """
        words = split_words(text)
        pieces = {word: self._pieces(word) for word in words}
        if unknown := [word for word, ids in pieces.items() if not ids]:
            raise ValueError(
                f"{text[:60]!r}: the vocabulary has no pieces of {', '.join(unknown)}; write the "
                "caption with other words"
            )
        inner = [piece for word in words for piece in pieces[word]]
        return [self.ids[BEGIN], *inner, self.ids[END]]

    def _pieces(self, word: str) -> list[int]:
        """Return the ids of a word, always the longest known piece next; [] for an unknown one."""
        ids: list[int] = []
        start = 0
        while start < len(word) <= LONGEST:
            prefix = INNER if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), None)
            if end is None:
                return []
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids
