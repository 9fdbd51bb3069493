"""One SAE's records as a result in SAE Bench's own output type, ours beside it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict
from typing import Any

from sae_research.evals import output
from sae_research.evals.autointerp.judge import FAILED, SCORED, UNPARSABLE
from sae_research.evals.autointerp.windows import Windows
from sae_research.intervals import interval, ratio
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder

_NOT_A_NUMBER = -1.0
"""SAE Bench's own mark, in its block only: JSON has no NaN."""


def result(name: str, sae: SparseAutoencoder, chosen: Windows, records: list[dict[str, Any]], lm: LanguageModel,
           params: Params) -> dict[str, Any]:
    """A validated `AutoInterpEvalOutput` as plain data. At least one record must be scored.

    The unstructured block holds SAE Bench's record per latent, under the latent's number, and ours in `lab_v1`.
    """
    from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
    from sae_bench.evals.autointerp.eval_output import (
        AutoInterpEvalOutput,
        AutoInterpMetricCategories,
        AutoInterpMetrics,
    )

    bench = [record["score_sae_bench"] for record in records if "score_sae_bench" in record]
    deviation = _deviation(bench)
    metrics = AutoInterpMetrics(autointerp_score=statistics.fmean(bench),
                                autointerp_std_dev=_NOT_A_NUMBER if deviation is None else deviation)
    latents = {str(record["latent"]): _as_sae_bench(record) for record in records if "score_sae_bench" in record}
    plain = asdict(AutoInterpEvalOutput(
        eval_config=AutoInterpEvalConfig(**_config(lm, params)),
        eval_result_metrics=AutoInterpMetricCategories(autointerp=metrics), eval_result_details=[],
        eval_result_unstructured={**latents, output.LAB: _lab(chosen, records, params)},
        **output.envelope(name, sae, "autointerp")))
    # SAE Bench's config fills in the number of latents named, and then refuses to read what it wrote
    plain["eval_config"] |= {"n_latents": _config(lm, params)["n_latents"]}
    return plain


def _as_sae_bench(record: dict[str, Any]) -> dict[str, Any]:
    return {"latent": record["latent"], "explanation": record["explanation"], "predictions": record["predictions"],
            "correct seqs": record["active_sae_bench"], "score": record["score_sae_bench"]}


def _lab(chosen: Windows, records: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    scores = [record["score"] for record in records if record["state"] == SCORED]
    balanced = [record["balanced_score"] for record in records if "balanced_score" in record]
    states = Counter(record["state"] for record in records)
    figures = {
        "autointerp_score": statistics.fmean(scores), "autointerp_std": _deviation(scores),
        "autointerp_balanced_score": statistics.fmean(balanced) if balanced else None,
        "latents_scored": states[SCORED], "latents_unparsable": states[UNPARSABLE], "latents_failed": states[FAILED],
        "answers_cut_off": sum(record["cut_off"] for record in records)}
    intervals = {"autointerp_score": interval(ratio(scores), params.random_seed),
                 "autointerp_balanced_score": interval(ratio(balanced), params.random_seed)}
    return {"metrics": {key: value for key, value in figures.items() if value is not None},
            "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
            "judge": params.autointerp.model, "alive_latents": chosen.alive, "passed_over": chosen.passed_over,
            "prompt_tokens": sum(record["prompt_tokens"] for record in records),
            "completion_tokens": sum(record["completion_tokens"] for record in records),
            "latents": records}


def _deviation(values: list[float]) -> float | None:
    """Standard deviation with n - 1, None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _config(lm: LanguageModel, params: Params) -> dict[str, Any]:
    config = params.autointerp
    shared = ("dead_latent_threshold", "buffer", "act_threshold_frac", "total_tokens", "max_tokens_in_explanation",
              "use_demos_in_explanation", "n_top_ex_for_generation", "n_iw_sampled_ex_for_generation",
              "n_top_ex_for_scoring", "n_random_ex_for_scoring", "n_iw_sampled_ex_for_scoring")
    named = config.override_latents
    return {**{key: getattr(config, key) for key in shared}, "model_name": lm.name,
            "n_latents": config.n_latents if named is None else None, "override_latents": named,
            "random_seed": params.random_seed, "dataset_name": params.text.dataset,
            "llm_context_size": params.text.context_size, "llm_batch_size": params.model.llm_batch_size,
            "llm_dtype": params.model.torch_dtype, "no_overlap": True, "scoring": True}
