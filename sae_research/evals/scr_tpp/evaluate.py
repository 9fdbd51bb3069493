"""The two evaluations: tasks read, scored in both definitions, written as SAE Bench's types.

SAE Bench 0.6.0's definition picks each probe's epoch on its test texts, lets the latents of padding and special
positions into ablation, and redraws TPP's negatives at every measurement; the draws here are made once. Ours
(`lab_v1`) trains a fixed number of epochs, counts tokens inside `token_mask` only, is blind to the sign of a
dictionary row, defines the cases SAE Bench leaves open (see `scr.py`), and gives intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sae_research.evals.scr_tpp import results, scr, tpp
from sae_research.evals.scr_tpp.ablation import Definition, View
from sae_research.evals.scr_tpp.stage import Settings, Study, evaluate
from sae_research.evals.tasks import load_tasks, need_one
from sae_research.evals.text_means import brought_in, text_numbers, tokenise
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.store_stages import StageFolder
from sae_research.text.crossed_tasks import CrossedTask, load_crossed_tasks
from sae_research.text.tasks import Task

SAEs = dict[str, SparseAutoencoder]
Views = dict[Definition, dict[str, View]]


def evaluate_scr(saes: SAEs, lm: LanguageModel, params: Params, stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `ScrEvalOutput` in plain data.

    A task with too few texts, and an SAE whose decoder is not linear, are skipped with their reason. Raises `UserError`
    when no task is left.
    """
    settings = Settings(*(getattr(params.scr, field) for field in Settings._fields))
    tasks: list[CrossedTask] = []
    for name in settings.dataset_names:
        tasks += load_crossed_tasks(name, settings.train_set_size, settings.test_set_size, params.random_seed, stage.skip)
    need_one("scr", tasks, stage)
    stage.notes["tasks"] = {task.name: {**task.notes, "first": list(task.first), "second": list(task.second)}
                            for task in tasks}
    row_of = text_numbers(part.values() for task in tasks for part in (task.train, task.test))
    own = {task.name: scr.scr_task(task, row_of) for task in tasks}

    def score(views: Views, thresholds: list[int]) -> dict[str, Any]:
        bench = {name: scr.sae_bench_metrics(scr.directions(task, views["sae_bench"][name], thresholds, "sae_bench"),
                                             thresholds) for name, task in own.items()}
        lab = [scr.lab_task(task, views["lab"][name], scr.directions(task, views["lab"][name], thresholds, "lab"))
               for name, task in own.items()]
        metrics, intervals = scr.lab_metrics(lab, thresholds, params.random_seed)
        return {"sae_bench": bench, "lab": {
            "metrics": metrics, "intervals": intervals,
            "tasks": {entry.task.name: scr.lab_details(entry, thresholds) for entry in lab}}}

    probe_tasks = {name: task.probes for name, task in own.items()}
    study = Study("scr", settings, tokenise(lm, list(row_of), settings.context_length), _sizes(row_of, tasks), probe_tasks,
                  _rows(probe_tasks), score, __name__)
    pairs = {task.name: task.first for task in tasks}
    for name, found in evaluate(study, saes, lm, params, stage):
        yield name, results.scr_output(name, saes[name], lm, params, settings, found["sae_bench"], pairs, found["lab"])


def evaluate_tpp(saes: SAEs, lm: LanguageModel, params: Params, stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `TppEvalOutput` in plain data.

    A task with too few texts or two classes only, and an SAE whose decoder is not linear, are skipped with their
    reason. Raises `UserError` when no task is left.
    """
    settings = tpp_settings(params)
    tasks = load_tasks(settings.dataset_names, settings.train_set_size, settings.test_set_size, params.random_seed, stage)
    # tasks that are not scored stay in the set of texts: with sparse probing's tasks it is sparse probing's set, and
    # activations and mean latents come from its cache
    row_of = text_numbers(part.values() for task in tasks for part in (task.train, task.test))
    own = {task.name: tpp.tpp_task(task, row_of, params.random_seed) for task in _with_classes(tasks, stage)}
    need_one("tpp", own, stage)
    stage.notes["tasks"] = {task.name: {**task.notes, "classes": list(task.train)} for task in tasks if task.name in own}

    def score(views: Views, thresholds: list[int]) -> dict[str, Any]:
        bench = {name: tpp.outcomes(task, views["sae_bench"][name], thresholds, "sae_bench") for name, task in own.items()}
        lab = {name: tpp.outcomes(task, views["lab"][name], thresholds, "lab") for name, task in own.items()}
        details = {name: tpp.details(task, lab[name], thresholds) for name, task in own.items()}
        return {"sae_bench": {name: tpp.class_metrics(task, bench[name], thresholds) for name, task in own.items()},
                "lab": {"metrics": tpp.mean_metrics([{k: v for k, v in values.items() if k.startswith("tpp_")}
                                                     for values in details.values()]),
                        "intervals": tpp.intervals([(task, lab[name]) for name, task in own.items()], thresholds,
                                                   params.random_seed),
                        "tasks": details}}

    probe_tasks = {name: list(task.probes.values()) for name, task in own.items()}
    study = Study("tpp", settings, tokenise(lm, list(row_of), settings.context_length), _sizes(row_of, tasks), probe_tasks,
                  _rows(probe_tasks), score, __name__)
    for name, found in evaluate(study, saes, lm, params, stage):
        means = {task: tpp.mean_metrics(list(classes.values())) for task, classes in found["sae_bench"].items()}
        yield name, results.tpp_output(name, saes[name], lm, params, settings, means, found["sae_bench"], found["lab"])


def tpp_settings(params: Params) -> Settings:
    """TPP's section of params.yaml, with sparse probing's tasks, sizes and context length where it gives none."""
    own, probing = params.tpp, params.sparse_probing

    def either(value: Any, shared: Any) -> Any:
        return shared if value is None else value

    return Settings(either(own.dataset_names, probing.dataset_names),
                    either(own.train_set_size, probing.probe_train_set_size),
                    either(own.test_set_size, probing.probe_test_set_size),
                    either(own.context_length, probing.context_length), own.n_values, own.probe_epochs)


def _with_classes(tasks: list[Task], stage: StageFolder) -> list[Task]:
    for task in tasks:
        if len(task.train) < tpp.MIN_CLASSES:
            stage.skip(task.name, f"task {task.name} has {len(task.train)} classes: their probes mirror each other, and "
                                  f"the score would be about 0 for any SAE; TPP needs {tpp.MIN_CLASSES}")
    return [task for task in tasks if len(task.train) >= tpp.MIN_CLASSES]


def _sizes(row_of: dict[str, int], tasks: Sequence[Task | CrossedTask]) -> list[int]:
    return brought_in(row_of, ([part.values() for part in (task.train, task.test)] for task in tasks))


def _rows(tasks: dict[str, Any]) -> Any:
    """Which texts every probe is trained and tested on, JSON-able."""
    return {name: [[[d.rows.tolist(), d.labels.tolist()] for d in probe] for probe in own] for name, own in tasks.items()}
