"""SAE Bench 0.6.0's autointerp on our SAEs and tokens: for parity fixtures and for side-by-side timings.

SAE Bench runs its own unmodified code. Its judge's name is fixed, but its client reads OPENAI_BASE_URL: a loopback server
stands in.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAXTYPING_DISABLE"] = "1"  # as in benchmarks.stock

import torch
from sae_bench.evals.autointerp import main as autointerp_main
from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
from sae_bench.sae_bench_utils import activation_collection
from torch import Tensor
from transformer_lens import HookedTransformer

from benchmarks.stock import StockSAE
from sae_research.config.evaluation_params import Autointerp
from sae_research.saes import SparseAutoencoder


def stock_config(config: Autointerp, model: HookedTransformer, tokens: Tensor, seed: int, batch_size: int) -> Any:
    shared = set(AutoInterpEvalConfig.__dataclass_fields__) & set(Autointerp.model_fields) - {"n_latents", "total_tokens"}
    named = config.override_latents
    result = AutoInterpEvalConfig(
        **{key: getattr(config, key) for key in shared},
        n_latents=config.n_latents if named is None else None,
        total_tokens=tokens.numel(),
        llm_context_size=tokens.shape[1],
        model_name=model.cfg.model_name,
        random_seed=seed,
        llm_batch_size=batch_size,
        llm_dtype="float32",
    )
    result.latents = named
    return result


def gather(
    sae: SparseAutoencoder, model: HookedTransformer, tokens: Tensor, config: Autointerp, seed: int, batch_size: int
) -> tuple[Any, dict[int, Any], dict[int, Any]]:
    """SAE Bench's local work: sparsity, choice of latents, windows. Returns (its AutoInterp, generation and scoring
    examples by latent)."""
    random.seed(seed)
    torch.manual_seed(seed)
    stock = StockSAE(sae, model.cfg.model_name)
    bench = stock_config(config, model, tokens, seed, batch_size)
    with _quiet():
        sparsity = activation_collection.get_feature_activation_sparsity(
            tokens, model, stock, batch_size, sae.cfg.hook_layer, sae.cfg.hook_name, mask_bos_pad_eos_tokens=True
        )
        task = autointerp_main.AutoInterp(bench, model, stock, tokens, sparsity, "cpu", "none")
        return task, *task.gather_data()


def run(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    tokens: Tensor,
    config: Autointerp,
    seed: int,
    batch_size: int,
    base_url: str,
) -> dict[int, dict[str, Any]]:
    """SAE Bench's whole evaluation of one SAE against the judge at `base_url`: its records by latent."""
    bench = stock_config(config, model, tokens, seed, batch_size)
    with tempfile.TemporaryDirectory() as folder, _environment(OPENAI_BASE_URL=base_url), _quiet():
        name = autointerp_main.escape_slash(bench.model_name)
        torch.save(tokens, Path(folder) / f"{name}_{tokens.numel()}_tokens_{tokens.shape[1]}_ctx.pt")
        return autointerp_main.run_eval_single_sae(bench, StockSAE(sae, model.cfg.model_name), model, "cpu", folder, "none")


@contextlib.contextmanager
def recorded_positions(found: list[Tensor]) -> Iterator[None]:
    """Collects [k, 2] rows and columns of the windows that SAE Bench cuts, in its own order for every latent: random ones
    once, the strongest twice (tokens, activations), weighted ones twice."""
    original = autointerp_main.index_with_buffer

    def index_with_buffer(x: Tensor, indices: Tensor, buffer: int = 0) -> Tensor:
        found.append(indices)
        return original(x, indices, buffer)

    autointerp_main.index_with_buffer = index_with_buffer
    try:
        yield
    finally:
        autointerp_main.index_with_buffer = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
