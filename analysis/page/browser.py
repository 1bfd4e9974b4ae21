"""The report page in a headless Chromium without a network: what its tests drive, and what times it. Needs selenium, chromium and chromedriver."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROUNDS = 5
WIDTHS = (1400, 390)  # pixels: a desk and a phone
PATIENCE = 120  # seconds after which a page is taken to hang


@contextmanager
def chromium() -> Iterator[Any]:
    """ValueError where a part of it is missing."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError as error:
        raise ValueError(
            f"opening the page needs selenium, and {error}; pip install selenium"
        ) from None
    found, driver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not found or not driver:
        raise ValueError(
            "no chromium and chromedriver on the path; apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield made
    finally:
        made.quit()


def opened(browser: Any, page: Path, width: int) -> Any:
    """The browser, once the page's scripts have ended."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600),
    )
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, PATIENCE).until(
        lambda browser: browser.execute_script("return document.body.dataset.drawn")
    )
    return browser


def waited(browser: Any) -> tuple[float, float]:
    """Seconds from the start of the navigation until the open page's tables sort and its links answer, and until its scatter stands."""
    ready, drawn = (
        float(browser.execute_script(f"return document.body.dataset.{name}")) / 1000
        for name in ("ready", "drawn")
    )
    return ready, drawn


def timing(page: Path) -> list[str]:
    """In words, a line a width: the median and range of both over ROUNDS loads."""
    lines = []
    with chromium() as browser:
        for width in WIDTHS:
            rounds = [waited(opened(browser, page, width)) for _ in range(ROUNDS)]
            words = (
                f"{what} after {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
                for what, seconds in zip(
                    ("interactive", "scatter drawn"), zip(*rounds, strict=True), strict=True
                )
            )
            lines.append(
                f"{width} pixels wide: {', '.join(words)}, {ROUNDS} loads, Chromium {browser.capabilities['browserVersion']}"
            )
    return lines
