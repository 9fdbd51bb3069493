"""Figures of trained SAEs on documents they were not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.lm import LanguageModel, collect_hooks, token_mask
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats import ReconstructionStats

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


class HeldOut(NamedTuple):
    """Held-out contexts and their activations at some hooks, in the model's units and precision."""

    tokens: Tensor
    """[contexts, context_size]"""
    acts: dict[str, Tensor]
    """By hook [contexts, context_size, d_in], on the CPU; may be memory-mapped."""
    mask: dict[str, Tensor]
    """By hook, True where a token counts [contexts, context_size]."""

    def rows(self, hook: str) -> Tensor:
        """Activations of the tokens that count [n, d_in], float32."""
        return self.acts[hook][self.mask[hook]].float()


def read_held_out(lm: LanguageModel, params: Params, tokens: Tensor, median_norms: dict[str, float]) -> HeldOut:
    """The held-out contexts `tokens` [n, context_size] at each hook of `median_norms`, which are those of training.

    Raises `UserError` when no token of them counts.
    """
    pools = collect_hooks(lm, list(median_norms), tokens, params.model.llm_batch_size, params.activation_caching)
    acts = {hook: pool.flat.view(*tokens.shape, -1) for hook, pool in pools.items()}
    mask = {hook: token_mask(lm, tokens, acts[hook], params.token_mask, median_norms[hook]) for hook in acts}
    if not all(part.any() for part in mask.values()):
        raise UserError("train.held_out_tokens: no held-out token counts; raise it")
    return HeldOut(tokens, acts, mask)


@torch.no_grad()
def held_out_stats(saes: dict[str, SparseAutoencoder], rows_ND: Tensor) -> dict[str, ReconstructionStats]:
    """Statistics of every SAE on rows in the model's units."""
    stats = {
        name: ReconstructionStats(sae.cfg.d_in, sae.cfg.d_sae, rows_ND.device) for name, sae in saes.items()
    }
    for x_BD in rows_ND.split(BATCH):
        x = x_BD[None]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for name, z in encode_each(saes, x, mask):
            stats[name].update(x, saes[name].decode(z), z, mask)
    return stats


def kept(stats: ReconstructionStats) -> dict[str, float]:
    """The figures that the training report shows."""
    return {key: value for key, value in stats.metrics().items() if key in KEPT}
