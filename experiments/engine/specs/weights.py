"""A file of weights from which a training starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = ("same", "keep", "redraw")


@dataclass(frozen=True)
class Weights:
    """Weights of others, known by their content."""

    # SHA-256 of the file, or of the names and digests of a folder's files.
    sha256: str
    # Key in the file under which the weights lie; this one also stands for other usual places.
    key: str = "ema"
    # What becomes of the label table. 'same': it has the network's number of classes. 'keep': the
    # classes that both have and the null label keep their rows, and further rows are drawn.
    # 'redraw': the whole table is drawn.
    labels: str = "same"

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(
                f"unknown labels {self.labels!r} of weights; known: {', '.join(LABELS)}"
            )
