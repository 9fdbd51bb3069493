"""Draw `images/transfer/*.png`: two models' activations, what an SAE makes of them, and its latents on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sae_research.config.reporting import Visualization
from sae_research.plotting.axes import INK, MUTED, SMALL, legend_below, panel, panels, say, write_images
from sae_research.reporting import transfer_difference_figures
from sae_research.reporting.transfer import MAIN, MODELS, NAMES, TransferRun, at, read_transfer
from sae_research.reporting.transfer_separate import OPTIONAL, optional_parts


def legend(axes: Axes, **options: Any) -> None:
    """A legend inside the panel."""
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, **options)


def stairs(axes: Axes, histogram: dict[str, Any], label: str, color: str, **options: Any) -> None:
    """A histogram as shares of its own total."""
    edges = histogram["edges"] if "edges" in histogram else histogram["log10_edges"]
    counts = np.asarray(histogram["counts"], float)
    if counts.sum():
        axes.stairs(counts / counts.sum(), edges, label=label, color=color, linewidth=1.3, **options)


def log_y(axes: Axes) -> None:
    """A logarithmic axis with powers of ten alone: labels in between would cover the axis' name."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())


def trim(axes: Axes, histograms: Sequence[dict[str, Any]]) -> None:
    """Limit x to where any histogram holds something."""
    filled = [
        (edges[index], edges[index + 1])
        for histogram in histograms
        for edges in [histogram.get("edges") or histogram["log10_edges"]]
        for index, number in enumerate(histogram["counts"])
        if number
    ]
    if filled:
        low, high = min(low for low, _ in filled), max(high for _, high in filled)
        margin = 0.03 * (high - low)
        axes.set_xlim(low - margin, high + margin)


def short(hook: str) -> str:
    """`blocks.8.hook_resid_post` -> `layer 8, resid_post`."""
    layer, _, kind = hook.removeprefix("blocks.").partition(".")
    return f"layer {layer}, {kind.replace('hook_', '')}"


IMAGES = Path("images/transfer")
BASE, FINETUNED, NULL, HALVES, PERTURBED = "#0072B2", "#D55E00", "#8C8C8C", "#CC79A7", "#009E73"
COLORS = {"base": BASE, "finetuned": FINETUNED}
LINES = ("-", "--", ":", "-.")
EQUAL = 1e-5
"""Correlations this near to 1 are 1: the table holds 6 digits."""


def draw_transfer(style: Visualization, root: Path = Path(".")) -> list[Path]:
    """Write every picture of a finished run and delete those of an earlier one. Returns what was written."""
    run = read_transfer(root)
    if run is None:
        return write_images(root / IMAGES, {})
    own = {OPTIONAL[part][0]: transfer_difference_figures.FIGURES[part] for part in optional_parts(run.main)}
    return write_images(root / IMAGES, {name: partial(drawn, run, style) for name, drawn in (FIGURES | own).items()})


# --- activations -----------------------------------------------------------------------------


def similarity_heat_maps(run: TransferRun, style: Visualization) -> Figure:
    """Cosine of every token of the first prompts, one panel a hook."""
    hooks = run.main["similarity"]
    figure, grid = panels(style, len(hooks))
    maps = {
        hook: np.array([[np.nan if cell is None else cell for cell in row] for row in values["heat_map"]], float)
        for hook, values in hooks.items()
    }
    widest = max(cells.shape[1] for cells in maps.values())
    low = min(float(np.nanpercentile(cells, 1)) for cells in maps.values())
    for axes, (hook, cells) in zip(grid, maps.items(), strict=True):
        panel(axes, short(hook), "Position", "Prompt")
        axes.grid(visible=False)
        shown = axes.imshow(
            cells,
            aspect="auto",
            vmin=low,
            vmax=1.0,
            cmap="viridis",
            interpolation="nearest",
            extent=(-0.5, widest - 0.5, len(cells) - 0.5, -0.5),
        )
        axes.set_facecolor("#A8A8A8")
    bar = figure.colorbar(shown, ax=figure.axes, fraction=0.03, extend="min")
    bar.ax.tick_params(labelsize=SMALL, colors=MUTED)
    bar.set_label("Cosine (grey: does not count)", fontsize=SMALL, color=INK)
    return figure


