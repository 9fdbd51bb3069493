"""What a language model loses when activations at a hook are replaced: the one definition of its metrics.

A run is a pass with something in place of the activations: `clean` (nothing), `zero` (zeros), `mean` (the mean activation)
or `patched` (a reconstruction). `CleanPredictions.compare` gives a run's cross-entropy and KL divergence token by token,
`prediction_sums` their sums over counted positions, and `losses` the metrics:

    ce_delta       = ce_patched - ce_clean                               in nats per counted prediction
    kl             = KL(clean || patched)                                in nats per counted position
    loss_recovered = (ce_zero - ce_patched) / (ce_zero - ce_clean)       over zero-ablation; the same over mean-ablation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.saes.cross_layer import CrossLayerTranscoder

CHUNK_ELEMENTS = 4_000_000
"""Logits per step: small enough that a step's temporaries stay in the processor's caches."""
RECOVERED = {"zero": "loss_recovered", "mean": "loss_recovered_mean_ablation"}
"""Names of loss recovered, by what it is measured against."""


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


def replaced_logits(lm: LanguageModel, tokens: Tensor, sides: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Logits [batch, seq, vocab] of one run with these activations [batch, seq, d_hook] at their hooks, where `mask`
    [batch, seq] holds; other tokens stay as that run has them."""

    def putting(put: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda own: put.to(own.dtype) if mask is None else torch.where(mask[..., None], put.to(own.dtype), own)

    return lm.edited_logits(tokens, {hook: putting(side) for hook, side in sides.items()})


def replacement_logits(lm: LanguageModel, tokens: Tensor, sae: CrossLayerTranscoder, mask: Tensor | None = None) -> Tensor:
    """Logits [batch, seq, vocab] of the replacement model of Ameisen et al. 2025: one run in which what each written layer's
    MLP puts out is replaced by a cross-layer transcoder's reconstruction, made of the latents that its encoders find in that
    same run. Where `mask` [batch, seq] does not hold, tokens have no latents and stay as that run has them."""
    given: list[Tensor] = []
    found: list[Tensor] = []

    def reading(number: int) -> Callable[[Tensor], Tensor]:
        def read(own: Tensor) -> Tensor:
            given.append(own.float().clone())  # some families add to it in place
            found.append(sae.encode_hook(number, given[-1], mask))
            return own

        return read

    def writing(number: int) -> Callable[[Tensor], Tensor]:
        def write(own: Tensor) -> Tensor:
            put = sae.written_hook(number, torch.cat(found, dim=-1), given[number]).to(own.dtype)
            return put if mask is None else torch.where(mask[..., None], put, own)

        return write

    edits = {hook: reading(number) for number, hook in enumerate(sae.cfg.hook_names)}
    return lm.edited_logits(tokens, edits | {hook: writing(number) for number, hook in enumerate(sae.cfg.hooks_out)})


def total(values: Tensor, mask: Tensor) -> float:
    """Sum over the positions where the mask holds, in float64 (on the CPU where the device has none)."""
    chosen = values[mask]
    return float((chosen.cpu() if chosen.device.type == "mps" else chosen).double().sum())


def prediction_sums(
    mask: Tensor,
    runs: Mapping[str, tuple[Tensor, Tensor | None]],
    add: Callable[[Tensor, Tensor], Any] = total,
    predicted: Tensor | None = None,
) -> dict[str, Any]:
    """`ce_<run>`, `kl_<run>` and the numbers of terms in them, `ce_tokens` and `kl_tokens`.

    mask: True where a position counts [batch, seq]. runs: (cross-entropy [batch, seq - 1], KL [batch, seq] or None) by
    name, as `CleanPredictions.compare` gives them. `add(values, mask)` sums, over everything unless said otherwise.
    predicted: which predictions count [batch, seq - 1], by default those made at counted positions.
    """
    predicted = mask[:, :-1] if predicted is None else predicted
    sums = {"ce_tokens": add(predicted, predicted), "kl_tokens": add(mask, mask)}
    for name, (ce, kl) in runs.items():
        sums[f"ce_{name}"] = add(ce, predicted)
        if kl is not None:
            sums[f"kl_{name}"] = add(kl, mask)
    return sums


def loss_ratios(sums: Mapping[str, Any], patched: str = "patched") -> dict[str, tuple[Any, Any]]:
    """Numerator and denominator of every metric that the runs in `sums` allow. The sums are numbers, or arrays of one number
    a cluster. patched: name of the patched run."""
    tokens, clean, own = sums["ce_tokens"], sums["ce_clean"], sums[f"ce_{patched}"]
    ablated = {run: sums[f"ce_{run}"] for run in ("zero", "mean") if f"ce_{run}" in sums}
    return {
        "kl": (sums[f"kl_{patched}"], sums["kl_tokens"]),
        "ce_clean": (clean, tokens),
        "ce_patched": (own, tokens),
        "ce_delta": (own - clean, tokens),
        **{f"ce_{run}_ablated": (ce, tokens) for run, ce in ablated.items()},
        **{RECOVERED[run]: (ce - own, ce - clean) for run, ce in ablated.items()},
    }


def losses(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics from sums over all positions; NaN where a denominator is zero."""
    per_token = {key: _ratio(value, sums[f"{key[:2]}_tokens"]) for key, value in sums.items()}
    return {key: _ratio(*parts) for key, parts in loss_ratios(per_token).items()}


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
