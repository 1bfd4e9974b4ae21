"""Train one network in a given tree of this suite, some steps at a time, and tell the CPU seconds.

    worker.py TREE < requests

The first line of the standard input is a training in JSON, every other line a number of steps. Each
is answered by a line with the CPU seconds that the steps took, and the last loss. The file runs in
older trees too: up to commit ae474e9 the trainer lies elsewhere.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any

# More steps than anybody asks for.
ENDLESS = 10**6
IMAGES = 1797


def build_steps(training: dict[str, Any]) -> Iterator[Any]:
    """Return the losses of an endless training on noise."""
    import numpy as np
    import torch

    specs = _import("specs.spec", "spec")
    trainer = _import("training.trainer", "train")
    is_old = trainer.__name__.endswith(".train")

    # Both trees name the fields of a training alike.
    _import("numerics.device", "machine").keep_memory()
    data = _build(specs.Data, training["data"])
    recipe = _build(specs.Recipe, training["recipe"] | {"steps": ENDLESS})
    backbone = specs.Backbone(training["name"], _with_tuples(training["options"]))
    draw = np.random.default_rng(0)
    shape = (IMAGES, data.channels, data.size, data.size)
    pixels = draw.uniform(-1, 1, shape).astype(np.float32)
    labels = draw.integers(0, data.num_classes, IMAGES)
    images = _import("data.sets", "data").ImageSet(pixels, labels, data)
    device = (torch.device("cpu"),) if is_old else ()
    return trainer.Trainer(specs.Train(backbone, data, recipe), *device).steps(images)


def _import(module: str, old: str) -> Any:
    """Import a module of the engine by its name, or by that of older trees."""
    try:
        return import_module(f"experiments.engine.{module}")
    except ModuleNotFoundError:
        return import_module(f"experiments.engine.{old}")


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """Build a dataclass from the fields that the tree knows; the trainings use no newer one."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def _with_tuples(value: Any) -> Any:
    """Turn the lists of JSON into tuples, at any depth of dictionaries."""
    if isinstance(value, dict):
        return {name: _with_tuples(each) for name, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    """Answer requests until the input ends."""
    sys.path.insert(0, sys.argv[1])
    import torch

    torch.set_num_threads(1)
    losses = build_steps(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        started = time.process_time()
        for _ in range(int(line)):
            loss = next(losses)
        seconds = time.process_time() - started
        print(json.dumps({"seconds": seconds, "loss": float(loss)}), flush=True)


if __name__ == "__main__":
    main()
