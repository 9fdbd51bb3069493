"""Latents chosen by what they measurably do to the next token, not by their names: estimated for all of them by one
gradient, then measured for the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.analysis.attribute import (
    ABLATION_BATCH,
    Metric,
    attribute,
    check_by_ablation,
    gradients,
    prompt_metric,
)
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.steer import check_steerable
from sae_research.runtime.errors import UserError


class MeasuredEffect(NamedTuple):
    """What one latent, added at its largest activation to every token of a prompt that counts, does to the next token."""

    latent: int
    estimate: float
    """`effect` to first order, from the gradient of the unedited model, nats."""
    effect: float
    """Change of the log-probability of the targets together, nats."""
    before: float
    """Probability of the targets together."""
    after: float
    kl: float
    """KL(unedited || edited) of the next token, nats: how much else changes."""
    top: str
    """The likeliest next token after the edit."""


def log_probability_of_any(tokens: Sequence[int], position: int = -1) -> Metric:
    """Log-probability that the next token is one of several, in nats."""
    wanted = list(tokens)
    return lambda logits: logits[:, position].float().log_softmax(-1)[:, wanted].logsumexp(-1)


def search_by_effect(
    analysis: AnalysisContext,
    prompt: str,
    targets: Sequence[str],
    k: int = 10,
    strength: float = 1.0,
    candidates: int = 64,
) -> list[MeasuredEffect]:
    """The k latents whose addition raises some tokens most after a prompt, largest measured effect first.

    The edit is that of steering by `add`: x + strength max d at every token that counts. With g the gradient of the targets'
    log-probability, summed over these tokens, its effect is `strength max <d, g>` to first order; the `candidates` of
    largest estimate are run. Raises `UserError` for targets of several tokens, and an SAE that cannot steer.
    """
    name, sae = analysis.only
    check_steerable(name, sae)
    if not targets:
        raise UserError("name at least one token, with its leading space: ' Paris'")
    tokens, hook = analysis.tokens(prompt), sae.cfg.hook_name
    metric = log_probability_of_any([analysis.token(text) for text in targets])
    stats = analysis.stats(name)
    amount = strength * torch.from_numpy(np.where(stats.max >= -stats.min, stats.max, stats.min)).to(sae.W_dec.device)
    value, acts, found = gradients(analysis, tokens, metric, [hook])
    x, mask = acts[hook], analysis.mask(tokens, acts[hook])[..., None]
    with torch.no_grad():
        estimate = amount * (sae.W_dec.float() @ (found[hook] * mask)[0].sum(0))
        chosen = estimate.topk(min(candidates, int((amount != 0).sum()))).indices
        before = analysis.lm.logits(tokens)[0, -1].float().log_softmax(-1)
        rows: list[MeasuredEffect] = []
        for part in chosen.split(ABLATION_BATCH):
            edited = x + mask * (amount[part, None] * sae.W_dec[part].float())[:, None]
            logits = analysis.lm.resume(hook, edited.to(x.dtype), tokens.expand(len(part), -1))
            rows += _rows(analysis, part, estimate[part], logits, metric(logits) - value, before, value)
    return sorted(rows, key=lambda row: (-row.effect, row.latent))[:k]


def _rows(
    analysis: AnalysisContext,
    latents: Tensor,
    estimates: Tensor,
    logits: Tensor,
    effects: Tensor,
    before: Tensor,
    value: float,
) -> list[MeasuredEffect]:
    after = logits[:, -1].float().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
    top = [analysis.lm.tokenizer.decode([token]) for token in after.argmax(-1).tolist()]
    probability = (effects + value).exp()
    columns = (latents, estimates, effects, probability, kl)
    return [
        MeasuredEffect(latent, estimate, effect, float(np.exp(value)), now, cost, token)
        for latent, estimate, effect, now, cost, token in zip(*(column.tolist() for column in columns), top, strict=True)
    ]


class Carrier(NamedTuple):
    """A latent that carries a metric on a prompt."""

    latent: int
    share: float
    """By attribution."""
    measured: float
    """metric - metric without the latent, the error term kept."""


def carriers(
    analysis: AnalysisContext,
    prompt: str,
    answer: str | None = None,
    against: str | None = None,
    k: int = 3,
    tried: int = 30,
) -> list[Carrier]:
    """The k latents whose removal lowers a metric most, of the `tried // 2` of largest share and as many random others.

    The metric is `attribute.prompt_metric`'s: log-probability of the answer, or its logit less that of another token. May
    hold fewer than k: a latent whose removal does not lower the metric carries nothing.
    """
    name, _ = analysis.only
    metric = prompt_metric(analysis, answer, against, analysis.tokens(prompt))
    check = check_by_ablation(analysis, name, prompt, attribute(analysis, prompt, metric), metric, tried)
    found = [
        Carrier(*row) for row in zip(check.latents.tolist(), check.attributed.tolist(), check.measured.tolist(), strict=True)
    ]
    return [row for row in sorted(found, key=lambda row: (-row.measured, row.latent)) if row.measured > 0][:k]
