"""Which results are in the cache already, for whoever must foretell an evaluation without importing it (setup's estimate).

An evaluation's own keys need its texts and its code. So it leaves a note under what setup knows as well (SAE, model,
parameters, and the evaluation's code, which is read and not imported) that names the cached files.
A note decides no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

import sae_research
from sae_research.config.params import Params
from sae_research.runtime.cache import ResultCache, cache_dir, caches_readable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.saes.base import SAEInfo
from sae_research.saes.registry import code_fingerprint
from sae_research.text.corpus import text_fingerprint

NOTED = ("core", "sparse_probing")
"""Evaluations that leave notes."""


class ModelIdentity(Protocol):
    """What tells a model's results from another's: a `LanguageModel`, or what is known of one that is not loaded."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class Evaluated:
    """Notes of one evaluation in one setting. kind: `core`, or `sparse_probing`, whose parts are its tasks."""

    def __init__(self, kind: str, lm: ModelIdentity, params: Params) -> None:
        self._notes = ResultCache("evaluated")
        section: Any = params.core_eval if kind == "core" else params.sparse_probing
        text = [params.text.model_dump(), text_fingerprint(params.text, "core_eval")] if kind == "core" else []
        self._setting = [
            kind,
            section.model_dump(exclude={"dataset_names"}),
            text,
            params.token_mask.model_dump(),
            params.random_seed,
            lm.fingerprint,
            str(lm.dtype),
            lm.device.type,
            _source(kind),
        ]

    def note(self, sae: SAEInfo, part: str, files: Sequence[str]) -> None:
        """`files` of the result cache (`kind/key`) hold what this SAE scored on `part`."""
        if not self.has(sae, part):
            with suppress(UserError):  # a cache that cannot be written: an estimate may be too high
                self._notes.put(self._key(sae, part), list(files))

    def has(self, sae: SAEInfo, part: str) -> bool:
        """Whether all of them are there and may be read."""
        files = self._notes.get(self._key(sae, part))
        return caches_readable() and bool(files) and all((cache_dir("results") / f"{file}.json").is_file() for file in files)

    def _key(self, sae: SAEInfo, part: str) -> str:
        path = Path(part)  # a user's own file may have changed
        stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
        return fingerprint([self._setting, sae.fingerprint, sae.cfg.hook_name, part, stamp])[:40]


@cache
def _source(kind: str) -> str:
    return code_fingerprint(f"{sae_research.__name__}.evals.{kind}")
