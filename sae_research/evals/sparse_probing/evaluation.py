"""Sparse probing: how well one, two or five latents tell the classes of labelled texts apart.

Every text becomes one vector: the mean over its tokens of the latents (or of the raw activations, the baseline).
SAE Bench 0.6.0's definition counts every token but BOS, EOS and padding, shows sequence-level encoders the zeroed
padding, and picks the epoch of the full probe on the test texts. Ours (`lab_v1`) counts tokens inside `token_mask`
only, hides everything else from the encoder, and picks nothing on test texts. Test texts are the same. Training texts choose
the latents, so that one set of them is one draw of the accuracy: ours is the mean over `train_draws` sets out of a pool of
`train_pool` times the size, and its interval holds both the test texts and the training texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import Group, by_read_hook, load_tasks, made_once, model_key, need_one
from sae_research.evals.probing import (
    Draw,
    Means,
    ProbeTask,
    TextsByTask,
    brought_in,
    draw,
    sae_bench_full_accuracy,
    text_numbers,
    tokenise,
    top_k_accuracy,
)
from sae_research.evals.sparse_probing.redrawn import TrainDraws, pool_size, redrawn_correct, train_draws
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.setup.evaluated import Evaluated
from sae_research.stats.intervals import accuracy, interval, packed, unpacked
from sae_research.text.tasks import Task, load_task

KIND = "sparse_probing"

# of one set of features and one task: `sae_bench` -> metric -> class -> accuracy, and `lab` -> metric -> class -> which
# test rows were right (`intervals.packed`)
Scores = dict[str, Any]
Outcomes = dict[str, dict[str, dict[str, list[str]]]]
"""By task, metric and class: one string for each draw of training texts."""


class _Texts(NamedTuple):
    """All tasks' texts, each tokenised and kept once."""

    tokens: list[Tensor]
    sizes: list[int]
    """How many of them each task brought in."""
    tasks: dict[str, dict[str, ProbeTask]]
    """task -> class -> rows and labels"""
    draws: dict[str, TrainDraws]
    """task -> draws of training texts out of a larger pool"""
    notes: dict[str, Any]


