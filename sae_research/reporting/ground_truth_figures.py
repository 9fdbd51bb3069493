"""Draw `images/ground_truth/*.png`: what was found of known features against L0, and which metric follows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_research.config.reporting import Visualization
from sae_research.plotting.axes import (
    INK,
    MUTED,
    SMALL,
    TEXT,
    legend_below,
    log_axis,
    panel,
    panels,
    say,
    span,
    write_images,
)
from sae_research.reporting.ground_truth import LABELS, OWN, SCOPES, TRUTHS, GroundTruthRun, Line, read_ground_truth
from sae_research.reporting.style import COLORS, DICTIONARY_COLORS, ENCODER_MARKERS

IMAGES = Path("images/ground_truth")


def draw_ground_truth(style: Visualization, root: Path = Path(".")) -> list[Path]:
    """Write every figure of a finished run and delete those of an earlier one. Returns what was written."""
    run = read_ground_truth(root)
    draw = {} if run is None else {name: partial(drawn, run, style) for name, drawn in FIGURES.items()}
    return write_images(root / IMAGES, draw)


def recipes(run: GroundTruthRun, style: Visualization) -> Figure:
    """Trained SAEs: variance explained, MCC and F1 against L0, means and intervals over seeds."""
    found = [line for line in run.lines if line.encoder == OWN]
    figure, grid = panels(style, 3, legend=0.4)
    for axes, key in zip(grid, ("variance_explained", "mcc", "latent_f1"), strict=True):
        panel(axes, LABELS[key], "L0 (log scale)", LABELS[key])
        for name, color in zip(dict.fromkeys(line.method for line in found), COLORS * len(found), strict=False):
            _curve(axes, [line for line in found if line.method == name], key, name, color, "o")
        _log_l0(axes, found)
    legend_below(figure, grid[0], 4)
    return figure


def pursuit(run: GroundTruthRun, style: Visualization) -> Figure:
    """Pursuit encoders over known dictionaries: variance explained, F1 and top-1 probing against L0."""
    found = [line for line in run.lines if " over " in line.method]
    figure, grid = panels(style, 3, legend=1.2)
    if not found:
        say(grid[1], "no pursuit encoder was asked for (ground_truth.pursuit)")
        return figure
    for axes, key in zip(grid, ("variance_explained", "latent_f1", "top_1_probing"), strict=True):
        panel(axes, LABELS[key], "L0 (log scale)", LABELS[key])
        for name in dict.fromkeys(line.method for line in found):
            same = [line for line in found if line.method == name]
            encoder, dictionary = same[0].encoder, same[0].dictionary
            _curve(axes, same, key, name.replace("_", " "), DICTIONARY_COLORS[dictionary], ENCODER_MARKERS[encoder])
        _log_l0(axes, found)
    legend_below(figure, grid[0], 4)
    return figure


def _curve(axes: Axes, found: list[Line], key: str, label: str, color: str, marker: str) -> None:
    points = [(line.mean("l0"), line.mean(key), line.interval(key)) for line in found]
    known = sorted((x, y, bounds) for x, y, bounds in points if x is not None and y is not None)
    bars = [(x, y, y - bounds[0], bounds[1] - y) for x, y, bounds in known if bounds]
    if bars:
        x, y, below, above = zip(*bars, strict=True)
        axes.errorbar(x, y, [below, above], color=color, fmt="none", elinewidth=0.8, alpha=0.6, capsize=2)
    x, y = [point[0] for point in known], [point[1] for point in known]
    axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.0, label=label)


def _log_l0(axes: Axes, found: list[Line]) -> None:
    l0 = [value for line in found if (value := line.mean("l0"))]
    if l0:
        log_axis(axes.xaxis, *span(l0, log=True))


def follow(run: GroundTruthRun, style: Visualization) -> Figure:
    """Rank correlation of every metric with the truth, and its interval, for each set of methods."""
    scopes = [scope for scope in SCOPES if run.follow(scope)["correlations"]]
    figure, grid = panels(style, max(1, len(scopes)), legend=0.3)
    if not scopes:
        say(grid[0], run.follow("all")["note"])
        return figure
    for axes, scope in zip(grid, scopes, strict=True):
        found = run.follow(scope)["correlations"]
        panel(
            axes,
            f"{scope.replace('_', ' ')}, {len(run.follow(scope)['methods'])} methods at one L0",
            "Spearman's rank correlation",
            "",
        )
        for place, (truth, label) in enumerate(TRUTHS.items()):
            for row, metric in enumerate(found):
                _whisker(axes, found[metric].get(truth, {}), -row - 0.2 * place, COLORS[place], label if row == 0 else None)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(-1.05, 1.05)
        axes.set_yticks(
            [-row - 0.1 for row in range(len(found))], [LABELS[metric] for metric in found], fontsize=SMALL, color=INK
        )
    legend_below(figure, grid[0], 2)
    return figure


def _whisker(axes: Axes, values: dict[str, Any], height: float, color: str, label: str | None) -> None:
    if "spearman" not in values:
        axes.plot([], [], color=color, marker="o", linestyle="none", label=label)
        axes.text(0.03, height, "constant", fontsize=SMALL, color=MUTED, va="center")
        return
    axes.plot([values["spearman"]], [height], color=color, marker="o", markersize=TEXT / 2, linestyle="none", label=label)
    if "interval" in values:
        axes.plot(values["interval"], [height, height], color=color, linewidth=1.4)


FIGURES: dict[str, Callable[[GroundTruthRun, Visualization], Figure]] = {
    "recipes": recipes,
    "pursuit": pursuit,
    "follow": follow,
}
