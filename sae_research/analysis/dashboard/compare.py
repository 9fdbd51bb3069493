"""Two SAEs, or one SAE on two models, latent by latent."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sae_research.analysis.dashboard.latents import Shown, significant
from sae_research.analysis.dashboard.neighbours import (
    Matches,
    activation_correlation,
    match_by_activation,
    match_by_decoder,
    same_text,
)
from sae_research.runtime.errors import UserError


class Comparison(NamedTuple):
    """A compare view."""

    name: str
    one: str
    other: str
    how: str
    """What partners are, in words."""
    score: str
    """What the score is called."""
    content: dict[str, Any]
    """What the page's data file holds."""


def compare(one: Shown, other: Shown) -> Comparison:
    """Give every latent of one SAE its partner in the other.

    Latents of one SAE on two models are their own partners. Otherwise partners are those of highest correlation of
    activations where both read the same text, else of highest cosine of decoder rows where both read the same hook of the
    same model. Raises `UserError` where neither holds.
    """
    text = same_text(one.stats, other.stats)
    same_sae = one.sae.weights_fingerprint() == other.sae.weights_fingerprint()
    if same_sae:
        found = Matches(
            np.arange(one.stats.d_sae),
            activation_correlation(one.stats, other.stats) if text else np.full(one.stats.d_sae, np.nan),
        )
        how = "the same latent of one SAE on two models"
    elif text:
        found, how = match_by_activation(one.stats, other.stats), "the latent whose activations correlate most"
    elif one.sae.cfg.hook_name == other.sae.cfg.hook_name and one.lm.fingerprint == other.lm.fingerprint:
        found, how = match_by_decoder(one.sae, other.sae), "the latent whose decoder row is likest"
    else:
        raise UserError(
            f"{one.name} and {other.name} share neither text nor hook, so their latents cannot be matched; "
            "collect both statistics on the same text"
        )
    score = "correlation" if text else "cosine" if not same_sae else "not compared: the texts differ"
    return Comparison(f"{one.name}_and_{other.name}", one.name, other.name, how, score, _content(one, other, found))


def _content(one: Shown, other: Shown, found: Matches) -> dict[str, Any]:
    matched = found.partner >= 0
    partner = np.where(matched, found.partner, 0)
    density = np.where(matched, other.stats.density[partner], 0)
    known = found.score[matched & np.isfinite(found.score)]
    return {
        "one": one.name,
        "other": other.name,
        "partner": found.partner,
        "score": [significant(float(s)) if np.isfinite(s) else None for s in found.score],
        "median": significant(float(np.median(known))) if len(known) else None,
        "density_one": significant(one.stats.density),
        "density_other": significant(density),
        "labels_one": one.labels,
        "labels_other": [other.labels[p] if m else "" for p, m in zip(partner.tolist(), matched.tolist(), strict=True)],
    }
