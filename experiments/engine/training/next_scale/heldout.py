"""The held-out loss of a network that predicts tokens: the cross-entropy of held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.engine.autoregressive.objective import NextScale
from experiments.engine.autoregressive.tokenizer import encode_tokens, reconstruction_error
from experiments.engine.numerics.precision import precision
from experiments.engine.numerics.weights import digest
from experiments.engine.records.score_names import HELDOUT_CROSS_ENTROPY
from experiments.engine.specs.spec import HeldOut
from experiments.engine.training.averages import initial_share, warn_of_initial_share
from experiments.engine.training.networks import load_ema
from experiments.engine.training.next_scale.tokens import load_tokenizer

FORMULA = (
    "mean over images and tokens of all scales of the cross-entropy in nats, each token given what "
    "coarser scales of its image make"
)
BATCH = 250


def measure_cross_entropy(
    spec: HeldOut, folder: Path, device: torch.device, images: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Score the EMA network of a finished training with true labels.

    Args:
        spec: what is scored. Of its bins and draws nothing is read: no noise enters.
        folder: of the training.
        device: where the network runs.
        images: those that are scored, (N, C, H, W), and their labels (N,).

    Returns:
        The values of the record: the cross-entropy, that of each scale, the mean squared error of
        the images that the tokenizer makes of its own tokens, and what decided them.

    Raises:
        ValueError: the training has not finished.
    """
    trained = load_tokenizer(spec.train, folder.parent, device)
    network: Any = load_ema(spec.train, folder, device)
    objective = NextScale(trained.network)
    entry = objective.training_entry(network)

    # One row of losses for each image.
    x0, y = images
    rows = []
    with torch.inference_mode(), precision("fp32", device):
        for part, labels in zip(x0.split(BATCH), y.split(BATCH), strict=True):
            tokens = encode_tokens(trained.network, part.to(device))
            rows.append(objective.losses(entry, tokens, labels.to(device))["tokens"])
    losses = torch.cat(rows).double()
    scales = [part.mean().item() for part in losses.split(network.lengths, dim=1)]
    values: dict[str, Any] = {
        HELDOUT_CROSS_ENTROPY.key: losses.mean().item(),
        "by_scale": scales,
        "num": len(y),
        "part": spec.part,
        "tokenizer_mse_heldout": reconstruction_error(trained.network, x0.to(device)),
        "weights_sha256": digest(network),
        "initial_share": initial_share(spec.train.recipe),
        "formula": FORMULA,
        **trained.identity,
    }
    warnings = warn_of_initial_share(values["initial_share"])
    return values | ({"warnings": warnings} if warnings else {})
