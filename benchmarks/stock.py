"""SAE Bench 0.6.0 on our SAEs, tokens and tasks: for parity fixtures and for side-by-side timings.

Nothing here is used by the pipeline. SAE Bench runs its own unmodified code on a `HookedTransformer`; only its data
loading is replaced, because its data sets live on a hub.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# SAE Bench's run-time shape checks refuse its own probes under current jaxtyping; without them it also runs faster.
os.environ["JAXTYPING_DISABLE"] = "1"

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.evals.core import main as core_main
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing import main as probing_main
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import dataset_info, dataset_utils
from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg
from torch import Tensor
from transformer_lens import HookedTransformer, loading_from_pretrained

from sae_research.config.evaluation_params import SparseProbing
from sae_research.saes import SparseAutoencoder
from sae_research.text.tasks import Task


class StockSAE(BaseSAE):
    """One of our SAEs behind SAE Bench's contract; encoding and decoding are ours, unchanged."""

    def __init__(self, sae: SparseAutoencoder, model_name: str) -> None:
        super().__init__(
            sae.cfg.d_in,
            sae.cfg.d_sae,
            model_name,
            sae.cfg.hook_layer,
            sae.W_dec.device,
            torch.float32,
            hook_name=sae.cfg.hook_name,
        )
        W_enc, b_enc = sae.encoder_weights()
        for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", sae.W_dec), ("b_dec", sae.b_dec)):
            getattr(self, name).data = value.detach().float().clone()
        self.__dict__["ours"] = sae  # not a submodule: its tensors are the ones above
        self.cfg.architecture = "standard"  # keeps SAE Bench from looking for a gated SAE's biases
        _standardize_sae_cfg(self.cfg)

    def encode(self, x: Tensor) -> Tensor:
        return self.ours.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.ours.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class _Tokens:
    """The part of SAELens' `ActivationsStore` that core evaluation reads, over given tokens."""

    def __init__(self, tokens: Tensor, batch_size: int) -> None:
        self.context_size, self.store_batch_size_prompts = tokens.shape[1], batch_size
        self._batches: Iterator[Tensor] = iter(tokens.split(batch_size))

    def get_batch_tokens(self, _: int) -> Tensor:
        return next(self._batches)

    def reset_input_dataset(self) -> None:
        """SAE Bench calls this between its two passes; with current SAELens it changes nothing."""


def hooked_model(folder: Path, device: str = "cpu") -> HookedTransformer:
    """The model of a local folder in TransformerLens, unprocessed, as SAE Bench loads models."""
    name = str(folder)
    if name not in loading_from_pretrained.OFFICIAL_MODEL_NAMES:
        loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(name)
    with contextlib.redirect_stdout(io.StringIO()):
        return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=torch.float32)


def core(
    sae: SparseAutoencoder, model: HookedTransformer, tokens: Tensor, batch_size: int, n_reconstruction: int, n_sparsity: int
) -> dict[str, Any]:
    """SAE Bench's core metrics by category, plus `feature_metrics` (lists over latents)."""
    stock = StockSAE(sae, model.cfg.model_name)
    config = CoreEvalConfig(
        model_name=model.cfg.model_name,
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=n_reconstruction,
        n_eval_sparsity_variance_batches=n_sparsity,
        context_size=tokens.shape[1],
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    tokenizer = model.tokenizer
    metrics, features = core_main.run_evals(
        stock,
        _Tokens(tokens, batch_size),
        model,
        config,
        ignore_tokens={tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id},
    )
    metrics["misc_metrics"] = core_main.calculate_misc_metrics(features)
    return {**metrics, "feature_metrics": features}


def sparse_probing(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    tasks: list[Task],
    config: SparseProbing,
    seed: int,
    batch_size: int,
    artifacts: Path,
) -> dict[str, Any]:
    """SAE Bench's sparse probing over `tasks`. `artifacts` keeps the model's activations for the next SAE.

    Returns {"averages", "per_class", "draws"}; `draws` lists, in the order SAE Bench made them, the rows every probe
    met: (class, split, row numbers as they stand in the task's texts one class after another, labels).
    """
    draws: list[dict[str, Any]] = []
    with (
        _our_tasks(tasks),
        _recorded(draws),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        bench = SparseProbingEvalConfig(
            model_name=model.cfg.model_name,
            dataset_names=[task.name for task in tasks],
            random_seed=seed,
            probe_train_set_size=config.probe_train_set_size,
            probe_test_set_size=config.probe_test_set_size,
            context_length=config.context_length,
            k_values=list(config.k_values),
            llm_batch_size=batch_size,
            llm_dtype="float32",
        )
        averages, per_class = probing_main.run_eval_single_sae(
            bench, StockSAE(sae, model.cfg.model_name), model, str(sae.W_dec.device), str(artifacts)
        )
    return {"averages": averages, "per_class": per_class, "draws": draws}


@contextlib.contextmanager
def _our_tasks(tasks: list[Task]) -> Iterator[None]:
    by_name = {task.name: task for task in tasks}
    original = dataset_utils.get_multi_label_train_test_data
    dataset_utils.get_multi_label_train_test_data = lambda name, *_: (dict(by_name[name].train), dict(by_name[name].test))
    dataset_info.chosen_classes_per_dataset.update({task.name: tuple(task.train) for task in tasks})
    try:
        yield
    finally:
        dataset_utils.get_multi_label_train_test_data = original
        for name in by_name:
            del dataset_info.chosen_classes_per_dataset[name]


@contextlib.contextmanager
def _recorded(draws: list[dict[str, Any]]) -> Iterator[None]:
    """Learn which rows SAE Bench draws: run its own function a second time from the same generator state, on row
    numbers in place of activations."""
    original = probe_training.prepare_probe_data

    def prepare(activations: dict[str, Tensor], class_name: str, perform_scr: bool = False) -> tuple[Tensor, Tensor]:
        state = torch.get_rng_state()
        result = original(activations, class_name, perform_scr)
        torch.set_rng_state(state)
        numbers, start = {}, 0
        for name, values in activations.items():
            numbers[name] = torch.arange(start, start + len(values), dtype=torch.float32)[:, None]
            start += len(values)
        rows, labels = original(numbers, class_name, perform_scr)
        if not math.isclose(float(labels.float().mean()), 0.5):
            raise RuntimeError("SAE Bench drew an unbalanced task")
        draws.append({"class": class_name, "rows": rows[:, 0].long().tolist(), "labels": labels.tolist()})
        return result

    probe_training.prepare_probe_data = prepare
    try:
        yield
    finally:
        probe_training.prepare_probe_data = original
