"""Tables, claims, the digits page and figures from synthetic and committed sources, good and bad."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from analysis import build
from analysis.claims.finding import LEVELS
from analysis.claims.judge import claims_sheet, judge
from analysis.figures import probes as figures_probes
from analysis.figures.tradeoffs import front, score_against_speed
from analysis.figures.training import losses
from analysis.page.scatter import views
from analysis.probes.declared import declared
from analysis.query import COLUMNS, ReferenceStore, gpu_timings, numeric_mode, rankable
from analysis.tables.agreement import (
    agreement,
    blocks,
    chance,
    kendall,
    page,
    resolved_pairs,
    spearman,
    speed_agreement,
)
from analysis.tables.pages import Origins, Text
from analysis.tables.paper import CONFIGURATIONS, RECONSTRUCTED, SHEETS, ranks, recipe_sheet
from experiments.ablation import TABLE_3, TABLE_4
from experiments.declared import speed_claims
from experiments.declared import timings as speed
from experiments.declared.protocols import CIFAR10_SMALL, DIGITS, IMAGENET256
from experiments.engine.records.store import Store
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.render import render
from experiments.engine.reporting.sheet import Cell, Sheet
from experiments.engine.specs.spec import Backbone, Timing, spec_id
from experiments.engine.specs.stages import evaluate_stage, timing_stage, train_stage

PUBLISHED = REPOSITORY / "results" / "published"
PROVENANCE = {
    "device": "cpu", "cpu": "a", "cpu_count": 2, "torch": "b", "python": "3", "dirty": False, "seconds": 1.0, "commit": "c" * 40,
    "precision_flags": {"cudnn_tf32": False, "matmul_tf32": False},
}  # fmt: skip


@pytest.fixture
def committed() -> ReferenceStore:
    return ReferenceStore()


def empty(folder: Path) -> ReferenceStore:
    return ReferenceStore(folder)


def with_scores(
    folder: Path, scores: dict[str, list[float]], table: Any = TABLE_4, protocol: Any = DIGITS
) -> ReferenceStore:
    """Reference records that hold one Fréchet distance a seed for these rows; other scores are constant."""
    store, features = Store(folder), protocol.features
    for row in table.rows:
        for seed, fd in enumerate(scores.get(row.label, [])):
            values = {
                f"fd_{features}": fd,
                f"is_{features}": 8.0,
                f"precision_{features}": 0.6,
                f"recall_{features}": 0.8,
                "agreement": 0.9,
            }
            store.append(evaluate_stage(row, protocol, seed), "done", values, PROVENANCE)
    (folder / "records").rename(folder / "reference")
    return ReferenceStore(folder)


def column(sheet: Sheet, name: str) -> list[str]:
    (index,) = [i for i, (_, other) in enumerate(sheet.columns) if other == name]
    return [row[index].text() for row in sheet.rows]


def finding(name: str, store: ReferenceStore) -> Any:
    return judge(next(row for row in store.rows("claims.csv") if row["id"] == name), store)


@pytest.mark.parametrize("name", SHEETS)
@pytest.mark.parametrize("form", ("text", "markdown", "latex", "csv", "html"))
def test_every_table_prints_with_and_without_records(
    name: str, form: str, committed: ReferenceStore, tmp_path: Path
):
    for store in (committed, empty(tmp_path)):
        sheet = SHEETS[name](store)
        assert sheet.rows and all(len(row) == len(sheet.columns) for row in sheet.rows)
        assert (
            sheet.rows[0][0].text() in render([sheet], form).replace("\\", "")
            and not store.problems
        )


def test_tables_of_systems_hold_every_published_row(committed: ReferenceStore):
    for number in (1, 2, 8, 9):
        sheet = SHEETS[f"table{number}"](committed)
        at = [name for _, name in sheet.columns].index("FID")
        paper = [(row["model"], row["fid"]) for row in committed.rows(f"table{number}.csv")]
        assert sorted(row[at].text() for row in sheet.rows) == sorted(fid for _, fid in paper)
        assert all(
            any(row[0].label.startswith(model) and row[at].text() == fid for row in sheet.rows)
            for model, fid in paper
        )


def test_differences_are_in_per_cent_of_the_paper(committed: ReferenceStore):
    sheet = SHEETS["table2"](committed)
    names = sheet.columns
    row = next(row for row in sheet.rows if row[0].label == "DiCo-XL, 3M")
    paper, ours, off = (
        row[names.index(("Gflops", name))].value
        for name in ("paper", "ours, same counter", "diff. %")
    )
    assert (
        paper == 349.78 and off == pytest.approx(100 * (ours - paper) / paper) and -0.5 < off < -0.4
    )


def test_a_number_leads_to_its_records(committed: ReferenceStore):
    for name in ("table1", "table3", "table5", "counts"):
        sheet = SHEETS[name](committed)
        for row in sheet.rows:
            for (group, column_name), cell in zip(sheet.columns, row, strict=True):
                if "ours" in column_name and "diff" not in column_name and cell.value is not None:
                    assert cell.records, (name, group, column_name)


def test_table_6_names_every_field_that_differs(
    committed: ReferenceStore, monkeypatch: pytest.MonkeyPatch
):
    (same,) = [note for note in recipe_sheet(committed).notes if "declared fields equal" in note]
    other = replace(IMAGENET256, recipe=replace(IMAGENET256.recipe, lr=3e-4))
    monkeypatch.setitem(CONFIGURATIONS, "DiCo-S 256", (CONFIGURATIONS["DiCo-S 256"][0], other))
    (note,) = [note for note in recipe_sheet(committed).notes if "declared fields equal" in note]
    assert same.endswith("Different: none.") and note.endswith("Different: DiCo-S 256: peak lr.")


@pytest.mark.parametrize("lower", [True, False])
def test_ranks_are_intervals_that_only_resolved_differences_narrow(lower: bool):
    def seeds(mean: float, width: float) -> list[dict[str, float]]:
        return [{"agreement": mean + width * k} for k in (-1, 0, 1)]

    better = "lower" if lower else "higher"
    order = [0.1, 0.5, 0.9] if lower else [0.9, 0.5, 0.1]
    assert ranks("agreement", better, [seeds(mean, 0.001) for mean in order]) == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert ranks("agreement", better, [seeds(mean, 1.0) for mean in order]) == [(1, 3)] * 3
    assert ranks("agreement", better, [seeds(order[0], 0.001), [], seeds(order[2], 0.001)]) == [
        (1, 1),
        None,
        (2, 2),
    ]
    assert ranks("agreement", better, [[{"agreement": 1.0}], [{"agreement": 2.0}]]) == [None, None]


def test_only_what_is_first_for_certain_is_bold(tmp_path: Path):
    close = {row.label: [10.0 + k, 10.5 + k, 11.0 + k] for k, row in enumerate(TABLE_4.rows)}
    assert (
        "**"
        not in render([SHEETS["table4"](with_scores(tmp_path / "a", close))], "markdown").partition(
            "\n"
        )[2]
    )
    clear = {label: [100.0, 101.0, 102.0] for label in close} | {"w/o CCA": [1.0, 1.01, 1.02]}
    sheet = SHEETS["table4"](with_scores(tmp_path / "b", clear))
    assert [row[0].label for row in sheet.rows if any(cell.best for cell in row)] == ["w/o CCA"]
    assert "<b>1.0 ±0.0</b>" in render([sheet], "html") and "\\textbf{1.0 $\\pm$0.0}" in render(
        [sheet], "latex"
    )


def test_html_escapes_and_keeps_full_precision():
    text = render(
        [
            Sheet(
                "a < b",
                [("", "row"), ("g & h", "x")],
                [[Cell(label="<script>"), Cell(1 / 3)], [Cell(label="gap"), Cell()]],
                ["n > m"],
            )
        ],
        "html",
    )
    assert (
        "<script>" not in text
        and "&lt;script&gt;" in text
        and "g &amp; h" in text
        and f'data-order="{1 / 3!r}"' in text
        and 'data-order=""' in text
    )


def test_rank_correlations_equal_scipys():
    dice = random.Random(3)
    for size in (3, 7, 11):
        for top in (2, 5, 100):
            a, b = ([float(dice.randrange(top)) for _ in range(size)] for _ in range(2))
            for ours, theirs in (
                (kendall(a, b), stats.kendalltau(a, b)),
                (
                    spearman(a, b),
                    stats.spearmanr(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else (math.nan,),
                ),
            ):
                assert ours == pytest.approx(theirs[0], nan_ok=True)


def test_agreement_with_the_paper_is_found_and_its_absence_too(tmp_path: Path):
    fid = {
        row.label: float(
            ReferenceStore().published("table4.csv", ("variant",))[row.published]["fid"]
        )
        for row in TABLE_4.rows
    }
    same = agreement(
        "fd_digits",
        TABLE_4,
        with_scores(
            tmp_path / "same", {label: [v - 0.01, v, v + 0.01] for label, v in fid.items()}
        ),
    )
    noisy = agreement(
        "fd_digits",
        TABLE_4,
        with_scores(tmp_path / "noisy", {label: [v / 3, v, 3 * v] for label, v in fid.items()}),
    )
    opposite = agreement(
        "fd_digits",
        TABLE_4,
        with_scores(
            tmp_path / "opposite", {label: [99 - v, 100 - v, 101 - v] for label, v in fid.items()}
        ),
    )
    assert (
        same.tau == pytest.approx(1)
        and same.low > 0.9
        and same.chance < 0.01
        and same.ceiling > 0.95
    )
    assert noisy.tau == pytest.approx(1) and noisy.low < 0 and noisy.ceiling < 0.2
    assert opposite.tau == pytest.approx(-1) and opposite.chance > 0.99
    assert (
        agreement(
            "fd_digits",
            TABLE_4,
            with_scores(tmp_path / "one", {label: [v] for label, v in fid.items()}),
        )
        is None
    )


@pytest.mark.parametrize("size", [3, 5, 6])
def test_chance_among_few_rows_is_the_exact_share_of_orders(size: int):
    dice = random.Random(size)
    paper = [float(value) for value in range(size)]
    for ours in (paper, paper[::-1], dice.sample(paper, size), [0.0, *paper[:-1]]):
        tau = stats.kendalltau(ours, paper)[0]
        every = [
            stats.kendalltau(order, paper)[0] >= tau - 1e-9
            for order in itertools.permutations(ours)
        ]
        assert chance(ours, paper, dice) == pytest.approx(sum(every) / math.factorial(size))
    assert chance(paper, paper, dice) == 1 / math.factorial(size)


def test_chance_among_many_rows_is_near_the_exact_share():
    paper, ours = [float(value) for value in range(8)], [1.0, 0.0, 3.0, 2.0, 5.0, 4.0, 7.0, 6.0]
    exact = stats.kendalltau(ours, paper, alternative="greater", method="exact").pvalue
    assert chance(ours, paper, random.Random(0)) == pytest.approx(exact, abs=0.004)


@pytest.mark.parametrize("spread, width", [(0.0, 0.0), (5.0, 0.5)])
def test_the_order_by_speed_has_an_interval(spread: float, width: float, tmp_path: Path):
    store = Store(tmp_path)
    published = store.published("table4.csv", ("variant",))
    for row in TABLE_4.rows:
        values = {
            "relative": float(published[row.published]["throughput_img_s"]) / 1000,
            "relative_spread": spread,
            "images_per_s": 1.0,
        }
        store.append(timing_stage(row, TABLE_4.baseline, "cpu"), "done", values, PROVENANCE)
    (tmp_path / "records").rename(tmp_path / "reference")
    found = speed_agreement(TABLE_4, ReferenceStore(tmp_path))
    assert (
        found.tau == pytest.approx(1)
        and found.high - found.low >= width
        and (spread or found.low == pytest.approx(1))
        and len(found.records) == 11
    )


def test_pairs_are_resolved_by_their_distance(tmp_path: Path):
    rows = [row.label for row in TABLE_3.rows]
    far = with_scores(
        tmp_path / "far",
        {label: [4.0**k, 4.0**k * 1.01, 4.0**k * 0.99] for k, label in enumerate(reversed(rows))},
        TABLE_3,
    )
    assert (
        len(resolved_pairs(TABLE_3, far).resolved) == 15
        and resolved_pairs(TABLE_3, far).certain == 6
    )
    near = with_scores(tmp_path / "near", {label: [10.0, 20.0, 40.0] for label in rows}, TABLE_3)
    assert (
        not resolved_pairs(TABLE_3, near).resolved
        and resolved_pairs(TABLE_3, empty(tmp_path / "none")) is None
    )
    assert "Of 15 pairs of rows the seeds resolve 0. 0 of 6 rows" in page(near)


def test_the_page_names_the_pairs_of_the_shorter_list(tmp_path: Path):
    """One network that is far worse than all others, by the paper the second best; then two that are alike, of which none is resolved."""
    tight = (0.999, 1.0, 1.001)
    best, second, *others = sorted(
        (row.label for row in TABLE_3.rows),
        key=lambda label: float(
            ReferenceStore().published(TABLE_3.published, TABLE_3.key)[
                TABLE_3.row(label).published
            ]["fid"]
        ),
    )
    one = page(
        with_scores(
            tmp_path / "one",
            {
                label: [(90.0 if label == second else 10.0) * part for part in tight]
                for label in (best, second, *others)
            },
            TABLE_3,
        )
    )
    assert (
        "Of 15 pairs of rows the seeds resolve 5, and the paper orders 1 of these alike. Resolved: "
        in one
        and f"{best} before {second}" in one
    )
    against = one.partition("Resolved against the paper's order: ")[2].partition(" of 6 rows")[0]
    assert f"{best} before" not in against and all(
        f"{label} before {second}" in against for label in others
    )
    fd = {label: 4.0 ** max(place, 1) for place, label in enumerate((best, second, *others))}
    two = page(
        with_scores(
            tmp_path / "two",
            {label: [value * part for part in tight] for label, value in fd.items()},
            TABLE_3,
        )
    )
    assert (
        "the seeds resolve 14, and the paper orders 14 of these alike. Not resolved: " in two
        and {best, second}
        == set(two.partition("Not resolved: ")[2].partition(". ")[0].split(" and "))
    )


def test_the_digits_page_follows_the_records(committed: ReferenceStore, tmp_path: Path):
    assert "nothing can be said" in page(
        empty(tmp_path)
    ) and f"tau {agreement('fd_digits', TABLE_3, committed).tau:.2f}" in page(committed)


def test_the_page_on_small_cifar_gives_the_order_and_prints_gaps_as_gaps(tmp_path: Path):
    rows = [row.label for row in TABLE_3.rows]
    text = page(
        with_scores(
            tmp_path,
            {label: [50.0 + 10 * k, 51.0 + 10 * k] for k, label in enumerate(reversed(rows[1:]))},
            TABLE_3,
            CIFAR10_SMALL,
        ),
        CIFAR10_SMALL,
    )
    assert (
        "5 rows, 2 seeds each. The order by fd_cifar_classifier" in text
        and "| fd_cifar_classifier | fid | " in text
        and "CPU" not in text
    )
    assert (
        "| DiT (iso.) | - | - | - | - | - | 67.16 |" in text
        and "| DiCo (U-shape) | 50.5 ±0.5 |" in text
    )
    assert (
        text.count("| CM->Agent Attn | - | - | - | - | - | 52.07 |") == 2
        and "400000 steps of 256, 50000 images" in text
        and "## Table 4: Components of DiCo\n\nNo committed records with repeated seeds" in text
    )


def test_the_page_on_small_cifar_keeps_what_its_records_warn_of(tmp_path: Path):
    store = Store(tmp_path)
    values = {f"{name}_cifar_classifier": 1.0 for name in ("fd", "is", "precision", "recall")} | {
        "agreement": 0.5,
        "warnings": ["the images are grey"],
    }
    store.append(
        evaluate_stage(TABLE_3.rows[0], CIFAR10_SMALL, 0),
        "done",
        values,
        PROVENANCE | {"dirty": True},
    )
    (tmp_path / "records").rename(tmp_path / "reference")
    text = page(ReferenceStore(tmp_path), CIFAR10_SMALL)
    assert (
        text.count("warning: the images are grey") == 1
        and "1 records of commit cccccccccccc; precision flags in force" in text
    )
    assert (
        text.count("1 of these records come from a tree with uncommitted changes") == 1
        and RECONSTRUCTED in text
    )


def test_links_of_markdown_lead_to_records():
    tables = REPOSITORY / "results" / "tables"
    for path in tables.glob("*.md"):
        links = re.findall(r"\]\(([^)]*)\)", path.read_text())
        assert all((tables / link).is_file() for link in links)
        assert links or path.stem in ("table6", "table7"), path.name


def test_every_block_of_a_page_with_a_figure_of_ours_names_its_records(committed: ReferenceStore):
    found = blocks(committed)
    sheets = [block for block in found if isinstance(block, Sheet)]
    assert len(sheets) == 2 and all(
        cell.records for sheet in sheets for row in sheet.rows for cell in row[2:]
    )
    tau = [
        block
        for block in found
        if isinstance(block, Text)
        and "tau " in block.words
        and "How" not in block.words
        and not block.words.startswith("tau is")
    ]
    assert len(tau) == 4 and all(block.records for block in tau)
    names = [
        {record.name for _, records in block.rows for record in records}
        for block in found
        if isinstance(block, Origins)
    ]
    assert len(names) == 2 and all(
        {record.name for record in block.records} <= set.union(*names) for block in tau
    )


def test_a_claims_basis_leads_to_what_was_read_for_it(committed: ReferenceStore):
    sheet = claims_sheet(committed)
    rows = {row[0].label: row for row in sheet.rows}
    assert [record.kind for record in rows["speed-xl-256"][7].records] == ["timing"] and not rows[
        "speed-xl-256"
    ][4].records
    assert (
        {"timing", "evaluate"} == {record.kind for record in rows["kernel-order"][7].records}
        and rows["cca-fid"][5].records
        and not rows["fid-xl-256"][7].records
    )


def test_every_claim_gets_a_verdict(committed: ReferenceStore, tmp_path: Path):
    for store in (committed, empty(tmp_path)):
        sheet = claims_sheet(store)
        assert column(sheet, "claim") == [row["id"] for row in store.rows("claims.csv")]
        assert (
            set(column(sheet, "evidence")) <= set(LEVELS)
            and all(column(sheet, "verdict"))
            and all(column(sheet, "basis"))
        )
        assert all(
            error != "-"
            for value, error in zip(column(sheet, "value"), column(sheet, "error"), strict=True)
            if value != "-"
        )
    assert {"counted", "measured at reduced scale"} & set(column(sheet, "evidence")) == set()


def test_counted_claims_are_judged_to_the_printed_digit(committed: ReferenceStore):
    assert (
        finding("gflops-xl-256", committed).verdict == "reproduced"
        and finding("gflops-family", committed).verdict == "reproduced"
    )
    off = finding("gflops-xl-512", committed)
    assert off.evidence == "counted" and "not to the printed digit" in off.verdict and off.records


@pytest.mark.parametrize(
    "worse, verdict", [(100.0, "reproduced"), (10.0, "not resolved"), (1.0, "against the claim")]
)
def test_a_reduced_scale_claim_follows_the_seeds(worse: float, verdict: str, tmp_path: Path):
    store = with_scores(
        tmp_path, {"DiCo-S": [9.9, 10.0, 10.1], "w/o CCA": [worse * 0.99, worse, worse * 1.01]}
    )
    found = finding("cca-fid", store)
    assert (found.evidence, found.verdict) == ("measured at reduced scale", verdict)


def test_a_gpu_timing_outranks_published_throughput(tmp_path: Path):
    store = Store(tmp_path)
    spec = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", baseline=Backbone("dit_xl_2"))
    values = {
        "images_per_s": 136.0,
        "images_per_s_spread": 0.5,
        "relative": 1.36,
        "relative_spread": 0.01,
    }
    for what in ("forward", "training"):
        store.append(replace(spec, what=what), "done", values, PROVENANCE | {"device": "GPU"})
    (tmp_path / "records").rename(tmp_path / "reference")
    sources = ReferenceStore(tmp_path)
    found = finding("speed-xl-256", sources)
    assert (found.evidence, found.verdict, found.value) == (
        "measured here",
        "does not hold, not measured in tf32, bf16, as_published",
        "1.36 ±0.01 (fp32, GPU)",
    )
    assert [numeric_mode(record) for record in gpu_timings(Backbone("dico_xl"), 32, sources)] == [
        "fp32, TF32 off"
    ]
    table = SHEETS["table1"](sources)
    assert ("ours, GPU", "img/s, fp32, TF32 off") in table.columns
    assert (
        "136.00 ±0.50" in [cell.text() for row in table.rows for cell in row]
        and finding("speed-dig-256", sources).evidence == "published data only"
    )


LOOP = {"selective_scan": ["loop"]}
UNFUSED = "direction, on this CPU, whose scan has no fused kernel"


@pytest.mark.parametrize(
    ("ratio", "kernels", "said"),
    [
        (3.3, {}, "holds, on this CPU, a proxy"),
        (3.2, {}, "does not hold, on this CPU, a proxy"),
        (3.3, LOOP, f"same {UNFUSED}"),
        (1.005, LOOP, f"no {UNFUSED}"),
        (0.9, LOOP, f"other {UNFUSED}"),
    ],
)
def test_a_cpu_timing_of_a_claims_networks_is_a_proxy_until_a_gpus(
    ratio: float, kernels: dict[str, list[str]], said: str, tmp_path: Path
):
    """Half a unit of 3.3's last digit and two errors of 0.005 reach 3.24. The same record is no evidence on DiS-H, only shown for scale."""
    store = Store(tmp_path)
    (spec,) = speed_claims.claim_stages(dict(subject="DiCo-S@512", baseline="DiS-S/2@512"), "cpu")
    values = {
        "images_per_s": 6.0,
        "images_per_s_spread": 0.1,
        "relative": ratio,
        "relative_spread": 0.005,
    }
    store.append(spec, "done", values, PROVENANCE | {"cpu": "some CPU", "kernels": kernels})
    (tmp_path / "records").rename(tmp_path / "reference")
    found, other = (
        finding("speed-dis-small-512", ReferenceStore(tmp_path)),
        finding("speed-dis-512", ReferenceStore(tmp_path)),
    )
    assert (found.evidence, found.verdict) == (
        "measured at reduced scale",
        said,
    ) and f"{ratio:.2f} ±0.01 (fp32, some CPU)" == found.value
    assert all(words in found.basis for words in ("on a CPU", "no GPU record is committed")) and (
        "as a loop over tokens" in found.basis
    ) == bool(kernels)
    assert (
        other.evidence == "published data only"
        and f"Not the claim's, for scale: on a CPU in fp32, DiCo-S against DiS-S is {ratio:.2f}"
        in other.basis
        and other.basis.endswith("its scan as a loop over tokens") == bool(kernels)
    )
    assert finding("speed-dim-512", ReferenceStore(tmp_path)).basis.endswith("no GPU record here")
    (tmp_path / "reference").rename(tmp_path / "records")
    for gpu in speed_claims.claim_stages(
        dict(subject="DiCo-S@512", baseline="DiS-S/2@512"), "cuda"
    ):
        store.append(gpu, "done", values | {"relative": 3.0}, PROVENANCE | {"device": "GPU"})
    (tmp_path / "records").rename(tmp_path / "reference")
    assert finding("speed-dis-small-512", ReferenceStore(tmp_path)).evidence == "measured here"


