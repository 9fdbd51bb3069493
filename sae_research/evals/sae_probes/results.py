"""One SAE's records as a result: SAE Bench's schema, our figures, their intervals, and every outcome behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from sae_research.evals import output
from sae_research.evals.sae_probes.fit import Scores
from sae_research.evals.sae_probes.tasks import ProbeTask
from sae_research.evals.sae_probes.uncertainty import mean_interval, resampled_metrics
from sae_research.intervals import packed
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.store import fingerprint

Record = dict[str, dict[str, Any]]
"""One kind of features on one task: `sae_bench` -> probe -> metric -> value, `lab` -> probe -> decision values of the
test texts. A probe is `llm` (all dimensions of the activations) or `top_<k>`."""

METRICS = ("accuracy", "auc", "f1")
_SAE_BENCH_K = (1, 2, 5, 10, 20, 50, 100)
EVAL_TYPE = "sparse_probing_sae_probes"


def result(name: str, sae: SparseAutoencoder, model_name: str, params: Params, tasks: list[ProbeTask],
           rows: dict[str, Tensor], raw: dict[str, Record], found: dict[str, Record]) -> dict[str, Any]:
    """What SAE Bench's `SparseProbingSaeProbesEvalOutput` is as plain data, with ours in the unstructured block.

    rows: task -> number of each of its texts, equal for equal texts. SAE Bench's own class is not imported: that reads
    all 113 files, ten seconds; a test holds the two equal.
    """
    config = params.sparse_probing_sae_probes
    bench = {task.name: {**raw[task.name]["sae_bench"], **found[task.name]["sae_bench"]} for task in tasks}
    means = {probe: {metric: float(np.mean([values[probe][metric] for values in bench.values()])) for metric in METRICS}
             for probe in next(iter(bench.values()))}
    flat = _flat(means)
    return {
        **output.envelope(name, sae, EVAL_TYPE), "eval_type_id": EVAL_TYPE,
        "eval_config": {
            "model_name": model_name, "random_seed": params.random_seed, "dataset_names": [task.name for task in tasks],
            "reg_type": "l1", "setting": "normal", "ks": list(config.k_values), "binarize": False, "results_path": "",
            "model_cache_path": None, "include_llm_baseline": True, "baseline_method": "logreg"},
        "eval_result_metrics": {"llm": {key: value for key, value in flat.items() if key.startswith("llm_")},
                                "sae": {key: value for key, value in flat.items() if key.startswith("sae_")}},
        "eval_result_details": [
            {"dataset_name": task, **_flat(probes), "sae_metrics_by_k": _by_k(probes)} for task, probes in bench.items()],
        "sae_metrics_by_k": _by_k(means),
        "eval_result_unstructured": {output.LAB: _lab_block(tasks, rows, raw, found, params.random_seed)},
    }


def _flat(probes: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """SAE Bench's fields, None where there is no figure; it has fields for seven values of k only."""
    fields = {"llm": "llm", **{f"top_{k}": f"sae_top_{k}" for k in _SAE_BENCH_K}}
    values = {f"{field}_test_{metric}": probes.get(probe, {}).get(metric)
              for probe, field in fields.items() for metric in METRICS}
    return {**values, "sae_test_accuracy": None}


def _by_k(probes: dict[str, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {int(probe.removeprefix("top_")): {f"test_{metric}": value for metric, value in values.items()}
            for probe, values in probes.items() if probe != "llm"}


def _lab_block(tasks: list[ProbeTask], rows: dict[str, Tensor], raw: dict[str, Record], found: dict[str, Record],
               seed: int) -> dict[str, Any]:
    by_task: dict[str, dict[str, float]] = {}
    resampled: dict[str, dict[str, np.ndarray]] = {}
    asked: dict[str, dict[str, list[str]]] = {}
    correct: dict[str, dict[str, dict[str, str]]] = {}
    for task in tasks:
        labels = task.lab.test_labels
        order = np.argsort(-labels, kind="stable")  # the positive class first
        numbers = rows[task.name].numpy()[task.lab.test]
        positive = task.notes["positive_class"]
        asked[task.name] = {positive: [_numbers(numbers[labels == label]) for label in (1, 0)]}
        by_task[task.name] = {}
        for probe, decisions in {**raw[task.name]["lab"], **found[task.name]["lab"]}.items():
            scores = Scores(np.array(decisions), saturate=False)
            by_task[task.name] |= {_key(probe, metric): value for metric, value in scores.metrics(labels).items()}
            for metric, draws in resampled_metrics(scores, labels, task.name, seed).items():
                resampled.setdefault(_key(probe, metric), {})[task.name] = draws
            right = (scores.decisions > 0) == (labels > 0)
            correct.setdefault(_key(probe, "accuracy"), {})[task.name] = {positive: packed(right[order])}
    return {
        "metrics": {key: float(np.mean([values[key] for values in by_task.values()])) for key in resampled},
        "intervals": {key: mean_interval(draws, seed) for key, draws in resampled.items()},
        "tasks": by_task,
        "outcomes": {"asked": asked, "correct": correct, "key": fingerprint([asked, [task.texts for task in tasks]])[:16]},
    }


def _key(probe: str, metric: str) -> str:
    """`top_5`, `auc` -> `sae_probes_top_5_auc`."""
    return f"sae_probes_{probe}_{metric}"


def _numbers(values: Iterable[int]) -> str:
    return " ".join(str(int(value)) for value in values)
