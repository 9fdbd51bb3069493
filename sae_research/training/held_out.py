"""Figures of trained SAEs on documents they were not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.lm import LanguageModel, collect, token_mask
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats import ReconstructionStats
from sae_research.text.stream import token_contexts

HELD_OUT_SPLIT = "core_eval"
KEPT = (
    "tokens",
    "l0",
    "variance_explained",
    "variance_explained_per_dim",
    "cosine_similarity",
    "fraction_alive",
)
"""Which of the statistics the training report shows."""
BATCH = 1024


def held_out_rows(lm: LanguageModel, params: Params, median_norm: float) -> Tensor:
    """Counted activations of the held-out split [n, d_in], model units, float32, on the model's device."""
    contexts = token_contexts(
        lm.tokenizer, lm.separator_id, params.text, HELD_OUT_SPLIT, params.train.held_out_tokens
    )
    pool = collect(
        lm, params.train.hook_name, contexts.tokens, params.model.llm_batch_size, params.activation_caching
    )
    acts = pool.flat.view(*contexts.tokens.shape, -1)
    rows = acts[token_mask(lm, contexts.tokens, acts, params.token_mask, median_norm)].to(lm.device).float()
    if len(rows) == 0:
        raise UserError("train.held_out_tokens: no held-out token counts; raise it")
    return rows


@torch.no_grad()
def held_out_metrics(saes: dict[str, SparseAutoencoder], rows_ND: Tensor) -> dict[str, dict[str, float]]:
    """`ReconstructionStats` of every SAE on rows in the model's units, those named in KEPT."""
    stats = {
        name: ReconstructionStats(sae.cfg.d_in, sae.cfg.d_sae, rows_ND.device) for name, sae in saes.items()
    }
    for x_BD in rows_ND.split(BATCH):
        x = x_BD[None]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for name, z in encode_each(saes, x, mask):
            stats[name].update(x, saes[name].decode(z), z, mask)
    return {
        name: {key: value for key, value in stat.metrics().items() if key in KEPT}
        for name, stat in stats.items()
    }
