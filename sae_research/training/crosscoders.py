"""What a run says of crosscoders and cross-layer transcoders beside what it says of every SAE: hook by hook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.runtime.formatting import number, text_table
from sae_research.saes import SparseAutoencoder
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.saes.crosscoders import by_hook, decoder_norm_ratios
from sae_research.stats.predictions import CleanPredictions, prediction_sums, replaced_logits, replacement_logits
from sae_research.stats.reconstruction import ReconstructionStats

STEPS = 10
"""Equal steps of a latent's share, from 0 to 1."""


def hooks_of(sae: SparseAutoencoder, stats: ReconstructionStats) -> dict[str, dict[str, Any]]:
    """Of each hook that is written: `variance_explained` on held-out text; of a crosscoder also `decoder_norm_ratio`, this
    hook's mean share in latents, and how many latents have a share in each of `STEPS` steps. Latents without a decoder have
    none."""
    explained = zip(sae.cfg.hooks_out, stats.variance_explained_by_part(len(sae.cfg.hooks_out)), strict=True)
    found: dict[str, dict[str, Any]] = {
        hook: {} if math.isnan(part) else {"variance_explained": part} for hook, part in explained
    }
    if not sae.cfg.is_crosscoder:
        return found
    for hook, ratio_F in zip(found, decoder_norm_ratios(sae).cpu(), strict=True):
        shares = ratio_F[~ratio_F.isnan()]
        counts = torch.histc(shares, STEPS, 0, 1).long().tolist()
        mean = {"mean": float(shares.mean())} if len(shares) else {}
        found[hook]["decoder_norm_ratio"] = {**mean, "counts": counts}
    return found


def ratios_by_hook(sae: SparseAutoencoder) -> dict[str, list[float | None]]:
    """`decoder_norm_ratios` of every latent as JSON has them; None for one without a decoder."""
    ratios = decoder_norm_ratios(sae).tolist()
    return {
        hook: [None if math.isnan(share) else share for share in own]
        for hook, own in zip(sae.cfg.hook_names, ratios, strict=True)
    }


def replaced_sums(
    sae: SparseAutoencoder,
    x_hat: Tensor,
    mask: Tensor,
    tokens: Tensor,
    clean: CleanPredictions,
    lm: LanguageModel,
    zero: Mapping[str, tuple[Tensor, Tensor]],
) -> Iterator[tuple[str, dict[str, float]]]:
    """(hook, `prediction_sums`) with that hook alone replaced by its reconstruction, and ("", sums) with all of them; of a
    cross-layer transcoder in one run in which its encoders read what that run gives them.

    x_hat: [batch, seq, n * d_hook]; mask: tokens that count [batch, seq], the others stay as the run has them. zero: what
    `zeroed` gave."""
    sides = by_hook(x_hat, sae.cfg)
    for replaced in ("", *sides):
        chosen = {hook: side for hook, side in sides.items() if replaced in ("", hook)}
        if isinstance(sae, CrossLayerTranscoder) and not replaced:
            patched = clean.compare(replacement_logits(lm, tokens, sae, mask))
        else:
            patched = clean.compare(replaced_logits(lm, tokens, chosen, mask))
        yield replaced, prediction_sums(mask, {"clean": (clean.ce, None), "zero": zero[replaced], "patched": patched})


def zeroed(
    acts: Tensor, sae: SparseAutoencoder, mask: Tensor, tokens: Tensor, clean: CleanPredictions, lm: LanguageModel
) -> dict[str, tuple[Tensor, Tensor]]:
    """Predictions with zeros at each written hook alone, and under "" at all of them. acts: [batch, seq, n * d_hook]."""
    sides = by_hook(torch.zeros_like(acts), sae.cfg)
    runs = {"": sides} | {hook: {hook: side} for hook, side in sides.items()}
    return {name: clean.compare(replaced_logits(lm, tokens, chosen, mask)) for name, chosen in runs.items()}


def table(report: Mapping[str, Any]) -> str:
    """Hook by hook what a report says of its crosscoders; empty where there are none."""
    rows = [
        [
            name,
            hook,
            number(at["variance_explained"]),
            number(at["decoder_norm_ratio"]["mean"]),
            *map(str, at["decoder_norm_ratio"]["counts"]),
        ]
        for name, entry in report["saes"].items()
        for hook, at in entry.get("by_hook", {}).items()
        if "variance_explained" in at and "mean" in at.get("decoder_norm_ratio", {})
    ]
    heads = [f"to {(step + 1) / STEPS:.1f}" for step in range(STEPS)]
    title = "latents by the share of the hook in their decoder norms"
    heads = ["crosscoder", "hook", "variance explained", "mean share", *heads]
    return f"{title}\n{text_table([heads, *rows])}" if rows else ""
