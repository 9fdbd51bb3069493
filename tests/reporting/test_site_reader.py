"""What readers of the results site do with it, in a real browser: save a chart, type a filter, read on a phone, print."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sae_research.analysis.dashboard as dashboard
from sae_research.reporting.metrics import headline
from sae_research.reporting.revisions import Snapshot
from sae_research.reporting.rows import Row, Run, read_run
from sae_research.reporting.site.charts import BELOW
from sae_research.reporting.site.compare import write_comparison
from sae_research.runtime.formatting import number
from tests.helpers.browser import chromium, needs_chromium, sync_api, watched_page
from tests.helpers.results import STYLE, Lab
from tests.helpers.sites import held, many, specs, written_site

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: `make setup`")
pytestmark = needs_chromium
PHONE = {"width": 390, "height": 844}
A4 = {"width": 794, "height": 1123}
BAND = (201, 219, 237)
"""The L0 that is read, as it lies on the page by day: its --accent, pale."""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(site_lab: Lab) -> Path:
    return site_lab.root / "report"


@pytest.fixture(scope="module")
def run(site_lab: Lab) -> Run:
    return read_run(site_lab.root)


@pytest.fixture(scope="module")
def pair(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs in whose second one every KL is a tenth higher, with many parameters that differ."""
    rows = []
    for row in run.rows:
        core = row.evals["core"]
        metrics = {**core["metrics"], "kl": 1.1 * core["metrics"]["kl"]}
        rows.append(Row(row.name, row.cfg, {**row.evals, "core": {**core, "metrics": metrics}}))
    later = Run(rows, run.evals, run.training, run.curves)
    params = {f"section.some_parameter_{index}": "words " * 20 for index in range(60)}
    folder = tmp_path_factory.mktemp("pair")
    write_comparison(Snapshot("before", run, {}), Snapshot("after", later, params), STYLE, folder / "page")
    return folder / "page"


def opened(page: sync_api.Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    page.wait_for_function("document.body.dataset.ready === 'yes'")


def chart(page: sync_api.Page, key: str) -> sync_api.Locator:
    """A chart, drawn."""
    box = page.locator(f"[data-chart={key}]")
    box.scroll_into_view_if_needed()
    page.wait_for_function("key => charts.views.has(key)", arg=key)
    return box


def saved(page: sync_api.Page, key: str, kind: str) -> bytes:
    figure = page.locator(f".chart:has([data-chart={key}])")
    figure.locator(".save summary").click()
    with page.expect_download() as download:
        figure.get_by_role("button", name=f"Save as {kind}").click()
    assert download.value.suggested_filename == f"{key}.{kind.lower()}"
    return download.value.path().read_bytes()


def near(picture: bytes, color: tuple[int, ...], distance: int = 8) -> int:
    """How many pixels of a picture have about this colour."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=int)
    return int((np.abs(pixels - color).max(axis=-1) <= distance).sum())


# --- charts --------------------------------------------------------------------------------------


def test_a_saved_chart_is_readable_alone(site: Path, browser: sync_api.Browser) -> None:
    with watched_page(browser) as page:
        opened(page, site)
        chart(page, "kl")
        page.locator("#legend").get_by_role("checkbox", name="control").uncheck()
        drawn = saved(page, "kl", "SVG").decode()
        for words in ("KL against L0", "L0 (latents per token, log scale)", "KL (nats, log scale)", "Bars: 95 % intervals"):
            assert words in drawn
        for name in ("standard", "ihtp", "mpsae", "topk"):
            assert f">{name}<" in drawn, "the legend names it"
        assert ">control<" not in drawn, "what is not shown is not in the legend"
        # the reading L0 is on the page, and in no picture
        band = page.evaluate("style('--accent')")
        assert f'stroke="{band}"' in page.locator("[data-chart=kl] svg").first.inner_html() and band not in drawn
        picture = saved(page, "kl", "PNG")
        assert picture[:4] == b"\x89PNG" and near(picture, BAND) < 500, "the band would have ten thousand pixels"
        assert near(picture, (0xD5, 0x5E, 0)) > 300, "topk's marker, on its axes and in the legend"


def test_charts_of_two_runs_are_saved_with_names_and_intervals(pair: Path, run: Run, browser: sync_api.Browser) -> None:
    with watched_page(browser) as page:
        opened(page, pair)
        box = chart(page, "kl")
        bars = sum(row.interval("kl") is not None for row in run.rows)
        assert box.locator(".mark-rule.role-mark line").count() == 2 * bars > 0
        drawn = saved(page, "kl", "SVG").decode()
        for words in ("KL against L0", "Filled: before; hollow: after", ">standard<", ">control<"):
            assert words in drawn
        assert saved(page, "kl", "PNG")[:4] == b"\x89PNG"


def test_the_menu_of_a_chart_answers_keys(site: Path, browser: sync_api.Browser) -> None:
    with watched_page(browser) as page:
        opened(page, site)
        chart(page, "kl")
        page.locator(".chart:has([data-chart=kl]) .save summary").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        assert download.value.suggested_filename == "kl.png"


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_interval_at_the_l0_that_is_read_can_be_seen(
    site: Path, run: Run, browser: sync_api.Browser, scheme: str
) -> None:
    """Where the band lies on a measured L0, as it does at first, an interval's own colour is what the eye sees."""
    key = "sae_top_1_accuracy"
    with watched_page(browser, color_scheme=scheme) as page:
        opened(page, site)
        box = chart(page, key)
        read = page.evaluate("key => charts.views.get(key).view.signal('read_at')", key)
        assert "topk" in {row.name for row in run.rows if row.value("l0") == read and row.interval(key)}, (
            "read where measured"
        )
        color = page.evaluate("readable(given('marks').topk.color)")
        wanted = rgb(color)
        bar = box.locator(f".mark-rule line[stroke='{color}']").bounding_box()
        frame = box.locator("svg").first.bounding_box()
        accent = rgb(page.evaluate("style('--accent')"))
        assert bar and frame
        shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), dtype=int)
        x, top = round(bar["x"]), round(bar["y"])
        ends = shot[top + 2 : top + 9, x - 1 : x + 2]  # above the marker
        assert (np.abs(ends - wanted).sum(-1).min(-1) < np.abs(ends - accent).sum(-1).min(-1)).all()
        along = shot[round(frame["y"]) : round(frame["y"] + frame["height"]), x - 5 : x + 6]
        assert np.abs(along - accent).sum(-1).min() > 100, "the band is pale all along"


