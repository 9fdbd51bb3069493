"""Dashboards of all latents of an SAE, against a loop over batches of latents."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.dashboard.site import write_dashboard
from sae_research.config.params import Params
from sae_research.config.reporting import Dashboards
from sae_research.lm import LanguageModel
from sae_research.lm.generate import unembedding
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts, token_strings

TOKENS = 16_384
LATENTS_PER_BATCH = 128
"""SAEDashboard's default for Neuronpedia."""
BATCHES_TIMED = 2
BINS, GROUPS, PER_GROUP, TOP, LOGITS = 50, 5, 5, 20, 10


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any, params: Params
) -> dict[str, tuple[float, float]]:
    """Ours: the statistics of all latents of the first SAE in one pass, and the whole site written; a second row counts the
    site alone, from statistics at hand. Both without descriptions of latents, which the loop lacks. Theirs: SAEDashboard's
    plan with this project's model and SAE (the package itself does not install beside current ones), so that plans are
    compared and not the libraries below: for every batch of 128 latents the model runs over all tokens, the SAE encodes,
    and a loop over latents makes histograms, top and interval sequences and logit tables and writes JSON. Its batches cost
    the same, so two are timed and the sum reckoned. Reading and tokenising text counts for ours alone, inside the pass."""
    name, sae = next(iter(saes.items()))
    params = params.model_copy(update={"analysis": params.analysis.model_copy(update={"tokens": TOKENS})})
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, params.analysis.split, TOKENS).tokens
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with _own_cache(folder):
            analysis = AnalysisContext.of({name: sae}, lm, params)
            start = time.perf_counter()
            analysis.stats(name)
            collected = time.perf_counter()
            write_dashboard(analysis, folder / "site", Dashboards(explain=False))
            written = time.perf_counter()
        strings = token_strings(lm.tokenizer, lm.vocab_size)
        loop_start = time.perf_counter()
        for batch in range(BATCHES_TIMED):
            _one_batch(sae, lm, tokens, strings, batch * LATENTS_PER_BATCH, params.model.llm_batch_size, folder)
        n_batches = -(-sae.cfg.d_sae // LATENTS_PER_BATCH)
        theirs = (time.perf_counter() - loop_start) / BATCHES_TIMED * n_batches
    what = f"dashboards of {sae.cfg.d_sae:,} latents on {tokens.numel():,} tokens"
    return {
        f"{what}, statistics included": (written - start, theirs),
        f"{what}, from statistics at hand": (written - collected, theirs),
    }


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Statistics afresh, whatever lies in the cache."""
    before = os.environ.get("DVC_ROOT")
    os.environ["DVC_ROOT"] = str(folder)
    try:
        yield
    finally:
        del os.environ["DVC_ROOT"]
        if before is not None:
            os.environ["DVC_ROOT"] = before


@torch.no_grad()
def _one_batch(
    sae: SparseAutoencoder, lm: LanguageModel, tokens: Tensor, strings: list[str], first: int, batch_size: int, folder: Path
) -> None:
    """What a loop over batches of latents does for one of them."""
    latents = range(first, min(first + LATENTS_PER_BATCH, sae.cfg.d_sae))
    acts = torch.cat(
        [
            sae.encode(lm.activations(part, sae.cfg.hook_name))[..., latents.start : latents.stop]
            for part in tokens.split(batch_size)
        ]
    )
    logits = unembedding(lm).logits(sae.W_dec[latents.start : latents.stop])
    pages = [_page(acts[..., i], logits[i], tokens, strings, latent) for i, latent in enumerate(latents)]
    (folder / f"batch-{first}.json").write_text(json.dumps(pages))


def _page(acts: Tensor, logits: Tensor, tokens: Tensor, strings: list[str], latent: int) -> dict[str, Any]:
    flat = acts.flatten()
    nonzero = flat[flat != 0]
    top = flat.topk(min(TOP, flat.numel())).indices.tolist()
    groups = []
    edges = torch.linspace(0, float(flat.max()), GROUPS + 1)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = torch.nonzero((flat >= low) & (flat < high)).flatten()
        groups.append(inside[torch.randperm(len(inside))[:PER_GROUP]].tolist())
    sequences = [[_sequence(acts, tokens, strings, place) for place in places] for places in (top, *groups)]
    counts, bounds = np.histogram(nonzero.numpy(), BINS) if len(nonzero) else (np.zeros(1), np.zeros(2))
    logit_counts, logit_bounds = np.histogram(logits.numpy(), BINS)
    sides = [logits.topk(LOGITS, largest=largest) for largest in (True, False)]
    return {
        "latent": latent,
        "density": float((flat != 0).float().mean()),
        "sequences": sequences,
        "histogram": [counts.tolist(), bounds.tolist()],
        "logit_histogram": [logit_counts.tolist(), logit_bounds.tolist()],
        "logits": [[[strings[i] for i in side.indices.tolist()], side.values.tolist()] for side in sides],
    }


def _sequence(acts: Tensor, tokens: Tensor, strings: list[str], place: int) -> dict[str, Any]:
    row = place // tokens.shape[1]
    return {"tokens": [strings[i] for i in tokens[row].tolist()], "values": acts[row].tolist()}