def test_a_claim_names_the_modes_that_ran_without_their_fused_kernel(tmp_path: Path):
    store = Store(tmp_path)
    claim = store.published("claims.csv", ("id",))["speed-dig-256"]
    for stage in speed_claims.claim_stages(claim, "cuda"):
        ran = {"gated_linear": ["chunked" if stage.precision == "fp32" else "fla"]}
        store.append(
            stage,
            "done",
            {"relative": 3.0, "relative_spread": 0.0},
            PROVENANCE | {"device": "a GPU", "kernels": ran},
        )
    (tmp_path / "records").rename(tmp_path / "reference")
    assert finding("speed-dig-256", ReferenceStore(tmp_path)).basis.endswith(
        "; gated linear attention in chunks of plain PyTorch, without its fused kernel, in fp32"
    )


def test_small_networks_timed_alone_give_a_ratio_with_the_error_of_both(tmp_path: Path):
    store = Store(tmp_path)
    alone = {stage.backbone.name: stage for stage in speed.figure_3("cpu") if stage.size == 64}
    for name, rate, spread in (("dico_s", 6.0, 0.3), ("dit_s_2", 3.0, 0.0)):
        store.append(
            alone[name],
            "done",
            {
                "images_per_s": rate,
                "images_per_s_spread": spread,
                "relative": 1.0,
                "relative_spread": 0.0,
            },
            PROVENANCE,
        )
    (tmp_path / "records").rename(tmp_path / "reference")
    assert finding("speed-xl-512", ReferenceStore(tmp_path)).basis.endswith(
        "DiCo-S against DiT-S is 2.00 ±0.10, each timed alone at batch 1"
    )
    assert "for scale" not in finding("speed-dis-512", ReferenceStore(tmp_path)).basis


