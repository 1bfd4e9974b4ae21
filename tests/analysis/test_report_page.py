"""The report page: what it holds, and how it behaves in a headless Chromium without a network."""

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
from analysis.page import templating
from analysis.page.browser import chromium, open_page, read_waits
from analysis.page.content import Table, sample_grids
from analysis.page.templating import inert, render_template
from analysis.query import ReferenceStore
from analysis.reference import Problem
from experiments.engine.records.tree import REPOSITORY
from experiments.engine.reporting.sheet import Cell, Column, Kind, Note, NoteKind, Sheet
from tests.support import page_scripts as scripts
from tests.support.marks import slow_after_first

# What a page has of each of its parts that take long to build and to load.
SOME = {
    "FIGURES": ("figure3_runtime", "seed_spread"),
    "SHEETS": ("table1", "table5", "table8", "counts"),
}
DESK = 1400
PHONE = 390


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with some figures and tables of the committed records; a slow test has all."""
    with pytest.MonkeyPatch.context() as patch:
        for parts, names in SOME.items():
            patch.setattr(report, parts, {name: getattr(report, parts)[name] for name in names})
        return build(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole"))


def build(folder: Path) -> Path:
    text, problems = report.build_page(ReferenceStore())
    assert not problems
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium())
        except ValueError as error:
            pytest.skip(str(error))
        yield opened


def column(browser: Any, table: str, index: int) -> list[str]:
    return browser.execute_script(scripts.COLUMN, table, index)


def errors_of(browser: Any) -> list[dict[str, Any]]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_is_one_small_file_that_asks_for_nothing(page: Path):
    text = page.read_text(encoding="utf-8")
    embedded = r'<script type="text/plain".*?</script>|<style>.*?</style>|src="data:[^"]*"'
    shell = re.sub(embedded, "", text, flags=re.DOTALL)
    assert page.stat().st_size < 15e6
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\(|@import|https?://""", shell)


def test_what_records_say_is_escaped():
    """A label cannot open a tag, and a library cannot end the script around it."""
    sheet = Sheet("<b>title", [Column("a", "a<i>", kind=Kind.PROSE), Column("b", "b", digits=3)])
    sheet.add_row({"a": Cell(label='"<script>'), "b": Cell(1.25, best=True)})
    sheet.notes.append(Note(NoteKind.GENERAL, "5 < 6 & 7"))
    text = render_template("one_table.html", table=Table(sheet, "name"))
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;title" in text
    assert "5 &lt; 6 &amp; 7" in text
    assert '<td data-order="1.25"><b>1.250</b></td>' in text
    assert inert("a</script>b<!--") == r"a<\/script>b\u003c!--"


