"""Captioned pictures: an index of captions by picture, and latents that draw one at every visit.

A folder of captions holds, besides the states that `texts/states.py` writes:

texts.txt: the captions, one a line; captions of a picture follow each other.
images.txt: names of the pictures' files, those that are trained on first.
starts.npy: for every picture the index of its first caption, and the number of captions, (I + 1,).
manifest.json: what both are, and the number of pictures that are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from experiments.engine.data import locate
from experiments.engine.data.captioned.folders import CAPTIONS, read_captions_manifest
from experiments.engine.data.checks import open_array
from experiments.engine.data.latents import LatentSet
from experiments.engine.data.pictures import Pictures, find_pictures, show_name
from experiments.engine.numerics.randomness import generator_at, seed_at
from experiments.engine.specs.spec import Data

TEXTS, IMAGES, STARTS = "texts.txt", "images.txt", "starts.npy"
REPEAT = "prepare the captions again"


@dataclass(frozen=True)
class CaptionIndex:
    """Which captions belong to which picture.

    images: names of the pictures' files, those that are trained on first.
    starts: index of each picture's first caption, and the number of captions, (I + 1,).
    trained: number of pictures that are trained on; the others are scored.
    sha256: of captions and pictures.
    """

    images: tuple[str, ...]
    starts: ndarray
    trained: int
    sha256: str

    def __len__(self) -> int:
        """Return the number of captions."""
        return int(self.starts[-1])

    def draw(self, images: Sequence[int], seeds: Sequence[int]) -> ndarray:
        """Draw one of each picture's captions, (n,), by a seed for each."""
        first = self.starts[np.asarray(images, np.int64)]
        number = self.starts[np.asarray(images, np.int64) + 1] - first
        draws = np.array([seed % int(num) for seed, num in zip(seeds, number, strict=True)])
        return first + draws.astype(np.int64)

    def scored(self, num: int, seed: int) -> Tensor:
        """Draw one caption of each of `num` pictures that are not trained on, no picture twice.

        Raises:
            ValueError: There are fewer such pictures.
        """
        others = len(self.images) - self.trained
        if num > others:
            raise ValueError(
                f"{num} captions of different pictures are to be scored, and the validation part "
                f"has {others} pictures; score at most as many"
            )
        order = torch.randperm(others, generator=generator_at("captioned pictures", seed))
        seeds = [seed_at("caption of a picture", seed, place) for place in range(num)]
        return torch.from_numpy(self.draw((order[:num] + self.trained).tolist(), seeds))


def captions_folder() -> Path:
    """Return where the captions of MS-COCO lie."""
    return locate.ROOT / CAPTIONS


def read_index() -> CaptionIndex:
    """Read the index of the captions of MS-COCO.

    Raises:
        ValueError: The captions are not on this machine, or the index is damaged.
    """
    folder = captions_folder()
    manifest = read_captions_manifest(folder)
    starts = np.asarray(open_array(folder / STARTS, REPEAT))
    images = tuple((folder / IMAGES).read_text().splitlines())
    fits = starts.shape == (len(images) + 1,) and int(starts[-1]) == manifest["num_captions"]
    if not fits or not 0 < manifest["trained"] <= len(images):
        raise ValueError(f"{folder}: pictures, captions and manifest do not fit; {REPEAT}")
    return CaptionIndex(images, starts, manifest["trained"], manifest["index_sha256"])


def captioned_pictures(root: Path, index: CaptionIndex) -> Pictures:
    """List the pictures that are trained on; a label is a picture's place in the index.

    Raises:
        ValueError: A picture of the folder has no captions, or one of the captions is missing.
    """
    listed = find_pictures(root, 0)
    places = {name: place for place, name in enumerate(index.images[: index.trained])}
    without = [name for name in listed.files if name not in places]
    if without:
        raise ValueError(
            f"{len(without)} of {len(listed.files)} images in {root} have no captions, such as "
            f"{show_name(without[0])}; name the folder of the annotations' training images"
        )
    if missing := sorted(places.keys() - set(listed.files)):
        raise ValueError(
            f"{root} lacks {len(missing)} of {len(places)} images that have captions, such as "
            f"{show_name(missing[0])}"
        )
    labels = tuple(places[name] for name in listed.files)
    return Pictures(root, (), listed.files, labels, listed.left_out)


class CaptionedLatents(LatentSet):
    """Latents whose stored label is a picture; a visit sees one of its captions, all alike."""

    def __init__(self, folder: Path, data: Data) -> None:
        """Open the latents and the index of their captions.

        Raises:
            ValueError: They were prepared with other captions, or are damaged.
        """
        super().__init__(folder, data)
        self.index = read_index()
        used = self.manifest.get("captions")
        if used != self.index.sha256 or self.labels.max() >= self.index.trained:
            raise ValueError(
                f"the latents in {folder.name} were prepared with other captions than those in "
                f"{captions_folder().name}; prepare the latents again"
            )
        self.identity["captions_index"] = self.index.sha256

    def take(self, indices: Tensor, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Read latents (N, C, h, w) float32 and indices of captions (N,).

        Posterior noise and caption come from (seed, position).
        """
        latents, pictures = super().take(indices, seed, positions)
        seeds = [seed_at("caption", seed, position) for position in positions.tolist()]
        return latents, torch.from_numpy(self.index.draw(pictures.tolist(), seeds))


def describe_captions() -> dict[str, Any]:
    """Return what a manifest of scores says of captions that are sampled by."""
    manifest = read_captions_manifest(captions_folder())
    return {
        "sha256": manifest["index_sha256"],
        "encoder": manifest["encoder"]["name"],
        "states_sha256": manifest["sha256"],
        "null": manifest["null"],
        "long": manifest["long"]["rule"],
        "part": "validation",
        "pictures": manifest["num_images"] - manifest["trained"],
        "of_a_picture": 1,
    }
