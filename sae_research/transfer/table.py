"""One row for every latent: densities with intervals, how its activations transfer, and what the nulls reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from sae_research.config.transfer import Sampling
from sae_research.stats.reconstruction import together
from sae_research.transfer.loading import MODELS
from sae_research.transfer.statistics import EPSILON, PairMoments
from sae_research.transfer.sweep import SaeStats

Z95 = 1.959963984540054
DEAD = ("both_dead", "base_dead", "finetuned_dead")
DECADES = ("below_1e-4", "1e-4_to_1e-3", "1e-3_to_1e-2", "1e-2_to_1e-1", "above_1e-1")
INTERVALS = (*DEAD, *DECADES)
"""Of the base model's density; dead means that a latent never fired on these tokens."""
DEAD_BELOW = -8.0
"""Density of the published samples of dead latents, as log10."""
THRESHOLDS = (0.5, 0.9)


def wilson(count: Any, n: float) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a proportion `count / n` (Wilson 1927): sensible also where nothing was counted. Tokens of one text
    are no independent draws, so the true interval is wider."""
    p = np.asarray(count, np.float64) / max(n, 1)
    middle = p + Z95**2 / (2 * n)
    reach = Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return ((middle - reach) / (1 + Z95**2 / n)).clip(0), ((middle + reach) / (1 + Z95**2 / n)).clip(None, 1)


def latent_table(stats: SaeStats, logits: Tensor | None, sampling: Sampling, seed: int) -> pd.DataFrame:
    """The table. Densities count every token of a model that counts without outliers; what needs pairs, matched ones."""
    kept, everything = stats.moments_kept, together(stats.moments_kept, stats.moments_removed)
    frame = pd.DataFrame({"latent": np.arange(stats.sae.cfg.d_sae)})
    for model in MODELS:
        firings, n = stats.kept[model].firing_F.cpu().numpy(), max(stats.kept[model].tokens, 1)
        low, high = wilson(firings, n)
        frame[f"{model}_firings"] = firings.astype(np.int64)
        frame[f"{model}_density"], frame[f"{model}_density_low"], frame[f"{model}_density_high"] = firings / n, low, high
    alive = (frame.base_firings > 0) & (frame.finetuned_firings > 0)
    frame["density_ratio"] = (frame.finetuned_density / frame.base_density.where(frame.base_density > 0)).where(alive)
    frame["density_shifted"] = (frame.base_density_high < frame.finetuned_density_low) | (
        frame.finetuned_density_high < frame.base_density_low
    )
    for name, moments in (
        ("", kept.models),
        ("_with_outliers", everything.models),
        ("_shuffled", kept.shuffled),
        ("_halves", kept.halves),
    ):
        frame[f"pearson{name}"], frame[f"jaccard{name}"] = _numpy(moments.pearson), _numpy(moments.jaccard)
    half = max(kept.halves.n, 1)
    frame["density_half_even"], frame["density_half_odd"] = (
        _numpy(part) / half for part in (kept.halves.fires_a, kept.halves.fires_b)
    )
    if not stats.signed:
        frame["log_error"] = _numpy(kept.models.mean_log_error)
    frame["logit_correlation"] = np.nan if logits is None else _numpy(logits)
    frame["interval"] = _intervals(frame)
    frame["sample"] = sample(frame, sampling, seed)
    return frame


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _intervals(frame: pd.DataFrame) -> np.ndarray:
    base, other = frame.base_firings.to_numpy() > 0, frame.finetuned_firings.to_numpy() > 0
    decade = np.asarray(DECADES, object)[np.digitize(frame.base_density, [1e-4, 1e-3, 1e-2, 1e-1])]
    return np.select([~base & ~other, ~base, ~other], list(DEAD), decade)


def members(frame: pd.DataFrame, sampling: Sampling) -> dict[str, np.ndarray]:
    """The published sets of latents, by log10(density + 1e-10): dead in one model and not the other, dense in both, the
    latter in each interval of `sampling`."""
    base, other = (np.log10(frame[f"{model}_density"].to_numpy() + EPSILON) for model in MODELS)
    intervals = sampling.dense_intervals
    starts = [low for low, _ in intervals.values()]

    def inside(density: np.ndarray, low: float, high: float) -> np.ndarray:
        below = density < np.log10(high) if high in starts else density <= np.log10(high)
        return (density >= np.log10(low)) & below

    return {
        "dead_base": (base <= DEAD_BELOW) & (other > DEAD_BELOW),
        "dead_finetuned": (base > DEAD_BELOW) & (other <= DEAD_BELOW),
        **{name: inside(base, *ends) & inside(other, *ends) for name, ends in intervals.items()},
    }


def sample(frame: pd.DataFrame, sampling: Sampling, seed: int) -> np.ndarray:
    """The name of the sample each latent was drawn into, or nothing: uniform draws without replacement."""
    drawn = np.full(len(frame), "", object)
    for number, (name, inside) in enumerate(members(frame, sampling).items()):
        found = np.flatnonzero(inside)
        size = min(len(found), sampling.dense if name in sampling.dense_intervals else sampling.dead)
        drawn[np.random.default_rng([seed, number]).permutation(found)[:size]] = name
    return drawn


def as_tsv(frame: pd.DataFrame) -> str:
    """The table as text: 6 significant digits, an empty cell where a metric is not defined."""
    return frame.to_csv(sep="\t", index=False, float_format="%.6g", lineterminator="\n")


# --- summaries -------------------------------------------------------------------------------


def by_interval(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Summaries of the latents in every interval of density, of all that fire in both models (`alive`), and of the
    published samples with how many latents they were drawn from."""
    alive = (frame.base_firings > 0) & (frame.finetuned_firings > 0)
    found = {"alive": summary(frame[alive])}
    found |= {name: summary(frame[frame.interval == name]) for name in INTERVALS}
    return {name: values for name, values in found.items() if values["latents"]}


