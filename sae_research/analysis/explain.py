"""What a latent fires on, said without labels and scored by how well it predicts firing on text it was not drawn from.

Descriptors come from a fixed three quarters of the documents in the store of statistics, scores from the rest. A rule
predicts firing from the token alone (its table below), from the token before it, or from the position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import CHUNK_LATENTS, direct_logits
from sae_research.analysis.store import LatentStats, check_latents
from sae_research.runtime.errors import UserError

HELD_OUT_EVERY = 4
"""Every fourth document, by its number, is held out."""
MIN_TRAIN_FIRINGS, MIN_TEST_FIRINGS = 10, 3
SMOOTHING = 1.0
"""Firings added to each token's count, spread at the latent's density: a token seen once says little."""
POSITION_BINS = 8
WORDS = 4
"""Tokens that an explanation names."""


class TokenShare(NamedTuple):
    token: str
    firings: int
    """On this token, in training documents."""
    occurrences: int
    mean: float
    """Mean activation over all occurrences of the token, silent ones counted as 0."""
    pmi: float
    """log2 of P(token | fires) / P(token), smoothed."""


class Rule(NamedTuple):
    """How well one way to predict firing does on held-out tokens."""

    auc: float
    """Area under the ROC curve; 0.5 is chance."""
    average_precision: float
    """Chance is the latent's held-out density."""


class Explanation(NamedTuple):
    latent: int
    density: float
    by_mean: list[TokenShare]
    """Tokens of largest mean activation, among those on which it fires at least twice."""
    by_pmi: list[TokenShare]
    purity: float
    """Fraction of firings on the token it fires on most."""
    token_entropy: float
    """Of the tokens it fires on, in bits."""
    position: float
    """Mean position of its firings within the context, 0 first to 1 last."""
    position_spread: float
    """Standard deviation; 0.29 for firings spread evenly."""
    promoted: list[str]
    """Tokens its direction raises most; empty where logits were not given."""
    logit_skew: float | None
    """Of its direct logits over the vocabulary: large for a latent that means few tokens."""
    logit_kurtosis: float | None
    """Excess: 0 for a normal distribution."""
    rules: dict[str, Rule]
    """`token`, `previous token`, `position`: held-out score of each; empty with too few held-out firings."""
    best: str
    """The rule of largest AUC, or `unscored`."""
    words: str
    """The explanation in a line."""


class LogitTail(NamedTuple):
    """What `explain` wants to know of a latent's direct logits."""

    promoted: list[str]
    skew: float
    kurtosis: float


def logit_tail(logits: np.ndarray, tokens: Sequence[str], k: int = 5) -> LogitTail:
    """Top tokens, skewness and excess kurtosis of logits [vocab]."""
    centred = logits.astype(np.float64) - logits.mean()
    spread = max(float(np.sqrt(np.mean(centred**2))), 1e-12)
    best = np.argsort(-logits, kind="stable")[:k]
    return LogitTail(
        [tokens[i] for i in best], float(np.mean(centred**3)) / spread**3, float(np.mean(centred**4)) / spread**4 - 3
    )


def token_shares(
    fired: np.ndarray, strength: np.ndarray, occurrences: np.ndarray, vocabulary: Sequence[str], density: float
) -> list[TokenShare]:
    """Every token on which a latent fires. fired, strength: token ids and magnitudes of its firings [n]; occurrences: of
    every token id in the same text [vocab]; density: of the latent there."""
    ids, firings = np.unique(fired, return_counts=True)
    totals = np.zeros(len(ids))
    np.add.at(totals, np.searchsorted(ids, fired), strength)
    seen = occurrences[ids]
    pmi = np.log2((firings + SMOOTHING * density) / (seen + SMOOTHING) / density)
    return [
        TokenShare(vocabulary[i], int(n), int(o), float(t / o), float(p))
        for i, n, o, t, p in zip(ids, firings, seen, totals, pmi, strict=True)
    ]