def with_cut(run: Run) -> Run:
    """Twelve of the run's SAEs, one of whose KL has an interval from below 0."""
    rows = []
    for row in many(run, 12).rows:
        core = row.evals["core"]
        if row.name == "standard_ihtp_k10_4":
            core = {**core, "intervals": {**core["intervals"], "kl": [-0.02, 0.4]}}
        rows.append(Row(row.name, row.cfg, {**row.evals, "core": core}))
    return Run(rows, run.evals, run.training, run.curves)


def test_an_interval_cut_by_the_axis_is_marked(lab: Lab, run: Run, browser: sync_api.Browser, tmp_path: Path) -> None:
    cut = with_cut(run)
    site = written_site(lab, cut)
    data = held(site / "index.html", "datasets")["saes"]
    assert [row["sae"] for row in data if "kl_below" in row] == ["standard_ihtp_k10_4"]
    assert "variance_explained_below" not in str(specs(site / "index.html")["variance_explained"]["layer"])
    write_comparison(Snapshot("before", run, {}), Snapshot("after", cut, {}), STYLE, tmp_path / "pair")
    for folder in (site, tmp_path / "pair"):
        with watched_page(browser) as page:
            opened(page, folder)
            assert "▾ below a bar: the interval goes on below the axis" in page.locator("main").inner_text()
            box = chart(page, "kl")
            drawn = box.locator("svg .mark-symbol")
            marks = drawn.evaluate_all("all => all.map(one => [one.getAttribute('aria-hidden'), one.childElementCount])")
            assert marks.count(["true", 1]) == 1, "one triangle, below the one bar that is cut"
            said = page.evaluate(
                "charts.datasets[Object.keys(charts.datasets).find(name => name === 'saes' || name === 'sides')]"
                ".find(row => row.sae === 'standard_ihtp_k10_4').kl_text"
            )
            value = next(row.value("kl") for row in cut.rows if row.name == "standard_ihtp_k10_4")
            assert said == f"{number(value)} [-0.020, 0.400], which goes on below the axis"
            box.locator("[aria-label*='SAE: standard_ihtp_k10_4;']").hover()
            page.locator("#vg-tooltip-element").wait_for()
            assert "which goes on below the axis" in page.locator("#vg-tooltip-element").inner_text()
            assert BELOW in saved(page, "kl", "SVG").decode()


