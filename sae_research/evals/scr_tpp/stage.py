"""What SCR and TPP share: texts once, probes once per hook point, then every SAE scored from its mean latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.evals.inputs import by_hook, result_key
from sae_research.evals.probes import ProbeTask
from sae_research.evals.scr_tpp import linear
from sae_research.evals.scr_tpp.ablation import Definition, View, decoder_matrix
from sae_research.evals.scr_tpp.linear import Probes
from sae_research.evals.text_means import Means, TextsByTask
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.saes.guard import Family, Guard
from sae_research.store import fingerprint
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder

DEFINITIONS: tuple[Definition, ...] = ("sae_bench", "lab")


class Settings(NamedTuple):
    """The evaluation's section of params.yaml."""

    dataset_names: Sequence[str]
    train_set_size: int
    test_set_size: int
    context_length: int
    n_values: Sequence[int]
    probe_epochs: int


class Study(NamedTuple):
    """One evaluation, its texts and tasks read."""

    kind: str
    """`scr` or `tpp`."""
    settings: Settings
    tokens: list[Tensor]
    sizes: Sequence[int]
    """How many of them each task brought in."""
    tasks: dict[str, Sequence[ProbeTask]]
    """Task -> its probes, in the order of the columns of a `View`."""
    identity: Any
    """What tells these tasks from others, JSON-able."""
    score: Callable[[dict[Definition, dict[str, View]], list[int]], dict[str, Any]]
    """(views by definition and task, thresholds) -> everything a result holds; goes to the cache."""
    module: str
    """Name of the module that `score` is in: its code decides whether a cached result is still right."""


def evaluate(study: Study, saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what `study.score` returned) of every SAE whose decoder allows it, in the order given."""
    guard = Guard(stage.skip)
    cache, thresholds = ResultCache(study.kind), sorted(set(study.settings.n_values))
    for hook, members in by_hook(saes).items():
        keys = {name: _key(study, sae, lm, params) for name, sae in members.items()}
        found = {name: cache.get(keys[name]) for name in members}
        missing = _linear({name: sae for name, sae in members.items() if found[name] is None}, guard)
        if missing:
            group = TextsByTask(lm, hook, study.tokens, study.sizes, params, study.settings.context_length)
            rows = torch.arange(len(study.tokens))
            trained = _train(study, group.raw_means(rows), params.random_seed)
            with tqdm(total=len(missing), desc=f"encode and ablate ({study.kind})", unit="SAE", dynamic_ncols=True) as bar:
                for name, scores in guard.each({name: members[name] for name in missing},
                                               partial(_scores, study, group, rows, trained, missing, thresholds, guard)):
                    with guard.on(name):
                        cache.put(keys[name], scores)
                        found[name] = scores
                    bar.update()
        for name, sae in members.items():
            if found[name] is not None:
                _note_cap(stage, name, sae.cfg.d_sae, thresholds)
                yield name, found[name]


def _scores(study: Study, group: TextsByTask, rows: Tensor, trained: _Trained, matrices: dict[str, Tensor],
            thresholds: list[int], guard: Guard, family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, means in group.latent_means(family, rows):
        with guard.on(name):
            yield name, study.score(_views(study, trained, means, matrices[name]), thresholds)


def _key(study: Study, sae: SparseAutoencoder, lm: LanguageModel, params: Params) -> str:
    tokens = fingerprint([row.tolist() for row in study.tokens])
    settings = {**study.settings._asdict(), "dataset_names": list(study.tasks)}
    return result_key(sae, lm, [study.kind, settings, tokens, study.sizes, study.identity, params.token_mask.model_dump(),
                                params.random_seed], study.module, __name__)


def _linear(saes: dict[str, SparseAutoencoder], guard: Guard) -> dict[str, Tensor]:
    """What each SAE's latents add to the reconstruction [d_sae, d_in]; SAEs with another kind of decoder are skipped."""
    matrices = {}
    for name, sae in saes.items():
        with guard.on(name):
            matrices[name] = decoder_matrix(sae)
    return matrices


def _note_cap(stage: StageFolder, name: str, d_sae: int, thresholds: Sequence[int]) -> None:
    above = [n for n in thresholds if n > d_sae]
    if above:
        stage.notes.setdefault("thresholds_capped", {})[name] = d_sae
        print(f"{name}: it has {d_sae} latents: n = {', '.join(map(str, above))} ablates at most {d_sae}", flush=True)


# --- probes and views ------------------------------------------------------------------------

class _Trained(NamedTuple):
    """Probes of every task and what they read of the model's own activations [texts, probes], by definition."""

    probes: dict[Definition, Probes]
    logits: dict[Definition, Tensor]


def _train(study: Study, raw: Means, seed: int) -> _Trained:
    tasks = [task for own in study.tasks.values() for task in own]
    # by a probe's place in its task, not by the task's name: a local task's name is a path
    starts = [linear.start(seed, number, raw.lab.shape[1], len(task.train.rows), study.settings.probe_epochs)
              for own in study.tasks.values() for number, task in enumerate(own)]
    fitted: dict[Definition, Probes] = {}
    logits: dict[Definition, Tensor] = {}
    for definition in DEFINITIONS:
        features = getattr(raw, definition).numpy()
        fitted[definition] = linear.fit(features, tasks, starts, pick_on_test=definition == "sae_bench")
        logits[definition] = torch.from_numpy(fitted[definition].logits(features))
    return _Trained(fitted, logits)


def _views(study: Study, trained: _Trained, means: Means, matrix: Tensor) -> dict[Definition, dict[str, View]]:
    """One SAE as every task's probes see it, in both definitions."""
    views: dict[Definition, dict[str, View]] = {}
    for definition in DEFINITIONS:
        latents = getattr(means, definition)
        removed = means.everywhere if definition == "sae_bench" else latents
        pull = matrix @ torch.from_numpy(trained.probes[definition].weight).T
        views[definition], at = {}, 0
        for name, own in study.tasks.items():
            columns = slice(at, at + len(own))
            views[definition][name] = View(trained.logits[definition][:, columns], latents, removed, pull[:, columns])
            at += len(own)
    return views
