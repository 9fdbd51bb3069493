"""Histograms coarse enough to draw, from the fine logarithmic ones of the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_research.analysis.dashboard.contexts import significant
from sae_research.analysis.layout import DENSE, N_BINS, RARE, LatentStats

MERGED = 4
"""Bins of the store that become one bar: four to a factor of two."""
DENSITY_STEP = 0.25
"""Decades."""


def activation_bars(stats: LatentStats, latents: slice) -> list[list[dict[str, Any]]]:
    """For every latent its histograms of non-zero activations, on a logarithmic axis: one of the negative ones where there
    are any, one of the positive ones. Each `{edges: [n + 1], counts: [n]}`, without the empty bars at its ends."""
    counts = np.asarray(stats.histogram[latents])
    sides = [(counts[:, :N_BINS], stats.edges[:N_BINS + 1]), (counts[:, N_BINS + 1:], stats.edges[N_BINS + 1:])] \
        if stats.signed else [(counts, stats.edges)]
    merged = [(side.reshape(len(side), -1, MERGED).sum(2), significant(edges[::MERGED])) for side, edges in sides]
    found = []
    for row in range(len(counts)):
        bars = []
        for side, edges in merged:
            filled = np.flatnonzero(side[row])
            if len(filled):
                first, end = int(filled[0]), int(filled[-1]) + 1
                bars.append({"edges": edges[first:end + 1], "counts": side[row, first:end]})
        found.append(bars)
    return found


def density_bars(stats: LatentStats) -> dict[str, Any]:
    """Latents by log10 of density: `{dead, edges: log10 [n + 1], counts [n], rare, dense: log10 of the bounds}`."""
    alive = stats.density[stats.count > 0]
    lowest = np.floor(np.log10(alive.min()) / DENSITY_STEP) * DENSITY_STEP if len(alive) else -1.0
    edges = np.arange(lowest, DENSITY_STEP, DENSITY_STEP)
    counts, _ = np.histogram(np.log10(alive).clip(edges[0], edges[-1]), edges)
    return {"dead": int((stats.count == 0).sum()), "edges": edges, "counts": counts, "rare": float(np.log10(RARE)),
            "dense": float(np.log10(DENSE))}
