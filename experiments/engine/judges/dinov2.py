"""Class tokens of DINOv2's ViT-L/14, as EDM2 takes them for its Fréchet distance.

The network is timm's. Images are resized to 224 x 224 (bicubic, with antialiasing) and scaled by
ImageNet's mean and deviation. A feature is the normalised class token. Other codes differ in two
choices, which every manifest names:

- dgm-eval resizes 8-bit images with PIL, which rounds and clips the result.
- timm resamples the position table with antialiasing and without DINOv2's offset of 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn

import backbones
from experiments.engine.data.image_files import file_sha256
from experiments.engine.machine.system_errors import require_file
from experiments.engine.numerics.precision import precision

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
NETWORK = "vit_large_patch14_dinov2"
SIZE = 224  # pixels of a side
OFFSET = 0.1  # that DINOv2 adds to the new side of a position table
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue
DEVIATION = (0.229, 0.224, 0.225)


class Dinov2:
    """The network on a device.

    Attributes:
        network: the vision transformer.
        sha256: digest of the file of its weights.
        device: where images are measured.
        warnings: what a record must say of the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        digest: str,
        device: torch.device | str = "cpu",
        *,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.network = network.to(device).eval()
        self.sha256 = digest
        self.device = torch.device(device)
        self.warnings = warnings

    @torch.inference_mode()
    def __call__(self, images: ndarray) -> ndarray:
        """Return the class tokens (N, d) of uint8 images (N, H, W, 3), computed in full fp32."""
        x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))).to(self.device)  # (N, 3, H, W)
        with precision("fp32", self.device):
            tokens: Tensor = self.network(standardise(x))
        return tokens.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """Return what names the features in manifests and reference files."""
        return {
            "name": NETWORK,
            "sha256": self.sha256,
            "dtype": "fp32",
            "resize": f"bicubic with antialiasing, {SIZE}, not rounded",
            "positions": f"bicubic without antialiasing, offset {OFFSET}",
        }


def standardise(images: Tensor) -> Tensor:
    """Return grey levels (N, 3, H, W) as what the network reads: (N, 3, 224, 224), float32."""
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    return normalise(x / 255)


def normalise(x: Tensor) -> Tensor:
    """Return pixels (N, 3, H, W) in [0, 1] less ImageNet's mean, over its deviation."""
    mean, deviation = (x.new_tensor(values).view(-1, 1, 1) for values in (MEAN, DEVIATION))
    return (x - mean) / deviation


def resample_positions(table: Tensor, side: int) -> Tensor:
    """Return DINOv2's position table at another side, as its own code resamples it.

    Args:
        table: positions of the class token and of m x m patches, (1, 1 + m^2, d).
        side: the new side, in patches.

    Returns:
        Positions (1, 1 + side^2, d). The class token keeps its own.
    """
    token, grid = table[:, :1], table[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, d, m, m)

    # The scale, and not the size, decides where the new places lie.
    scale = (side + OFFSET) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


def build_network() -> nn.Module:
    """Return timm's network for 224 pixels, untrained, whose output is the class token."""
    import timm

    return timm.create_model(NETWORK, img_size=SIZE, num_classes=0)


def load_dinov2(path: Path, device: torch.device | str = "cpu") -> Dinov2:
    """Return the network with the weights of a file, by DINOv2's or timm's names.

    Raises:
        ValueError: if the file is missing, or holds no weights of this network that training left.
    """
    require_file(path, "DINOv2 weights", f"get {URL} and name it with --dinov2 or $DICO_DINOV2")
    network = build_network()
    side = round((network.state_dict()["pos_embed"].shape[1] - 1) ** 0.5)

    def adapt(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the token of masked training, and resample the positions."""
        adapted = {name: value for name, value in weights.items() if name != "mask_token"}
        table = adapted.get("pos_embed")
        if table is not None and table.ndim == 3 and table.shape[1] > 1:
            adapted["pos_embed"] = resample_positions(table, side)
        return adapted

    # No digest was published with the weights, so a record can only say which file was used.
    digest = file_sha256(path)
    notes = [
        f"DINOv2 weights of SHA-256 {digest[:16]}: their authors publish no digest, so compare "
        "scores under the same one alone"
    ]
    stored, _ = backbones.read_weights(path)
    backbones.load_judged(network, stored, path.name, adapt, warn=notes.append)
    return Dinov2(network, digest, device, warnings=tuple(notes))
