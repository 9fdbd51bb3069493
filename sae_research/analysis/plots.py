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
from sae_research.analysis.store import DENSE, RARE, LatentStats
from sae_research.analysis.subspace import OTHER, Subspace
from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, plain, save

DPI = 110
# Okabe and Ito's palette: distinct under every common colour blindness
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#7A5195")
KINDS = {
    "dead": (GREY, "dead: never fired"),
    "rare": ("#56B4E9", f"rare: below {RARE:g}"),
    "between": (BLUE, "in between"),
    "dense": (ORANGE, f"dense: {DENSE:g} or more"),
}


def _figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _written(figure: Figure, path: Path) -> Path:
    save(figure, path)
    return path


def density_histogram(stats: LatentStats, path: Path) -> Path:
    """Latents by log10 density; dead ones have a bar of their own, dense and rare ones a colour."""
    figure, (axes,) = _figure()
    plain(axes, "fraction of tokens on which a latent fires (density)", "latents")
    kind, density = stats.kind, stats.density
    counts = Counter(kind.tolist())
    lowest = np.floor(np.log10(max(density[density > 0].min(initial=1.0), 1e-12)) * 4) / 4
    bins = np.arange(lowest, 0.26, 0.25)
    for name, (color, label) in KINDS.items():
        text = f"{label} ({counts[name]:,}, {counts[name] / stats.d_sae:.1%})"
        if name == "dead":
            axes.bar(lowest - 0.6, counts[name], 0.25, color=color, label=text)
        else:
            axes.hist(
                np.log10(density[kind == name]), bins.tolist(), color=color, label=text, edgecolor="white", linewidth=0.4
            )
    ticks = [t for t in range(int(np.ceil(lowest)), 1)]
    axes.set_xticks([lowest - 0.6, *ticks], ["0", *[f"{10.0**t:g}" for t in ticks]])
    axes.axvline(np.log10(DENSE), color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_title(
        f"{stats.about['sae']['name']}: density of {stats.d_sae:,} latents over {stats.tokens:,} tokens",
        fontsize=TEXT,
        color=INK,
        loc="left",
    )
    axes.legend(fontsize=SMALL, frameon=False)
    return _written(figure, path)


def density_against_cah(stats: LatentStats, path: Path) -> Path:
    """Density against the consistent activation heuristic: latents of whole contexts lie high, those of tokens low."""
    figure, (axes,) = _figure()
    plain(
        axes,
        "fraction of tokens on which a latent fires (density)",
        "firings per context in which it fires\n(consistent activation heuristic)",
    )
    kind = stats.kind
    for name, (color, label) in KINDS.items():
        chosen = (kind == name) & (stats.count > 0)
        if chosen.any():
            axes.scatter(
                stats.density[chosen],
                stats.cah[chosen],
                s=5,
                color=color,
                alpha=0.6,
                linewidths=0,
                label=f"{label} ({int(chosen.sum()):,})",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(stats.context_size, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_title(
        f"{stats.about['sae']['name']}: {stats.n_contexts:,} contexts of {stats.context_size} tokens (dotted: "
        "every token of a context)",
        fontsize=TEXT,
        color=INK,
        loc="left",
    )
    axes.legend(fontsize=SMALL, frameon=False)
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
    axes.set_title(
        f"{name}: activations at {token!r}, {len(alive)} of {len(activations):,} latents alive",
        fontsize=TEXT,
        color=INK,
        loc="left",
    )
    return _written(figure, path)


def attribution_bars(found: Attribution, path: Path) -> Path:
    """Per token: what reconstruction, error and bias contribute to the metric, one panel an SAE."""
    height = 1.0 + 2.4 * len(found.saes)
    figure = Figure(figsize=(max(6.0, 0.34 * len(found.tokens) + 2), height), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(found.saes), 1, squeeze=False)[:, 0]
    place = np.arange(len(found.tokens))
    for axes, (name, shares) in zip(panels, found.saes.items(), strict=True):
        plain(axes, "", "share of the metric")
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
        axes.set_title(
            f"{name}: shares add up to {shares.total:.4g} (metric {found.metric:.4g})", fontsize=TEXT, color=INK, loc="left"
        )
        axes.legend(fontsize=SMALL, frameon=False)
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
    panels[0].legend(fontsize=SMALL, frameon=False)
    if space is not None:
        space.tick_params(labelsize=SMALL, colors=MUTED)
    return _written(figure, path)


def steering_sweep(found: Steering, path: Path) -> Path:
    """Target rate and cost on neutral text against strength."""
    rows = sorted((row for row in found.strengths if row.strength is not None), key=lambda row: row.strength)
    figure, (left, right) = _figure(width=9.0, height=3.6, columns=2)
    x = [row.strength or 0.0 for row in rows]
    plain(left, f"strength (1 = the latent's maximum, {found.maximum:.3g})", "target tokens per token")
    left.plot(
        x,
        np.array([row.target_rate for row in rows], dtype=float),
        "o-",
        color=BLUE,
        label=f"latent {found.latent}, {found.method}",
    )
    left.axhline(found.strengths[0].target_rate, color=MUTED, linestyle=":", linewidth=1, label="unsteered")
    plain(right, f"strength (1 = the latent's maximum, {found.maximum:.3g})", "nats per token of neutral text")
    right.plot(x, np.array([row.kl for row in rows], dtype=float), "o-", color=ORANGE, label="KL(unsteered || steered)")
    right.plot(x, np.array([row.ce_change for row in rows], dtype=float), "s--", color=GREEN, label="rise of cross-entropy")
    for axes in (left, right):
        axes.legend(fontsize=SMALL, frameon=False)
    return _written(figure, path)
