"""The pictures and tables of docs/pursuit.md, from the study's and the benchmark's figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pages import write_between
from sae_research.plotting.axes import INK, SMALL, TEXT, log_axis, plain, save
from sae_research.runtime.files import read_json

DPI = 110
ENCODERS = {
    "ihtp": ("IHTP", "k"),
    "topk_refit": ("top-k refit", "k"),
    "mpsae": ("MPSAE", "s"),
    "omp": ("OMP", "s"),
    "nn_mpsae": ("non-negative MPSAE", "s"),
    "nn_omp": ("non-negative OMP", "s"),
}
COLORS = {
    "ihtp": "#009E73",
    "topk_refit": "#E69F00",
    "mpsae": "#CC79A7",
    "omp": "#7A5195",
    "nn_mpsae": "#56B4E9",
    "nn_omp": "#2F4F4F",
}
DICTIONARIES = {
    "trained": ("trained", "-", "o", "#0072B2"),
    "data_rows": ("data rows", "--", "s", "#D55E00"),
    "random": ("random", ":", "D", "#8C8C8C"),
}
METRICS = {"l0": "L0", "variance_explained": "Variance explained", "loss_recovered": "Loss recovered"}
SHOWN_FLOOR = -0.2
"""Lowest variance explained or loss recovered that is drawn; what lies below stands at the edge."""
TABLE_SIZES = {
    "ihtp": (1, 5, 10),
    "topk_refit": (10, 50),
    "mpsae": (10, 50, 100),
    "omp": (10, 50),
    "nn_mpsae": (10, 50, 100),
    "nn_omp": (10, 50),
}

Row = dict[str, Any]


def draw(folder: Path) -> list[Path]:
    """Draw `study.json` of a folder into PNG files beside it; returns their paths."""
    rows: list[Row] = read_json(folder / "study.json")["rows"]
    written = []
    for metric in METRICS:
        written.append(folder / f"{metric}.png")
        save(_by_size(rows, metric), written[-1])
    written.append(folder / "at_equal_l0.png")
    save(_by_l0(rows), written[-1])
    return written


def _figure(height_inches: float) -> Figure:
    return Figure(figsize=(10.5, height_inches), dpi=DPI, layout="constrained")


# --- against k and s -------------------------------------------------------------------------


def _by_size(rows: list[Row], metric: str) -> Figure:
    """Six panels, one per encoder; three lines in each, one per dictionary. Interpolating points are hollow."""
    figure = _figure(6.0)
    panels = figure.subplots(2, 3, sharey=True)
    for number, (axes, (encoder, (title, letter))) in enumerate(zip(panels.flat, ENCODERS.items(), strict=True)):
        mine = [row for row in rows if row["encoder"] == encoder and row["dictionary"]]
        plain(axes, f"{letter} (log scale)", "" if number % 3 else METRICS[metric])
        axes.yaxis.set_label_coords(-0.16, 0.5)
        axes.set_title(title, fontsize=TEXT + 1, color=INK)
        log_axis(axes.xaxis, 0.85, 120)
        for key, (label, line, marker, color) in DICTIONARIES.items():
            points = sorted((row for row in mine if row["dictionary"] == key), key=lambda row: row["size"])
            _line(axes, [row["size"] for row in points], points, metric, label, line, marker, color)
    _limits(panels.flat[0], [row for row in rows if row["dictionary"]], metric)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=TEXT,
        frameon=False,
        title="dictionary (hollow: the support interpolates)",
        title_fontsize=SMALL + 1,
    )
    return figure


def _line(
    axes: Axes, x: Sequence[float], points: list[Row], metric: str, label: str, line: str, marker: str, color: str
) -> None:
    y = [_shown(row[metric], metric) for row in points]
    axes.plot(x, y, line, color=color, linewidth=1.4, zorder=2)
    axes.plot([], [], line, marker=marker, color=color, label=label, markersize=5)
    for at, value, row in zip(x, y, points, strict=True):
        hollow = row["interpolating_fraction"] >= 0.5
        axes.plot([at], [value], marker, color=color, markersize=5, zorder=3, markerfacecolor="white" if hollow else color)


def _shown(value: float, metric: str) -> float:
    return value if metric == "l0" else max(value, SHOWN_FLOOR)


def _limits(axes: Axes, rows: Iterable[Row], metric: str) -> None:
    values = [_shown(row[metric], metric) for row in rows]
    if metric == "l0":
        log_axis(axes.yaxis, min(values) * 0.8, max(values) * 1.25)
    else:
        axes.set_ylim(min(0.0, *values) - 0.03, 1.03)


# --- at equal L0 -----------------------------------------------------------------------------


def _by_l0(rows: list[Row]) -> Figure:
    """Variance explained and loss recovered against L0: all encoders over the trained dictionary, matching pursuit over
    the untrained ones, and the trained SAEs with their own encoders."""
    figure = _figure(5.0)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("variance_explained", "loss_recovered"), strict=True):
        plain(axes, "L0 (log scale)", METRICS[metric])
        for encoder, (title, _) in ENCODERS.items():
            points = _ordered(rows, "trained", encoder)
            _line(axes, [row["l0"] for row in points], points, metric, title, "-", "o", COLORS[encoder])
        for key, marker in (("data_rows", "s"), ("random", "D")):
            points = _ordered(rows, key, "mpsae")
            label = f"MPSAE over {DICTIONARIES[key][0]}"
            _line(axes, [row["l0"] for row in points], points, metric, label, "--", marker, "#8C8C8C")
        for number, row in enumerate(row for row in rows if not row["dictionary"]):
            at = row["l0"], _shown(row[metric], metric)
            axes.plot(*at, "*", color=INK, markersize=11, zorder=4)
            axes.annotate(
                row["encoder"],
                at,
                xytext=(-66, -58 - 16 * number),
                textcoords="offset points",
                fontsize=SMALL,
                color=INK,
                arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkB": 4},
            )
        drawn = [row for row in rows if row["dictionary"] in ("", "trained") or row["encoder"] == "mpsae"]
        log_axis(axes.xaxis, 0.85, max(row["l0"] for row in drawn) * 1.25)
        _limits(axes, drawn, metric)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=4,
        fontsize=SMALL + 0.5,
        frameon=False,
        title="over the trained dictionary unless said otherwise; stars: trained SAEs with their own encoders; "
        "hollow: the support interpolates",
        title_fontsize=SMALL,
    )
    return figure


def _ordered(rows: list[Row], dictionary: str, encoder: str) -> list[Row]:
    return sorted(
        (row for row in rows if (row["dictionary"], row["encoder"]) == (dictionary, encoder)), key=lambda row: row["l0"]
    )


# --- tables ----------------------------------------------------------------------------------


def write_tables(page: Path, folder: Path) -> None:
    """Put the tables into the page, each between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    `speed.json`, which the benchmark writes, may be missing: its table then stays as it is. Raises `UserError` where
    the page lacks a marker.
    """
    study = read_json(folder / "study.json")
    tables = {"study": _study_table(study), "basis": _basis(study)}
    if (folder / "speed.json").is_file():
        tables["speed"] = _speed_tables(read_json(folder / "speed.json"))
    for name, table in tables.items():
        write_between(page, f"<!-- begin {name} -->", f"<!-- end {name} -->", table)


def _basis(study: dict[str, Any]) -> str:
    return (
        f"Model {study['model']}, {study['hook']}; d_in {study['d_in']:,}, d_sae {study['d_sae']:,}; contexts of "
        f"{study['context_size']} tokens, {study['contexts']} for L0 and variance, {study['loss_contexts']} for loss "
        "recovered: a small sample, good for shapes of curves and not for small differences."
    )


def _study_table(study: dict[str, Any]) -> str:
    lines = [
        "| encoder | size | L0 | variance explained: trained | data rows | random "
        "| loss recovered: trained | data rows | random |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    found = {(row["dictionary"], row["encoder"], row["size"]): row for row in study["rows"]}
    for encoder, sizes in TABLE_SIZES.items():
        title, letter = ENCODERS[encoder]
        for size in sizes:
            cells = [found[dictionary, encoder, size] for dictionary in DICTIONARIES]
            figures = [_cell(row, metric) for metric in ("variance_explained", "loss_recovered") for row in cells]
            lines.append(f"| {title} | {letter} = {size} | {cells[0]['l0']:.3g} | {' | '.join(figures)} |")
    for row in study["rows"]:
        if not row["dictionary"]:
            lines.append(
                f"| {row['encoder']} (its own encoder) | | {row['l0']:.3g} | {_cell(row, 'variance_explained')} "
                f"| | | {_cell(row, 'loss_recovered')} | | |"
            )
    return "\n".join(lines)


def _cell(row: Row, metric: str) -> str:
    return f"{row[metric]:.2f}" + ("\\*" if row["interpolating_fraction"] >= 0.5 else "")


def _speed_tables(runs: list[dict[str, Any]]) -> str:
    parts = []
    for run in runs:
        shape = f"{run['d_in']:,} × {run['d_sae']:,} on {run['device']}"
        if run["device"] == "cpu":
            shape += f", {run['threads']} threads"
        against = "\n".join(
            f"| {name} | {row['ours_seconds']:.3g} s | {row['loop_seconds']:.3g} s | {row['ratio']:.3g}× |"
            for name, row in run["against"].items()
        )
        memory = "\n".join(
            f"| {name} | {value:,.3g} |" if value < 1e4 else f"| {name} | {value:,.0f} |"
            for name, value in run["memory"].items()
        )
        speed = "\n".join(f"| {name} | {value:,.0f} |" for name, value in run["tokens_per_second"].items())
        parts.append(
            f"d_in × d_sae: {shape}.\n\n| | ours | plain loop | ratio |\n|---|--:|--:|--:|\n{against}\n\n"
            f"| matching pursuit, s = 100, steps alone | |\n|---|--:|\n{memory}\n\n"
            f"| encoder | tokens/s |\n|---|--:|\n{speed}"
        )
    return "\n\n".join(parts)
