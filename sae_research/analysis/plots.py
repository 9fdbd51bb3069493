"""Figures of an analysis. Each function draws one and writes it as a PNG."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_research.analysis.attribute import Attribution
from sae_research.analysis.steer import Steering
from sae_research.analysis.store import LatentStats
from sae_research.analysis.subspace import OTHER, Subspace
from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, plain, save

DPI = 110
# Okabe and Ito's palette: distinct under every common colour blindness
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#7A5195")
KINDS = {"dead": GREY, "rare": "#56B4E9", "between": BLUE, "dense": ORANGE}


def _named(stats: LatentStats) -> dict[str, str]:
    """What each kind of latent is, in words."""
    return {
        "dead": "dead: never fired",
        "rare": f"rare: below {stats.rare_below:.2g}",
        "between": "in between",
        "dense": f"dense: {stats.dense_from:.2g} or more",
    }


def _figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=TEXT, color=INK, loc="left")


def _legend_below(axes: Axes, columns: int = 2) -> None:
    """Under the panel, where it covers no point."""
    axes.legend(
        fontsize=SMALL, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, borderaxespad=0.6
    )


def _written(figure: Figure, path: Path) -> Path:
    save(figure, path)
    return path


def density_histogram(stats: LatentStats, path: Path) -> Path:
    """Latents by log10 density; dead ones have a bar of their own, dense and rare ones a colour."""
    figure, (axes,) = _figure(height=4.6)
    plain(axes, "density: fraction of tokens on which a latent fires (log scale)", "latents")
    named = _named(stats)
    kind, density = stats.kind, stats.density
    counts = Counter(kind.tolist())
    lowest = np.floor(np.log10(max(density[density > 0].min(initial=1.0), 1e-12)) * 4) / 4
    bins = np.arange(lowest, 0.26, 0.25)
    for name, color in KINDS.items():
        text = f"{named[name]} ({counts[name]:,}, {counts[name] / stats.d_sae:.1%})"
        if name == "dead":
            axes.bar(lowest - 0.6, counts[name], 0.25, color=color, label=text)
        else:
            axes.hist(
                np.log10(density[kind == name]), bins.tolist(), color=color, label=text, edgecolor="white", linewidth=0.4
            )
    ticks = [t for t in range(int(np.ceil(lowest)), 1)]
    axes.set_xticks([lowest - 0.6, *ticks], ["0", *[f"{10.0**t:g}" for t in ticks]])
    if stats.expected_density > 0:
        axes.axvline(
            np.log10(stats.expected_density),
            color=INK,
            linewidth=1,
            linestyle=":",
            label=f"L0 / latents = {stats.expected_density:.2g}: all alike",
        )
    _title(axes, f"{stats.about['sae']['name']}: density of {stats.d_sae:,} latents over {stats.tokens:,} tokens")
    _legend_below(axes, 3)
    return _written(figure, path)


def density_against_cah(stats: LatentStats, path: Path) -> Path:
    """Density against the consistent activation heuristic: latents of whole contexts lie high, those of tokens low."""
    figure, (axes,) = _figure(height=4.6)
    plain(
        axes,
        "density: fraction of tokens on which a latent fires (log scale)",
        "firings per context in which it fires (log scale)\n(consistent activation heuristic)",
    )
    kind, named = stats.kind, _named(stats)
    for name, color in KINDS.items():
        chosen = (kind == name) & (stats.count > 0)
        if chosen.any():
            axes.scatter(
                stats.density[chosen],
                stats.cah[chosen],
                s=5,
                color=color,
                alpha=0.6,
                linewidths=0,
                label=f"{named[name]} ({int(chosen.sum()):,})",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(stats.context_size, color=MUTED, linewidth=0.8, linestyle=":")
    _title(
        axes,
        f"{stats.about['sae']['name']}: {stats.n_contexts:,} contexts of {stats.context_size} tokens (dotted: "
        "every token of a context)",
    )
    _legend_below(axes, 3)
    return _written(figure, path)


def final_token(name: str, activations: np.ndarray, token: str, path: Path) -> Path:
    """Activations of all latents [d_sae] at a prompt's last token, with the number alive."""
    figure, (axes,) = _figure(height=3.4)
    plain(axes, "latent", "activation")
    alive = np.flatnonzero(activations)
    axes.vlines(alive, 0, activations[alive], color=BLUE, linewidth=1.0)
    for latent in alive[np.argsort(-np.abs(activations[alive]))[:5]]:
        axes.annotate(str(latent), (latent, activations[latent]), fontsize=SMALL, color=INK, ha="center", va="bottom")
    axes.set_xlim(-1, len(activations))
    _title(axes, f"{name}: activations at {token!r}, {len(alive)} of {len(activations):,} latents alive")
    return _written(figure, path)


