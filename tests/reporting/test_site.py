"""The results site: what it holds follows from the run, byte for byte."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from sae_research.config.reporting import Visualization
from sae_research.reporting.comparisons import RESIDUAL, comparisons
from sae_research.reporting.dvc_plots import templates
from sae_research.reporting.metrics import SAE_BENCH_SUFFIX, headline
from sae_research.reporting.rows import read_run
from sae_research.reporting.site import content, histories, marks, text
from sae_research.reporting.site.charts import run_marks
from sae_research.reporting.style import KNOWN, chosen_styles
from sae_research.runtime.errors import UserError
from sae_research.runtime.formatting import number
from tests.helpers.results import SAES, Lab
from tests.helpers.sites import METHODS, held, many, specs, written_site

vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: `make setup`")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(site_lab: Lab) -> Path:
    return site_lab.root / "report/index.html"


def test_equal_results_give_equal_bytes_and_nothing_is_asked_of_the_network(site_lab: Lab) -> None:
    site = site_lab.root / "report"
    before = {path.name: path.read_bytes() for path in site.iterdir()}
    written_site(site_lab)
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before
    assert sum(map(len, before.values())) < 3e6
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', before["index.html"].decode())
    assert addresses and all(address == "data:," or (site / address).is_file() for address in addresses)
    assert not re.search(r"url\(|@import", before["style.css"].decode())
    for name in ("results", "differences"):
        assert before[f"{name}.csv"] == (site_lab.root / f"metrics/{name}.csv").read_bytes()


def test_the_table_holds_every_value_of_results_csv(site_lab: Lab, page: Path) -> None:
    table = held(page, "results")
    assert [row["name"] for row in table["rows"]] == [row.name for row in read_run(site_lab.root).rows]
    keys = [column["key"] for column in table["columns"]]
    shown = {
        (row["name"], keys[place].removesuffix(SAE_BENCH_SUFFIX), keys[place].endswith(SAE_BENCH_SUFFIX)): cell
        for row in table["rows"]
        for place, cell in enumerate(row["cells"])
        if cell
    }
    with (site_lab.root / "metrics/results.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == len(shown) > 200
    for line in lines:
        theirs = line["definition_version"] != "lab_v1"
        cell = shown.get((line["sae"], line["metric"], theirs)) or shown[line["sae"], line["metric"], False]
        value = float(line["value"])
        assert cell[:2] == [value, number(value)]
        bounds = f"[{number(float(line['low']))}, {number(float(line['high']))}]" if line["low"] else None
        assert (cell[2] if len(cell) > 2 else None) == bounds
    first = [column["key"] for column in table["columns"] if column["shown"]]
    assert first == list(read_run(site_lab.root).headline)


def test_conclusions_come_first_and_in_the_report_s_words(site_lab: Lab, page: Path) -> None:
    shown, report = page.read_text(), (site_lab.root / "METRICS.md").read_text()
    sentences = re.search(r"## In short\n\n(.*?)\n\n## ", report, re.S)
    assert sentences
    plain = (
        re.sub(r"<[^>]+>", "", shown[shown.index("<h1>") : shown.index("<h2>")]).replace("&quot;", '"').replace("&#39;", "'")
    )
    for sentence in sentences[1].splitlines():
        assert sentence.removeprefix("- ").replace("`", "") in plain


def test_the_matrix_says_what_the_comparisons_say(site_lab: Lab) -> None:
    run = read_run(site_lab.root)
    found = comparisons(run)
    made = {matrix["metric"]: matrix for matrix in content.matrices(run, found)}
    assert sum(matrix["tests"] for matrix in made.values()) == len(found) > 20
    for item in found:
        matrix = made[item.metric]
        one, other = item.one.grid.label, item.other.grid.label if item.other else RESIDUAL
        cells = {name: dict(zip(matrix["names"], row, strict=True)) for name, row in matrix["rows"]}
        here, there = cells[one][other]["entries"], cells[other][one]["entries"]
        pair = tuple(name.replace("`", "") for name in item.pair)
        (mine,) = [entry for entry in here if entry["pair"] == pair and entry["l0"] == number(item.l0)]
        better = (item.found.value > 0) == (item.metric.better == "higher")
        assert mine["verdict"] == ("within noise" if not item.exceeds_noise else "better" if better else "worse")
        assert mine["value"].lstrip("+−") == number(abs(item.found.value))
        assert mine["value"].startswith("−") == (item.found.value < 0)
        if one != other:
            (theirs,) = [entry for entry in there if entry["pair"] == pair[::-1] and entry["l0"] == mine["l0"]]
            assert theirs["verdict"] == {"better": "worse", "worse": "better"}.get(mine["verdict"], mine["verdict"])
    assert all(cell["verdict"] == "untested" for _, row in made[headline("kl")]["rows"] for cell in row if not cell["tests"])


def test_every_chart_draws_its_rows(site_lab: Lab, page: Path) -> None:
    """Compiled and drawn by Vega itself: a marker for each SAE, in the figures' colours and outlines."""
    charts, run = specs(page), read_run(site_lab.root)
    assert set(run.plotted) < set(charts) and {"training_loss", "density_0", "truth_recipes_mcc", "truth_follow_all"} < set(
        charts
    )
    drawn = {key: vl_convert.vegalite_to_svg(json.dumps(spec)) for key, spec in charts.items()}
    for key in run.plotted:
        for row in run.rows:
            color = KNOWN[row.group].color
            assert color.lower() in drawn[key].lower()
        assert len(re.findall(r'aria-roledescription="point"', drawn[key])) == len(run.rows)
    assert len(re.findall(r'aria-roledescription="point"', drawn["truth_pursuit_latent_f1"])) == 4
    assert len([row for row in held(page, "datasets")["truth"] if row["part"] == "recipes"]) == 4
    assert all(method.replace("_", " ") in drawn["truth_recipes_mcc"] for method in METHODS if "over" not in method)
    assert drawn["density_0"].count('aria-roledescription="rect mark"') > 5 * len(SAES)


