"""The one table of metrics: what each is called, means, comes from, and which way it should point.

Extraction, plots, `METRICS.md` and `results.csv` are all driven by `METRICS`. A metric that comes for several
values of k is one record whose key holds `{k}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

EVALS = ("core", "sparse_probing", "scr", "tpp", "absorption", "unlearning")
"""The six evaluations, in the order of every table."""

LAB = "lab_v1"
SAE_BENCH = "sae_bench_0.6.0"
STOCK_SUFFIX = "_sae_bench"
"""Marks a figure of SAE Bench's own definition where ours stands beside it."""

Definition = Literal["lab_v1", "sae_bench_0.6.0"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    key: str
    """Its name in `metrics/*.json`; may hold `{k}`."""
    label: str
    """How tables and axes call it."""
    eval: str
    better: Literal["higher", "lower"] | None
    """Which way an SAE should push it; None where neither is a virtue."""
    definition: str
    """One sentence; may hold `{k}`."""
    source: str | None = None
    """`category.name` in SAE Bench's structured block; None for ours, which stands under `key` in lab_v1."""

    @property
    def version(self) -> Definition:
        """Whose definition this is."""
        return LAB if self.source is None else SAE_BENCH

    @property
    def base_key(self) -> str:
        """The key without the suffix that marks SAE Bench's definition."""
        return self.key.removesuffix(STOCK_SUFFIX)

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


METRICS: tuple[Metric, ...] = (
    # --- core, our definitions -----------------------------------------------------------------
    Metric(
        "l0",
        "L0",
        "core",
        None,
        "Mean number of latents with a non-zero activation per token; for IHTP that is the whole support.",
    ),
    Metric(
        "variance_explained",
        "Variance explained",
        "core",
        "higher",
        "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², with x̄ the mean activation over all tokens that count.",
    ),
    Metric(
        "variance_explained_per_dim",
        "Variance explained, mean over dimensions",
        "core",
        "higher",
        "The same for each dimension, then averaged: one dimension of large variance cannot carry it.",
    ),
    Metric(
        "loss_recovered",
        "Loss recovered",
        "core",
        "higher",
        "(CE zero-ablated − CE patched) / (CE zero-ablated − CE clean): 1 is the clean model.",
    ),
    Metric(
        "loss_recovered_mean_ablation",
        "Loss recovered over mean-ablation",
        "core",
        "higher",
        "As loss recovered, with the mean activation instead of zero: a stricter reference.",
    ),
    Metric(
        "ce_delta",
        "ΔCE",
        "core",
        "lower",
        "Cross-entropy of the patched model minus that of the clean model, in nats per token.",
    ),
    Metric(
        "kl",
        "KL",
        "core",
        "lower",
        "Mean over tokens of KL(clean ‖ patched) of the next-token distributions, in nats.",
    ),
    Metric(
        "fraction_alive",
        "Fraction alive",
        "core",
        "higher",
        "Fraction of latents that are non-zero on at least one token of the evaluation.",
    ),
    Metric(
        "cosine_similarity",
        "Cosine similarity",
        "core",
        "higher",
        "Mean cosine between activation and reconstruction.",
    ),
    Metric("mse", "MSE", "core", "lower", "Mean over tokens and dimensions of (x − x̂)²."),
    Metric("l2_ratio", "L2 ratio", "core", None, "Mean of ‖x̂‖ / ‖x‖; below 1 the reconstruction is shrunk."),
    Metric(
        "relative_reconstruction_bias",
        "Relative reconstruction bias",
        "core",
        None,
        "Mean ‖x̂‖² / mean x·x̂; 1 is unbiased, below 1 is shrunk.",
    ),
    Metric("l1", "L1", "core", None, "Mean sum of absolute activations of latents per token."),
    Metric("support", "Support", "core", None, "Mean number of distinct latents that one sequence uses."),
    Metric("ce_clean", "CE clean", "core", None, "Cross-entropy of the unedited model, in nats per token."),
    Metric(
        "ce_patched",
        "CE patched",
        "core",
        "lower",
        "Cross-entropy with the SAE's reconstruction in place, in nats per token.",
    ),
    Metric(
        "ce_zero_ablated",
        "CE zero-ablated",
        "core",
        None,
        "Cross-entropy with zeros in place of the activations, in nats per token.",
    ),
    Metric(
        "ce_mean_ablated",
        "CE mean-ablated",
        "core",
        None,
        "Cross-entropy with the mean activation in place of the activations, in nats per token.",
    ),
    Metric(
        "fraction_tokens_kept",
        "Fraction of tokens kept",
        "core",
        None,
        "Fraction of tokens that count: neither special, padding, first position nor of outlier norm.",
    ),
    Metric("tokens", "Tokens", "core", None, "Tokens that count in this evaluation."),
    # --- core, SAE Bench's definitions ---------------------------------------------------------
    Metric(
        "l0_sae_bench",
        "L0",
        "core",
        None,
        "Mean number of non-zero activations per token, over SAE Bench's positions.",
        "sparsity.l0",
    ),
    Metric(
        "variance_explained_sae_bench",
        "Variance explained",
        "core",
        "higher",
        "Taken about zero rather than about the mean: predicting the mean activation already scores high, "
        "and values above 1 or below 0 can occur.",
        "reconstruction_quality.explained_variance",
    ),
    Metric(
        "variance_explained_legacy_sae_bench",
        "Variance explained, legacy",
        "core",
        "higher",
        "Mean over tokens of 1 − ‖x − x̂‖² / ‖x − batch mean‖²: the figure of the paper and the leaderboard.",
        "reconstruction_quality.explained_variance_legacy",
    ),
    Metric(
        "loss_recovered_sae_bench",
        "Loss recovered",
        "core",
        "higher",
        "`ce_loss_score`: the same formula over SAE Bench's positions.",
        "model_performance_preservation.ce_loss_score",
    ),
    Metric(
        "kl_sae_bench",
        "KL",
        "core",
        "lower",
        "`kl_div_with_sae`: log of softmax, which underflows; the value is absent where it did.",
        "model_behavior_preservation.kl_div_with_sae",
    ),
    Metric(
        "kl_score_sae_bench",
        "KL score",
        "core",
        "higher",
        "`kl_div_score`: (KL zero-ablated − KL patched) / KL zero-ablated.",
        "model_behavior_preservation.kl_div_score",
    ),
    Metric(
        "fraction_alive_sae_bench",
        "Fraction alive",
        "core",
        "higher",
        "Counts positive activations only, so a signed code looks less alive than it is.",
        "misc_metrics.frac_alive",
    ),
    Metric(
        "cosine_similarity_sae_bench",
        "Cosine similarity",
        "core",
        "higher",
        "Mean cosine over SAE Bench's positions.",
        "reconstruction_quality.cossim",
    ),
    Metric(
        "mse_sae_bench",
        "MSE",
        "core",
        "lower",
        "Summed squared error divided by the tokens of a batch, so it scales with the batch.",
        "reconstruction_quality.mse",
    ),
    Metric(
        "l2_ratio_sae_bench",
        "L2 ratio",
        "core",
        None,
        "Mean of ‖x̂‖ / ‖x‖ over SAE Bench's positions.",
        "shrinkage.l2_ratio",
    ),
    Metric(
        "relative_reconstruction_bias_sae_bench",
        "Relative reconstruction bias",
        "core",
        None,
        "Per batch, then averaged.",
        "shrinkage.relative_reconstruction_bias",
    ),
    Metric(
        "l1_sae_bench",
        "L1",
        "core",
        None,
        "Sum of activations without absolute values, so signs cancel.",
        "sparsity.l1",
    ),
    # --- sparse probing ------------------------------------------------------------------------
    Metric(
        "sae_top_{k}_accuracy",
        "Probing top-{k}",
        "sparse_probing",
        "higher",
        "Mean test accuracy over tasks of a logistic probe on the {k} latents chosen on the training split.",
    ),
    Metric(
        "llm_top_{k}_accuracy",
        "Residual stream top-{k}",
        "sparse_probing",
        None,
        "The same on the {k} dimensions of the raw residual stream: the reference for the column above.",
    ),
    Metric(
        "sae_full_accuracy",
        "Probing, all latents",
        "sparse_probing",
        "higher",
        "Mean test accuracy over tasks of an L2 logistic regression on all latents.",
    ),
    Metric(
        "llm_full_accuracy",
        "Residual stream, all dimensions",
        "sparse_probing",
        None,
        "Mean test accuracy over tasks of an L2 logistic regression on the whole raw residual stream.",
    ),
    Metric(
        "sae_top_{k}_accuracy_sae_bench",
        "Probing top-{k}",
        "sparse_probing",
        "higher",
        "The same texts with SAE Bench's vectors: every token counts but BOS, EOS and padding, sinks included.",
        "sae.sae_top_{k}_test_accuracy",
    ),
    Metric(
        "llm_top_{k}_accuracy_sae_bench",
        "Residual stream top-{k}",
        "sparse_probing",
        None,
        "SAE Bench's probe on {k} dimensions of the raw residual stream.",
        "llm.llm_top_{k}_test_accuracy",
    ),
    Metric(
        "sae_full_accuracy_sae_bench",
        "Probing, all latents",
        "sparse_probing",
        "higher",
        "The highest test accuracy over training epochs, so the test set chooses the epoch.",
        "sae.sae_test_accuracy",
    ),
    Metric(
        "llm_full_accuracy_sae_bench",
        "Residual stream, all dimensions",
        "sparse_probing",
        None,
        "The highest test accuracy over training epochs on the whole residual stream.",
        "llm.llm_test_accuracy",
    ),
    # --- the four optional evaluations, in SAE Bench's definitions -----------------------------
    Metric(
        "scr_metric_threshold_{k}",
        "SCR, {k} latents",
        "scr",
        "higher",
        "Share of a spurious correlation removed by ablating {k} latents; direction with the lower accuracy.",
        "scr_metrics.scr_metric_threshold_{k}",
    ),
    Metric(
        "scr_dir1_threshold_{k}",
        "SCR direction 1, {k} latents",
        "scr",
        "higher",
        "The same, first direction.",
        "scr_metrics.scr_dir1_threshold_{k}",
    ),
    Metric(
        "scr_dir2_threshold_{k}",
        "SCR direction 2, {k} latents",
        "scr",
        "higher",
        "The same, second direction.",
        "scr_metrics.scr_dir2_threshold_{k}",
    ),
    Metric(
        "tpp_threshold_{k}_total_metric",
        "TPP, {k} latents",
        "tpp",
        "higher",
        "Accuracy lost on the targeted class minus that on the others when {k} latents are ablated.",
        "tpp_metrics.tpp_threshold_{k}_total_metric",
    ),
    Metric(
        "tpp_threshold_{k}_intended_diff_only",
        "TPP intended effect, {k} latents",
        "tpp",
        "higher",
        "Accuracy lost on the targeted class.",
        "tpp_metrics.tpp_threshold_{k}_intended_diff_only",
    ),
    Metric(
        "tpp_threshold_{k}_unintended_diff_only",
        "TPP unintended effect, {k} latents",
        "tpp",
        "lower",
        "Accuracy lost on the other classes.",
        "tpp_metrics.tpp_threshold_{k}_unintended_diff_only",
    ),
    Metric(
        "mean_absorption_fraction_score",
        "Absorption fraction",
        "absorption",
        "lower",
        "Mean over letters of the share of the first-letter direction that other latents carry.",
        "mean.mean_absorption_fraction_score",
    ),
    Metric(
        "mean_full_absorption_score",
        "Full absorption",
        "absorption",
        "lower",
        "Mean over letters of the rate of words where another latent carries it wholly.",
        "mean.mean_full_absorption_score",
    ),
    Metric(
        "mean_num_split_features",
        "Split latents",
        "absorption",
        "lower",
        "Mean number of latents over which a first letter is split.",
        "mean.mean_num_split_features",
    ),
    Metric(
        "unlearning_score",
        "Unlearning",
        "unlearning",
        "higher",
        "Knowledge removed from the targeted field while the rest of the model's accuracy is kept.",
        "unlearning.unlearning_score",
    ),
)

HEADLINE = (
    "l0",
    "variance_explained",
    "loss_recovered",
    "ce_delta",
    "kl",
    "fraction_alive",
    "sae_top_1_accuracy",
    "sae_top_5_accuracy",
)
"""Columns of the report's first table."""

PLOTTED = ("loss_recovered", "variance_explained", "kl", "sae_top_1_accuracy", "sae_top_5_accuracy")
"""What is drawn against L0."""

RESIDUAL_BASELINE = {f"sae_top_{k}_accuracy": f"llm_top_{k}_accuracy" for k in (1, 5)}
"""The raw residual stream's figure that a probing plot draws as a line."""


@cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\{k\}", r"(?P<k>\d+)"))


def metric_named(key: str, eval_name: str) -> Metric:
    """The record of a concrete key, `{k}` filled in: `sae_top_5_accuracy` -> label "Probing top-5".

    A figure that an evaluation reports and the table does not know is described by its own name.
    """
    for metric in METRICS:
        match = _pattern(metric.key).fullmatch(key) if metric.eval == eval_name else None
        if match:
            k = match.groupdict().get("k")
            return metric if k is None else _with_k(metric, k)
    return Metric(key, key.replace("_", " "), eval_name, None, "Not described in the table of metrics.")


def _with_k(metric: Metric, k: str) -> Metric:
    filled = {field: getattr(metric, field).replace("{k}", k) for field in ("key", "label", "definition")}
    return replace(metric, **filled, source=metric.source and metric.source.replace("{k}", k))


def headline(key: str) -> Metric:
    """The record of a core or probing metric, by its concrete key."""
    eval_name = "sparse_probing" if key.startswith(("sae_", "llm_")) else "core"
    return metric_named(key, eval_name)


def sort_keys(keys: Iterable[str], eval_name: str) -> list[str]:
    """Keys in the table's order, `{k}` by number, unknown ones last: ours first, SAE Bench's after."""
    order = [metric.key for metric in METRICS if metric.eval == eval_name]

    def rank(key: str) -> tuple[int, int, str]:
        for position, pattern in enumerate(order):
            match = _pattern(pattern).fullmatch(key)
            if match:
                return position, int(match.groupdict().get("k") or 0), key
        return len(order), 0, key

    return sorted(keys, key=rank)
