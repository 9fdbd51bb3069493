"""What `dvc plots` draws with: Vega-Lite templates in the figures' colours and markers, and a page that needs no network.

`python -m sae_research.cli.plots` writes them into `.dvc/plots/`; a test holds the files to this.
"""

from __future__ import annotations

import json
from typing import Any

from sae_research.reporting.site.charts import MARKER_AREA, Spec
from sae_research.reporting.site.marks import mark
from sae_research.reporting.style import KNOWN

OTHER = "other"
"""Every architecture without a marker of its own: a template knows no rows."""
_SPARE = {"path": "circle", "color": "#4B6FA5"}
_GROUP = f"datum.role === 'control' ? 'control' : indexof({json.dumps(list(KNOWN))}, datum.architecture) < 0 ? '{OTHER}' : "

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>Plots</title>
<!-- Vega lies in the results site: this page asks nothing of the network -->
<script src="../report/vega.js"></script>
<script>
window.vegaEmbed ??= place => {
  document.querySelector(place).textContent = "Not drawn: report/vega.js is not there. Run `dvc repro generate_report`; "
    + "a page that `dvc plots -o` puts elsewhere needs it in report/ beside its folder.";
};
</script>
<style>
body { font-family: system-ui, sans-serif; margin: 1rem; color: #16191d; background: #fff; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<p>With tables and tests of differences: <a href="../report/index.html">the results site</a>.</p>
{plot_divs}
</body>
</html>
"""


def templates() -> dict[str, str]:
    """Every file of `.dvc/plots/` as text."""
    made = {"sae_scatter": scatter(log=False), "sae_scatter_log": scatter(log=True), "sae_lines": lines()}
    return {f"{name}.json": json.dumps(spec, indent=2) + "\n" for name, spec in made.items()} | {"page.html": PAGE}


def _channel(what: str, **more: Any) -> Spec:
    known = {name: mark(style) for name, style in KNOWN.items()} | {OTHER: _SPARE}
    scale = {"domain": list(known), "range": [one[what] for one in known.values()]}
    return {"field": "group", "type": "nominal", "title": "architecture", "scale": scale, **more}


def _revision(legend: Spec | None) -> Spec:
    faded = {"range": [1.0, 0.45, 0.3, 0.2]}
    return {"field": "rev", "type": "nominal", "sort": None, "title": "revision", "scale": faded, "legend": legend}


def _shared() -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": "<DVC_METRIC_DATA>"},
        "title": {"text": "<DVC_METRIC_TITLE>", "anchor": "middle"},
        "width": "<DVC_METRIC_PLOT_WIDTH>",
        "height": "<DVC_METRIC_PLOT_HEIGHT>",
    }


def scatter(log: bool) -> Spec:
    """SAEs against L0: markers, 95 % intervals, names, the raw residual stream where there is one. log: of the y axis."""
    y_scale: Spec = {"type": "log"} if log else {"zero": False}
    x: Spec = {"field": "<DVC_METRIC_X>", "type": "quantitative", "title": "<DVC_METRIC_X_LABEL>"}
    y: Spec = {"field": "<DVC_METRIC_Y>", "type": "quantitative", "title": "<DVC_METRIC_Y_LABEL>"}
    color, shape = _channel("color"), _channel("path")
    rev = _revision({"symbolFillColor": "#444", "symbolStrokeColor": "#444"})
    point = {"type": "point", "size": MARKER_AREA, "tooltip": {"content": "data"}}
    dots = {"color": color, "shape": shape, "opacity": rev}
    low = "max(datum.low, datum['<DVC_METRIC_Y>'] / 3)" if log else "datum.low"
    layer: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.low)"}, {"calculate": low, "as": "low"}],
            "mark": {"type": "rule", "strokeWidth": 1.2},
            "encoding": {
                "y": {"field": "low", "type": "quantitative"},
                "y2": {"field": "high"},
                "color": color,
                "opacity": rev,
            },
        },
        {
            "transform": [{"filter": "datum.interpolating !== true"}],
            "mark": {**point, "filled": True},
            "encoding": dots,
            "params": ["<DVC_METRIC_ZOOM_AND_PAN>"],
        },
        {
            "transform": [{"filter": "datum.interpolating === true"}],
            "mark": {**point, "filled": False, "strokeWidth": 2},
            "encoding": dots,
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 8, "fontSize": 9, "color": "#555"},
            "encoding": {"text": {"field": "label", "type": "nominal"}, "opacity": _revision(None)},
        },
    ]
    if not log:
        layer.append(_residual_stream())
    return {
        **_shared(),
        "transform": [{"calculate": f"{_GROUP}datum.architecture", "as": "group"}],
        "encoding": {
            "x": {**x, "scale": {"type": "log", "nice": False, "padding": 24}},
            "y": {**y, "scale": {**y_scale, "nice": False, "padding": 18}},
        },
        "layer": layer,
    }


def _residual_stream() -> Spec:
    highest = [{"op": "max", "field": "residual_stream", "as": "residual_stream"}]
    return {
        "transform": [{"filter": "isValid(datum.residual_stream)"}, {"aggregate": highest, "groupby": ["rev"]}],
        "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#888", "tooltip": {"content": "data"}},
        "encoding": {"x": None, "y": {"field": "residual_stream", "type": "quantitative"}, "opacity": _revision(None)},
    }


def lines() -> Spec:
    """One column of the training curves against tokens, a line an SAE, in its architecture's colour."""
    x: Spec = {"field": "<DVC_METRIC_X>", "type": "quantitative", "title": "<DVC_METRIC_X_LABEL>", "axis": {"format": "~s"}}
    y: Spec = {"field": "<DVC_METRIC_Y>", "type": "quantitative", "title": "<DVC_METRIC_Y_LABEL>", "scale": {"zero": False}}
    return {
        **_shared(),
        "params": ["<DVC_METRIC_ZOOM_AND_PAN>"],
        "transform": [{"calculate": f"{_GROUP}datum.architecture", "as": "group"}],
        "mark": {"type": "line", "strokeWidth": 2, "tooltip": {"content": "data"}},
        "encoding": {
            "x": x,
            "y": y,
            "color": _channel("color"),
            "detail": {"field": "sae", "type": "nominal"},
            "strokeDash": {"field": "rev", "type": "nominal", "sort": None, "title": "revision"},
        },
    }
