"""One SAE's records as a result: SAE Bench's schema, our figures, their intervals, and every outcome behind them.

k-sparse probing on the binary tasks of sae-probes: every SAE's latents at the last token of whole texts.

Two definitions of one pass over the texts. The structured block holds sae-probes' as SAE Bench 0.6.0 wraps it: its random
split of rows. Ours (`lab_v1`) takes the split without leaks and the last token that counts; latents, penalties and probes
are chosen alike. What is known of stock: it encodes last tokens cut out of their text (see `last_token`), its saga now and
then stops short of the optimum (see `fit`), `binarize` yields empty metrics and is not offered, and its result cache is
keyed by the SAE's name alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import by_hook, model_key, result_key
from sae_research.evals.sae_probes.probes import (
    Scores,
    full_scores,
    mean_interval,
    resampled_metrics,
    sae_bench_full_scores,
    top_k_scores,
)
from sae_research.evals.sae_probes.tasks import (
    LastTokens,
    ProbeTask,
    TypicalNorm,
    Vectors,
    chosen_names,
    load_probe_task,
    tokenise,
)
from sae_research.lm import LanguageModel
from sae_research.runtime.cache import ResultCache
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, families
from sae_research.saes.base import Family, Guard
from sae_research.stats.intervals import packed
from sae_research.text.tasks import TaskUnavailable

Record = dict[str, dict[str, Any]]
"""One kind of features on one task: `sae_bench` -> probe -> metric -> value, `lab` -> probe -> decision values of the
test texts. A probe is `llm` (all dimensions of the activations) or `top_<k>`."""

METRICS = ("accuracy", "auc", "f1")
_SAE_BENCH_K = (1, 2, 5, 10, 20, 50, 100)
EVAL_TYPE = "sparse_probing_sae_probes"


def result(
    name: str,
    sae: SparseAutoencoder,
    model_name: str,
    params: Params,
    tasks: list[ProbeTask],
    rows: dict[str, Tensor],
    raw: dict[str, Record],
    found: dict[str, Record],
) -> dict[str, Any]:
    """What SAE Bench's `SparseProbingSaeProbesEvalOutput` is as plain data, with ours in the unstructured block.

    rows: task -> number of each of its texts, equal for equal texts. SAE Bench's own class is not imported: that reads
    all 113 files, ten seconds; a test holds the two equal.
    """
    config = params.sparse_probing_sae_probes
    bench = {task.name: {**raw[task.name]["sae_bench"], **found[task.name]["sae_bench"]} for task in tasks}
    means = {
        probe: {metric: float(np.mean([values[probe][metric] for values in bench.values()])) for metric in METRICS}
        for probe in next(iter(bench.values()))
    }
    flat = _flat(means)
    return {
        **harness.envelope(name, sae, EVAL_TYPE),
        "eval_type_id": EVAL_TYPE,
        "eval_config": {
            "model_name": model_name,
            "random_seed": params.random_seed,
            "dataset_names": [task.name for task in tasks],
            "reg_type": "l1",
            "setting": "normal",
            "ks": list(config.k_values),
            "binarize": False,
            "results_path": "",
            "model_cache_path": None,
            "include_llm_baseline": True,
            "baseline_method": "logreg",
        },
        "eval_result_metrics": {
            "llm": {key: value for key, value in flat.items() if key.startswith("llm_")},
            "sae": {key: value for key, value in flat.items() if key.startswith("sae_")},
        },
        "eval_result_details": [
            {"dataset_name": task, **_flat(probes), "sae_metrics_by_k": _by_k(probes)} for task, probes in bench.items()
        ],
        "sae_metrics_by_k": _by_k(means),
        "eval_result_unstructured": {harness.LAB: _lab_block(tasks, rows, raw, found, params.random_seed)},
    }


def _flat(probes: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """SAE Bench's fields, None where there is no figure; it has fields for seven values of k only."""
    fields = {"llm": "llm", **{f"top_{k}": f"sae_top_{k}" for k in _SAE_BENCH_K}}
    values = {
        f"{field}_test_{metric}": probes.get(probe, {}).get(metric) for probe, field in fields.items() for metric in METRICS
    }
    return {**values, "sae_test_accuracy": None}