def test_numeric_modes_of_a_gpu_stand_side_by_side(tmp_path: Path):
    store = Store(tmp_path)
    spec = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", baseline=Backbone("dit_s_2"))
    half = {"cudnn_tf32": True, "matmul_tf32": False}
    for mode, flags, batch, rate in (
        ("fp32", PROVENANCE["precision_flags"], 64, 80.0),
        ("as_published", half, 64, 200.0),
        ("as_published", half, 16, 150.0),
        ("as_published", half, 1024, 300.0),
    ):
        store.append(
            replace(spec, precision=mode, batch=batch),
            "done",
            {"images_per_s": rate, "relative": 1.0, "relative_spread": 0.0},
            PROVENANCE | {"device": "GPU", "precision_flags": flags},
        )
    (tmp_path / "records").rename(tmp_path / "reference")
    sheet = SHEETS["table1"](ReferenceStore(tmp_path))
    (row,) = [row for row in sheet.rows if row[0].label == "DiCo-XL"]
    shown = {
        name: cell.text()
        for (group, name), cell in zip(sheet.columns, row, strict=True)
        if group == "ours, GPU"
    }
    assert shown == {
        "img/s, as_published, TF32 cudnn": "200.00",
        "diff. %, as_published, TF32 cudnn": "-4.06",
        "img/s, fp32, TF32 off": "80.00",
        "diff. %, fp32, TF32 off": "-61.63",
    }
    assert any("largest batch timed up to the paper's 64" in note for note in sheet.notes)


