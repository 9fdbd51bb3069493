"""The charts as Vega-Lite specifications, in the figures' own markers and colours.

A specification names data sets that the page gives it (`saes`, `curves`, ...), so that no rows stand there twice, and
parameters that the page sets: `shown`, the architectures that are drawn; `read_at`, the L0 at which all are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sae_research.reporting.ground_truth import LABELS, OWN, SCOPES, TRUTHS, GroundTruthRun, Line
from sae_research.reporting.metrics import headline
from sae_research.reporting.results import Run
from sae_research.reporting.site.marks import mark
from sae_research.reporting.style import COLORS, DICTIONARY_COLORS, ENCODER_MARKERS, MarkerStyle, marker_styles, short_names
from sae_research.reporting.tables import curve_rows, points, residual_baseline
from sae_research.runtime.formatting import amount, number, percent, with_interval

Spec = dict[str, Any]
Marks = Mapping[str, Mapping[str, Any]]

MARKER_AREA = 90.0
"""Square pixels of a circle."""
HEIGHT = 300
FIT = {"type": "fit-x", "contains": "padding"}
L0_TITLE = "L0 (latents per token, log scale)"
DENSITIES = 40
"""Histograms in one chart."""


class Chart(NamedTuple):
    """A chart with what is said of it."""

    key: str
    title: str
    spec: Spec
    says: str
    """Read out in its place by screen readers."""
    wide: bool = False


# --- metrics against L0 --------------------------------------------------------------------------


def run_marks(run: Run, chosen: Mapping[str, MarkerStyle]) -> dict[str, dict[str, Any]]:
    """`marks.mark` of every group of the run that has a place in figures, in table order."""
    found = marker_styles(dict.fromkeys(row.group for row in run.rows), chosen)
    return {name: mark(style) for name, style in found.items()}


def sae_rows(run: Run) -> list[dict[str, Any]]:
    """The data set `saes`: for every metric its value, where it is drawn (`_y`: not below the metric's floor), the interval
    (`_low`, `_high`) and both as text (`_text`)."""
    labels = short_names(run.rows)
    rows = {
        row.name: {
            "sae": row.name,
            "label": labels[row.name],
            "group": row.group,
            "control": row.is_control,
            "hollow": row.interpolating,
            "family": f"{row.group} {row.cfg['base']}" if row.cfg.get("base") and not row.is_control else None,
            "l0": row.value("l0"),
            "l0_text": with_interval(row.value("l0"), row.interval("l0")),
        }
        for row in sorted(run.rows, key=lambda row: not row.is_control)  # controls lie below the others
    }
    for key in run.plotted:
        metric = headline(key)
        drawn = [point for point in points(run, key) if not metric.log or point.y > 0]
        floor = min((point.y for point in drawn), default=0.0) / 3 if metric.log else metric.floor
        for row, _, y in drawn:
            bounds = row.interval(key)
            known = {"": y, "_y": max(y, floor), "_text": with_interval(y, bounds)}
            if bounds is not None:
                known |= {"_low": max(bounds[0], floor), "_high": max(bounds[1], floor)}
            if y < floor:
                known["_cut"] = f"{number(y)} ↓"
            rows[row.name] |= {key + suffix: value for suffix, value in known.items()}
    return list(rows.values())


def against_l0(run: Run, key: str, marks: Marks) -> Chart:
    """One metric against L0: markers, 95 % intervals, families over one dictionary, and a line at the L0 that is read."""
    metric = headline(key)
    drawn = [point for point in points(run, key) if not metric.log or point.y > 0]
    unit = " (nats, log scale)" if metric.log else ""
    y_scale: Spec = {"type": "log" if metric.log else "linear", "nice": False, "padding": 10}
    y_axis: Spec = {"format": "~g"}
    if not metric.log:
        y_scale["zero"] = False
    else:
        y_axis["values"] = ticks([point.y for point in drawn])
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": L0_TITLE,
        "scale": {"type": "log", "nice": False, "padding": 14},
        "axis": {"values": ticks([point.x for point in drawn]), "format": "~g", "labelOverlap": True},
    }
    y: Spec = {
        "field": f"{key}_y",
        "type": "quantitative",
        "title": metric.label + unit + metric.arrow,
        "scale": y_scale,
        "axis": y_axis,
    }
    rows = [row for row in sae_rows(run) if key in row]
    layer = _layers(key, metric.label, x, y, marks, rows)
    baseline = residual_baseline(run, key)
    if baseline is not None:
        layer = [_baseline(baseline), *layer]
    return Chart(
        key,
        f"{metric.label} against L0",
        {
            "params": [{"name": "shown", "value": list(marks)}, {"name": "read_at", "value": 0}],
            "data": {"name": "saes"},
            "transform": [{"filter": f"isValid(datum['{key}_y']) && indexof(shown, datum.group) >= 0"}],
            "height": HEIGHT,
            "width": "container",
            "autosize": FIT,
            "layer": layer,
        },
        f"Scatter plot of {metric.label.lower()} against L0 of {len(drawn)} SAEs; the table of results holds every value.",
    )


def _layers(key: str, label: str, x: Spec, y: Spec, marks: Marks, rows: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """What lies on the axes, those alone that have something to draw among the rows."""
    color = _scale("color", marks)
    areas = ", ".join(f"{json.dumps(name)}: {MARKER_AREA * one['scale'] ** 2:.2f}" for name, one in marks.items())
    sized = {"calculate": f"({{{areas}}})[datum.group]", "as": "area"}
    dots = {
        "x": x,
        "y": y,
        "shape": _scale("path", marks),
        "size": {"field": "area", "type": "quantitative", "scale": None},
        "tooltip": [
            {"field": "sae", "title": "SAE"},
            {"field": "group", "title": "architecture"},
            {"field": "l0_text", "title": "L0"},
            {"field": f"{key}_text", "title": label},
        ],
    }
    reading = {
        "data": {"values": [{}]},
        "transform": [{"filter": "read_at > 0"}, {"calculate": "read_at", "as": "read"}],
        "mark": {"type": "rule", "strokeWidth": 1.5, "strokeDash": [6, 3], "style": "reading"},
        "encoding": {"x": {**x, "field": "read"}},
    }
    families = {
        "transform": [{"filter": "isString(datum.family)"}],
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.45},
        "encoding": {"x": x, "y": y, "color": color, "detail": {"field": "family"}},
    }
    intervals = {
        "transform": [{"filter": f"isValid(datum['{key}_low'])"}],
        "mark": {"type": "rule", "strokeWidth": 1.3, "opacity": 0.55},
        "encoding": {"x": x, "y": {**y, "field": f"{key}_low"}, "y2": {"field": f"{key}_high"}, "color": color},
    }
    filled = {
        "transform": [{"filter": "!datum.hollow"}, sized],
        "mark": {"type": "point", "filled": True, "opacity": 1, "stroke": {"expr": "ground"}, "strokeWidth": 0.7},
        "encoding": {**dots, "fill": color},
    }
    hollow = {
        "transform": [{"filter": "datum.hollow"}, sized],
        "mark": {"type": "point", "filled": False, "fill": {"expr": "ground"}, "opacity": 1, "strokeWidth": 1.6},
        "encoding": {**dots, "stroke": color},
    }
    cut = {
        "transform": [{"filter": f"isValid(datum['{key}_cut'])"}],
        "mark": {"type": "text", "dy": -11, "fontSize": 10},
        "encoding": {"x": x, "y": y, "text": {"field": f"{key}_cut"}},
    }
    layers = [
        (reading, True),
        (families, any(row["family"] for row in rows)),
        (intervals, any(f"{key}_low" in row for row in rows)),
        (filled, any(not row["hollow"] for row in rows)),
        (hollow, any(row["hollow"] for row in rows)),
        (cut, any(f"{key}_cut" in row for row in rows)),
    ]
    return [layer for layer, drawn in layers if drawn]


def _scale(what: str, marks: Marks) -> Spec:
    return {
        "field": "group",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": list(marks), "range": [one[what] for one in marks.values()]},
    }


def _baseline(value: float) -> Spec:
    """The raw residual stream as a dashed line with its name."""
    shared = {"data": {"values": [{"value": value, "text": f"raw residual stream {number(value)}"}]}}
    y = {"field": "value", "type": "quantitative"}
    return {
        **shared,
        "encoding": {"y": y},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [5, 4], "style": "reference"}},
            {
                "mark": {"type": "text", "align": "right", "baseline": "bottom", "dy": -3, "style": "reference-name"},
                "encoding": {"text": {"field": "text"}, "x": {"value": "width"}},
            },
        ],
    }


def ticks(values: Iterable[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the least value to above the largest; only the powers over three decades.

    >>> ticks([9.2, 60])
    [5, 10, 20, 50, 100]
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    steps = (1,) if high / low > 2000 else (1, 2, 5)
    every = [float(f"{step}e{power}") for power in range(-12, 13) for step in steps]
    inside = [tick for tick in every if low / 2.5 <= tick <= high * 2.5]
    return [int(tick) if tick >= 1 else tick for tick in inside]


# --- training and densities ----------------------------------------------------------------------

CURVES = {"loss": "Training loss", "l0": "L0", "variance_explained": "Variance explained"}


def curve_data(run: Run) -> list[dict[str, Any]]:
    """The data set `curves`: the rows of `metrics/plots/training_curves.json`."""
    return [{**row, "at": amount(row["tokens"])} for curve in run.curves for row in curve_rows(curve) if "tokens" in row]


def curve_colors(run: Run, chosen: Mapping[str, MarkerStyle]) -> dict[str, str]:
    """Of every trained SAE: its architecture's, or a spare one where no result names it."""
    groups = {row.name: row.group for row in run.rows}
    known = marker_styles((row.group for row in run.rows), chosen)
    spare = marker_styles((curve.name for curve in run.curves if curve.name not in groups), known)
    styles = {curve.name: known[groups[curve.name]] if curve.name in groups else spare[curve.name] for curve in run.curves}
    return {name: mark(style)["color"] for name, style in styles.items()}


def training(run: Run, chosen: Mapping[str, MarkerStyle]) -> list[Chart]:
    """Loss, L0 and variance explained against training tokens; none where nothing was trained."""
    colors = curve_colors(run, chosen)
    shown = [column for column in CURVES if any(column in curve.columns for curve in run.curves)]
    color = {
        "field": "sae",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(colors), "range": list(colors.values())},
        "legend": {"orient": "bottom", "columns": 3, "symbolType": "stroke", "symbolStrokeWidth": 3},
    }
    return [
        Chart(
            f"training_{column}",
            CURVES[column],
            {
                "data": {"name": "curves"},
                "transform": [{"filter": f"isValid(datum['{column}'])"}],
                "height": HEIGHT - 60,
                "width": "container",
                "autosize": FIT,
                "mark": {"type": "line", "strokeWidth": 1.8, "point": {"size": 60, "opacity": 0}},
                "encoding": {
                    "x": {"field": "tokens", "type": "quantitative", "title": "Training tokens", "axis": {"format": "~s"}},
                    "y": {
                        "field": column,
                        "type": "quantitative",
                        "title": CURVES[column] + (" (log scale)" if _spans(run, column) else ""),
                        "scale": {"type": "log"} if _spans(run, column) else {"zero": False},
                        "axis": {"format": "~g"},
                    },
                    "color": color,
                    "tooltip": [
                        {"field": "sae", "title": "SAE"},
                        {"field": "at", "title": "tokens"},
                        {"field": column, "title": CURVES[column], "format": ".4~g"},
                    ],
                },
            },
            f"{CURVES[column]} of {len(run.curves)} SAEs while they were trained.",
        )
        for column in shown
    ]


