"""The report in a real browser, on a desk and on a phone, light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from hiermoe.analysis.report import write_report
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import Cell
from hiermoe.runs.indexing import indexed
from tests.analysis.browser import HEIGHTS, Scheme, browser, show

pytestmark = pytest.mark.browser
in_both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"])
on_both = pytest.mark.parametrize("width", HEIGHTS)

CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = text => parse(text).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const paper = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll(arguments[0])].map(element => {
  const ink = light(getComputedStyle(element).color);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
});
"""


@pytest.fixture(scope="module")
def page(cells: dict[str, list[Cell]], filled: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with something in every section."""
    return write_report(indexed(cells), filled, tmp_path_factory.mktemp("report")).page


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


def found(driver: Chrome, script: str, *arguments: Any) -> Any:
    return driver.execute_script(f"return {script}", *arguments)


@on_both
@in_both_schemes
def test_nothing_is_wider_than_the_page_but_tables_in_their_own_frames(
    driver: Chrome, page: Path, width: int, scheme: Scheme
) -> None:
    show(driver, page, width, scheme)
    found(driver, "document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert found(driver, "window.innerWidth") == width
    assert found(driver, "document.documentElement.scrollWidth") <= width
    frames = found(driver, "[...document.querySelectorAll('.wide')].map(x => [x.clientWidth, x.scrollWidth])")
    assert all(shown <= width for shown, _ in frames)
    if width == min(HEIGHTS):
        assert any(whole > shown for shown, whole in frames)  # some do not fit a phone, and scroll
    columns = found(
        driver, "[...document.querySelectorAll('.wide td:first-child')].map(x => getComputedStyle(x).position)"
    )
    assert set(columns) == {"sticky"}


@on_both
def test_contents_stay_in_sight_and_lead_to_their_sections(driver: Chrome, page: Path, width: int) -> None:
    show(driver, page, width, "light")
    links = found(driver, "[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(links) == len(set(links)) > 8
    for link in links:
        found(driver, "document.querySelector(`nav a[href='${arguments[0]}']`).click()", link)
        assert found(driver, "decodeURIComponent(location.hash)") == link
        top, bottom = found(
            driver, "(box => [box.top, box.bottom])(document.querySelector(arguments[0]).getBoundingClientRect())", link
        )
        below = 0 if width > 1000 else found(driver, "document.querySelector('nav').getBoundingClientRect().bottom")
        assert below - 1 <= top and bottom <= HEIGHTS[width], link  # the heading is seen, not under the contents
        assert found(driver, "document.querySelector('nav').getBoundingClientRect().top") == 0


@on_both
def test_figures_load_and_the_main_one_is_on_the_first_screen(driver: Chrome, page: Path, width: int) -> None:
    show(driver, page, width, "light")
    sizes = found(driver, "[...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth])")
    assert len(sizes) > 8
    assert all(complete and natural >= 1000 and shown <= width for complete, natural, shown in sizes)
    assert found(driver, "document.images[0].getBoundingClientRect().top") < HEIGHTS[width] * 0.75
    assert all(found(driver, "[...document.images].map(image => image.alt.length > 10)"))


@in_both_schemes
def test_text_stands_out_from_the_paper(driver: Chrome, page: Path, scheme: Scheme) -> None:
    show(driver, page, 1280, scheme)
    paper = found(driver, "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert min(paper) > 240 if scheme == "light" else max(paper) < 40
    contrasts = driver.execute_script(CONTRAST, "p, li, td, th, h1, h2, a, .verdict")
    assert len(contrasts) > 200 and min(contrasts) >= 4.5
