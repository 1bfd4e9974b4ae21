"""Captions of pictures as MS-COCO's annotations hold them. Standard library only.

A file is JSON with `images` (id, file_name) and `annotations` (id, image_id, caption).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from experiments.engine.records.files import read_json
from experiments.engine.specs.spec import Data

ADVICE = "download the annotations again"


@dataclass(frozen=True)
class Annotations:
    """The captions of pictures, part by part.

    images: names of files, those that are trained on first, sorted within a part.
    texts: the captions of each picture, by the number of the annotation.
    trained: number of pictures that are trained on.
    """

    images: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    trained: int

    @property
    def captions(self) -> list[str]:
        """Return all captions in the order of their indices."""
        return [text for texts in self.texts for text in texts]

    @property
    def sha256(self) -> str:
        """Return the digest of the pictures' names and captions, in their order."""
        total = hashlib.sha256(f"{self.trained}\n".encode())
        for image, texts in zip(self.images, self.texts, strict=True):
            total.update("\n".join([image, *texts, ""]).encode())
        return total.hexdigest()


def read_annotations(train: Path, validation: Path) -> Annotations:
    """Read the captions of the pictures that are trained on, and of those that are scored.

    Raises:
        ValueError: A file is damaged or empty, a picture has no caption, or both parts hold it.
    """
    parts = [_read_part(path) for path in (train, validation)]
    doubled = sorted(parts[0].keys() & parts[1].keys())
    if doubled:
        raise ValueError(f"{train} and {validation} both describe {doubled[0]}; name two parts")
    images = [name for part in parts for name in sorted(part)]
    texts = [part[name] for part in parts for name in sorted(part)]
    return Annotations(tuple(images), tuple(texts), len(parts[0]))


def _read_part(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the captions of a file by the names of its pictures."""
    content = read_json(path, ADVICE)
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        found: dict[int, list[tuple[int, str]]] = {image: [] for image in names}
        for annotation in content["annotations"]:
            text = " ".join(str(annotation["caption"]).split())
            found[int(annotation["image_id"])].append((int(annotation["id"]), text))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no captions in MS-COCO's form ({type(error).__name__}: {error}); "
            f"{ADVICE}"
        ) from None

    if not any(found.values()):
        raise ValueError(f"{path} holds no caption; {ADVICE}")
    without = sorted(names[image] for image, texts in found.items() if not texts)
    if without:
        raise ValueError(
            f"{path}: {len(without)} of {len(names)} images have no caption, such as {without[0]}; "
            "take them out of the file"
        )
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} names the same file for two images; {ADVICE}")
    return {names[image]: tuple(text for _, text in sorted(found[image])) for image in names}


def describe_annotations(annotations: Annotations, data: Data) -> list[str]:
    """Say how many captions and pictures there are, and whether a protocol is declared for them."""
    number = len(annotations.captions)
    scored = len(annotations.images) - annotations.trained
    lines = [
        f"{number} captions of {annotations.trained} images that are trained on and {scored} that "
        "are scored"
    ]
    if number != data.num_classes:
        lines.append(
            f"warning: MS-COCO 2014 has {data.num_classes} captions, for which the protocols are "
            "declared; they refuse these"
        )
    return lines
