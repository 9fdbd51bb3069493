"""The charts of the ground-truth evaluation as Vega-Lite specifications, in the figures' own markers and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_research.reporting.ground_truth import DICTIONARIES, LABELS, OWN, SCOPES, TRUTHS, GroundTruthRun, Line
from sae_research.reporting.site.charts import FIT, Chart, Spec, ticks
from sae_research.reporting.site.marks import path
from sae_research.reporting.style import COLORS, DICTIONARY_COLORS, ENCODER_MARKERS
from sae_research.runtime.formatting import with_interval

HEIGHT = 240
LEGEND = {"orient": "bottom", "columns": 2, "symbolLimit": 0, "symbolOpacity": 1, "labelLimit": 140}

_FOUND = ("variance_explained", "mcc", "latent_f1")
_PURSUED = ("variance_explained", "latent_f1", "top_1_probing")
_ZERO: Spec = {"x": {"datum": 0, "type": "quantitative"}, "y": None, "yOffset": None, "color": None}


def truth_data(found: GroundTruthRun) -> list[dict[str, Any]]:
    """The data set `truth`: means over seeds and their intervals, one row a method and sparsity."""
    rows = []
    for line in found.lines:
        values: dict[str, Any] = {
            "method": _words(line.method),
            "name": _words(line.name),
            "encoder": _words(line.encoder),
            "over": DICTIONARIES.get(line.dictionary, line.dictionary),
            "part": "recipes" if line.encoder == OWN else "pursuit",
        }
        for key in ("l0", *_FOUND, *_PURSUED):
            mean, bounds = line.mean(key), line.interval(key)
            if mean is not None:
                values |= {key: mean, f"{key}_text": with_interval(mean, bounds)}
                values |= {f"{key}_low": bounds[0], f"{key}_high": bounds[1]} if bounds else {}
        rows.append(values)
    return rows


def truth(found: GroundTruthRun) -> list[Chart]:
    """What was found of known features against L0, and which metric follows it."""
    trained = [line for line in found.lines if line.encoder == OWN]
    pursuit = [line for line in found.lines if " over " in line.method]
    methods = list(dict.fromkeys(_words(line.method) for line in trained))
    colors = _channel("method", dict(zip(methods, COLORS * len(methods), strict=False)))
    over = [name for name in DICTIONARIES if any(line.dictionary == name for line in pursuit)]
    encoders = list(dict.fromkeys(line.encoder for line in pursuit))
    pursued = {
        "color": _channel("over", {DICTIONARIES[name]: DICTIONARY_COLORS[name] for name in over}),
        "shape": _channel("encoder", {_words(name): path(ENCODER_MARKERS[name]) for name in encoders}),
    }
    charts = [_chart("recipes", key, trained, {"color": colors}, "Trained SAEs") for key in _FOUND if trained]
    charts += [_chart("pursuit", key, pursuit, pursued, "Pursuit") for key in _PURSUED if pursuit]
    return charts + [_follow(found, scope) for scope in SCOPES if found.follow(scope)["correlations"]]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _channel(field: str, values: Mapping[str, str]) -> Spec:
    scale = {"domain": list(values), "range": list(values.values())}
    return {"field": field, "type": "nominal", "title": None, "legend": LEGEND, "scale": scale}


def _chart(part: str, key: str, lines: Sequence[Line], channels: Mapping[str, Spec], title: str) -> Chart:
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": "L0 (log scale)",
        "scale": {"type": "log", "nice": False, "padding": 10},
        "axis": {"values": ticks([value for line in lines if (value := line.mean("l0"))]), "format": "~g"},
    }
    y: Spec = {"field": key, "type": "quantitative", "title": LABELS[key], "scale": {"zero": False}}
    tooltip = [
        {"field": "name", "title": "method"},
        {"field": "l0_text", "title": "L0"},
        {"field": f"{key}_text", "title": LABELS[key]},
    ]
    known = f"isValid(datum['{key}']) && datum.l0 > 0"
    layer: list[Spec] = [
        {"mark": {"type": "line", "strokeWidth": 1.2}, "encoding": {"y": y, "detail": {"field": "method"}}},
        {
            "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
            "encoding": {"y": y, "tooltip": tooltip, **({"shape": channels["shape"]} if "shape" in channels else {})},
        },
    ]
    if any(line.interval(key) for line in lines):
        bars = {
            "mark": {"type": "rule", "opacity": 0.6},
            "transform": [{"filter": f"isValid(datum['{key}_low'])"}],
            "encoding": {"y": {**y, "field": f"{key}_low"}, "y2": {"field": f"{key}_high"}},
        }
        layer.insert(0, bars)
    spec = {
        "data": {"name": "truth"},
        "transform": [{"filter": f"datum.part === '{part}' && {known}"}],
        "height": HEIGHT,
        "width": "container",
        "autosize": FIT,
        "encoding": {"x": x, "color": channels["color"]},
        "layer": layer,
    }
    says = f"{title}: {LABELS[key]} against L0, {len(lines)} points; the tables of ground truth hold the values."
    return Chart(f"truth_{part}_{key}", f"{title}: {LABELS[key]}", spec, says)


def _follow(found: GroundTruthRun, scope: str) -> Chart:
    """Rank correlation of every metric with the truth, with its interval."""
    correlations = found.follow(scope)["correlations"]
    rows = [
        {"metric": LABELS[metric], "truth": label, "rho": values["spearman"]}
        | dict(zip(("low", "high"), values.get("interval", ()), strict=False))
        | {"text": with_interval(values["spearman"], values.get("interval"))}
        for metric, truths in correlations.items()
        for key, label in TRUTHS.items()
        if "spearman" in (values := truths.get(key, {}))
    ]
    x: Spec = {"type": "quantitative", "title": "Spearman's rank correlation"}
    x |= {"scale": {"domain": [-1.03, 1.03], "nice": False}, "axis": {"values": [-1, -0.5, 0, 0.5, 1], "format": "~g"}}
    spec = {
        "data": {"values": rows},
        "height": 34 * len(correlations),
        "width": "container",
        "autosize": FIT,
        "encoding": {
            "y": {"field": "metric", "type": "nominal", "sort": None, "title": None},
            "yOffset": {"field": "truth", "type": "nominal"},
            "color": {
                "field": "truth",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(TRUTHS.values()), "range": list(COLORS[: len(TRUTHS)])},
                "legend": {"orient": "bottom", "symbolOpacity": 1},
            },
        },
        "layer": [
            {"data": {"values": [{}]}, "mark": {"type": "rule", "style": "reference"}, "encoding": _ZERO},
            {
                "mark": {"type": "rule", "strokeWidth": 1.6},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {
                    "x": {**x, "field": "rho"},
                    "tooltip": [
                        {"field": "metric", "title": "metric"},
                        {"field": "truth", "title": "with"},
                        {"field": "text", "title": "rank correlation"},
                    ],
                },
            },
        ],
    }
    title = f"Which metric follows the truth: {SCOPES[scope][0].lower()}{SCOPES[scope][1:]}"
    return Chart(f"truth_follow_{scope}", title, spec, f"{title}: rank correlations; the table below holds the values.")
