"""Content ids: what they leave out, what they see, and the ones that records already carry.

`python -m tests.engine.specs.test_spec` prints GOLDEN anew. A changed id orphans every record under
the old one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import ablation, main_results
from experiments.declared.protocols import DIGITS_WHOLE, IMAGENET256, PROTOCOLS
from experiments.engine.records.store import Store
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import (
    Backbone,
    Cost,
    Data,
    Diffusion,
    Evaluate,
    Recipe,
    Sampler,
    Stage,
    Timing,
    Train,
    canonical,
    kind_of,
    spec_id,
)
from experiments.engine.specs.stages import (
    Protocol,
    cost_stage,
    evaluate_stage,
    timing_stage,
    train_stage,
)

TABLES = ablation.TABLES | main_results.TABLES
GOLDEN = {
    "4 DiCo-S, cost": "6761a005b753f3c2",
    "4 DiCo-S, timing on cpu": "7f587aebf949ceeb",
    "4 DiCo-S, digits_whole train": "a2e106073dba0e21",
    "4 DiCo-S, digits_whole evaluate": "86e6560665c55dd4",
    "4 DiCo-S, imagenet256 train": "e67ae123d484d7dc",
    "4 DiCo-S, imagenet256 evaluate": "1af74d14d78ab82f",
    "4 CM->Window Attn, cost": "2eacec70ace4d975",
    "4 CM->Window Attn, timing on cpu": "fe18f6d9a14f4ad9",
    "4 CM->Window Attn, digits_whole train": "24e4b0e165efe02a",
    "4 CM->Window Attn, digits_whole evaluate": "9da5ccb1f55993bb",
    "4 CM->Window Attn, imagenet256 train": "82619a9867013b94",
    "4 CM->Window Attn, imagenet256 evaluate": "4f7da053b6ba8a08",
    "3 DiCo (iso.&skip), cost": "854843c2ba9b0939",
    "3 DiCo (iso.&skip), timing on cpu": "415d78a83f82d8ab",
    "3 DiCo (iso.&skip), digits_whole train": "de639edc576a7de9",
    "3 DiCo (iso.&skip), digits_whole evaluate": "d072a6102ad9ffd1",
    "3 DiCo (iso.&skip), imagenet256 train": "79ec8d1d73252437",
    "3 DiCo (iso.&skip), imagenet256 evaluate": "fe4539bc7eb2dca5",
}

PINNED = ((4, "DiCo-S"), (4, "CM->Window Attn"), (3, "DiCo (iso.&skip)"))
ROWS = [
    pytest.param(table, row, id=f"{table.number} {row.label}")
    for table in TABLES.values()
    for row in (*table.rows, *table.outside)
]
DATA = Data("digits", size=8, channels=1, num_classes=10)
TRAIN = Train(Backbone("net", dict(dim=8)), DATA, Recipe(steps=10, batch=4))
STAGES: tuple[Stage, ...] = (
    Evaluate(TRAIN, Sampler(), 100, "digits"),
    Timing(Backbone("net"), 32, 4, 1000, 4, "cpu"),
    Cost(Backbone("net"), 32, 4, 1000),
)


def stages(number: int, label: str) -> dict[str, Stage]:
    table = TABLES[number]
    row = next(row for row in table.rows if row.label == label)
    name = f"{number} {label}"
    found: dict[str, Stage] = {
        f"{name}, cost": cost_stage(row),
        f"{name}, timing on cpu": timing_stage(row, table.baseline, "cpu"),
    }
    for protocol in (DIGITS_WHOLE, IMAGENET256):
        found[f"{name}, {protocol.name} train"] = train_stage(row, protocol, 0)
        found[f"{name}, {protocol.name} evaluate"] = evaluate_stage(row, protocol, 0)
    return found


def changes(value: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a spec, nested ones too, and the spec with that field changed."""
    for f in dataclasses.fields(value):
        old = getattr(value, f.name)
        yield f.name, dataclasses.replace(value, **{f.name: _other(old)})
        if dataclasses.is_dataclass(old):
            yield from (
                (f"{f.name}.{name}", dataclasses.replace(value, **{f.name: new}))
                for name, new in changes(old)
            )


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value[:-1], _other(value[-1])) if value else (1,)
    if isinstance(value, dict):
        return value | {"another": 1}
    return Diffusion("another", 7)


@pytest.mark.parametrize(
    "name, spec",
    [
        pytest.param(name, spec, id=name)
        for pinned in PINNED
        for name, spec in stages(*pinned).items()
    ],
)
def test_ids_of_existing_records_hold(name: str, spec: Stage):
    assert GOLDEN[name] == spec_id(spec)


