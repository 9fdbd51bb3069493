"""k-sparse probing on the binary tasks of sae-probes: every SAE's latents at the last token of whole texts.

Two definitions of one pass over the texts. The structured block holds sae-probes' as SAE Bench 0.6.0 wraps it: its random
split of rows. Ours (`lab_v1`) takes the split without leaks and the last token that counts; latents, penalties and probes
are chosen alike. What is known of stock: it encodes last tokens cut out of their text (see `last_token`), its saga now and
then stops short of the optimum (see `fit`), `binarize` yields empty metrics and is not offered, and its result cache is
keyed by the SAE's name alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.evals.inputs import by_hook, model_key, result_key
from sae_research.evals.sae_probes.fit import Scores, full_scores, sae_bench_full_scores, top_k_scores
from sae_research.evals.sae_probes.last_token import LastTokens, TypicalNorm, Vectors, tokenise
from sae_research.evals.sae_probes.results import Record, result
from sae_research.evals.sae_probes.tasks import ProbeTask, chosen_names, load_probe_task
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, families
from sae_research.saes.guard import Family, Guard
from sae_research.store import fingerprint
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder
from sae_research.text.tasks import TaskUnavailable

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


def evaluate(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
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
        raise UserError("sparse_probing_sae_probes.dataset_names: no task is usable: " + "; ".join(
            f"{what}: {why}" for what, why in stage.skipped.items()))
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
        with tqdm(total=missing, desc="encode and probe", unit="task", dynamic_ncols=True, disable=not missing,
                  file=sys.stderr) as bar:
            lacking = [task for task in self.texts.tasks
                       if raw[task.name] is None or any(records[task.name] is None for records in found.values())]
            for group in self.texts.groups(lacking):
                self._group(group, raw, found, bar)
        return raw, found

    def _group(self, group: list[ProbeTask], raw: dict[str, Any], found: dict[str, dict[str, Any]], bar: Any) -> None:
        missing = {name: sae for name, sae in self.guard.left(self.saes).items()
                   if any(found[name][task.name] is None for task in group)}
        numbers = torch.cat([self.texts.rows[task.name] for task in group]).unique()
        last = LastTokens([self.texts.tokens[i] for i in numbers], self.norm, self.params,
                          whole=not all(sae.per_token for sae in self.saes.values()))
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
            return _as_record(task, {
                "sae_bench": {"llm": sae_bench_full_scores(
                    activations.sae_bench[bench.train].numpy(), bench.train_labels,
                    activations.sae_bench[bench.test].numpy(), seed)},
                "lab": {"llm": full_scores(activations.lab[lab.train].numpy(), lab.train_labels,
                                           activations.lab[lab.test].numpy(), seed)}})

    def _record(self, task: ProbeTask, latents: Vectors) -> Record:
        """The probes on the k best latents, for every k."""
        probes: dict[str, dict[str, Scores]] = {}
        with threadpool_limits(1):
            for definition, z, split in (("sae_bench", latents.sae_bench, task.sae_bench), ("lab", latents.lab, task.lab)):
                scores = top_k_scores(z[split.train], split.train_labels, z[split.test], self.config.k_values,
                                      self.params.random_seed, saturate=definition == "sae_bench")
                probes[definition] = {f"top_{k}": value for k, value in scores.items()}
        return _as_record(task, probes)


def _as_record(task: ProbeTask, probes: dict[str, dict[str, Scores]]) -> Record:
    """JSON-able: SAE Bench's metrics, and of ours every test text's decision value."""
    labels = task.sae_bench.test_labels
    return {"sae_bench": {probe: scores.metrics(labels) for probe, scores in probes["sae_bench"].items()},
            "lab": {probe: scores.decisions.tolist() for probe, scores in probes["lab"].items()}}

