"""A fingerprint of a network's weights, which ties a record to the network that it measured."""

from __future__ import annotations

import hashlib

from torch import nn

from experiments.engine.numerics.parts import make_whole


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of a network's weights as 16 hexadecimal digits.

    Processes that share the network all call this.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = make_whole(tensor.detach())
        total.update(name.encode() + whole.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