def test_canonical_form_leaves_defaults_out():
    assert canonical(Recipe(steps=10, batch=4)) == {"kind": "Recipe", "steps": 10, "batch": 4}
    assert canonical(Recipe(steps=10, batch=4, lr=1e-4, betas=(0.9, 0.999), warmup=0)) == canonical(
        Recipe(steps=10, batch=4)
    )
    assert canonical(TRAIN) == {
        "kind": "Train",
        "backbone": {"kind": "Backbone", "name": "net", "options": {"dim": 8}},
        "data": {"kind": "Data", "name": "digits", "size": 8, "channels": 1, "num_classes": 10},
        "recipe": {"kind": "Recipe", "steps": 10, "batch": 4},
    }


def test_a_field_added_with_a_default_keeps_ids():
    old = dataclasses.make_dataclass("Thing", [("a", int)], frozen=True)
    new = dataclasses.make_dataclass(
        "Thing",
        [("a", int), ("b", dict, dataclasses.field(default_factory=dict)), ("c", float, 0.5)],
        frozen=True,
    )
    assert spec_id(old(1)) == spec_id(new(1)) == spec_id(new(1, {}, 0.5))
    assert len({spec_id(new(1)), spec_id(new(1, {"x": 0})), spec_id(new(1, {}, 0.25))}) == 3


def test_ids_are_16_digits_and_tell_kinds_apart():
    same = [dataclasses.make_dataclass(name, [("a", int)])(1) for name in ("One", "Other")]
    assert spec_id(same[0]) != spec_id(same[1])
    assert all(len(spec_id(spec)) == 16 and int(spec_id(spec), 16) >= 0 for spec in STAGES)
    assert [kind_of(spec) for spec in (TRAIN, *STAGES)] == ["train", "evaluate", "timing", "cost"]


def test_ids_do_not_depend_on_the_order_of_options():
    options = dict(dim=8, depths=(1, 2), mixer_options=dict(window=4, heads=2))
    reverse = dict(mixer_options=dict(heads=2, window=4), depths=[1, 2], dim=8)
    assert spec_id(Cost(Backbone("net", options), 8, 1, 10)) == spec_id(
        Cost(Backbone("net", reverse), 8, 1, 10)
    )
    assert spec_id(Cost(Backbone("net", options), 8, 1, 10)) != spec_id(
        Cost(Backbone("net", options | dict(depths=(2, 1))), 8, 1, 10)
    )


@pytest.mark.parametrize("spec", STAGES, ids=kind_of)
def test_every_field_changes_the_id(spec: Stage):
    changed = dict(changes(spec))
    ids = [spec_id(spec), *(spec_id(other) for other in changed.values())]
    assert len(set(ids)) == len(ids)
    if isinstance(spec, Evaluate):
        assert {f"train.recipe.{f.name}" for f in dataclasses.fields(Recipe)} | {
            f"sampler.{f.name}" for f in dataclasses.fields(Sampler)
        } <= set(changed)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, len, Path("x"), b"x", 1j, np.ones(2), np.float32(1), np.int64(1)],
    ids=lambda value: type(value).__name__,
)
def test_values_without_a_stable_form_are_refused(value: Any):
    with pytest.raises(TypeError, match="no canonical form"):
        spec_id(Cost(Backbone("net", dict(deep=dict(x=[value]))), 8, 1, 10))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float):
    with pytest.raises((TypeError, ValueError)):
        spec_id(Cost(Backbone("net", dict(x=value)), 8, 1, 10))


def test_but_keeps_the_options_it_is_not_given():
    assert Backbone("net", dict(a=1, b=2)).but(b=3, c=4) == Backbone("net", dict(a=1, b=3, c=4))


@pytest.mark.parametrize("table, row", ROWS)
def test_declared_rows_are_published_rows(table: Table, row: Row):
    published = Store().published(table.published, table.key)
    assert row.published is None or row.published in published
    assert all(cells["source"] for cells in published.values())


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: str(table.number))
def test_labels_are_unique_and_every_published_row_is_declared(table: Table):
    labels = [row.label for row in (*table.rows, *table.outside)]
    assert len(set(labels)) == len(labels)
    assert [row.published for row in table.rows] == list(
        Store().published(table.published, table.key)
    )


@pytest.mark.parametrize("stage", [train_stage, evaluate_stage])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_rows_and_seeds_are_different_runs(protocol: Protocol, stage: Callable[..., Stage]):
    for table in ablation.TABLES.values():
        ids = {spec_id(stage(row, protocol, seed)) for row in table.rows for seed in (0, 1)}
        assert len(ids) == 2 * len(table.rows)


if __name__ == "__main__":
    print(
        "GOLDEN = {",
        *(
            f'    "{name}": "{spec_id(spec)}",'
            for pinned in PINNED
            for name, spec in stages(*pinned).items()
        ),
        "}",
        sep="\n",
    )
