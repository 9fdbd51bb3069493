"""Metrics of the evaluations that give other than one result for each SAE of the comparison: ground truth and transfer.

One record each, as in `metric_table`. A record's key may hold `{name}`; `PLACES` says what may stand there.
"""

from __future__ import annotations

import itertools
import string
from typing import Literal

from sae_research.reporting.metric_table import Metric

Better = Literal["higher", "lower"] | None
STATUS = {
    "status": "how the evaluation ended: `ok`, `disabled`, `not_applicable`, `incomplete`, `failed` or `missing`",
    "message": "why, where it did not end well",
    "saes": "SAEs with a result",
    "skipped": "SAEs or tasks that were left out",
    "pairs": "pairs of models with a result (transfer)",
    "seeds": "seeds (ground truth)",
    "methods": "methods and their sparsities (ground truth)",
}
"""Keys of `_status`, which stands beside the results in every file of `metrics/`."""

PLACES: dict[str, tuple[str, ...]] = {
    "scope": ("all", "trained_dictionaries", "trained"),
    "metric": ("variance_explained", "cosine_similarity", "top_1_probing", "fraction_alive"),
    "model": ("base", "finetuned"),
    "outliers": ("", "_with_outliers"),
    "class": ("base_only", "base_leaning", "shared", "finetuned_leaning", "finetuned_only"),
    "group": ("base_only", "shared", "finetuned_only", "base_end", "finetuned_end"),
    "part": ("lost", "base_end", "made", "kept", "finetuned_end"),
}
"""What may stand in a key, by the name in braces; an empty text is none at all."""


def keys_of(metric: Metric) -> list[str]:
    """Every key that a record stands for."""
    names = [name for _, name, _, _ in string.Formatter().parse(metric.key) if name]
    choices = itertools.product(*(PLACES[name] for name in names))
    return [metric.key.format(**dict(zip(names, chosen, strict=True))) for chosen in choices]


def _truth(key: str, label: str, better: Better, definition: str) -> Metric:
    return Metric(key, label, "ground_truth", better, definition)


def _transfer(key: str, label: str, better: Better, definition: str) -> Metric:
    return Metric(key, label, "transfer", better, definition)


# tables, not formatted as code
# fmt: off
GROUND_TRUTH: tuple[Metric, ...] = (
    _truth("mcc", "MCC", "higher",
           "Mean absolute cosine of true directions and decoder rows, matched one to one: the min(N, F) pairs of the "
           "largest total (optimal assignment)."),
    _truth("mcc_activations", "MCC of activations", "higher",
           "The same of absolute Pearson correlations of true codes and activations, matched by these."),
    _truth("latent_f1", "F1", "higher",
           "Mean over latents of the F1 of a latent's firing against that of the true feature of its largest absolute "
           "cosine; 0 where both never fire together."),
    _truth("latent_precision", "Precision", "higher",
           "The precision of the same: of a latent's firings, those of its feature."),
    _truth("latent_recall", "Recall", "higher", "The recall of the same: of the feature's firings, those of the latent."),
    _truth("f1", "F1 of features", "higher",
           "Mean over features that fire on at least 5 test samples of the F1 of the latent that MCC's matching gives "
           "each; 0 for a feature without a latent."),
    _truth("precision", "Precision of features", "higher", "The precision of the same."),
    _truth("recall", "Recall of features", "higher", "The recall of the same."),
    _truth("uniqueness", "Uniqueness", "higher",
           "Number of different features among those of the latents' largest absolute cosines, over the number of "
           "latents: duplicates halve it."),
    _truth("fraction_dead", "Dead", "lower", "Fraction of latents that fire on no test sample."),
    _truth("fraction_duplicate", "Duplicate", "lower",
           "Fraction of latents with an absolute cosine above 0.9 to an earlier latent."),
    _truth("absorption", "Absorption", "lower",
           "Mean over parents and children of how much more often the parent's latent is silent where the child and its "
           "latent fire than where the parent fires without any child; pairs with at least 10 samples of either. 0 is "
           "none."),
    _truth("split_latents", "Latents a parent", None,
           "Mean number of latents that fire and whose feature of largest cosine is a given parent, over parents that "
           "have one."),
    _truth("top_1_probing", "Top-1 probing", "higher",
           "Mean balanced accuracy, on samples that chose nothing, of one latent and a threshold that tell where a true "
           "feature fires."),
    _truth("probed_features", "Features probed", None, "Features that such a probe was made for, 128 at most."),
    _truth("variance_explained", "Variance explained", "higher",
           "As in core evaluation, about the mean, on the test samples."),
    _truth("cosine_similarity", "Cosine", "higher", "As in core evaluation, on the test samples."),
    _truth("l0", "L0", None, "As in core evaluation, on the test samples."),
    _truth("fraction_alive", "Fraction alive", "higher", "As in core evaluation, on the test samples."),
    _truth("{metric}_with_mcc", "Rank correlation with MCC", "higher",
           "Under `rank_correlations.{scope}`: Spearman's correlation over methods of a metric with MCC, each method "
           "read at one L0; mean over seeds. `trained` holds the trained SAEs alone, `trained_dictionaries` pursuit "
           "over a trained dictionary too, `all` untrained dictionaries as well; absent with fewer than 4 methods at "
           "one L0."),
    _truth("{metric}_with_latent_f1", "Rank correlation with F1", "higher", "The same with F1 in place of MCC."),
)
"""Of `metrics/ground_truth.json`; N true features, F latents, means over seeds."""

