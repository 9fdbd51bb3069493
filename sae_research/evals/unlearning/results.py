"""One SAE's result: SAE Bench's own output type, every configuration's figures, our definition with its interval."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from sae_research.evals import output
from sae_research.evals.unlearning import scores
from sae_research.evals.unlearning.densities import DEFINITIONS
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder

# definition -> configurations, each {retain_threshold, n_features, multiplier, latents, forget, retain}; the last two
# as "0110...", one digit per known question
Record = dict[str, list[dict[str, Any]]]


def result(name: str, sae: SparseAutoencoder, model: str, params: Params, asked: dict[str, Any], record: Record,
           stand_in: str | None) -> dict[str, Any]:
    """SAE Bench's `UnlearningEvalOutput` as plain data.

    asked: side -> question set -> {asked, known}. stand_in: what the packaged data stand for, None where none are used.
    """
    bar = params.unlearning.min_retain_accuracy
    (forget, retain), own = (_matrices(record[definition]) for definition in DEFINITIONS)
    label = {} if stand_in is None else {"stand_in": stand_in}
    return _unlearning_output(
        _config(params, model), scores.unlearning_score(forget, retain, bar),
        {**label, "configurations": _figures(record["sae_bench"], forget, retain),
         output.LAB: {**label, "questions": asked, **_lab_block(record["lab"], *own, params)}},
        output.envelope(name, sae, "unlearning"))


def _config(params: Params, model: str) -> dict[str, Any]:
    config = params.unlearning
    return {"random_seed": params.random_seed, "dataset_names": [*config.forget_questions, *config.retain_questions],
            "retain_thresholds": list(config.retain_thresholds), "n_features_list": list(config.n_features_list),
            "multipliers": list(config.multipliers), "dataset_size": config.dataset_size, "seq_len": config.seq_len,
            "model_name": model, "llm_batch_size": params.model.llm_batch_size, "llm_dtype": params.model.torch_dtype}


def _unlearning_output(config: dict[str, Any], score: float, unstructured: dict[str, Any],
                       common: dict[str, Any]) -> dict[str, Any]:
    from sae_bench.evals.unlearning import eval_output as types
    from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig

    return asdict(types.UnlearningEvalOutput(
        eval_config=UnlearningEvalConfig(**config),
        eval_result_metrics=types.UnlearningMetricCategories(
            unlearning=types.UnlearningMetrics(unlearning_score=score)),
        eval_result_details=[], eval_result_unstructured=unstructured, **common))


def _lab_block(record: list[dict[str, Any]], forget: np.ndarray, retain: np.ndarray, params: Params) -> dict[str, Any]:
    bar, seed = params.unlearning.min_retain_accuracy, params.random_seed
    held_out, kept = scores.held_out(forget, retain, bar, seed)
    return {
        "metrics": {"unlearning_score": scores.unlearning_score(forget, retain, bar),
                    "unlearning_score_held_out": held_out, "retain_accuracy_held_out": kept,
                    "forget_questions": forget.shape[1], "retain_questions": retain.shape[1]},
        "intervals": {"unlearning_score": scores.interval(forget, retain, bar, seed)},
        "best_configuration": scores.best_configuration(forget, retain, bar),
        "configurations": [{**figures, "forget_right": entry["forget"], "retain_right": entry["retain"]}
                           for figures, entry in zip(_figures(record, forget, retain), record, strict=True)]}


def _matrices(record: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Which forget and which retain questions are answered rightly, bool [configurations, questions] each."""
    forget, retain = (np.array([[digit == "1" for digit in entry[side]] for entry in record])
                      for side in ("forget", "retain"))
    return forget, retain


def _figures(record: list[dict[str, Any]], forget: np.ndarray, retain: np.ndarray) -> list[dict[str, Any]]:
    return [{"retain_threshold": entry["retain_threshold"], "n_features": entry["n_features"],
             "multiplier": entry["multiplier"], "latents": entry["latents"],
             "forget_accuracy": float(forget[row].mean()), "retain_accuracy": float(retain[row].mean())}
            for row, entry in enumerate(record)]
