"""Sparse probing: how well one, two or five latents tell the classes of labelled texts apart.

Every text becomes one vector: the mean over its tokens of the latents (or of the raw activations, the baseline).
SAE Bench 0.6.0's definition counts every token but BOS, EOS and padding, shows sequence-level encoders the zeroed
padding, and picks the epoch of the full probe on the test texts. Ours (`lab_v1`) counts tokens inside `token_mask`
only, hides everything else from the encoder, and picks nothing on test texts. Texts and draws are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.evals import output
from sae_research.evals.inputs import by_hook, model_key, result_key
from sae_research.evals.probes import (
    ProbeTask,
    draw,
    full_correct,
    sae_bench_full_accuracy,
    top_k_accuracy,
    top_k_correct,
)
from sae_research.evals.tasks import load_tasks, need_one
from sae_research.evals.text_means import Means, TextActivations, text_numbers, tokenise
from sae_research.intervals import accuracy, interval, packed, unpacked
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.saes.guard import Family, Guard
from sae_research.store import ResultCache, StageFolder, fingerprint
from sae_research.text.tasks import Task

_SAE_BENCH_K = (1, 2, 5, 10, 20, 50, 100)

# of one set of features: task -> metric -> class -> accuracy, or which test rows were right (`intervals.packed`)
Accuracies = dict[str, dict[str, dict[str, float]]]
Outcomes = dict[str, dict[str, dict[str, str]]]


class _Texts(NamedTuple):
    """All tasks' texts, each tokenised and kept once."""

    tokens: list[Tensor]
    tasks: dict[str, dict[str, ProbeTask]]
    """task -> class -> rows and labels"""
    notes: dict[str, Any]


