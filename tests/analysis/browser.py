"""A real browser (Debian's chromium) of a given width and colour scheme; as a command: screenshots of a page.

``python -m tests.analysis.browser reports/report.html reports/reference``
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

Scheme = Literal["light", "dark"]
HEIGHTS = {1280: 800, 390: 844}  # of a window and of a phone, by width


@contextmanager
def browser() -> Iterator[Chrome]:
    """Chromium without a window."""
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Chrome, page: Path, width: int, scheme: Scheme) -> None:
    """Open a page as a window or phone of this width shows it.

    Args:
        driver: the browser.
        page: HTML.
        width: CSS pixels, 1280 or 390.
        scheme: that the user prefers.
    """
    size = {"width": width, "height": HEIGHTS[width], "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})
    driver.get(page.resolve().as_uri())


def main() -> None:
    """Take the first screens of a page, light on a desk and dark on a phone."""
    page, folder = map(Path, sys.argv[1:])
    screens: tuple[tuple[int, Scheme], ...] = ((1280, "light"), (390, "dark"))
    with browser() as driver:
        for width, scheme in screens:
            show(driver, page, width, scheme)
            driver.save_screenshot(str(folder / f"first_screen_{width}_{scheme}.png"))


if __name__ == "__main__":
    main()