def test_what_ran_under_the_papers_conditions_stands_beside_its_rows(tmp_path: Path):
    """DiCo-S after 400K steps is one run of Tables 1, 4 and 7, and a row of an ablation is timed on a GPU too."""
    store, dico = Store(tmp_path), TABLE_4.rows[0]
    values = {
        "fid": 54.967,
        "fid_se": 0.2,
        "fid_corrected": 54.5,
        "fid_corrected_se": 0.3,
        "sfid": 11.0,
        "is": 30.0,
        "precision": 0.5,
        "recall": 0.6,
    }
    record = store.append(
        evaluate_stage(dico, IMAGENET256, 0), "done", values, PROVENANCE | {"dirty": True}
    )
    speed_of = {
        "images_per_s": 1234.0,
        "images_per_s_spread": 5.0,
        "relative": 1.0,
        "relative_spread": 0.0,
    }
    store.append(
        timing_stage(TABLE_4.rows[4], dico, "cuda"),
        "done",
        speed_of,
        PROVENANCE | {"device": "GPU"},
    )
    (tmp_path / "records").rename(tmp_path / "reference")
    sources = ReferenceStore(tmp_path)
    for number in (1, 4, 7):
        sheet = SHEETS[f"table{number}"](sources)
        (row,) = [
            row
            for row in sheet.rows
            if record.name in {own.name for cell in row for own in cell.records}
        ]
        ours = {
            name: cell.text()
            for (group, name), cell in zip(sheet.columns, row, strict=True)
            if group in ("ours", "ours, same protocol")
        }
        expected = {
            "FID-50K": "54.97 ±0.20",
            "FID-50K, no bias": "54.50 ±0.30",
            "FID diff. %": "10.00",
        }
        expected |= {
            "IS-50K": "30.00",
            "IS diff. %": "-4.40",
            "precision-50K": "0.50",
            "P diff. %": "4.17",
            "recall-50K": "0.60",
            "R diff. %": "3.45",
        }
        assert row[0].label == "DiCo-S" and ours == expected | (
            {"sFID-50K": "11.00", "sFID diff. %": "-3.59", "P diff. %": "3.95", "R diff. %": "3.09"}
            if number == 7
            else {}
        )
        assert (
            any("come from a tree with uncommitted changes" in note for note in sheet.notes)
            and len(sheet.rows) > 2
        )
    table = SHEETS["table4"](sources)
    at = table.columns.index(("ours, GPU", "img/s, fp32, TF32 off, attention unfused"))
    assert [row[at].text() for row in table.rows] == ["-"] * 4 + ["1234.00 ±5.00"] + ["-"] * 6


