"""Autointerp's local work, everything before the judge is asked: ours against SAE Bench 0.6.0."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import stock_autointerp
from sae_research.config.params import Params
from sae_research.evals import autointerp
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts

ROW = "autointerp, windows"


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any, params: Params, n_tokens: int = 4096
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, SAE Bench's) on the same contexts. model: the same one as `stock.hooked_model`.

    Counted are the model's pass, encoding, the choice of latents and the cutting of windows for every SAE, on either side
    from nothing; not counted are reading the text, loading the model, and the judge, who costs both sides the same.
    `SAE_RESEARCH_NO_CACHE=1` must be set and `activation_caching` off.
    """
    config = params.autointerp
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", n_tokens).tokens
    start = time.perf_counter()
    autointerp.find_windows(saes, lm, params, tokens)
    middle = time.perf_counter()
    for sae in saes.values():
        stock_autointerp.gather(sae, model, tokens, config, params.random_seed, params.model.llm_batch_size)
    return {ROW: (middle - start, time.perf_counter() - middle)}
