"""Data files of a site. A page opened from disk may not `fetch` anything, so each is a script that hands its content to
`lab.put`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sae_research.analysis.dashboard.latents import Shown
from sae_research.runtime.files import write_bytes

NONE = 2**32 - 1
"""In place of a context that a latent does not have."""


def pack(values: np.ndarray) -> str:
    """Base64 of an array's bytes."""
    return base64.b64encode(values.tobytes()).decode()


def write_script(path: Path, key: str, content: Any) -> None:
    """A data file: content under a key."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    write_bytes(path, b"lab.put(" + orjson.dumps(key) + b"," + data + b");\n")


def searched_text(shown: Shown) -> dict[str, Any]:
    """What the search reads: the text of all contexts that a site shows, once, and which latent shows which part.

    `strings`; `tokens`: places in `strings` of the n contexts that some latent shows [n, S] uint32; `about`: for each of
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