def test_the_papers_own_units_stand_beside_ours(committed: ReferenceStore):
    table4, table8 = SHEETS["table4"](committed), SHEETS["table8"](committed)
    at = table4.columns.index(("paper, A100", "img/s"))
    assert [row[at].text() for row in table4.rows] == [
        row["throughput_img_s"] for row in committed.rows("table4.csv")
    ]
    (dit,) = [row for row in table8.rows if row[0].label == "DiT-XL/2"]
    paper, ours, off = (
        dit[table8.columns.index(("params, M", side))] for side in ("paper", "ours", "diff. %")
    )
    assert (paper.text(), ours.text()) == (
        "675M",
        "674.8",
    ) and off.text() == "0.02"  # of 675.1, with the frozen table of positions
    assert any("DiC-H, DiCo-H: published in billions" in note for note in table8.notes)


def test_frozen_parameters_are_told_apart(committed: ReferenceStore):
    for number, label, every in (
        (8, "DiT-XL/2", "675.1"),
        (8, "DiMSUM-L/2", "459.9"),
        (9, "SiT-XL", "676.0"),
    ):
        sheet = SHEETS[f"table{number}"](committed)
        (note,) = [
            note for note in sheet.notes if note.startswith("params: ours are those that train")
        ]
        (row,), at = (
            [row for row in sheet.rows if row[0].label == label],
            {name: sheet.columns.index(("params, M", name)) for name in ("paper", "diff. %")},
        )
        assert row[at["diff. %"]].value == pytest.approx(
            100 * (float(every) / row[at["paper"]].value - 1), abs=0.01
        )
        assert f"{label} {every}" in note and "DiCo-XL" not in note and ("paper prints" not in note)