def similarity_histograms(run: TransferRun, style: Visualization) -> Figure:
    """Cosine of tokens, distance of tokens, mean cosine of prompts: a line for every hook."""
    figure, grid = panels(style, 3)
    found = run.main["similarity"]
    kinds = (
        ("Cosine", "Cosine of a token", "tokens", lambda values: values["profile"]["cosine_histogram"]),
        (
            "Euclidean distance",
            "log10 of a token's distance",
            "tokens",
            lambda values: values["profile"]["euclidean_histogram"],
        ),
        ("Cosine by prompt", "Mean cosine of a prompt", "prompts", lambda values: values["prompt_means"]),
    )
    for axes, (title, label, counted, pick) in zip(grid, kinds, strict=True):
        panel(axes, title, label, f"Share of {counted} (log scale)")
        for (hook, values), color in zip(found.items(), _hook_colors(len(found)), strict=True):
            stairs(axes, pick(values), short(hook), color)
        log_y(axes)
        trim(axes, [pick(values) for values in found.values()])
    legend_below(figure, grid[0], len(found))
    return figure


def _hook_colors(n: int) -> list[str]:
    spare = ["#009E73", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00", "#A6761D", "#7A5195"]
    return [spare[index % len(spare)] for index in range(n)]


def similarity_by_position(run: TransferRun, style: Visualization) -> Figure:
    """Means by position in the context, at every hook."""
    figure, grid = panels(style, 3)
    kinds = (("cosine", "Cosine"), ("euclidean", "Euclidean distance"), ("relative_error", "Relative error"))
    found = run.main["similarity"]
    for axes, (key, label) in zip(grid, kinds, strict=True):
        panel(axes, label, "Position in the context", label if key != "euclidean" else "Distance (model's units)")
        for (hook, values), color in zip(found.items(), _hook_colors(len(found)), strict=True):
            _line(axes, values["profile"]["by_position"][key], color, "-", short(hook))
            if key == "cosine":
                _line(axes, values["profile"]["by_position"]["cosine_shuffled"], color, ":", None)
        axes.set_ylim(bottom=0)
    grid[0].plot([], [], ":", color=MUTED, label="null: with another token's")
    legend_below(figure, grid[0], len(found) + 1)
    return figure


def _line(axes: Axes, values: list[float | None], color: str, line: str, label: str | None) -> None:
    axes.plot(
        range(len(values)),
        [np.nan if value is None else value for value in values],
        line,
        color=color,
        linewidth=1.2,
        label=label,
    )


def outlier_norms(run: TransferRun, style: Visualization) -> Figure:
    """Norms of both models' activations at the SAE's hook, and every rule's limit."""
    figure, (axes,) = panels(style, 1, legend=0.3)
    found = run.main["outliers"]
    panel(axes, f"Norms of activations at {short(run.hook)}", "log10 of a token's norm", "Tokens (log scale)")
    histogram = found["norm_histogram"]
    for model in MODELS:
        axes.stairs(
            np.asarray(histogram[model], float),
            histogram["log10_edges"],
            label=model,
            color=COLORS[model],
            linewidth=1.3,
            linestyle="-" if model == "base" else "--",
        )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    trim(axes, [{"log10_edges": histogram["log10_edges"], "counts": histogram[model]} for model in MODELS])
    for (rule, limit), line in zip(found["limits"].items(), LINES, strict=False):
        shares = [100 * found["fraction_removed"][model][rule] for model in MODELS]
        axes.axvline(
            np.log10(limit),
            color=MUTED,
            linestyle=line,
            linewidth=1.1,
            label=f"{rule} rule: {shares[0]:.2g} % of base, {shares[1]:.2g} % of finetuned above",
        )
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, *(float(np.log10(limit)) + 0.05 for limit in found["limits"].values())))
    legend_below(figure, axes)
    return figure


# --- the SAE ---------------------------------------------------------------------------------


def quality(run: TransferRun, style: Visualization) -> Figure:
    """Four metrics on the base and the finetuned model, for the pair and its controls."""
    kinds = (
        ("Variance explained", ("quality", "base", None, "kept", "variance_explained"), False),
        ("L0 (latents per token)", ("quality", "base", None, "kept", "l0"), False),
        ("Loss recovered", ("losses", "models", None, "kept", "saes", "base", "loss_recovered"), True),
        ("KL (nats)", ("losses", "models", None, "kept", "saes", "base", "kl"), True),
    )
    figure, grid = panels(style, 2, 2, height=0.62, legend=0.2)
    for axes, (label, path, bounded) in zip(grid, kinds, strict=True):
        panel(axes, label, "", "")
        axes.grid(visible=False, axis="x")
        for place, result in enumerate(run.results.values()):
            for shift, model in ((-0.19, "base"), (0.19, "finetuned")):
                _bar(axes, place + shift, at(result, *(model if part is None else part for part in path)), model, bounded)
        axes.set_xticks(
            range(len(run.results)),
            [_with_tokens(name, result, bounded) for name, result in run.results.items()],
            fontsize=SMALL,
        )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.margins(y=0.12)
    for model in MODELS:
        grid[0].bar(
            [np.nan],
            [np.nan],
            color=COLORS[model],
            label="on the base model" if model == "base" else "on the pair's other model",
        )
    legend_below(figure, grid[0])
    return figure


