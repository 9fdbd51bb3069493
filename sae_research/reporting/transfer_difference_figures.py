"""Pictures of which latents a finetune made, kept or lost: by a crosscoder's decoder norms, and by the best match between
separate SAEs."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_research.config.reporting import Visualization
from sae_research.plotting.axes import INK, MUTED, SMALL, legend_below, panel, panels
from sae_research.reporting.transfer import MODELS, TransferRun

COLORS = {"base": "#0072B2", "finetuned": "#D55E00"}
CONTROL = "#8C8C8C"


def crosscoder_shares(run: TransferRun, style: Visualization) -> Figure:
    """The finetuned model's share of every latent's decoder norms, with the limits of the classes."""
    found = run.main["crosscoder"]
    figure, (axes,) = panels(style, 1)
    panel(axes, "Whose latents?", "Finetuned model's share of the decoder norms", "Latents (log scale)")
    histogram, limits = found["share_histogram"], found["limits"]
    axes.stairs(histogram["counts"], histogram["edges"], color=COLORS["finetuned"], fill=True, alpha=0.7)
    for edge in (limits["only"], 0.5 - limits["shared"], 0.5 + limits["shared"], 1 - limits["only"]):
        axes.axvline(edge, color=MUTED, linewidth=0.8, linestyle=":")
    _counts(axes)
    return figure


def separate_matches(run: TransferRun, style: Visualization) -> Figure:
    """The best match of every latent in the other SAE, by cosine, by correlation and by the smaller of both."""
    found = run.main["separate"]
    figure, grid = panels(style, 3, legend=0.3)
    titles = {"cosine": "Decoder", "correlation": "Activations", "match": "Both at once"}
    names = {"cosine": "Best cosine", "correlation": "Best correlation", "match": "Best smaller of the two"}
    for axes, (key, title) in zip(grid, titles.items(), strict=True):
        panel(axes, title, names[key], "Latents (log scale)")
        for model in MODELS:
            _line(axes, found["saes"][model]["histograms"][key], f"{model} model's SAE", COLORS[model], "-")
        if "control" in found:
            _line(axes, found["control"]["base"]["histograms"][key], "control: trained on, base model", CONTROL, "--")
        axes.set_xlim(min(0.0, _lowest([found["saes"][model]["histograms"][key] for model in MODELS])) - 0.03, 1.03)
        for limit in found["limits"].values():
            axes.axvline(limit, color=MUTED, linewidth=0.8, linestyle=":")
        _counts(axes)
    legend_below(figure, grid[0], 3)
    return figure


def _line(axes: Axes, histogram: dict[str, Any], label: str, color: str, line: str) -> None:
    axes.stairs(histogram["counts"], histogram["edges"], label=label, color=color, linestyle=line, linewidth=1.3)


def _lowest(histograms: list[dict[str, Any]]) -> float:
    """Where the first latent stands."""
    return min((h["edges"][i] for h in histograms for i, count in enumerate(h["counts"]) if count), default=0.0)


def _counts(axes: Axes) -> None:
    """A logarithmic axis of counts that shows single latents."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.tick_params(labelsize=SMALL, labelcolor=INK)


FIGURES = {"crosscoder": crosscoder_shares, "separate": separate_matches}
"""By the part of a result that each is drawn of."""
