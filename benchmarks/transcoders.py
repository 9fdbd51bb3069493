"""Core evaluation of transcoders against that of as many SAEs of their width."""

from __future__ import annotations

import time
from typing import Any

import torch

from sae_research.config.params import Params
from sae_research.evals.core import evaluation
from sae_research.lm import LanguageModel
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import TopKSAE

LAYER, D_SAE, K = 8, 4096, 32
READ, WRITTEN, STREAM = (f"blocks.{LAYER}.{kind}" for kind in ("mlp.hook_in", "hook_mlp_out", "hook_resid_post"))


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any, params: Params, number: int = 8, batches: int = 2
) -> dict[str, tuple[float, float]]:
    """Row -> (seconds of transcoders, of SAEs): of an MLP's output, half of the transcoders with a skip, and of the residual
    stream at its layer; TopK with random weights, both definitions, model passes included. batches: of contexts for
    predictions, and as many for reconstruction. `saes` and `model` are those of the other parts and not used."""
    changes = {"n_eval_reconstruction_batches": batches, "n_eval_sparsity_variance_batches": batches}
    params = params.model_copy(update={"core_eval": params.core_eval.model_copy(update=changes)})
    kinds = {"transcoders": [_random(seed, lm.d_model, READ, WRITTEN) for seed in range(number)]}
    kinds["SAEs"] = [_random(seed, lm.d_model, STREAM, STREAM) for seed in range(number)]
    seconds = {}
    for kind, members in kinds.items():
        for sae in members:
            evaluation.latent_weights(sae)  # nearest neighbours are remembered, and as many in both
        lm.d_in(members[0].cfg.hook_out)  # so is where MLP and attention are
        start = time.perf_counter()
        for _ in evaluation.evaluate({str(i): sae for i, sae in enumerate(members)}, lm, params):
            pass
        seconds[kind] = time.perf_counter() - start
    return {f"core of {number} transcoders, against {number} SAEs": (seconds["transcoders"], seconds["SAEs"])}


def _random(seed: int, d: int, read: str, written: str) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, d, generator=generator), dim=1)
    skip = {"W_skip": torch.randn(d, d, generator=generator) / d} if read != written and seed % 2 else {}
    cfg = SAEConfig(TopKSAE.form, d, D_SAE, hook_name=read, hook_out=written, apply_b_dec_to_input=read == written)
    return TopKSAE(cfg, k=K, W_enc=rows.T.contiguous(), b_enc=torch.zeros(D_SAE), W_dec=rows, b_dec=torch.zeros(d), **skip)
