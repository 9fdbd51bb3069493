"""k-sparse probing on the binary tasks of sae-probes: every SAE's latents at the last token of whole texts.

Two definitions from one pass over the texts. The structured block holds sae-probes' as SAE Bench 0.6.0 wraps it: its random
split of rows. Ours (`lab_v1`) takes the split without leaks and the last token that counts; latents, penalties and probes
are chosen alike. Our block also holds intervals and the outcomes behind them.

How sae-probes itself differs: it encodes last tokens cut out of their text (see `last_token`), its solver (SAGA) now and
then stops short of the optimum (see `fit`), `binarize` yields empty metrics and is not offered, and its result cache is
keyed by the SAE's name alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import Group, by_read_hook, model_key
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
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.stats.intervals import packed
from sae_research.text.tasks import TaskUnavailable

Record = dict[str, dict[str, Any]]
"""One kind of features on one task: `sae_bench` -> probe -> metric -> value, `lab` -> probe -> decision values of the
test texts. A probe is `llm` (all dimensions of the activations) or `top_<k>`."""

METRICS = ("accuracy", "auc", "f1")
_SAE_BENCH_K = (1, 2, 5, 10, 20, 50, 100)
KIND = "sparse_probing_sae_probes"


def result(
    name: str,
    info: SAEInfo,
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
    plain = harness.output(
        KIND,
        name,
        info,
        config={
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
        metrics={part: {key: value for key, value in flat.items() if key.startswith(f"{part}_")} for part in ("llm", "sae")},
        details=[
            {"dataset_name": task, **_flat(probes), "sae_metrics_by_k": _by_k(probes)} for task, probes in bench.items()
        ],
        unstructured={harness.LAB: _lab_block(tasks, rows, raw, found, params.random_seed)},
    )
    return {**plain, "sae_metrics_by_k": _by_k(means)}


def _flat(probes: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """SAE Bench's fields, None where there is no metric; it has fields for seven values of k only."""
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
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `SparseProbingSaeProbesEvalOutput` in plain data.

    A task with one class or too few texts, a k beyond an SAE's latents, and an SAE that fails, are skipped with their
    reason. Raises `UserError` when no task is left.
    """
    texts, guard = _load(lm, params, stage), Guard(stage.skip)
    first = texts.rows[texts.tasks[0].name]
    sample = first[np.linspace(0, len(first) - 1, min(_NORM_SAMPLE, len(first))).astype(int)]
    for members in by_read_hook(saes):
        norm = TypicalNorm(lm, members.hook, [texts.tokens[i] for i in sample], params)
        raw, found = _HookScores(members, norm, texts, params, guard).compute()
        for name, info in guard.left(members.infos).items():
            for k in params.sparse_probing_sae_probes.k_values:
                if k > info.cfg.d_sae:
                    stage.skip(f"{name}, k = {k}", f"the SAE has {info.cfg.d_sae} latents")
            with guard.on(name):
                yield name, result(name, info, lm.name, params, texts.tasks, texts.rows, raw, found[name])


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

    def __init__(self, members: Group, norm: TypicalNorm, texts: _Texts, params: Params, guard: Guard) -> None:
        self.members, self.norm, self.texts, self.params, self.guard = members, norm, texts, params, guard
        self.config = params.sparse_probing_sae_probes
        tasks = {task.name: texts.key(task) for task in texts.tasks}
        shared = [self.config.k_values, params.token_mask.model_dump(), params.random_seed, norm.key, norm.hook]
        keys = {
            name: {task: fingerprint([base, key])[:40] for task, key in tasks.items()}
            for name, base in members.keys(norm.lm, shared, __name__).items()
        }
        self.scores = harness.Scores(KIND, members, keys, guard)
        self.raw_keys = {task: model_key(norm.lm, ["raw", shared, key], __name__) for task, key in tasks.items()}

    def compute(self) -> tuple[dict[str, Record], dict[str, dict[str, Record]]]:
        """Records of the raw activations by task, and of every SAE by name and task."""
        raw = {task: ResultCache(KIND).get(key) for task, key in self.raw_keys.items()}
        lacking = [task for task in self.texts.tasks if raw[task.name] is None or self.scores.lacking([task.name])]
        with self.scores.progress("encode and probe", "task") as bar:
            for group in self.texts.groups(lacking):
                self._group({task.name: task for task in group}, raw, bar)
        return raw, self.scores.left()  # ty: ignore[invalid-explicit-return]

    def _group(self, group: dict[str, ProbeTask], raw: dict[str, Any], bar: Any) -> None:
        numbers = torch.cat([self.texts.rows[task] for task in group]).unique()
        last = LastTokens(
            [self.texts.tokens[i] for i in numbers],
            self.norm,
            self.params,
            whole=not all(info.per_token for info in self.members.infos.values()),
        )
        index = {task: torch.searchsorted(numbers, self.texts.rows[task]) for task in group}
        for name, task in group.items():
            rows = index[name]
            raw[name] = harness.made_once(
                KIND,
                self.raw_keys[name],
                lambda task=task, rows=rows: self._raw_record(task, Vectors(last.raw.sae_bench[rows], last.raw.lab[rows])),
            )

        def score(task: str, family: Family) -> Iterator[tuple[str, Record]]:
            for name, latents in last.latents(family, index[task]):
                with self.guard.on(name):
                    yield name, self._record(group[task], latents)

        self.scores.fill(score, bar, list(group))

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
