"""From sums over tokens to the figures of a core result, in both definitions, and how sure ours are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sae_research.stats.intervals import Ratio, interval, ratio, stored

Sums = dict[str, Any]
"""By quantity: numbers under `sae_bench/` and `lab/`, under `cluster/` lists of one number per cluster."""


def _mean(sums: Sums, definition: str, quantity: str, run: str) -> float:
    count = sums[f"{definition}/{quantity}_tokens"]
    return sums[f"{definition}/{quantity}_{run}"] / count if count else math.nan


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def sae_bench_predictions(sums: Sums) -> dict[str, dict[str, float]]:
    ce = {run: _mean(sums, "sae_bench", "ce", run) for run in ("clean", "ablated", "patched")}
    kl = {run: _mean(sums, "sae_bench", "kl", run) for run in ("ablated", "patched")}
    return {
        "model_behavior_preservation": {
            "kl_div_score": _ratio(kl["ablated"] - kl["patched"], kl["ablated"]),
            "kl_div_with_ablation": kl["ablated"],
            "kl_div_with_sae": kl["patched"],
        },
        "model_performance_preservation": {
            "ce_loss_score": _ratio(ce["ablated"] - ce["patched"], ce["ablated"] - ce["clean"]),
            "ce_loss_with_ablation": ce["ablated"],
            "ce_loss_with_sae": ce["patched"],
            "ce_loss_without_sae": ce["clean"],
        },
    }


def minus_one_for_nan(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """SAE Bench's own mark for a figure that is not a number, in its block only: JSON has no NaN."""
    return {
        category: {key: value if math.isfinite(value) else -1.0 for key, value in values.items()}
        for category, values in metrics.items()
    }


def lab_predictions(sums: Sums) -> dict[str, float]:
    """ΔCE and KL in nats per predicted token; loss recovered as SAE Bench's score, over zero- and mean-ablation."""
    ce = {run: _mean(sums, "lab", "ce", run) for run in ("clean", "zero", "mean", "patched")}
    return {
        "kl": _mean(sums, "lab", "kl", "patched"),
        "ce_clean": ce["clean"],
        "ce_patched": ce["patched"],
        "ce_delta": ce["patched"] - ce["clean"],
        "ce_zero_ablated": ce["zero"],
        "ce_mean_ablated": ce["mean"],
        "loss_recovered": _ratio(ce["zero"] - ce["patched"], ce["zero"] - ce["clean"]),
        "loss_recovered_mean_ablation": _ratio(ce["mean"] - ce["patched"], ce["mean"] - ce["clean"]),
    }


def evidence(
    sparsity: dict[str, list[float]],
    sums: Sums,
    sparsity_about: dict[str, Any],
    predictions_about: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What `lab_v1` holds on how sure its figures are: intervals, and the sums by cluster behind them.

    Fractions of latents (alive, densities) get none: a resample repeats tokens and so always finds fewer latents.
    """
    figures = {
        **{key: ("sparsity", figure) for key, figure in _reconstruction_ratios(sparsity).items()},
        **{key: ("predictions", figure) for key, figure in _prediction_ratios(sums).items()},
    }
    figures = {key: (part, figure) for key, (part, figure) in figures.items() if len(figure.numerator)}
    intervals = {key: interval(figure, seed) for key, (_, figure) in figures.items()}
    return {
        "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
        "clusters": {"sparsity": sparsity_about, "predictions": predictions_about},
        "cluster_sums": {key: stored(figure, part) for key, (part, figure) in figures.items()},
    }


def _reconstruction_ratios(sums: dict[str, list[float]]) -> dict[str, Ratio]:
    explained = np.subtract(sums["total"], sums["residual"])
    return {
        "l0": ratio(sums["l0"], sums["tokens"]),
        "variance_explained": ratio(explained, sums["total"]),
        "cosine_about_mean": ratio(sums["cosine"], sums["tokens"]),
        "bias_about_mean": ratio(sums["rebuilt"], sums["shared"]),
    }


def about_mean(sums: dict[str, list[float]]) -> dict[str, float]:
    """Cosine and relative bias of what activations and reconstructions are beyond the mean activation; without those that
    have no meaning, because no token counted or no reconstruction moved."""
    figures = _reconstruction_ratios(sums)
    values = {key: figures[key].value for key in ("cosine_about_mean", "bias_about_mean")}
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _prediction_ratios(sums: Sums) -> dict[str, Ratio]:
    """The figures of `lab_predictions` as ratios of sums by cluster."""
    ce = {run: np.asarray(sums[f"cluster/ce_{run}"]) for run in ("clean", "zero", "mean", "patched")}
    return {
        "kl": ratio(sums["cluster/kl_patched"], sums["cluster/kl_tokens"]),
        "ce_delta": ratio(ce["patched"] - ce["clean"], sums["cluster/ce_tokens"]),
        "loss_recovered": ratio(ce["zero"] - ce["patched"], ce["zero"] - ce["clean"]),
        "loss_recovered_mean_ablation": ratio(ce["mean"] - ce["patched"], ce["mean"] - ce["clean"]),
    }
