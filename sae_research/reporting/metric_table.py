"""What one metric is: its name, meaning, source in a result file, and which way it should point.

The table of metrics: one record each, by evaluation, ours first and SAE Bench's after. Extraction, tables and pictures
follow from it: every metric stands in `metrics/<eval>.json` and `metrics/results.csv`, in the report's section of an
optional evaluation, and where `table` and `plot` say so in the first table and among the pictures.

`Metric(key, label, eval, better, definition)` is a metric of ours, found under `key` in `lab_v1.metrics`; a last
argument `"category.name"` makes it SAE Bench's, found there in its structured block. A key may hold `{k}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAB = "lab_v1"
SAE_BENCH = "sae_bench_0.6.0"
SAE_BENCH_SUFFIX = "_sae_bench"
"""Marks a metric of SAE Bench's own definition where ours stands beside it."""

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
    trivial: tuple[float, str] | None = None
    """The value that is reached without any SAE, and by what; None where there is no such value."""
    table: bool = False
    """Whether it is a column of the report's first table, for a `{k}` at the values of k that lead."""
    plot: int = 0
    """Its place among the pictures of a metric against L0, from 1; 0: not drawn. The first four make the overview."""
    ranks: bool = True
    """Whether a column of the first table ranks SAEs: beside controls, and in the picture of equal L0."""
    stricter: bool = False
    """Whether it is a column of the report's table of stricter references."""
    both: bool = False
    """Of SAE Bench's: whether it stands beside ours in the report's table of both definitions."""
    log: bool = False
    """Whether pictures show it on a logarithmic axis, where all its values are above 0."""
    floor: float = -math.inf
    """Pictures draw lower values here, the number beside them: one bad control must not flatten the rest."""

    @property
    def version(self) -> Definition:
        """Whose definition this is."""
        return LAB if self.source is None else SAE_BENCH

    @property
    def base_key(self) -> str:
        """The key without the suffix that marks SAE Bench's definition."""
        return self.key.removesuffix(SAE_BENCH_SUFFIX)

    @property
    def full_label(self) -> str:
        """The label, told from ours where it is SAE Bench's metric beside it."""
        return self.label + (" (SAE Bench)" if self.key.endswith(SAE_BENCH_SUFFIX) else "")

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


