"""The text around a latent's firings, cut to a window, for many latents at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sae_research.analysis.layout import LatentStats


class Windows(NamedTuple):
    """Contexts of some latents: top ones first, then the sampled ones, highest level first. L latents, M contexts each."""

    value: np.ndarray
    """Activation at the token that the context is about [L, M]"""
    context: np.ndarray
    """Which context of the store, -1 where there are fewer [L, M]"""
    position: np.ndarray
    """[L, M]"""
    level: np.ndarray
    """-1 for top contexts [M]"""


class Places:
    """Where every latent's contexts lie, read once."""

    def __init__(self, stats: LatentStats) -> None:
        self.stats = stats
        self._top, self._sampled = ([np.load(stats.folder / f"{kind}_{part}.npy", mmap_mode="r")
                                     for part in ("value", "context", "position")] for kind in ("top", "sample"))
        self._ids = np.asarray(stats.token_ids)
        self._documents = np.asarray(stats.document)

    def of(self, latents: slice) -> Windows:
        """The contexts of some latents."""
        levels, per_level = self._sampled[0].shape[1:]
        columns = []
        for top, sampled in zip(self._top, self._sampled, strict=True):
            flat = np.asarray(sampled[latents])[:, ::-1].reshape(-1, levels * per_level)
            columns.append(np.concatenate([np.asarray(top[latents]), flat], axis=1))
        level = np.concatenate([np.full(self._top[0].shape[1], -1), np.repeat(np.arange(levels)[::-1], per_level)])
        return Windows(*columns, level)

    def cut(self, latent: int, windows: Windows, row: int, around: int) -> list[dict[str, Any]]:
        """One latent's contexts as JSON-able values: `t` token ids from `from` on, `i` and `a` where it fires and how
        strongly, `at` the token it is about."""
        size = self.stats.context_size
        there = np.flatnonzero(windows.context[row] >= 0)
        context, position = windows.context[row, there].astype(np.int64), windows.position[row, there].astype(np.int64)
        first, end = np.maximum(position - around, 0), np.minimum(position + around + 1, size)
        tokens, values = self.stats.activations(latent)
        begin, stop = np.searchsorted(tokens, context * size + first), np.searchsorted(tokens, context * size + end)
        names = [self.stats.documents[number] for number in self._documents[context, position].tolist()]
        shown, about = significant(values), significant(windows.value[row, there])
        columns = (context, first, end, position, begin, stop, windows.level[there], about)
        cut = []
        for (name, source), c, a, b, at, low, high, level, value in zip(
                names, *(column.tolist() for column in columns), strict=True):
            cut.append({"v": value, "level": level, "c": c, "from": a, "at": at - a, "more": [a > 0, b < size], "doc": name,
                        "source": source, "t": self._ids[c, a:b], "i": tokens[low:high] - (c * size + a),
                        "a": shown[low:high]})
        return cut


def significant(values: Any, digits: int = 4) -> Any:
    """A number, or an array as float64, rounded to significant digits, which JSON writes short. Exact from 1e-18 on."""
    if isinstance(values, float | np.floating):
        return float(f"{values:.{digits}g}")
    array = np.ascontiguousarray(values, np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log10(np.abs(array)))
    # powers of ten are exact to 1e22 as multipliers and divisors, so the quotient is the nearest short decimal
    power = np.where(np.isfinite(exponent), digits - 1 - exponent, 0).clip(-22, 22)
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    return np.rint(array * up / down) / up * down
