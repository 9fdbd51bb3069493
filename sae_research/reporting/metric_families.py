"""What the metrics of one evaluation have in common: the formulas behind them, and the papers and files they come from.

Formulas are of our definitions; where SAE Bench's differs, its metrics' records in `metric_table` say how.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Of one evaluation."""

    formulas: tuple[str, ...]
    """A line each, in Markdown."""
    sources: tuple[str, ...]
    """Papers by their arXiv number, files of SAE Bench 0.6.0 and other packages by their path."""


_SCR_TPP = (
    "Both come from arXiv 2411.18895 and `sae_bench/evals/scr_and_tpp/main.py`",
    "that neither follows an SAE's quality at its usual settings: arXiv 2605.18229",
)

FAMILIES: dict[str, Family] = {
    "core": Family(
        (
            "x is an activation, x̂ its reconstruction, z the latents, x̄ the mean of x, all over tokens that count.",
            "Variance explained: `1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²`.",
            "Loss recovered: `(CE_zero − CE_patched) / (CE_zero − CE_clean)`, with CE the mean cross-entropy of the "
            "next token.",
            "L0: `mean over tokens of #{i : z_i ≠ 0}`. KL: `mean over tokens of Σ_v p_clean(v) log(p_clean(v) / "
            "p_patched(v))`.",
            "Relative reconstruction bias: `mean ‖x̂‖² / mean ⟨x, x̂⟩`.",
        ),
        (
            "`sae_bench/evals/core/main.py`",
            "relative reconstruction bias: arXiv 2404.16014, equation 10",
        ),
    ),
    "sparse_probing": Family(
        (
            "Every text is one vector, the mean of its latents over the tokens that count: `v = mean_t z_t`.",
            "Latents of a class: the k largest of `|mean v_i over its training texts − mean v_i over as many others|`.",
            "Score: the share of test texts that a logistic regression on these k dimensions gets right, mean over "
            "classes, draws of training texts and tasks.",
        ),
        (
            "`sae_bench/evals/sparse_probing/probe_training.py`",
            "the rule for the k latents: arXiv 2305.01610",
        ),
    ),
    "scr": Family(
        (
            "A biased probe w is trained on texts whose two attributes always agree. A_clean is the accuracy on one "
            "attribute of that attribute's own probe, A_biased that of the biased probe, A_n that of the biased probe "
            "after ablating n latents.",
            "Latents: the n largest of `|Δ_i · ⟨W_dec,i, u⟩|`, with Δ_i the difference of mean activations between the "
            "two values of the other attribute and u the weights of its probe.",
            "Ablating the set S takes `Σ_{i∈S} mean_t z_{t,i} · ⟨W_dec,i, w⟩` off a text's logit.",
            "Score: `Σ_tasks (A_n − A_biased) / Σ_tasks (A_clean − A_biased)`.",
        ),
        _SCR_TPP,
    ),
    "tpp": Family(
        (
            "Every class has a probe against the others: A_c is its accuracy, A_c(d, n) that after ablating the n "
            "latents of class d.",
            "Latents of class d: the n largest of `Δ_i · ⟨W_dec,i, w_d⟩`, with Δ_i the mean activation in texts of the "
            "class less that in others, of latents that are larger in magnitude there.",
            "Intended effect: `I_d = A_d − A_d(d, n)`. Unintended effect: `U_d = mean over c ≠ d of A_c − A_c(d, n)`. "
            "Score: `mean over d of I_d − U_d`.",
        ),
        _SCR_TPP,
    ),
    "absorption": Family(
        (
            "p is a letter's direction (logistic regression on activations of words), `c_i = z_i ⟨W_dec,i, p⟩` what "
            "latent i writes along it, `P = ⟨x − b_dec, p⟩` what the word has of it, M the letter's main latents, `m = "
            "Σ_{i∈M} c_i`.",
            "a is the sum of the three largest positive c_i over `i ∉ M` whose decoder rows have `|cos(W_dec,i, p)| ≥ "
            "0.1`, at most `P − m`.",
            "Absorption fraction of a word: `a / (a + m)`; 0 unless `P > 0`, `m < P` and those three sum to `0.4 P` or "
            "more; 1 where `m ≤ 0`.",
            "Full absorption of a word: no latent of M fires, and the largest c_i over `i ∉ M` is at least `0.4 P`, of "
            "a latent with `|cos(W_dec,i, p)| ≥ 0.025`.",
        ),
        (
            "arXiv 2409.14507",
            "`sae_bench/evals/absorption/main.py`",
        ),
    ),
    "unlearning": Family(
        (
            "An intervention j clamps a few latents to `−multiplier` where they are active; F_j and R_j are the shares "
            "of known questions, to forget and to keep, that are still answered rightly.",
            "Score: `1 − min over j with R_j ≥ 0.99 of F_j`, and 0 where no j has it.",
            "Latents: those that fire on less than a threshold of the retain corpus, by how often they fire on the "
            "forget corpus.",
        ),
        (
            "arXiv 2410.19278",
            "`sae_bench/evals/unlearning/main.py`",
        ),
    ),
    "sparse_probing_sae_probes": Family(
        (
            "A text is the vector z of its last token that counts. Latents: the k largest of `|mean z_i / s_i over one "
            "class − mean z_i / s_i over the other|`, with s_i the mean of |z_i| where it is not zero.",
            "A logistic regression with an l1 penalty, chosen among ten by AUC on held-out training texts, is fitted on "
            "these.",
            "Accuracy, AUC (share of pairs of a text of either class that are in the right order, ties half) and F1 (of "
            "either class, weighted by its texts), mean over tasks.",
        ),
        (
            "sae-probes 0.4.2, `run_sae_evals.run_sae_eval` and `utils_training.find_best_reg`",
            "`sae_bench/evals/sparse_probing_sae_probes/main.py`",
            "how reliable it is: arXiv 2605.18229",
        ),
    ),
    "meta_sae": Family(
        (
            "w_l are the decoder's rows, ŵ_l their reconstruction by a BatchTopK SAE of a quarter of the width that is "
            "trained on them.",
            "Variance explained: `1 − Σ_l ‖w_l − ŵ_l‖² / Σ_l ‖w_l − w̄‖²`.",
        ),
        (
            "arXiv 2502.04878",
            "`sae_bench/evals/meta_structure/main.py`",
        ),
    ),
    "autointerp": Family(
        (
            "The judge reads an explanation and names, of n windows, those in which the latent should fire.",
            "Score of a latent: `(active windows named + inactive windows not named) / n`.",
            "Balanced: `(active named / active + inactive not named / inactive) / 2`.",
        ),
        ("`sae_bench/evals/autointerp/main.py`",),
    ),
    "ravel": Family(
        (
            "A mask s over latents is learnt; the base prompt's entity token gets `x_base + Σ_i s_i (z_source,i − "
            "z_base,i) W_dec,i`.",
            "Cause: share of pairs about the attribute after which the model gives the source's value. Isolation: share "
            "of pairs about another attribute after which it still gives the base's value.",
            "Disentanglement: `(cause + isolation) / 2`, mean over attributes, then over classes of entities.",
        ),
        (
            "arXiv 2402.17700",
            "`sae_bench/evals/ravel/main.py`",
        ),
    ),
    "transfer": Family(
        (
            "x is the base model's activation of a token, y the finetuned model's, X and Y the matrices of all tokens "
            "with centred columns.",
            "Cosine: `mean ⟨x, y⟩ / (‖x‖ ‖y‖)`. Linear CKA: `‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`, Frobenius norms.",
            "Pearson and Jaccard of a latent: over tokens, of its activations in the two models, and of the sets of "
            "tokens on which it fires.",
        ),
        (
            "linear CKA: Kornblith et al. 2019, equation 3",
            "latents of one model alone in a crosscoder: arXiv 2504.02922",
            "that SAEs of one model differ by their seeds: arXiv 2501.16615",
        ),
    ),
    "ground_truth": Family(
        (
            "g_j are the N true directions, d_i the F decoder rows, both of unit norm, c_j and z_i their activations.",
            "MCC: `1 / min(N, F) · max over one-to-one pairings π of Σ_i |⟨d_i, g_π(i)⟩|`; of activations, the same with "
            "`|corr(z_i, c_π(i))|`.",
            "F1 of a latent: `2 P R / (P + R)` with `P = #{z_i ≠ 0, c_j ≠ 0} / #{z_i ≠ 0}` and "
            "`R = #{z_i ≠ 0, c_j ≠ 0} / #{c_j ≠ 0}`, j the feature of largest `|⟨d_i, g_j⟩|`.",
            "Absorption of a parent and child: `share of {child and its latent fire} with the parent's latent silent − "
            "share of {parent fires without a child} with it silent`.",
        ),
        (
            "arXiv 2602.14687",
            "SAELens, `sae_lens.synthetic`: a test holds MCC, uniqueness and a latent's precision, recall and F1 to its "
            "functions",
        ),
    ),
}
"""By the evaluation's name."""
