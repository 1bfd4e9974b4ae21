"""The report page: what it holds, and how it behaves in a real headless Chromium without a network."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from analysis.build import FIGURES
from analysis.page import browser as driver
from analysis.page.browser import chromium, opened, waited
from analysis.page.fragments import grids
from analysis.query import ReferenceStore
from experiments.engine.records.store import REPOSITORY


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed records, with two figures only, since a slow test has all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report, "FIGURES", {name: FIGURES[name] for name in ("figure3_runtime", "seed_spread")}
        )
        return built(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("whole"))


def built(folder: Path) -> Path:
    text, problems = report.build_page(ReferenceStore())
    assert not problems
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(chromium())
        except ValueError as error:
            pytest.skip(str(error))
        yield made


def column(browser: Any, table: str, index: int) -> list[str]:
    return browser.execute_script(
        f"return [...document.querySelectorAll('#{table} tbody tr')].map(row => row.cells[{index}].textContent.trim())"
    )


def test_the_page_is_one_file_of_at_most_15_mb_that_asks_for_nothing(page: Path):
    text = page.read_text(encoding="utf-8")
    shell = re.sub(
        r'<script type="text/plain".*?</script>|<style>.*?</style>|src="data:[^"]*"',
        "",
        text,
        flags=re.DOTALL,
    )
    assert page.stat().st_size < 15e6 and not re.search(
        r"""(?:src|href)=["'](?!#)|url\(|@import|https?://""", shell
    )


def test_libraries_that_are_missing_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def gone(name: str) -> Path:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(report, "files", gone)
    monkeypatch.setattr("sys.argv", ["report", "--output", str(tmp_path / "page.html")])
    assert report.main() == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines() == [
        "error: the page embeds plotly.js and DataTables, and No module named 'plotly'; pip install -e .[report]"
    ]


def test_what_could_not_be_built_stands_on_the_page(tmp_path: Path):
    published = shutil.copytree(REPOSITORY / "results" / "published", tmp_path / "published")
    (published / "table7.csv").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FIGURES", {"figure8": FIGURES["figure8_scores_over_training"]})
        text, problems = report.build_page(ReferenceStore(None, published))
    assert {problem.partition(":")[0] for problem in problems} == {"table7", "figure figure8"}
    assert "Could not be built" in text and text.count("table7.csv: No such file") >= 3


