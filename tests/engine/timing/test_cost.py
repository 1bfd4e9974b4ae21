"""Counts of every declared row equal the paper's, the closed forms and torch's own counter."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones import kernels
from experiments.ablation import TABLE_4, TABLES
from experiments.declared.protocols import CIFAR10_BF16
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Cost
from experiments.engine.specs.stages import cost_stage
from experiments.engine.timing.cost import MacCounter, count_backbone, count_network
from tests.support.marks import slow_after_first
from tests.support.networks import CASES
from tests.support.paths import ROOT

PUBLISHED = ROOT / "results" / "published"
ROWS = {
    f"{table.number} {row.label}": (table, row)
    for table in TABLES.values()
    for row in table.rows + table.outside
    if row.published is not None
}
# By the reconstruction's closed forms: millions of trainable parameters, torchprofile Gflops.
OURS = {
    "3 DiT (iso.)": "32.865 6.0617",
    "3 DiCo (iso.)": "33.722 5.6737",
    "3 DiT (iso.&skip)": "34.342 6.4392",
    "3 DiCo (iso.&skip)": "35.166 6.0428",
    "3 DiT (U-shape)": "32.974 4.2300",
    "3 DiCo (U-shape)": "33.1377 4.2485",
    "3 DiT (U-shape) (alt)": "33.025 4.2350",
    "4 DiCo-S": "33.1377 4.2485",
    "4 GELU->ReLU": "33.1377 4.2485",
    "4 DWC 5x5": "33.2298 4.2863",
    "4 DWC 7x7": "33.3681 4.3429",
    "4 w/o CCA": "32.987 4.2456",
    "4 CCA->SE": "32.911 4.2459",
    "4 CCA->Channel Self-Attn": "33.157 4.2609",
    "4 CM->Self-Attn": "32.974 4.2300",
    "4 CM->Window Attn": "32.966 4.3387",
    "4 CM->Focused Linear Attn": "32.952 4.3143",
    "4 CM->Agent Attn": "33.367 4.2509",
    "4 w/o CCA (alt)": "32.982 4.2422",
    "4 CCA->SE (alt)": "32.916 4.2496",
    "4 CCA->Channel Self-Attn (alt)": "33.213 4.2580",
    "4 CM->Focused Linear Attn (alt)": "32.887 4.3338",
    "4 CM->Agent Attn (alt)": "33.332 4.2359",
}


@cache
def counted(label: str) -> tuple[float, float]:
    """Millions of trainable parameters and Gflops as the paper counts them."""
    counts = count_backbone(Cost(ROWS[label][1].backbone, size=32, channels=4, num_classes=1000))
    return counts["params_trainable"] / 1e6, counts["macs_torchprofile"] / 1e9


def published(table: Table, row: Row) -> tuple[str, str]:
    """Parameters and Gflops as printed."""
    with (PUBLISHED / table.published).open() as file:
        cells = {
            " ".join(line[key] for key in table.key): (line["params_m"], line["gflops"])
            for line in csv.DictReader(file)
        }
    return cells[row.published]


@pytest.mark.slow
@pytest.mark.parametrize("label", ROWS)
def test_rows_are_within_tolerance_of_the_paper(label: str):
    for ours, paper, tolerance in zip(
        counted(label), published(*ROWS[label]), (0.005, 0.01), strict=True
    ):
        assert abs(ours / float(paper) - 1) <= tolerance


# One row of each table is counted by the fast tests.
@pytest.mark.parametrize(
    "label",
    slow_after_first(
        (
            label
            for label, (table, row) in ROWS.items()
            if table.number == 5 or row in table.outside
        ),
        lambda label: ROWS[label][0].number,
    ),
)
def test_table_5_and_alternatives_equal_the_printed_digits(label: str):
    params, gflops = counted(label)
    assert (f"{params:.1f}", f"{gflops:.2f}") == published(*ROWS[label])


@pytest.mark.parametrize("label", slow_after_first(OURS, lambda label: (label[0], "->" in label)))
def test_rows_equal_the_closed_forms_of_the_reconstruction(label: str):
    for ours, noted in zip(counted(label), OURS[label].split(), strict=True):
        assert f"{ours:.{len(noted.partition('.')[2])}f}" == noted


def test_every_table_has_a_row_for_every_published_one():
    for table in TABLES.values():
        with (PUBLISHED / table.published).open() as file:
            assert {row.published for row in table.rows} == {
                " ".join(line[key] for key in table.key) for line in csv.DictReader(file)
            }


# The recurrences of four families are counted by their closed forms, and LDM multiplies by its one
# context token without a product; see test_counts.
COUNTED_OTHERWISE = ("dig_", "dis_", "dim_", "dimsum_", "ldm_")


@pytest.mark.parametrize(
    "label",
    slow_after_first(
        (label for label in CASES if not label.startswith(COUNTED_OTHERWISE)),
        lambda label: CASES[label].family,
    ),
)
def test_core_is_half_of_what_torch_counts(label: str):
    case = CASES[label]
    model = case.build().eval()
    with (
        torch.no_grad(),
        kernels.use(**kernels.references(instead_of="onednn") | dict(attention="reference")),
        FlopCounterMode(display=False) as flops,
    ):
        model(*case.inputs(batch=1))
    counts = count_network(model.to("meta"), case.size, case.options["in_channels"])
    assert 2 * counts["macs_core"] == flops.get_total_flops()


@pytest.mark.parametrize(
    "run_op, core, extra",
    [
        (lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2), 2 * 6 * 6 * 20, 0),
        (
            lambda x: F.conv2d(x, torch.ones(8, 3, 3, 3), stride=2, groups=2, padding=1),
            2 * 8 * 2 * 3 * 27,
            0,
        ),
        (lambda x: F.linear(x, torch.ones(7, 5), torch.ones(7)), 2 * 6 * 4 * 7 * 5, 0),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.ones(6, 9)), 2 * 20 * 6 * 9, 0),
        (lambda x: x * x + x, 0, 240),
        (lambda x: 0.5 * x, 0, 240),
        (lambda x: x[:1] * x, 0, 240),
        (lambda x: x.clone().mul_(2), 0, 240),
        (lambda x: F.layer_norm(x, (5,)), 0, 0),
        (lambda x: F.layer_norm(x, (5,), torch.ones(5), torch.ones(5)), 0, 240),
        (lambda x: F.group_norm(x, 3), 0, 0),
        (lambda x: F.group_norm(x, 3, torch.ones(6), torch.ones(6)), 0, 240),
        (lambda x: F.adaptive_avg_pool2d(x, 1), 0, 12),
        (lambda x: F.adaptive_avg_pool2d(x, 3), 0, 108),
        (lambda x: F.avg_pool2d(x, 2), 0, 48),
        (lambda x: x.mean(dim=(2, 3)), 0, 12),
        (lambda x: F.interpolate(x, size=(7, 9), mode="bilinear"), 0, 4 * 2 * 6 * 63),
        (lambda x: F.interpolate(x, scale_factor=2), 0, 0),
        (lambda x: F.leaky_relu(x), 0, 240),
        (lambda x: F.gelu(x).softmax(-1).sigmoid() + x / 3 - x.relu() ** 2, 0, 0),
    ],
)
def test_convention_op_by_op(run_op: Callable[[Tensor], Tensor], core: int, extra: int):
    """Facts of torchprofile's handlers, on a (2, 6, 4, 5) input."""
    with torch.no_grad(), MacCounter() as macs:
        run_op(torch.ones(2, 6, 4, 5))
    assert (macs.core, macs.extra) == (core, extra)