# a table, not formatted as code
# fmt: off
METRICS: tuple[Metric, ...] = (
    # --- core, our definitions -----------------------------------------------------------------------
    Metric("l0", "L0", "core", None,
           "Mean number of latents with a non-zero activation per token; for IHTP that is the whole support.",
           table=True),
    Metric("variance_explained", "Variance explained", "core", "higher",
           "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², with x̄ the mean activation over all tokens that count.",
           table=True, plot=1, stricter=True, floor=-0.25),
    Metric("variance_explained_per_dim", "Variance explained, mean over dimensions", "core", "higher",
           "The same for each dimension, then averaged: one dimension of large variance cannot carry it.",
           stricter=True),
    Metric("loss_recovered", "Loss recovered", "core", "higher",
           "(CE zero-ablated − CE patched) / (CE zero-ablated − CE clean): 1 is the clean model.",
           table=True, plot=2, stricter=True, floor=-0.25),
    Metric("loss_recovered_mean_ablation", "Loss recovered over mean-ablation", "core", "higher",
           "As loss recovered, with the mean activation instead of zero: a stricter reference.",
           stricter=True),
    Metric("ce_delta", "ΔCE", "core", "lower",
           "Cross-entropy of the patched model minus that of the clean model, in nats per token.", table=True, log=True),
    Metric("kl", "KL", "core", "lower",
           "Mean over tokens of KL(clean ‖ patched) of the next-token distributions, in nats.",
           table=True, plot=3, log=True),
    Metric("fraction_alive", "Fraction alive", "core", "higher",
           "Fraction of latents that are non-zero on at least one token of the evaluation.",
           table=True, ranks=False),
    Metric("cosine_similarity", "Cosine similarity", "core", "higher",
           "Mean cosine between activation and reconstruction."),
    Metric("cosine_about_mean", "Cosine about the mean", "core", "higher",
           "Mean cosine between what activation and reconstruction are beyond the mean activation: predicting the mean has "
           "none, where about zero it scores high.", stricter=True),
    Metric("mse", "MSE", "core", "lower", "Mean over tokens and dimensions of (x − x̂)²."),
    Metric("l2_ratio", "L2 ratio", "core", None,
           "Mean of ‖x̂‖ / ‖x‖. A projection is below 1 without being shrunk: shrinkage shows in the bias."),
    Metric("relative_reconstruction_bias", "Relative reconstruction bias", "core", None,
           "Mean ‖x̂‖² / mean x·x̂; 1 is unbiased, below 1 is shrunk."),
    Metric("bias_about_mean", "Relative bias about the mean", "core", None,
           "Mean ‖x̂ − x̄‖² / mean (x − x̄)·(x̂ − x̄), with x̄ the mean activation, which hides shrinkage where it is large.",
           stricter=True),
    Metric("l1", "L1", "core", None, "Mean sum of absolute activations of latents per token."),
    Metric("support", "Support", "core", None, "Mean number of distinct latents that one sequence uses."),
    Metric("ce_clean", "CE clean", "core", None, "Cross-entropy of the unedited model, in nats per token."),
    Metric("ce_patched", "CE patched", "core", "lower",
           "Cross-entropy with the SAE's reconstruction in place, in nats per token."),
    Metric("ce_zero_ablated", "CE zero-ablated", "core", None,
           "Cross-entropy with zeros in place of the activations, in nats per token."),
    Metric("ce_mean_ablated", "CE mean-ablated", "core", None,
           "Cross-entropy with the mean activation in place of the activations, in nats per token."),
    Metric("fraction_tokens_kept", "Fraction of tokens kept", "core", None,
           "Fraction of tokens that count: neither special, padding, first position nor of outlier norm."),
    Metric("tokens", "Tokens", "core", None, "Tokens that count in this evaluation."),
    # --- core, SAE Bench's definitions ---------------------------------------------------------------
    Metric("l0_sae_bench", "L0", "core", None,
           "Mean number of non-zero activations per token, over SAE Bench's positions.", "sparsity.l0",
           both=True),
    Metric("variance_explained_sae_bench", "Variance explained", "core", "higher",
           "Taken about zero rather than about the mean: predicting the mean activation already scores high, and "
           "values above 1 or below 0 can occur.", "reconstruction_quality.explained_variance", both=True),
    Metric("variance_explained_legacy_sae_bench", "Variance explained, legacy", "core", "higher",
           "Mean over tokens of 1 − ‖x − x̂‖² / ‖x − batch mean‖²: the figure of the paper and the leaderboard.",
           "reconstruction_quality.explained_variance_legacy", both=True),
    Metric("loss_recovered_sae_bench", "Loss recovered", "core", "higher",
           "`ce_loss_score`: the same formula over SAE Bench's positions.",
           "model_performance_preservation.ce_loss_score", both=True),
    Metric("kl_sae_bench", "KL", "core", "lower",
           "`kl_div_with_sae`: log of softmax, which underflows; the value is absent where it did.",
           "model_behavior_preservation.kl_div_with_sae", both=True),
    Metric("kl_score_sae_bench", "KL score", "core", "higher",
           "`kl_div_score`: (KL zero-ablated − KL patched) / KL zero-ablated.",
           "model_behavior_preservation.kl_div_score"),
    Metric("fraction_alive_sae_bench", "Fraction alive", "core", "higher",
           "Counts positive activations only, so a signed code looks less alive than it is.", "misc_metrics.frac_alive",
           both=True),
    Metric("cosine_similarity_sae_bench", "Cosine similarity", "core", "higher",
           "Mean cosine over SAE Bench's positions.", "reconstruction_quality.cossim"),
    Metric("mse_sae_bench", "MSE", "core", "lower",
           "Summed squared error divided by the tokens of a batch, so it scales with the batch.",
           "reconstruction_quality.mse"),
    Metric("l2_ratio_sae_bench", "L2 ratio", "core", None, "Mean of ‖x̂‖ / ‖x‖ over SAE Bench's positions.",
           "shrinkage.l2_ratio"),
    Metric("relative_reconstruction_bias_sae_bench", "Relative reconstruction bias", "core", None,
           "Per batch, then averaged.", "shrinkage.relative_reconstruction_bias"),
    Metric("l1_sae_bench", "L1", "core", None, "Sum of activations without absolute values, so signs cancel.",
           "sparsity.l1"),
    # --- sparse probing ------------------------------------------------------------------------------
    Metric("sae_top_{k}_accuracy", "Probing top-{k}", "sparse_probing", "higher",
           "Mean test accuracy over tasks of a logistic probe on the {k} latents chosen on the training split.",
           table=True, plot=4),
    Metric("llm_top_{k}_accuracy", "Residual stream top-{k}", "sparse_probing", None,
           "The same on the {k} dimensions of the raw residual stream: the reference for the column above."),
    Metric("sae_full_accuracy", "Probing, all latents", "sparse_probing", "higher",
           "Mean test accuracy over tasks of an L2 logistic regression on all latents."),
    Metric("llm_full_accuracy", "Residual stream, all dimensions", "sparse_probing", None,
           "Mean test accuracy over tasks of an L2 logistic regression on the whole raw residual stream."),
    Metric("sae_top_{k}_accuracy_sae_bench", "Probing top-{k}", "sparse_probing", "higher",
           "The same texts with SAE Bench's vectors: every token counts but BOS, EOS and padding, sinks included.",
           "sae.sae_top_{k}_test_accuracy"),
    Metric("llm_top_{k}_accuracy_sae_bench", "Residual stream top-{k}", "sparse_probing", None,
           "SAE Bench's probe on {k} dimensions of the raw residual stream.", "llm.llm_top_{k}_test_accuracy"),
    Metric("sae_full_accuracy_sae_bench", "Probing, all latents", "sparse_probing", "higher",
           "The highest test accuracy over training epochs, so the test set chooses the epoch.", "sae.sae_test_accuracy"),
    Metric("llm_full_accuracy_sae_bench", "Residual stream, all dimensions", "sparse_probing", None,
           "The highest test accuracy over training epochs on the whole residual stream.", "llm.llm_test_accuracy"),
    # --- spurious correlation removal and targeted probe perturbation --------------------------------
    Metric("scr_metric_threshold_{k}", "SCR, {k} latents", "scr", "higher",
           "Accuracy that ablating {k} latents gives back to a biased probe, over the accuracy its bias cost, both summed "
           "over tasks; of the attribute that the probe neglects, as told on training texts."),
    Metric("scr_dir1_threshold_{k}", "SCR direction 1, {k} latents", "scr", "higher",
           "The same, always reading the first attribute and ablating the second; tasks without a loss are left out."),
    Metric("scr_dir2_threshold_{k}", "SCR direction 2, {k} latents", "scr", "higher",
           "The same, always reading the second attribute and ablating the first; tasks without a loss are left out."),
    Metric("scr_metric_threshold_{k}_sae_bench", "SCR, {k} latents", "scr", "higher",
           "Mean over tasks of the ratio, 0 where the bias cost nothing, of the attribute with the lower test accuracy; "
           "latents of padding and special positions enter, probes keep their best epoch on test texts.",
           "scr_metrics.scr_metric_threshold_{k}"),
    Metric("scr_dir1_threshold_{k}_sae_bench", "SCR direction 1, {k} latents", "scr", "higher",
           "The same, first direction.", "scr_metrics.scr_dir1_threshold_{k}"),
    Metric("scr_dir2_threshold_{k}_sae_bench", "SCR direction 2, {k} latents", "scr", "higher",
           "The same, second direction.", "scr_metrics.scr_dir2_threshold_{k}"),
    Metric("tpp_threshold_{k}_total_metric", "TPP, {k} latents", "tpp", "higher",
           "Accuracy that a class's probe loses when {k} of that class's latents are ablated, less what the other classes' "
           "probes lose on average; mean over classes and tasks."),
    Metric("tpp_threshold_{k}_intended_diff_only", "TPP intended effect, {k} latents", "tpp", "higher",
           "Accuracy lost by the class's own probe."),
    Metric("tpp_threshold_{k}_unintended_diff_only", "TPP unintended effect, {k} latents", "tpp", "lower",
           "Accuracy lost by the other classes' probes."),
    Metric("tpp_threshold_{k}_total_metric_sae_bench", "TPP, {k} latents", "tpp", "higher",
           "The same with SAE Bench's vectors and probes: latents of padding and special positions enter, negative "
           "activations are dropped, probes keep their best epoch on test texts.",
           "tpp_metrics.tpp_threshold_{k}_total_metric"),
    Metric("tpp_threshold_{k}_intended_diff_only_sae_bench", "TPP intended effect, {k} latents", "tpp", "higher",
           "Accuracy lost by the class's own probe.", "tpp_metrics.tpp_threshold_{k}_intended_diff_only"),
    Metric("tpp_threshold_{k}_unintended_diff_only_sae_bench", "TPP unintended effect, {k} latents", "tpp", "lower",
           "Accuracy lost by the other classes' probes.", "tpp_metrics.tpp_threshold_{k}_unintended_diff_only"),
    # --- absorption ----------------------------------------------------------------------------------
    Metric("absorption_fraction", "Absorption fraction", "absorption", "lower",
           "Mean over letters of how much of the first-letter direction other latents carry in place of the letter's main "
           "ones, on words where a probe finds the letter; says little where the main latents' F1 is low, and for models "
           "below about 1B parameters."),
    Metric("full_absorption", "Full absorption", "absorption", "lower",
           "Mean over letters of the rate of words where no main latent fires and one other carries the letter."),
    Metric("split_latents", "Split latents", "absorption", None,
           "Mean number of main latents a letter has: further ones count while each adds more than the threshold to F1."),
    Metric("main_latents_f1", "Main latents' F1", "absorption", "higher",
           "Mean over letters of the F1, on test words, of a logistic probe on the letter's main latents."),
    Metric("probe_f1", "Probe F1", "absorption", None,
           "The same for the probe on the model's own activations, for the letters that qualify: the reference."),
    Metric("letters", "Letters", "absorption", None,
           "First letters that qualify: the probe on the model's activations finds them on unseen words."),
    Metric("words", "Words", "absorption", None,
           "Test words on which that probe finds their letter: what absorption is measured on."),
    Metric("absorption_fraction_sae_bench", "Absorption fraction", "absorption", "lower",
           "Signed weights and positive directions only, against the projection of the whole activation, decoder bias "
           "included; the number of main latents is picked on the test words.", "mean.mean_absorption_fraction_score"),
    Metric("full_absorption_sae_bench", "Full absorption", "absorption", "lower",
           "A main latent with a negative activation counts as silent.", "mean.mean_full_absorption_score"),
    Metric("split_latents_sae_bench", "Split latents", "absorption", None,
           "`mean_num_split_features`: picked by F1 on the test words.", "mean.mean_num_split_features"),
    # --- unlearning ----------------------------------------------------------------------------------
    Metric("unlearning_score", "Unlearning", "unlearning", "higher",
           "1 − the least share of known questions of one field still answered rightly after clamping a few latents, over "
           "the settings that keep at least 99 % of the other fields' known answers; 0 where none does. With the packaged "
           "questions (the default) a stand-in for WMDP and MMLU, not comparable with published scores.",
           trivial=(0.0, "clamping nothing")),
    Metric("unlearning_score_held_out", "Unlearning, held out", "unlearning", "higher",
           "The same with the setting chosen on one half of the questions and measured on the other: the mean over 20 "
           "halvings, both ways. The score itself is the best of many settings on its own questions."),
    Metric("retain_accuracy_held_out", "Kept answers, held out", "unlearning", "higher",
           "Share of the other fields' known answers kept, likewise on the halves that chose nothing."),
    Metric("forget_questions", "Questions to forget", "unlearning", None,
           "Questions of the targeted field that the model knows and is asked again."),
    Metric("retain_questions", "Questions to keep", "unlearning", None, "The same of the other fields."),
    Metric("unlearning_score_sae_bench", "Unlearning", "unlearning", "higher",
           "A latent is active above zero only, special tokens but the first are edited too, and densities count every "
           "token but BOS, EOS and padding. By default on the same stand-in.", "unlearning.unlearning_score"),
    # --- k-sparse probing on sae-probes --------------------------------------------------------------
    Metric("sae_probes_top_{k}_accuracy", "sae-probes top-{k}", "sparse_probing_sae_probes", "higher",
           "Mean test accuracy over binary tasks of an l1 logistic probe on {k} latents at a text's last token that counts; "
           "no text, nor a copy of it, is in both train and test."),
    Metric("sae_probes_top_{k}_auc", "sae-probes top-{k} AUC", "sparse_probing_sae_probes", "higher",
           "The same probe's area under the ROC curve: how well it orders texts, wherever it draws the line."),
    Metric("sae_probes_top_{k}_f1", "sae-probes top-{k} F1", "sparse_probing_sae_probes", "higher",
           "The same probe's F1, averaged over both classes."),
    Metric("sae_probes_llm_accuracy", "sae-probes, residual stream", "sparse_probing_sae_probes", None,
           "Mean test accuracy over the same tasks of an l2 logistic probe on the whole raw activation."),
    Metric("sae_probes_llm_auc", "sae-probes, residual stream AUC", "sparse_probing_sae_probes", None,
           "The same probe's area under the ROC curve."),
    Metric("sae_probes_llm_f1", "sae-probes, residual stream F1", "sparse_probing_sae_probes", None,
           "The same probe's F1, averaged over both classes."),
    Metric("sae_probes_top_{k}_accuracy_sae_bench", "sae-probes top-{k}", "sparse_probing_sae_probes", "higher",
           "On SAE Bench's random split of rows, where many test texts have a copy in train, at the very last token.",
           "sae.sae_top_{k}_test_accuracy"),
    Metric("sae_probes_top_{k}_auc_sae_bench", "sae-probes top-{k} AUC", "sparse_probing_sae_probes", "higher",
           "The same probe's area under the ROC curve, by probabilities in single precision.",
           "sae.sae_top_{k}_test_auc"),
    Metric("sae_probes_top_{k}_f1_sae_bench", "sae-probes top-{k} F1", "sparse_probing_sae_probes", "higher",
           "The same probe's F1, averaged over both classes.", "sae.sae_top_{k}_test_f1"),
    Metric("sae_probes_llm_accuracy_sae_bench", "sae-probes, residual stream", "sparse_probing_sae_probes", None,
           "The probe on the whole raw activation, on SAE Bench's split and stopped as early as its solver stops.",
           "llm.llm_test_accuracy"),
    Metric("sae_probes_llm_auc_sae_bench", "sae-probes, residual stream AUC", "sparse_probing_sae_probes", None,
           "The same probe's area under the ROC curve.", "llm.llm_test_auc"),
    Metric("sae_probes_llm_f1_sae_bench", "sae-probes, residual stream F1", "sparse_probing_sae_probes", None,
           "The same probe's F1, averaged over both classes.", "llm.llm_test_f1"),
    # --- meta-SAE ------------------------------------------------------------------------------------
    Metric("meta_sae_variance_explained", "Meta-SAE variance explained", "meta_sae", None,
           "Fraction of the variance of decoder rows that an SAE of a quarter of the width, trained on them, explains: how "
           "far latents are combinations of common parts. Measured on the rows trained on, so compare with the controls."),
    Metric("meta_sae_l0", "Meta-SAE L0", "meta_sae", None, "Mean number of meta-latents that stand for one latent."),
    Metric("meta_sae_fraction_alive", "Meta-SAE fraction alive", "meta_sae", None,
           "Fraction of meta-latents that stand for at least one latent."),
    Metric("meta_sae_variance_explained_sae_bench", "Meta-SAE variance explained", "meta_sae", None,
           "Of the first seed, rows encoded 4096 at a time: what is active depends on which rows share a batch.",
           "meta_structure.decoder_fraction_variance_explained"),
    # --- autointerp ----------------------------------------------------------------------------------
    Metric("autointerp_score", "Autointerp", "autointerp", "higher",
           "Mean over latents of the fraction of windows of text that a language model tells apart, active or not, by the "
           "explanation it wrote of the latent; every window counts as what it is. Latents that fire almost everywhere make "
           "it easy: see the balanced score."),
    Metric("autointerp_balanced_score", "Autointerp, balanced", "autointerp", "higher",
           "Mean over latents of the mean of the hit rates on active and on inactive windows: chance is 0.5 whatever the "
           "density; latents active in every window are left out.", trivial=(0.5, "guessing")),
    Metric("autointerp_std", "Autointerp deviation", "autointerp", None,
           "Standard deviation over latents of the autointerp score."),
    Metric("latents_scored", "Latents scored", "autointerp", None,
           "Latents that the judge explained and scored in a form that can be read."),
    Metric("latents_unparsable", "Latents unparsable", "autointerp", None,
           "Latents left out because the judge's answer is empty, no list of windows, or names one that does not exist."),
    Metric("latents_failed", "Latents failed", "autointerp", None,
           "Latents left out because the endpoint gave no answer."),
    Metric("answers_cut_off", "Answers cut off", "autointerp", None, "Answers that ended at the limit of tokens."),
    Metric("autointerp_score_sae_bench", "Autointerp", "autointerp", "higher",
           "The same answers; random windows count as inactive even where the latent fires in them, an empty answer "
           'as "None".',
           "autointerp.autointerp_score"),
    # --- ravel ---------------------------------------------------------------------------------------
    Metric("disentanglement", "RAVEL disentanglement", "ravel", "higher",
           "Mean of cause and isolation over attributes; a mask that changes nothing has 0.5. Learnt on some entities, "
           "scored on others, with the SAE's error kept.", trivial=(0.5, "a mask that changes nothing")),
    Metric("cause", "RAVEL cause", "ravel", "higher",
           "Fraction of pairs of prompts in which giving the chosen latents the source entity's values makes the model "
           "answer with the source's attribute."),
    Metric("isolation", "RAVEL isolation", "ravel", "higher",
           "Fraction of pairs about another attribute in which the same latents leave the base entity's answer as it was."),
    Metric("mask_latents", "RAVEL latents chosen", "ravel", None,
           "Mean over attributes of the number of latents that the learnt mask takes."),
    Metric("whole_activation_disentanglement", "RAVEL disentanglement, whole activation", "ravel", None,
           "The same when the whole activation of the source is put in, without any SAE."),
    Metric("whole_activation_cause", "RAVEL cause, whole activation", "ravel", None,
           "Cause when the whole activation of the source is put in: what this token carries of the entity at this hook."),
    Metric("whole_activation_isolation", "RAVEL isolation, whole activation", "ravel", None,
           "Isolation when the whole activation of the source is put in: what moves along with the entity."),
    Metric("disentanglement_sae_bench", "RAVEL disentanglement", "ravel", "higher",
           "SAE Bench's: the reconstruction alone in place of the token, pairs split at random, answers compared by "
           "their beginnings.", "ravel.disentanglement_score"),
    Metric("cause_sae_bench", "RAVEL cause", "ravel", "higher",
           "The same; pairs whose answers begin with one token count as isolation.", "ravel.cause_score"),
    Metric("isolation_sae_bench", "RAVEL isolation", "ravel", "higher", "The same, other attributes.",
           "ravel.isolation_score"),
)