def evaluate(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `SparseProbingEvalOutput` in plain data.

    A task with too few texts and an SAE that fails are skipped with their reason. Raises `UserError` when no task is left.
    """
    guard = Guard(stage.skip)
    texts = _load(lm, params, stage)
    stage.notes["tasks"] = texts.notes
    for members in by_read_hook(saes):
        group = TextsByTask(lm, members.hook, texts.tokens, texts.sizes, params, params.sparse_probing.context_length)
        raw, found = _scores(group, members, lm, params, texts, guard)
        for name, info in guard.left(members.infos).items():
            with guard.on(name):
                if not any(scores["fires"] for scores in found[name].values()):
                    raise UserError(f"it fires on none of the {len(texts.tokens):,} texts")
                yield name, _result(name, info, lm, params, texts, raw, found[name])


def _scores(
    group: TextsByTask, members: Group, lm: LanguageModel, params: Params, texts: _Texts, guard: Guard
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Of the raw activations by task, and of every SAE by name and task."""
    rows = {task: _rows(texts, task) for task in texts.tasks}
    raw_keys, keys = _keys(group, members, lm, params, texts, rows)
    raw = {
        task: made_once(KIND, key, lambda t=task: _accuracies(group.raw_means(rows[t]), texts, t, params, "llm"))
        for task, key in raw_keys.items()
    }

    def score(task: str, family: Family) -> Iterator[tuple[str, Scores]]:
        for name, means in group.latent_means(family, rows[task]):
            with guard.on(name):
                yield name, _accuracies(means, texts, task, params, "sae")

    scores = harness.Scores(KIND, members, keys, guard)
    with scores.progress("encode and probe", "SAE·task") as bar:
        scores.fill(score, bar, list(texts.tasks))
    notes = Evaluated(KIND, lm, params)
    for name, info in guard.left(members.infos).items():
        for task, key in keys[name].items():
            notes.note(info, task, [f"{KIND}/{key}"])
    return raw, scores.left()


def _keys(
    group: TextsByTask, members: Group, lm: LanguageModel, params: Params, texts: _Texts, rows: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Keys of the result cache: of the raw activations by task, of SAEs by name and task. What the other tasks are is in
    none."""
    shared = [
        params.sparse_probing.model_dump(exclude={"dataset_names"}),
        params.token_mask.model_dump(),
        params.random_seed,
    ]
    drawn = {
        task: [
            group.key(rows[task]),
            {label: [_ids(texts, draw) for draw in probe] for label, probe in classes.items()},
            fingerprint([[_ids(texts, draw) for draw in draws] for draws in texts.draws[task].of_class.values()]),
        ]
        for task, classes in texts.tasks.items()
    }

    def by_task(key: str) -> dict[str, str]:
        return {task: fingerprint([key, about])[:40] for task, about in drawn.items()}

    return by_task(model_key(lm, ["raw", members.hook, shared], __name__)), {
        name: by_task(key) for name, key in members.keys(lm, shared, __name__).items()
    }


def _rows(texts: _Texts, task: str) -> Tensor:
    """Every text of a task."""
    draws = [one for probe in texts.tasks[task].values() for one in probe]
    return torch.cat([one.rows for some in (draws, *texts.draws[task].of_class.values()) for one in some]).unique()


def _ids(texts: _Texts, draw: Draw) -> list[Any]:
    return [draw.labels.tolist(), [texts.tokens[row].tolist() for row in draw.rows]]


# --- texts -----------------------------------------------------------------------------------


def _load(lm: LanguageModel, params: Params, stage: StageFolder) -> _Texts:
    config = params.sparse_probing
    tasks = load_tasks(
        config.dataset_names, config.probe_train_set_size, config.probe_test_set_size, params.random_seed, stage
    )
    need_one("sparse_probing", tasks, stage)
    pools = {task.name: _pool(task, params) for task in tasks}
    row_of = text_numbers(part.values() for task in tasks for part in (task.train, task.test))
    own = brought_in(row_of, ([part.values() for part in (task.train, task.test)] for task in tasks))
    more = len(row_of)
    for pool in pools.values():  # after all else, so that whoever reads the tasks without pools runs the same texts together
        for text in (text for texts in pool.values() for text in texts):
            row_of.setdefault(text, len(row_of))
    sizes = [
        *own,
        *brought_in(
            row_of,
            ([[*([text for text in texts if row_of[text] >= more] for texts in pool.values())]] for pool in pools.values()),
            more,
        ),
    ]
    draws = {
        name: train_draws(
            {label: torch.tensor([row_of[text] for text in texts]) for label, texts in pool.items()},
            config.probe_train_set_size // 2,
            config.train_draws,
            config.train_pool,
            params.random_seed,
        )
        for name, pool in pools.items()
    }
    return _Texts(
        tokenise(lm, list(row_of), config.context_length),
        sizes,
        {task.name: _probe_tasks(task, row_of, params.random_seed) for task in tasks},
        draws,
        {task.name: {**task.notes, "classes": list(task.train), **_drawn(draws[task.name])} for task in tasks},
    )


def _pool(task: Task, params: Params) -> dict[str, list[str]]:
    """Training texts of every class to draw from: more than one draw's where the task has them."""
    config = params.sparse_probing
    if "available" not in task.notes:  # SAE Bench's own selection holds no more
        return task.train
    available = {label: task.notes["available"][label] for label in task.train}
    size = pool_size(available, config.probe_train_set_size // 2, config.train_pool)
    return load_task(task.name, 2 * size, config.probe_test_set_size, params.random_seed).train


def _drawn(draws: TrainDraws) -> dict[str, Any]:
    """What the stage notes of the draws of training texts."""
    return {
        "train_draws": len(next(iter(draws.of_class.values()))),
        "train_share": round(draws.share, 4),
        "train_replaced": draws.replaced,
    }


def _probe_tasks(task: Task, row_of: dict[str, int], seed: int) -> dict[str, ProbeTask]:
    rows = {
        split: {label: torch.tensor([row_of[text] for text in texts]) for label, texts in part.items()}
        for split, part in (("train", task.train), ("test", task.test))
    }
    return {
        label: ProbeTask(draw(rows["train"], label, seed, "train"), draw(rows["test"], label, seed, "test"))
        for label in task.train
    }


# --- probes ----------------------------------------------------------------------------------


def _accuracies(means: Means, texts: _Texts, task: str, params: Params, prefix: str) -> Scores:
    """Every probe of a task on one kind of features: accuracies in SAE Bench's definition, in ours which test texts it
    gets right with each draw of training texts."""
    classes, threads = texts.tasks[task], torch.get_num_threads()
    # many fits of a few hundred texts: threads inside one would only wait for one another
    with threadpool_limits(1):
        return {
            "sae_bench": _sae_bench_accuracies(means.sae_bench, classes, params, prefix),
            "lab": _lab_outcomes(means.lab, classes, texts.draws[task], params, prefix, threads),
            "fires": bool(means.lab.any()),
        }


def _sae_bench_accuracies(
    features: Tensor, classes: dict[str, ProbeTask], params: Params, prefix: str
) -> dict[str, dict[str, float]]:
    """metric -> class -> accuracy, for every k no larger than the number of features and for the full probe."""
    top = {
        f"{prefix}_top_{k}_test_accuracy": {
            label: top_k_accuracy(features, task.train, task.test, k) for label, task in classes.items()
        }
        for k in _ks(features, params)
    }
    return {
        **top,
        f"{prefix}_test_accuracy": {
            label: sae_bench_full_accuracy(features, task, params.random_seed) for label, task in classes.items()
        },
    }


def _lab_outcomes(
    features: Tensor, classes: dict[str, ProbeTask], draws: TrainDraws, params: Params, prefix: str, threads: int
) -> dict[str, dict[str, list[str]]]:
    """metric -> class -> which test texts were told right with each draw of training texts, by our names of metrics."""
    tests = {label: task.test for label, task in classes.items()}
    found = redrawn_correct(features, draws, tests, _ks(features, params), threads)
    return {
        f"{prefix}_full_accuracy" if k is None else f"{prefix}_top_{k}_accuracy": {
            label: [packed(bits) for bits in correct] for label, correct in of_class.items()
        }
        for k, of_class in found.items()
    }


def _ks(features: Tensor, params: Params) -> list[int]:
    return [k for k in params.sparse_probing.k_values if k <= features.shape[1]]


# --- results ---------------------------------------------------------------------------------


def _result(
    name: str,
    info: SAEInfo,
    lm: LanguageModel,
    params: Params,
    texts: _Texts,
    raw: dict[str, Scores],
    found: dict[str, Scores],
) -> dict[str, Any]:
    both = {task: {part: {**raw[task][part], **found[task][part]} for part in ("sae_bench", "lab")} for task in texts.tasks}
    bench = {task: _class_means(parts["sae_bench"]) for task, parts in both.items()}
    averages = _task_means(bench)
    unstructured = {f"{task}_results": parts["sae_bench"] for task, parts in both.items()}
    unstructured[harness.LAB] = _lab_block(texts, {task: parts["lab"] for task, parts in both.items()}, params.random_seed)
    config = params.sparse_probing
    return harness.output(
        KIND,
        name,
        info,
        config={
            "random_seed": params.random_seed,
            "dataset_names": list(texts.tasks),
            "probe_train_set_size": config.probe_train_set_size,
            "probe_test_set_size": config.probe_test_set_size,
            "context_length": config.context_length,
            "sae_batch_size": params.model.llm_batch_size,
            "llm_batch_size": params.model.llm_batch_size,
            "llm_dtype": params.model.torch_dtype,
            "model_name": lm.name,
            "k_values": list(config.k_values),
        },
        metrics={
            part: {key: value for key, value in averages.items() if key.startswith(f"{part}_")} for part in ("llm", "sae")
        },
        details=[{"dataset_name": f"{task}_results", **values} for task, values in bench.items()],
        unstructured=unstructured,
        sae_bench="sparse_probing:SparseProbingEvalOutput",
    )


def _lab_block(texts: _Texts, outcomes: Outcomes, seed: int) -> dict[str, Any]:
    """Our accuracies, their intervals, and every outcome behind them, so that SAEs can be compared text by text."""
    by_task = {
        task: _class_means(
            {
                metric: {label: _share(draws, texts.tasks[task][label]) for label, draws in cells.items()}
                for metric, cells in metrics.items()
            }
        )
        for task, metrics in outcomes.items()
    }
    asked = {task: {label: _asked(probe) for label, probe in classes.items()} for task, classes in texts.tasks.items()}
    correct = {
        metric: {task: metrics[metric] for task, metrics in outcomes.items()}
        for metric in sorted({metric for metrics in outcomes.values() for metric in metrics})
    }
    # one share for all tasks: the largest, whose draws have most in common
    share, replaced = max(d.share for d in texts.draws.values()), any(d.replaced for d in texts.draws.values())

    def bounds(tasks: dict[str, dict[str, list[str]]]) -> list[float] | None:
        found = interval(accuracy({task: asked[task] for task in tasks}, tasks, share, replaced), seed)
        return None if found is None else list(found)

    intervals = {metric: bounds(cells) for metric, cells in correct.items()}
    of_tasks = {
        task: {metric: bounds({task: cells}) for metric, cells in metrics.items()} for task, metrics in outcomes.items()
    }
    return {
        "metrics": _task_means(by_task),
        "tasks": by_task,
        "intervals": {metric: found for metric, found in intervals.items() if found is not None},
        "task_intervals": {
            task: {metric: found for metric, found in metrics.items() if found is not None}
            for task, metrics in of_tasks.items()
        },
        "outcomes": {
            "asked": asked,
            "correct": correct,
            "train_share": share,
            "train_replaced": replaced,
            "train_draws": len(next(iter(next(iter(texts.draws.values())).of_class.values()))),
            "key": fingerprint([asked, fingerprint([t.tolist() for t in texts.tokens]), share, replaced])[:16],
        },
    }


def _asked(task: ProbeTask) -> list[str]:
    """The numbers of a class's test texts: those of the class, then the others, in the order of the outcomes."""
    return [" ".join(str(int(row)) for row in task.test.rows[task.test.labels == label]) for label in (1, 0)]


def _share(draws: list[str], task: ProbeTask) -> float:
    """Mean accuracy over draws of training texts."""
    return float(np.mean([unpacked(bits, len(task.test.rows)).mean() for bits in draws]))


def _class_means(by_metric: dict[str, dict[str, float]]) -> dict[str, float]:
    return {metric: sum(values.values()) / len(values) for metric, values in by_metric.items()}


def _task_means(by_task: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = {metric for values in by_task.values() for metric in values}
    return {metric: sum(values[metric] for values in by_task.values()) / len(by_task) for metric in sorted(metrics)}