@pytest.mark.parametrize(
    "wrong",
    [
        IndexError("list index out of range"),
        ZeroDivisionError("division by zero"),
        KeyError("fid"),
        None,
    ],
)
def test_a_figure_that_fails_leaves_the_page_and_the_build(
    wrong: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of an unforeseen kind, or Figure 3 of a table without a throughput."""
    published = shutil.copytree(REPOSITORY / "results" / "published", tmp_path / "published")
    with open(published / "table2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(published / "table2.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"throughput_img_s": ""} for row in rows)

    def fails(store: ReferenceStore) -> None:
        """Never drawn."""
        raise wrong

    monkeypatch.setattr(
        report, "FIGURES", {"figure3": fails if wrong else FIGURES["figure3_runtime"]}
    )
    monkeypatch.setattr(report, "SHEETS", {"counts": report.SHEETS["counts"]})
    text, problems = report.build_page(ReferenceStore(None, published))
    assert [problem.partition(":")[0] for problem in problems] == ["figure figure3"] and str(
        wrong or "table2.csv: no row has a throughput"
    ) in problems[0]
    assert "figure3 could not be built" in text


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_loads_without_errors_and_fits(width: int, browser: Any, page: Path):
    opened(browser, page, width)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    ready, drawn = waited(browser)
    assert 0 < ready <= drawn and fits(browser, width)
    assert browser.execute_script("return document.images.length") >= 3


def test_the_page_is_timed_from_its_navigation_on(
    browser: Any, page: Path, monkeypatch: pytest.MonkeyPatch
):
    """A line a width, in whose seconds the answer comes before the scatter."""
    monkeypatch.setattr(driver, "chromium", lambda: nullcontext(browser))
    monkeypatch.setattr(driver, "ROUNDS", 1)
    lines = driver.timing(page)
    assert [line.partition(" ")[0] for line in lines] == ["1400", "390"]
    for line in lines:
        ready, drawn = (float(seconds) for seconds in re.findall(r"after ([0-9.]+) s", line))
        assert 0 < ready <= drawn and line.endswith(
            f"1 loads, Chromium {browser.capabilities['browserVersion']}"
        )


def test_a_machine_without_a_browser_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no chromium and chromedriver on the path"), chromium():
        pass


def fits(browser: Any, width: int) -> bool:
    """Whether the page has nothing to scroll to sideways, and what is wide scrolls inside a frame that the window holds."""
    return browser.execute_script(
        """
        const inside = (element) => { const box = element.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth && box.width > 0; };
        const framed = (element, frame) => frame && inside(frame) && (inside(element) || getComputedStyle(frame).overflowX === 'auto');
        return innerWidth === arguments[0] && document.scrollingElement.scrollWidth <= innerWidth
            && [...document.images].every((image) => image.complete && image.naturalWidth > 300 && framed(image, image.closest('.frame')))
            && [...document.querySelectorAll('table')].every((table) => framed(table, table.parentElement))
            && ['#scatter', '#view', 'nav', 'header', '.tiles'].every((part) => inside(document.querySelector(part)));
    """,
        width,
    )


@pytest.mark.parametrize("width", [1400, 390])
def test_wide_tables_scroll_in_their_frames_and_keep_their_first_column(
    width: int, browser: Any, page: Path
):
    opened(browser, page, width)
    moved, kept = browser.execute_script("""
        const frame = document.querySelector('#table1').parentElement, name = document.querySelector('#table1 tbody td'), before = name.getBoundingClientRect().left;
        frame.scrollLeft = 100;
        return [frame.scrollLeft, name.getBoundingClientRect().left - before];
    """)
    assert moved == 100 and abs(kept) <= 1
    browser.execute_script("scrollTo(500, 0)")
    assert browser.execute_script("return scrollX") == 0


def test_navigation_leads_to_sections_that_are_laid_out_late(browser: Any, page: Path):
    opened(browser, page, 1400)
    for name in ("provenance", "figures", "counts", "claims"):
        browser.execute_script(f"document.querySelector('nav a[href=\"#{name}\"]').click()")
        top = browser.execute_async_script(
            f"requestAnimationFrame(() => requestAnimationFrame(() => arguments[0](document.getElementById('{name}').getBoundingClientRect().top)))"
        )
        assert -5 <= top < 450 or browser.execute_script(
            "return scrollY + innerHeight >= document.scrollingElement.scrollHeight - 1"
        ), (name, top)


def test_what_does_not_fit_is_noticed(browser: Any, page: Path):
    """A table out of its frame, an image that is none and a wide block each fail the check above."""
    opened(browser, page, 390)
    assert fits(browser, 390)
    for spoil in (
        "document.querySelector('main').append(document.querySelector('#table1'))",
        "document.images[0].src = ''",
        "document.body.append(Object.assign(document.createElement('pre'), {style: 'width: 800px; height: 9px'}))",
    ):
        opened(browser, page, 390)
        browser.execute_script(spoil)
        assert not fits(browser, 390)


def test_tables_sort_and_filter(browser: Any, page: Path):
    opened(browser, page, 1400)
    heading = "#table1 thead tr:last-child th:nth-child(7)"
    for direction in (1, -1):
        browser.execute_script(f"document.querySelector('{heading}').click()")
        core = [float(text) for text in column(browser, "table1", 6)]
        assert core == sorted(core, key=lambda value: direction * value) and len(set(core)) > 10
    browser.execute_script(
        "const box = document.querySelector('#table8_wrapper input'); box.value = 'DiT-XL'; box.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    assert column(browser, "table8", 0) == ["DiT-XL/2"]


def test_claims_filter_by_their_evidence(browser: Any, page: Path):
    opened(browser, page, 1400)
    total = len(column(browser, "claims-table", 0))
    for level in ("counted", "not yet"):
        tile = f"document.querySelector('[data-level=\"{level}\"]')"
        browser.execute_script(f"{tile}.click()")
        shown = column(browser, "claims-table", 3)
        assert set(shown) == {level} and len(shown) == int(
            browser.execute_script(f"return {tile}.querySelector('strong').innerText")
        )
    browser.execute_script(f"{tile}.click()")
    assert len(column(browser, "claims-table", 0)) == total == 20


def test_a_number_shows_its_record(browser: Any, page: Path):
    opened(browser, page, 1400)
    browser.execute_script("document.querySelector('#table5 td[data-records] a').click()")
    shown = browser.execute_script(
        "const dialog = document.querySelector('dialog'); return dialog.open && dialog.querySelector('pre').innerText"
    )
    assert '"macs_core"' in shown and '"commit"' in shown
    file = browser.execute_script("return document.querySelector('dialog summary').innerText")
    assert file.startswith("results/reference/cost/") and (REPOSITORY / file).is_file()


@pytest.mark.parametrize(
    "where",
    [
        "#digits p[data-records]",
        "#digits td[data-records]",
        "figcaption[data-records]",
        "#samples figcaption",
        "#claims-table td:nth-child(8)[data-records]",
    ],
)
def test_text_figures_and_samples_lead_to_their_records(where: str, browser: Any, page: Path):
    opened(browser, page, 1400)
    browser.execute_script(f"document.querySelector('{where} a.records').click()")
    files = browser.execute_script(
        "return document.querySelector('dialog').open && [...document.querySelectorAll('dialog summary')].map(entry => entry.innerText)"
    )
    assert files and all((REPOSITORY / file).is_file() for file in files)


def test_every_number_of_ours_on_the_page_of_text_is_a_link(browser: Any, page: Path):
    opened(browser, page, 1400)
    bare = """return [...document.querySelectorAll('#digits td')].filter((cell) => {
        const heading = cell.closest('table').querySelectorAll('thead tr:last-child th')[cell.cellIndex].textContent;
        const above = cell.closest('table').querySelectorAll('thead tr')[0].textContent;
        return cell.cellIndex > 0 && /[0-9]/.test(cell.textContent) && !/^(FID|IS|P|R)$/.test(heading) && !cell.querySelector('a.records');
    }).map((cell) => cell.textContent)"""
    assert browser.execute_script(bare) == []


def test_a_page_without_grids_says_so_and_one_that_is_damaged_is_a_problem(tmp_path: Path):
    problems: list[str] = []
    (tmp_path / "digits.png").write_bytes(b"no image")
    assert grids(tmp_path, ReferenceStore(), problems).startswith(
        "<p>No grid of samples is committed"
    )
    assert problems == [
        "samples: digits.png is no image; draw it again with python -m analysis.grid"
    ]


def test_a_committed_grid_names_a_run_with_a_committed_record():
    problems: list[str] = []
    folder = REPOSITORY / "results" / "figures" / "samples"
    shown = grids(folder, ReferenceStore(), problems)
    assert (
        not problems
        and shown.count("<figcaption data-records=") == len(list(folder.glob("*.png"))) > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_the_whole_page_is_at_most_15_mb_and_runs_to_its_end(width: int, browser: Any, whole: Path):
    """All figures: DOMContentLoaded has fired, the tables sort and the scatter stands when the scripts end, and nothing was logged."""
    assert whole.stat().st_size < 15e6
    opened(browser, whole, width)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert browser.execute_script(
        "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd > 0 && Number(document.body.dataset.ready) > 0"
    )
    assert browser.execute_script(
        "return document.querySelectorAll('#figures .plot img').length"
    ) == len(FIGURES)
    assert browser.execute_script(
        "return document.querySelectorAll('table.dataTable').length == document.querySelectorAll('table').length"
    )
    assert fits(browser, width)


@pytest.mark.parametrize("width", [1400, 390])
def test_the_scatter_holds_its_points_inside_the_window(width: int, browser: Any, page: Path):
    """In every view as many marks as the data have points, all of them within the plot."""
    opened(browser, page, width)
    views = browser.execute_script("return document.getElementById('view').options.length")
    for index in range(views):
        browser.execute_script(
            "const view = document.getElementById('view'); view.value = arguments[0]; view.dispatchEvent(new Event('change'))",
            index,
        )
        wanted, boxes = browser.execute_script("""
            const scatter = document.getElementById('scatter'), marks = [...scatter.querySelectorAll('.point')].map((mark) => mark.getBoundingClientRect());
            return [scatter.data.reduce((total, trace) => total + trace.x.length, 0), marks.map((box) => [box.left, box.right])];
        """)
        assert len(boxes) == wanted >= 4 and all(
            0 <= left < right <= width for left, right in boxes
        )
    assert views >= 4


def test_the_scatter_changes_its_view_and_answers_the_pointer(browser: Any, page: Path):
    opened(browser, page, 1400)
    assert browser.execute_script("return document.querySelectorAll('#scatter .point').length") > 8
    browser.execute_script(
        "const view = document.getElementById('view'); view.value = view.options.length - 1; view.dispatchEvent(new Event('change'))"
    )
    browser.execute_script("Plotly.Fx.hover('scatter', [{ curveNumber: 0, pointNumber: 0 }])")
    words = browser.execute_script(
        "return document.querySelector('#scatter .hoverlayer').textContent"
    )
    assert "DiCo-S" in words and "seeds" in words and "click for 4 records" in words
    browser.execute_script(
        "const scatter = document.getElementById('scatter'); scatter.emit('plotly_click', { points: [{ customdata: scatter.data[0].customdata[0] }] })"
    )
    kinds = browser.execute_script(
        "return document.querySelector('dialog').open && [...document.querySelectorAll('dialog summary')].map(entry => entry.innerText.split('/')[2])"
    )
    assert sorted(kinds) == ["evaluate"] * 3 + ["timing"]