def attribution_bars(found: Attribution, path: Path) -> Path:
    """Per token: what reconstruction, error and bias contribute to the metric, one panel an SAE."""
    height = 1.0 + 2.7 * len(found.saes)
    figure = Figure(figsize=(max(6.0, 0.34 * len(found.tokens) + 2), height), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(found.saes), 1, squeeze=False)[:, 0]
    place = np.arange(len(found.tokens))
    for axes, (name, shares) in zip(panels, found.saes.items(), strict=True):
        plain(axes, "token", "share of the metric")
        above, below = np.zeros(len(place)), np.zeros(len(place))
        for values, color, label in (
            (shares.reconstruction, BLUE, "latents"),
            (shares.error, ORANGE, "error"),
            (shares.bias, GREY, "bias and masked tokens"),
        ):
            part = values.numpy().astype(float)
            axes.bar(
                place,
                part,
                bottom=np.where(part >= 0, above, below),
                color=color,
                width=0.8,
                label=f"{label} ({part.sum():+.3g})",
            )
            above, below = above + np.maximum(part, 0), below + np.minimum(part, 0)
        axes.axhline(0, color=INK, linewidth=0.6)
        shown = [token.replace("\n", "\\n") for token in found.tokens]
        axes.set_xticks(place, shown, rotation=60, fontsize=SMALL, ha="right")
        _title(axes, f"{name}: shares add up to {shares.explained:.4g} (metric {found.metric:.4g})")
        axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _written(figure, path)


def subspace_scatter(found: Subspace, path: Path, most: int = len(PALETTE)) -> Path:
    """Points on the first components: two flat views and one in space, coloured by group; small groups are `other`."""
    n = found.coordinates.shape[1]
    figure = Figure(figsize=(11.5, 4.2), dpi=DPI, layout="constrained")
    flat = [pair for pair in ((0, 1), (1, 2)) if pair[1] < n]
    panels = [figure.add_subplot(1, len(flat) + (n > 2), i + 1) for i in range(len(flat))]
    space = figure.add_subplot(1, len(flat) + 1, len(flat) + 1, projection="3d") if n > 2 else None
    groups = [g for g, _ in Counter(g for g in found.group if g != OTHER).most_common(most)]
    label = np.array([g if g in groups else OTHER for g in found.group])
    for axes, (i, j) in zip(panels, flat, strict=True):
        plain(axes, *(f"component {c + 1} ({found.variance_ratio[c]:.0%} of the variance)" for c in (i, j)))
    for number, group in enumerate([OTHER, *groups]):
        chosen = label == group
        if not chosen.any():
            continue
        color = GREY if group == OTHER else PALETTE[(number - 1) % len(PALETTE)]
        style: dict[str, Any] = {
            "s": 9 if group != OTHER else 4,
            "color": color,
            "alpha": 0.75 if group != OTHER else 0.35,
            "linewidths": 0,
        }
        for axes, (i, j) in zip(panels, flat, strict=True):
            axes.scatter(found.coordinates[chosen, i], found.coordinates[chosen, j], **style)
        if space is not None:
            space.scatter(*found.coordinates[chosen, :3].T, **style)
        panels[0].scatter([], [], color=color, label=f"{group} ({int(chosen.sum()):,})", s=14)
    figure.legend(loc="outside lower center", ncols=6, fontsize=SMALL, frameon=False, labelcolor=INK)
    figure.suptitle(f"Reconstructions at {len(found.token):,} tokens, by token", fontsize=TEXT + 1, color=INK)
    if space is not None:
        space.tick_params(labelsize=SMALL, colors=MUTED)
        space.set_box_aspect(None, zoom=0.82)  # the layout leaves no room for the third axis' label
        for axis, number in zip((space.xaxis, space.yaxis, space.zaxis), (1, 2, 3), strict=True):
            axis.set_label_text(f"component {number}", fontsize=SMALL, color=INK)
    return _written(figure, path)


def steering_sweep(found: Steering, path: Path) -> Path:
    """Target rate and cost on neutral text against strength."""
    rows = sorted((row for row in found.strengths if row.strength is not None), key=lambda row: row.strength)
    plain_row = found.strengths[0]
    figure, (left, right) = _figure(width=9.0, height=4.0, columns=2)
    x = [row.strength or 0.0 for row in rows]
    label = f"strength (1 = the latent's maximum, {found.maximum:.3g})"
    plain(left, label, "target tokens per token")
    rates = np.array([row.target_rate for row in rows], dtype=float)
    left.plot(x, rates, "o-", color=BLUE, label=f"latent {found.latent}, {found.method}")
    bounds = [(at, row.target_low, row.target_high) for at, row in zip(x, rows, strict=True) if row.target_low is not None]
    if bounds:
        at, low, high = np.array(bounds, dtype=float).T
        left.vlines(at, low, high, color=BLUE, linewidth=1.2, label="95 % interval over seeds")
    left.axhline(plain_row.target_rate, color=MUTED, linestyle=":", linewidth=1, label="unsteered")
    if plain_row.target_low is not None and plain_row.target_high is not None:
        left.axhspan(plain_row.target_low, plain_row.target_high, color=MUTED, alpha=0.15, linewidth=0)
    _title(left, "Target tokens in the texts")
    plain(right, label, "nats per token of neutral text")
    right.plot(x, np.array([row.kl for row in rows], dtype=float), "o-", color=ORANGE, label="KL(unsteered || steered)")
    right.plot(x, np.array([row.ce_change for row in rows], dtype=float), "s--", color=GREEN, label="rise of cross-entropy")
    _title(right, f"Cost on {found.neutral_tokens:,} tokens of neutral text")
    for axes in (left, right):
        _legend_below(axes, 1)
    return _written(figure, path)
