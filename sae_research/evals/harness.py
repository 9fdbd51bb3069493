"""What every evaluation shares: SAEs opened in turn, the loop that scores what the result cache lacks, labelled tasks, and
results in SAE Bench's own output types, so that its readers and leaderboards accept our files.
"""

from __future__ import annotations

import copy
import importlib
import sys
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter
from tqdm import tqdm

from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.cache import ResultCache
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder, read_manifest
from sae_research.saes import SparseAutoencoder, load_sae
from sae_research.saes.base import OPEN_BYTES, Family, Guard, SAEInfo
from sae_research.saes.registry import code_fingerprint
from sae_research.saes.sources import check_widths
from sae_research.text.local import listed
from sae_research.text.tasks import Task, TaskUnavailable, load_task

# --- SAEs ------------------------------------------------------------------------------------


class PreparedSAEs(Mapping[str, SparseAutoencoder]):
    """The SAEs that setup wrote, in the manifest's order, on the model's device. Each look-up opens one anew, and nothing
    here holds it. Raises `UserError` when setup has not run, a file is damaged, or an SAE does not fit the model."""

    def __init__(self, folder: Path, lm: LanguageModel, names: Iterable[str] | None = None) -> None:
        """names: of some of them."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"{manifest}: no such file; run the setup stage first (dvc repro setup)")
        self._folder, self._device, self.infos = folder, str(lm.device), {}
        for name in read_manifest(manifest)["order"] if names is None else names:
            info = self.infos[name] = self.describe(name)
            check_widths(name, info.cfg, lm)
        if not self.infos:
            raise UserError(f"{manifest} lists no SAE; give params.yaml a baseline_sae")

    def describe(self, name: str) -> SAEInfo:
        return self[name].info()

    def only(self, names: Iterable[str]) -> PreparedSAEs:
        """Some of them."""
        some = copy.copy(self)
        some.infos = {name: self.infos[name] for name in names}
        return some

    def __getitem__(self, name: str) -> SparseAutoencoder:
        return load_sae(self._folder / name, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def infos_of(saes: Mapping[str, SparseAutoencoder]) -> dict[str, SAEInfo]:
    """What is known of every SAE, by name."""
    return saes.infos if isinstance(saes, PreparedSAEs) else {name: sae.info() for name, sae in saes.items()}


class Group:
    """SAEs that read one hook, and write one hook where that matters: one model pass serves them all."""

    def __init__(
        self, hook: str, infos: dict[str, SAEInfo], saes: Mapping[str, SparseAutoencoder], hook_out: str | None = None
    ) -> None:
        """hook_out: what they write; the hook they read where None."""
        self.hook, self.infos, self._saes = hook, infos, saes
        self.hook_out = hook if hook_out is None else hook_out

    def families(self, names: Iterable[str]) -> list[list[str]]:
        """These SAEs, those together that share the work of encoding."""
        together: dict[object, list[str]] = {}
        for name in names:
            family = self.infos[name].family
            together.setdefault(name if family is None else family, []).append(name)
        return list(together.values())

    def open(self, names: Iterable[str]) -> Iterator[Family]:
        """These SAEs, as many at a time as `OPEN_BYTES` allows, families together; closed when the next are asked for."""
        chosen: list[str] = []
        for family in [*self.families(names), []]:
            if chosen and (not family or sum(self.infos[name].nbytes for name in (*chosen, *family)) > OPEN_BYTES):
                opened = {name: self._saes[name] for name in chosen}
                yield opened
                opened.clear()  # the caller's variable still holds it when the next ones are opened
                chosen = []
            chosen += family

    def keys(self, lm: LanguageModel, inputs: Any, *modules: str) -> dict[str, str]:
        """Of every SAE the `result_key`."""
        return {name: result_key(info, lm, inputs, *modules) for name, info in self.infos.items()}


def by_hook(saes: Mapping[str, SparseAutoencoder]) -> list[Group]:
    """SAEs grouped by the hook they read and write. Raises `UserError` for one that writes elsewhere (a transcoder)."""
    for name, info in infos_of(saes).items():
        if info.cfg.is_transcoder:
            raise UserError(f"SAE {name} reads and writes {info.cfg.hooks}; what edits the hook it reads cannot take it")
    return by_read_hook(saes)


def by_read_hook(saes: Mapping[str, SparseAutoencoder]) -> list[Group]:
    """SAEs grouped by the hook they read, wherever they write: for evaluations of latents alone. Raises `UserError` for one
    that reads several (a crosscoder)."""
    _refuse_crosscoders(saes)
    infos: dict[str, dict[str, SAEInfo]] = {}
    for name, info in infos_of(saes).items():
        infos.setdefault(info.cfg.hook_name, {})[name] = info
    return [Group(hook, members, saes) for hook, members in infos.items()]


def _refuse_crosscoders(saes: Mapping[str, SparseAutoencoder]) -> None:
    for name, info in infos_of(saes).items():
        if len(info.cfg.hook_names) > 1:
            raise UserError(f"SAE {name} reads and writes {info.cfg.hooks}; what takes activations of one hook cannot")


def by_hooks(saes: Mapping[str, SparseAutoencoder]) -> list[Group]:
    """SAEs grouped by the hook they read and the hook they write; of crosscoders (`A + B`) by all of them."""
    infos: dict[tuple[str, str], dict[str, SAEInfo]] = {}
    for name, info in infos_of(saes).items():
        infos.setdefault((info.cfg.hook_name, info.cfg.hook_out), {})[name] = info
    return [Group(hook, members, saes, hook_out) for (hook, hook_out), members in infos.items()]


_SEVERAL = "it takes the activations of one hook, and a {} has several"


def of_one_hook(
    evaluate: Callable[..., Iterator[tuple[str, Any]]],
    reason: str,
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    params: Params,
    stage: StageFolder,
    crosscoders: bool = False,
    parts: str = "",
) -> Iterator[tuple[str, Any]]:
    """`evaluate` on the SAEs that it means something for; the others are skipped. reason: why it means nothing for
    transcoders, empty where it does. crosscoders: whether it takes what reads several hooks. parts: why it means nothing for
    one layer of a cross-layer transcoder. Raises `NotApplicable` where none is left."""
    infos = infos_of(saes)
    left_out = {
        name: (info.cfg.kind, why)
        for name, info in infos.items()
        for why, concerned in (
            (parts, bool(parts) and info.cfg.is_part),
            (reason, bool(reason) and info.cfg.is_transcoder),
            (_SEVERAL.format(info.cfg.kind), not crosscoders and len(info.cfg.hook_names) > 1),
        )
        if concerned
    }
    kept = [name for name in infos if name not in left_out]
    if not kept:
        kinds = dict.fromkeys(left_out.values())
        hooks = {of: dict.fromkeys(infos[name].cfg.hooks for name in infos if left_out[name] == of) for of in kinds}
        raise NotApplicable("; ".join(f"{why}: these are {kind}s ({', '.join(hooks[kind, why])})" for kind, why in kinds))
    for name, (kind, why) in left_out.items():
        stage.skip(name, f"not applicable to a {kind} ({infos[name].cfg.hooks}): {why}")
    some = saes.only(kept) if isinstance(saes, PreparedSAEs) else {name: saes[name] for name in kept}
    yield from evaluate(some if left_out else saes, lm, params, stage)


def hooks_of(saes: Mapping[str, SparseAutoencoder]) -> list[str]:
    """Where the SAEs read, and write, each once."""
    return list(dict.fromkeys(info.cfg.hooks for info in infos_of(saes).values()))


def announce(params: Params, lm: LanguageModel, saes: Mapping[str, SparseAutoencoder]) -> None:
    """One line that says what is about to be evaluated."""
    hooks = ", ".join(hooks_of(saes))
    print(f"{len(saes)} SAEs on {lm.name} ({params.model.torch_dtype}, {lm.device}) at {hooks}", flush=True, file=sys.stderr)


# --- the cached loop -------------------------------------------------------------------------


def result_key(sae: SparseAutoencoder | SAEInfo, lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of one SAE's result: weights, hooks, configuration, inputs, model, precision, device kind, and the code and
    libraries that `modules` (names, `__name__` of whoever computes it) and the SAE's class reach."""
    info = sae if isinstance(sae, SAEInfo) else sae.info()
    code = code_fingerprint(*modules, classes=[info.kind])
    return _key(lm, inputs, code, sae=info.fingerprint, hooks=info.cfg.hooks)


