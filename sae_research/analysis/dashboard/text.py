"""The text of all contexts that a site shows, once, and which latent shows which part: what the search reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_research.analysis.dashboard.latents import Shown
from sae_research.analysis.dashboard.packing import pack

NONE = 2**32 - 1
"""In place of a context that a latent does not have."""


def searched_text(shown: Shown) -> dict[str, Any]:
    """`strings`; `tokens`: places in `strings` of the n contexts that some latent shows [n, S] uint32; `about`: for each of
    the latents the tokens that its M contexts are about, counted through those n contexts [F, M] uint32; `around`: how many
    tokens on either side are shown. Arrays as base64."""
    windows = shown.places.of(slice(0, shown.stats.d_sae))
    there = windows.context >= 0
    kept, place = np.unique(windows.context[there], return_inverse=True)
    about = np.full(windows.context.shape, NONE, np.uint32)
    size = shown.stats.context_size
    about[there] = place * size + windows.position[there]
    ids, tokens = np.unique(np.asarray(shown.stats.token_ids)[kept.astype(np.int64)], return_inverse=True)
    return {
        "size": size,
        "around": shown.settings.window,
        "each": windows.context.shape[1],
        "strings": shown.stats.strings(ids),
        "tokens": pack(tokens.astype("<u4").reshape(-1)),
        "about": pack(about.astype("<u4")),
    }
