"""The documentation as a site: it builds without a warning, and its pages, opened from disk with the network cut, load
nothing from elsewhere, fit a phone and find things. Its reference pages are what the records say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_research.cli import reference
from tests.helpers.browser import chromium, needs_chromium, sync_api

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_pages_are_what_the_records_say(name: str) -> None:
    assert (reference.FOLDER / f"{name}.md").read_text() == reference.PAGES[name](), "python -m sae_research.cli.reference"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a dead link, a page outside the navigation or a name that the interface lacks would end it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with chromium() as browser:
        yield browser


@needs_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_page_opens_from_disk_and_fits(site: Path, browser: sync_api.Browser, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844}, offline=True)
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else trouble.append(request.url),
    )
    for path in sorted(site.rglob("*.html")):
        if path.name != "404.html":
            page.goto(path.as_uri())
            assert page.locator("h1").first.inner_text(), path
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            missing = page.evaluate(
                "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).map(i => i.src)"
            )
            assert not missing, (path, missing)
            blank = page.evaluate(
                "[...document.querySelectorAll('thead')].filter(h => h.offsetHeight && !h.innerText.trim()).length"
            )
            assert not blank, (path, "a table with a blank first row")
    assert not trouble
    context.close()


@needs_chromium
@pytest.mark.parametrize("name", ["reference/metrics", "moving/sae_bench"])
def test_on_a_phone_all_columns_of_a_table_are_seen_at_once(site: Path, browser: sync_api.Browser, name: str) -> None:
    """Names are long: whole, they would push the next column out of sight."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, offline=True)
    page.goto((site / f"{name}.html").as_uri())
    places = page.evaluate(
        """[...document.querySelectorAll('article table')].map(table => [...table.querySelectorAll('th')].map(cell => {
            const box = cell.getBoundingClientRect(); return [box.left, box.right] }))"""
    )
    assert len(places) > 3 and all(len(columns) == 3 for columns in places)
    for columns in places:
        assert all(0 <= left and right - left >= 50 for left, right in columns), columns
        assert columns[1][1] <= 390 and columns[2][0] + 80 <= 390, columns
    page.close()


@needs_chromium
@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("loss recovered", "reference/metrics"),
        ("metrics", "reference/metrics"),
        ("add a metric", "extending"),
        ("add an evaluation", "extending"),
        ("gemma scope", "start/released_sae"),
    ],
)
def test_the_search_finds_the_page_first(site: Path, browser: sync_api.Browser, words: str, place: str) -> None:
    page = browser.new_page(offline=True)
    page.goto((site / "index.html").as_uri())
    # by keys, which the page listens to
    page.locator("input.md-search__input").press_sequentially(words)
    found = page.locator(".md-search-result__item a").first
    found.wait_for(state="attached", timeout=20_000)
    assert f"/{place}.html" in (found.get_attribute("href") or "")
    page.close()
