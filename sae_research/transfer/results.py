"""From sums to what is written: one result for a pair of models, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sae_research.stats import ReconstructionStats
from sae_research.transfer.latents import ACTIVATION_EDGES
from sae_research.transfer.logits import logit_similarity
from sae_research.transfer.pair import MODELS, Pair
from sae_research.transfer.similarity import Similarity
from sae_research.transfer.sums import together
from sae_research.transfer.sweep import PROMPT_EDGES, HookStats, SaeStats, Statistics
from sae_research.transfer.table import by_interval, by_sample, density_shift, latent_table, wilson


def similarity(statistics: Statistics) -> dict[str, Any]:
    """By hook: figures without and with outliers, how many were removed, and what pictures are drawn from."""
    return {hook: _similarity(stats) for hook, stats in statistics.hooks.items()}


def _similarity(stats: HookStats) -> dict[str, Any]:
    everything: Similarity = together(stats.kept, stats.removed)
    return {"tokens": everything.n, "kept": stats.kept.means(), "all": everything.means(),
            "fraction_removed": stats.removed.n / max(everything.n, 1),
            "limit": None if stats.limit == float("inf") else stats.limit,
            "profile": stats.kept.profile(), "heat_map": stats.heat_map,
            "prompt_means": {"edges": PROMPT_EDGES, "counts": [int(c) for c in stats.prompt_means]}}


def quality(stats: SaeStats) -> dict[str, Any]:
    """By model and filter: the figures of `ReconstructionStats`, the published R^2, and dead latents with an interval."""
    return {model: {"kept": _quality(stats.kept[model]),
                    "all": _quality(together(stats.kept[model], stats.removed[model])),
                    "activation_histogram": {"log10_edges": ACTIVATION_EDGES,
                                             "counts": [int(c) for c in stats.histogram[model].counts]}}
            for model in MODELS}


def _quality(stats: ReconstructionStats) -> dict[str, float]:
    found = stats.metrics()
    if not found:
        return {}
    dead, d_sae = int((stats.firing_F == 0).sum()), len(stats.firing_F)
    low, high = wilson(dead, d_sae)
    found |= {"dead_latents": float(dead), "fraction_dead": dead / d_sae, "fraction_dead_low": float(low),
              "fraction_dead_high": float(high), "mean_density": float(stats.density.mean())}
    r2 = flattened_r2(stats)
    return found if r2 is None else found | {"r2_flattened": r2}


def flattened_r2(stats: ReconstructionStats) -> float | None:
    """The published comparison's R^2: about one mean over all tokens *and dimensions*, so that a mere constant vector
    already scores 0.3 to 0.6 and the figure is no variance explained. None without variance."""
    n = stats.tokens * len(stats.sum_D)
    total = float(stats.sum_squares_D.sum()) - float(stats.sum_D.sum()) ** 2 / n
    return None if total <= 0 else 1 - float(stats.residual_D.sum()) / total


def latents(pair: Pair, stats: SaeStats, role: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """(summaries, the table of all latents) of one SAE."""
    sampling, seed = pair.params.transfer.sampling, pair.params.random_seed
    logits = logit_similarity(pair.base, pair.finetuned, pair.saes[role])
    frame = latent_table(stats, None if logits is None else logits.correlation, sampling, seed)
    tokens = {model: stats.kept[model].tokens for model in MODELS}
    found = {"by_interval": by_interval(frame), "by_sample": by_sample(frame, sampling),
             "density_shift": density_shift(frame, tokens, stats.moments_kept.halves),
             "pairs": stats.moments_kept.models.n,
             "logits": None if logits is None else logits.report(),
             "pearson_histograms": {name: _histogram(frame[column]) for name, column in (
                 ("models", "pearson"), ("shuffled", "pearson_shuffled"), ("halves", "pearson_halves"))}}
    return found, frame


def _histogram(values: pd.Series) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 81)
    return {"edges": [round(float(edge), 4) for edge in edges],
            "counts": np.histogram(values.dropna(), edges)[0].tolist(), "undefined": int(values.isna().sum())}


def coverage(pair: Pair, statistics: Statistics) -> dict[str, Any]:
    """How much was read, and how much of it stands in the same place for both."""
    tokens = statistics.tokens
    return {"tokens_base": tokens["base"], "tokens_finetuned": tokens["finetuned"], "matched": tokens["aligned"],
            "matched_fraction": tokens["aligned"] / max(tokens["counted_base"], 1),
            "tokenizers": "each its own" if pair.source.own else "the base model's for both"}
