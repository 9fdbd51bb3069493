"""Results as SAE Bench's own output types.

SAE Bench has fields for n in 2, 5, 10, 20, 50, 100, 500 only and drops others without a word; ours keeps every n in
the unstructured block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from sae_research.evals import output
from sae_research.evals.scr_tpp.stage import Settings
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder

Metrics = dict[str, float]


def scr_output(name: str, sae: SparseAutoencoder, lm: LanguageModel, params: Params, settings: Settings,
               tasks: dict[str, Metrics], pairs: dict[str, tuple[str, str]], lab: dict[str, Any]) -> dict[str, Any]:
    """A validated `ScrEvalOutput` as plain data. tasks: SAE Bench's figures by task; pairs: the first attribute's
    values by task; lab: our block."""
    from sae_bench.evals.scr_and_tpp import eval_output as types

    return asdict(types.ScrEvalOutput(
        eval_config=_config(lm, params, settings, list(tasks), scr=True, pairs=pairs),
        eval_result_metrics=types.ScrMetricCategories(scr_metrics=types.ScrMetrics(
            **_known(types.ScrMetrics, _average(list(tasks.values()))))),
        eval_result_details=[types.ScrResultDetail(dataset_name=f"{task}_results", **_known(types.ScrResultDetail, values))
                             for task, values in tasks.items()],
        eval_result_unstructured={output.LAB: _with_cap(lab, sae, settings)}, **output.envelope(name, sae, "scr")))


def tpp_output(name: str, sae: SparseAutoencoder, lm: LanguageModel, params: Params, settings: Settings,
               tasks: dict[str, Metrics], classes: dict[str, dict[str, Metrics]], lab: dict[str, Any]) -> dict[str, Any]:
    """A validated `TppEvalOutput` as plain data. tasks and classes: SAE Bench's figures by task, and by task and
    class; lab: our block."""
    from sae_bench.evals.scr_and_tpp import eval_output as types

    return asdict(types.TppEvalOutput(
        eval_config=_config(lm, params, settings, list(tasks), scr=False, pairs={}),
        eval_result_metrics=types.TppMetricCategories(tpp_metrics=types.TppMetrics(
            **_known(types.TppMetrics, _average(list(tasks.values()))))),
        eval_result_details=[types.TppResultDetail(dataset_name=f"{task}_tpp_results",
                                                   **_known(types.TppResultDetail, values))
                             for task, values in tasks.items()],
        eval_result_unstructured={**classes, output.LAB: _with_cap(lab, sae, settings)},
        **output.envelope(name, sae, "tpp")))


def _average(tasks: Sequence[Metrics]) -> Metrics:
    """Mean over the tasks that have a figure (SAE Bench's `scr_metric` can be missing)."""
    keys = {key: None for values in tasks for key in values}
    having = {key: [values[key] for values in tasks if key in values] for key in keys}
    return {key: sum(values) / len(values) for key, values in having.items()}


def _known(output_type: type, metrics: Metrics) -> Metrics:
    names = {field.name for field in fields(output_type)}
    return {key: value for key, value in metrics.items() if key in names}


def _with_cap(lab: dict[str, Any], sae: SparseAutoencoder, settings: Settings) -> dict[str, Any]:
    capped = {str(n): sae.cfg.d_sae for n in sorted(set(settings.n_values)) if n > sae.cfg.d_sae}
    return {**lab, "thresholds_capped": capped} if capped else lab


def _config(lm: LanguageModel, params: Params, settings: Settings, tasks: list[str], scr: bool,
            pairs: dict[str, tuple[str, str]]) -> Any:
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    return ScrAndTppEvalConfig(
        random_seed=params.random_seed, dataset_names=tasks, perform_scr=scr, train_set_size=settings.train_set_size,
        test_set_size=settings.test_set_size, context_length=settings.context_length, probe_epochs=settings.probe_epochs,
        early_stopping_patience=settings.probe_epochs, sae_batch_size=params.model.llm_batch_size,
        llm_batch_size=params.model.llm_batch_size, llm_dtype=params.model.torch_dtype, model_name=lm.name,
        n_values=list(settings.n_values), column1_vals_lookup={task: [pair] for task, pair in pairs.items()})
