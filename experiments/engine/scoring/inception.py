"""The Inception-v3 of FID: torch-fidelity's network under weights whose hash is checked.

Images go in as uint8; the network resizes to 299 x 299 as TensorFlow 1 did (corner-aligned grid, no antialiasing) and scales
to (x - 128) / 128. Layers as in ADM's evaluator: pool 2048; spatial, the first seven channels of Mixed_6d's 1 x 1 branch,
rows before columns before channels; class probabilities from the last layer's weight WITHOUT its bias.
"""

from __future__ import annotations

import io
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from experiments.engine.data.image_files import file_sha256
from experiments.engine.data.locate import INCEPTION
from experiments.engine.numerics.precision import precision
from experiments.engine.records.files import written_whole

if TYPE_CHECKING:
    from torch import nn

URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
SHA256 = "6726825d"  # how the published file's digest begins, as its name says
BATCH = 64
SPATIAL_CHANNELS = 7


class Inception:
    """The network on a device; `sha256` names its weights."""

    def __init__(self, network: nn.Module, digest: str, device: torch.device | str = "cpu") -> None:
        self.network, self.sha256, self.device = network.to(device), digest, torch.device(device)
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, given, out: self._spatial.append(out)
        )

    @torch.inference_mode()
    def __call__(self, images: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """uint8 (N, H, W, 3) -> pool (N, 2048), spatial (N, 2023) and probabilities (N, 1008), float32, in full fp32."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"Inception reads uint8 images (N, H, W, 3), got {images.dtype} {images.shape}"
            )
        x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))).to(self.device)  # (N, 3, H, W)
        self._spatial.clear()
        with precision("fp32", self.device):
            pool, logits = self.network(x)  # (N, 2048), (N, 1008)
        return (
            pool.cpu().numpy(),
            spatial_vector(self._spatial.pop()).cpu().numpy(),
            logits.double().softmax(1).float().cpu().numpy(),
        )

    def features(self, batches: Iterator[ndarray]) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """The same, over batches of images of any size, BATCH at a time: the last digits depend on the batch."""
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                yield self(batch[start : start + BATCH])


def spatial_vector(maps: Tensor) -> Tensor:
    """(N, 192, 17, 17) -> (N, 2023): entry (h * 17 + w) * 7 + c. Channels first gives an sFID of 299 where 6 is right."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def architecture() -> nn.Module:
    """The network with untrained weights, in eval mode; ValueError where torch-fidelity is not installed.

    Its constructor insists on unpickling a weight file: it is given an empty one, made here.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "Inception features need torch-fidelity; install it with `pip install torch-fidelity torchvision`"
        ) from None

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(
            self, state: dict[str, Tensor], *args: object, **options: object
        ) -> object:
            return super().load_state_dict(state, *args, **options) if state else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
        )


def load(path: Path, device: torch.device | str = "cpu") -> Inception:
    """The network with the published weights. Raises ValueError in one line for a missing file or any other weights."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no Inception weights; get {URL} and name it with --inception or $DICO_INCEPTION"
        )
    digest = _checked(path)
    network = architecture()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        raise ValueError(
            f"{path.name}: not the weights of the FID Inception-v3 (other names or shapes, or no plain tensors)"
        ) from None
    return Inception(network, digest, device)


def download(path: Path) -> None:
    """Fetch the published weights to `path` unless they are there; ValueError in one line where the network does not allow it."""
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=60) as response, written_whole(path) as file:
                shutil.copyfileobj(response, file)
        except OSError as error:
            raise ValueError(
                f"the Inception weights cannot be downloaded ({getattr(error, 'reason', error)}); get {URL} elsewhere and put it to {path}"
            ) from None
    _checked(path)


def _checked(path: Path) -> str:
    if not (digest := file_sha256(path)).startswith(SHA256):
        raise ValueError(
            f"{path.name}: SHA-256 {digest[:8]}... is not that of the published Inception weights ({SHA256}...); torchvision's are another network"
        )
    return digest