# --- the filter ----------------------------------------------------------------------------------


def test_the_filter_takes_what_people_write(site: Path, run: Run, browser: sync_api.Browser) -> None:
    def those(key: str, holds: Callable[[float], bool]) -> set[str]:
        return {row.name for row in run.rows if (value := row.value(key)) is not None and holds(value)}

    low, wide = those("l0", lambda value: value <= 50), those("variance_explained", lambda value: value > 0.8)
    asked = {
        "l0<=50": low,
        "l0 <= 50": low,
        "L0 ≤ 50": low,
        "l0 < 50": those("l0", lambda value: value < 50),
        "l0 >= 50 kl<0.3": those("l0", lambda value: value >= 50) & those("kl", lambda value: value < 0.3),
        "Variance>0.8": wide,
        "variance explained > 0.8": wide,
        "mpsae Variance Explained>0.8": {name for name in wide if "mpsae" in name},
        "variance_explained > 0.8 topk": {name for name in wide if "topk" in name},
        "probing top-5 >= 0.81": those("sae_top_5_accuracy", lambda value: value >= 0.81),
        "l0=32.0": those("l0", lambda value: value == 32),
        "kl>-1": {row.name for row in run.rows},
        "fraction_alive > 2": set(),
    }
    with watched_page(browser) as page:
        opened(page, site)
        search = page.locator("[data-tools=results-table] input[type=search]")
        hint = page.locator("#results-table-hint")
        assert "l0<50" in (search.get_attribute("placeholder") or "") and "<= >" in hint.inner_text()
        for words, expected in asked.items():
            search.fill(words)
            left = page.locator("#results-table tbody tr:not([hidden]) th").all_inner_texts()
            assert set(left) == expected, words
            assert not page.locator(".problem").count(), words
        titles = page.locator("#results-table thead th").evaluate_all("heads => heads.map(head => head.title)")
        assert any(title.endswith("Key: variance_explained") for title in titles)


def test_the_filter_says_what_it_does_not_understand(site: Path, run: Run, browser: sync_api.Browser) -> None:
    asked = {
        "foo<3": "No column “foo”, so this limit is left out; nearest: ",
        "variance_explaned > 0.8": "nearest: variance_explained (Variance explained)",
        "topk losss recovered<1": "nearest: loss_recovered (Loss recovered)",
        "l0<": "After l0 < comes a number",
        "kl<0,3": "“0,3” is no number",
        "<3": "Before a limit comes a column",
    }
    with watched_page(browser) as page:
        opened(page, site)
        search = page.locator("[data-tools=results-table] input[type=search]")
        for words, said in asked.items():
            search.fill(words)
            problem = page.locator("#results-table-hint.problem")
            assert said in problem.inner_text() and "\n" not in problem.inner_text(), words
            left = page.locator("#results-table tbody tr:not([hidden])").count()
            assert left == (1 if words.startswith("topk") else len(run.rows)), words
        search.fill("Probing>0.5")
        assert "begins several headings" in page.locator("#results-table-hint.problem").inner_text()
        search.fill("")
        assert not page.locator(".problem").count()


# --- phone and paper -----------------------------------------------------------------------------


