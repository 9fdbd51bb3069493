"""What a latent's decoder row writes into the logits of either model, and how alike the two are over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.lm.unembedding import Unembedding, unembedding
from sae_research.saes import SparseAutoencoder
from sae_research.transfer.sums import sums_dtype

CHUNK_ROWS = 8192


class LogitSimilarity(NamedTuple):
    correlation: Tensor
    """Pearson over shared tokens of `W_dec[f] W_U` in both models [d_sae]; NaN where one is constant."""
    shared_tokens: int
    shared_fraction: float
    """Of the base vocabulary."""
    base_norm: float
    """|W_U| over shared tokens, Frobenius."""
    finetuned_norm: float
    difference_norm: float

    def report(self) -> dict[str, Any]:
        """Without the latents, as JSON."""
        return {key: value for key, value in self._asdict().items() if key != "correlation"}


@torch.no_grad()
def logit_similarity(base: LanguageModel, finetuned: LanguageModel, sae: SparseAutoencoder) -> LogitSimilarity | None:
    """Compare every latent's logit vectors over the strings that both vocabularies hold.

    W_U carries the final norm's gain, as TransformerLens folds it; the mean over the vocabulary drops out of a
    correlation. With C_bf = sum over tokens of w_b w_f' (centred), the correlation of latent d is d C_bf d' over the root
    of (d C_bb d')(d C_ff d'): the logit vectors themselves, [d_sae, vocabulary], are never made. None where the SAE's rows
    do not lie in the residual stream's space (heads' outputs) or a model has no output embedding.
    """
    if sae.cfg.hook_name.endswith("hook_z") or any(lm.model.get_output_embeddings() is None for lm in (base, finetuned)):
        return None
    ids = _shared_ids(base, finetuned)
    if len(ids) < 2:
        return None
    sides = [unembedding(lm) for lm in (base, finetuned)]
    wide = sums_dtype(base.device)
    means = [sum(rows.sum(0) for rows in _chunks(side, ids[:, which], wide)) / len(ids) for which, side in enumerate(sides)]
    size = base.d_model
    bb, ff, bf = torch.zeros(3, size, size, dtype=wide, device=base.device)
    norms = torch.zeros(3, dtype=wide, device=base.device)
    for one, other in zip(_chunks(sides[0], ids[:, 0], wide), _chunks(sides[1], ids[:, 1], wide), strict=True):
        norms += torch.stack([one.square().sum(), other.square().sum(), (one - other).square().sum()])
        one, other = one - means[0], other - means[1]
        bb.addmm_(one.T, one)
        ff.addmm_(other.T, other)
        bf.addmm_(one.T, other)
    rows = sae.W_dec.to(wide)
    cross, base_part, other_part = (torch.linalg.vecdot(rows @ matrix, rows) for matrix in (bf, bb, ff))
    below = (base_part.clamp_min(0) * other_part.clamp_min(0)).sqrt()
    correlation = torch.where(below > 0, (cross / below.clamp_min(1e-300)).clamp(-1, 1), torch.nan)
    return LogitSimilarity(correlation.cpu(), len(ids), len(ids) / max(len(base.tokenizer.get_vocab()), 1),
                           *norms.sqrt().tolist())


def _shared_ids(base: LanguageModel, finetuned: LanguageModel) -> Tensor:
    """(base id, finetuned id) of every string that both vocabularies hold and both embeddings reach [n, 2]."""
    ours, theirs = base.tokenizer.get_vocab(), finetuned.tokenizer.get_vocab()
    found = sorted((ours[token], theirs[token]) for token in ours.keys() & theirs.keys()
                   if ours[token] < base.vocab_size and theirs[token] < finetuned.vocab_size)
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def _chunks(found: Unembedding, ids: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of W_U with the final norm's gain folded in [tokens, d_model], for these ids."""
    for part in ids.split(CHUNK_ROWS):
        rows = found.weight[part.to(found.weight.device)].to(dtype) * found.gain.to(dtype)
        yield rows - rows.mean(1, keepdim=True) if found.centred else rows
