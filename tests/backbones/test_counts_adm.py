"""ADM and LDM at their published sizes, on the meta device, against what was measured on the authors' modules.

`entries` and `keys` are the length of their state_dict and a digest of its names and shapes. LDM's class table is a
module apart in the authors' code and not in these numbers; an upsampler's torchprofile count holds the resize before it.
"""

import csv
import hashlib

import pytest
import torch
from torch import nn

import backbones
from backbones.adm import AttentionBlock
from backbones.ldm import CrossAttention
from experiments.engine.diffusion.cascade import append_low_res
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing.cost import MacCounter
from experiments.engine.timing.cost import count_backbone as count
from tests.support.paths import DATA

AUTHORS = list(csv.DictReader((DATA / "counts_adm.csv").open()))
LABEL_TABLES = {"ldm_4": 1001 * 512, "ldm_8": 1000 * 512}
every_row = pytest.mark.parametrize("row", AUTHORS, ids=lambda row: row["name"])


def published(name: str) -> nn.Module:
    with torch.device("meta"):
        return backbones.build(name)


def resize_cost(size: int) -> int:
    x = torch.empty(1, 3, size, size, device="meta")
    with MacCounter() as macs:
        append_low_res(x, torch.empty(1, 3, size // 4, size // 4, device="meta"))
    assert macs.core == 0
    return macs.extra


@every_row
def test_counts_are_those_of_the_authors_modules(row: dict[str, str]):
    name, size = row["name"], int(row["size"])
    ours = count(
        Cost(
            Backbone(name),
            size=size,
            channels=backbones.options_of(name)["in_channels"],
            num_classes=1000,
        )
    )
    before = resize_cost(size) if "up" in name else 0
    assert (
        ours["params_total"]
        == ours["params_trainable"]
        == int(row["params"]) + LABEL_TABLES.get(name, 0)
    )
    assert abs(ours["macs_core"] / 1e9 - float(row["core_g"])) < 0.51e-4
    assert abs((ours["macs_torchprofile"] + before) / 1e9 - float(row["torchprofile_g"])) < 0.51e-4


def test_counts_cover_every_published_size():
    assert {row["name"] for row in AUTHORS} == set(
        backbones.list_backbones("adm_*") + backbones.list_backbones("ldm_*")
    )


def test_the_parameters_of_adm_u_and_of_ldm_with_its_class_table():
    total = {
        name: sum(p.numel() for p in published(name).parameters())
        for name in (row["name"] for row in AUTHORS)
    }
    assert total["adm_base_64"] + total["adm_up_256"] == 607_700_364
    assert total["adm_base_128"] + total["adm_up_512"] == 730_364_876
    assert (total["ldm_4"], total["ldm_8"]) == (401_433_091, 395_496_196)


@every_row
def test_state_dict_has_the_authors_keys(row: dict[str, str]):
    state = published(row["name"]).state_dict()
    if table := LABEL_TABLES.get(row["name"]):
        assert state.pop("cond_stage_model.embedding.weight").shape == (table // 512, 512)
    lines = sorted(f"{key} {list(value.shape)}" for key, value in state.items())
    assert len(lines) == int(row["entries"])
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == row["keys"]


@pytest.mark.parametrize(
    "name, heads, order",
    [
        ("adm_base_64", [6] * 3 + [9] * 3 + [12] * 8 + [9] * 4 + [6] * 4, "new"),
        ("adm_base_128", [4] * 16, "legacy"),
        ("adm_256", [8] * 2 + [16] * 11 + [8] * 3, "legacy"),
        ("adm_512", [8] * 2 + [16] * 11 + [8] * 3, "legacy"),
        ("adm_up_256", [4] * 16, "legacy"),
        ("adm_up_512", [12] * 11, "legacy"),
        ("ldm_4", [1] * 32, None),
        ("ldm_8", [8] * 4 + [16] * 4 + [32] * 12 + [16] * 6 + [8] * 6, None),
    ],
)
def test_heads_and_their_order_which_no_count_and_no_key_shows(
    name: str, heads: list[int], order: str | None
):
    blocks = [
        module
        for module in published(name).modules()
        if isinstance(module, AttentionBlock | CrossAttention)
    ]
    assert [block.heads for block in blocks] == heads
    assert {getattr(block, "order", None) for block in blocks} == {order}
