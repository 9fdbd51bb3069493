"""The package sae-probes as SAE Bench 0.6.0 wraps it, on our SAEs, tasks and sizes: for parity fixtures and timings.

Its own unmodified code runs. Replaced are only the model's name by a model in memory, its folder of CSV files by one of
the rows we take, and the context length of 1024 by ours.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["JAXTYPING_DISABLE"] = "1"

import numpy as np
import pandas as pd
import sae_probes.generate_model_activations as model_activations
import sae_probes.generate_sae_activations as sae_activations
import sae_probes.run_baselines as baselines
import sae_probes.utils_data as data
from sae_bench.evals.sparse_probing_sae_probes import main as probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from torch import Tensor
from transformer_lens import HookedTransformer

from benchmarks.stock import StockSAE
from sae_research.config.evaluation_params import SparseProbingSaeProbes
from sae_research.saes import SparseAutoencoder

MODEL = "model"
sae_evals = importlib.import_module("sae_probes.run_sae_evals")  # the package hides it behind a function of that name


class LastTokenSAE(StockSAE):
    """SAE Bench gives `encode` last tokens without their texts [texts, d]: each becomes a sequence of its own."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x[:, None])[:, 0] if x.dim() == 2 else super().encode(x)


def sae_probes(
    saes: Mapping[str, SparseAutoencoder],
    model: HookedTransformer,
    rows: Mapping[str, pd.DataFrame],
    config: SparseProbingSaeProbes,
    seed: int,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """SAE name -> SAE Bench's result in plain data. rows: task -> its rows (prompt, target) in the file's order.

    `folder` keeps the model's activations from SAE to SAE: SAE Bench's best setting, which its command line does not set.
    """
    bench = SparseProbingSaeProbesEvalConfig(
        model_name=MODEL,
        random_seed=seed,
        dataset_names=list(rows),
        ks=list(config.k_values),
        results_path=str(folder / "results"),
        model_cache_path=str(folder / "activations"),
    )
    silent = io.StringIO()
    with (
        _our_inputs(model, rows, config.context_length, folder),
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        results = {
            name: probes_main.run_eval(bench, [(name, LastTokenSAE(sae, MODEL))], "cpu", str(folder / "out"))
            for name, sae in saes.items()
        }
    return {name: next(iter(found.values())) for name, found in results.items()}


def split_rows(rows: Mapping[str, pd.DataFrame], seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The train and test rows that stock draws of each task."""
    found = {}
    for name, frame in rows.items():
        n_train = min(len(frame) - 100, 1024)
        labels = np.unique(frame["target"].to_numpy(), return_inverse=True)[1]
        found[name] = data.get_train_test_indices(labels, n_train, len(frame) - n_train - 1, 0.5, seed)
    return found


@contextlib.contextmanager
def _our_inputs(
    model: HookedTransformer, rows: Mapping[str, pd.DataFrame], context_length: int, folder: Path
) -> Iterator[None]:
    class InMemory:
        @staticmethod
        def from_pretrained_no_processing(*_: Any, **__: Any) -> HookedTransformer:
            return model

    process = model_activations._process_activations
    files = folder / "data"
    (files / "cleaned_data").mkdir(parents=True, exist_ok=True)
    for name, frame in rows.items():
        frame.to_csv(files / "cleaned_data" / f"{name}.csv.zst", compression="zstd", index=False)
    replaced = [
        (model_activations, "HookedTransformer", InMemory),
        (model_activations, "DATA_PATH", files),
        (model_activations, "_process_activations", lambda **given: process(**{**given, "max_seq_len": context_length})),
        (data, "DATA_PATH", files),
        *(
            (module, "DATASET_SIZES", {name: len(frame) for name, frame in rows.items()})
            for module in (sae_activations, baselines, sae_evals)
        ),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    data.get_binary_df()  # read from the package's own folder, before and whatever happens here
    data.read_dataset_df.cache_clear()
    try:
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)
        data.read_dataset_df.cache_clear()