def test_markers_are_those_of_the_figures() -> None:
    assert marks.path("s") == "M-1,1 L1,1 L1,-1 L-1,-1 Z"
    assert marks.path("^") == "M0,-1 L-1,1 L1,1 Z"  # SVG's y points down
    assert len({marks.path(style.marker) for style in KNOWN.values()}) == len(KNOWN)
    made = marks.mark(chosen_styles(Visualization(architectures={"mine": {"marker": "P", "color": "teal"}}))["mine"])
    assert made["color"] == "#008080" and made["scale"] == 1.0


def test_an_unknown_marker_or_colour_is_one_line() -> None:
    with pytest.raises(UserError, match=r"architectures.mine: unknown marker 'zz'"):
        chosen_styles(Visualization(architectures={"mine": {"marker": "zz", "color": "teal"}}))
    with pytest.raises(UserError, match=r"architectures.mine: unknown color 'tael'"):
        chosen_styles(Visualization(architectures={"mine": {"marker": "P", "color": "tael"}}))


def test_tasks_stand_beside_the_raw_residual_stream(site_lab: Lab) -> None:
    tables = content.task_tables(read_run(site_lab.root))
    assert [table["title"] for table in tables] == [
        "Probing top-1",
        "Probing top-2",
        "Probing top-5",
        "Probing, all latents",
    ]
    last = tables[0]["rows"][-1]
    task = [column["key"] for column in tables[0]["columns"]].index("news_topic")
    assert last["name"] == RESIDUAL and last["cells"][task][0] == pytest.approx(0.684 + 0.05)


def test_latents_are_linked_where_they_were_built(lab: Lab) -> None:
    lab.write("dashboards/topk/index.html", "")
    page = (written_site(lab) / "index.html").read_text()
    assert '<a href="../dashboards/topk/index.html">topk</a>' in page and "../dashboards/standard/" not in page
    assert "eval_types.dashboards: true" in page


def test_pages_without_results(lab: Lab) -> None:
    """Nothing measured, nothing trained: the page says so and draws nothing."""
    for name in ("core", "sparse_probing"):
        lab.disable(name)
    for path in (lab.root / "trained_saes").rglob("*.*"):
        path.unlink()
    lab.write("downloaded_saes/manifest.json", {"order": [], "saes": {}})
    page = written_site(lab) / "index.html"
    assert "nothing was compared" in page.read_text() and "No pages of latents were built" in page.read_text()
    assert held(page, "results")["rows"] == []
    assert "data-chart" not in page.read_text()


def test_a_metric_without_values_has_a_reason_in_place_of_its_chart(lab: Lab) -> None:
    lab.disable("sparse_probing")
    page = written_site(lab) / "index.html"
    assert "Not drawn: Probing top-1: sparse_probing evaluation: disabled" in page.read_text()
    assert {"variance_explained", "kl"} < set(specs(page)) and "sae_top_1_accuracy" not in specs(page)


def test_many_histograms_are_split(site_lab: Lab) -> None:
    run = many(read_run(site_lab.root), 2 * histories.DENSITIES + 1)
    charts = histories.densities(run, run_marks(run, {}))
    assert [len(chart.spec["transform"][0]["filter"]["oneOf"]) for chart in charts] == [40, 40, 1]


def test_links_that_lead_nowhere_here_are_words() -> None:
    shown = text.html(
        "## T\n\n[kept](#here), [gone](docs/noise.md), ![pic](images/a.png) `a<b`\n\n| x |\n| --: |\n| 1 |", ["#here"]
    )
    assert '<a href="#here">kept</a>, gone,' in shown and "images" not in shown and "a&lt;b" in shown
    assert shown.count('<div class="scroller"') == 1 and "T" not in re.sub("Table", "", shown)


def test_dvc_draws_with_these_templates() -> None:
    for name, made in templates().items():
        assert (ROOT / ".dvc/plots" / name).read_text() == made, "run python -m sae_research.cli.plots"
