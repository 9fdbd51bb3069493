"""The evaluation stages: read the prepared SAEs, load the model once, write one result per SAE and a status."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sae_research.errors import UserError
from sae_research.evals.inputs import SAE_FOLDER, announce, by_hook, load_saes
from sae_research.lm import LanguageModel, load_language_model
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.store import StageFolder, stage_folder

RESULTS = Path("eval_results")
NOT_YET = ("scr", "tpp", "absorption", "unlearning")


def run_core(params: Params) -> None:
    """Stage `core_eval` -> `eval_results/core/`."""
    with stage_folder(RESULTS / "core", params.eval_types.core) as stage:
        if stage is not None:
            from sae_research.evals import core

            lm, saes = _start(params, stage)
            _write(stage, core.evaluate(saes, lm, params))


def run_sparse_probing(params: Params) -> None:
    """Stage `sparse_probing_eval` -> `eval_results/sparse_probing/`."""
    with stage_folder(RESULTS / "sparse_probing", params.eval_types.sparse_probing) as stage:
        if stage is not None:
            from sae_research.evals import sparse_probing

            lm, saes = _start(params, stage)
            _write(stage, sparse_probing.evaluate(saes, lm, params, stage))


def run_optional(name: str, params: Params) -> None:
    """Stages `scr_eval`, `tpp_eval`, `absorption_eval` and `unlearning_eval`.

    Raises `UserError` when one is enabled: it says so rather than writing a number nobody computed.
    """
    if name not in NOT_YET:
        raise UserError(f"unknown evaluation {name!r}; known: {', '.join(NOT_YET)}")
    with stage_folder(RESULTS / name, getattr(params.eval_types, name)) as stage:
        if stage is not None:
            raise UserError(f"eval_types.{name}: this evaluation is not implemented yet; set it to false "
                            "(SAE Bench itself can evaluate the SAEs of downloaded_saes/ meanwhile)")


def _start(params: Params, stage: StageFolder) -> tuple[LanguageModel, dict[str, SparseAutoencoder]]:
    torch.manual_seed(params.random_seed)
    lm = load_language_model(params.model.name, params.model.device, params.model.torch_dtype)
    saes = load_saes(SAE_FOLDER, lm)
    stage.notes |= {"model": lm.name, "hooks": sorted(by_hook(saes)), "text": params.text.dataset,
                    "dtype": params.model.torch_dtype, "random_seed": params.random_seed}
    announce(params, lm, saes)
    return lm, saes


def _write(stage: StageFolder, results: Iterator[tuple[str, dict[str, Any]]]) -> None:
    for name, result in results:
        stage.write_result(name, result)
    if not any(stage.folder.glob("*_eval_results.json")):
        raise UserError(f"{stage.folder}: no SAE could be evaluated: " + "; ".join(
            f"{what}: {why}" for what, why in stage.skipped.items()))
