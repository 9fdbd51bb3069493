"""The evaluation stages: read the prepared SAEs, load the model once, write one result per SAE and a status.

What computes is imported only once an evaluation is known to be on: ten stages that are off would wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.former_names import elsewhere
from sae_research.runtime.given_device import has_device_of_its_own
from sae_research.runtime.stages import StageFolder, stage_folder

if TYPE_CHECKING:
    from sae_research.evals.harness import PreparedSAEs
    from sae_research.lm import LanguageModel
    from sae_research.runtime.workers import Workers

RESULTS = Path("eval_results")


def evaluation_function(name: str) -> Callable[..., Iterator[tuple[str, dict[str, Any]]]]:
    """What computes an evaluation of `OF_SAES`, called with (saes, lm, params, stage). Raises `UserError` for another
    name."""
    if name not in OF_SAES:
        raise UserError(f"unknown evaluation {name!r}{elsewhere(name, 'value') or did_you_mean(name, OF_SAES)}")
    module, _, function = str(OF_SAES[name].evaluate).partition(":")
    evaluate = getattr(importlib.import_module(f"sae_research.evals.{module}"), function)
    from sae_research.evals.harness import of_one_hook

    record = OF_SAES[name]
    return partial(of_one_hook, evaluate, record.one_hook, crosscoders=record.crosscoders, parts=record.parts)


def run_evaluation(name: str, params: Params) -> None:
    """One stage: writes `eval_results/<name>/`. Raises `UserError` when nothing could be evaluated."""
    if name not in OF_SAES:
        raise UserError(f"unknown evaluation {name!r}{elsewhere(name, 'value') or did_you_mean(name, OF_SAES)}")
    with stage_folder(RESULTS / name, getattr(params.eval_types, name)) as stage:
        if stage is None:
            return
        evaluate = evaluation_function(name)
        with _started_workers(name, params) as workers:  # while this process loads the model
            lm, saes = _start(params, stage)
            with _scoring_on(workers, name, lm, saes, params):
                _write(stage, evaluate(saes, lm, params, stage))


@contextmanager
def _started_workers(name: str, params: Params) -> Generator[Workers | None]:
    """Workers where `cluster.address` says; None where this process scores, as one
    that was given its device by a sweep does."""
    if params.cluster.address is None or has_device_of_its_own():
        yield None
        return
    from sae_research.evals.units import evaluation_job
    from sae_research.runtime.workers import start_workers

    workers = start_workers(params.cluster, evaluation_job(name, params))
    try:
        yield workers
    finally:
        workers.close()


@contextmanager
def _scoring_on(
    workers: Workers | None, name: str, lm: LanguageModel, saes: PreparedSAEs, params: Params
) -> Generator[None]:
    if workers is None:
        yield
        return
    from sae_research.evals.harness import delegated
    from sae_research.evals.units import Distribution
    from sae_research.lm.shape import shape_of
    from sae_research.planning.costs import unit_shares
    from sae_research.planning.devices import nominal
    from sae_research.planning.saes import described

    planned = [described(sae, info) for sae, info in saes.infos.items()]
    shares = unit_shares(name, params, shape_of(lm.name, lm.model), planned, nominal(lm.device.type))
    with delegated(Distribution(workers, lm.device.type, shares)):
        yield


def _start(params: Params, stage: StageFolder) -> tuple[LanguageModel, PreparedSAEs]:
    import torch

    from sae_research.evals.harness import PreparedSAEs, announce, hooks_of
    from sae_research.lm import load_configured
    from sae_research.saes.sources import PREPARED

    torch.manual_seed(params.random_seed)
    lm = load_configured(params.model)
    saes = PreparedSAEs(PREPARED, lm)
    stage.notes |= {
        "model": lm.name,
        "hooks": sorted(hooks_of(saes)),
        "text": params.text.dataset,
        "dtype": params.model.torch_dtype,
        "random_seed": params.random_seed,
    }
    announce(params, lm, saes)
    return lm, saes


def _write(stage: StageFolder, results: Iterator[tuple[str, dict[str, Any]]]) -> None:
    from sae_research.saes.base import Guard

    guard, written = Guard(stage.skip), False
    for name, result in results:
        with guard.on(name):
            stage.write_result(name, result)
            written = True
    if not written:
        raise UserError(
            f"{stage.folder}: no SAE could be evaluated: "
            + "; ".join(f"{what}: {why}" for what, why in stage.skipped.items())
        )