def by_mean_activation(shares: Sequence[TokenShare], k: int) -> list[TokenShare]:
    """The k tokens that a latent *fires on*, everywhere the words stand: those of largest mean activation over all their
    occurrences, among those on which it fires twice."""
    return sorted(_often(shares), key=lambda s: (-s.mean, s.token))[:k]


def _often(shares: Sequence[TokenShare]) -> Sequence[TokenShare]:
    return [share for share in shares if share.firings > 1] or shares


class Explainer:
    """Explains latents of one store; what all latents share is computed once."""

    def __init__(self, stats: LatentStats) -> None:
        """Raises `UserError` for a store with too few documents to hold any out."""
        self.stats = stats
        if len(np.unique(self._documents[self._counted] % HELD_OUT_EVERY == 0)) < 2:
            raise UserError(f"{stats.folder}: its text is of too few documents to hold some out; raise analysis.tokens")

    @cached_property
    def _documents(self) -> np.ndarray:
        return np.asarray(self.stats.document).reshape(-1)

    @cached_property
    def _counted(self) -> np.ndarray:
        return np.asarray(self.stats.counted).reshape(-1)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.asarray(self.stats.token_ids).reshape(-1).astype(np.int64)

    @cached_property
    def _previous(self) -> np.ndarray:
        """The token before each; the separator leads every context, and it does not count itself."""
        return np.roll(self._tokens, 1)

    @cached_property
    def _train(self) -> np.ndarray:
        return self._counted & (self._documents % HELD_OUT_EVERY != 0)

    @cached_property
    def _test(self) -> np.ndarray:
        return np.flatnonzero(self._counted & (self._documents % HELD_OUT_EVERY == 0))

    @cached_property
    def _counts(self) -> dict[str, np.ndarray]:
        """How often each value of a feature occurs in training documents."""
        size = len(self.stats.vocabulary)
        return {
            "token": np.bincount(self._tokens[self._train], minlength=size),
            "previous token": np.bincount(self._previous[self._train], minlength=size),
            "position": np.bincount(self._bins[self._train], minlength=POSITION_BINS),
        }

    @cached_property
    def _bins(self) -> np.ndarray:
        """Position within the context, in `POSITION_BINS` parts."""
        size = self.stats.context_size
        return np.tile(np.arange(size) * POSITION_BINS // size, self.stats.n_contexts)

    def explain(self, latent: int, k: int = 10, tail: LogitTail | None = None) -> Explanation | None:
        """Describe and score one latent; None where it fires on fewer than `MIN_TRAIN_FIRINGS` training tokens."""
        check_latents([latent], self.stats.d_sae)
        numbers, values = self.stats.activations(latent)
        inside = self._train[numbers]
        fired, strength = numbers[inside], np.abs(values[inside]).astype(np.float64)
        if len(fired) < MIN_TRAIN_FIRINGS:
            return None
        density = len(fired) / int(self._train.sum())
        shares = token_shares(self._tokens[fired], strength, self._counts["token"], self.stats.vocabulary, density)
        firings = np.array([share.firings for share in shares])
        share_of = firings / firings.sum()
        place = (fired % self.stats.context_size) / max(1, self.stats.context_size - 1)
        by_mean = by_mean_activation(shares, k)
        by_pmi = sorted(_often(shares), key=lambda s: (-s.pmi, s.token))[:k]
        rules = self._scored(numbers, fired, density)
        best = max(rules, key=lambda name: rules[name].auc) if rules else "unscored"
        found = Explanation(
            latent,
            float(self.stats.density[latent]),
            by_mean,
            by_pmi,
            float(share_of.max()),
            float(-(share_of * np.log2(share_of)).sum()),
            float(place.mean()),
            float(place.std()),
            [] if tail is None else tail.promoted,
            None if tail is None else tail.skew,
            None if tail is None else tail.kurtosis,
            rules,
            best,
            "",
        )
        return found._replace(words=in_words(found))

    def _scored(self, numbers: np.ndarray, fired: np.ndarray, density: float) -> dict[str, Rule]:
        """Each rule's P(fires | feature), learnt on training documents, ranks the held-out tokens."""
        fires = np.zeros(len(self._tokens), bool)
        fires[numbers] = True
        truth = fires[self._test]
        if truth.sum() < MIN_TEST_FIRINGS or truth.all():
            return {}
        features = {"token": self._tokens, "previous token": self._previous, "position": self._bins}
        rules = {}
        for name, values in features.items():
            counts = self._counts[name]
            hits = np.bincount(values[fired], minlength=len(counts))
            rate = (hits + SMOOTHING * density) / (counts + SMOOTHING)
            rules[name] = Rule(*ranking_scores(rate[values[self._test]], truth))
        return rules


def ranking_scores(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(AUC, average precision) of scores [n] for yes and no [n]; ties count half, and share one threshold."""
    levels, level = np.unique(-scores, return_inverse=True)
    yes = np.bincount(level, weights=truth, minlength=len(levels))
    no = np.bincount(level, weights=~truth, minlength=len(levels))
    above = np.cumsum(no) - no
    total_no = no.sum()
    auc = float((yes * (total_no - above - no / 2)).sum() / (yes.sum() * total_no))
    precision = np.cumsum(yes) / (np.cumsum(yes) + np.cumsum(no))
    return auc, float((precision * yes).sum() / yes.sum())


def in_words(found: Explanation) -> str:
    """One line: the tokens it fires on (`by_mean_activation`), what tells best when it fires, and how well."""
    listed = "fires on " + ", ".join(repr(share.token) for share in found.by_mean[:WORDS])
    if found.best == "unscored":
        return f"{listed}; too rare to score"
    score = found.rules[found.best].auc
    if found.best == "position":
        return f"{listed}; told best by position (around {found.position:.0%} of the context), held-out AUC {score:.2f}"
    if found.purity >= 0.5:
        listed += f" ({found.purity:.0%} of its firings on {found_most(found)!r})"
    told = f"{listed}; told best by the {found.best}, held-out AUC {score:.2f}"
    return told + ("" if math.isnan(score) or score >= 0.75 else ": context decides most of it")


def found_most(found: Explanation) -> str:
    """The token it fires on most often, among those listed."""
    return max((*found.by_mean, *found.by_pmi), key=lambda share: share.firings).token


def explain_latents(
    analysis: AnalysisContext, name: str, latents: Sequence[int] | None = None, progress: bool = False
) -> list[Explanation]:
    """Explanations of latents (default all) of one SAE, with their logit tails where they have direct logits."""
    sae, store = analysis.saes[name], analysis.stats(name, progress)
    chosen = list(range(sae.cfg.d_sae)) if latents is None else list(latents)
    explainer = Explainer(store)
    direct = sae.cfg.d_out == analysis.lm.d_model and sae.cfg.in_stream
    found = []
    for start in range(0, len(chosen), CHUNK_LATENTS):
        part = chosen[start : start + CHUNK_LATENTS]
        check_latents(part, sae.cfg.d_sae)
        logits = direct_logits(analysis, sae, part).numpy() if direct else [None] * len(part)
        for latent, row in zip(part, logits, strict=True):
            if store.count[latent] < MIN_TRAIN_FIRINGS:
                continue
            tail = None if row is None else logit_tail(row, store.vocabulary)
            one = explainer.explain(latent, tail=tail)
            if one is not None:
                found.append(one)
    return found


def as_json(found: Explanation) -> dict[str, Any]:
    """An explanation as plain values."""
    return {
        **found._asdict(),
        "by_mean": [share._asdict() for share in found.by_mean],
        "by_pmi": [share._asdict() for share in found.by_pmi],
        "rules": {rule: score._asdict() for rule, score in found.rules.items()},
    }
