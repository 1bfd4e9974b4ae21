"""Records of timings, written by hand, for tests of what is made of them."""

from __future__ import annotations

from experiments.engine.records.store import Store
from experiments.engine.specs.spec import Stage


def record_values(store: Store, stage: Stage, **values: object) -> None:
    """Append a finished record, as a GPU or a CPU of a known name makes it."""
    store.append(stage, "done", values, {"device": "a GPU", "cpu": "a CPU"})


def timing_values(rate: float, relative: float, spread: float = 0.0) -> dict[str, object]:
    """Return the values of a timing: images per second and the ratio to the baseline."""
    return dict(
        images_per_s=rate,
        images_per_s_spread=1.0,
        relative=relative,
        relative_spread=spread,
        peak_memory_bytes=2**31,
        joules_per_image=0.5,
    )