def by_sample(frame: pd.DataFrame, sampling: Sampling) -> dict[str, dict[str, Any]]:
    """The published samples, those of dense latents in each interval of `sampling`."""
    return {
        name: {"drawn_from": int(inside.sum()), **summary(frame[frame["sample"] == name])}
        for name, inside in members(frame, sampling).items()
    }


def summary(part: pd.DataFrame) -> dict[str, Any]:
    """Means and medians of some latents; how many have a correlation at all, and how many exceed what nulls reach."""
    found: dict[str, Any] = {"latents": len(part), "with_pearson": int(part.pearson.notna().sum())}
    for column in (
        "pearson",
        "pearson_with_outliers",
        "pearson_shuffled",
        "pearson_halves",
        "jaccard",
        "jaccard_shuffled",
        "jaccard_halves",
        "density_ratio",
        "logit_correlation",
        "log_error",
    ):
        if column in part and part[column].notna().any():
            found[f"{column}_mean"] = float(part[column].mean())
            found[f"{column}_median"] = float(part[column].median())
    if found["with_pearson"]:
        for threshold in THRESHOLDS:
            found[f"pearson_above_{threshold}"] = float((part.pearson.dropna() > threshold).mean())
        nulls = part[["pearson_shuffled", "pearson_halves"]].max(axis=1).dropna()
        if len(nulls):
            found["null_pearson_99th_percentile"] = float(nulls.quantile(0.99))
    return found


def density_shift(frame: pd.DataFrame, tokens: dict[str, int], halves: PairMoments) -> dict[str, Any]:
    """Dead latents, the regression of log10 densities, and how many densities moved beyond their intervals: each with what
    two halves of the base model's own tokens give."""
    found: dict[str, Any] = {}
    for model in MODELS:
        dead = int((frame[f"{model}_firings"] == 0).sum())
        low, high = wilson(dead, len(frame))
        found[model] = {
            "tokens": tokens[model],
            "dead": dead,
            "dead_fraction": dead / len(frame),
            "dead_fraction_low": float(low),
            "dead_fraction_high": float(high),
            "silent_density_below": float(wilson(0, max(tokens[model], 1))[1]),
        }
    found["regression"] = regression(frame.base_density, frame.finetuned_density)
    found["regression_all"] = regression(frame.base_density + EPSILON, frame.finetuned_density + EPSILON)
    found["halves_regression"] = regression(frame.density_half_even, frame.density_half_odd)
    found["fraction_shifted"] = float(frame.density_shifted.mean())
    one, other = (wilson(_numpy(part), max(halves.n, 1)) for part in (halves.fires_a, halves.fires_b))
    found["halves_fraction_shifted"] = float(((one[1] < other[0]) | (other[1] < one[0])).mean())
    found["dead_in_one_half"] = int(((halves.fires_a > 0) != (halves.fires_b > 0)).sum())
    return found


def regression(x: pd.Series, y: pd.Series) -> dict[str, float] | None:
    """Least squares of log10 y on log10 x over latents where both are positive: r, slope, intercept, latents."""
    from scipy.stats import linregress

    alive = (x > 0) & (y > 0)
    logs = np.log10(x[alive]), np.log10(y[alive])
    if alive.sum() < 3 or not all(np.ptp(values) > 0 for values in logs):
        return None
    line = linregress(*logs)
    return {
        "r": float(line.rvalue),
        "slope": float(line.slope),
        "intercept": float(line.intercept),
        "latents": int(alive.sum()),
    }
