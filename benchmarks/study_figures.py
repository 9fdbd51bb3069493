"""The pictures of docs/study, drawn from its record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, log_axis, plain, span
from sae_research.reporting.style import KNOWN, marker_size

DPI = 110
TRAINED_RECIPES = {
    "standard": "standard",
    "gated": "gated_rajamanoharan",
    "jumprelu": "jump_relu",
    "topk": "top_k",
    "batchtopk": "batch_top_k",
    "matryoshka_batchtopk": "matryoshka_batch_top_k",
}
"""Architectures of the study in the order of its figures, and their recipes."""
SHORT = {"gated_rajamanoharan": "gated", "matryoshka_batch_top_k": "matryoshka"}
UNTRAINED = "control_data_rows"
PURSUIT = ("mpsae", "omp", "ihtp")

CAPTIONS = {
    "reconstruction": "Reconstruction of held-out text against L0: means over training seeds, 95 % intervals over text. "
    "Dotted: where recipes are compared.",
    "probing": "Probing by the best one or five latents against L0, likewise.",
    "differences": "Differences between recipes at one L0, row less column; framed where they exceed noise.",
    "pursuit": "Pursuit encoders over two trained dictionaries and over untrained rows, beside the dictionaries' own.",
    "truth": "Recipes on text against recipes on synthetic activations whose features are known; bars across are standard "
    "deviations over seeds, bars upwards standard errors.",
    "rates": "Variance explained and L0 by learning rate, one SAE a point.",
}
"""What each picture shows, by its name."""

Record = dict[str, Any]


def short(recipe: str) -> str:
    """A recipe's name as figures write it."""
    return SHORT.get(recipe, recipe)


def drawings(record: Record) -> dict[str, Callable[[], Figure]]:
    """Every picture by its name."""
    found: dict[str, Callable[[], Figure]] = {
        "reconstruction": lambda: against_l0(record, ("variance_explained", "loss_recovered", "kl")),
        "probing": lambda: against_l0(record, ("sae_top_1_accuracy", "sae_top_5_accuracy", "sae_probes_top_1_accuracy")),
        "differences": lambda: matrices(record, ("variance_explained", "sae_top_1_accuracy")),
        "pursuit": lambda: pursuit(record),
        "truth": lambda: truth(record),
    }
    if "rates" in record:
        found["rates"] = lambda: rates(record)
    return found


def _figure(columns: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * columns, height), dpi=DPI, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL + 0.5, frameon=False, labelcolor=INK
    )


def mean_points(rows: Sequence[Record], metric: str) -> list[tuple[float, ...]]:
    """(L0, value, low, high), ascending in L0, of those that have them; of several seeds the means."""
    recipes: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if row["l0"] and row[metric][0] is not None:
            value, *bounds = row[metric]
            low, high = (value, value) if None in bounds else bounds
            recipes.setdefault(row["recipe_id"] or row["name"], []).append((row["l0"], value, low, high))
    return sorted(tuple(map(statistics.fmean, zip(*found, strict=True))) for found in recipes.values())


def _mark(
    axes: Axes, kind: str, points: Sequence[tuple[float, ...]], label: str, line: str = "-", hollow: bool = False
) -> None:
    """Points with their intervals and a line through them."""
    style = KNOWN["control" if kind.startswith("control") else kind]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    axes.plot(
        xs,
        ys,
        linestyle=line,
        linewidth=1.1,
        color=style.color,
        marker=style.marker,
        markersize=marker_size(style, 5.5),
        markerfacecolor="white" if hollow else style.color,
        markeredgecolor=style.color if hollow else "white",
        markeredgewidth=1.0 if hollow else 0.5,
        label=label,
        zorder=3,
    )
    for x, _, low, high in points:
        axes.plot([x, x], [low, high], color=style.color, linewidth=0.9, alpha=0.6, zorder=2.5)


