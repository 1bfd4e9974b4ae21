"""Tables, claims, the digits page and figures from synthetic and committed sources, good and bad."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from analysis import build, figures_probes
from analysis.claims import LEVELS, claims_sheet, judge
from analysis.figures_efficiency import front
from analysis.probes.declared import declared
from analysis.query import COLUMNS, Sources, gpu_timings, numeric_mode
from analysis.science import agreement, kendall, page, resolved_pairs, spearman
from analysis.tables import CONFIGURATIONS, SHEETS, ranks, recipe_sheet
from experiments.ablation import TABLE_3, TABLE_4
from experiments.engine.render import render
from experiments.engine.report import Cell, Sheet
from experiments.engine.spec import Backbone, Timing
from experiments.engine.store import REPOSITORY, Store
from experiments.protocols import CIFAR10_SMALL, DIGITS, IMAGENET256, evaluate_stage

PUBLISHED = REPOSITORY / "results" / "published"
PROVENANCE = {
    "device": "cpu", "cpu": "a", "cpu_count": 2, "torch": "b", "python": "3", "dirty": False, "seconds": 1.0, "commit": "c" * 40,
    "precision_flags": {"cudnn_tf32": False, "matmul_tf32": False},
}  # fmt: skip


@pytest.fixture
def committed() -> Sources:
    return Sources()


def empty(folder: Path) -> Sources:
    return Sources(folder)


def with_scores(folder: Path, scores: dict[str, list[float]], table: Any = TABLE_4, protocol: Any = DIGITS) -> Sources:
    """Reference records that hold one Fréchet distance a seed for these rows; other scores are constant."""
    store, features = Store(folder), protocol.features
    for row in table.rows:
        for seed, fd in enumerate(scores.get(row.label, [])):
            values = {f"fd_{features}": fd, f"is_{features}": 8.0, f"precision_{features}": 0.6, f"recall_{features}": 0.8, "agreement": 0.9}
            store.append(evaluate_stage(row, protocol, seed), "done", values, PROVENANCE)
    (folder / "records").rename(folder / "reference")
    return Sources(folder)


def column(sheet: Sheet, name: str) -> list[str]:
    (index,) = [i for i, (_, other) in enumerate(sheet.columns) if other == name]
    return [row[index].text() for row in sheet.rows]


def finding(name: str, store: Sources) -> Any:
    return judge(next(row for row in store.rows("claims.csv") if row["id"] == name), store)


@pytest.mark.parametrize("name", SHEETS)
@pytest.mark.parametrize("form", ("text", "markdown", "latex", "csv", "html"))
def test_every_table_prints_with_and_without_records(name: str, form: str, committed: Sources, tmp_path: Path):
    for store in (committed, empty(tmp_path)):
        sheet = SHEETS[name](store)
        assert sheet.rows and all(len(row) == len(sheet.columns) for row in sheet.rows)
        assert sheet.rows[0][0].text() in render([sheet], form).replace("\\", "") and not store.problems


def test_tables_of_systems_hold_every_published_row(committed: Sources):
    for number in (1, 2, 8, 9):
        sheet = SHEETS[f"table{number}"](committed)
        at = [name for _, name in sheet.columns].index("FID")
        paper = [(row["model"], row["fid"]) for row in committed.rows(f"table{number}.csv")]
        assert sorted(row[at].text() for row in sheet.rows) == sorted(fid for _, fid in paper)
        assert all(any(row[0].words.startswith(model) and row[at].text() == fid for row in sheet.rows) for model, fid in paper)


def test_differences_are_in_per_cent_of_the_paper(committed: Sources):
    sheet = SHEETS["table2"](committed)
    names = sheet.columns
    row = next(row for row in sheet.rows if row[0].words == "DiCo-XL, 3M")
    paper, ours, off = (row[names.index(("Gflops", name))].value for name in ("paper", "ours, same counter", "diff. %"))
    assert paper == 349.78 and off == pytest.approx(100 * (ours - paper) / paper) and -0.5 < off < -0.4


def test_a_number_leads_to_its_records(committed: Sources):
    for name in ("table1", "table3", "table5", "counts"):
        sheet = SHEETS[name](committed)
        for row in sheet.rows:
            for (group, column_name), cell in zip(sheet.columns, row, strict=True):
                if "ours" in column_name and "diff" not in column_name and cell.value is not None:
                    assert cell.records, (name, group, column_name)


def test_table_6_names_every_field_that_differs(committed: Sources, monkeypatch: pytest.MonkeyPatch):
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
    assert ranks("agreement", better, [seeds(mean, 0.001) for mean in order]) == [(1, 1), (2, 2), (3, 3)]
    assert ranks("agreement", better, [seeds(mean, 1.0) for mean in order]) == [(1, 3)] * 3
    assert ranks("agreement", better, [seeds(order[0], 0.001), [], seeds(order[2], 0.001)]) == [(1, 1), None, (2, 2)]
    assert ranks("agreement", better, [[{"agreement": 1.0}], [{"agreement": 2.0}]]) == [None, None]


def test_only_what_is_first_for_certain_is_bold(tmp_path: Path):
    close = {row.label: [10.0 + k, 10.5 + k, 11.0 + k] for k, row in enumerate(TABLE_4.rows)}
    assert "**" not in render([SHEETS["table4"](with_scores(tmp_path / "a", close))], "markdown").partition("\n")[2]
    clear = {label: [100.0, 101.0, 102.0] for label in close} | {"w/o CCA": [1.0, 1.01, 1.02]}
    sheet = SHEETS["table4"](with_scores(tmp_path / "b", clear))
    assert [row[0].words for row in sheet.rows if any(cell.best for cell in row)] == ["w/o CCA"]
    assert "<b>1.0 ±0.0</b>" in render([sheet], "html") and "\\textbf{1.0 $\\pm$0.0}" in render([sheet], "latex")


def test_html_escapes_and_keeps_full_precision():
    text = render([Sheet("a < b", [("", "row"), ("g & h", "x")], [[Cell(words="<script>"), Cell(1 / 3)], [Cell(words="gap"), Cell()]], ["n > m"])], "html")
    assert "<script>" not in text and "&lt;script&gt;" in text and "g &amp; h" in text and f'data-order="{1 / 3!r}"' in text and 'data-order=""' in text


def test_rank_correlations_equal_scipys():
    dice = random.Random(3)
    for size in (3, 7, 11):
        for top in (2, 5, 100):
            a, b = ([float(dice.randrange(top)) for _ in range(size)] for _ in range(2))
            for ours, theirs in ((kendall(a, b), stats.kendalltau(a, b)), (spearman(a, b), stats.spearmanr(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else (math.nan,))):
                assert ours == pytest.approx(theirs[0], nan_ok=True)


def test_agreement_with_the_paper_is_found_and_its_absence_too(tmp_path: Path):
    fid = {row.label: float(Sources().published("table4.csv", ("variant",))[row.published]["fid"]) for row in TABLE_4.rows}
    same = agreement("fd_digits", TABLE_4, with_scores(tmp_path / "same", {label: [v - 0.01, v, v + 0.01] for label, v in fid.items()}))
    noisy = agreement("fd_digits", TABLE_4, with_scores(tmp_path / "noisy", {label: [v / 3, v, 3 * v] for label, v in fid.items()}))
    opposite = agreement("fd_digits", TABLE_4, with_scores(tmp_path / "opposite", {label: [99 - v, 100 - v, 101 - v] for label, v in fid.items()}))
    assert same.tau == pytest.approx(1) and same.low > 0.9 and same.chance < 0.01 and same.ceiling > 0.95
    assert noisy.tau == pytest.approx(1) and noisy.low < 0 and noisy.ceiling < 0.2
    assert opposite.tau == pytest.approx(-1) and opposite.chance > 0.99
    assert agreement("fd_digits", TABLE_4, with_scores(tmp_path / "one", {label: [v] for label, v in fid.items()})) is None


def test_pairs_are_resolved_by_their_distance(tmp_path: Path):
    rows = [row.label for row in TABLE_3.rows]
    far = with_scores(tmp_path / "far", {label: [4.0**k, 4.0**k * 1.01, 4.0**k * 0.99] for k, label in enumerate(reversed(rows))}, TABLE_3)
    assert resolved_pairs(TABLE_3, far)[0] == 15 and resolved_pairs(TABLE_3, far)[3] == 6
    assert resolved_pairs(TABLE_3, with_scores(tmp_path / "near", {label: [10.0, 20.0, 40.0] for label in rows}, TABLE_3))[0] == 0


def test_the_digits_page_follows_the_records(committed: Sources, tmp_path: Path):
    assert "nothing can be said" in page(empty(tmp_path)) and f"tau {agreement('fd_digits', TABLE_3, committed).tau:.2f}" in page(committed)


def test_the_page_on_small_cifar_gives_the_order_and_prints_gaps_as_gaps(tmp_path: Path):
    rows = [row.label for row in TABLE_3.rows]
    text = page(with_scores(tmp_path, {label: [50.0 + 10 * k, 51.0 + 10 * k] for k, label in enumerate(reversed(rows[1:]))}, TABLE_3, CIFAR10_SMALL), CIFAR10_SMALL)
    assert "5 rows, 2 seeds each. The order by fd_cifar_classifier" in text and "| fd_cifar_classifier | fid | " in text and "CPU" not in text
    assert "| DiT (iso.) | - | - | - | - | - | 67.16 |" in text and "| DiCo (U-shape) | 50.5 ±0.5 |" in text
    assert text.count("| CM->Agent Attn | - | - | - | - | - | 52.07 |") == 2 and "400000 steps of 256, 50000 images" in text and "## Table 4: Components of DiCo\n\nNo committed records with repeated seeds" in text


def test_every_claim_gets_a_verdict(committed: Sources, tmp_path: Path):
    for store in (committed, empty(tmp_path)):
        sheet = claims_sheet(store)
        assert column(sheet, "claim") == [row["id"] for row in store.rows("claims.csv")]
        assert set(column(sheet, "evidence")) <= set(LEVELS) and all(column(sheet, "verdict")) and all(column(sheet, "basis"))
    assert {"counted", "measured at reduced scale"} & set(column(sheet, "evidence")) == set()


def test_counted_claims_are_judged_to_the_printed_digit(committed: Sources):
    assert finding("gflops-xl-256", committed).verdict == "reproduced" and finding("gflops-family", committed).verdict == "reproduced"
    off = finding("gflops-xl-512", committed)
    assert off.evidence == "counted" and "not to the printed digit" in off.verdict and off.records


@pytest.mark.parametrize("worse, verdict", [(100.0, "reproduced"), (10.0, "not resolved"), (1.0, "against the claim")])
def test_a_reduced_scale_claim_follows_the_seeds(worse: float, verdict: str, tmp_path: Path):
    store = with_scores(tmp_path, {"DiCo-S": [9.9, 10.0, 10.1], "w/o CCA": [worse * 0.99, worse, worse * 1.01]})
    found = finding("cca-fid", store)
    assert (found.evidence, found.verdict) == ("measured at reduced scale", verdict)


def test_a_gpu_timing_outranks_published_throughput(tmp_path: Path):
    store = Store(tmp_path)
    spec = Timing(Backbone("dico_xl"), 32, 4, 1000, 64, "cuda", baseline=Backbone("dit_xl_2"))
    values = {"images_per_s": 136.0, "images_per_s_spread": 0.5, "relative": 1.36, "relative_spread": 0.01}
    for what in ("forward", "training"):
        store.append(replace(spec, what=what), "done", values, PROVENANCE | {"device": "GPU"})
    (tmp_path / "records").rename(tmp_path / "reference")
    sources = Sources(tmp_path)
    found = finding("speed-xl-256", sources)
    assert (found.evidence, found.verdict, found.value) == ("measured here", "does not hold", "1.36 ±0.01 (fp32, GPU)")
    assert [numeric_mode(record) for record in gpu_timings(Backbone("dico_xl"), 32, sources)] == ["fp32, TF32 off"]
    table = SHEETS["table1"](sources)
    assert "136.00 ±0.50" in [cell.text() for row in table.rows for cell in row] and finding("speed-dig-256", sources).evidence == "published data only"


@pytest.mark.parametrize("dead, rank, verdict", [((0.1, 0.3), (0.6, 0.5), "same direction"), ((0.3, 0.1), (0.5, 0.6), "against"), ((0.1, 0.3), (0.5, 0.6), "mixed")])
def test_probe_records_bear_on_the_channel_claim(dead: tuple[float, float], rank: tuple[float, float], verdict: str, tmp_path: Path):
    assert finding("channel-redundancy", empty(tmp_path / "none")).evidence == "not yet"
    store = Store(tmp_path)
    rows = {row.label: row for row in TABLE_4.rows}
    for label, share, part in zip(("DiCo-S", "w/o CCA"), dead, rank, strict=True):
        store.append(declared("channels", rows[label], DIGITS, seed=0), "done", {"near_dead": share, "relative_rank": part}, PROVENANCE)
    (tmp_path / "records").rename(tmp_path / "reference")
    found = finding("channel-redundancy", Sources(tmp_path))
    assert found.evidence == "measured at reduced scale" and found.verdict.startswith(verdict) and len(found.records) == 2


def test_published_inconsistencies_are_seen(tmp_path: Path):
    shutil.copytree(PUBLISHED, tmp_path / "published")
    path = tmp_path / "published" / "table1.csv"
    path.write_text(path.read_text().replace("208.47", "153.80"))
    assert finding("speed-xl-256", Sources(None, tmp_path / "published")).verdict.startswith("inconsistent")


def test_a_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 3.0), (2.5, 3.0), (0.5, 1.0)]
    assert set(front(points)) == {(3.0, 3.0), (0.5, 1.0)}
    assert set(front(points, lower=True)) == {(0.5, 1.0)}


def run_build(*arguments: str | Path, hash_seed: str = "a") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis.build", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": str(ord(hash_seed))}, capture_output=True, text=True)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tables").iterdir())}


def copied(folder: Path) -> Path:
    shutil.copytree(REPOSITORY / "results" / "reference", folder / "reference")
    return folder


def test_two_builds_of_the_tables_are_equal_to_the_byte_and_to_what_is_committed(tmp_path: Path):
    for name in ("a", "b"):
        done = run_build("--tables", "--results", copied(tmp_path / name), hash_seed=name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert everything(tmp_path / "a") == everything(tmp_path / "b") == everything(REPOSITORY / "results")


@pytest.mark.slow
def test_a_figure_drawn_twice_is_one_file(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from analysis.build import FIGURES; from analysis.query import Sources; from analysis.style import save; "
        "[save(FIGURES[name](Sources()), Path(sys.argv[1]), name) for name in ('figure3_runtime',)]"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": str(ord(name))}, check=True)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["figure3_runtime.pdf", "figure3_runtime.png"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", sorted(build.FIGURES.keys() - figures_probes.FIGURES.keys()))
def test_every_figure_has_a_caption_and_is_drawn_without_records(name: str, tmp_path: Path):
    draw = build.FIGURES[name]
    assert len(draw.__doc__ or "") > 80 and draw(empty(tmp_path)).axes


def test_bad_sources_are_named_and_the_rest_is_built(tmp_path: Path):
    reference = copied(tmp_path / "results") / "reference"
    published = shutil.copytree(PUBLISHED, tmp_path / "published")
    paths = sorted((reference / "evaluate").glob("*.json"))
    for path, change in zip(paths, ({"format": 99}, {"values": json.loads(paths[1].read_text())["values"] | {"fd_digits": math.nan}}), strict=False):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    other = json.loads(paths[2].read_text())
    other["spec"]["num"] = 77
    paths[2].write_text(json.dumps(other))
    lines = list(csv.reader((published / "table5.csv").open()))
    (published / "table5.csv").write_text("\n".join(",".join(line[:2] + line[3:]) for line in lines) + "\n")
    (published / "table2.csv").write_text((published / "table2.csv").read_text().replace("18.58", "nan"))
    done = run_build("--tables", "--results", tmp_path / "results", "--published", published)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for words in (paths[0].name, "fd_digits is no number", f"no declared protocol ({other['spec']['train']['data']['name']}, 77", "table5.csv: no column gflops", "throughput_img_s is 'nan'"):
        assert [problem for problem in problems if words in problem], (words, problems)
    built = {path.name for path in (tmp_path / "results" / "tables").iterdir()}
    assert {"table1.md", "table3.html", "table4.csv", "table9.tex", "digits.md", "cifar10_small.md"} <= built and not {"table5.md", "table2.md"} & built


def test_a_published_file_that_is_missing_or_unsourced_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="restore it"):
        Sources(None, tmp_path).rows("table1.csv")
    words, numbers = COLUMNS["table7.csv"]
    names = [*words.split(), *numbers.split(), "source"]
    (tmp_path / "table7.csv").write_text(",".join(names) + "\n" + "DiCo-S," + ",".join("1" for _ in names[1:-1]) + ",\n")
    with pytest.raises(ValueError, match="line 2: no source"):
        Sources(None, tmp_path).rows("table7.csv")


def test_every_published_row_names_its_source():
    for name in COLUMNS:
        assert all("2505.11196" in row["source"] or "authors' log" in row["source"] for row in Sources().rows(name))


def test_tables_load_no_torch_and_no_plots():
    code = (
        "import sys; from pathlib import Path; from analysis.claims import claims_sheet; from analysis.query import Sources; from analysis.science import page; "
        "from analysis.tables import SHEETS; s = Sources(); [make(s) for make in SHEETS.values()]; claims_sheet(s); page(s); "
        "print(sorted({'torch', 'timm', 'sklearn', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "[]"
