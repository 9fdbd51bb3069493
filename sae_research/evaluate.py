"""Evaluate SAEs that are in memory, without the pipeline: from a notebook, a script, another library's training loop.

from sae_research.evaluate import evaluate
evaluate({"mine": my_module, "theirs": "trained_saes/topk"}, hook="blocks.8.hook_resid_post")
"""

from __future__ import annotations

import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_research.analysis.context import AnalysisContext
from sae_research.config.params import Params
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel
from sae_research.reporting.results import EXTRACTORS
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import NAME_LIMIT, SLUG
from sae_research.runtime.stages import stage_folder
from sae_research.saes.base import Guard

Metrics = dict[str, dict[str, dict[str, float]]]


def evaluate(
    saes: Mapping[str, Any],
    lm: LanguageModel | None = None,
    params: Params | None = None,
    *,
    hook: str | None = None,
    evaluations: Sequence[str] = ("core",),
    folder: str | Path | None = None,
) -> Metrics:
    """`{sae: {evaluation: {metric: value}}}`, as in `metrics/all_metrics.json`: every evaluation of the pipeline, under the
    same parameters, on the same texts, with the same result cache.

    saes: by name, this project's, SAELens', any object with `encode` and `decode` on [batch, seq, d_in] and an affine
    decoder, or what `analyze --sae` takes: a folder, a prepared SAE's name, `sae_lens:RELEASE:ID`. lm: by default the model
    that `params` names. hook: where SAEs that do not say so themselves belong. folder: where SAE Bench's JSON and the
    statuses go, `<folder>/<evaluation>/<sae>_eval_results.json`: results and status that are there are replaced, other files
    stay. An SAE that an evaluation skips, with its reason on the screen and in the status, lacks it; an evaluation that has
    no meaning for the model gives nothing.

    Raises `UserError` for an unknown evaluation, a name that is no slug, an SAE that does not fit, evaluations that could
    score none of the SAEs, and whatever an evaluation itself refuses.
    """
    params = params or Params()
    for name in evaluations:
        evaluation_function(name)
    for name in saes:
        if not SLUG.fullmatch(name):
            raise UserError(f"the SAE name {name[:80]!r} may hold only a to z, 0 to 9 and _, at most {NAME_LIMIT} of them")
    analysis = AnalysisContext.of(saes, lm, params, hook)
    found: Metrics = {name: {} for name in saes}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for evaluation in evaluations:
            for name, result in _results(evaluation, analysis, Path(folder or temporary) / evaluation, skipped):
                found[name][evaluation] = EXTRACTORS[evaluation](result)
    if not any(found.values()) and set(skipped) & set(found):
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in found if name in skipped)
        raise UserError(f"no SAE could be evaluated: {reasons}")
    return found


def _results(
    evaluation: str, analysis: AnalysisContext, folder: Path, skipped: dict[str, str]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE that could be scored, also written to `folder`; `skipped` gets why others could not."""
    score = evaluation_function(evaluation)
    done: list[tuple[str, dict[str, Any]]] = []
    with stage_folder(folder, emptied=False) as stage:
        assert stage is not None  # it is where a stage may be disabled
        guard = Guard(stage.skip)
        torch.manual_seed(analysis.params.random_seed)
        for name, result in score(analysis.saes, analysis.lm, analysis.params, stage):
            with guard.on(name):
                stage.write_result(name, result)
                done.append((name, result))
    skipped |= stage.skipped
    return done


class _CallableModule(types.ModuleType):
    """`from sae_research import evaluate` gives the function, or this module once something has imported it; either is
    called alike."""

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
