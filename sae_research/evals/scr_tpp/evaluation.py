"""Spurious correlation removal (SCR) and targeted probe perturbation (TPP), in SAE Bench 0.6.0's definition and in ours.

Texts are read once and probes trained once per hook; every SAE is then scored from its mean latents (`ablation`,
`measures`).

SAE Bench 0.6.0's definition picks each probe's epoch on its test texts, lets the latents of padding and special
positions into ablation, and redraws TPP's negatives at every measurement; the draws here are made once. Ours
(`lab_v1`) trains a fixed number of epochs, counts tokens inside `token_mask` only, is blind to the sign of a
dictionary row, defines the cases SAE Bench leaves open (see `measures`), and gives intervals.

Results are SAE Bench's own output types. These have fields for n in 2, 5, 10, 20, 50, 100, 500 only and drop others without
a word; our block keeps every n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import Scores, by_hook, load_tasks, need_one
from sae_research.evals.probing import Means, ProbeTask, TextsByTask, brought_in, text_numbers, tokenise
from sae_research.evals.scr_tpp import ablation, measures
from sae_research.evals.scr_tpp.ablation import Definition, Probes, View, decoder_matrix
from sae_research.lm import LanguageModel
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.text.crossed_tasks import CrossedTask, load_crossed_tasks
from sae_research.text.tasks import Task

Metrics = dict[str, float]


def _result(
    study: Study,
    name: str,
    info: SAEInfo,
    lm: LanguageModel,
    params: Params,
    tasks: dict[str, Metrics],
    lab: dict[str, Any],
    pairs: dict[str, tuple[str, str]] | None = None,
    classes: dict[str, dict[str, Metrics]] | None = None,
) -> dict[str, Any]:
    """tasks: SAE Bench's metrics by task; pairs (SCR): the first attribute's values by task; classes (TPP): the metrics
    by task and class; lab: our block."""
    suffix = "_tpp_results" if study.kind == "tpp" else "_results"
    return harness.output(
        study.kind,
        name,
        info,
        config=_config(lm, params, study, list(tasks), pairs or {}),
        metrics={f"{study.kind}_metrics": _average(list(tasks.values()))},
        details=[{"dataset_name": f"{task}{suffix}", **values} for task, values in tasks.items()],
        unstructured={**(classes or {}), harness.LAB: _with_cap(lab, info, study.settings)},
        sae_bench=f"scr_and_tpp:{study.kind.capitalize()}EvalOutput",
    )


def _average(tasks: Sequence[Metrics]) -> Metrics:
    """Mean over the tasks that have a metric (SAE Bench's `scr_metric` can be missing)."""
    keys = {key: None for values in tasks for key in values}
    having = {key: [values[key] for values in tasks if key in values] for key in keys}
    return {key: sum(values) / len(values) for key, values in having.items()}


def _with_cap(lab: dict[str, Any], info: SAEInfo, settings: Settings) -> dict[str, Any]:
    capped = {str(n): info.cfg.d_sae for n in sorted(set(settings.n_values)) if n > info.cfg.d_sae}
    return {**lab, "thresholds_capped": capped} if capped else lab


def _config(
    lm: LanguageModel, params: Params, study: Study, tasks: list[str], pairs: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    settings = study.settings
    return {
        "random_seed": params.random_seed,
        "dataset_names": tasks,
        "perform_scr": study.kind == "scr",
        "train_set_size": settings.train_set_size,
        "test_set_size": settings.test_set_size,
        "context_length": settings.context_length,
        "probe_epochs": settings.probe_epochs,
        "early_stopping_patience": settings.probe_epochs,
        "sae_batch_size": params.model.llm_batch_size,
        "llm_batch_size": params.model.llm_batch_size,
        "llm_dtype": params.model.torch_dtype,
        "model_name": lm.name,
        "n_values": list(settings.n_values),
        "column1_vals_lookup": {task: [pair] for task, pair in pairs.items()},
    }


SAEs = Mapping[str, SparseAutoencoder]
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
    stage.notes["tasks"] = {
        task.name: {**task.notes, "first": list(task.first), "second": list(task.second)} for task in tasks
    }
    row_of = text_numbers(part.values() for task in tasks for part in (task.train, task.test))
    own = {task.name: measures.scr_task(task, row_of) for task in tasks}

    def score(views: Views, thresholds: list[int]) -> dict[str, Any]:
        bench = {
            name: measures.sae_bench_metrics(
                measures.directions(task, views["sae_bench"][name], thresholds, "sae_bench"), thresholds
            )
            for name, task in own.items()
        }
        lab = [
            measures.lab_task(task, views["lab"][name], measures.directions(task, views["lab"][name], thresholds, "lab"))
            for name, task in own.items()
        ]
        metrics, intervals = measures.lab_metrics(lab, thresholds, params.random_seed)
        return {
            "sae_bench": bench,
            "lab": {
                "metrics": metrics,
                "intervals": intervals,
                "tasks": {entry.task.name: measures.lab_details(entry, thresholds) for entry in lab},
            },
        }

    probe_tasks = {name: task.probes for name, task in own.items()}
    study = _study("scr", settings, lm, row_of, tasks, probe_tasks, score)
    pairs = {task.name: task.first for task in tasks}
    for name, info, found in evaluate(study, saes, lm, params, stage):
        yield name, _result(study, name, info, lm, params, found["sae_bench"], found["lab"], pairs=pairs)


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
    own = {task.name: measures.tpp_task(task, row_of, params.random_seed) for task in _with_classes(tasks, stage)}
    need_one("tpp", own, stage)
    stage.notes["tasks"] = {task.name: {**task.notes, "classes": list(task.train)} for task in tasks if task.name in own}

    def score(views: Views, thresholds: list[int]) -> dict[str, Any]:
        bench = {
            name: measures.outcomes(task, views["sae_bench"][name], thresholds, "sae_bench") for name, task in own.items()
        }
        lab = {name: measures.outcomes(task, views["lab"][name], thresholds, "lab") for name, task in own.items()}
        details = {name: measures.details(task, lab[name], thresholds) for name, task in own.items()}
        return {
            "sae_bench": {name: measures.class_metrics(task, bench[name], thresholds) for name, task in own.items()},
            "lab": {
                "metrics": measures.mean_metrics(
                    [{k: v for k, v in values.items() if k.startswith("tpp_")} for values in details.values()]
                ),
                "intervals": measures.intervals(
                    [(task, lab[name]) for name, task in own.items()], thresholds, params.random_seed
                ),
                "tasks": details,
            },
        }

    probe_tasks = {name: list(task.probes.values()) for name, task in own.items()}
    study = _study("tpp", settings, lm, row_of, tasks, probe_tasks, score)
    for name, info, found in evaluate(study, saes, lm, params, stage):
        classes = found["sae_bench"]
        means = {task: measures.mean_metrics(list(of_class.values())) for task, of_class in classes.items()}
        yield name, _result(study, name, info, lm, params, means, found["lab"], classes=classes)


def _study(
    kind: str,
    settings: Settings,
    lm: LanguageModel,
    row_of: dict[str, int],
    tasks: Sequence[Task | CrossedTask],
    probes: Mapping[str, Sequence[ProbeTask]],
    score: Callable[[Views, list[int]], dict[str, Any]],
) -> Study:
    """row_of: text -> its number; tasks: all that texts come from; probes: those of the tasks that are scored."""
    return Study(
        kind,
        settings,
        tokenise(lm, list(row_of), settings.context_length),
        brought_in(row_of, ([part.values() for part in (task.train, task.test)] for task in tasks)),
        probes,
        # which texts every probe is trained and tested on
        {name: [[[d.rows.tolist(), d.labels.tolist()] for d in probe] for probe in own] for name, own in probes.items()},
        score,
    )


def tpp_settings(params: Params) -> Settings:
    """TPP's section of params.yaml, with sparse probing's tasks, sizes and context length where it gives none."""
    own, probing = params.tpp, params.sparse_probing

    def either(value: Any, shared: Any) -> Any:
        return shared if value is None else value

    return Settings(
        either(own.dataset_names, probing.dataset_names),
        either(own.train_set_size, probing.probe_train_set_size),
        either(own.test_set_size, probing.probe_test_set_size),
        either(own.context_length, probing.context_length),
        own.n_values,
        own.probe_epochs,
    )


def _with_classes(tasks: list[Task], stage: StageFolder) -> list[Task]:
    for task in tasks:
        if len(task.train) < measures.MIN_CLASSES:
            stage.skip(
                task.name,
                f"task {task.name} has {len(task.train)} classes: their probes mirror each other, and "
                f"the score would be about 0 for any SAE; TPP needs {measures.MIN_CLASSES}",
            )
    return [task for task in tasks if len(task.train) >= measures.MIN_CLASSES]


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
    tasks: Mapping[str, Sequence[ProbeTask]]
    """Task -> its probes, in the order of the columns of a `View`."""
    identity: Any
    """What tells these tasks from others, JSON-able."""
    score: Callable[[dict[Definition, dict[str, View]], list[int]], dict[str, Any]]
    """(views by definition and task, thresholds) -> everything a result holds; goes to the cache."""


def evaluate(
    study: Study, saes: SAEs, lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, SAEInfo, dict[str, Any]]]:
    """(name, what is known of it, what `study.score` returned) of every SAE whose decoder allows it, in the order given."""
    guard = Guard(stage.skip)
    thresholds = sorted(set(study.settings.n_values))
    for members in by_hook(saes):
        scores = Scores(study.kind, members, members.keys(lm, _inputs(study, params), __name__), guard)
        probing = _Probing(study, members.hook, lm, params)

        def score(family: Family, probing: _Probing = probing) -> Iterator[tuple[str, dict[str, Any]]]:
            matrices = _linear(family, guard)
            for name, means in probing.texts.latent_means(guard.left(family), probing.rows):
                with guard.on(name):
                    yield name, study.score(_views(study, probing.trained, means, matrices[name]), thresholds)

        with scores.progress(f"encode and ablate ({study.kind})") as bar:
            scores.fill(score, bar)
        for name, found in scores.left().items():
            info = members.infos[name]
            _note_cap(stage, name, info.cfg.d_sae, thresholds)
            yield name, info, found


class _Probing:
    """Texts and probes at one hook, made when the first SAE needs them."""

    def __init__(self, study: Study, hook: str, lm: LanguageModel, params: Params) -> None:
        self._study, self._hook, self._lm, self._params = study, hook, lm, params
        self.rows = torch.arange(len(study.tokens))

    @cached_property
    def texts(self) -> TextsByTask:
        study = self._study
        return TextsByTask(self._lm, self._hook, study.tokens, study.sizes, self._params, study.settings.context_length)

    @cached_property
    def trained(self) -> _Trained:
        return _train(self._study, self.texts.raw_means(self.rows), self._params.random_seed)


def _inputs(study: Study, params: Params) -> list[Any]:
    tokens = fingerprint([row.tolist() for row in study.tokens])
    settings = {**study.settings._asdict(), "dataset_names": list(study.tasks)}
    return [study.kind, settings, tokens, study.sizes, study.identity, params.token_mask.model_dump(), params.random_seed]


def _linear(saes: Family, guard: Guard) -> dict[str, Tensor]:
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
    starts = [
        ablation.start(seed, number, raw.lab.shape[1], len(task.train.rows), study.settings.probe_epochs)
        for own in study.tasks.values()
        for number, task in enumerate(own)
    ]
    fitted: dict[Definition, Probes] = {}
    logits: dict[Definition, Tensor] = {}
    for definition in DEFINITIONS:
        features = getattr(raw, definition).numpy()
        fitted[definition] = ablation.fit(features, tasks, starts, pick_on_test=definition == "sae_bench")
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