def _with_tokens(name: str, result: dict[str, Any], patched: bool) -> str:
    """A pair's name over the tokens that its bars rest on: controls read fewer."""
    number = (
        at(result, "losses", "models", "base", "kept", "predictions")
        if patched
        else at(result, "quality", "base", "base", "kept", "tokens")
    )
    return NAMES.get(name, name) + (f"\n{int(number):,} tokens" if number is not None else "")


def _bar(axes: Axes, x: float, found: Any, model: str, bounded: bool) -> None:
    value = found.get("value") if bounded and isinstance(found, dict) else found
    if value is None:
        return
    axes.bar([x], [value], width=0.36, color=COLORS[model])
    top = value
    if bounded and found.get("low") is not None:
        reach = [[max(0.0, value - found["low"])], [max(0.0, found["high"] - value)]]
        axes.errorbar([x], [value], reach, color=INK, linewidth=1.0, capsize=2)
        top = max(value, found["high"])
    axes.annotate(
        f"{value:.3g}",
        (x, max(top, 0)),
        ha="center",
        va="bottom",
        fontsize=SMALL,
        color=INK,
        xytext=(0, 1),
        textcoords="offset points",
    )


def activations(run: TransferRun, style: Visualization) -> Figure:
    """Sizes of the non-zero activations of all latents."""
    figure, (axes,) = panels(style, 1)
    found = run.main["quality"]["base"]
    panel(axes, "Non-zero activations of all latents", "log10 of an activation's size", "Share of activations")
    for model in MODELS:
        stairs(axes, found[model]["activation_histogram"], model, COLORS[model], linestyle="-" if model == "base" else "--")
    trim(axes, [found[model]["activation_histogram"] for model in MODELS])
    legend(axes)
    return figure


# --- latents ---------------------------------------------------------------------------------


def _column(run: TransferRun, name: str) -> np.ndarray:
    return run.latents[name].to_numpy(float) if name in run.latents else np.empty(0)


def densities(run: TransferRun, style: Visualization) -> Figure:
    """Each latent's density in both models with the regression, and both histograms; silent latents stand at the edge."""
    figure, (scatter, histogram) = panels(style, 2, height=0.8)
    base, other = (_column(run, f"{model}_density") for model in MODELS)
    if not len(base) or not (base > 0).any():
        say(scatter, "no latent fired")
        histogram.set_axis_off()
        return figure
    floor = min(float(values[values > 0].min()) for values in (base, other) if (values > 0).any()) / 3
    logs = [np.log10(np.where(values > 0, values, floor)) for values in (base, other)]
    panel(scatter, "Density of every latent", "log10 density, base", "log10 density, finetuned")
    pearson = _column(run, "pearson")
    known = ~np.isnan(pearson)
    if not known.all():
        scatter.scatter(
            *(part[~known] for part in logs), color=NULL, s=10, linewidths=0, label="silent in one or both (at the edge)"
        )
    points = scatter.scatter(
        *(part[known] for part in logs), c=pearson[known], cmap="viridis", vmin=0, vmax=1, s=6, linewidths=0
    )
    span = [float(np.log10(floor)) - 0.1, float(max(part.max() for part in logs)) + 0.1]
    scatter.plot(span, span, color=MUTED, linewidth=0.9, linestyle="--", label="equal")
    line = at(run.main, "latents", "base", "density_shift", "regression")
    if line:
        x = np.array(span)
        scatter.plot(
            x,
            line["intercept"] + line["slope"] * x,
            color=FINETUNED,
            linewidth=1.2,
            label=f"regression: r = {line['r']:.3f}, slope {line['slope']:.2f}",
        )
    scatter.set(xlim=span, ylim=span)
    legend(scatter, loc="upper left")
    bar = figure.colorbar(points, ax=scatter, fraction=0.05)
    bar.set_label("Pearson on the same tokens", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=MUTED)
    panel(histogram, "Densities", "log10 density", "Latents")
    edges = np.linspace(span[0], span[1], 41)
    for model, values, line_style in zip(MODELS, (base, other), ("-", "--"), strict=True):
        alive = values > 0
        histogram.stairs(
            np.histogram(np.log10(values[alive]), edges)[0],
            edges,
            color=COLORS[model],
            linewidth=1.3,
            linestyle=line_style,
            label=f"{model}: {int((~alive).sum())} of {len(values)} silent",
        )
    histogram.set_ylim(top=1.25 * histogram.get_ylim()[1])
    legend(histogram, loc="upper left")
    return figure


