"""Sparse probing: how well one, two or five latents tell the classes of labelled texts apart.

Every text becomes one vector: the mean over its tokens of the latents (or of the raw activations, the baseline).
SAE Bench 0.6.0's definition counts every token but BOS, EOS and padding, shows sequence-level encoders the zeroed
padding, and picks the epoch of the full probe on the test texts. Ours (`lab_v1`) counts tokens inside `token_mask`
only, hides everything else from the encoder, and picks nothing on test texts. Texts and draws are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.evals import inputs, output, probes
from sae_research.evals.inputs import by_hook, result_key
from sae_research.evals.probes import ProbeTask, draw, full_accuracy, sae_bench_full_accuracy, top_k_accuracy
from sae_research.lm import (
    ActivationPool,
    Batch,
    LanguageModel,
    collect,
    mask,
    median_activation_norm,
    sae_bench_mask,
    token_mask,
)
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each, families
from sae_research.store import ResultCache, StageFolder, fingerprint
from sae_research.text.tasks import Task, TaskUnavailable, load_task

_SAE_BENCH_K = (1, 2, 5, 10, 20, 50, 100)

# accuracies of one set of features: task -> metric -> class -> accuracy
Accuracies = dict[str, dict[str, dict[str, float]]]


class _Texts(NamedTuple):
    """All tasks' texts, each tokenised and kept once."""

    tokens: list[Tensor]
    tasks: dict[str, dict[str, ProbeTask]]
    """task -> class -> rows and labels"""
    notes: dict[str, Any]


class _Means(NamedTuple):
    """One vector per text in both definitions [texts, d]."""

    sae_bench: Tensor
    lab: Tensor