def test_table_6_without_a_model_or_its_log_says_so(tmp_path: Path):
    shutil.copytree(PUBLISHED, tmp_path / "published")
    for name, model in (("table6.csv", "DiCo-B"), ("dico_logs.csv", "DiCo-L")):
        path = tmp_path / "published" / name
        path.write_text(
            "".join(
                line
                for line in path.read_text().splitlines(keepends=True)
                if not line.startswith(f"{model},")
            )
        )
    notes = recipe_sheet(ReferenceStore(None, tmp_path / "published")).notes
    assert any(
        "DiCo-B: its hours cannot be compared, since table6.csv has no row" in note
        for note in notes
    )
    assert any(
        "DiCo-L: its hours cannot be compared, since dico_logs.csv has none to step 400000" in note
        for note in notes
    )


def test_figure_9_draws_our_curves_apart_from_the_authors(tmp_path: Path):
    def panels(store: ReferenceStore) -> list[Any]:
        return losses(store).axes

    whole, early, ours = panels(empty(tmp_path / "none"))
    theirs = [len(whole.lines), len(early.lines)]
    assert (
        theirs == [4, 4]
        and not ours.lines
        and "no training with a curve" in ours.texts[0].get_text()
    )
    store = Store(tmp_path / "some")
    values = {"steps": 125, "curve": {"every": 50, "losses": [0.5, 0.25, 0.2]}}
    store.append(train_stage(TABLE_4.rows[3], DIGITS, 0), "done", values, PROVENANCE)
    store.append(train_stage(TABLE_4.rows[4], DIGITS, 0), "done", {"steps": 650}, PROVENANCE)
    (tmp_path / "some" / "records").rename(tmp_path / "some" / "reference")
    whole, early, ours = panels(ReferenceStore(tmp_path / "some"))
    assert (
        [len(whole.lines), len(early.lines)] == theirs
        and "ImageNet" in whole.get_title()
        and ours.get_title() == "ours: Table 4's rows on digits"
    )
    (line,) = ours.lines
    assert (
        line.get_label() == TABLE_4.rows[3].label
        and line.get_xdata().tolist() == [25, 75, 112.5]
        and line.get_ydata().tolist() == [0.5, 0.25, 0.2]
    )
    assert ours.get_xlabel() == "training steps (means over 50)"


