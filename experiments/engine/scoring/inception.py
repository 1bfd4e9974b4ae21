"""The Inception-v3 of FID: torch-fidelity's network under weights whose hash is checked.

Images go in as uint8. The network resizes them to 299 x 299 as TensorFlow 1 did (corner-aligned
grid, no antialiasing) and scales them to (x - 128) / 128. The layers are those of ADM's evaluator:

- pool: the last pooling, 2048 wide;
- spatial: the first seven channels of Mixed_6d's 1 x 1 branch, rows before columns before channels;
- class probabilities, from the last layer's weight WITHOUT its bias.
"""

from __future__ import annotations

import io
import shutil
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import backbones
from experiments.engine.data.image_files import file_sha256
from experiments.engine.data.locate import INCEPTION
from experiments.engine.machine.system_errors import explain, is_of_files, require_file
from experiments.engine.numerics.precision import precision
from experiments.engine.records.files import require_target, written_whole
from experiments.engine.records.manifest import UNKNOWN_FEATURES

if TYPE_CHECKING:
    from torch import nn

URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
SHA256 = "6726825d"  # how the published file's digest begins, as its name says
PUBLISHED = "inception"  # the name of the published weights in manifests
BATCH = 64
SPATIAL_CHANNELS = 7


class Inception:
    """The network on a device.

    Attributes:
        network: torch-fidelity's module.
        sha256: digest of the file of its weights.
        device: where images are measured.
        name: PUBLISHED, or UNKNOWN_FEATURES for weights that are not the published ones.
        warnings: what a record must say of the weights.
    """

    layers: tuple[str, ...] = ("pool", "spatial", "probabilities")

    def __init__(
        self,
        network: Any,
        digest: str,
        device: torch.device | str = "cpu",
        *,
        name: str = PUBLISHED,
        warnings: Sequence[str] = (),
    ) -> None:
        self.network = network.to(device)
        self.sha256 = digest
        self.name = name
        self.warnings = tuple(warnings)
        self.device = torch.device(device)
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: self._spatial.append(output)
        )

    @torch.inference_mode()
    def __call__(self, images: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Return the three layers of one batch, float32, computed in full fp32.

        Args:
            images: uint8 (N, H, W, 3).

        Returns:
            pool (N, 2048), spatial (N, 2023) and probabilities (N, 1008).
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"Inception reads uint8 images (N, H, W, 3), got {images.dtype} {images.shape}"
            )
        x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))).to(self.device)  # (N, 3, H, W)
        self._spatial.clear()
        with precision("fp32", self.device):
            pool, logits = self.network(x)  # (N, 2048), (N, 1008)
        spatial = spatial_vector(self._spatial.pop())  # (N, 2023)
        probabilities = logits.double().softmax(1).float()  # (N, 1008)
        return pool.cpu().numpy(), spatial.cpu().numpy(), probabilities.cpu().numpy()

    def features(self, batches: Iterable[ndarray]) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """Yield the layers of batches of any size, BATCH images at a time.

        The last digits depend on the batch, so it is always the same.
        """
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                yield self(batch[start : start + BATCH])


def spatial_vector(maps: Tensor) -> Tensor:
    """Flatten (N, 192, 17, 17) to (N, 2023), with entry (h * 17 + w) * 7 + c.

    Channels first would give an sFID of 299 where 6 is right.
    """
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def build_network() -> nn.Module:
    """Return the network with untrained weights, in eval mode.

    Raises:
        ValueError: if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "Inception features need torch-fidelity; "
            "install it with `pip install torch-fidelity torchvision`"
        ) from None

    class Network(FeatureExtractorInceptionV3):
        """The network, which ignores the empty file that its constructor loads below."""

        def load_state_dict(self, state: dict[str, Tensor], *args: Any, **options: Any) -> Any:
            return super().load_state_dict(state, *args, **options) if state else None

    # The constructor insists on unpickling a file of weights, so it gets an empty one.
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    layers = ["2048", "logits_unbiased"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network("inception", layers, feature_extractor_weights_path=empty)


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """Return the network with the weights of a file, known by their digest.

    Weights that are not the published ones are recorded as unknown, with a warning.

    Raises:
        ValueError: if the file is missing, or holds no weights of this network that training left.
    """
    require_file(
        path, "Inception weights", f"get {URL} and name it with --inception or $DICO_INCEPTION"
    )
    digest = file_sha256(path)
    network = build_network()
    notes: list[str] = []
    backbones.load_published(network, path, warn=notes.append)
    if digest.startswith(SHA256):
        return Inception(network, digest, device, warnings=notes)

    notes.append(
        f"scored by unknown Inception weights (SHA-256 {digest[:16]}), not by the published ones "
        f"({SHA256}...): FID, sFID, IS and the other scores compare with no others"
    )
    return Inception(network, digest, device, name=UNKNOWN_FEATURES, warnings=notes)


def download_inception(path: Path) -> None:
    """Download the published weights to `path` unless the file exists.

    Raises:
        ValueError: if they cannot be downloaded, or if the file holds other weights.
    """
    fetch(URL, path, "--inception")
    require_published(path)


def fetch(url: str, path: Path, option: str) -> None:
    """Download a file, whole or not at all, unless it exists.

    Args:
        url: where it is published.
        path: where it goes.
        option: what named the path, for messages.

    Raises:
        ValueError: if it cannot be downloaded.
    """
    if path.exists():
        return
    require_target(path, option)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, written_whole(path) as file:
            shutil.copyfileobj(response, file)
    except OSError as error:
        if is_of_files(error):
            raise ValueError(explain(error)) from None
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"the weights cannot be downloaded ({reason}); get {url} elsewhere and put it to {path}"
        ) from None


def require_published(path: Path) -> None:
    """Raise ValueError unless a file holds the published weights."""
    require_file(path, "Inception weights", f"get {URL}, or fetch them with --download")
    digest = file_sha256(path)
    if not digest.startswith(SHA256):
        raise ValueError(
            f"{path}: SHA-256 {digest[:8]}... is not that of the published Inception weights "
            f"({SHA256}...); torchvision's are another network"
        )