def evaluate(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `SparseProbingEvalOutput` in plain data.

    A task with too few texts is skipped with its reason. Raises `UserError` when no task is left.
    """
    texts = _load(lm, params, stage)
    stage.notes["tasks"] = texts.notes
    for hook, members in by_hook(saes).items():
        keys = {name: _key(sae, lm, params, texts) for name, sae in members.items()}
        cache = ResultCache("sparse_probing")
        raw_key = fingerprint(["raw", hook, _inputs(lm, params, texts)])[:40]
        found = {name: cache.get(keys[name]) for name in members}
        raw, missing = cache.get(raw_key), {name: sae for name, sae in members.items() if found[name] is None}
        if missing or raw is None:
            group = _Group(lm, hook, params, texts)
            if raw is None:
                raw = _accuracies(group.raw_means(), texts, params, "llm")
                cache.put(raw_key, raw)
            with tqdm(total=len(missing), desc="encode and probe", unit="SAE", dynamic_ncols=True) as bar:
                for names in families(missing):
                    for name, means in group.latent_means({n: missing[n] for n in names}):
                        found[name] = _accuracies(means, texts, params, "sae")
                        cache.put(keys[name], found[name])
                        bar.update()
        for name, sae in members.items():
            yield name, _result(name, sae, lm, params, texts, raw, found[name])


def _inputs(lm: LanguageModel, params: Params, texts: _Texts) -> list[Any]:
    rows = {name: {label: [d.rows.tolist() for d in (task.train, task.test)] for label, task in classes.items()}
            for name, classes in texts.tasks.items()}
    return [params.sparse_probing.model_dump(), params.token_mask.model_dump(), params.random_seed, lm.fingerprint,
            str(lm.dtype), lm.device.type, torch.__version__, fingerprint([t.tolist() for t in texts.tokens]),
            fingerprint(rows)]


def _key(sae: SparseAutoencoder, lm: LanguageModel, params: Params, texts: _Texts) -> str:
    import sae_research.evals.sparse_probing as this

    return result_key(sae, lm, _inputs(lm, params, texts), [this, probes, mask, inputs])


# --- texts -----------------------------------------------------------------------------------

def _load(lm: LanguageModel, params: Params, stage: StageFolder) -> _Texts:
    config = params.sparse_probing
    tasks: list[Task] = []
    for name in config.dataset_names:
        try:
            tasks.append(load_task(name, config.probe_train_set_size, config.probe_test_set_size, params.random_seed))
        except TaskUnavailable as error:
            stage.skip(name, str(error))
    if not tasks:
        raise UserError("sparse_probing.dataset_names: no task is usable: " + "; ".join(
            f"{what}: {why}" for what, why in stage.skipped.items()))
    row_of: dict[str, int] = {}
    for task in tasks:
        for part in (task.train, task.test):
            for class_texts in part.values():
                for text in class_texts:
                    row_of.setdefault(text, len(row_of))
    encoded = lm.tokenizer(list(row_of), add_special_tokens=False, truncation=True,
                           max_length=config.context_length - 1)["input_ids"]
    empty = next((text for text, ids in zip(row_of, encoded, strict=True) if not ids), None)
    if empty is not None:
        raise UserError(f"sparse_probing: the text {empty[:40]!r} has no tokens; remove it from its task")
    # as in training and in SAE Bench, a text starts with the separator (BOS)
    return _Texts([torch.tensor([lm.separator_id, *ids]) for ids in encoded],
                  {task.name: _probe_tasks(task, row_of, params.random_seed) for task in tasks},
                  {task.name: {**task.notes, "classes": list(task.train)} for task in tasks})


def _probe_tasks(task: Task, row_of: dict[str, int], seed: int) -> dict[str, ProbeTask]:
    rows = {split: {label: torch.tensor([row_of[text] for text in texts]) for label, texts in part.items()}
            for split, part in (("train", task.train), ("test", task.test))}
    return {label: ProbeTask(draw(rows["train"], label, seed, "train"), draw(rows["test"], label, seed, "test"))
            for label in task.train}


# --- vectors ---------------------------------------------------------------------------------

class _Group:
    """The texts' activations at one hook, and their means."""

    def __init__(self, lm: LanguageModel, hook: str, params: Params, texts: _Texts) -> None:
        self.lm, self.params = lm, params
        self.pool: ActivationPool = collect(lm, hook, texts.tokens, params.model.llm_batch_size,
                                            params.activation_caching, "activations")
        sample = self.pool.batch(range(min(len(self.pool), 64)))
        self.median_norm = median_activation_norm(lm, sample.tokens, sample.acts)

    def _masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(SAE Bench's, ours): bool [batch, seq]."""
        bench = sae_bench_mask(self.lm, batch.tokens) & batch.real
        lab = token_mask(self.lm, batch.tokens, batch.acts, self.params.token_mask, self.median_norm) & batch.real
        return bench, lab

    @torch.no_grad()
    def raw_means(self) -> _Means:
        """Mean activation of every text."""
        means = self._empty(self.pool.flat.shape[1])
        for batch in self.pool.batches(self.params.model.llm_batch_size):
            bench, lab = self._masks(batch)
            means.sae_bench[batch.index] = _masked_mean(batch.acts, bench)
            means.lab[batch.index] = _masked_mean(batch.acts, lab)
        return means

    @torch.no_grad()
    def latent_means(self, saes: dict[str, SparseAutoencoder]) -> Iterator[tuple[str, _Means]]:
        """(name, mean latents of every text) for SAEs of one family, which encode together."""
        means = {name: self._empty(sae.cfg.d_sae) for name, sae in saes.items()}
        per_token = all(sae.per_token for sae in saes.values())
        for batch in self.pool.batches(self.params.model.llm_batch_size):
            bench, lab = self._masks(batch)
            if per_token:
                for name, z in encode_each(saes, batch.acts, None):
                    means[name].sae_bench[batch.index] = _masked_mean(z, bench)
                    means[name].lab[batch.index] = _masked_mean(z, lab)
                continue
            for name, z in encode_each(saes, batch.acts, lab):
                means[name].lab[batch.index] = _masked_mean(z, lab)
            x_padded, bench = self._as_sae_bench_shows(batch, bench)
            for name, z in encode_each(saes, x_padded, None):
                means[name].sae_bench[batch.index] = _masked_mean(z, bench)
        yield from means.items()

    def _as_sae_bench_shows(self, batch: Batch, bench: Tensor) -> tuple[Tensor, Tensor]:
        """Activations zeroed at special tokens and padded with zeros to the context length, and their mask."""
        pad = self.params.sparse_probing.context_length - bench.shape[1]
        x = batch.acts * bench[..., None]
        return torch.nn.functional.pad(x, (0, 0, 0, pad)), torch.nn.functional.pad(bench, (0, pad))

    def _empty(self, width: int) -> _Means:
        return _Means(torch.zeros(len(self.pool), width), torch.zeros(len(self.pool), width))


def _masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over counted tokens [batch, d], zero where none counts, on the CPU. values: [batch, seq, d]."""
    weight = keep / keep.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bs,bsd->bd", weight.to(values.dtype), values).float().cpu()


# --- probes ----------------------------------------------------------------------------------

def _accuracies(means: _Means, texts: _Texts, params: Params, prefix: str) -> dict[str, Accuracies]:
    """Accuracy of every probe on one kind of features, in both definitions: definition -> task -> metric -> class."""
    # many fits of a few hundred texts: threads would only wait for one another
    with threadpool_limits(1):
        return _all_accuracies(means, texts, params, prefix)


def _all_accuracies(means: _Means, texts: _Texts, params: Params, prefix: str) -> dict[str, Accuracies]:
    bench_full = partial(sae_bench_full_accuracy, seed=params.random_seed)
    kinds = {"sae_bench": (means.sae_bench, bench_full), "lab": (means.lab, full_accuracy)}
    return {definition: {task: _task_accuracies(features, classes, full, params, prefix)
                         for task, classes in texts.tasks.items()}
            for definition, (features, full) in kinds.items()}


def _task_accuracies(features: Tensor, classes: dict[str, ProbeTask], full: Callable[..., float], params: Params,
                     prefix: str) -> dict[str, dict[str, float]]:
    """metric -> class -> accuracy, for every k no larger than the number of features and for the full probe."""
    top = {f"{prefix}_top_{k}_test_accuracy": {
               label: top_k_accuracy(features, task.train, task.test, k) for label, task in classes.items()}
           for k in params.sparse_probing.k_values if k <= features.shape[1]}
    return {**top, f"{prefix}_test_accuracy": {
        label: full(features, task) for label, task in classes.items()}}


# --- results ---------------------------------------------------------------------------------

def _result(name: str, sae: SparseAutoencoder, lm: LanguageModel, params: Params, texts: _Texts,
            raw: dict[str, Accuracies], found: dict[str, Accuracies]) -> dict[str, Any]:
    bench = {task: _class_means({**raw["sae_bench"][task], **found["sae_bench"][task]}) for task in texts.tasks}
    lab = {task: _class_means({**raw["lab"][task], **found["lab"][task]}) for task in texts.tasks}
    averages = _task_means(bench)
    known = {f"{prefix}_top_{k}_test_accuracy" for prefix in ("llm", "sae") for k in _SAE_BENCH_K}
    known |= {"llm_test_accuracy", "sae_test_accuracy"}
    unstructured = {f"{task}_results": {**raw["sae_bench"][task], **found["sae_bench"][task]} for task in texts.tasks}
    unstructured[output.LAB] = {
        "metrics": {_lab_name(key): value for key, value in _task_means(lab).items()},
        "tasks": {task: {_lab_name(key): value for key, value in values.items()} for task, values in lab.items()}}
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


def _class_means(by_metric: dict[str, dict[str, float]]) -> dict[str, float]:
    return {metric: sum(values.values()) / len(values) for metric, values in by_metric.items()}


def _task_means(by_task: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = {metric for values in by_task.values() for metric in values}
    return {metric: sum(values[metric] for values in by_task.values()) / len(by_task) for metric in sorted(metrics)}


def _lab_name(metric: str) -> str:
    """`sae_top_5_test_accuracy` -> `sae_top_5_accuracy`, `sae_test_accuracy` -> `sae_full_accuracy`."""
    return metric.replace("_test_accuracy", "_accuracy" if "_top_" in metric else "_full_accuracy")
