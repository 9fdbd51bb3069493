"""From the transfer evaluation's results to `metrics/transfer.json`: one flat set of figures for every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.reporting.extract import STATUS_KEY, Figures, is_figure
from sae_research.reporting.shapes import evaluation_status, transfer_results
from sae_research.reporting.transfer_data import MODELS, at
from sae_research.store import round_significant, write_json

QUALITY = ("variance_explained", "r2_flattened", "l0", "fraction_dead", "mse")
LOSSES = ("ce_delta", "loss_recovered", "loss_recovered_mean", "kl", "bits_per_byte_patched")
SIMILARITY = ("cosine", "euclidean", "relative_error", "cka", "cosine_shuffled")
FILTERS = {"kept": "", "all": "_with_outliers"}
LATENTS = ("pearson", "pearson_shuffled", "pearson_halves", "jaccard", "jaccard_shuffled", "density_ratio",
           "logit_correlation")


def extract_transfer(folder: Path, output: Path) -> None:
    """Write `{pair: {metric: value}}` and the stage's status. Raises `UserError` when the folder is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage that writes it, `dvc repro transfer_eval`")
    status = evaluation_status(folder)
    if status["status"] == "disabled":
        write_json(output, {STATUS_KEY: {"status": "disabled"}})
        return
    results = transfer_results(folder)
    message = {"message": status["message"]} if status["status"] != "ok" and status.get("message") else {}
    write_json(output, {**{name: pair_figures(result) for name, result in results.items()},
                        STATUS_KEY: {"status": status["status"], "pairs": len(results), **message}})


def pair_figures(result: dict[str, Any]) -> Figures:
    """Everything a pair is compared by, 4 significant digits; what was not measured has no key."""
    hook = at(result, "setting", "hook") or ""
    here = at(result, "similarity", hook) or {}
    found: dict[str, Any] = {f"{key}{suffix}": at(here, kind, key) for kind, suffix in FILTERS.items() for key in SIMILARITY}
    found["fraction_outliers"] = at(here, "fraction_removed")
    for model in MODELS:
        for kind, suffix in FILTERS.items():
            quality = at(result, "quality", "base", model, kind)
            losses = at(result, "losses", "models", model, kind)
            found |= {f"{model}_{key}{suffix}": at(quality, key) for key in QUALITY}
            found |= {f"{model}_{key}{suffix}": at(losses, "saes", "base", key, "value") for key in LOSSES}
            found[f"{model}_ce_clean{suffix}"] = at(losses, "ce_clean", "value")
    latents = at(result, "latents", "base")
    alive = [*(f"{key}_median" for key in LATENTS), "pearson_above_0.5", "pearson_above_0.9"]
    found |= {key: at(latents, "by_interval", "alive", key) for key in alive}
    found["density_regression_r"] = at(latents, "density_shift", "regression", "r")
    found["density_fraction_shifted"] = at(latents, "density_shift", "fraction_shifted")
    found["density_fraction_shifted_halves"] = at(latents, "density_shift", "halves_fraction_shifted")
    found["clean_kl"] = at(result, "losses", "clean_kl", "value")
    found["weights_relative_change"] = at(result, "moved", "weights", "relative_change")
    found["matched_fraction"] = at(result, "coverage", "matched_fraction")
    found["usable_token_fraction"] = at(result, "tokenizers", "usable_fraction")
    found |= {f"repair_{key}": at(result, "repair", key) for key in (
        "gap", "gap_closed", "tokens_to_half", "gap_after_equal_training")}
    return {key: round_significant(float(value)) for key, value in found.items() if is_figure(value)}