def test_libraries_that_are_missing_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def gone(name: str) -> Path:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(templating, "files", gone)
    monkeypatch.setattr("sys.argv", ["report", "--output", str(tmp_path / "page.html")])
    assert report.main() == 2
    assert not list(tmp_path.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the page needs Jinja, plotly.js and DataTables")
    assert line.endswith("pip install -e .[report]")


def copy_published(folder: Path) -> Path:
    return shutil.copytree(REPOSITORY / "results" / "published", folder / "published")


@pytest.fixture
def only_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build no table but the counts, no text and no claims, which take most of the time."""
    monkeypatch.setattr(report, "SHEETS", {"counts": report.SHEETS["counts"]})
    monkeypatch.setattr(report, "evidence_blocks", lambda store: [])
    empty = Sheet("claims", [Column("claim", "claim")])
    monkeypatch.setattr(report, "claims_sheet", lambda store: empty)


def test_what_could_not_be_built_stands_on_the_page(
    only_counts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    published = copy_published(tmp_path)
    (published / "table7.csv").unlink()
    sheets = report.SHEETS | {"table7": table7}
    monkeypatch.setattr(report, "SHEETS", sheets)
    monkeypatch.setattr(report, "FIGURES", {"figure8": FIGURES["figure8_scores_over_training"]})
    text, problems = report.build_page(ReferenceStore(None, published))
    assert {problem.part for problem in problems} == {"table7", "figure figure8"}
    assert "Could not be built" in text
    assert text.count("table7.csv: No such file") >= 3


def table7(store: ReferenceStore) -> Sheet:
    from analysis.tables.paper import SHEETS

    return SHEETS["table7"](store)


@pytest.mark.parametrize(
    "failure",
    [
        IndexError("list index out of range"),
        ZeroDivisionError("division by zero"),
        KeyError("fid"),
    ],
)
def test_a_figure_that_fails_leaves_the_rest_of_the_page(
    failure: Exception, only_counts: None, monkeypatch: pytest.MonkeyPatch
):
    def fail(store: ReferenceStore) -> None:
        """Never drawn."""
        raise failure

    monkeypatch.setattr(report, "FIGURES", {"figure3": fail})
    text, problems = report.build_page(ReferenceStore())
    (problem,) = problems
    assert problem.part == "figure figure3"
    assert str(failure) in problem.reason
    assert "figure3 could not be built" in text


def test_figure_3_without_a_published_throughput_is_a_problem(
    only_counts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = copy_published(tmp_path) / "table2.csv"
    rows = list(csv.DictReader(file.read_text().splitlines()))
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(row | {"throughput_img_s": ""} for row in rows)
    monkeypatch.setattr(report, "FIGURES", {"figure3": FIGURES["figure3_runtime"]})
    _, problems = report.build_page(ReferenceStore(None, file.parent))
    assert "table2.csv: no row has a throughput" in problems[0].reason


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_page_loads_without_errors_and_fits(width: int, browser: Any, page: Path):
    """It is timed, its images stand, and a wide table scrolls under its first column."""
    open_page(browser, page, width)
    assert not errors_of(browser)
    waits = read_waits(browser)
    assert 0 < waits.ready <= waits.drawn
    assert browser.execute_script(scripts.FITS, width)
    assert browser.execute_script("return document.images.length") >= 3

    scrolled, first_column_moved = browser.execute_script(scripts.SCROLL_TABLE)
    assert scrolled == 100
    assert abs(first_column_moved) <= 1
    browser.execute_script("scrollTo(500, 0)")
    assert browser.execute_script("return scrollX") == 0


def test_the_page_is_timed_from_its_navigation_on(
    browser: Any, page: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each width is one line, in which the tables answer before the scatter is drawn."""
    monkeypatch.setattr(driver, "chromium", lambda: nullcontext(browser))
    monkeypatch.setattr(driver, "ROUNDS", 1)
    lines = driver.timing(page)
    assert [line.partition(" ")[0] for line in lines] == [str(DESK), str(PHONE)]
    for line in lines:
        ready, drawn = (float(seconds) for seconds in re.findall(r"after ([0-9.]+) s", line))
        assert 0 < ready <= drawn
        assert line.endswith(f"1 loads, Chromium {browser.capabilities['browserVersion']}")


def test_a_machine_without_a_browser_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no chromium and chromedriver on the path"), chromium():
        pass


def test_navigation_leads_to_sections_that_are_laid_out_late(browser: Any, page: Path):
    open_page(browser, page, DESK)
    for name in ("provenance", "figures", "counts", "claims"):
        top = browser.execute_async_script(scripts.NAVIGATE, name)
        at_the_end = browser.execute_script(scripts.AT_THE_END)
        assert -5 <= top < 450 or at_the_end, (name, top)


@pytest.mark.parametrize("spoil", slow_after_first(scripts.SPOILS, lambda spoil: "page"))
def test_what_does_not_fit_is_noticed(spoil: str, browser: Any, page: Path):
    """A table out of its frame, a broken image and a wide block each fail the check of fit."""
    open_page(browser, page, PHONE)
    assert browser.execute_script(scripts.FITS, PHONE)
    browser.execute_script(spoil)
    assert not browser.execute_script(scripts.FITS, PHONE)


def test_tables_sort_and_filter(browser: Any, page: Path):
    open_page(browser, page, DESK)
    heading = "#table1 thead tr:last-child th:nth-child(7)"
    for direction in (1, -1):
        browser.execute_script(f"document.querySelector('{heading}').click()")
        shown = [float(text) for text in column(browser, "table1", 6)]
        assert shown == sorted(shown, key=lambda value: direction * value)
        assert len(set(shown)) > 10
    browser.execute_script(scripts.SEARCH, "#table8_wrapper input", "DiT-XL")
    assert column(browser, "table8", 0) == ["DiT-XL/2"]


def test_claims_filter_by_their_evidence(browser: Any, page: Path):
    open_page(browser, page, DESK)
    total = len(column(browser, "claims-table", 0))
    for level in ("counted", "not yet"):
        tile = f"document.querySelector('[data-level=\"{level}\"]')"
        browser.execute_script(f"{tile}.click()")
        shown = column(browser, "claims-table", 3)
        count = browser.execute_script(f"return {tile}.querySelector('strong').innerText")
        assert set(shown) == {level}
        assert len(shown) == int(count)
    browser.execute_script(f"{tile}.click()")
    assert len(column(browser, "claims-table", 0)) == total == 30


def test_a_number_shows_its_record(browser: Any, page: Path):
    open_page(browser, page, DESK)
    browser.execute_script("document.querySelector('#table5 td[data-records] a').click()")
    shown = browser.execute_script(scripts.DIALOG_RECORD)
    assert '"macs_core"' in shown
    assert '"commit"' in shown
    (file,) = browser.execute_script(scripts.DIALOG_FILES)
    assert file.startswith("results/reference/cost/")
    assert (REPOSITORY / file).is_file()


def test_text_figures_and_samples_lead_to_their_records(browser: Any, page: Path):
    open_page(browser, page, DESK)
    assert browser.execute_script(scripts.NUMBERS_WITHOUT_A_LINK) == []
    for place in (
        "#evidence p[data-records]",
        "#evidence td[data-records]",
        "figcaption[data-records]",
        "#samples figcaption",
        "#claims-table td:nth-child(8)[data-records]",
    ):
        browser.execute_script(f"document.querySelector('{place} a.records').click()")
        files = browser.execute_script(scripts.DIALOG_FILES)
        assert files, place
        assert all((REPOSITORY / file).is_file() for file in files)
        browser.execute_script("document.querySelector('dialog').close()")


def test_a_grid_that_is_damaged_is_a_problem(tmp_path: Path):
    problems: list[Problem] = []
    (tmp_path / "digits.png").write_bytes(b"no image")
    assert sample_grids(tmp_path, ReferenceStore(), problems) == []
    again = "draw it again with python -m analysis.grid"
    assert problems == [Problem("samples", f"digits.png is no image; {again}")]


def test_a_committed_grid_names_a_run_with_a_committed_record():
    problems: list[Problem] = []
    folder = REPOSITORY / "results" / "figures" / "samples"
    grids = sample_grids(folder, ReferenceStore(), problems)
    assert not problems
    assert len(grids) == len(list(folder.glob("*.png"))) > 0
    assert all(grid.records for grid in grids)


@pytest.mark.slow
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_whole_page_is_small_and_runs_to_its_end(width: int, browser: Any, whole_page: Path):
    """With all figures, all tables sort, all images stand and nothing was logged."""
    assert whole_page.stat().st_size < 15e6
    open_page(browser, whole_page, width)
    assert not errors_of(browser)
    assert browser.execute_script(scripts.LOADED)
    assert browser.execute_script(scripts.ALL_TABLES_SORT)
    assert browser.execute_script(scripts.NUM_FIGURES) == len(FIGURES)
    assert browser.execute_script(scripts.FITS, width)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_scatter_holds_its_points_inside_the_window(width: int, browser: Any, page: Path):
    """Every view has as many marks as its data have points, and all lie within the plot."""
    open_page(browser, page, width)
    count = browser.execute_script("return document.getElementById('view').options.length")
    assert count >= 4
    for index in range(count):
        browser.execute_script(scripts.CHOOSE_VIEW, index)
        wanted, marks = browser.execute_script(scripts.MARKS)
        assert len(marks) == wanted >= 4
        assert all(0 <= left < right <= width for left, right in marks)


def test_the_scatter_changes_its_view_and_answers_the_pointer(browser: Any, page: Path):
    open_page(browser, page, DESK)
    assert browser.execute_script("return document.querySelectorAll('#scatter .point').length") > 8
    last = browser.execute_script("return document.getElementById('view').options.length") - 1
    browser.execute_script(scripts.CHOOSE_VIEW, last)
    browser.execute_script("Plotly.Fx.hover('scatter', [{ curveNumber: 0, pointNumber: 0 }])")
    hover = browser.execute_script(scripts.HOVER_TEXT)
    assert "DiCo-S" in hover
    assert "seeds" in hover

    browser.execute_script(scripts.CLICK_FIRST_POINT)
    files = browser.execute_script(scripts.DIALOG_FILES)
    kinds = sorted(file.split("/")[2] for file in files)
    assert len(kinds) > 3
    assert kinds == ["evaluate"] * (len(kinds) - 1) + ["timing"]
    assert f"click for {len(kinds)} records" in hover