def latent_transfer(run: TransferRun, style: Visualization) -> Figure:
    """Correlation and overlap of latents against the nulls and the perturbed model, correlation against density, and how
    alike their logits are."""
    figure, (correlations, overlaps, rarity, logits) = panels(style, 2, 2, height=0.72)
    found = {name: at(result, "latents", "base", "pearson_histograms") for name, result in run.results.items()}
    own = found.pop(MAIN)
    drawn = [
        (own["models"], "base and finetuned", FINETUNED, "-"),
        (own["shuffled"], "null: another token", NULL, "-"),
        (own["halves"], "null: base, other text", HALVES, "-"),
    ]
    if found.get("control_perturbed"):
        drawn.append((found["control_perturbed"]["models"], "control: perturbed", PERTURBED, "--"))
    panel(correlations, "Correlation on the same tokens", "Pearson", "Share of latents (log scale)")
    for histogram, label, color, line in drawn:
        stairs(correlations, histogram, label, color, linestyle=line)
    log_y(correlations)
    trim(correlations, [histogram for histogram, *_ in drawn])
    panel(overlaps, "Overlap of firing", "Jaccard", "Share of latents (log scale)")
    edges = np.linspace(0, 1, 41)
    for column, color in (("jaccard", FINETUNED), ("jaccard_shuffled", NULL), ("jaccard_halves", HALVES)):
        values = _column(run, column)
        counts = np.histogram(values[np.isfinite(values)], edges)[0]
        stairs(overlaps, {"edges": edges, "counts": counts}, "", color)
    log_y(overlaps)
    _rarity(run, rarity)
    _logits(run, logits)
    legend_below(figure, correlations, len(drawn))
    return figure


def _rarity(run: TransferRun, axes: Axes) -> None:
    panel(axes, "Rare latents and common ones", "log10 density, base", "Pearson")
    density, pearson = _column(run, "base_density"), _column(run, "pearson")
    alive = (density > 0) & ~np.isnan(pearson)
    for column, color in (("pearson", FINETUNED), ("pearson_shuffled", NULL)):
        axes.scatter(np.log10(density[alive]), _column(run, column)[alive], s=5, color=color, alpha=0.4, linewidths=0)


def _logits(run: TransferRun, axes: Axes) -> None:
    panel(axes, "Logit weights", "Pearson over shared tokens", "Latents")
    values = _column(run, "logit_correlation")
    values = values[np.isfinite(values)]
    if not len(values):
        say(axes, "not defined at this hook", keep_labels=True)
    elif values.min() > 1 - EQUAL:
        say(axes, "1 for every latent: both models have the same unembedding", keep_labels=True)
    else:
        axes.hist(values, bins=np.linspace(min(0.9, float(values.min())), 1, 41).tolist(), color=BASE)


def repair(run: TransferRun, style: Visualization) -> Figure:
    """Variance explained against tokens of further training, and L0."""
    figure, grid = panels(style, 2, height=0.72, legend=0.3)
    found = run.main.get("repair") or {}
    if found.get("status") != "ok":
        grid[1].set_axis_off()
        say(grid[0], f"repair: {found.get('message', 'not run')}")
        return figure
    kinds = (
        ("finetuned", "finetuned", FINETUNED, "-", "trained on and read on the finetuned model"),
        ("finetuned", "base", FINETUNED, ":", "the same SAE on the base model"),
        ("base", "base", BASE, "--", "control: trained as long on the base model"),
    )
    for axes, key, label in zip(
        grid,
        ("variance_explained", "l0"),
        (("At equal L0", "Variance explained"), ("At its own biases", "L0 (latents per token)")),
        strict=True,
    ):
        panel(axes, label[0], "Tokens of further training (thousands)", label[1])
        for arm, model, color, line, words in kinds:
            rows = found["curves"][arm]
            axes.plot(
                [row["tokens"] / 1000 for row in rows],
                [row[f"{key}_on_{model}"] for row in rows],
                line,
                color=color,
                linewidth=1.4,
                marker="o",
                markersize=3,
                label=words,
            )
    half = found.get("tokens_to_half")
    if half is not None:
        grid[0].axvline(
            half / 1000, color=MUTED, linewidth=1.0, linestyle="-.", label=f"half of the gap closed: {half:,.0f} tokens"
        )
    legend_below(figure, grid[0])
    return figure


FIGURES: dict[str, Callable[[TransferRun, Visualization], Figure]] = {
    drawn.__name__: drawn
    for drawn in (
        quality,
        similarity_by_position,
        similarity_histograms,
        similarity_heat_maps,
        outlier_norms,
        densities,
        latent_transfer,
        activations,
        repair,
    )
}
