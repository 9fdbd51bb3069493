"""Which tokens count: not special ones, not the first position, not the outlier norms of attention sinks; in conversations
only those of the roles asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.config.params import TokenMask
from sae_research.lm.model import LanguageModel


def token_mask(
    lm: LanguageModel,
    tokens: Tensor,
    activations: Tensor,
    rule: TokenMask,
    median_norm: float | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """True where a token counts. tokens: [batch, seq]; activations: [batch, seq, d_in]. Returns bool [batch, seq].

    counted: where tokens of `text.roles` stand, bool [batch, seq] (`Contexts.counted`); None: everywhere. The norm rule
    compares with `median_norm` (model units), by default the median over this batch's other tokens; give it to make the mask
    independent of how texts are batched.
    """
    keep = ~torch.isin(tokens, lm.special_ids.to(tokens.device))
    if rule.drop_first_position:
        keep[:, 0] = False
    if counted is not None:
        keep &= counted.to(keep.device)
    if rule.outlier_norm_multiple is not None and keep.any():
        norms = activations.float().norm(dim=-1)
        median = norms[keep].median() if median_norm is None else median_norm
        keep = keep & (norms <= rule.outlier_norm_multiple * median)
    return keep


def sae_bench_mask(lm: LanguageModel, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """Which tokens SAE Bench counts: all but the tokenizer's BOS, EOS and padding ids; of these only those `counted`, as in
    `token_mask`. Returns bool [batch, seq]."""
    ignored = {lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.bos_token_id} - {None}
    keep = ~torch.isin(tokens, torch.tensor(sorted(ignored), device=tokens.device))
    return keep if counted is None else keep & counted.to(keep.device)


def median_activation_norm(lm: LanguageModel, tokens: Tensor, activations: Tensor, counted: Tensor | None = None) -> float:
    """Median norm of activations [batch, seq, d_in] over tokens that are neither special nor first, and `counted` as in
    `token_mask`."""
    keep = token_mask(lm, tokens, activations, TokenMask(outlier_norm_multiple=None), counted=counted)
    return float(activations[keep].float().norm(dim=-1).median())