def model_key(lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of what the model alone gives, for every SAE: inputs, model, precision, device kind, code and libraries."""
    return _key(lm, inputs, code_fingerprint(*modules))


def _key(lm: LanguageModel, inputs: Any, code: str, **more: str) -> str:
    model = {"model": lm.fingerprint, "dtype": str(lm.dtype), "device": lm.device.type}
    return fingerprint({"inputs": inputs, "code": code, **model, **more})[:40]


class Delegate(Protocol):
    """What scores in place of this process (`evals.units`)."""

    def seen(self, scores: Scores) -> None:
        """Told of all `Scores`, as they are made."""
        ...

    def made(self, kind: str, key: str, value: Any) -> None:
        """Told of all that is `made_once`."""
        ...

    def fill(self, scores: Scores, score: Callable[..., Any], bar: tqdm, parts: Sequence[Any], step: int) -> None:
        """In place of `Scores.score_here`."""
        ...


_delegate: ContextVar[Delegate | None] = ContextVar("delegate", default=None)


@contextmanager
def delegated(delegate: Delegate | None) -> Generator[None]:
    """During the block `delegate` does what `Scores.fill` is asked for."""
    token = _delegate.set(delegate)
    try:
        yield
    finally:
        _delegate.reset(token)


class Scores:
    """What an evaluation finds of each SAE of a group, part by part (task, batch of text; one part where it has none): read
    from the result cache, and what is missing there scored and kept. An interrupted run or one more SAE pays for what is
    missing alone; an SAE that fails is left out with its reason (`Guard`)."""

    def __init__(self, kind: str, group: Group, keys: Mapping[str, str | Mapping[Any, str]], guard: Guard) -> None:
        """keys: of the result cache `kind`, by SAE, or by SAE and part."""
        self.kind, self.group, self.guard, self._cache = kind, group, guard, ResultCache(kind)
        self.keys = {name: {"": key} if isinstance(key, str) else dict(key) for name, key in keys.items()}
        self.found = {
            name: {part: self._cache.get(key) for part, key in parts.items()}
            for name, parts in self.keys.items()
            if name not in guard.failed
        }
        if (delegate := _delegate.get()) is not None:
            delegate.seen(self)

    def known(self, names: Iterable[str]) -> dict[str, Any]:
        """What has been found of these SAEs, by `kind/key` of the result cache."""
        return {
            f"{self.kind}/{self.keys[name][part]}": value
            for name in names
            for part, value in self.found.get(name, {}).items()
            if value is not None
        }

    def lacking(self, parts: Iterable[Any] | None = None) -> list[str]:
        """Names of the SAEs that lack one of these parts, of all by default."""
        return [
            name
            for name, found in self.guard.left(self.found).items()
            if any(found[part] is None for part in (found if parts is None else parts))
        ]

    def opened(self, parts: Iterable[Any] | None = None) -> Iterator[Family]:
        """The SAEs that lack one of these parts, opened in turn."""
        return self.group.open(self.lacking(parts))

    def without(self, saes: Family, part: Any) -> Family:
        """Those of `saes` that lack the part and have not failed."""
        return {name: sae for name, sae in self.guard.left(saes).items() if self.found[name][part] is None}

    def keep(self, name: str, part: Any, value: Any) -> None:
        """Keep what was found of an SAE. Value: JSON-able."""
        with self.guard.on(name):
            self._cache.put(self.keys[name][part], value)
            self.found[name][part] = value

    @contextmanager
    def progress(self, desc: str, unit: str = "SAE", steps: int = 1) -> Generator[tqdm]:
        """A bar over what is missing, shown where something is. steps: of each part of each SAE."""
        missing = sum(value is None for parts in self.found.values() for value in parts.values()) * steps
        with tqdm(total=missing, desc=desc, unit=unit, dynamic_ncols=True, disable=not missing, file=sys.stderr) as bar:
            yield bar

    def fill(
        self,
        score: Callable[..., Iterator[tuple[str, Any]]],
        bar: tqdm,
        parts: Sequence[Any] = ("",),
        step: int = 1,
    ) -> None:
        """Score what is missing of these parts. score: called with SAEs of one family, and before them the part where there
        are several; yields (name, value)."""
        delegate = _delegate.get()
        (self.score_here if delegate is None else partial(delegate.fill, self))(score, bar, parts, step)

    def score_here(
        self, score: Callable[..., Iterator[tuple[str, Any]]], bar: tqdm, parts: Sequence[Any], step: int
    ) -> None:
        """`fill` in this process: of the SAEs that are open together part by part, family by family."""
        for saes in self.opened(parts):
            for part in parts:
                for name, value in self.guard.each(self.without(saes, part), partial(score, part) if part != "" else score):
                    self.keep(name, part, value)
                    bar.update(step)

    def left(self) -> dict[str, Any]:
        """Of every SAE that was scored its value, or its values by part."""
        whole = {name: parts for name, parts in self.found.items() if all(value is not None for value in parts.values())}
        return {name: parts[""] if list(parts) == [""] else parts for name, parts in self.guard.left(whole).items()}


def made_once(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """What the result cache `kind` holds under `key`; made and kept where it holds nothing. JSON-able."""
    kept = ResultCache(kind)
    found = kept.get(key)
    if found is None:
        kept.put(key, found := make())
    if (delegate := _delegate.get()) is not None:
        delegate.made(kind, key, found)
    return found


# --- tasks -----------------------------------------------------------------------------------


def load_tasks(names: Sequence[str], train_size: int, test_size: int, seed: int, stage: StageFolder) -> list[Task]:
    """Every task of `names` that has texts enough (sizes as for `text.tasks.load_task`); `stage` notes why others, and rare
    classes of a task, are skipped. Raises `UserError` for an unknown name, unreadable files or a hub out of reach."""
    tasks = []
    for name in names:
        try:
            task = load_task(name, train_size, test_size, seed)
        except TaskUnavailable as error:
            stage.skip(name, str(error))
            continue
        if rare := task.notes.get("classes_left_out"):
            stage.skip(
                f"{name}: {len(rare)} of {len(rare) + len(task.train)} classes",
                f"fewer than {train_size // 2} train and {test_size // 2} test texts in {listed(rare)}",
            )
        tasks.append(task)
    return tasks


def need_one(section: str, tasks: Sized, stage: StageFolder) -> None:
    """Raises `UserError` that says why no task of the section's `dataset_names` is left, when none is."""
    if not len(tasks):
        raise UserError(
            f"{section}.dataset_names: no task is usable: " + ("; ".join(stage.skipped.values()) or "the list is empty")
        )


LAB = "lab_v1"
"""Name of our own definitions' block inside `eval_result_unstructured`."""


# --- results ---------------------------------------------------------------------------------


def output(
    evaluation: str,
    name: str,
    info: SAEInfo,
    *,
    config: dict[str, Any],
    metrics: dict[str, Any],
    details: Sequence[dict[str, Any]] = (),
    unstructured: dict[str, Any],
    sae_bench: str | None = None,
) -> dict[str, Any]:
    """One SAE's result as plain data. evaluation: its name in `config.evaluations`.

    sae_bench: `module:Class` below `sae_bench.evals`, the output class that validates it and drops fields it does not know
    (SAE Bench has some for a few values of k only; ours keeps every k in the unstructured block). None where it has none, or
    one that is too slow to import.
    """
    result_type = OF_SAES[evaluation].result_type
    plain = {
        **envelope(name, info, result_type),
        "eval_type_id": result_type,
        "eval_config": config,
        "eval_result_metrics": metrics,
        "eval_result_details": list(details),
        "eval_result_unstructured": unstructured,
    }
    return plain if sae_bench is None else asdict(_output_type(sae_bench).validate_python(plain))


@cache
def _output_type(place: str) -> TypeAdapter[Any]:
    """Imported only when a result is written."""
    module, _, name = place.partition(":")
    return TypeAdapter(getattr(importlib.import_module(f"sae_bench.evals.{module}.eval_output"), name))


def envelope(name: str, info: SAEInfo, eval_type: str) -> dict[str, Any]:
    """The fields every SAE Bench result has. The identifier follows from the content, and the time is the epoch:
    two equal runs write equal bytes."""
    identity = fingerprint([eval_type, name, info.fingerprint])
    return {
        "eval_id": str(uuid.UUID(identity[:32])),
        "datetime_epoch_millis": 0,
        "sae_bench_commit_hash": f"sae-bench {version('sae-bench')} definitions",
        "sae_lens_id": name,
        "sae_lens_release_id": info.cfg.provenance.get("release", "sae_research"),
        "sae_lens_version": version("sae-lens"),
        "sae_cfg_dict": sae_description(info),
    }


def sae_description(info: SAEInfo) -> dict[str, Any]:
    """What tables and plots need to know of an SAE: the result's `sae_cfg_dict`."""
    cfg = info.cfg
    return {
        "form": cfg.form,
        "architecture": cfg.architecture,
        "role": cfg.role,
        "base": cfg.base,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        **info.options,
        "hook_name": cfg.hook_name,
        **({"hook_out": cfg.hook_out} if cfg.is_transcoder else {}),
        "hook_layer": cfg.hook_layer,
        "model_name": cfg.model_name,
        "dtype": cfg.dtype,
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "normalize_activations": "none",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "per_token": info.per_token,
        "causal": info.causal,
        "signed": info.signed,
        "provenance": cfg.provenance,
    }