@pytest.mark.parametrize(
    "dead, rank, verdict",
    [
        ((0.1, 0.3), (0.6, 0.5), "same direction"),
        ((0.3, 0.1), (0.5, 0.6), "against"),
        ((0.1, 0.3), (0.5, 0.6), "mixed"),
    ],
)
def test_probe_records_bear_on_the_channel_claim(
    dead: tuple[float, float], rank: tuple[float, float], verdict: str, tmp_path: Path
):
    assert finding("channel-redundancy", empty(tmp_path / "none")).evidence == "not yet"
    store = Store(tmp_path)
    rows = {row.label: row for row in TABLE_4.rows}
    for label, share, part in zip(("DiCo-S", "w/o CCA"), dead, rank, strict=True):
        store.append(
            declared("channels", rows[label], DIGITS, seed=0),
            "done",
            {"near_dead": share, "relative_rank": part},
            PROVENANCE,
        )
    (tmp_path / "records").rename(tmp_path / "reference")
    found = finding("channel-redundancy", ReferenceStore(tmp_path))
    assert (
        found.evidence == "measured at reduced scale"
        and found.verdict.startswith(verdict)
        and len(found.records) == 2
    )


def test_published_inconsistencies_are_seen(tmp_path: Path):
    shutil.copytree(PUBLISHED, tmp_path / "published")
    path = tmp_path / "published" / "table1.csv"
    path.write_text(path.read_text().replace("208.47", "153.80"))
    assert finding("speed-xl-256", ReferenceStore(None, tmp_path / "published")).verdict.startswith(
        "inconsistent"
    )


def test_a_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 3.0), (2.5, 3.0), (0.5, 1.0)]
    assert set(front(points)) == {(3.0, 3.0), (0.5, 1.0)}
    assert set(front(points, lower=True)) == {(0.5, 1.0)}


def run_build(*arguments: str | Path, hash_seed: str = "a") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis.build", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": str(ord(hash_seed))},
        capture_output=True,
        text=True,
    )


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tables").iterdir())}


def copied(folder: Path) -> Path:
    shutil.copytree(REPOSITORY / "results" / "reference", folder / "reference")
    return folder


def test_two_builds_of_the_tables_are_equal_to_the_byte_and_to_what_is_committed(tmp_path: Path):
    for name in ("a", "b"):
        done = run_build("--tables", "--results", copied(tmp_path / name), hash_seed=name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (
        everything(tmp_path / "a")
        == everything(tmp_path / "b")
        == everything(REPOSITORY / "results")
    )


@pytest.mark.slow
def test_two_builds_of_the_figures_are_equal_to_the_byte(tmp_path: Path):
    for name in ("a", "b"):
        done = run_build("--results", copied(tmp_path / name), hash_seed=name)
        assert done.returncode == 0, done.stdout + done.stderr
    made = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "figures").iterdir()}
        for name in ("a", "b")
    ]
    assert made[0] == made[1] and made[0].keys() == {
        f"{name}.{form}" for name in build.FIGURES for form in ("pdf", "png")
    }


OTHER_FIGURES = [  # those that read more than the arrays of probes
    name for name, draw in build.FIGURES.items() if draw.__module__ != figures_probes.__name__
]


@pytest.mark.parametrize("name", OTHER_FIGURES)
def test_every_figure_has_a_caption_and_is_drawn_without_records(name: str, tmp_path: Path):
    draw = build.FIGURES[name]
    assert len(draw.__doc__ or "") > 80 and draw(empty(tmp_path)).axes


