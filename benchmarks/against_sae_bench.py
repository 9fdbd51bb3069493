"""Core evaluation and sparse probing against stock SAE Bench 0.6.0, in one run on the same model, tokens, tasks and SAEs.

    make repro && make bench          # or: python -m benchmarks.against_sae_bench --saes 4 --batches 4

Both sides compute everything afresh; neither loading models nor imports are counted, and both encode with the same
encoders, ours. Core is timed twice on our side: SAE Bench's definition alone (equal work), and with our own definition
beside it, as the pipeline runs it. Stock's probing is timed once with the model's activations kept for later SAEs (its
best setting); without that, as its own run-all script has it, its model pass is repeated for every SAE.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import stock
from sae_research.errors import run_main
from sae_research.evals import core, sparse_probing
from sae_research.evals.inputs import SAE_FOLDER, load_saes
from sae_research.lm import LanguageModel, load_language_model
from sae_research.lm.load import packaged_folder
from sae_research.params import Params, load_params
from sae_research.saes import SparseAutoencoder
from sae_research.store import StageFolder
from sae_research.text.stream import token_contexts
from sae_research.text.tasks import load_task

SAEs = dict[str, SparseAutoencoder]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=8, help="how many SAEs, in the manifest's order (default 8)")
    parser.add_argument("--batches", type=int, default=4, help="batches of contexts for sparsity and variance")
    parser.add_argument("--tasks", type=int, default=2, help="how many of the configured probing tasks")
    options = parser.parse_args()
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    params = _scaled(load_params(), options)
    lm = load_language_model(params.model.name, "cpu")
    saes = dict(list(load_saes(SAE_FOLDER, lm).items())[:options.saes])
    model = stock.hooked_model(packaged_folder(params.model.name))
    print(f"{len(saes)} SAEs, {torch.get_num_threads()} threads: {', '.join(saes)}\n")
    alone, both, stock_core = _core(saes, lm, model, params)
    ours, kept, repeated = _probing(saes, lm, model, params)
    rows = {
        "core, SAE Bench's definition": (alone, stock_core),
        "core, both definitions": (both, stock_core),
        "probing, both definitions; stock keeps activations": (ours, kept),
        "probing, both definitions; stock repeats the model pass": (ours, repeated),
        "together, equal work; stock keeps activations": (alone + ours, stock_core + kept),
        "together, as both pipelines run by default": (both + ours, stock_core + repeated),
    }
    print(f"\n{'':58}{'ours':>9}{'stock':>9}{'ratio':>8}")
    for name, (our, their) in rows.items():
        print(f"{name:58}{our:8.1f}s{their:8.1f}s{their / our:7.1f}x")


def _scaled(params: Params, options: argparse.Namespace) -> Params:
    return params.model_copy(update={
        "activation_caching": params.activation_caching.model_copy(update={"enabled": False}),
        "core_eval": params.core_eval.model_copy(update={"n_eval_sparsity_variance_batches": options.batches}),
        "sparse_probing": params.sparse_probing.model_copy(update={
            "dataset_names": params.sparse_probing.dataset_names[:options.tasks]})})


def _core(saes: SAEs, lm: LanguageModel, model: Any, params: Params) -> tuple[float, float, float]:
    """Seconds: ours in SAE Bench's definition alone, ours in both, stock."""
    config = params.core_eval
    contexts = config.batch_size_prompts * (
        config.n_eval_reconstruction_batches + config.n_eval_sparsity_variance_batches)
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval",
                            contexts * params.text.context_size).tokens[:contexts]
    start = time.perf_counter()
    for _ in core.evaluate(saes, lm, params, tokens, lab=False):
        pass
    alone, start = time.perf_counter() - start, time.perf_counter()
    ours = dict(core.evaluate(saes, lm, params, tokens))
    both, start = time.perf_counter() - start, time.perf_counter()
    theirs = {name: stock.core(sae, model, tokens, config.batch_size_prompts, config.n_eval_reconstruction_batches,
                               config.n_eval_sparsity_variance_batches) for name, sae in saes.items()}
    their_time = time.perf_counter() - start
    for name in saes:
        gaps = {f"{category}.{key}": abs(ours[name]["eval_result_metrics"][category][key] - value) / max(abs(value), 1e-6)
                for category, metrics in theirs[name].items() if category != "feature_metrics"
                for key, value in metrics.items()}
        worst = max(gaps, key=lambda key: gaps[key])
        print(f"core, {name}: largest relative difference in SAE Bench's definition {gaps[worst]:.1e} ({worst})")
    return alone, both, their_time


def _probing(saes: SAEs, lm: LanguageModel, model: Any, params: Params) -> tuple[float, float, float]:
    """Seconds: ours, stock keeping activations, stock repeating its model pass for every SAE.

    The last is reckoned: the first SAE runs again with activations at hand, and what it saves is the model's share.
    """
    config = params.sparse_probing
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ours = dict(sparse_probing.evaluate(saes, lm, params, StageFolder(Path(folder) / "out")))
        our_time = time.perf_counter() - start
        tasks = [load_task(name, config.probe_train_set_size, config.probe_test_set_size, params.random_seed)
                 for name in config.dataset_names]
        theirs, seconds = {}, []
        for name, sae in [*saes.items(), *list(saes.items())[:1]]:
            start = time.perf_counter()
            theirs[name] = stock.sparse_probing(sae, model, tasks, config, params.random_seed,
                                                params.model.llm_batch_size, Path(folder) / "stock")
            seconds.append(time.perf_counter() - start)
    # the first SAE ran twice, with and without the model's activations at hand: the difference is the model's share
    model_pass = seconds[0] - seconds.pop()
    kept = sum(seconds)
    for name in saes:
        key = "sae_top_1_test_accuracy"
        print(f"probing, {name}: top-1 {ours[name]['eval_result_metrics']['sae'][key]:.3f}, "
              f"stock {theirs[name]['averages'][key]:.3f} (its draws of negatives are others)")
    return our_time, kept, kept + model_pass * (len(saes) - 1)


if __name__ == "__main__":
    run_main(main)
