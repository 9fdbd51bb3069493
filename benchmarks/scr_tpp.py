"""SCR and TPP against SAE Bench 0.6.0, in one run on the same model, texts, tasks and SAEs.

    make repro && python -m benchmarks scr_tpp

Counted on either side: the model's pass over the texts, training the probes, encoding and scoring every SAE at every
threshold; ours in both definitions and with intervals. Not counted: loading models, reading the tasks, imports. SAE Bench
has its best setting: activations and probes of the first SAE are kept for the others. Both encode with our encoders. Length
and thresholds are those of params.yaml; texts are few, because SAE Bench encodes each of them anew for every threshold.

TPP is timed twice on our side: from nothing, and after sparse probing, as the pipeline runs it, whose activations and
mean latents of the same texts it finds in the cache. SAE Bench keeps nothing of the kind from one evaluation to another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import stock_scr_tpp  # first: they switch jaxtyping off

import torch  # isort: skip

from sae_research.config.evaluation_params import SCR, TPP
from sae_research.config.params import Params
from sae_research.evals.scr_tpp import evaluate_scr, evaluate_tpp, evaluation
from sae_research.evals.scr_tpp.evaluation import Settings, tpp_settings
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.text.crossed_tasks import CrossedTask, load_crossed_tasks
from sae_research.text.tasks import Task, load_task

SCR_TASK, TPP_TASK = "film_or_restaurant_by_sentiment", "code_language"
SIZES = {"train_set_size": 32, "test_set_size": 16}


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any, params: Params
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, SAE Bench's). model: the same one as `stock.hooked_model`."""
    params = params.model_copy(
        update={
            "activation_caching": params.activation_caching.model_copy(update={"enabled": True}),
            "scr": SCR(dataset_names=[SCR_TASK], **SIZES),
            "tpp": TPP(dataset_names=[TPP_TASK], context_length=128, **SIZES),
        }
    )
    crossed = load_crossed_tasks(SCR_TASK, *SIZES.values(), params.random_seed, lambda *reason: print(*reason))
    tasks = [load_task(TPP_TASK, *SIZES.values(), params.random_seed)]
    _warm_up(saes)
    with _read_beforehand(crossed, tasks), _empty_project() as project:
        scr = _seconds(evaluate_scr, saes, lm, params)
        tpp = _seconds(evaluate_tpp, saes, lm, params)
        shutil.rmtree(project / ".cache" / "results")  # what sparse probing leaves behind is all that stays
        tpp_after_probing = _seconds(evaluate_tpp, saes, lm, params)
    seed, batch = params.random_seed, params.model.llm_batch_size
    scr_settings = Settings(*(getattr(params.scr, field) for field in Settings._fields))
    stock_scr = _stock_seconds(stock_scr_tpp.scr, saes, model, crossed, scr_settings, seed, batch)
    stock_tpp = _stock_seconds(stock_scr_tpp.tpp, saes, model, tasks, tpp_settings(params), seed, batch)
    return {
        "SCR": (scr, stock_scr),
        "TPP": (tpp, stock_tpp),
        "TPP after sparse probing": (tpp_after_probing, stock_tpp),
        "SCR and TPP, each from nothing": (scr + tpp, stock_scr + stock_tpp),
        "SCR and TPP after sparse probing": (scr + tpp_after_probing, stock_scr + stock_tpp),
    }


def _seconds(evaluate: Callable[..., Any], saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for _ in evaluate(saes, lm, params, StageFolder(Path(folder))):
            pass
        return time.perf_counter() - start


def _stock_seconds(run: Callable[..., Any], saes: dict[str, SparseAutoencoder], model: Any, *arguments: Any) -> float:
    with tempfile.TemporaryDirectory() as artifacts:
        start = time.perf_counter()
        for sae in saes.values():
            run(sae, model, *arguments, Path(artifacts))
        return time.perf_counter() - start


@contextlib.contextmanager
def _read_beforehand(crossed: list[CrossedTask], tasks: list[Task]) -> Iterator[None]:
    """Hand our evaluations the tasks that stock is handed, read already."""
    with (
        mock.patch.object(evaluation, "load_crossed_tasks", lambda *_: crossed),
        mock.patch.object(evaluation, "load_tasks", lambda *_: tasks),
    ):
        yield


@contextlib.contextmanager
def _empty_project() -> Iterator[Path]:
    """A project whose caches are empty and are used."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DVC_ROOT": folder, "SAE_RESEARCH_NO_CACHE": ""}),
    ):
        yield Path(folder)


def _warm_up(saes: dict[str, SparseAutoencoder]) -> None:
    """Encode a few tokens, so that neither side pays for the compilation of kernels."""
    for sae in saes.values():
        x = torch.randn(2, 8, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)).to(sae.W_dec.device)
        for mask in (None, torch.ones(2, 8, dtype=torch.bool, device=x.device)):
            for _ in encode_each({"sae": sae}, x, mask):
                pass
