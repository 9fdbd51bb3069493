"""Latent statistics: what they cost on top of the model's pass, and against measuring latents one after another."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sae_research.analysis.collect import LatentStats, collect_stats
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any, params: Params, tokens: int = 16_384, latents: int = 3
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, the other's).

    First row: `collect_stats` of the first SAE whose encoder is per token, everything it writes included, against the bare
    pass of the model to the same hook over the same tokens in the same batches; reading the text is counted on both sides.
    A ratio of 0.67x and more keeps the aim, 1.5 times the pass. Second row: all latents' figures against
    `find_max_activation` of the SAELens workshop, which passes the model over the tokens once for each latent to find one
    maximum; its time is for `latents` latents, ours for all of them. The maxima must agree.
    """
    name, sae = next((name, sae) for name, sae in saes.items() if sae.per_token and not sae.signed)
    params = params.model_copy(update={"analysis": params.analysis.model_copy(update={"tokens": tokens})})
    start = time.perf_counter()
    text = token_contexts(lm.tokenizer, lm.separator_id, params.text, params.analysis.split, tokens).tokens
    for part in text.split(params.model.llm_batch_size):
        lm.activations(part, sae.cfg.hook_name)
    bare = time.perf_counter() - start
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("sae_research.analysis.collect.cache_dir", lambda kind: _made(Path(folder) / kind)),
    ):
        start = time.perf_counter()
        found = collect_stats({name: sae}, lm, params)[name]
        ours = time.perf_counter() - start
        chosen = found.density.argsort()[-latents:].tolist()
        theirs = _workshop(sae, model, text, params, found, chosen)
    return {
        f"statistics of {sae.cfg.d_sae:,} latents; the model's pass alone": (ours, bare),
        f"maxima: all {sae.cfg.d_sae:,} latents; the workshop's loop, {latents} latents": (ours, theirs),
    }


@torch.no_grad()
def _workshop(
    sae: SparseAutoencoder, model: Any, text: torch.Tensor, params: Params, found: LatentStats, latents: list[int]
) -> float:
    """Seconds of the workshop's loop. Its maxima are compared at the tokens that count here."""
    counted = torch.from_numpy(found.counted.copy())
    hook = sae.cfg.hook_name
    start, size = time.perf_counter(), params.model.llm_batch_size
    for latent in latents:
        largest = 0.0
        for part, mask in zip(text.split(size), counted.split(size), strict=True):
            _, cache = model.run_with_cache(part, stop_at_layer=sae.cfg.hook_layer + 1, names_filter=[hook])
            largest = max(largest, float(sae.encode(cache[hook])[..., latent][mask].max()))
        if abs(largest - float(found.max[latent])) > 1e-2 * largest:
            raise AssertionError(f"latent {latent}: maximum {found.max[latent]}, the workshop's loop finds {largest}")
    return time.perf_counter() - start


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
