"""Which trainings have left a finished network, by the names of their checkpoints. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Evaluate, spec_id

# A checkpoint's step, and the start of its SHA-256. A folder of parts has no suffix.
CHECKPOINT_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})(?:\.pt)?")


def steps_of(folder: Path) -> int | None:
    """Return how many steps the newest checkpoint of a run's folder has; None without one."""
    names = (
        CHECKPOINT_NAME.fullmatch(path.name) for path in (folder / "checkpoints").glob("step-*")
    )
    return max((int(name[1]) for name in names if name), default=None)


def require_trained(spec: Evaluate, store: Store, command: str) -> None:
    """Raise ValueError if a training that this needs has left no finished network here.

    Args:
        spec: what is sampled.
        store: where its trainings are looked for.
        command: trains them.
    """
    for training in spec.trainings:
        steps = steps_of(store.run_dir(training))
        if steps is not None and steps >= training.recipe.steps:
            continue
        text = f"no finished checkpoint of {training.backbone.name}, training seed {training.seed}"
        text += f", in {store.root}"
        if steps is not None:
            text += f" (step {steps} of {training.recipe.steps})"

        # A record without its checkpoint keeps the training from running again.
        if store.here.latest(training):
            text += f"; it was removed: remove records/train/{spec_id(training)}-*.json too"
        raise ValueError(f"{text}; train it with: {command}")
