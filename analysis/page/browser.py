"""Open the report page in a headless Chromium without a network, to test and to time it.

It needs selenium, chromium and chromedriver.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 5
WIDTHS = (1400, 390)  # pixels: a desk and a phone
PHONE = 600  # pixels of width below which a page is shown as on a phone
PATIENCE = 120  # seconds after which a page counts as hanging
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@dataclass(frozen=True)
class Waits:
    """Seconds from the start of the navigation."""

    # Until tables sort and links answer.
    ready: float
    # Until the scatter is drawn.
    drawn: float


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser.

    Raises:
        ValueError: if selenium, chromium or chromedriver is missing.
    """
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError as error:
        raise ValueError(
            f"opening the page needs selenium, and {error}; pip install selenium"
        ) from None
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        raise ValueError(
            "no chromium and chromedriver on the path; apt-get install chromium chromium-driver"
        )

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def open_page(browser: Any, page: Path, width: int) -> None:
    """Load a page in a window of a width and wait until its scripts have ended."""
    from selenium.webdriver.support.ui import WebDriverWait

    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < PHONE)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, PATIENCE).until(
        lambda browser: browser.execute_script("return document.body.dataset.drawn")
    )


def read_waits(browser: Any) -> Waits:
    """Return how soon the open page answered."""
    ready, drawn = (
        float(browser.execute_script(f"return document.body.dataset.{name}")) / 1000
        for name in ("ready", "drawn")
    )
    return Waits(ready, drawn)


def timing(page: Path) -> list[str]:
    """Load a page ROUNDS times at each width and return a line per width."""
    lines = []
    with chromium() as browser:
        version = browser.capabilities["browserVersion"]
        for width in WIDTHS:
            waits = []
            for _ in range(ROUNDS):
                open_page(browser, page, width)
                waits.append(read_waits(browser))

            # Single loads vary, so the line gives medians and ranges.
            ready = _median_and_range([wait.ready for wait in waits])
            drawn = _median_and_range([wait.drawn for wait in waits])
            lines.append(
                f"{width} pixels wide: interactive after {ready}, scatter drawn after {drawn}, "
                f"{ROUNDS} loads, Chromium {version}"
            )
    return lines


def _median_and_range(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