def test_bad_sources_are_named_and_the_rest_is_built(tmp_path: Path):
    reference = copied(tmp_path / "results") / "reference"
    published = shutil.copytree(PUBLISHED, tmp_path / "published")
    paths = sorted((reference / "evaluate").glob("*.json"))
    for path, change in zip(
        paths,
        (
            {"format": 99},
            {"values": json.loads(paths[1].read_text())["values"] | {"fd_digits": math.nan}},
        ),
        strict=False,
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    other = json.loads(paths[2].read_text())
    other["spec"]["num"] = 77
    paths[2].write_text(json.dumps(other))
    for path, spoil in (
        (paths[3], lambda record: record["values"].update(agreement="high")),
        (paths[4], lambda record: record["spec"].pop("num")),
    ):
        spoilt = json.loads(path.read_text())
        spoil(spoilt)
        path.write_text(json.dumps(spoilt))
    lines = list(csv.reader((published / "table5.csv").open()))
    (published / "table5.csv").write_text(
        "\n".join(",".join(line[:2] + line[3:]) for line in lines) + "\n"
    )
    (published / "table2.csv").write_text(
        (published / "table2.csv").read_text().replace("18.58", "nan")
    )
    (published / "table8.csv").write_text(
        (published / "table8.csv").read_text().replace(",118.7,", ",0,")
    )
    done = run_build("--tables", "--results", tmp_path / "results", "--published", published)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for words in (
        paths[0].name,
        "fd_digits is no number",
        "agreement is no number",
        "its spec lacks num",
        f"no declared protocol ({other['spec']['train']['data']['name']}, 77",
        "table5.csv: no column gflops",
        "throughput_img_s is 'nan'",
        "gflops is 0, which is not above 0",
    ):
        assert [problem for problem in problems if words in problem], (words, problems)
    built = {path.name for path in (tmp_path / "results" / "tables").iterdir()}
    assert {
        "table1.md",
        "table3.html",
        "table4.csv",
        "table9.tex",
        "digits.md",
        "cifar10_small.md",
    } <= built and not {"table5.md", "table2.md"} & built


def test_a_row_of_another_protocol_is_not_ranked(tmp_path: Path):
    reference = copied(tmp_path / "results") / "reference"
    row = TABLE_4.rows[3]
    for path in (reference / "evaluate").glob(f"{spec_id(evaluate_stage(row, DIGITS, 0))}-*.json"):
        record = json.loads(path.read_text())
        record["values"]["manifest"]["measure"]["quantiser"] = "rounds to nearest"
        path.write_text(json.dumps(record))
    store = ReferenceStore(tmp_path / "results")
    scores, other = rankable(TABLE_4.rows, DIGITS, store)
    assert list(other) == [row.label] and [bool(found) for found in scores] == [
        one != row for one in TABLE_4.rows
    ]
    sheet = SHEETS["table4"](store)
    at = [column for _, column in sheet.columns].index("rank")
    assert (
        sheet.rows[3][at].text() == "-"
        and sheet.rows[2][at].text() != "-"
        and any(f"{row.label}: not ranked" in note for note in sheet.notes)
    )


def test_a_record_of_another_extractor_is_ordered_by_nothing(tmp_path: Path):
    """Not by the claim that asks for it, nor by a front or the page's scatter; other claims keep their verdicts."""
    reference = copied(tmp_path / "results") / "reference"
    (row,) = [row for row in TABLE_4.rows if row.label == "w/o CCA"]
    kept = finding("kernel-order", ReferenceStore())
    assert finding("cca-fid", ReferenceStore()).evidence == "measured at reduced scale"
    (path,) = (reference / "evaluate").glob(f"{spec_id(evaluate_stage(row, DIGITS, 0))}-*.json")
    record = json.loads(path.read_text())
    record["values"]["manifest"]["measure"]["extractor"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    store = ReferenceStore(tmp_path / "results")
    found = finding("cca-fid", store)
    assert (found.evidence, found.verdict, found.value) == (
        "not yet",
        "open",
        "",
    ) and "scored by another protocol: w/o CCA (extractor.sha256)" in found.basis
    assert finding("kernel-order", store).evidence == kept.evidence and len(
        finding("kernel-order", store).records
    ) == len(kept.records)
    (view,) = [view for view in views(store) if "Table 4" in view["name"]]
    assert view["name"].endswith("(left out, scored by another protocol: w/o CCA)") and not any(
        "w/o CCA" in text for text in view["data"][0]["text"]
    )
    assert "10 rows, 3 seeds each" in page(
        store
    ) and "Left out, scored by another protocol: w/o CCA (extractor.sha256)." in page(store)
    drawing = score_against_speed(TABLE_4, store)
    assert row.label not in drawing.axes[0].get_legend_handles_labels()[1]
    assert drawing.get_supxlabel() == "left out, scored by another protocol: w/o CCA"


def test_a_published_file_that_is_missing_or_unsourced_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="restore it"):
        ReferenceStore(None, tmp_path).rows("table1.csv")
    words, numbers = COLUMNS["table7.csv"]
    names = [*words.split(), *numbers.split(), "source"]
    (tmp_path / "table7.csv").write_text(
        ",".join(names) + "\n" + "DiCo-S," + ",".join("1" for _ in names[1:-1]) + ",\n"
    )
    with pytest.raises(ValueError, match="line 2: no source"):
        ReferenceStore(None, tmp_path).rows("table7.csv")


@pytest.mark.parametrize("content", [b"model," + b"x" * 140_000, b"model\n\xff\n"])
def test_a_published_file_that_is_no_csv_is_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "table7.csv").write_bytes(content)
    with pytest.raises(
        ValueError,
        match="^published data table7.csv: no CSV in UTF-8 .*; restore it with git checkout results/published$",
    ):
        ReferenceStore(None, tmp_path).rows("table7.csv")


def test_every_published_row_names_its_source():
    for name in COLUMNS:
        assert all(
            "2505.11196" in row["source"] or "authors' log" in row["source"]
            for row in ReferenceStore().rows(name)
        )


def test_tables_load_no_torch_and_no_plots():
    code = (
        "import sys; from pathlib import Path; from analysis.claims.judge import claims_sheet; from analysis.query import ReferenceStore; from analysis.tables.agreement import page; "
        "from analysis.tables.paper import SHEETS; s = ReferenceStore(); [make(s) for make in SHEETS.values()]; claims_sheet(s); page(s); "
        "print(sorted({'torch', 'timm', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