def _spans(run: Run, column: str) -> bool:
    """Whether a logarithmic axis shows more, as in the figure."""
    if column == "variance_explained":
        return False
    values = [value for curve in run.curves for value in curve.columns.get(column, []) if value == value]
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def density_data(run: Run) -> list[dict[str, Any]]:
    """The data set `densities`: one row a bar of every SAE's histogram."""
    rows = []
    for row in run.rows:
        histogram = row.evals.get("core", {}).get("density_histogram")
        if histogram:
            edges, counts = histogram["log10_edges"], histogram["counts"]
            tallest, total = max(counts, default=0) or 1, sum(counts) + histogram["dead"]
            share = {"sae": row.name, "group": row.group, "dead": percent(histogram["dead"] / total) if total else "–"}
            rows += [
                {**share, "from": low, "to": high, "latents": count, "height": round(count / tallest, 4)}
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
                if count
            ]
    return rows


def densities(run: Run, marks: Marks) -> list[Chart]:
    """How often latents fire: a histogram for each SAE, `DENSITIES` of them in a chart."""
    names = list(dict.fromkeys(row["sae"] for row in density_data(run)))
    edges = [edge for row in density_data(run) for edge in (row["from"], row["to"])]
    charts = []
    for start in range(0, len(names), DENSITIES):
        part = names[start : start + DENSITIES]
        which = "" if len(names) <= DENSITIES else f", {part[0]} to {part[-1]}"
        says = f"Histograms of how often latents fire, of {len(part)} SAEs{which}; fraction alive stands in the table of results."
        charts.append(
            Chart(f"density_{start}", f"Density of latents{which}", _density(part, edges, marks), says, wide=True)
        )
    return charts