def evaluate(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `SparseProbingEvalOutput` in plain data.

    A task with too few texts and an SAE that fails are skipped with their reason. Raises `UserError` when no task is left.
    """
    guard = Guard(stage.skip)
    texts = _load(lm, params, stage)
    stage.notes["tasks"] = texts.notes
    for hook, members in by_hook(saes).items():
        keys = {name: _key(sae, lm, params, texts) for name, sae in members.items()}
        cache = ResultCache("sparse_probing")
        raw_key = model_key(lm, ["raw", hook, _inputs(params, texts)], __name__)
        found = {name: cache.get(keys[name]) for name in members}
        raw, missing = cache.get(raw_key), {name: sae for name, sae in members.items() if found[name] is None}
        if missing or raw is None:
            group = TextActivations(lm, hook, texts.tokens, params, params.sparse_probing.context_length)
            if raw is None:
                raw = _accuracies(group.raw_means(), texts, params, "llm")
                cache.put(raw_key, raw)
            with tqdm(total=len(missing), desc="encode and probe", unit="SAE", dynamic_ncols=True) as bar:
                def score(family: Family, group: TextActivations = group) -> Iterator[tuple[str, dict[str, Any]]]:
                    for name, means in group.latent_means(family):
                        with guard.on(name):
                            if not means.lab.any():
                                raise UserError(f"it fires on none of the {len(means.lab):,} texts")
                            yield name, _accuracies(means, texts, params, "sae")

                for name, accuracies in guard.each(missing, score):
                    with guard.on(name):
                        cache.put(keys[name], accuracies)
                        found[name] = accuracies
                    bar.update()
        for name, sae in guard.left(members).items():
            with guard.on(name):
                yield name, _result(name, sae, lm, params, texts, raw, found[name])


def _inputs(params: Params, texts: _Texts) -> list[Any]:
    rows = {name: {label: [d.rows.tolist() for d in (task.train, task.test)] for label, task in classes.items()}
            for name, classes in texts.tasks.items()}
    return [params.sparse_probing.model_dump(), params.token_mask.model_dump(), params.random_seed,
            fingerprint([t.tolist() for t in texts.tokens]), fingerprint(rows)]


def _key(sae: SparseAutoencoder, lm: LanguageModel, params: Params, texts: _Texts) -> str:
    return result_key(sae, lm, _inputs(params, texts), __name__)


# --- texts -----------------------------------------------------------------------------------

def _load(lm: LanguageModel, params: Params, stage: StageFolder) -> _Texts:
    config = params.sparse_probing
    tasks = load_tasks(config.dataset_names, config.probe_train_set_size, config.probe_test_set_size, params.random_seed,
                       stage)
    need_one("sparse_probing", tasks, stage)
    row_of = text_numbers(part.values() for task in tasks for part in (task.train, task.test))
    return _Texts(tokenise(lm, list(row_of), config.context_length),
                  {task.name: _probe_tasks(task, row_of, params.random_seed) for task in tasks},
                  {task.name: {**task.notes, "classes": list(task.train)} for task in tasks})


def _probe_tasks(task: Task, row_of: dict[str, int], seed: int) -> dict[str, ProbeTask]:
    rows = {split: {label: torch.tensor([row_of[text] for text in texts]) for label, texts in part.items()}
            for split, part in (("train", task.train), ("test", task.test))}
    return {label: ProbeTask(draw(rows["train"], label, seed, "train"), draw(rows["test"], label, seed, "test"))
            for label in task.train}


# --- probes ----------------------------------------------------------------------------------

def _accuracies(means: Means, texts: _Texts, params: Params, prefix: str) -> dict[str, Accuracies | Outcomes]:
    """Every probe on one kind of features: accuracies in SAE Bench's definition, in ours which test texts it gets right."""
    # many fits of a few hundred texts: threads would only wait for one another
    with threadpool_limits(1):
        return {
            "sae_bench": {task: _sae_bench_accuracies(means.sae_bench, classes, params, prefix)
                          for task, classes in texts.tasks.items()},
            "lab": {task: _lab_outcomes(means.lab, classes, params, prefix) for task, classes in texts.tasks.items()},
        }


def _sae_bench_accuracies(features: Tensor, classes: dict[str, ProbeTask], params: Params,
                          prefix: str) -> dict[str, dict[str, float]]:
    """metric -> class -> accuracy, for every k no larger than the number of features and for the full probe."""
    top = {f"{prefix}_top_{k}_test_accuracy": {
               label: top_k_accuracy(features, task.train, task.test, k) for label, task in classes.items()}
           for k in _ks(features, params)}
    return {**top, f"{prefix}_test_accuracy": {
        label: sae_bench_full_accuracy(features, task, params.random_seed) for label, task in classes.items()}}


def _lab_outcomes(features: Tensor, classes: dict[str, ProbeTask], params: Params,
                  prefix: str) -> dict[str, dict[str, str]]:
    """metric -> class -> which test texts were told right, by our names of metrics."""
    top = {f"{prefix}_top_{k}_accuracy": {
               label: packed(top_k_correct(features, task.train, task.test, k)) for label, task in classes.items()}
           for k in _ks(features, params)}
    return {**top, f"{prefix}_full_accuracy": {
        label: packed(full_correct(features, task)) for label, task in classes.items()}}


def _ks(features: Tensor, params: Params) -> list[int]:
    return [k for k in params.sparse_probing.k_values if k <= features.shape[1]]


# --- results ---------------------------------------------------------------------------------

def _result(name: str, sae: SparseAutoencoder, lm: LanguageModel, params: Params, texts: _Texts,
            raw: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    bench = {task: _class_means({**raw["sae_bench"][task], **found["sae_bench"][task]}) for task in texts.tasks}
    averages = _task_means(bench)
    known = {f"{prefix}_top_{k}_test_accuracy" for prefix in ("llm", "sae") for k in _SAE_BENCH_K}
    known |= {"llm_test_accuracy", "sae_test_accuracy"}
    unstructured = {f"{task}_results": {**raw["sae_bench"][task], **found["sae_bench"][task]} for task in texts.tasks}
    unstructured[output.LAB] = _lab_block(
        texts, {task: {**raw["lab"][task], **found["lab"][task]} for task in texts.tasks}, params.random_seed)
    config = params.sparse_probing
    return output.sparse_probing_output(
        {"random_seed": params.random_seed, "dataset_names": list(texts.tasks),
         "probe_train_set_size": config.probe_train_set_size, "probe_test_set_size": config.probe_test_set_size,
         "context_length": config.context_length, "sae_batch_size": params.model.llm_batch_size,
         "llm_batch_size": params.model.llm_batch_size, "llm_dtype": params.model.torch_dtype,
         "model_name": lm.name, "k_values": list(config.k_values)},
        {key: value for key, value in averages.items() if key.startswith("llm_") and key in known},
        {key: value for key, value in averages.items() if key.startswith("sae_") and key in known},
        [{"dataset_name": f"{task}_results", **{k: v for k, v in values.items() if k in known}}
         for task, values in bench.items()],
        unstructured, output.envelope(name, sae, "sparse_probing"))


def _lab_block(texts: _Texts, outcomes: Outcomes, seed: int) -> dict[str, Any]:
    """Our accuracies, their intervals, and every outcome behind them, so that SAEs can be compared text by text."""
    by_task = {task: _class_means({metric: {label: _share(bits, texts.tasks[task][label]) for label, bits in cells.items()}
                                   for metric, cells in metrics.items()}) for task, metrics in outcomes.items()}
    asked = {task: {label: _asked(probe) for label, probe in classes.items()} for task, classes in texts.tasks.items()}
    correct = {metric: {task: metrics[metric] for task, metrics in outcomes.items()}
               for metric in sorted({metric for metrics in outcomes.values() for metric in metrics})}
    intervals = {metric: interval(accuracy(asked, cells), seed) for metric, cells in correct.items()}
    return {"metrics": _task_means(by_task), "tasks": by_task,
            "intervals": {metric: list(bounds) for metric, bounds in intervals.items() if bounds is not None},
            "outcomes": {"asked": asked, "correct": correct, "key": fingerprint(
                [asked, fingerprint([t.tolist() for t in texts.tokens])])[:16]}}


def _asked(task: ProbeTask) -> list[str]:
    """The numbers of a class's test texts: those of the class, then the others, in the order of the outcomes."""
    return [" ".join(str(int(row)) for row in task.test.rows[task.test.labels == label]) for label in (1, 0)]


def _share(bits: str, task: ProbeTask) -> float:
    return float(unpacked(bits, len(task.test.rows)).mean())


def _class_means(by_metric: dict[str, dict[str, float]]) -> dict[str, float]:
    return {metric: sum(values.values()) / len(values) for metric, values in by_metric.items()}


def _task_means(by_task: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = {metric for values in by_task.values() for metric in values}
    return {metric: sum(values[metric] for values in by_task.values()) / len(by_task) for metric in sorted(metrics)}
