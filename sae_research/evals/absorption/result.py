"""From an SAE's scores by letter to SAE Bench's output type and our own block."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sae_research.evals import output
from sae_research.evals.absorption.words import LETTERS
from sae_research.intervals import interval, ratio, stored
from sae_research.saes import SparseAutoencoder
from sae_research.store import fingerprint

if TYPE_CHECKING:
    from sae_research.evals.absorption.evaluation import Letters
    from sae_research.evals.absorption.word_activations import WordActivations

EVAL_TYPE = "absorption_first_letter"


def result(name: str, sae: SparseAutoencoder, acts: WordActivations, letters: Letters,
           scores: dict[str, Any]) -> dict[str, Any]:
    """A validated `AbsorptionEvalOutput` as plain data."""
    from sae_bench.evals.absorption import eval_output as types
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    details = [{"first_letter": letter, "mean_absorption_fraction": found["sae_bench"]["absorption_fraction"],
                "full_absorption_rate": found["sae_bench"]["full_absorption"],
                "num_full_absorption": found["sae_bench"]["full_absorption_words"],
                "num_probe_true_positives": found["words"],
                "num_split_features": len(found["sae_bench"]["main_latents"])} for letter, found in scores.items()]
    return asdict(types.AbsorptionEvalOutput(
        eval_config=AbsorptionEvalConfig(**_config(acts)),
        eval_result_metrics=types.AbsorptionMetricCategories(mean=types.AbsorptionMeanMetrics(**_means(details))),
        eval_result_details=[types.AbsorptionResultDetail(**record) for record in details],
        eval_result_unstructured={output.LAB: lab_block(acts, letters, scores)},
        **output.envelope(name, sae, EVAL_TYPE)))


def _config(acts: WordActivations) -> dict[str, Any]:
    config = acts.params.absorption
    tails, positions = acts.words.tails, acts.words.positions
    return {"model_name": acts.lm.name, "random_seed": acts.params.random_seed,
            "f1_jump_threshold": config.f1_jump_threshold, "max_k_value": config.max_k_value,
            "prompt_template": config.prompt_template, "prompt_token_pos": int(positions[0]) - len(tails[0]),
            "llm_batch_size": acts.params.model.llm_batch_size, "llm_dtype": acts.params.model.torch_dtype,
            "k_sparse_probe_l1_decay": config.k_sparse_probe_l1_decay, "min_GT_probe_f1": config.min_ground_truth_probe_f1,
            "min_feats_for_eval": config.min_feats_for_eval, "precalc_k_sparse_probe_sae_acts": True}


def _means(details: list[dict[str, Any]]) -> dict[str, float]:
    """SAE Bench's means and standard deviations over letters; of a single letter the deviation counts as 0."""
    names = {"absorption_fraction_score": "mean_absorption_fraction", "full_absorption_score": "full_absorption_rate",
             "num_split_features": "num_split_features"}
    values = {name: [float(record[key]) for record in details] for name, key in names.items()}
    return {**{f"mean_{name}": statistics.mean(column) for name, column in values.items()},
            **{f"std_dev_{name}": statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in values.items()}}


def lab_block(acts: WordActivations, letters: Letters, scores: dict[str, Any]) -> dict[str, Any]:
    """Our figures: means over letters, each letter one cluster for the intervals."""
    by_letter = {letter: {"words": found["words"], **found["lab"]} for letter, found in scores.items()}
    columns = {key: [found[key] for found in by_letter.values()]
               for key in ("absorption_fraction", "full_absorption", "main_latents_f1")}
    columns["split_latents"] = [len(found["main_latents"]) for found in by_letter.values()]
    columns["probe_f1"] = letters.f1
    figures = {key: ratio(values) for key, values in columns.items()}
    intervals = {key: interval(figure, acts.params.random_seed) for key, figure in figures.items()}
    count, wanted = len(scores), acts.params.absorption.min_feats_for_eval
    return {
        "metrics": {**{key: figure.value for key, figure in figures.items()}, "letters": count,
                    "words": sum(found["words"] for found in by_letter.values())},
        "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
        "clusters": {"letters": {"level": "letter", "clusters": count,
                                 "key": fingerprint([acts.hook, acts.words.fingerprint(), list(scores)])[:16]}},
        "cluster_sums": {key: stored(figure, "letters") for key, figure in figures.items()},
        "letters": by_letter, "skipped_letters": letters.why_not,
        "probe_f1": {LETTERS[number]: value for number, value in zip(letters.numbers, letters.f1, strict=True)},
        "sae_bench_f1_by_k": {letter: found["sae_bench"]["f1_by_k"] for letter, found in scores.items()},
        "sae_bench_would_report": count >= wanted,
    }
