"""Keys and values of the beginnings of texts, computed once: passes over what follows need not compute them again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_research.lm.model import LanguageModel

MAX_BYTES = 512 * 2**20
"""Most memory that the keys and values of beginnings take; when it is reached they are computed anew."""


class Past(NamedTuple):
    """What comes before the tokens of a pass, in rows of unlike length, padded on the left."""

    cache: Any
    """Of `transformers`: keys and values [batch, heads, before, width] of every layer, to which passes add their own."""
    real: Tensor
    """Where a token stands, bool [batch, before]."""

    def get_seq_length(self) -> int:
        """Places in the cache before the next token."""
        return self.cache.get_seq_length()

    def options(self, n_tokens: int, passed: int = 0) -> dict[str, Any]:
        """Arguments of the model's forward for the next tokens. passed: tokens since `real` was made."""
        ones = self.real.new_ones(len(self.real), passed + n_tokens)
        first = self.real.sum(1, keepdim=True) + passed
        return {
            "use_cache": True,
            "past_key_values": self.cache,
            "attention_mask": torch.cat([self.real, ones], dim=1).long(),
            "position_ids": first + torch.arange(n_tokens, device=self.real.device),
        }


class Beginnings:
    """The first tokens of some texts as a model's layers keep them."""

    def __init__(self, lm: LanguageModel, texts: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        """texts: their ids; ends: how many tokens of each may be asked for, one at least."""
        self.lm = lm
        self._ids = [tuple(text[:end]) for text, end in zip(texts, ends, strict=True)]
        self._longest = max(map(len, texts), default=0)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def usable(self) -> bool:
        """Whether going on after a beginning gives this model's logits: tried on a few tokens, at unlike lengths. False too
        where an architecture keeps no plain keys and values, for a model on several devices, and for texts longer than its
        attention reaches."""
        lm = self.lm
        window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
        if lm.in_parts or window is not None and window <= self._longest:
            return False
        tokens, after = torch.arange(16).view(2, 8) * 7 % lm.vocab_size, 3
        lengths = [8, 6]
        texts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
        few = Beginnings(lm, texts, [length - after for length in lengths])
        try:
            past = few.past([0, 1], [length - after for length in lengths])
            got = lm.continued(torch.tensor([text[-after:] for text in texts]), past)[:, -1]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            return False
        wanted = lm.logits(tokens)[torch.arange(2), torch.tensor(lengths) - 1]
        rounding = 1e-4 if lm.dtype == torch.float32 else 0.02
        return bool((got.float() - wanted.float()).norm() <= rounding * wanted.float().norm())

    @torch.no_grad()
    def past(self, rows: Sequence[int], lengths: Sequence[int]) -> Past:
        """Of the first `lengths` tokens of the texts `rows`, each length at least 1 and at most the text's end."""
        from transformers import DynamicCache

        self._compute({self._ids[row] for row in rows})
        device, most = self.lm.device, max(lengths)
        kept = [self._kept[self._ids[row]] for row in rows]
        layers, heads, _, width = kept[0].shape
        filled = kept[0].new_zeros(layers, len(rows), heads, most, width)
        real = torch.zeros(len(rows), most, dtype=torch.bool)
        for i, (one, length) in enumerate(zip(kept, lengths, strict=True)):
            filled[:, i, :, most - length :] = one[:, :, :length]
            real[i, most - length :] = True
        cache = DynamicCache(config=self.lm.model.config.get_text_config())
        for layer in range(layers // 2):
            cache.update(filled[2 * layer], filled[2 * layer + 1], layer)
        return Past(cache, real.to(device))

    def _compute(self, wanted: set[tuple[int, ...]]) -> None:
        """Keep the keys and values of these beginnings [2 * layers, heads, tokens, width], keys and values in turn."""
        from transformers import DynamicCache

        missing = wanted - self._kept.keys()
        if missing and sum(one.nbytes for one in self._kept.values()) > MAX_BYTES:
            self._kept.clear()
            missing = wanted
        if not missing:
            return
        most, ordered = max(map(len, missing)), sorted(missing)
        cache = DynamicCache(config=self.lm.model.config.get_text_config())
        padded = torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in ordered])
        self.lm.edited_logits(padded, {}, torch.tensor([most - 1]), cache)
        layers: list[Any] = cache.layers
        both: list[Tensor] = [part for layer in layers for part in (layer.keys, layer.values)]
        for row, ids in enumerate(ordered):
            self._kept[ids] = torch.stack([part[row, :, : len(ids)] for part in both])
