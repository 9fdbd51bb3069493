"""Which texts and tokens core evaluation takes of the tiny project, for plain references of its metrics."""

from __future__ import annotations

import torch

from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.text.tokens import reorder_evenly, token_contexts


def texts(lm: LanguageModel, params: Params) -> torch.Tensor:
    """Contexts of the core evaluation [15, 24]: 6 for predictions, 9 for reconstruction."""
    return reorder_evenly(token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 15 * 24), 6).tokens[:15]


def counted(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens that count where the rule of norms is off: bool, in the shape of `tokens`."""
    mask = ~torch.isin(tokens, lm.special_ids)
    mask[:, 0] = False
    return mask