def _scale(axes: Axes, record: Record, metric: str, xs: Sequence[float]) -> None:
    label, better = record["labels"][metric]
    plain(axes, "L0 (log scale)", f"{label} {'↑' if better == 'higher' else '↓'}")
    axes.yaxis.set_label_coords(-0.17, 0.5)
    log_axis(axes.xaxis, *span(list(xs), log=True))
    if metric == "kl":
        values = [row["kl"][0] for row in record["rows"] if row["kl"][0] and row["kind"] in (*TRAINED_RECIPES, UNTRAINED)]
        log_axis(axes.yaxis, *span(values, log=True))


def against_l0(record: Record, metrics: Sequence[str]) -> Figure:
    """One panel for each metric: six recipes, means over seeds, and untrained rows under matching pursuit."""
    metrics = [metric for metric in metrics if metric in record["labels"]]
    figure, panels = _figure(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        mine = {kind: [row for row in record["rows"] if row["kind"] == kind] for kind in (*TRAINED_RECIPES, UNTRAINED)}
        points = {kind: mean_points(rows, metric) for kind, rows in mine.items()}
        _scale(axes, record, metric, [point[0] for found in points.values() for point in found])
        for kind, found in points.items():
            label = "untrained rows, matching pursuit" if kind == UNTRAINED else short(TRAINED_RECIPES[kind])
            _mark(axes, kind, found, label, "--" if kind == UNTRAINED else "-")
        axes.axvline(record["read_at"], color=MUTED, linewidth=0.8, linestyle=":")
    _legend(figure, panels[0], 7)
    return figure


def matrices(record: Record, metrics: Sequence[str]) -> Figure:
    """Row less column at one L0; a frame where the difference exceeds noise after Holm's correction."""
    figure, panels = _figure(len(metrics), 3.9)
    for axes, metric in zip(panels, metrics, strict=True):
        kinds = [kind for kind in TRAINED_RECIPES if any(one["kind"] == kind for one in record["readings"][metric])]
        found = {(one["one"], one["other"]): one for one in record["differences"] if one["metric"] == metric}
        values = [[_signed(found, row, column) for column in kinds] for row in kinds]
        reach = max((abs(one["value"]) for line in values for one in line if one), default=1.0)
        for y, line in enumerate(values):
            for x, one in enumerate(line):
                if one is not None:
                    _cell(axes, x, y, one, reach)
        names = [short(TRAINED_RECIPES[kind]) for kind in kinds]
        axes.set_xticks(range(len(kinds)), names, rotation=35, ha="right", fontsize=SMALL + 0.5)
        axes.set_yticks(range(len(kinds)), names, fontsize=SMALL + 0.5)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.tick_params(length=0, colors=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(f"{record['labels'][metric][0]} at L0 {record['read_at']:g}: row − column", fontsize=TEXT, color=INK)
    return figure


def _signed(found: dict[tuple[str, str], Record], row: str, column: str) -> Record | None:
    if (row, column) in found:
        return found[row, column]
    other = found.get((column, row))
    return None if other is None else {**other, "value": -other["value"]}


def _cell(axes: Axes, x: int, y: int, one: Record, reach: float) -> None:
    share = max(-1.0, min(1.0, one["value"] / reach))
    color = (1 - 0.75 * share, 1 - 0.45 * share, 1.0) if share >= 0 else (1.0, 1 + 0.5 * share, 1 + 0.75 * share)
    beyond = one["p_holm"] < 0.05
    edge = {"edgecolor": INK, "linewidth": 1.6} if beyond else {"edgecolor": "white", "linewidth": 1.0}
    axes.add_patch(_square(x, y, color, edge))
    axes.text(x, y, f"{one['value']:+.3f}", ha="center", va="center", fontsize=SMALL, color=INK)


def _square(x: int, y: int, color: Any, edge: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=color, **edge)


def pursuit(record: Record) -> Figure:
    """Pursuit over two trained dictionaries and over untrained rows, beside the dictionaries' own encoders."""
    wanted = ("variance_explained", "loss_recovered", "sae_top_1_accuracy")
    metrics = [metric for metric in wanted if metric in record["labels"]]
    bases = list(dict.fromkeys(row["base"] for row in record["rows"] if row["role"] == "variant"))
    figure, panels = _figure(len(metrics), 3.9)
    for axes, metric in zip(panels, metrics, strict=True):
        drawn: list[float] = []
        for number, base in enumerate(bases):
            for encoder in PURSUIT:
                rows = [row for row in record["rows"] if row["kind"] == encoder and row["base"] == base]
                points = mean_points([row for row in rows if not row["interpolating"]], metric)
                drawn += [point[0] for point in points]
                if points:
                    _mark(axes, encoder, points, f"{encoder} over {base}", ("-", "--")[number % 2], hollow=number > 0)
            own = next(row for row in record["rows"] if row["name"] == base)
            points = mean_points([row for row in record["rows"] if row["kind"] == own["kind"]], metric)
            drawn += [point[0] for point in points]
            _mark(axes, own["kind"], points, f"{short(TRAINED_RECIPES[own['kind']])}, own encoder", (0, (1, 1)))
        untrained = mean_points([row for row in record["rows"] if row["kind"] == UNTRAINED], metric)
        _mark(axes, UNTRAINED, untrained, "mpsae over untrained rows", "-.")
        _scale(axes, record, metric, [*drawn, *(point[0] for point in untrained)])
    _legend(figure, panels[0], 3)
    return figure


def truth(record: Record) -> Figure:
    """Each recipe on text against known truth."""
    pairs = (("variance_explained", "mcc"), ("variance_explained", "latent_f1"), ("sae_top_1_accuracy", "mcc"))
    names = {"mcc": "MCC with the true features ↑", "latent_f1": "F1 of latents ↑"}
    figure, panels = _figure(len(pairs))
    for axes, (metric, measure) in zip(panels, pairs, strict=True):
        plain(axes, f"{record['labels'][metric][0]} on text, L0 {record['read_at']:g}", names[measure])
        axes.yaxis.set_label_coords(-0.17, 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        for one in record["readings"][metric]:
            recipe = TRAINED_RECIPES.get(one["kind"])
            values = record["ground_truth"]["methods"].get(recipe, {}).get(measure) if recipe else None
            if values and None not in values:
                mean = statistics.fmean(values)
                error = statistics.stdev(values) / math.sqrt(len(values))
                style = KNOWN[one["kind"]]
                axes.errorbar(
                    one["value"],
                    mean,
                    xerr=one["seed_sd"] or 0.0,
                    yerr=error,
                    color=style.color,
                    marker=style.marker,
                    markersize=marker_size(style, 7),
                    elinewidth=0.9,
                    label=short(recipe or ""),
                    linestyle="none",
                )
    _legend(figure, panels[0], 6)
    return figure


def rates(record: Record) -> Figure:
    """Variance explained and L0 against the learning rate."""
    figure, panels = _figure(2)
    bases = list(dict.fromkeys(one["base"] for one in record["rates"]))
    for axes, key, label in ((panels[0], "variance_explained", "Variance explained ↑"), (panels[1], "l0", "L0")):
        plain(axes, "Learning rate (log scale)", label)
        axes.yaxis.set_label_coords(-0.17, 0.5)
        for number, base in enumerate(bases):
            mine = sorted((one for one in record["rates"] if one["base"] == base), key=lambda one: one["learning_rate"])
            ys = [one[key][0] if isinstance(one[key], list) else one[key] for one in mine]
            axes.plot([one["learning_rate"] for one in mine], ys, marker="os^"[number % 3], linewidth=1.1, label=base)
        axes.set_xscale("log")
        every = sorted({one["learning_rate"] for one in record["rates"]})
        axes.set_xticks(every, [f"{rate:g}" for rate in every])
        axes.minorticks_off()
    _legend(figure, panels[0], 3)
    return figure
