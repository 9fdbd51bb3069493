"""Everything a latent's page shows, for one file of latents at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sae_research.analysis.dashboard.contexts import Places, significant
from sae_research.analysis.dashboard.histograms import activation_bars
from sae_research.analysis.dashboard.logits import LogitEffects, logit_effects
from sae_research.analysis.dashboard.neighbours import nearest
from sae_research.analysis.explain import Explainer, Explanation, LogitTail
from sae_research.analysis.layout import LatentStats
from sae_research.dashboard_params import Dashboards
from sae_research.errors import UserError
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder

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
        return -(-self.stats.d_sae // self.settings.latents_per_file)

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
        return LogitTail(self.stats.strings(self.logits.raised[latent, :5]), float(self.logits.skew[latent]),
                         float(self.logits.kurtosis[latent]))

    @cached_property
    def labels(self) -> list[str]:
        """A few tokens that stand for each latent: those of largest mean activation, else those of its top contexts."""
        return [" ".join(dict.fromkeys(visible(token) for token in tokens[:LABEL_TOKENS]))
                for tokens in (self._label_tokens(latent) for latent in range(self.stats.d_sae))]

    def _label_tokens(self, latent: int) -> list[str]:
        found = self.explanations[latent]
        if found is not None:
            return [share.token for share in found.by_mean]
        context, position = self._top
        there = context[latent] >= 0
        ids = self.stats.token_ids[context[latent][there], position[latent][there]]
        return list(dict.fromkeys(self.stats.strings(ids)))

    @cached_property
    def _top(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.load(self.stats.folder / f"top_{part}.npy") for part in ("context", "position"))

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
    size = shown.settings.latents_per_file
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
    figures = {name: significant(values[part]) for name, values in (
        ("density", stats.density), ("cah", stats.cah), ("max", stats.max), ("min", stats.min), ("mean", stats.mean),
        ("sd", stats.standard_deviation))}
    density, kind, quantiles = shown.density, stats.kind[part], significant(shown.quantiles[part])
    logits = _logits(shown, part)
    records = []
    for row, latent in enumerate(latents):
        records.append({
            "id": latent, "kind": str(kind[row]), "count": int(stats.count[latent]),
            "contexts_firing": int(stats.contexts_firing[latent]), "label": shown.labels[latent],
            **{name: values[row] for name, values in figures.items()},
            "quantiles": quantiles[row], "bars": bars[row],
            "near": [{"id": int(n), "cosine": c, "label": shown.labels[n], "density": density[n]}
                     for n, c in zip(near[row], cosine[row], strict=True)],
            "logits": logits[row], "explained": _explained(shown.explanations[latent]),
            "contexts": shown.places.cut(latent, windows, row, shown.settings.window)})
    return records


def _logits(shown: Shown, latents: slice) -> list[dict[str, Any] | None]:
    effects = shown.logits
    if effects is None:
        return [None] * len(range(shown.stats.d_sae)[latents])
    strings = shown.stats.strings
    by = {name: significant(getattr(effects, f"{name}_by")[latents]).tolist() for name in ("raised", "lowered")}
    edges = significant(np.linspace(effects.lowered_by[latents, 0], effects.raised_by[latents, 0],
                                    effects.histogram.shape[1] + 1, axis=1))
    skew, kurtosis = significant(effects.skew[latents]), significant(effects.kurtosis[latents])
    return [{name: [list(pair) for pair in zip(strings(getattr(effects, name)[latent]), by[name][row], strict=True)]
             for name in by} | {"counts": effects.histogram[latent], "edges": edges[row], "skew": skew[row],
                                "kurtosis": kurtosis[row]}
            for row, latent in enumerate(range(shown.stats.d_sae)[latents])]


def _explained(found: Explanation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    tables = {name: [[share.token, share.firings, share.occurrences, significant(share.mean), significant(share.pmi)]
                     for share in shares] for name, shares in (("by_mean", found.by_mean), ("by_pmi", found.by_pmi))}
    return tables | {"words": found.words, "purity": significant(found.purity), "position": significant(found.position),
                     "best": found.best, "auc": {name: significant(rule.auc) for name, rule in found.rules.items()}}


def _number_tokens(stats: LatentStats, contexts: Sequence[dict[str, Any]]) -> list[str]:
    """Replace token ids by places in a short list of the strings that occur, which is returned."""
    if not contexts:
        return []
    ids, place = np.unique(np.concatenate([context["t"] for context in contexts]), return_inverse=True)
    ends = np.cumsum([len(context["t"]) for context in contexts])
    for context, numbers in zip(contexts, np.split(place, ends[:-1]), strict=True):
        context["t"] = numbers
    return stats.strings(ids)
