"""Core evaluation and sparse probing against SAE Bench 0.6.0."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import stock
from sae_research.config.params import Params
from sae_research.evals.core import evaluation
from sae_research.evals.sparse_probing import evaluation as sparse_probing
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.text.tasks import load_task
from sae_research.text.tokens import token_contexts

SAEs = dict[str, SparseAutoencoder]


def compare(
    saes: SAEs, lm: LanguageModel, model: Any, params: Params, batches: int = 4, tasks: int = 2
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, SAE Bench's), with the largest difference of figures printed for every SAE.

    batches: of contexts for sparsity and variance; tasks: how many of the configured probing tasks. Both sides compute
    everything afresh and encode with the same encoders, ours. Core is timed twice on our side: SAE Bench's definition
    alone (equal work), and with ours beside it, as the pipeline runs it. So is probing: with hardly more than one set of
    training texts (equal work but for our definition), and with the draws of `params`, on which intervals rest and which SAE
    Bench has none of. SAE Bench's probing is timed with the model's
    activations kept for later SAEs (its best setting); without that, as its own run-all script has it, its model pass
    is repeated for every SAE: reckoned from one timed pass.
    """
    params = params.model_copy(
        update={
            "core_eval": params.core_eval.model_copy(update={"n_eval_sparsity_variance_batches": batches}),
            "sparse_probing": params.sparse_probing.model_copy(
                update={"dataset_names": params.sparse_probing.dataset_names[:tasks]}
            ),
        }
    )
    alone, both, stock_core = _core(saes, lm, model, params)
    few, ours, kept, repeated = _probing(saes, lm, model, params)
    return {
        "core, SAE Bench's definition": (alone, stock_core),
        "core, both definitions": (both, stock_core),
        "probing, one set of training texts, both definitions": (few, kept),
        "the same; stock repeats its model pass, as it does by default": (few, repeated),
        f"probing, {params.sparse_probing.train_draws} draws of training texts, both definitions; stock has one": (
            ours,
            kept,
        ),
        "core + probing, one set of training texts": (alone + few, stock_core + kept),
    }


def _core(saes: SAEs, lm: LanguageModel, model: Any, params: Params) -> tuple[float, float, float]:
    """Seconds: ours in SAE Bench's definition alone, ours in both, stock."""
    config = params.core_eval
    contexts = config.batch_size_prompts * (config.n_eval_reconstruction_batches + config.n_eval_sparsity_variance_batches)
    tokens = token_contexts(
        lm.tokenizer, lm.separator_id, params.text, "core_eval", contexts * params.text.context_size
    ).tokens[:contexts]
    start = time.perf_counter()
    for _ in evaluation.evaluate(saes, lm, params, tokens=tokens, lab=False):
        pass
    alone, start = time.perf_counter() - start, time.perf_counter()
    ours = dict(evaluation.evaluate(saes, lm, params, tokens=tokens))
    both, start = time.perf_counter() - start, time.perf_counter()
    theirs = {
        name: stock.core(
            sae,
            model,
            tokens,
            config.batch_size_prompts,
            config.n_eval_reconstruction_batches,
            config.n_eval_sparsity_variance_batches,
        )
        for name, sae in saes.items()
    }
    their_time = time.perf_counter() - start
    for name in saes:
        gaps = {
            f"{category}.{key}": abs(ours[name]["eval_result_metrics"][category][key] - value) / max(abs(value), 1e-6)
            for category, metrics in theirs[name].items()
            if category != "feature_metrics"
            for key, value in metrics.items()
        }
        worst = max(gaps, key=lambda key: gaps[key])
        print(f"core, {name}: largest relative difference in SAE Bench's definition {gaps[worst]:.1e} ({worst})")
    return alone, both, their_time


def _probing(saes: SAEs, lm: LanguageModel, model: Any, params: Params) -> tuple[float, float, float, float]:
    """Seconds: ours with the fewest draws of training texts and with those of `params`, stock keeping activations, stock
    repeating its model pass for every SAE.

    The last is reckoned: the first SAE runs again with activations at hand, and what it saves is the model's share.
    """
    config = params.sparse_probing
    with tempfile.TemporaryDirectory() as folder:
        fewest = config.model_copy(update={"train_draws": 2, "train_pool": 1.01})
        our_times = []
        for name, setting in (("few", fewest), ("out", config)):
            start = time.perf_counter()
            changed = params.model_copy(update={"sparse_probing": setting})
            ours = dict(sparse_probing.evaluate(saes, lm, changed, StageFolder(Path(folder) / name)))
            our_times.append(time.perf_counter() - start)
        tasks = [
            load_task(name, config.probe_train_set_size, config.probe_test_set_size, params.random_seed)
            for name in config.dataset_names
        ]
        theirs, seconds = {}, []
        for name, sae in [*saes.items(), *list(saes.items())[:1]]:
            start = time.perf_counter()
            theirs[name] = stock.sparse_probing(
                sae, model, tasks, config, params.random_seed, params.model.llm_batch_size, Path(folder) / "stock"
            )
            seconds.append(time.perf_counter() - start)
    # the first SAE ran twice, with and without the model's activations at hand: the difference is the model's share
    model_pass = seconds[0] - seconds.pop()
    kept = sum(seconds)
    for name in saes:
        key = "sae_top_1_test_accuracy"
        print(
            f"probing, {name}: top-1 {ours[name]['eval_result_metrics']['sae'][key]:.3f}, "
            f"stock {theirs[name]['averages'][key]:.3f} (its draws of negatives are others)"
        )
    few, our_time = our_times
    return few, our_time, kept, kept + model_pass * (len(saes) - 1)