TRANSFER: tuple[Metric, ...] = (
    # --- activations of both models ------------------------------------------------------------------
    _transfer("cosine{outliers}", "Cosine", None,
              "Mean over tokens of the cosine of both models' activations x and y at the SAE's hook, ⟨x, y⟩ / (‖x‖ ‖y‖)."),
    _transfer("euclidean{outliers}", "Euclidean distance", None, "Mean over tokens of ‖x − y‖."),
    _transfer("relative_error{outliers}", "Relative error", None, "Mean over tokens of ‖x − y‖ / ‖x‖."),
    _transfer("cka{outliers}", "Linear CKA", None, "‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms, columns centred."),
    _transfer("cosine_shuffled{outliers}", "Cosine, shuffled", None,
              "The cosine of x with the y of another token: the level that no relation gives."),
    _transfer("fraction_outliers", "Outliers", None, "Fraction of tokens that the rule for outliers removes."),
    # --- the base model's SAE on either model --------------------------------------------------------
    _transfer("{model}_variance_explained{outliers}", "Variance explained", "higher",
              "As in core evaluation, of the base model's SAE on the model's tokens."),
    _transfer("{model}_r2_flattened{outliers}", "R² flattened", None,
              "The published metric: 1 − Σ(x − x̂)² / Σ(x − m)² with one mean m over tokens and dimensions, where a "
              "constant vector already scores well above 0."),
    _transfer("{model}_l0{outliers}", "L0", None, "Mean number of latents with a non-zero activation per token."),
    _transfer("{model}_fraction_dead{outliers}", "Dead", "lower",
              "Fraction of latents that fire on no token of the model."),
    _transfer("{model}_mse{outliers}", "MSE", "lower", "Mean over tokens and dimensions of (x − x̂)²."),
    _transfer("{model}_ce_clean{outliers}", "CE clean", None, "Cross-entropy of the unedited model, in nats per token."),
    _transfer("{model}_ce_delta{outliers}", "ΔCE", "lower",
              "Cross-entropy with the reconstruction in place minus that of the unedited model, in nats per token."),
    _transfer("{model}_loss_recovered{outliers}", "Loss recovered", "higher",
              "(CE zero-ablated − CE patched) / (CE zero-ablated − CE clean), on the contexts that are ablated."),
    _transfer("{model}_loss_recovered_mean{outliers}", "Loss recovered over mean-ablation", "higher",
              "The same with the mean activation instead of zero."),
    _transfer("{model}_kl{outliers}", "KL", "lower", "Mean over tokens of KL(clean ‖ patched) in nats."),
    _transfer("{model}_bits_per_byte_patched{outliers}", "Bits per byte, patched", "lower",
              "Cross-entropy of all text with the reconstruction in place, in bits per byte: with tokenizers of their "
              "own."),
    # --- latents -------------------------------------------------------------------------------------
    _transfer("pearson_median", "Pearson", "higher",
              "Median over latents that fire in both models of the correlation of a latent's activations on the same "
              "tokens."),
    _transfer("pearson_shuffled_median", "Pearson, shuffled", None,
              "The same with the other model's activation on another token."),
    _transfer("pearson_halves_median", "Pearson, halves", None,
              "The same of the base model with itself, in another context at the same position: what position alone "
              "gives."),
    _transfer("pearson_above_0.5", "Pearson above 0.5", "higher",
              "Fraction of those latents whose correlation exceeds 0.5."),
    _transfer("pearson_above_0.9", "Pearson above 0.9", "higher",
              "Fraction of those latents whose correlation exceeds 0.9."),
    _transfer("jaccard_median", "Jaccard", "higher",
              "Median of the tokens on which a latent fires in both models over those on which it fires in either."),
    _transfer("jaccard_shuffled_median", "Jaccard, shuffled", None, "The same with the other model on another token."),
    _transfer("density_ratio_median", "Density ratio", None,
              "Median of the fraction of tokens that a latent fires on in the finetuned model, over that in the base "
              "model."),
    _transfer("logit_correlation_median", "Logit correlation", "higher",
              "Median of the correlation over shared tokens of `W_dec[f] W_U` in both models."),
    _transfer("density_regression_r", "Density regression", "higher",
              "Correlation of log10 densities in both models, over latents that fire in both."),
    _transfer("density_fraction_shifted", "Densities shifted", "lower",
              "Fraction of latents whose 95 % intervals of density (Wilson) in the two models do not meet."),
    _transfer("density_fraction_shifted_halves", "Densities shifted, halves", None,
              "The same of two halves of the base model's own tokens: what sampling alone gives."),
    # --- the models themselves -----------------------------------------------------------------------
    _transfer("clean_kl", "KL of the models", None,
              "Mean over tokens of KL(base ‖ finetuned) of the unedited models, in nats."),
    _transfer("weights_relative_change", "Change of weights", None,
              "‖W' − W‖ / ‖W‖ over all tensors of one shape together."),
    _transfer("matched_fraction", "Tokens matched", None,
              "Fraction of the base model's tokens that both models read alike."),
    _transfer("usable_token_fraction", "Tokens usable", None,
              "Fraction of tokens with the same string and id in both tokenizers, the smaller of both vocabularies'."),
    # --- repair --------------------------------------------------------------------------------------
    _transfer("repair_gap", "Gap", "lower",
              "Variance explained by the base SAE on its own model minus that on the finetuned one, at equal L0."),
    _transfer("repair_gap_closed", "Gap closed", "higher",
              "Share of the gap that further training closed; none below 0.005."),
    _transfer("repair_tokens_to_half", "Tokens to half", "lower", "Tokens read until half of the gap was closed."),
    _transfer("repair_gap_after_equal_training", "Gap after equal training", "lower",
              "The gap between the SAE trained as long on the base model's activations and the repaired one."),
    # --- a crosscoder of both models -----------------------------------------------------------------
    _transfer("crosscoder_l0", "Crosscoder, L0", None, "Mean number of its active latents per token."),
    _transfer("crosscoder_dead", "Crosscoder, dead", "lower", "Number of its latents that fire on no held-out token."),
    _transfer("crosscoder_variance_explained_{model}", "Crosscoder, variance explained", "higher",
              "On the model's held-out activations."),
    _transfer("crosscoder_{class}", "Crosscoder, latents of a class", None,
              "Latents that fire, by the finetuned model's share of their decoder norms, ‖d_ft‖ / (‖d_base‖ + ‖d_ft‖): "
              "below 0.1, to 0.4, to 0.6, to 0.9, above."),
    _transfer("crosscoder_kl_base", "Crosscoder, KL of the models", None,
              "KL(finetuned ‖ base) in nats per token, on the text of the ablations."),
    _transfer("crosscoder_{group}_kl", "Crosscoder, KL of a group", None,
              "Mean over a group's latents of KL(model ‖ model without the latent), in nats per token; an end: the "
              "latents of the smallest or largest shares."),
    _transfer("crosscoder_{group}_kl_matched", "Crosscoder, KL of controls", None,
              "The same of a random shared latent of about equal contribution for each."),
    _transfer("crosscoder_{group}_kl_direction", "Crosscoder, KL along random directions", None,
              "The same with the latent's activations along a random direction as long as its decoder."),
    _transfer("crosscoder_{group}_kl_patched_base", "Crosscoder, KL of the patched base model", None,
              "KL(finetuned ‖ base), where the base model's stream gets what the group writes in the finetuned model."),
    _transfer("crosscoder_{group}_kl_patched_base_matched", "Crosscoder, KL patched with controls", None,
              "The same with the controls in place of the group."),
    # --- separate SAEs of either model ---------------------------------------------------------------
    _transfer("separate_{model}_kept", "Separate SAEs, kept", "higher",
              "Latents of the model's SAE of which one latent of the other SAE has a cosine of decoders and a "
              "correlation of activations of at least 0.7."),
    _transfer("separate_base_lost", "Separate SAEs, lost", None,
              "Latents of the base model's SAE of which no latent of the other has 0.4 in either."),
    _transfer("separate_finetuned_made", "Separate SAEs, made", None, "The same of the finetuned model's SAE."),
    _transfer("separate_{model}_changed", "Separate SAEs, changed", None, "Latents that are neither."),
    _transfer("separate_control_{model}_kept", "Separate SAEs, kept in the control", None,
              "The same of the base SAE with one trained as long on the base model."),
    _transfer("separate_control_base_lost", "Separate SAEs, lost in the control", None, "The same of that pair."),
    _transfer("separate_control_finetuned_made", "Separate SAEs, made in the control", None, "The same of that pair."),
    _transfer("separate_control_{model}_changed", "Separate SAEs, changed in the control", None,
              "The same of that pair."),
    _transfer("separate_{model}_cosine_median", "Separate SAEs, best cosine", "higher",
              "Median over latents of the largest cosine of decoders with a latent of the other SAE."),
    _transfer("separate_{model}_correlation_median", "Separate SAEs, best correlation", "higher",
              "The same of the correlation of activations."),
    _transfer("separate_{model}_match_median", "Separate SAEs, best match", "higher",
              "The same of the smaller of cosine and correlation."),
    _transfer("separate_{part}_kl", "Separate SAEs, KL of a group", None,
              "Mean over a group's latents of KL(model ‖ model without the latent), in nats per token; an end: the least "
              "matched latents of that SAE."),
    _transfer("separate_{part}_kl_other", "Separate SAEs, KL in the other model", None,
              "The same in the other model, where the SAE's latents are active as it has them there."),
    _transfer("separate_{part}_kl_matched", "Separate SAEs, KL of controls", None,
              "The same of a random kept latent of about equal contribution for each."),
    _transfer("separate_{part}_kl_direction", "Separate SAEs, KL along random directions", None,
              "The same with the latent's activations along a random direction as long as its decoder."),
    _transfer("separate_{part}_kl_patched_base", "Separate SAEs, KL of the patched base model", None,
              "KL(finetuned ‖ base), where the base model's stream gets what the group adds in the finetuned model."),
    _transfer("separate_{part}_kl_patched_base_matched", "Separate SAEs, KL patched with controls", None,
              "The same with the controls in place of the group."),
)
"""Of `metrics/transfer.json`, under the pair's name: `finetuned`, `control_self` and `control_perturbed`."""