def _density(names: Sequence[str], edges: Sequence[float], marks: Marks) -> Spec:
    """One histogram above the other on one axis, as in the figure."""
    above = len(names) - 1
    y: Spec = {
        "field": "foot",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [-0.1, len(names)], "nice": False},
        "axis": {
            "values": list(range(len(names))),
            "labelExpr": f"{json.dumps(list(names))}[{above} - datum.value]",
            "labelLimit": 150,
            "labelOverlap": False,
            "labelBaseline": "bottom",
            "grid": True,
            "ticks": False,
            "domain": False,
        },
    }
    x: Spec = {
        "field": "from",
        "type": "quantitative",
        "title": "log10 of the fraction of tokens",
        "scale": {"domain": [min(edges), max(edges)], "nice": False},
        "axis": {"grid": False},
    }
    return {
        "data": {"name": "densities"},
        "transform": [
            {"filter": {"field": "sae", "oneOf": list(names)}},
            {"calculate": f"{above} - indexof({json.dumps(list(names))}, datum.sae)", "as": "foot"},
            {"calculate": "datum.foot + 0.9 * datum.height", "as": "top"},
        ],
        "height": 28 * len(names),
        "width": "container",
        "autosize": FIT,
        "mark": {"type": "rect", "opacity": 0.75},
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": y,
            "y2": {"field": "top"},
            "color": _scale("color", marks),
            "tooltip": [
                {"field": "sae", "title": "SAE"},
                {"field": "latents", "title": "latents"},
                {"field": "from", "title": "log10 density from"},
                {"field": "to", "title": "to"},
                {"field": "dead", "title": "dead latents of this SAE"},
            ],
        },
    }


