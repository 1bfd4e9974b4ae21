"""Parameters and multiply-accumulates of DiS, DiM and DiMSUM.

`params` was read off the authors' modules with class labels, `core_g` is their convolutions, linear layers and matrix
products and two per state, channel and token of each scan, without DiMSUM's dead projections; `published_g` is what the
papers print, by counters that do not see all of it.
"""

import csv

import pytest

import backbones
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import count_backbone as count
from tests.support.paths import DATA

ROWS = list(csv.DictReader((DATA / "counts_ssm.csv").open()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']} at {row['size']}")
def test_counts(row: dict[str, str]):
    ours = count(Cost(Backbone(row["name"]), size=int(row["size"]), channels=4, num_classes=1000))
    assert ours["params_total"] == int(row["params"])
    assert abs(ours["macs_core"] / 1e9 - float(row["core_g"])) < 0.51e-4
    if row["published_g"]:
        assert float(row["published_g"]) < ours["macs_core"] / 1e9


def test_every_size_is_counted():
    assert {row["name"] for row in ROWS} == {
        name
        for family in ("dim_*", "dimsum_*", "dis_*")
        for name in backbones.list_backbones(family)
    }
