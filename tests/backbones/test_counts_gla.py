"""Counts of DiG and DiffuSSM, by our convention and by that of the published figures.

counts_gla.csv: params and core_g of DiG were measured on the authors' modules, the recurrence added in closed form;
counter_g is what fvcore counts there (the rows at 64 by its rules); published_g is the papers' own figure, where there
is one. DiffuSSM's rows pin our reconstruction.
"""

import csv
from functools import cache

import pytest
import torch

import backbones
from backbones import kernels
from experiments.engine.specs.spec import Backbone, Cost
from experiments.engine.timing import cost
from tests.support.paths import DATA

ROWS = list(csv.DictReader((DATA / "counts_gla.csv").open()))


@cache
def counts(name: str, size: int) -> dict[str, int]:
    return cost.count_backbone(Cost(Backbone(name), size=size, channels=4, num_classes=1000))


def seen_by_fvcore(name: str, size: int) -> int:
    """What DiG's authors report as its Gflops: fvcore's count of their module.

    fvcore does not look inside custom autograd functions, so the recurrence and the SwiGLU's down projection, which is
    fused with the activation, are missing (22 % of the total); a LayerNorm counts four an element.
    """
    options = backbones.options_of(name)
    dim, depth, tokens = options["dim"], options["depth"], (size // options["patch"]) ** 2
    hidden = {384: 1024, 768: 2048, 1024: 2816, 1152: 3072}[dim]
    recurrence = 2 * tokens * (dim // 2) * (dim // options["heads"])
    return (
        counts(name, size)["macs_core"]
        - depth * (recurrence + tokens * hidden * dim)
        + (2 * depth + 1) * 4 * tokens * dim
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']} at {row['size']}")
def test_counts_are_those_on_file(row: dict[str, str]):
    name, size = row["name"], int(row["size"])
    ours = counts(name, size)
    assert ours["params_total"] == int(row["params"])
    assert abs(ours["macs_core"] / 1e9 - float(row["core_g"])) < 0.51e-4
    if row["counter_g"]:
        assert abs(seen_by_fvcore(name, size) / 1e9 - float(row["counter_g"])) < 0.51e-4
        assert not row["published_g"] or float(row["counter_g"]) == pytest.approx(
            float(row["published_g"]), rel=2e-3
        )


def test_the_reconstruction_is_near_the_published_figures():
    """No variant of the published formula meets both resolutions: ours is 9 % above the one and 14 % above the other."""
    published = {
        row["size"]: float(row["published_g"]) for row in ROWS if row["name"] == "diffussm_xl"
    }
    assert counts("diffussm_xl", 32)["params_total"] == pytest.approx(673e6, rel=0.006)
    assert counts("diffussm_xl", 32)["macs_core"] / 1e9 == pytest.approx(published["32"], rel=0.09)
    assert counts("diffussm_xl", 64)["macs_core"] / 1e9 == pytest.approx(published["64"], rel=0.145)


def test_files_cover_every_registered_size():
    assert {row["name"] for row in ROWS} == set(
        backbones.list_backbones("dig_*") + backbones.list_backbones("diffussm_*")
    )


@pytest.mark.parametrize(
    "name, choices", [("dig_s_2", ("chunked", "reference")), ("diffussm_xl", ("fft", "reference"))]
)
def test_a_recurrence_counts_the_same_whatever_runs(name: str, choices: tuple[str, str]):
    model = backbones.build(name, **backbones.tiny_options_of(name), input_size=8)
    op = "gated_linear" if name == "dig_s_2" else "diagonal_ssm"
    seen = []
    for choice in choices:
        with torch.no_grad(), kernels.use(**{op: choice}), cost.MacCounter() as macs:
            model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        seen.append((macs.core, macs.extra))
    meta = cost.count_network(model.to("meta"), 8, 4)
    assert seen[0] == seen[1] == (meta["macs_core"], meta["macs_torchprofile"] - meta["macs_core"])
