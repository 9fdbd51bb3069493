"""What the model loses without some latents: effect on the answer, with and without the SAE's error term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.analysis.patching import check_lab_latents, check_positions, run_with_saes, zeroed
from sae_research.analysis.sources import Lab


class AblationRow(NamedTuple):
    """One run, read at the prompt's last position."""

    run: str
    """`plain`; `with error term` or `reconstruction alone`, whole or with `- latent F`."""
    error_term: bool | None
    latents: list[int]
    """Set to zero."""
    answer_logit: float
    answer_probability: float
    answer_rank: int
    """0 is the likeliest."""
    answer_logit_change: float
    """Against the same run with no latent set to zero."""
    kl: float
    """KL(run with no latent set to zero || this run) at the last position, nats."""
    top: str
    """The likeliest next token."""


def ablate(lab: Lab, prompt: str, latents: Sequence[int], answer: str | None = None,
           positions: Sequence[int] | None = None, each: bool = True) -> list[AblationRow]:
    """Set latents to zero, one by one (`each`) and all together, at all positions or some (0 is the separator in front).

    answer: one token; by default the plain run's likeliest. Raises `UserError` for a latent or position that is not
    there, and an answer of several tokens.
    """
    name, sae = lab.only
    check_lab_latents(sae, latents)
    tokens = lab.tokens(prompt)
    positions = check_positions(positions, tokens)
    plain = lab.lm.logits(tokens)[0, -1].float()
    wanted = int(plain.argmax()) if answer is None else lab.token(answer)
    groups = [[latent] for latent in latents] if each else []
    if len(latents) > 1 or not each:
        groups.append(list(latents))
    rows = [_row(lab, "plain", None, [], plain, plain, wanted)]
    for error_term, label in ((True, "with error term"), (False, "reconstruction alone")):
        whole = run_with_saes(lab, tokens, error_term).logits[0, -1].float()
        rows.append(_row(lab, label, error_term, [], whole, plain, wanted))
        for group in groups:
            logits = run_with_saes(lab, tokens, error_term, {name: zeroed(group, positions)}).logits[0, -1].float()
            rows.append(_row(lab, f"{label} - {_named(group)}", error_term, group, logits, whole, wanted))
    return rows


def _named(latents: Sequence[int]) -> str:
    return f"latent {latents[0]}" if len(latents) == 1 else f"latents {', '.join(map(str, latents))}"


def _row(lab: Lab, run: str, error_term: bool | None, latents: list[int], logits: Tensor, reference: Tensor,
         wanted: int) -> AblationRow:
    log_p, log_r = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    top = lab.lm.tokenizer.decode([int(logits.argmax())])
    return AblationRow(run, error_term, latents, float(logits[wanted]), float(log_p[wanted].exp()),
                       int((logits > logits[wanted]).sum()), float(logits[wanted] - reference[wanted]),
                       max(0.0, float((log_r.exp() * (log_r - log_p)).sum())), top)
