"""The index of held-out texts that training text is compared with, kept under `.cache/held_out/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from sae_research.cached_files import new_entry, usable
from sae_research.sources import sources_fingerprint
from sae_research.store import fingerprint
from sae_research.store_cache import cache_dir, prune
from sae_research.text.near_copies import NearIndex, ShingleSets, shingle_sets

MAX_GB = 1.0
"""Size limit of the folder; the packaged text's index has 4 MB."""
_CODES, _BOUNDS = "codes.npy", "bounds.npy"


def held_out_index(text_fingerprint: str, texts: Iterable[str], kept: Callable[[], bool]) -> NearIndex:
    """The index of held-out texts; `texts` is read only where the cache does not hold it.

    text_fingerprint: of the data that `texts` comes from. kept: whether that alone says what the texts are, so that the
    index may be cached; asked once they are read. Raises `UserError` where the cache cannot be written.
    """
    folder = cache_dir("held_out")
    entry = folder / fingerprint([text_fingerprint, sources_fingerprint(__name__)])[:32]
    if usable(entry):
        return NearIndex(ShingleSets(np.load(entry / _CODES), np.load(entry / _BOUNDS)))
    sets = shingle_sets(texts)
    if kept():
        with new_entry(entry) as temporary:
            np.save(temporary / _CODES, sets.codes)
            np.save(temporary / _BOUNDS, sets.bounds)
        prune(folder, MAX_GB, keep=[entry])
    return NearIndex(sets)
