"""Where data lies, and what a protocol lacks on this machine. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.engine.spec import Data, Evaluate

ROOT = Path(os.environ.get("DICO_DATA", Path(__file__).resolve().parents[2] / "data"))


def require_data(data: Data) -> None:
    """Raise ValueError in one line, saying how to provide it, where a set is not on this machine."""
    if data.name == "digits":
        return
    if missing := [name for name in ("images.npy", "labels.npy") if not (ROOT / data.name / name).is_file()]:
        shape = f"(M, {data.channels}, {data.size}, {data.size})"
        content = "pixels in [-1, 1]" if data.channels == 3 else "VAE latents times 0.18215"
        raise ValueError(
            f"protocol {data.name} needs {' and '.join(missing)} in data/{data.name} (or $DICO_DATA/{data.name}): "
            f"images.npy float32 {shape}, {content}, and labels.npy integers (M,) below {data.num_classes}"
        )


def require_features(spec: Evaluate) -> None:
    """Raise ValueError in one line where a protocol's score features are not to be had."""
    if spec.features != "digits":
        raise ValueError(
            f"protocol {spec.train.data.name} is scored on {spec.features} features, which this version does not extract; "
            "its networks can be built, counted and timed here (--protocol digits, --table 5)"
        )