def test_a_phone_shows_that_columns_and_links_go_on(site: Path, browser: sync_api.Browser) -> None:
    with watched_page(browser, viewport=PHONE) as page:
        opened(page, site)
        box = page.locator(".scroller:has(#results-table)")
        page.wait_for_function("document.querySelector('.scroller:has(#results-table)').dataset.more === 'right'")
        assert box.evaluate("box => box.scrollHeight <= box.clientHeight + 1"), "rows are in the page's own flow"
        assert "more columns →" in page.locator(".onward:visible").first.inner_text()
        assert page.locator(".top nav").get_attribute("data-more") == "right"
        faded = "box => getComputedStyle(box).maskImage.includes('gradient')"
        assert box.evaluate(faded) and page.locator(".top nav").evaluate(faded)
        box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        page.locator(".top nav").evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        page.wait_for_function("document.querySelector('.scroller:has(#results-table)').dataset.more === 'left'")
        page.wait_for_function("document.querySelector('.top nav').dataset.more === 'left'")
        assert "more columns" not in page.locator("#results .onward").first.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_of_two_runs_says_first_what_changed(pair: Path, run: Run, browser: sync_api.Browser) -> None:
    with watched_page(browser) as page:
        opened(page, pair)
        assert page.locator("h2").first.inner_text() == "What changed"
        said = page.locator("#changes").inner_text()
        assert (
            "60 parameters differ: section.some_parameter_0, " in said
            and f"Both hold the same {len(run.rows)} SAEs." in said
        )
        page.locator("#changes").get_by_role("link", name="KL ↓").click()
        chosen = page.locator("#metric-choice").evaluate("choice => choice.selectedOptions[0].textContent")
        assert chosen == headline("kl").label + headline("kl").arrow
        for table in ("table.params", "#compare-table"):
            sides = page.locator(table).evaluate(
                """table => [...table.tHead.rows[0].cells].map((head, place) =>
                    [head, table.tBodies[0].rows[0].cells[place]].map(cell => getComputedStyle(cell).textAlign))"""
            )
            assert sides and all(head == cell for head, cell in sides), "headings lie over their values"
        assert page.locator(".scroller:has(.params)").evaluate("box => box.scrollHeight <= box.clientHeight + 1")


def test_the_page_of_two_runs_prints_whole(pair: Path, browser: sync_api.Browser) -> None:
    with watched_page(browser, viewport=A4) as page:
        opened(page, pair)
        page.emulate_media(media="print")
        boxes = page.locator(".scroller:visible").evaluate_all(
            """all => all.map(box => [box.scrollHeight <= box.clientHeight + 1, box.scrollWidth <= box.clientWidth + 1,
                getComputedStyle(box).contain, getComputedStyle(box).maskImage])"""
        )
        assert len(boxes) == 2 and all(box == [True, True, "none", "none"] for box in boxes)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator(".legend").is_visible(), "printed charts have names"


# --- the latent pages' compare table -------------------------------------------------------------


def test_names_in_headings_break_at_underscores_alone(browser: sync_api.Browser, tmp_path: Path) -> None:
    static = Path(dashboard.__file__).parent / "static"
    names = ["second_sae_with_longer_name", "matryoshka_batchtopk-s32_seed2"]
    scripts = "".join(f'<script src="{(static / name).as_uri()}"></script>' for name in ("core.js", "table.js"))
    (tmp_path / "index.html").write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><link rel="stylesheet" href="{(static / "style.css").as_uri()}">
        <button id="help-button"></button><dialog id="help"></dialog><main id="main"><div id="box"></div></main>{scripts}
        <script>
        const columns = [
          ...{names!r}.map(title => ({{title, name: "id", sort: row => row, value: String}})),
          ...{names!r}.map(sae => ({{title: `${{sae}}: density`, name: "figure less", sort: row => row, value: String}})),
          ...{names!r}.map(sae => ({{title: `${{sae}} fires on`, name: "tokens", value: String}})),
        ];
        new lab.Table(document.getElementById("box"), {{columns, label: "x", rows: [0, 1], address: () => "#"}});
        </script>"""
    )
    with watched_page(browser) as page:
        page.goto((tmp_path / "index.html").as_uri())
        page.locator(".virtual tbody tr[data-row]").first.wait_for()
        broken = page.locator(".virtual thead th").evaluate_all(
            """heads => heads.flatMap(head => {
                const walk = document.createTreeWalker(head, NodeFilter.SHOW_TEXT), letters = [];
                while (walk.nextNode()) for (let at = 0; at < walk.currentNode.length; at++) {
                    const range = document.createRange();
                    range.setStart(walk.currentNode, at);
                    range.setEnd(walk.currentNode, at + 1);
                    const box = range.getBoundingClientRect();
                    if (box.width) letters.push([walk.currentNode.data[at], box.top, box.right]);
                }
                const right = head.getBoundingClientRect().right;
                const text = head.textContent;
                return letters.flatMap(([letter, top, end], at) => {
                    const [before, above] = letters[at - 1] ?? ["", top];
                    const split = top > above + 2 && !/[-_\\s]/.test(before) && text.includes(before + letter);
                    return split || end > right + 1 ? [text] : [];
                });
            })"""
        )
        assert broken == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