# --- ground truth --------------------------------------------------------------------------------

_FOUND = ("variance_explained", "mcc", "latent_f1")
_PURSUED = ("variance_explained", "latent_f1", "top_1_probing")
_ZERO: Spec = {"x": {"datum": 0, "type": "quantitative"}, "y": None, "yOffset": None, "color": None}


def truth_data(found: GroundTruthRun) -> list[dict[str, Any]]:
    """The data set `truth`: means over seeds and their intervals, one row a method and sparsity."""
    rows = []
    for line in found.lines:
        values: dict[str, Any] = {"method": line.method.replace("_", " "), "name": line.name.replace("_", " ")}
        values["own"] = line.encoder == OWN
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
    methods = dict.fromkeys(line.method.replace("_", " ") for line in trained)
    styles = {
        name: mark(MarkerStyle("o", color)) for name, color in zip(methods, COLORS * len(methods), strict=False)
    }
    over = {
        line.method.replace("_", " "): mark(
            MarkerStyle(ENCODER_MARKERS[line.encoder], DICTIONARY_COLORS[line.dictionary])
        )
        for line in pursuit
    }
    charts = [_truth_chart("recipes", key, trained, styles, "Trained SAEs") for key in _FOUND if trained]
    charts += [_truth_chart("pursuit", key, pursuit, over, "Pursuit") for key in _PURSUED if pursuit]
    return charts + [_follow(found, scope) for scope in SCOPES if found.follow(scope)["correlations"]]


def _truth_chart(part: str, key: str, lines: Sequence[Line], marks: Marks, title: str) -> Chart:
    legend = {"orient": "bottom", "columns": 2, "symbolLimit": 0, "labelLimit": 220}
    color = {**_scale("color", marks), "field": "method", "legend": legend, "title": None}
    shape = {**_scale("path", marks), "field": "method", "legend": legend, "title": None}
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": "L0 (log scale)",
        "scale": {"type": "log", "nice": False, "padding": 10},
        "axis": {"values": ticks([value for line in lines if (value := line.mean("l0"))]), "format": "~g"},
    }
    y: Spec = {"field": key, "type": "quantitative", "title": LABELS[key], "scale": {"zero": False}}
    spec = {
        "data": {"name": "truth"},
        "transform": [{"filter": f"{'' if part == 'recipes' else '!'}datum.own && isValid(datum['{key}']) && datum.l0 > 0"}],
        "height": HEIGHT - 60,
        "width": "container",
        "autosize": FIT,
        "encoding": {"x": x, "color": color},
        "layer": [
            {
                "mark": {"type": "rule", "opacity": 0.6},
                "transform": [{"filter": f"isValid(datum['{key}_low'])"}],
                "encoding": {"y": {**y, "field": f"{key}_low"}, "y2": {"field": f"{key}_high"}},
            },
            {"mark": {"type": "line", "strokeWidth": 1.2}, "encoding": {"y": y}},
            {
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                "encoding": {
                    "y": y,
                    "shape": shape,
                    "tooltip": [
                        {"field": "name", "title": "method"},
                        {"field": "l0_text", "title": "L0"},
                        {"field": f"{key}_text", "title": LABELS[key]},
                    ],
                },
            },
        ],
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
    x: Spec = {"type": "quantitative", "title": "Spearman's rank correlation", "scale": {"domain": [-1, 1]}}
    spec = {
        "data": {"values": rows},
        "height": {"step": 16},
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
                "legend": {"orient": "bottom"},
            },
        },
        "layer": [
            {"data": {"values": [{}]}, "mark": {"type": "rule", "style": "reference"}, "encoding": _ZERO},
            {"mark": {"type": "rule", "strokeWidth": 1.6}, "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}}},
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
