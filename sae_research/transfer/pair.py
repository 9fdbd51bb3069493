"""What is compared, and which tokens count in the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sae_research.lm import LanguageModel, token_mask
from sae_research.params import Params, TokenMask
from sae_research.saes import SparseAutoencoder
from sae_research.transfer.text import PairBatch, TextSource

MODELS = ("base", "finetuned")


@dataclass(frozen=True)
class Pair:
    """Two models and what they are compared with."""

    base: LanguageModel
    finetuned: LanguageModel
    saes: dict[str, SparseAutoencoder]
    """By role: `base`, and `finetuned` where the finetuned model's own is given. One hook for all."""
    hooks: tuple[str, ...]
    """Where activations are compared, the SAE's hook among them."""
    source: TextSource
    params: Params

    @property
    def hook(self) -> str:
        """The SAE's."""
        return self.saes["base"].cfg.hook_name

    @property
    def models(self) -> dict[str, LanguageModel]:
        return {"base": self.base, "finetuned": self.finetuned}


class Masks(NamedTuple):
    """Which tokens of a batch count at one hook."""

    counted: dict[str, Tensor]
    """By model, outliers included [batch, seq]."""
    kept: dict[str, Tensor]
    """Without tokens that are outliers in either model."""
    pairs: tuple[Tensor, Tensor]
    """Flat positions of matched tokens that count in both models [n], [n]."""
    pair_kept: Tensor
    """[n]"""


def masks(pair: Pair, batch: PairBatch, acts: dict[str, Tensor], limit: float) -> Masks:
    """acts: by model, at the hook that `limit` belongs to [batch, seq, d_in]."""
    rule = TokenMask(drop_first_position=pair.params.token_mask.drop_first_position, outlier_norm_multiple=None)
    sides = batch.sides
    found = {model: token_mask(lm, sides[model].tokens, acts[model], rule) & sides[model].real
             for model, lm in pair.models.items()}
    if not pair.source.own:  # the ids are the base tokenizer's: it says which are special
        found["finetuned"] = found["base"]
    outliers = {model: acts[model].float().norm(dim=-1) > limit for model in MODELS}
    one, other = batch.pairs
    both = found["base"].flatten()[one] & found["finetuned"].flatten()[other]
    one, other = one[both], other[both]
    hit = outliers["base"].flatten()[one] | outliers["finetuned"].flatten()[other]
    for model, index in (("base", one), ("finetuned", other)):
        outliers[model].view(-1)[index[hit]] = True
    return Masks(found, {m: found[m] & ~outliers[m] for m in MODELS}, (one, other), ~hit)
