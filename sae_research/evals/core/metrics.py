"""From sums over tokens to the metrics of a core result, in both definitions, with the intervals of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_research.config.evaluations import AT_HOOK
from sae_research.stats.intervals import Ratio, interval, ratio, stored
from sae_research.stats.predictions import loss_ratios, losses

Sums = dict[str, Any]
"""By quantity: numbers under `sae_bench/` and `lab/`, under `cluster/` lists of one number per cluster. Of a crosscoder with
one hook alone replaced: under `lab@<hook>/` and `cluster@<hook>/`."""


def sums_of(sums: Sums, definition: str) -> Sums:
    """The sums of one definition, under plain names."""
    return {key.partition("/")[2]: value for key, value in sums.items() if key.startswith(f"{definition}/")}


def at_hook(key: str, hook: str) -> str:
    """The name of a metric, or of sums, at one hook of a crosscoder."""
    return f"{key}{AT_HOOK}{hook}"


def sae_bench_predictions(sums: Sums) -> dict[str, dict[str, float]]:
    """SAE Bench's two categories. Its ablation, which puts zeros in place of every token, is the zero run."""
    own = sums_of(sums, "sae_bench")
    loss = losses({**own, "ce_zero": own["ce_ablated"]})
    kl_ablated = losses({**own, "kl_patched": own["kl_ablated"]})["kl"]
    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_ablated - loss["kl"]) / kl_ablated if kl_ablated else math.nan,
            "kl_div_with_ablation": kl_ablated,
            "kl_div_with_sae": loss["kl"],
        },
        "model_performance_preservation": {
            "ce_loss_score": loss["loss_recovered"],
            "ce_loss_with_ablation": loss["ce_zero_ablated"],
            "ce_loss_with_sae": loss["ce_patched"],
            "ce_loss_without_sae": loss["ce_clean"],
        },
    }


def minus_one_for_nan(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """SAE Bench's own mark for a metric that is not a number, in its block only: JSON has no NaN."""
    return {
        category: {key: value if math.isfinite(value) else -1.0 for key, value in values.items()}
        for category, values in metrics.items()
    }


def evidence(
    sparsity: dict[str, list[float]],
    sums: Sums,
    sparsity_about: dict[str, Any],
    predictions_about: dict[str, Any],
    seed: int,
    hooks: Sequence[str] = (),
) -> dict[str, Any]:
    """What `lab_v1` holds on how sure its metrics are: intervals, and the sums by cluster behind them.

    hooks: a crosscoder's. Fractions of latents (alive, densities) get none: a resample repeats tokens and so always finds
    fewer latents.
    """
    figures = {
        **{key: ("sparsity", figure) for key, figure in _reconstruction_ratios(sparsity).items()},
        **{key: ("predictions", figure) for key, figure in _prediction_ratios(sums, "cluster").items()},
    }
    for part, hook in enumerate(hooks):
        of_hook = {"variance_explained": ("sparsity", _explained(sparsity, f"@{part}"))}
        of_hook |= {key: ("predictions", one) for key, one in _prediction_ratios(sums, at_hook("cluster", hook)).items()}
        figures |= {at_hook(key, hook): one for key, one in of_hook.items()}
    figures = {key: (part, figure) for key, (part, figure) in figures.items() if len(figure.numerator)}
    intervals = {key: interval(figure, seed) for key, (_, figure) in figures.items()}
    return {
        "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
        "clusters": {"sparsity": sparsity_about, "predictions": predictions_about},
        "cluster_sums": {key: stored(figure, part) for key, (part, figure) in figures.items()},
    }


def _reconstruction_ratios(sums: dict[str, list[float]]) -> dict[str, Ratio]:
    return {
        "l0": ratio(sums["l0"], sums["tokens"]),
        "variance_explained": _explained(sums),
        "cosine_about_mean": ratio(sums["cosine"], sums["tokens"]),
        "bias_about_mean": ratio(sums["rebuilt"], sums["shared"]),
    }


def _explained(sums: dict[str, list[float]], part: str = "") -> Ratio:
    total = sums[f"total{part}"]
    return ratio(np.subtract(total, sums[f"residual{part}"]), total)


def about_mean(sums: dict[str, list[float]]) -> dict[str, float]:
    """Cosine and relative bias of what activations and reconstructions are beyond the mean activation; without those that
    have no meaning, because no token counted or no reconstruction moved."""
    figures = _reconstruction_ratios(sums)
    values = {key: figures[key].value for key in ("cosine_about_mean", "bias_about_mean")}
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _prediction_ratios(sums: Sums, name: str) -> dict[str, Ratio]:
    """Metrics of predictions as ratios of the sums by cluster under `name`."""
    ratios = loss_ratios({key: np.asarray(value) for key, value in sums_of(sums, name).items()})
    return {key: ratio(*ratios[key]) for key in ("kl", "ce_delta", "loss_recovered", "loss_recovered_mean_ablation")}