def _by_k(probes: dict[str, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        int(probe.removeprefix("top_")): {f"test_{metric}": value for metric, value in values.items()}
        for probe, values in probes.items()
        if probe != "llm"
    }


def _lab_block(
    tasks: list[ProbeTask], rows: dict[str, Tensor], raw: dict[str, Record], found: dict[str, Record], seed: int
) -> dict[str, Any]:
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


_TOKENS_AT_ONCE = 200_000
"""Tasks are taken together up to so many tokens: whole texts of more are never held for encoders over sequences."""
_NORM_SAMPLE = 32
"""Texts, spread evenly over the first task's, that the typical activation norm is taken from: tasks added after it change
nothing for those there."""


class _Texts(NamedTuple):
    tasks: list[ProbeTask]
    rows: dict[str, Tensor]
    """task -> number of each of its texts in `tokens`: a text that several tasks share is there once."""
    tokens: list[Tensor]

    def key(self, task: ProbeTask) -> str:
        splits = [[part.tolist() for part in split] for split in (task.sae_bench, task.lab)]
        return fingerprint([[self.tokens[row].tolist() for row in self.rows[task.name]], splits])

    def groups(self, tasks: Sequence[ProbeTask]) -> Iterator[list[ProbeTask]]:
        """Tasks in order, as many together as `_TOKENS_AT_ONCE` allows; tasks that share texts are neighbours."""
        group: list[ProbeTask] = []
        size = 0
        for task in tasks:
            tokens = sum(len(self.tokens[row]) for row in self.rows[task.name])
            if group and size + tokens > _TOKENS_AT_ONCE:
                yield group
                group, size = [], 0
            group.append(task)
            size += tokens
        if group:
            yield group


def evaluate(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `SparseProbingSaeProbesEvalOutput` in plain data.

    A task with one class or too few texts, a k beyond an SAE's latents, and an SAE that fails, are skipped with their
    reason. Raises `UserError` when no task is left.
    """
    texts, guard = _load(lm, params, stage), Guard(stage.skip)
    first = texts.rows[texts.tasks[0].name]
    sample = first[np.linspace(0, len(first) - 1, min(_NORM_SAMPLE, len(first))).astype(int)]
    for hook, members in by_hook(saes).items():
        norm = TypicalNorm(lm, hook, [texts.tokens[i] for i in sample], params)
        raw, found = _HookScores(members, norm, texts, params, guard).compute()
        for name, sae in guard.left(members).items():
            for k in params.sparse_probing_sae_probes.k_values:
                if k > sae.cfg.d_sae:
                    stage.skip(f"{name}, k = {k}", f"the SAE has {sae.cfg.d_sae} latents")
            with guard.on(name):
                yield name, result(name, sae, lm.name, params, texts.tasks, texts.rows, raw, found[name])


def _load(lm: LanguageModel, params: Params, stage: StageFolder) -> _Texts:
    config = params.sparse_probing_sae_probes
    tasks: list[ProbeTask] = []
    for name in chosen_names(config):
        try:
            tasks.append(load_probe_task(name, config, params.random_seed))
        except TaskUnavailable as error:
            stage.skip(name, str(error))
    if not tasks:
        raise UserError(
            "sparse_probing_sae_probes.dataset_names: no task is usable: "
            + "; ".join(f"{what}: {why}" for what, why in stage.skipped.items())
        )
    row_of: dict[str, int] = {}
    rows = {task.name: torch.tensor([row_of.setdefault(text, len(row_of)) for text in task.texts]) for task in tasks}
    stage.notes["tasks"] = {task.name: task.notes for task in tasks}
    stage.notes["context_length"] = config.context_length
    return _Texts(tasks, rows, tokenise(lm, list(row_of), config.context_length))


class _HookScores:
    """Every probe on SAEs that read one hook, group of tasks by group of tasks, family by family."""

    def __init__(self, saes: Family, norm: TypicalNorm, texts: _Texts, params: Params, guard: Guard) -> None:
        self.saes, self.norm, self.texts, self.params, self.guard = saes, norm, texts, params, guard
        self.config = params.sparse_probing_sae_probes
        self.cache = ResultCache("sparse_probing_sae_probes")
        task_keys = {task.name: texts.key(task) for task in texts.tasks}
        shared = [self.config.k_values, params.token_mask.model_dump(), params.random_seed, norm.key, norm.hook]
        self.keys = {}
        for name, sae in saes.items():
            base = result_key(sae, norm.lm, shared, __name__)
            self.keys |= {(name, task): fingerprint([base, key])[:40] for task, key in task_keys.items()}
        self.raw_keys = {task: model_key(norm.lm, ["raw", shared, key], __name__) for task, key in task_keys.items()}

    def compute(self) -> tuple[dict[str, Record], dict[str, dict[str, Record]]]:
        """Records of the raw activations by task, and of every SAE by name and task."""
        raw = {task: self.cache.get(key) for task, key in self.raw_keys.items()}
        found: dict[str, dict[str, Any]] = {name: {} for name in self.saes}
        for (name, task), key in self.keys.items():
            found[name][task] = self.cache.get(key)
        missing = sum(record is None for records in found.values() for record in records.values())
        with tqdm(
            total=missing, desc="encode and probe", unit="task", dynamic_ncols=True, disable=not missing, file=sys.stderr
        ) as bar:
            lacking = [
                task
                for task in self.texts.tasks
                if raw[task.name] is None or any(records[task.name] is None for records in found.values())
            ]
            for group in self.texts.groups(lacking):
                self._group(group, raw, found, bar)
        return raw, found

    def _group(self, group: list[ProbeTask], raw: dict[str, Any], found: dict[str, dict[str, Any]], bar: Any) -> None:
        missing = {
            name: sae
            for name, sae in self.guard.left(self.saes).items()
            if any(found[name][task.name] is None for task in group)
        }
        numbers = torch.cat([self.texts.rows[task.name] for task in group]).unique()
        last = LastTokens(
            [self.texts.tokens[i] for i in numbers],
            self.norm,
            self.params,
            whole=not all(sae.per_token for sae in self.saes.values()),
        )
        index = {task.name: torch.searchsorted(numbers, self.texts.rows[task.name]) for task in group}
        for task in group:
            if raw[task.name] is None:
                rows = index[task.name]
                raw[task.name] = self._raw_record(task, Vectors(last.raw.sae_bench[rows], last.raw.lab[rows]))
                self.cache.put(self.raw_keys[task.name], raw[task.name])
        for names in families(missing):
            for task in group:
                family = self.guard.left({name: missing[name] for name in names})
                if all(found[name][task.name] for name in family):
                    continue
                for name, record in self.guard.each(family, partial(self._records, task, last, index[task.name])):
                    with self.guard.on(name):
                        self.cache.put(self.keys[name, task.name], record)
                        found[name][task.name] = record
                    bar.update()

    def _records(self, task: ProbeTask, last: LastTokens, rows: Tensor, family: Family) -> Iterator[tuple[str, Record]]:
        for name, latents in last.latents(family, rows):
            with self.guard.on(name):
                yield name, self._record(task, latents)

    def _raw_record(self, task: ProbeTask, activations: Vectors) -> Record:
        """The probe on all dimensions of the activations."""
        bench, lab, seed = task.sae_bench, task.lab, self.params.random_seed
        # threads would only wait for one another: many fits of a few hundred texts
        with threadpool_limits(1):
            return _as_record(
                task,
                {
                    "sae_bench": {
                        "llm": sae_bench_full_scores(
                            activations.sae_bench[bench.train].numpy(),
                            bench.train_labels,
                            activations.sae_bench[bench.test].numpy(),
                            seed,
                        )
                    },
                    "lab": {
                        "llm": full_scores(
                            activations.lab[lab.train].numpy(), lab.train_labels, activations.lab[lab.test].numpy(), seed
                        )
                    },
                },
            )

    def _record(self, task: ProbeTask, latents: Vectors) -> Record:
        """The probes on the k best latents, for every k."""
        probes: dict[str, dict[str, Scores]] = {}
        with threadpool_limits(1):
            for definition, z, split in (("sae_bench", latents.sae_bench, task.sae_bench), ("lab", latents.lab, task.lab)):
                scores = top_k_scores(
                    z[split.train],
                    split.train_labels,
                    z[split.test],
                    self.config.k_values,
                    self.params.random_seed,
                    saturate=definition == "sae_bench",
                )
                probes[definition] = {f"top_{k}": value for k, value in scores.items()}
        return _as_record(task, probes)


def _as_record(task: ProbeTask, probes: dict[str, dict[str, Scores]]) -> Record:
    """JSON-able: SAE Bench's metrics, and of ours every test text's decision value."""
    labels = task.sae_bench.test_labels
    return {
        "sae_bench": {probe: scores.metrics(labels) for probe, scores in probes["sae_bench"].items()},
        "lab": {probe: scores.decisions.tolist() for probe, scores in probes["lab"].items()},
    }
