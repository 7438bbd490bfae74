"""Debian's Chromium without a window, for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.servers import missing

DESKTOP, PHONE = (1600, 1000), (360, 800)


@contextmanager
def chromium(directory: Path) -> Iterator[webdriver.Chrome]:
    """Run a browser whose profile is in ``directory``. Missing, it skips the test on a laptop and fails it in CI."""
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (browser and driver):
        missing("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Tests may run as root, and in containers with little shared memory.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "no-first-run", "disable-gpu",
                     "disable-background-networking", "hide-scrollbars", f"user-data-dir={directory}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the path of a driver Selenium looks for none on the network.
    page = webdriver.Chrome(options, Service(driver))
    try:
        resize(page, DESKTOP)
        yield page
    finally:
        page.quit()


def resize(page: webdriver.Chrome, size: tuple[int, int]) -> None:
    """Have the page be so wide and high, as on a device of that size."""
    width, height = size
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def prefer(page: webdriver.Chrome, theme: str) -> None:
    """Set what the system of the user prefers: ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(page: webdriver.Chrome) -> list[dict[str, Any]]:
    """What the console of the page has been told that is worse than a note, since the last time."""
    return [line for line in page.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]
