"""Write `report/`: the page, its script and style, one copy of Vega, and the tables as .csv."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sae_research.config.reporting import Visualization
from sae_research.reporting import report
from sae_research.reporting.comparisons import DIFFERENCES_CSV, Comparison
from sae_research.reporting.ground_truth import GroundTruthRun, ground_truth, read_ground_truth
from sae_research.reporting.metrics import headline
from sae_research.reporting.rows import Run
from sae_research.reporting.sections import controls, differences, equal_l0, optional, seeds
from sae_research.reporting.site import charts, content, histories, text, truth
from sae_research.reporting.style import chosen_styles
from sae_research.reporting.tables import RESULTS_CSV
from sae_research.reporting.transfer import transfer
from sae_research.runtime.files import replaced_folder, write_text
from sae_research.runtime.formatting import amount

SITE = Path("report")
DASHBOARDS = Path("dashboards")
VEGA = "vega.js"
PARTS = Path(__file__).parent


def write_site(run: Run, found: Sequence[Comparison], style: Visualization, root: Path = Path(".")) -> None:
    """Write `report/` afresh. The same results give the same bytes.

    found: all comparisons of the run. root: the project's folder, with metrics/results.csv and differences.csv.
    """
    tables = {path.name: (root / path).read_text() for path in (RESULTS_CSV, DIFFERENCES_CSV)}
    with replaced_folder(root / SITE) as folder:
        write_page(folder, "results", **site_parts(run, found, style, root))
        for name, table in tables.items():
            write_text(folder / name, table)


def write_page(folder: Path, template: str, **parts: Any) -> None:
    """`index.html` from a template, with what every page needs beside it."""
    script = f"{template}.js"
    page = _environment().get_template(f"{template}.html.j2").render(parts, script=script)
    write_text(folder / "index.html", page)
    for name in ("style.css", "shared.js", "filter.js", "table.js", "charts.js", script):
        write_text(folder / name, (PARTS / "static" / name).read_text())
    write_text(folder / VEGA, vega())


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, with their licence."""
    import vl_convert  # 30 MB that only this needs

    return (
        "/* Vega, Vega-Lite and Vega-Embed; BSD-3-Clause, University of Washington Interactive Data Lab */\n"
        + vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        + "\n"
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"json": as_json, "amount": amount}
    return environment


def as_json(value: Any) -> Markup:
    """JSON that may stand in a `<script>`."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


# --- the parts of the page -----------------------------------------------------------------------


def site_parts(run: Run, found: Sequence[Comparison], style: Visualization, root: Path) -> dict[str, Any]:
    """What `results.html.j2` shows."""
    chosen = chosen_styles(style)
    marks, known = charts.run_marks(run, chosen), read_ground_truth(root)
    tokens, saes = run.training.get("tokens"), charts.sae_rows(run)
    drawn = [key for key in run.plotted if any(key in row for row in saes)]
    pareto = [charts.against_l0(run, key, marks, saes) for key in drawn]
    return {
        "smoke_tokens": tokens if tokens and tokens < report.FIELD_TOKENS else None,
        "summary": _html(report.summary(run, found)),
        "setting": _html(report.what_ran(run)),
        "marks": marks,
        "cut": any(charts.BELOW in chart.notes for chart in pareto),
        "results": content.results_table(run),
        "elsewhere": any(row.hook_kind for row in run.rows),
        "crosscoders": _html(report.crosscoders(run)),
        "pareto": pareto,
        "not_drawn": [_why_not(run, key) for key in run.plotted if key not in drawn],
        "reading": content.reading(run),
        "equal_l0": _html(equal_l0(run)),
        "matrices": content.matrices(run, found),
        "differences": _html(_before_tables(differences(run, found))),
        "controls": _html(controls(run)),
        "seeds": _html(seeds(run)),
        "tasks": content.task_tables(run),
        "training": histories.training(run, chosen),
        "findings": _html(report.training(run)),
        "densities": histories.densities(run, marks),
        "truth_charts": truth.truth(known) if known else [],
        "truth": _html(ground_truth(root)),
        "transfer": _html(transfer(root)),
        "optional": [(text.title(part), _html(part)) for part in _sections(optional(run))],
        "latents": [(row, _dashboard(row.name, root)) for row in run.rows],
        "statuses": _html(report.statuses(run, root)),
        "definitions": _html(report.definitions(run)),
        "datasets": {"saes": saes, **_datasets(run, known)},
    }


def _datasets(run: Run, known: GroundTruthRun | None) -> Mapping[str, list[dict[str, Any]]]:
    """Rows that several charts share, by the name under which their specifications ask for them."""
    return {
        "curves": histories.curve_data(run),
        "densities": histories.density_data(run),
        "truth": truth.truth_data(known) if known else [],
    }


def _why_not(run: Run, key: str) -> str:
    """Why a metric has no chart, as its figure says it."""
    metric = headline(key)
    why = run.unavailable("core") or run.unavailable(metric.eval) or "was not measured"
    return f"{metric.label}: {why}"


PLACES = ("#which-differences-exceed-noise", "#ground-truth")


def _html(section: str) -> Markup:
    return text.html(section, PLACES)


def _before_tables(section: str) -> str:
    """The section's sentences: what its tables hold stands in the matrix."""
    return "\n\n".join(block for block in section.split("\n\n") if not block.lstrip().startswith("|"))


def _sections(markdown: str) -> list[str]:
    """Sections under headings of the second level."""
    parts = ("\n" + markdown).split("\n## ")[1:]
    return [f"## {part}" for part in parts]


def _dashboard(name: str, root: Path) -> str | None:
    """Where the latents of an SAE can be browsed, from the page; None where that was not built."""
    page = DASHBOARDS / name / "index.html"
    return f"../{page.as_posix()}" if (root / page).is_file() else None
