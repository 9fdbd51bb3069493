"""Everything a latent's page shows, for one file of latents at a time: windows of text around its firings, coarse
histograms, and what its direction does to the next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sae_research.analysis.dashboard.logits import LogitEffects, logit_effects
from sae_research.analysis.dashboard.neighbours import nearest
from sae_research.analysis.explain import Explainer, Explanation, LogitTail, by_mean_activation, token_shares
from sae_research.analysis.store import N_BINS, LatentStats
from sae_research.config.reporting import Dashboards
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder

LATENTS_PER_FILE = 16
"""A latent's page loads one file of so many."""


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
        self._top, self._sampled = (
            [np.load(stats.folder / f"{kind}_{part}.npy", mmap_mode="r") for part in ("value", "context", "position")]
            for kind in ("top", "sample")
        )
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
            names, *(column.tolist() for column in columns), strict=True
        ):
            cut.append(
                {
                    "v": value,
                    "level": level,
                    "c": c,
                    "from": a,
                    "at": at - a,
                    "more": [a > 0, b < size],
                    "doc": name,
                    "source": source,
                    "t": self._ids[c, a:b],
                    "i": tokens[low:high] - (c * size + a),
                    "a": shown[low:high],
                }
            )
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


MERGED = 4
"""Bins of the store that become one bar: four to a factor of two."""
DENSITY_STEP = 0.25
"""Decades."""


def activation_bars(stats: LatentStats, latents: slice) -> list[list[dict[str, Any]]]:
    """For every latent its histograms of non-zero activations, on a logarithmic axis: one of the negative ones where there
    are any, one of the positive ones. Each `{edges: [n + 1], counts: [n]}`, without the empty bars at its ends."""
    counts = np.asarray(stats.histogram[latents])
    sides = (
        [(counts[:, :N_BINS], stats.edges[: N_BINS + 1]), (counts[:, N_BINS + 1 :], stats.edges[N_BINS + 1 :])]
        if stats.signed
        else [(counts, stats.edges)]
    )
    merged = [(side.reshape(len(side), -1, MERGED).sum(2), significant(edges[::MERGED])) for side, edges in sides]
    found = []
    for row in range(len(counts)):
        bars = []
        for side, edges in merged:
            filled = np.flatnonzero(side[row])
            if len(filled):
                first, end = int(filled[0]), int(filled[-1]) + 1
                bars.append({"edges": edges[first : end + 1], "counts": side[row, first:end]})
        found.append(bars)
    return found


def density_bars(stats: LatentStats) -> dict[str, Any]:
    """Latents by log10 of density: `{dead, edges: log10 [n + 1], counts: {kind: [n]}, expected, rare, dense: densities}`."""
    alive = stats.density[stats.count > 0]
    kind = stats.kind[stats.count > 0]
    lowest = np.floor(np.log10(alive.min()) / DENSITY_STEP) * DENSITY_STEP if len(alive) else -1.0
    edges = np.arange(lowest, DENSITY_STEP, DENSITY_STEP)
    return {
        "dead": int((stats.count == 0).sum()),
        "edges": edges,
        "counts": {
            one: np.histogram(np.log10(alive[kind == one]).clip(edges[0], edges[-1]), edges)[0]
            for one in ("rare", "between", "dense")
        },
        "expected": significant(stats.expected_density),
        "rare": significant(stats.rare_below),
        "dense": significant(stats.dense_from),
    }


QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)
LABEL_TOKENS = 4