def test_hidden_products_are_refused():
    q = torch.ones(1, 2, 7, 9)
    with pytest.raises(RuntimeError, match="hides attention's products"), MacCounter():
        F.scaled_dot_product_attention(q, q, q)
    with (
        pytest.raises(RuntimeError, match="hides attention's products"),
        kernels.use(attention="sdpa"),
        MacCounter(),
    ):
        CASES["dit_b_2 at 6"].build()(*CASES["dit_b_2 at 6"].inputs())


def test_a_seed_of_table_4_under_cifar10_bf16_is_an_hour_by_what_the_protocol_assumes():
    """A backward pass costs two forward ones; a multiply-accumulate is two operations."""
    store, (recipe, images) = (
        Store(reference=REPOSITORY / "results" / "reference"),
        (CIFAR10_BF16.recipe, CIFAR10_BF16.num * CIFAR10_BF16.sampler.num_steps),
    )
    flops = sum(
        2 * store.reference.latest(cost_stage(row)).values["macs_core"] for row in TABLE_4.rows
    )
    training, sampling = flops * 3 * recipe.batch * recipe.steps / 100e12, flops * images / 20e12
    assert (round(training / 60), round(sampling / 60)) == (48, 10) and training + sampling < 3600
    assert (
        recipe.precision == "bf16" and recipe.ema**recipe.steps < 0.02
    )  # little of the weights as they were made is left in the average
