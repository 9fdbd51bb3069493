"""One SAE's findings as SAE Bench's `RAVELEvalOutput`, with our own definition beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sae_research.evals import output
from sae_research.evals.ravel.known import Known
from sae_research.evals.ravel.pairs import Task
from sae_research.evals.ravel.scoring import Outcomes, Scores, bounds, mean_scores, sae_bench_scores
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder


def ravel_result(name: str, sae: SparseAutoencoder, known: Sequence[Known], tasks: Sequence[Task],
                 findings: Mapping[str, Any], whole: Mapping[str, Sequence[str]], params: Params,
                 lm: LanguageModel) -> dict[str, Any]:
    """A validated `RAVELEvalOutput` as plain data. findings: task -> definition -> latents and answers; whole: task ->
    answers when the whole activation is patched."""
    from sae_bench.evals.ravel import eval_output as types
    from sae_bench.evals.ravel.eval_config import RAVELEvalConfig

    stock = {task.name: sae_bench_scores(known, task.sae_bench.test, findings[task.name]["sae_bench"]["answers"])
             for task in tasks}
    config = params.ravel
    return asdict(types.RAVELEvalOutput(
        eval_config=RAVELEvalConfig(
            entity_attribute_selection=config.entity_attribute_selection, top_n_entities=config.top_n_entities,
            full_dataset_downsample=config.full_dataset_downsample, random_seed=params.random_seed,
            num_pairs_per_attribute=config.num_pairs_per_attribute, train_test_split=config.train_test_split,
            model_name=lm.name, llm_dtype=params.model.torch_dtype, llm_batch_size=config.batch_size,
            learning_rate=config.learning_rate, num_epochs=config.num_epochs,
            n_generated_tokens=config.n_generated_tokens),
        eval_result_metrics=types.RAVELMetricCategories(
            ravel=types.RAVELMetricResults(**_stock_names(mean_scores(stock, tasks), "disentanglement_score"))),
        eval_result_details=[],
        eval_result_unstructured={
            **{f"{kind}_results": {task.name: _stock_names(stock[task.name], "disentangle_score") for task in tasks
                                   if task.entity_class == kind} for kind in dict.fromkeys(t.entity_class for t in tasks)},
            output.LAB: _lab(known, tasks, findings, whole, params.random_seed)},
        **output.envelope(name, sae, "ravel")))


def _lab(known: Sequence[Known], tasks: Sequence[Task], findings: Mapping[str, Any], whole: Mapping[str, Sequence[str]],
         seed: int) -> dict[str, Any]:
    found = Outcomes(known, tasks, {task.name: findings[task.name][output.LAB]["answers"] for task in tasks})
    scores, most = found.scores(), Outcomes(known, tasks, whole).scores()
    latents = {task.name: findings[task.name][output.LAB]["latents"] for task in tasks}
    return {
        "metrics": {**_names(mean_scores(scores, tasks)), "mask_latents": sum(latents.values()) / len(latents),
                    **{f"whole_activation_{key}": value for key, value in _names(mean_scores(most, tasks)).items()}},
        **found.evidence(seed),
        "attributes": {task.name: {
            **_names(scores[task.name]), "intervals": bounds(found.figures(task), seed),
            "mask_latents": latents[task.name], "train_pairs": len(task.lab.train), "test_pairs": len(task.lab.test),
            **{f"whole_activation_{key}": value for key, value in _names(most[task.name]).items()}} for task in tasks}}


def _names(scores: Scores) -> dict[str, float]:
    return {"disentanglement": scores.disentanglement, "cause": scores.cause, "isolation": scores.isolation}


def _stock_names(scores: Scores, mean: str) -> dict[str, float]:
    return {"cause_score": scores.cause, "isolation_score": scores.isolation, mean: scores.disentanglement}