@dataclass
class Shown:
    """One SAE on one model, as a site shows it."""

    name: str
    sae: SparseAutoencoder
    lm: LanguageModel
    stats: LatentStats
    settings: Dashboards
    figures: dict[str, float] = field(default_factory=dict)
    """Of an evaluation, by name; shown on the start page as they are."""
    unexplained: str = ""
    """Why no latent is described, where text is too short."""

    @property
    def n_files(self) -> int:
        return -(-self.stats.d_sae // LATENTS_PER_FILE)

    @cached_property
    def logits(self) -> LogitEffects | None:
        return logit_effects(self.sae, self.lm, self.settings.logits)

    @cached_property
    def near(self) -> tuple[np.ndarray, np.ndarray]:
        return nearest(self.sae.W_dec, self.settings.neighbours)

    @cached_property
    def places(self) -> Places:
        return Places(self.stats)

    @cached_property
    def _explainer(self) -> Explainer | None:
        try:
            return Explainer(self.stats) if self.settings.explain else None
        except UserError as short_text:
            self.unexplained = str(short_text)
            return None

    @cached_property
    def explanations(self) -> list[Explanation | None]:
        """Of every latent; None where one fires too rarely, everywhere with `explain: false`."""
        if self._explainer is None:
            return [None] * self.stats.d_sae
        return [self._explainer.explain(latent, 8, self._tail(latent)) for latent in range(self.stats.d_sae)]

    def _tail(self, latent: int) -> LogitTail | None:
        if self.logits is None:
            return None
        return LogitTail(
            self.stats.strings(self.logits.raised[latent, :5]),
            float(self.logits.skew[latent]),
            float(self.logits.kurtosis[latent]),
        )

    @cached_property
    def labels(self) -> list[str]:
        """The first tokens that each latent fires on, by largest mean activation over all their occurrences."""
        return [
            " ".join(dict.fromkeys(visible(token) for token in tokens[:LABEL_TOKENS]))
            for tokens in (self._label_tokens(latent) for latent in range(self.stats.d_sae))
        ]

    def _label_tokens(self, latent: int) -> list[str]:
        found = self.explanations[latent]
        if found is not None:
            return [share.token for share in found.by_mean]
        numbers, values = self.stats.activations(latent)
        if not len(numbers):
            return []
        ids = np.asarray(self.stats.token_ids).reshape(-1)[numbers].astype(np.int64)
        shares = token_shares(
            ids, np.abs(values).astype(np.float64), self._occurrences, self.stats.vocabulary, self.stats.density[latent]
        )
        return [share.token for share in by_mean_activation(shares, LABEL_TOKENS)]

    @cached_property
    def _occurrences(self) -> np.ndarray:
        """Of every token id in the text, where it counts."""
        ids = np.asarray(self.stats.token_ids)[np.asarray(self.stats.counted)]
        return np.bincount(ids, minlength=len(self.stats.vocabulary))

    @cached_property
    def promoted(self) -> list[str]:
        """The tokens each latent raises most, in one line each; empty outside the residual stream."""
        if self.logits is None:
            return [""] * self.stats.d_sae
        return [" ".join(map(visible, self.stats.strings(row))) for row in self.logits.raised[:, :LABEL_TOKENS]]

    @cached_property
    def density(self) -> list[float]:
        """Rounded, for lists."""
        return significant(self.stats.density).tolist()

    @cached_property
    def quantiles(self) -> np.ndarray:
        """[F, QUANTILES]"""
        return np.stack([self.stats.quantile(q) for q in QUANTILES], axis=1)


def visible(token: str) -> str:
    """A token as one word of a list: outer spaces off, others and line breaks as signs."""
    return token.strip(" ").translate({ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥", ord("\r"): "␍"}) or "␣"


def latent_files(shown: Shown) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, content) of every file; content: `strings` that token numbers in it point to, and `latents` in order."""
    size = LATENTS_PER_FILE
    for number in range(shown.n_files):
        latents = range(number * size, min((number + 1) * size, shown.stats.d_sae))
        found = latent_records(shown, latents)
        strings = _number_tokens(shown.stats, [context for record in found for context in record["contexts"]])
        yield number, {"strings": strings, "latents": found}


def latent_records(shown: Shown, latents: range) -> list[dict[str, Any]]:
    """What is known of consecutive latents. Contexts hold the tokenizer's token ids."""
    stats, part = shown.stats, slice(latents.start, latents.stop)
    windows, bars = shown.places.of(part), activation_bars(stats, part)
    near, cosine = shown.near[0][part].tolist(), significant(shown.near[1][part]).tolist()
    figures = {
        name: significant(values[part])
        for name, values in (
            ("density", stats.density),
            ("cah", stats.cah),
            ("max", stats.max),
            ("min", stats.min),
            ("mean", stats.mean),
            ("sd", stats.standard_deviation),
        )
    }
    density, kind, quantiles = shown.density, stats.kind[part], significant(shown.quantiles[part])
    logits = _logits(shown, part)
    records = []
    for row, latent in enumerate(latents):
        records.append(
            {
                "id": latent,
                "kind": str(kind[row]),
                "count": int(stats.count[latent]),
                "contexts_firing": int(stats.contexts_firing[latent]),
                "label": shown.labels[latent],
                **{name: values[row] for name, values in figures.items()},
                "quantiles": quantiles[row],
                "bars": bars[row],
                "near": [
                    {"id": int(n), "cosine": c, "label": shown.labels[n], "density": density[n]}
                    for n, c in zip(near[row], cosine[row], strict=True)
                ],
                "logits": logits[row],
                "explained": _explained(shown.explanations[latent]),
                "contexts": shown.places.cut(latent, windows, row, shown.settings.window),
            }
        )
    return records


def _logits(shown: Shown, latents: slice) -> list[dict[str, Any] | None]:
    effects = shown.logits
    if effects is None:
        return [None] * len(range(shown.stats.d_sae)[latents])
    strings = shown.stats.strings
    by = {name: significant(getattr(effects, f"{name}_by")[latents]).tolist() for name in ("raised", "lowered")}
    edges = significant(
        np.linspace(effects.lowered_by[latents, 0], effects.raised_by[latents, 0], effects.histogram.shape[1] + 1, axis=1)
    )
    skew, kurtosis = significant(effects.skew[latents]), significant(effects.kurtosis[latents])
    return [
        {
            name: [list(pair) for pair in zip(strings(getattr(effects, name)[latent]), by[name][row], strict=True)]
            for name in by
        }
        | {"counts": effects.histogram[latent], "edges": edges[row], "skew": skew[row], "kurtosis": kurtosis[row]}
        for row, latent in enumerate(range(shown.stats.d_sae)[latents])
    ]


def _explained(found: Explanation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    tables = {
        name: [
            [share.token, share.firings, share.occurrences, significant(share.mean), significant(share.pmi)]
            for share in shares
        ]
        for name, shares in (("by_mean", found.by_mean), ("by_pmi", found.by_pmi))
    }
    return tables | {
        "words": found.words,
        "purity": significant(found.purity),
        "position": significant(found.position),
        "best": found.best,
        "auc": {name: significant(rule.auc) for name, rule in found.rules.items()},
    }


def _number_tokens(stats: LatentStats, contexts: Sequence[dict[str, Any]]) -> list[str]:
    """Replace token ids by places in a short list of the strings that occur, which is returned."""
    if not contexts:
        return []
    ids, place = np.unique(np.concatenate([context["t"] for context in contexts]), return_inverse=True)
    ends = np.cumsum([len(context["t"]) for context in contexts])
    for context, numbers in zip(contexts, np.split(place, ends[:-1]), strict=True):
        context["t"] = numbers
    return stats.strings(ids)
