"""Cross-entropy and KL divergence of next-token predictions, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 4_000_000
"""Logits per step: small enough that a step's temporaries stay in the processor's caches."""


class CleanPredictions:
    """The unedited model's predictions, against which edited ones are measured."""

    def __init__(self, logits: Tensor, tokens: Tensor) -> None:
        """logits: [batch, seq, vocab]; tokens: [batch, seq]. The logits are overwritten."""
        self.batch, self.seq, vocab = logits.shape
        self.log_p_NV = logits.reshape(-1, vocab).float()
        for rows in self._chunks():
            self.log_p_NV[rows] = torch.log_softmax(self.log_p_NV[rows], dim=-1)
        self.targets_N = tokens.roll(-1, dims=1).reshape(-1)  # the last of a sequence has none and is dropped

    @property
    def ce(self) -> Tensor:
        """Cross-entropy of each position's prediction in nats [batch, seq - 1]."""
        return self._without_last(-self.log_p_NV.gather(1, self.targets_N[:, None])[:, 0])

    @torch.no_grad()
    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy [batch, seq - 1], KL(clean || edited) [batch, seq]) of edited logits, in nats.

        logits: [batch, seq, vocab], or [1, seq, vocab] when all sequences share them. KL comes from log-softmax, so
        it is finite where the logarithm of an underflowed softmax is not.
        """
        vocab = logits.shape[-1]
        if logits.shape[0] == 1 and self.batch > 1:
            logits = logits.expand(self.batch, -1, -1)
        kl_N = torch.empty(len(self.log_p_NV), device=logits.device)
        ce_N = torch.empty_like(kl_N)
        flat_NV = logits.reshape(-1, vocab) if logits.is_contiguous() else None
        for rows in self._chunks():
            # an expanded tensor must not be copied whole
            part = flat_NV[rows] if flat_NV is not None else logits[0][torch.arange(*rows.indices(len(kl_N))) % self.seq]
            log_q = torch.log_softmax(part.float(), dim=-1)
            log_p = self.log_p_NV[rows]
            ce_N[rows] = -log_q.gather(1, self.targets_N[rows, None])[:, 0]
            kl_N[rows] = torch.sub(log_p, log_q, out=log_q).mul_(log_p.exp()).sum(dim=-1)
        return self._without_last(ce_N), kl_N.reshape(self.batch, self.seq)

    def _without_last(self, values_N: Tensor) -> Tensor:
        return values_N.reshape(self.batch, self.seq)[:, :-1]

    def _chunks(self) -> list[slice]:
        step = max(1, CHUNK_ELEMENTS // self.log_p_NV.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.log_p_NV), step)]
